//! From what was measured to what is worth fusing.
//!
//! ```text
//!  graph ────────────────┐
//!  workers' limits ──────┼─► model (pure) ─► the planner's graph ─► plan
//!  what can be fused ────┘        ▲
//!   (explained once per build)    └─ what is fused now, policy, quarantine
//! ```
//!
//! Nothing here changes a worker.

mod examine;
mod model;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nightgraft_patcher::room;
use nightgraft_planner::{Settings, plan};

pub use examine::Examiner;
use model::{EdgeFacts, FunctionFacts};

use crate::api::{Costs, EnginePlan, Graph, PlanReport};
use crate::discover::docker::Description;
use crate::discover::{Function, Node, Worker};
use crate::error::AgentError;
use crate::ops::{self, Context};
use crate::policy::Fuse;

/// How long edges that nobody has looked at yet are examined for one plan: what is
/// left is for the next.
const EXAMINE: Duration = Duration::from_secs(15);
/// Weight of a new measurement of what a change costs.
const WEIGHT: f64 = 0.2;

/// What plans are made of besides the graph, kept between them.
#[derive(Debug, Default)]
pub struct Planning {
    examiner: Examiner,
    costs: Mutex<Option<Costs>>,
}

impl Planning {
    fn costs(&self) -> MutexGuard<'_, Option<Costs>> {
        self.costs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a patch of one worker has cost: in all, and its stops.
    pub fn patched(&self, took: Duration, stops_ns: &[u64]) {
        let stopped = Duration::from_nanos(stops_ns.iter().sum()).as_secs_f64();
        let mut costs = self.costs();
        let known = costs.get_or_insert_default();
        let mean = |old: f64, new: f64| match known.patches {
            0 => new,
            _ => old + WEIGHT * (new - old),
        };
        let (inject_s, stop_s) = (
            mean(known.inject_s, took.as_secs_f64()),
            mean(known.stop_s, stopped),
        );
        (known.inject_s, known.stop_s) = (inject_s, stop_s);
        known.patches += 1;
    }

    /// Takes what a revert of one worker has cost.
    pub fn reverted(&self, took: Duration) {
        let mut costs = self.costs();
        let known = costs.get_or_insert_default();
        let took = took.as_secs_f64();
        known.revert_s = match known.revert_s > 0.0 {
            true => known.revert_s + WEIGHT * (took - known.revert_s),
            false => took,
        };
    }

    /// The settings, with what changes have cost on this node in place of what
    /// they are said to.
    fn settings(&self, settings: &Settings) -> (Settings, Costs) {
        let mut settings = settings.clone();
        let known = (*self.costs()).unwrap_or_default();
        if known.patches > 0 {
            settings.inject_s = known.inject_s;
            settings.stop_s = known.stop_s;
        }
        if known.revert_s > 0.0 {
            settings.revert_s = known.revert_s;
        }
        let costs = Costs {
            inject_s: settings.inject_s,
            stop_s: settings.stop_s,
            revert_s: settings.revert_s,
            patches: known.patches,
        };
        (settings, costs)
    }
}

/// Plans for every engine of the node.
///
/// # Errors
/// [`AgentError::Internal`] where what was measured makes no sense.
pub fn report(
    context: &Context<'_>,
    node: &Node,
    containers: &HashMap<String, Description>,
) -> Result<PlanReport, AgentError> {
    let graph = context.observer.graph(context.grafter, node);
    let (settings, costs) = context.observer.planning.settings(&context.policy.planner);
    let mut report = PlanReport {
        at_ms: graph.at_ms,
        window_s: graph.window_s,
        costs,
        notes: graph.notes.clone(),
        ..PlanReport::default()
    };
    let deadline = Instant::now() + EXAMINE;
    let engines: HashSet<Option<i32>> = graph.edges.iter().map(|edge| edge.engine).collect();
    let mut engines: Vec<Option<i32>> = engines.into_iter().collect();
    engines.sort_unstable();
    let fused = fused(context, node);
    for engine in engines {
        let graph = of_engine(&graph, engine);
        let facts = functions(context, node, engine, containers, &mut report.notes);
        let mut edges = edges(context, node, &graph, deadline, &mut report.notes);
        if let Some(paths) = fused.get(&engine) {
            allow_fused(&mut edges, paths);
        }
        let model = model::model(
            &graph,
            &facts,
            &edges,
            fused.get(&engine),
            &mut report.notes,
        );
        let plan = plan(&model.graph, &model.fused, &HashSet::new(), &settings);
        let plan = plan.map_err(|error| AgentError::Internal {
            detail: format!("what was measured can't be planned for: {error}"),
        })?;
        report.plans.push(EnginePlan { engine, plan });
    }
    Ok(report)
}

fn of_engine(graph: &Graph, engine: Option<i32>) -> Graph {
    Graph {
        nodes: (graph.nodes.iter())
            .filter(|n| n.engine == engine)
            .cloned()
            .collect(),
        edges: (graph.edges.iter())
            .filter(|e| e.engine == engine)
            .cloned()
            .collect(),
        notes: Vec::new(),
        ..graph.clone()
    }
}

type Paths = HashSet<Vec<String>>;

/// What is fused was allowed by whoever had it fused (a patch may be given more leave
/// than the configuration gives) and can be. What the configuration or a quarantine
/// says against it counts all the same.
fn allow_fused(edges: &mut HashMap<(String, String), EdgeFacts>, paths: &Paths) {
    let steps = paths.iter().flat_map(|path| path.windows(2));
    for step in steps {
        let edge = edges.get_mut(&(step[0].clone(), step[1].clone()));
        if let Some(facts) = edge.filter(|facts| !facts.denied) {
            facts.forbidden = None;
        }
    }
}

/// What is fused now, in any worker of its root.
fn fused(context: &Context<'_>, node: &Node) -> HashMap<Option<i32>, Paths> {
    let mut all: HashMap<Option<i32>, Paths> = HashMap::new();
    for edge in ops::status(context, node.clone()).edges {
        let fused = |w: &crate::api::EdgeWorker| w.graft.gate_on && w.graft.windows_in_place;
        if edge.workers.iter().any(fused) {
            let mut path = vec![edge.caller];
            path.extend(edge.callee.split('/').map(str::to_owned));
            all.entry(edge.engine).or_default().insert(path);
        }
    }
    all
}

/// What is known of an engine's functions besides their calls.
fn functions(
    context: &Context<'_>,
    node: &Node,
    engine: Option<i32>,
    containers: &HashMap<String, Description>,
    notes: &mut Vec<String>,
) -> BTreeMap<String, FunctionFacts> {
    let mut all = BTreeMap::new();
    for function in node.functions.iter().filter(|f| f.engine == engine) {
        let domain = domain(context, function, containers, notes);
        let facts = FunctionFacts {
            workers: u32::try_from(function.workers.len()).unwrap_or(u32::MAX),
            memory_room: memory_room(context, function),
            cores: cores(function),
            domain: domain.clone().unwrap_or_default(),
            unfusable: match domain {
                Some(_) => None,
                None => Some("its workers are in more than one trust domain".to_owned()),
            },
        };
        all.insert(function.label(), facts);
    }
    all
}

/// The value of the label that names trust domains; `None` where workers differ.
fn domain(
    context: &Context<'_>,
    function: &Function,
    containers: &HashMap<String, Description>,
    notes: &mut Vec<String>,
) -> Option<String> {
    let Some(label) = &context.policy.trust.label else {
        return Some(String::new());
    };
    let of = |worker: &Worker| {
        let container = containers.get(worker.container.as_ref()?)?;
        container.labels.get(label).cloned()
    };
    let values: HashSet<Option<String>> = function.workers.iter().map(of).collect();
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (None, _) => Some(String::new()),
        (Some(Some(value)), None) => Some(format!("{label}={value}")),
        // Nobody trusts who says nothing: a domain of its own.
        (Some(None), None) => {
            notes.push(format!(
                "{} has no label {label}: it is in a trust domain of its own",
                function.label()
            ));
            Some(format!("{}, without {label}", function.label()))
        }
        _ => None,
    }
}

/// Bytes that one worker may hold of other functions: its part of the share of
/// what its container's limit leaves, and what it holds already.
fn memory_room(context: &Context<'_>, function: &Function) -> Option<u64> {
    let mut containers: HashMap<&Option<String>, (u64, u64)> = HashMap::new();
    for worker in &function.workers {
        let left = room::memory_room(worker.pid)?;
        let entry = containers.entry(&worker.container).or_insert((left, 0));
        *entry = (entry.0.min(left), entry.1 + 1);
    }
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of bytes"
    )]
    let share = |bytes: u64| (bytes as f64 * context.policy.limits.memory_share) as u64;
    let parts = containers
        .values()
        .map(|(left, workers)| share(*left) / workers);
    let held = function.workers.iter().filter_map(Worker::target);
    let held = held.filter_map(|target| context.grafter.status(&target).ok().flatten());
    let held = held.map(|status| status.mapped_bytes).max().unwrap_or(0);
    parts.min().map(|room| room.saturating_add(held))
}

/// Processors that a function's workers may keep busy.
fn cores(function: &Function) -> Option<f64> {
    let mut seen = HashSet::new();
    let mut sum = 0.0;
    for worker in function
        .workers
        .iter()
        .filter(|w| seen.insert(&w.container))
    {
        sum += room::processors(worker.pid).unwrap_or_else(all_processors);
    }
    (sum > 0.0).then(|| sum.min(all_processors()))
}

#[expect(clippy::cast_precision_loss, reason = "a few")]
fn all_processors() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
}

/// What is known of edges besides their calls.
fn edges(
    context: &Context<'_>,
    node: &Node,
    graph: &Graph,
    deadline: Instant,
    notes: &mut Vec<String>,
) -> HashMap<(String, String), EdgeFacts> {
    let mut all = HashMap::new();
    let mut later = 0;
    // The busiest first, as there may not be time for all.
    let mut edges: Vec<_> = graph.edges.iter().collect();
    edges.sort_by(|a, b| b.calls_per_s.total_cmp(&a.calls_per_s));
    for edge in edges {
        let policy = context.policy.fuse(&edge.caller, &edge.callee);
        let quarantined = (context.watch.quarantine).find(edge.engine, &edge.caller, &edge.callee);
        let mut facts = EdgeFacts {
            required: policy == Fuse::Must,
            ..EdgeFacts::default()
        };
        if policy == Fuse::Never {
            facts.forbidden = Some("the configuration says never".to_owned());
            facts.denied = true;
        } else if let Some(why) = quarantined {
            facts.forbidden = Some(format!("quarantined: worker {} {}", why.pid, why.how));
            facts.denied = true;
        } else {
            let examiner = &context.observer.planning.examiner;
            match examiner.examine(context, node, edge, Instant::now() < deadline) {
                Some(examined) => (facts.graft_bytes, facts.forbidden) = examined,
                None => {
                    later += 1;
                    facts.forbidden = Some("nobody has looked yet whether it can be".to_owned());
                }
            }
        }
        all.insert((edge.caller.clone(), edge.callee.clone()), facts);
    }
    if later > 0 {
        notes.push(format!(
            "{later} edges were not looked at for want of time: ask again"
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fused_was_allowed_unless_it_is_denied() {
        let forbidden = |denied| EdgeFacts {
            forbidden: Some("no".to_owned()),
            denied,
            ..EdgeFacts::default()
        };
        let edge = |caller: &str, callee: &str| (caller.to_owned(), callee.to_owned());
        let mut edges = HashMap::from([
            (edge("Foo", "Bar"), forbidden(false)),
            (edge("Bar", "Baz"), forbidden(true)),
            (edge("Foo", "Baz"), forbidden(false)),
        ]);
        let path = ["Foo", "Bar", "Baz"].map(str::to_owned).to_vec();
        allow_fused(&mut edges, &HashSet::from([path]));
        let still = |caller, callee| edges[&edge(caller, callee)].forbidden.is_some();
        assert!(!still("Foo", "Bar") && still("Bar", "Baz") && still("Foo", "Baz"));
    }

    #[test]
    fn what_changes_cost_is_measured_and_used() {
        let planning = Planning::default();
        let set = Settings::default();
        let (settings, costs) = planning.settings(&set);
        assert_eq!(settings, set);
        assert_eq!((costs.inject_s, costs.patches), (set.inject_s, 0));
        planning.patched(Duration::from_millis(40), &[100_000, 300_000]);
        planning.reverted(Duration::from_millis(2));
        let (settings, costs) = planning.settings(&set);
        assert_eq!(
            (settings.inject_s, settings.stop_s, settings.revert_s),
            (0.04, 400e-6, 0.002)
        );
        planning.patched(Duration::from_millis(90), &[400_000]);
        let (settings, _) = planning.settings(&set);
        assert!((settings.inject_s - 0.05).abs() < 1e-9, "{settings:?}");
        assert_eq!(costs.patches, 1);
    }
}
