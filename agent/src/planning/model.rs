//! The measured graph as the planner takes it. Pure.
//!
//! What is measured is how long calls take *with* what they call in turn; what the
//! planner wants is what a function does by itself, and what an RPC takes beyond
//! its callee.
//!
//! ```text
//!  own work of Foo  = time of a call of Foo − Σ its calls × how long they take
//!  overhead Foo→Bar = time of the RPC − time of a call of Bar
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};

use nightgraft_planner::{Edge, Function, Graph as Model, Path};

use crate::api::{Graph, GraphEdge, Latency};

/// Seconds that an RPC takes beyond its callee where none was measured on the
/// node: nightcore's own.
const USUAL_OVERHEAD: f64 = 20e-6;

/// What is known of a function besides its calls.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct FunctionFacts {
    pub(super) workers: u32,
    pub(super) memory_room: Option<u64>,
    pub(super) cores: Option<f64>,
    pub(super) domain: String,
    pub(super) unfusable: Option<String>,
}

/// What is known of an edge besides its calls.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct EdgeFacts {
    pub(super) graft_bytes: u64,
    pub(super) forbidden: Option<String>,
    /// It is forbidden whether it is fused or not.
    pub(super) denied: bool,
    pub(super) required: bool,
}

/// The planner's graph, and the paths in it that are fused.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Modelled {
    pub(super) graph: Model,
    pub(super) fused: HashSet<Path>,
}

pub(super) fn model(
    graph: &Graph,
    functions: &BTreeMap<String, FunctionFacts>,
    edges: &HashMap<(String, String), EdgeFacts>,
    fused: Option<&HashSet<Vec<String>>>,
    notes: &mut Vec<String>,
) -> Modelled {
    let index: HashMap<&str, usize> = graph
        .nodes
        .iter()
        .enumerate()
        .map(|(index, node)| (node.function.as_str(), index))
        .collect();
    let times = times(graph);
    let overheads = overheads(graph, &times);
    let mut unknown = Vec::new();
    let nodes = graph.nodes.iter().map(|node| {
        let facts = functions.get(&node.function).cloned().unwrap_or_default();
        let into = graph.edges.iter().filter(|e| e.callee == node.function);
        let bytes = into.filter_map(|e| edges.get(&(e.caller.clone(), e.callee.clone())));
        Function {
            name: node.function.clone(),
            arrivals: node.arrivals_per_s.unwrap_or(0.0),
            own_s: own(graph, &times, &node.function, node.arrivals_per_s),
            workers: facts.workers,
            memory_room: facts.memory_room,
            cores: facts.cores,
            graft_bytes: bytes.map(|facts| facts.graft_bytes).max().unwrap_or(0),
            domain: facts.domain,
            unfusable: node.unfusable.clone().or(facts.unfusable),
        }
    });
    let nodes: Vec<Function> = nodes.collect();
    let calls = graph
        .edges
        .iter()
        .zip(&overheads)
        .filter_map(|(edge, overhead)| {
            let facts = edges.get(&(edge.caller.clone(), edge.callee.clone()));
            let facts = facts.cloned().unwrap_or_default();
            if overhead.is_none() && edge.calls_per_s > 0.0 {
                unknown.push(format!("{} → {}", edge.caller, edge.callee));
            }
            Some(Edge {
                caller: *index.get(edge.caller.as_str())?,
                callee: *index.get(edge.callee.as_str())?,
                rate: edge.calls_per_s,
                overhead_s: overhead.unwrap_or_else(|| usual(&overheads)),
                forbidden: facts.forbidden,
                required: facts.required,
            })
        });
    let calls: Vec<Edge> = calls.collect();
    if !unknown.is_empty() {
        notes.push(format!(
            "what an RPC takes beyond its callee was not measured for {}: the node's usual is taken (observe the callee as well)",
            unknown.join(", ")
        ));
    }
    let paths = fused.into_iter().flatten();
    let paths = paths.filter_map(|path| {
        path.iter()
            .map(|name| index.get(name.as_str()).copied())
            .collect::<Option<Path>>()
    });
    Modelled {
        fused: paths.collect(),
        graph: Model {
            functions: nodes,
            edges: calls,
        },
    }
}

/// Seconds of one call of each function, with what it calls in turn: in its own
/// workers, or fused where it runs in others' alone.
fn times(graph: &Graph) -> HashMap<&str, f64> {
    let mut all = HashMap::new();
    for node in &graph.nodes {
        let own = node
            .own
            .filter(|own| own.samples > 0)
            .map(|own| seconds(&own));
        let fused = || {
            let into = graph.edges.iter().filter(|e| e.callee == node.function);
            let fused = into.filter_map(|e| e.fused.filter(|l| l.samples > 0));
            let (sum, samples) = fused.fold((0.0, 0.0), |(sum, all), latency| {
                let weight = count(latency.samples);
                (sum + weight * seconds(&latency), all + weight)
            });
            (samples > 0.0).then(|| sum / samples)
        };
        if let Some(time) = own.or_else(fused) {
            all.insert(node.function.as_str(), time);
        }
    }
    all
}

/// What each edge's RPCs take beyond the callee, where both were measured.
fn overheads(graph: &Graph, times: &HashMap<&str, f64>) -> Vec<Option<f64>> {
    let of = |edge: &GraphEdge| {
        let rpc = edge.rpc.filter(|rpc| rpc.samples > 0)?;
        let callee = times.get(edge.callee.as_str())?;
        Some((seconds(&rpc) - callee).max(0.0))
    };
    graph.edges.iter().map(of).collect()
}

/// The middle of what was measured.
fn usual(overheads: &[Option<f64>]) -> f64 {
    let mut known: Vec<f64> = overheads.iter().flatten().copied().collect();
    known.sort_by(f64::total_cmp);
    known
        .get(known.len() / 2)
        .copied()
        .unwrap_or(USUAL_OVERHEAD)
}

/// What a function does in one call by itself.
fn own(graph: &Graph, times: &HashMap<&str, f64>, function: &str, arrivals: Option<f64>) -> f64 {
    let Some(time) = times.get(function) else {
        return 0.0;
    };
    let into = graph.edges.iter().filter(|e| e.callee == function);
    let executions = arrivals.unwrap_or(0.0) + into.map(|e| e.calls_per_s).sum::<f64>();
    if executions <= 0.0 {
        return *time;
    }
    let out = graph.edges.iter().filter(|e| e.caller == function);
    let waited: f64 = out.map(|e| e.calls_per_s / executions * latency(e)).sum();
    (time - waited).max(0.0)
}

/// Seconds that a call on an edge takes, as its calls run now.
fn latency(edge: &GraphEdge) -> f64 {
    let rpc = edge.rpc.filter(|l| l.samples > 0).map(|l| seconds(&l));
    let fused = edge.fused.filter(|l| l.samples > 0).map(|l| seconds(&l));
    match (rpc, fused) {
        // Little's law, where it is known how many are under way.
        (Some(_), Some(_)) if edge.calls_per_s > 0.0 && edge.concurrency.is_some() => {
            edge.concurrency.unwrap_or(0.0) / edge.calls_per_s
        }
        (rpc, fused) => rpc.or(fused).unwrap_or(0.0),
    }
}

fn seconds(latency: &Latency) -> f64 {
    latency.mean_ns / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "a weight")]
fn count(samples: u64) -> f64 {
    samples as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{EdgeState, GraphNode, WorkerKind};

    fn took(microseconds: f64) -> Option<Latency> {
        Some(Latency {
            samples: 100,
            mean_ns: microseconds * 1e3,
            ..Latency::default()
        })
    }

    fn node(function: &str, own: Option<Latency>, arrivals: Option<f64>) -> GraphNode {
        GraphNode {
            function: function.to_owned(),
            engine: None,
            kind: Some(WorkerKind::Native),
            workers: 2,
            observed: 2,
            calls: 0,
            errors: 0,
            calls_per_s: 0.0,
            arrivals_per_s: arrivals,
            own,
            unfusable: None,
        }
    }

    fn edge(caller: &str, callee: &str, rate: f64, rpc: Option<Latency>) -> GraphEdge {
        GraphEdge {
            caller: caller.to_owned(),
            callee: callee.to_owned(),
            engine: None,
            state: EdgeState::Rpc,
            rpc_calls: 0,
            fused_calls: 0,
            errors: 0,
            bytes_in: 0,
            bytes_out: 0,
            calls_per_s: rate,
            errors_per_s: 0.0,
            in_flight: 0,
            concurrency: None,
            rpc,
            fused: None,
            sites: Vec::new(),
        }
    }

    fn modelled(graph: &Graph) -> (Model, Vec<String>) {
        let mut notes = Vec::new();
        let model = model(graph, &BTreeMap::new(), &HashMap::new(), None, &mut notes);
        (model.graph, notes)
    }

    #[test]
    fn own_work_and_overhead_are_told_from_what_is_measured() {
        // Foo calls Bar twice; Bar takes 30 µs, by RPC 50; Foo 120 in all.
        let graph = Graph {
            nodes: vec![
                node("Foo", took(120.0), Some(10.0)),
                node("Bar", took(30.0), Some(0.0)),
            ],
            edges: vec![edge("Foo", "Bar", 20.0, took(50.0))],
            ..Graph::default()
        };
        let (model, notes) = modelled(&graph);
        assert!(notes.is_empty(), "{notes:?}");
        let near = |found: f64, right: f64| assert!((found - right).abs() < 1e-12, "{found}");
        near(model.functions[0].own_s, 20e-6);
        near(model.functions[1].own_s, 30e-6);
        near(model.edges[0].overhead_s, 20e-6);
        near(model.edges[0].rate, 20.0);
        assert_eq!(model.check(), Ok(()));
    }

    #[test]
    fn what_was_not_measured_is_the_nodes_usual_and_told() {
        let graph = Graph {
            nodes: vec![
                node("Foo", None, None),
                node("Bar", took(30.0), None),
                node("Baz", None, None),
            ],
            edges: vec![
                edge("Foo", "Bar", 1.0, took(70.0)),
                edge("Foo", "Baz", 1.0, took(90.0)),
            ],
            ..Graph::default()
        };
        let (model, notes) = modelled(&graph);
        assert!((model.edges[1].overhead_s - 40e-6).abs() < 1e-12);
        assert!(notes[0].contains("Foo → Baz"), "{notes:?}");
        let nothing = Graph {
            edges: vec![edge("Foo", "Baz", 1.0, None)],
            ..graph
        };
        let (model, _) = modelled(&nothing);
        assert!((model.edges[0].overhead_s - USUAL_OVERHEAD).abs() < 1e-12);
    }

    #[test]
    fn noise_makes_no_negative_numbers() {
        let graph = Graph {
            nodes: vec![
                node("Foo", took(10.0), Some(1.0)),
                node("Bar", took(30.0), Some(0.0)),
            ],
            edges: vec![edge("Foo", "Bar", 1.0, took(25.0))],
            ..Graph::default()
        };
        let (model, _) = modelled(&graph);
        assert_eq!(
            (model.functions[0].own_s, model.edges[0].overhead_s),
            (0.0, 0.0)
        );
        assert_eq!(model.check(), Ok(()));
    }

    #[test]
    fn a_function_that_runs_fused_alone_is_measured_there() {
        let mut fused = edge("Foo", "Bar", 20.0, took(50.0));
        fused.fused = took(28.0);
        let graph = Graph {
            nodes: vec![
                node("Foo", took(60.0), Some(10.0)),
                node("Bar", None, Some(0.0)),
            ],
            edges: vec![fused],
            ..Graph::default()
        };
        let paths = HashSet::from([
            vec!["Foo".to_owned(), "Bar".to_owned()],
            vec!["Foo".to_owned(), "Gone".to_owned()],
        ]);
        let mut notes = Vec::new();
        let found = model(
            &graph,
            &BTreeMap::new(),
            &HashMap::new(),
            Some(&paths),
            &mut notes,
        );
        assert!((found.graph.edges[0].overhead_s - 22e-6).abs() < 1e-12);
        assert_eq!(found.fused, HashSet::from([vec![0, 1]]));
    }
}
