//! What can be fused at all: paths of calls, as trees below the functions whose
//! own workers they would be fused in.
//!
//! ```text
//!  Foo ─┬─ Foo/Bar ─── Foo/Bar/Baz      Bar ─── Bar/Baz      Baz
//!       └─ Foo/Qux
//! ```
//!
//! `Foo/Bar/Baz` is Baz, fused into Bar, fused into Foo: a graft of its own in
//! Foo's workers, which takes that `Foo/Bar` is there. A path comes by no
//! function twice.

use std::collections::{BinaryHeap, HashMap, HashSet};

use crate::graph::Calls;
use crate::settings::Settings;

/// Indices of functions, the root first.
pub type Path = Vec<usize>;

/// Most candidates below one root, and about as many below all: the most
/// promising of each root are kept.
const MOST_OF_ROOT: usize = 256;
const MOST: usize = 15_000;

/// A path that could be fused.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) path: Path,
    /// The candidate that it takes, unless it begins at the root.
    pub(crate) parent: Option<usize>,
    /// The edge that leads to its last function.
    pub(crate) edge: usize,
    /// Calls on it per execution of the root in its own workers, with everything
    /// up to here fused.
    pub(crate) per_root: f64,
    /// Candidates behind this one that lie below it: they follow at once.
    pub(crate) below: usize,
    /// Fused now.
    pub(crate) fused: bool,
}

impl Candidate {
    pub(crate) fn root(&self) -> usize {
        self.path[0]
    }

    pub(crate) fn function(&self) -> usize {
        self.path[self.path.len() - 1]
    }
}

/// All candidates, root after root, each root's in preorder.
#[derive(Debug)]
pub(crate) struct Forest {
    pub(crate) candidates: Vec<Candidate>,
    /// Each root's, as a range.
    pub(crate) of_root: Vec<std::ops::Range<usize>>,
    /// Paths that are fused and may not be, with the reason.
    pub(crate) lost: Vec<(Path, String)>,
}

/// Why an edge can't be fused below a root, if so.
pub(crate) fn forbidden(calls: &Calls<'_>, root: usize, edge: usize) -> Option<String> {
    let graph = calls.graph;
    let edge = &graph.edges[edge];
    let (caller, callee) = (&graph.functions[root], &graph.functions[edge.callee]);
    if let Some(why) = &caller.unfusable {
        return Some(format!("{}: {why}", caller.name));
    }
    if let Some(why) = &callee.unfusable {
        return Some(format!("{}: {why}", callee.name));
    }
    if caller.domain != callee.domain {
        return Some(format!(
            "{} and {} are of different trust domains",
            caller.name, callee.name
        ));
    }
    if edge.caller == edge.callee {
        return Some(format!("{} calls itself", caller.name));
    }
    edge.forbidden.clone()
}

/// An extension of a tree that waits for its turn.
struct Waiting {
    worth: f64,
    path: Path,
    edges: Vec<usize>,
    per_root: f64,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Waiting {}
impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // The same order each time, equal worths included.
        self.worth
            .total_cmp(&other.worth)
            .then_with(|| other.path.cmp(&self.path))
    }
}

impl Forest {
    /// All paths that may be worth something, and those that are fused.
    /// Those `apart` are left alone unless they are fused, with what lies below.
    pub(crate) fn grow(
        calls: &Calls<'_>,
        fused: &HashSet<Path>,
        apart: &HashSet<Path>,
        settings: &Settings,
    ) -> Forest {
        let graph = calls.graph;
        let most = reach(calls, settings.depth);
        let mut forest = Forest {
            candidates: Vec::new(),
            of_root: Vec::with_capacity(graph.functions.len()),
            lost: Vec::new(),
        };
        for root in 0..graph.functions.len() {
            let first = forest.candidates.len();
            let kept = forest.tree(calls, root, (fused, apart), &most, settings);
            forest.lay_out(kept, root, fused);
            forest.of_root.push(first..forest.candidates.len());
        }
        let known: HashSet<&Path> = forest.candidates.iter().map(|c| &c.path).collect();
        let mut lost: Vec<Path> = fused
            .iter()
            .filter(|p| !known.contains(p))
            .cloned()
            .collect();
        lost.sort();
        forest.lost = lost
            .into_iter()
            .map(|path| {
                let why = why_lost(calls, &path, settings);
                (path, why)
            })
            .collect();
        forest
    }

    /// The paths below one root that are kept, with the edge that leads there and
    /// the calls per execution of the root.
    fn tree(
        &self,
        calls: &Calls<'_>,
        root: usize,
        (fused, apart): (&HashSet<Path>, &HashSet<Path>),
        most: &[Vec<f64>],
        settings: &Settings,
    ) -> HashMap<Path, (usize, f64)> {
        let graph = calls.graph;
        let all = calls.executions[root];
        // What is cheapest to have: one that takes no memory.
        let price = f64::from(graph.functions[root].workers) * settings.inject_s
            / settings.horizon_s
            * settings.hysteresis;
        let mut waiting = BinaryHeap::new();
        let extend = |waiting: &mut BinaryHeap<Waiting>, path: &Path, edges: &[usize], f: f64| {
            if path.len() >= settings.depth {
                return;
            }
            for &(index, per_execution) in &calls.out[path[path.len() - 1]] {
                let edge = &graph.edges[index];
                if path.contains(&edge.callee) || forbidden(calls, root, index).is_some() {
                    continue;
                }
                let per_root = f * per_execution;
                let left = settings.depth - path.len() - 1;
                let worth = all * per_root * (edge.overhead_s + most[left][edge.callee]);
                // Required is what the root's own workers call.
                let required = edge.required && path.len() == 1;
                let mut path = path.clone();
                path.push(edge.callee);
                let is_fused = fused.contains(&path);
                if !is_fused && (worth <= price && !required || apart.contains(&path)) {
                    continue;
                }
                let worth = match required || is_fused {
                    true => f64::INFINITY,
                    false => worth,
                };
                let mut edges = edges.to_vec();
                edges.push(index);
                waiting.push(Waiting {
                    worth,
                    path,
                    edges,
                    per_root,
                });
            }
        };
        extend(&mut waiting, &vec![root], &[], 1.0);
        let most_of_root = (MOST / graph.functions.len()).clamp(8, MOST_OF_ROOT);
        let mut kept = HashMap::new();
        while let Some(next) = waiting.pop() {
            if kept.len() >= most_of_root && next.worth.is_finite() {
                break;
            }
            let edge = next.edges[next.edges.len() - 1];
            extend(&mut waiting, &next.path, &next.edges, next.per_root);
            kept.insert(next.path, (edge, next.per_root));
        }
        kept
    }

    /// Appends a root's paths in preorder.
    fn lay_out(&mut self, kept: HashMap<Path, (usize, f64)>, root: usize, fused: &HashSet<Path>) {
        let mut paths: Vec<(Path, (usize, f64))> = kept.into_iter().collect();
        // A prefix comes before what it is a prefix of, with nothing between
        // but others of its own.
        paths.sort_by(|a, b| a.0.cmp(&b.0));
        let mut at: HashMap<Path, usize> = HashMap::new();
        for (path, (edge, per_root)) in paths {
            debug_assert_eq!(path[0], root);
            let index = self.candidates.len();
            let parent = at.get(&path[..path.len() - 1]).copied();
            at.insert(path.clone(), index);
            let mut above = parent;
            while let Some(one) = above {
                self.candidates[one].below += 1;
                above = self.candidates[one].parent;
            }
            self.candidates.push(Candidate {
                fused: fused.contains(&path),
                path,
                parent,
                edge,
                per_root,
                below: 0,
            });
        }
    }
}

/// For each number of calls and each function, the overhead in seconds of one
/// execution of it: its calls', theirs, and so on.
fn reach(calls: &Calls<'_>, depth: usize) -> Vec<Vec<f64>> {
    let functions = calls.graph.functions.len();
    let mut all = vec![vec![0.0; functions]];
    for left in 1..depth.max(1) {
        let next = (0..functions).map(|function| {
            let out = calls.out[function].iter();
            out.map(|&(index, per_execution)| {
                let edge = &calls.graph.edges[index];
                per_execution * (edge.overhead_s + all[left - 1][edge.callee])
            })
            .sum()
        });
        let next = next.collect();
        all.push(next);
    }
    all
}

fn why_lost(calls: &Calls<'_>, path: &Path, settings: &Settings) -> String {
    let graph = calls.graph;
    if path.len() > settings.depth {
        return format!("deeper than {} functions", settings.depth);
    }
    for pair in path.windows(2) {
        let found = (graph.edges.iter()).position(|e| (e.caller, e.callee) == (pair[0], pair[1]));
        match found {
            None => {
                return format!(
                    "{} calls {} no more",
                    graph.name(pair[0]),
                    graph.name(pair[1])
                );
            }
            Some(edge) => {
                if let Some(why) = forbidden(calls, path[0], edge) {
                    return why;
                }
            }
        }
    }
    "what it lies below is not fused".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{chain, edge};

    fn paths(forest: &Forest) -> Vec<Path> {
        forest.candidates.iter().map(|c| c.path.clone()).collect()
    }

    #[test]
    fn trees_are_laid_out_in_preorder() {
        let mut graph = chain(&["A", "B", "C"], 1000.0);
        graph.edges.push(edge(0, 2, 500.0));
        let calls = Calls::of(&graph);
        let forest = Forest::grow(
            &calls,
            &HashSet::new(),
            &HashSet::new(),
            &Settings::default(),
        );
        assert_eq!(
            paths(&forest),
            [vec![0, 1], vec![0, 1, 2], vec![0, 2], vec![1, 2]]
        );
        let of = |index: usize| &forest.candidates[index];
        assert_eq!(of(0).below, 1);
        assert_eq!((of(1).parent, of(1).below), (Some(0), 0));
        assert_eq!(forest.of_root, [0..3, 3..4, 4..4]);
        assert!((of(1).per_root - 1.0).abs() < 1e-9);
        assert!((of(2).per_root - 0.5).abs() < 1e-9);
    }

    #[test]
    fn no_function_comes_twice_and_depth_is_kept() {
        let mut graph = chain(&["A", "B", "C", "D", "E"], 1000.0);
        graph.edges.push(edge(2, 0, 100.0));
        let calls = Calls::of(&graph);
        let settings = Settings {
            depth: 3,
            ..Settings::default()
        };
        let forest = Forest::grow(&calls, &HashSet::new(), &HashSet::new(), &settings);
        for path in paths(&forest) {
            assert!(path.len() <= 3);
            assert_eq!(path.iter().collect::<HashSet<_>>().len(), path.len());
        }
        assert!(paths(&forest).contains(&vec![2, 0, 1]));
    }

    #[test]
    fn what_may_not_be_is_no_candidate_and_says_why_if_it_is_fused() {
        let mut graph = chain(&["A", "B", "C"], 1000.0);
        graph.functions[2].unfusable = Some("runs in Go".to_owned());
        graph.functions[0].domain = "other".to_owned();
        let calls = Calls::of(&graph);
        let fused = HashSet::from([vec![0, 1], vec![1, 2], vec![2, 0]]);
        let forest = Forest::grow(&calls, &fused, &HashSet::new(), &Settings::default());
        assert!(forest.candidates.is_empty());
        let told: Vec<&str> = forest.lost.iter().map(|l| l.1.as_str()).collect();
        assert_eq!(
            told,
            [
                "A and B are of different trust domains",
                "C: runs in Go",
                "C calls A no more"
            ]
        );
    }

    #[test]
    fn what_nobody_calls_is_no_candidate_unless_it_is_fused() {
        let graph = chain(&["A", "B"], 0.001);
        let calls = Calls::of(&graph);
        let none = Forest::grow(
            &calls,
            &HashSet::new(),
            &HashSet::new(),
            &Settings::default(),
        );
        assert!(none.candidates.is_empty());
        let fused = HashSet::from([vec![0, 1]]);
        let one = Forest::grow(&calls, &fused, &HashSet::new(), &Settings::default());
        assert!(one.candidates.len() == 1 && one.candidates[0].fused && one.lost.is_empty());
    }
}
