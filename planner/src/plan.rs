//! The plan: for every edge, what is best, with the figures behind it.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::ascent;
use crate::exact;
use crate::flow::{Model, Outcome};
use crate::forest::{Forest, Path, forbidden};
use crate::graph::{Calls, Graph, GraphError};
use crate::settings::Settings;

/// What is to become of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is an RPC and is worth fusing.
    Fuse,
    /// It is fused and is to stay so, or is an RPC and is to stay that.
    Keep,
    /// It is fused and is not worth it, or may not be any more.
    Unfuse,
    /// It can't be fused.
    NotPossible,
}

/// A path with the figures that decided about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The functions, the root first: `Foo/Bar/Baz` is Baz in Foo's workers.
    pub path: Vec<String>,
    /// What is to be done.
    pub verdict: Verdict,
    /// It is fused now.
    pub fused: bool,
    /// Calls per second on it, as planned.
    pub calls_per_s: f64,
    /// Seconds of RPC overhead that it saves per second, as planned; of what is
    /// not to be fused, what it would save by itself beside the plan.
    pub saved_per_s: f64,
    /// Seconds per second that it must save: memory and the change spread over
    /// the horizon, times the hysteresis, or divided by it where it is fused.
    pub cost_per_s: f64,
    /// Bytes that it holds in all of its root's workers.
    pub memory: u64,
    /// Seconds after which a change has paid; `None` where there is none, or it
    /// never would.
    pub pays_after_s: Option<f64>,
    /// It is un-fused though it saves more than it costs: for something better.
    #[serde(default)]
    pub displaced: bool,
    /// It is un-fused because it may not stay: forbidden, not called any more, or
    /// its worker holds more than it may.
    #[serde(default)]
    pub forced: bool,
    /// Why, in words.
    pub reason: String,
}

/// How good the plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// No set is better: proven by the exact solver.
    Optimal,
    /// The best that was found.
    Heuristic,
}

/// What is best for a graph, as it is fused now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Every path that is fused or may be worth it, and every edge that can't be
    /// fused.
    pub decisions: Vec<Decision>,
    /// Seconds of RPC overhead saved per second, once the plan is done.
    pub saved_per_s: f64,
    /// The same of what is fused now.
    pub saved_now_per_s: f64,
    /// Seconds per second that it costs.
    pub cost_per_s: f64,
    /// Of so many seconds of RPC overhead per second with nothing fused.
    pub overhead_per_s: f64,
    /// How good it is.
    pub proof: Proof,
    /// What the policy requires and can't all be had, in words.
    pub complaints: Vec<String>,
}

/// How a plan is searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Search {
    /// By the exact solver where the graph is small, else by the heuristic.
    Both,
    /// By the heuristic alone.
    Heuristic,
}

/// Plans. Paths that are `apart` are not to be fused
/// ([`Governor::apart`](crate::Governor::apart)).
///
/// # Errors
/// The graph, what is fused, or the settings make no sense.
pub fn plan(
    graph: &Graph,
    fused: &HashSet<Path>,
    apart: &HashSet<Path>,
    settings: &Settings,
) -> Result<Plan, GraphError> {
    plan_by(graph, fused, apart, settings, Search::Both)
}

/// Plans, in a certain way.
///
/// # Errors
/// The graph makes no sense.
pub fn plan_by(
    graph: &Graph,
    fused: &HashSet<Path>,
    apart: &HashSet<Path>,
    settings: &Settings,
    search: Search,
) -> Result<Plan, GraphError> {
    graph.check()?;
    settings.check()?;
    let functions = graph.functions.len();
    let known = |path: &Path| path.len() > 1 && path.iter().all(|f| *f < functions);
    if let Some(path) = fused.iter().find(|path| !known(path)) {
        return Err(GraphError::NoPath {
            path: path.clone(),
            functions,
        });
    }
    let calls = Calls::of(graph);
    let forest = Forest::grow(&calls, fused, apart, settings);
    let model = Model::new(&calls, &forest, settings);
    let (selected, proof, complaints) = choose(&model, search);
    Ok(tell(&model, &selected, proof, complaints))
}

/// The selection.
pub(crate) fn choose(model: &Model<'_>, search: Search) -> (Vec<bool>, Proof, Vec<String>) {
    let (required, complaints) = required(model);
    let n = required.len();
    let current: Vec<bool> = {
        let mut current: Vec<bool> = Vec::with_capacity(n);
        for (c, candidate) in model.forest.candidates.iter().enumerate() {
            let parent = candidate.parent.is_none_or(|p| current[p]);
            current.push(required[c] || candidate.fused && parent);
        }
        current
    };
    let climbed = || {
        let starts = [current.clone(), required.clone(), vec![true; n]];
        ascent::climb(model, &required, &starts)
    };
    if search == Search::Both && n <= model.settings.exact_up_to {
        let solved = exact::solve(model, &required);
        let solved = solved.filter(|s| model.outcome(&s.selected).violations == 0);
        match solved {
            Some(solved) if solved.proven => return (solved.selected, Proof::Optimal, complaints),
            Some(solved) => {
                let other = climbed();
                let value = |s: &[bool]| model.outcome(s).value();
                let best = match value(&other) > value(&solved.selected) {
                    true => other,
                    false => solved.selected,
                };
                return (best, Proof::Heuristic, complaints);
            }
            None => {}
        }
    }
    (climbed(), Proof::Heuristic, complaints)
}

/// What the policy requires, as far as it fits: one after the other.
fn required(model: &Model<'_>) -> (Vec<bool>, Vec<String>) {
    let candidates = &model.forest.candidates;
    let graph = model.calls.graph;
    let (mut required, mut complaints) = (vec![false; candidates.len()], Vec::new());
    for (c, candidate) in candidates.iter().enumerate() {
        // An edge is required where its caller's own workers make it.
        if candidate.parent.is_some() || !graph.edges[candidate.edge].required {
            continue;
        }
        required[c] = true;
        if model.outcome(&required).violations > 0 {
            required[c] = false;
            let (caller, callee) = (candidate.root(), candidate.function());
            complaints.push(format!(
                "{} → {} is required and does not fit into the memory or the processors of {}",
                graph.name(caller),
                graph.name(callee),
                graph.name(caller)
            ));
        }
    }
    (required, complaints)
}

fn tell(model: &Model<'_>, selected: &[bool], proof: Proof, complaints: Vec<String>) -> Plan {
    let graph = model.calls.graph;
    let candidates = &model.forest.candidates;
    let outcome = model.outcome(selected);
    let now: Vec<bool> = candidates.iter().map(|c| c.fused).collect();
    // Roots whose workers hold more now than they may.
    let over: Vec<bool> = (graph.functions.iter().enumerate())
        .map(|(root, f)| {
            f.memory_room
                .is_some_and(|room| model.held(root, &now) > room)
        })
        .collect();
    let mut decisions: Vec<Decision> = (0..candidates.len())
        .map(|c| decision(model, selected, &outcome, &over, c))
        .collect();
    let names = |path: &[usize]| path.iter().map(|&f| graph.name(f).to_owned()).collect();
    for (path, why) in &model.forest.lost {
        decisions.push(Decision {
            path: names(path),
            verdict: Verdict::Unfuse,
            fused: true,
            calls_per_s: 0.0,
            saved_per_s: 0.0,
            cost_per_s: 0.0,
            memory: 0,
            pays_after_s: None,
            displaced: false,
            forced: true,
            reason: why.clone(),
        });
    }
    for (index, edge) in graph.edges.iter().enumerate() {
        if let Some(why) = forbidden(model.calls, edge.caller, index) {
            decisions.push(Decision {
                path: names(&[edge.caller, edge.callee]),
                verdict: Verdict::NotPossible,
                fused: false,
                calls_per_s: edge.rate,
                saved_per_s: 0.0,
                cost_per_s: 0.0,
                memory: 0,
                pays_after_s: None,
                displaced: false,
                forced: false,
                reason: why,
            });
        }
    }
    Plan {
        decisions,
        saved_per_s: outcome.saved,
        saved_now_per_s: model.outcome(&now).saved,
        cost_per_s: outcome.cost,
        overhead_per_s: model.calls.overhead(),
        proof,
        complaints,
    }
}

fn decision(
    model: &Model<'_>,
    selected: &[bool],
    outcome: &Outcome,
    over: &[bool],
    c: usize,
) -> Decision {
    let graph = model.calls.graph;
    let candidate = &model.forest.candidates[c];
    let (is, will) = (candidate.fused, selected[c]);
    let root = &graph.functions[candidate.root()];
    let callee = &graph.functions[candidate.function()];
    let on = model.price[c].0;
    let calls = outcome.own[candidate.root()] * candidate.per_root;
    let saved = calls * graph.edges[candidate.edge].overhead_s;
    let without_parent = candidate.parent.is_some_and(|parent| !selected[parent]);
    let verdict = match (is, will) {
        (false, true) => Verdict::Fuse,
        (true, false) => Verdict::Unfuse,
        _ => Verdict::Keep,
    };
    let over = over[candidate.root()];
    let required = candidate.parent.is_none() && graph.edges[candidate.edge].required;
    let reason = match (is, will) {
        (_, true) if required => "the policy requires it".to_owned(),
        (false, true) => "saves more than it costs".to_owned(),
        (true, true) => "still saves more than it costs to hold".to_owned(),
        (_, false) if without_parent => format!(
            "{} is not fused there",
            graph.name(candidate.path[candidate.path.len() - 2])
        ),
        (_, false) if saved <= on => "saves less than it costs".to_owned(),
        (_, false) => limit(model, selected, outcome, c),
    };
    let once = match (is, will) {
        (false, true) => f64::from(root.workers) * model.settings.inject_s,
        _ => 0.0,
    };
    Decision {
        path: (candidate.path.iter())
            .map(|&f| graph.name(f).to_owned())
            .collect(),
        verdict,
        fused: is,
        calls_per_s: calls,
        saved_per_s: saved,
        cost_per_s: on,
        memory: callee.graft_bytes.saturating_mul(u64::from(root.workers)),
        pays_after_s: (once > 0.0 && saved > 0.0).then(|| once / saved),
        displaced: verdict == Verdict::Unfuse && saved > on && !over,
        forced: verdict == Verdict::Unfuse && over,
        reason,
    }
}

/// How many limits do not hold with exactly these paths fused.
pub(crate) fn violations(graph: &Graph, fused: &HashSet<Path>, settings: &Settings) -> usize {
    let calls = Calls::of(graph);
    let forest = Forest::grow(&calls, fused, &HashSet::new(), settings);
    let model = Model::new(&calls, &forest, settings);
    let selected: Vec<bool> = forest.candidates.iter().map(|c| c.fused).collect();
    model.outcome(&selected).violations
}

/// Why something that would pay by itself is not taken.
fn limit(model: &Model<'_>, selected: &[bool], outcome: &Outcome, c: usize) -> String {
    let graph = model.calls.graph;
    let candidate = &model.forest.candidates[c];
    let root = candidate.root();
    let function = &graph.functions[root];
    let callee = &graph.functions[candidate.function()];
    let held = model.held(root, selected);
    if let Some(room) = function.memory_room
        && held.saturating_add(callee.graft_bytes) > room
    {
        return format!(
            "{} has room for {room} bytes of grafts a worker, {held} of them better used",
            function.name
        );
    }
    let busy = outcome.own[root] * model.busy_per_execution(root, selected);
    let more = outcome.own[root] * candidate.per_root * callee.own_s;
    if busy + more > model.busy_room(root).0 {
        return format!(
            "the processors of {} are busy enough with what saves more",
            function.name
        );
    }
    format!(
        "more is saved in {}'s own workers, where its calls go",
        callee.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{chain, edge, function};

    fn verdict<'a>(plan: &'a Plan, path: &[&str]) -> &'a Decision {
        let mut all = plan.decisions.iter();
        let found = all.find(|d| d.path.iter().map(String::as_str).eq(path.iter().copied()));
        found.unwrap_or_else(|| panic!("no {path:?} in {plan:#?}"))
    }

    fn of(graph: &Graph, fused: &[Path], search: Search) -> Plan {
        let fused = fused.iter().cloned().collect();
        plan_by(graph, &fused, &HashSet::new(), &Settings::default(), search).unwrap()
    }

    #[test]
    fn a_hot_chain_is_fused_from_its_begin_and_nowhere_else() {
        for search in [Search::Both, Search::Heuristic] {
            let plan = of(&chain(&["A", "B", "C"], 5000.0), &[], search);
            assert_eq!(verdict(&plan, &["A", "B"]).verdict, Verdict::Fuse);
            assert_eq!(verdict(&plan, &["A", "B", "C"]).verdict, Verdict::Fuse);
            let other = verdict(&plan, &["B", "C"]);
            assert_eq!((other.verdict, other.fused), (Verdict::Keep, false));
            assert!((plan.saved_per_s - plan.overhead_per_s).abs() < 1e-9);
            let pays = verdict(&plan, &["A", "B"]).pays_after_s.unwrap();
            assert!((pays - 0.02 / 0.1).abs() < 1e-9, "{pays}");
            assert_eq!(plan.proof == Proof::Optimal, search == Search::Both);
        }
    }

    #[test]
    fn what_goes_cold_is_given_back_and_the_border_is_wide() {
        let settings = Settings::default();
        // Rates at which one edge is fused, and at which it is un-fused.
        let fused_at = |rate: f64, fused: bool| {
            let graph = chain(&["A", "B"], rate);
            let fused = match fused {
                true => HashSet::from([vec![0, 1]]),
                false => HashSet::new(),
            };
            let plan = plan(&graph, &fused, &HashSet::new(), &settings).unwrap();
            let found = plan.decisions.iter().find(|d| d.path.len() == 2);
            found.is_some_and(|d| match d.verdict {
                Verdict::Fuse => true,
                Verdict::Keep => d.fused,
                _ => false,
            })
        };
        let border = |fused: bool| {
            let (mut low, mut high) = (0.0_f64, 1000.0_f64);
            for _ in 0..50 {
                let middle = f64::midpoint(low, high);
                if fused_at(middle, fused) {
                    high = middle;
                } else {
                    low = middle;
                }
            }
            high
        };
        let (on, off) = (border(false), border(true));
        assert!(on > 4.0 * off, "fused from {on}/s, un-fused below {off}/s");
        assert!(off > 0.0);
    }

    #[test]
    fn memory_and_processors_are_kept_and_named() {
        let mut graph = chain(&["A", "B"], 5000.0);
        graph.functions.push(function("C", 0.0));
        graph.edges.push(edge(0, 2, 4000.0));
        graph.functions[0].memory_room = Some(150 << 10);
        for search in [Search::Both, Search::Heuristic] {
            let plan = of(&graph, &[], search);
            assert_eq!(verdict(&plan, &["A", "B"]).verdict, Verdict::Fuse);
            let left = verdict(&plan, &["A", "C"]);
            assert_eq!(left.verdict, Verdict::Keep);
            assert!(left.reason.contains("room for 153600 bytes"), "{left:?}");
        }
        graph.functions[0].memory_room = None;
        // Its own calls keep 0.05 busy, B's 0.05 more, C's 0.04 more.
        graph.functions[0].cores = Some(0.11 / 0.8);
        for search in [Search::Both, Search::Heuristic] {
            let plan = of(&graph, &[], search);
            assert_eq!(verdict(&plan, &["A", "B"]).verdict, Verdict::Fuse);
            let left = verdict(&plan, &["A", "C"]);
            assert!(left.reason.contains("busy enough"), "{left:?}");
        }
    }

    #[test]
    fn what_is_required_is_taken_as_far_as_it_fits() {
        let mut graph = chain(&["A", "B"], 0.1);
        graph.edges[0].required = true;
        let plan = of(&graph, &[], Search::Both);
        assert_eq!(verdict(&plan, &["A", "B"]).verdict, Verdict::Fuse);
        assert!(plan.complaints.is_empty());
        graph.functions[0].memory_room = Some(10);
        let plan = of(&graph, &[], Search::Both);
        assert_eq!(verdict(&plan, &["A", "B"]).verdict, Verdict::Keep);
        assert!(plan.complaints[0].contains("A → B is required"), "{plan:?}");
    }

    #[test]
    fn what_may_not_be_fused_is_not_possible_and_undone() {
        let mut graph = chain(&["A", "B"], 5000.0);
        graph.edges[0].forbidden = Some("effects: network".to_owned());
        let plan = of(&graph, &[vec![0, 1]], Search::Both);
        let all: Vec<(Verdict, &str)> = (plan.decisions.iter())
            .map(|d| (d.verdict, d.reason.as_str()))
            .collect();
        assert_eq!(
            all,
            [
                (Verdict::Unfuse, "effects: network"),
                (Verdict::NotPossible, "effects: network")
            ]
        );
    }

    #[test]
    fn an_empty_graph_has_an_empty_plan() {
        let plan = of(&Graph::default(), &[], Search::Both);
        assert!(plan.decisions.is_empty() && plan.saved_per_s.abs() < 1e-12);
    }
}
