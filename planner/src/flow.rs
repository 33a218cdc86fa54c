//! Where calls run with a set of paths fused, what that saves and what it costs.
//!
//! A call of Bar by Foo in Foo's own workers runs there if `Foo/Bar` is fused,
//! else in Bar's workers; what Bar calls in turn goes by `Foo/Bar/…`, or by
//! `Bar/…`. So fusing one path takes calls away from others:
//!
//! ```text
//!  runs in v's own workers = arrivals of v + calls of v by RPC, from everywhere
//!  runs on a fused path    = runs in its root's workers × calls per execution
//! ```

use std::collections::BTreeMap;

use crate::forest::Forest;
use crate::graph::Calls;
use crate::settings::Settings;

/// Changes below this are none.
const TOLERANCE: f64 = 1e-12;
const MOST_ROUNDS: usize = 1000;
const WORTH_ROUNDS: usize = 40;

/// What all of this is about.
#[derive(Debug)]
pub(crate) struct Model<'a> {
    pub(crate) calls: &'a Calls<'a>,
    pub(crate) forest: &'a Forest,
    pub(crate) settings: &'a Settings,
    /// For each candidate its price while it is fused, and while it is not, in
    /// seconds per second: memory held, and what the change costs.
    pub(crate) price: Vec<(f64, f64)>,
}

/// What a selection comes to.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// Executions per second of each function in its own workers.
    pub(crate) own: Vec<f64>,
    /// Seconds of overhead saved per second.
    pub(crate) saved: f64,
    /// The same with what is fused now worth more, by the margin.
    pub(crate) worth: f64,
    /// Seconds per second that it costs.
    pub(crate) cost: f64,
    /// Constraints that do not hold.
    pub(crate) violations: usize,
}

impl Outcome {
    pub(crate) fn value(&self) -> f64 {
        self.worth - self.cost
    }
}

impl<'a> Model<'a> {
    pub(crate) fn new(calls: &'a Calls<'a>, forest: &'a Forest, settings: &'a Settings) -> Self {
        let price = forest.candidates.iter().map(|candidate| {
            let functions = &calls.graph.functions;
            let workers = f64::from(functions[candidate.root()].workers);
            #[expect(clippy::cast_precision_loss, reason = "a price")]
            let mib = functions[candidate.function()].graft_bytes as f64 / f64::from(1 << 20);
            let memory = workers * mib * settings.memory_price_s;
            let per_second = workers / settings.horizon_s;
            if candidate.fused {
                let revert = per_second * settings.revert_s;
                (memory / settings.hysteresis, revert)
            } else {
                let inject = per_second * settings.inject_s * settings.hysteresis;
                (memory * settings.hysteresis + inject, 0.0)
            }
        });
        Model {
            price: price.collect(),
            calls,
            forest,
            settings,
        }
    }

    /// Seconds per second that a root's workers may be busy, if something new is
    /// to be fused into it, and if not: with their own calls alone they may be
    /// busier than they should.
    pub(crate) fn busy_room(&self, root: usize) -> (f64, f64) {
        let function = &self.calls.graph.functions[root];
        let most = |share: f64| {
            function.cores.map_or(f64::INFINITY, |cores| {
                let alone = self.calls.executions[root] * function.own_s;
                (cores * share).max(alone)
            })
        };
        let share = self.settings.busy_share;
        (most(share), most(share * (1.0 + self.settings.margin)))
    }

    /// Seconds that a call on a candidate's last edge saves, to decide by.
    pub(crate) fn saves(&self, c: usize) -> f64 {
        let candidate = &self.forest.candidates[c];
        let overhead = self.calls.graph.edges[candidate.edge].overhead_s;
        match candidate.fused {
            true => overhead * (1.0 + self.settings.margin),
            false => overhead,
        }
    }

    /// Bytes that the selected ones of a root's hold in one of its workers.
    pub(crate) fn held(&self, root: usize, selected: &[bool]) -> u64 {
        let range = self.forest.of_root[root].clone();
        range
            .filter(|&c| selected[c])
            .map(|c| {
                let function = self.forest.candidates[c].function();
                self.calls.graph.functions[function].graft_bytes
            })
            .fold(0, u64::saturating_add)
    }

    /// Seconds that an execution of a root takes in its own workers, with what is
    /// fused into it.
    pub(crate) fn busy_per_execution(&self, root: usize, selected: &[bool]) -> f64 {
        let functions = &self.calls.graph.functions;
        let range = self.forest.of_root[root].clone();
        let fused = range.filter(|&c| selected[c]).map(|c| {
            let candidate = &self.forest.candidates[c];
            candidate.per_root * functions[candidate.function()].own_s
        });
        functions[root].own_s + fused.sum::<f64>()
    }

    /// Calls by RPC per execution of a root in its own workers, to each function:
    /// its own, and those of what is fused into it.
    fn spilled(&self, root: usize, selected: &[bool]) -> Vec<(usize, f64)> {
        let mut all: BTreeMap<usize, f64> = BTreeMap::new();
        let mut places = vec![(root, 1.0, None)];
        for c in self.forest.of_root[root].clone() {
            if selected[c] {
                let candidate = &self.forest.candidates[c];
                places.push((candidate.function(), candidate.per_root, Some(c)));
            }
        }
        let fused_from = |place: Option<usize>, edge: usize| {
            let range = match place {
                None => self.forest.of_root[root].clone(),
                Some(c) => c + 1..c + 1 + self.forest.candidates[c].below,
            };
            let mut at = range.start;
            while at < range.end {
                let candidate = &self.forest.candidates[at];
                if candidate.parent == place && candidate.edge == edge {
                    return selected[at];
                }
                at += 1 + candidate.below;
            }
            false
        };
        for (function, per_root, place) in places {
            for &(edge, per_execution) in &self.calls.out[function] {
                if per_execution > 0.0 && !fused_from(place, edge) {
                    let callee = self.calls.graph.edges[edge].callee;
                    *all.entry(callee).or_default() += per_root * per_execution;
                }
            }
        }
        all.into_iter().collect()
    }

    /// All roots' calls by RPC, as [`Model::spilled`].
    pub(crate) fn all_spilled(&self, selected: &[bool]) -> Vec<Vec<(usize, f64)>> {
        (0..self.calls.graph.functions.len())
            .map(|root| self.spilled(root, selected))
            .collect()
    }

    /// The same of one root, after a change of it.
    pub(crate) fn spill_again(
        &self,
        root: usize,
        selected: &[bool],
        all: &mut [Vec<(usize, f64)>],
    ) {
        all[root] = self.spilled(root, selected);
    }

    /// Executions of each function in its own workers.
    pub(crate) fn own(&self, spilled: &[Vec<(usize, f64)>]) -> Vec<f64> {
        let graph = self.calls.graph;
        let most = &self.calls.executions;
        let arrivals: Vec<f64> = graph.functions.iter().map(|f| f.arrivals).collect();
        let calls = self.calls;
        // Of calls that lead back in the order, so many; at first as if nothing
        // were fused: with circles that no call comes out of, as measurements
        // may show them, what was measured stands.
        let mut back: Vec<f64> = vec![0.0; most.len()];
        for edge in &graph.edges {
            if calls.position[edge.callee] <= calls.position[edge.caller] {
                back[edge.callee] += edge.rate;
            }
        }
        let mut own = vec![0.0; most.len()];
        for _ in 0..MOST_ROUNDS {
            let mut came: Vec<f64> = arrivals.iter().zip(&back).map(|(a, b)| a + b).collect();
            let mut back_now = vec![0.0; most.len()];
            for &root in &calls.order {
                own[root] = came[root].min(most[root]);
                for &(callee, n) in &spilled[root] {
                    match calls.position[callee] > calls.position[root] {
                        true => came[callee] += own[root] * n,
                        false => back_now[callee] += own[root] * n,
                    }
                }
            }
            let far = (back.iter().zip(&back_now).zip(most))
                .any(|((a, b), most)| (a - b).abs() > TOLERANCE * (1.0 + most));
            back = back_now;
            if !far {
                break;
            }
        }
        own
    }

    /// Overhead saved by everything that one execution in a function's own
    /// workers leads to, there and further on.
    pub(crate) fn worth(&self, selected: &[bool], spilled: &[Vec<(usize, f64)>]) -> Vec<f64> {
        let graph = self.calls.graph;
        let here: Vec<f64> = (0..graph.functions.len())
            .map(|root| {
                let range = self.forest.of_root[root].clone();
                range
                    .filter(|&c| selected[c])
                    .map(|c| self.forest.candidates[c].per_root * self.saves(c))
                    .sum()
            })
            .collect();
        let mut worth = here.clone();
        // It only guides: whatever it leads to is looked at as a whole.
        for _ in 0..WORTH_ROUNDS {
            let mut far = false;
            for &root in self.calls.order.iter().rev() {
                let calls = spilled[root].iter();
                let onward: f64 = calls.map(|&(callee, n)| n * worth[callee]).sum();
                let next = here[root] + onward;
                far |= (next - worth[root]).abs() > 1e-7 * (1e-9 + next.abs());
                worth[root] = next;
            }
            // A cycle that grows: no number is right, and none is needed.
            if !far || worth.iter().any(|w| !w.is_finite() || *w > 1e6) {
                break;
            }
        }
        worth
    }

    /// What a selection comes to. Each selected path's parent is selected too.
    pub(crate) fn outcome(&self, selected: &[bool]) -> Outcome {
        self.outcome_of(selected, &self.all_spilled(selected))
    }

    pub(crate) fn outcome_of(&self, selected: &[bool], spilled: &[Vec<(usize, f64)>]) -> Outcome {
        let graph = self.calls.graph;
        let own = self.own(spilled);
        let (mut saved, mut worth, mut cost, mut violations) = (0.0, 0.0, 0.0, 0);
        for (index, candidate) in self.forest.candidates.iter().enumerate() {
            let (on, off) = self.price[index];
            if selected[index] {
                let calls = own[candidate.root()] * candidate.per_root;
                saved += calls * graph.edges[candidate.edge].overhead_s;
                worth += calls * self.saves(index);
                cost += on;
                let parent = candidate.parent;
                violations += usize::from(parent.is_some_and(|parent| !selected[parent]));
            } else {
                cost += off;
            }
        }
        for (root, function) in graph.functions.iter().enumerate() {
            if self.forest.of_root[root].is_empty() {
                continue;
            }
            let held = self.held(root, selected);
            violations += usize::from(function.memory_room.is_some_and(|room| held > room));
            let mut range = self.forest.of_root[root].clone();
            let any = range.clone().any(|c| selected[c]);
            let new = range.any(|c| selected[c] && !self.forest.candidates[c].fused);
            let busy = own[root] * self.busy_per_execution(root, selected);
            let (room, room_kept) = self.busy_room(root);
            let room = if new { room } else { room_kept };
            violations += usize::from(any && busy > room * (1.0 + 1e-9));
        }
        Outcome {
            own,
            saved,
            worth,
            cost,
            violations,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::testing::{chain, edge};

    fn with<T>(graph: &crate::graph::Graph, act: impl FnOnce(&Model<'_>) -> T) -> T {
        let calls = Calls::of(graph);
        let settings = Settings::default();
        let forest = Forest::grow(&calls, &HashSet::new(), &HashSet::new(), &settings);
        act(&Model::new(&calls, &forest, &settings))
    }

    fn select(model: &Model<'_>, paths: &[&[usize]]) -> Vec<bool> {
        let candidates = model.forest.candidates.iter();
        candidates
            .map(|c| paths.contains(&c.path.as_slice()))
            .collect()
    }

    #[test]
    fn what_is_fused_takes_calls_away_from_the_callee_s_workers() {
        with(&chain(&["A", "B", "C"], 1000.0), |model| {
            let of = |paths: &[&[usize]]| model.outcome(&select(model, paths));
            assert_eq!(of(&[]).own, [1000.0, 1000.0, 1000.0]);
            let one = of(&[&[0, 1]]);
            assert_eq!(one.own, [1000.0, 0.0, 1000.0]);
            assert!((one.saved - 1000.0 * 20e-6).abs() < 1e-12);
            // B's own workers run no more: B/C saves nothing.
            let idle = of(&[&[0, 1], &[1, 2]]);
            assert!((idle.saved - one.saved).abs() < 1e-12 && idle.cost > one.cost);
            let both = of(&[&[0, 1], &[0, 1, 2]]);
            assert_eq!(both.own, [1000.0, 0.0, 0.0]);
            assert!((both.saved - 2.0 * one.saved).abs() < 1e-12);
        });
    }

    #[test]
    fn a_cycle_comes_to_its_sum() {
        let mut graph = chain(&["A", "B"], 1000.0);
        // Half of B's executions call A again: 2000 each, 1000 of them arrivals.
        graph.edges[0].rate = 2000.0;
        graph.edges.push(edge(1, 0, 1000.0));
        with(&graph, |model| {
            let none = model.outcome(&select(model, &[]));
            assert!((none.own[0] - 2000.0).abs() < 1e-6, "{none:?}");
            // A in B: A's own workers are left the arrivals, and those B's calls.
            let one = model.outcome(&select(model, &[&[0, 1]]));
            assert!(
                (one.own[0] - 2000.0).abs() < 1e-6 && one.own[1] < 1e-6,
                "{one:?}"
            );
            let selected = select(model, &[&[0, 1]]);
            let worth = model.worth(&selected, &model.all_spilled(&selected));
            assert!((worth[0] * 1000.0 - one.saved).abs() < 1e-6 * one.saved);
        });
    }

    #[test]
    fn constraints_are_counted() {
        let mut graph = chain(&["A", "B"], 1000.0);
        graph.functions[0].memory_room = Some(50 << 10);
        graph.functions[0].cores = Some(0.02);
        with(&graph, |model| {
            assert_eq!(model.outcome(&select(model, &[])).violations, 0);
            assert_eq!(model.outcome(&select(model, &[&[0, 1]])).violations, 2);
        });
        let mut graph = chain(&["A", "B", "C"], 1000.0);
        graph.functions[0].cores = Some(4.0);
        with(&graph, |model| {
            let orphan = model.outcome(&select(model, &[&[0, 1, 2]]));
            assert_eq!(orphan.violations, 1);
        });
    }
}
