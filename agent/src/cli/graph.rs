//! What observing did, and the graph, as text for people. Pure.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::format::{bytes, clean, count, nanos_f64, rate};
use super::render::{NOTHING, notes, or_nothing, plural, stops, table};
use crate::api::{
    EdgeState, ErrorInfo, Graph, GraphEdge, GraphNode, Latency, ObserveOutcome, ObserveReport,
    ObservedWorker, WorkerKind,
};

/// What is said while nobody counts anything.
const NOTHING_OBSERVED: &str = "nothing is observed: agentctl observe on\n";

/// How functions are named: with their engine where there are several.
pub(super) struct Names {
    several: bool,
}

impl Names {
    fn new(engines: impl Iterator<Item = Option<i32>>) -> Self {
        let engines: BTreeSet<_> = engines.collect();
        Self {
            several: engines.len() > 1,
        }
    }

    pub(super) fn of(graph: &Graph) -> Self {
        let nodes = graph.nodes.iter().map(|node| node.engine);
        Self::new(nodes.chain(graph.edges.iter().map(|edge| edge.engine)))
    }

    /// What to call a function, fit for a terminal.
    pub(super) fn name(&self, function: &str, engine: Option<i32>) -> String {
        let mut name = clean(function);
        if self.several {
            let engine = engine.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            let _ = write!(name, " (engine {engine})");
        }
        name
    }

    fn edge(&self, edge: &GraphEdge) -> String {
        format!(
            "{} → {}",
            clean(&edge.caller),
            self.name(&edge.callee, edge.engine)
        )
    }
}

/// `agentctl observe`. What failed is left to [`failures`].
pub(super) fn observed(report: &ObserveReport) -> String {
    let mut text = summary(report) + "\n";
    if !report.workers.is_empty() {
        let names = Names::new(report.workers.iter().map(|worker| worker.engine));
        let row = |worker| observed_row(&names, report.on, worker);
        text.push_str(&table(
            ["FUNCTION", "WORKER", "OUTCOME", "STOPS"],
            report.workers.iter().map(row).collect(),
        ));
    }
    for worker in &report.workers {
        if let ObserveOutcome::Off { reason } = &worker.outcome {
            let _ = writeln!(
                text,
                "worker {}: nothing is counted, the bytes stay for now: {}",
                worker.pid,
                clean(reason)
            );
        }
    }
    notes(&mut text, &report.notes);
    text
}

fn summary(report: &ObserveReport) -> String {
    let done = |worker: &&ObservedWorker| {
        !matches!(
            worker.outcome,
            ObserveOutcome::Failed { .. } | ObserveOutcome::Gone
        )
    };
    let already = |worker: &ObservedWorker| worker.outcome == ObserveOutcome::Already;
    let number = report.workers.len();
    let all = plural(number, "worker");
    let done = report.workers.iter().filter(done).count();
    match report.on {
        _ if number == 0 => "there are no workers; nothing was done".to_owned(),
        true if report.workers.iter().all(already) => {
            format!("already observed in {all}; nothing was done")
        }
        false if report.workers.iter().all(already) => {
            format!("not observed in {all}; nothing was done")
        }
        true => format!("observed in {done} of {all}"),
        false => format!("not observed any more in {done} of {all}"),
    }
}

fn observed_row(names: &Names, on: bool, worker: &ObservedWorker) -> [String; 4] {
    let outcome = match worker.outcome {
        ObserveOutcome::Observed => "observed",
        ObserveOutcome::Already if on => "already observed",
        ObserveOutcome::Already => "was not observed",
        ObserveOutcome::Restored => "restored",
        ObserveOutcome::Off { .. } => "off",
        ObserveOutcome::Failed { .. } => "failed",
        ObserveOutcome::Gone => "exited",
    };
    let stopped = Some(&worker.stops_ns).filter(|stops| !stops.is_empty());
    [
        names.name(&worker.function, worker.engine),
        worker.pid.to_string(),
        outcome.to_owned(),
        or_nothing(stopped.map(|ns| stops(ns))),
    ]
}

/// What is wrong with the workers in which it could not be done.
pub(super) fn failures(report: &ObserveReport) -> Vec<ErrorInfo> {
    let failure = |worker: &ObservedWorker| match &worker.outcome {
        ObserveOutcome::Failed { error } => Some(ErrorInfo {
            message: format!(
                "{}: worker {}: {}",
                worker.function, worker.pid, error.message
            ),
            ..error.clone()
        }),
        _ => None,
    };
    report.workers.iter().filter_map(failure).collect()
}

/// `agentctl graph`.
pub(super) fn graph(graph: &Graph, sites: bool) -> String {
    let observed = graph.nodes.iter().any(|node| node.observed > 0);
    let counted = !graph.edges.is_empty() || graph.nodes.iter().any(|node| node.calls > 0);
    let mut text = String::new();
    if observed || counted {
        tables(&mut text, graph, sites);
    }
    if !observed {
        text.push_str(NOTHING_OBSERVED);
    }
    notes(&mut text, &graph.notes);
    text
}

fn tables(text: &mut String, graph: &Graph, sites: bool) {
    let names = Names::of(graph);
    let _ = writeln!(
        text,
        "rates and latencies: of the last {}; counts: since each worker was first observed\n",
        nanos_f64(graph.window_s * 1e9)
    );
    let header = [
        "FUNCTION",
        "OBSERVED",
        "CALLS",
        "CALLS/S",
        "ARRIVALS/S",
        "ERRORS",
        "OWN MEAN",
        "OWN P99",
    ];
    let rows = graph.nodes.iter().map(|node| node_row(&names, node));
    text.push_str(&table(header, rows.collect()));
    text.push('\n');
    if graph.edges.is_empty() {
        text.push_str("no call from one function to another was seen yet\n");
    } else {
        let header = [
            "EDGE",
            "STATE",
            "RPC CALLS",
            "FUSED CALLS",
            "CALLS/S",
            "ERRORS",
            "IN",
            "OUT",
            "RPC MEAN",
            "RPC P50",
            "RPC P99",
            "FUSED MEAN",
            "FUSED P99",
            "CONCURRENCY",
        ];
        let rows = graph.edges.iter().map(|edge| edge_row(&names, edge));
        text.push_str(&table(header, rows.collect()));
    }
    if sites {
        site_table(text, &names, graph);
    }
    for node in &graph.nodes {
        if let Some(why) = unfusable(node) {
            let name = names.name(&node.function, node.engine);
            let _ = writeln!(text, "{name} can't be fused: {}", clean(&why));
        }
    }
}

/// Why a function can't be fused, where something is known against it.
pub(super) fn unfusable(node: &GraphNode) -> Option<String> {
    node.unfusable.clone().or_else(|| match &node.kind {
        Some(WorkerKind::NotNative { language }) => Some(format!("not native ({language})")),
        Some(WorkerKind::Native) | None => None,
    })
}

fn node_row(names: &Names, node: &GraphNode) -> [String; 8] {
    [
        names.name(&node.function, node.engine),
        format!("{}/{}", node.observed, node.workers),
        count(node.calls),
        rate(node.calls_per_s),
        node.arrivals_per_s.map_or_else(unknown, rate),
        count(node.errors),
        time(node.own, |own| own.mean_ns),
        time(node.own, |own| own.p99_ns),
    ]
}

fn edge_row(names: &Names, edge: &GraphEdge) -> [String; 14] {
    [
        names.edge(edge),
        state(edge.state).to_owned(),
        count(edge.rpc_calls),
        count(edge.fused_calls),
        rate(edge.calls_per_s),
        count(edge.errors),
        bytes(edge.bytes_in),
        bytes(edge.bytes_out),
        time(edge.rpc, |rpc| rpc.mean_ns),
        time(edge.rpc, |rpc| rpc.p50_ns),
        time(edge.rpc, |rpc| rpc.p99_ns),
        time(edge.fused, |fused| fused.mean_ns),
        time(edge.fused, |fused| fused.p99_ns),
        concurrency(edge),
    ]
}

fn concurrency(edge: &GraphEdge) -> String {
    let mean = edge.concurrency.map(|mean| format!("{mean:.2}"));
    match edge.in_flight {
        0 => or_nothing(mean),
        now => format!("{}, {} now", or_nothing(mean), count(now)),
    }
}

fn site_table(text: &mut String, names: &Names, graph: &Graph) {
    let rows: Vec<[String; 3]> = graph
        .edges
        .iter()
        .flat_map(|edge| {
            let row = |site: &crate::api::GraphSite| {
                [names.edge(edge), clean(&site.at), count(site.calls)]
            };
            edge.sites.iter().map(row)
        })
        .collect();
    text.push('\n');
    if rows.is_empty() {
        text.push_str("no place that calls is known\n");
    } else {
        text.push_str(&table(["EDGE", "SITE", "RPC CALLS"], rows));
    }
}

/// How an edge's calls run, in a word.
pub(super) fn state(state: EdgeState) -> &'static str {
    match state {
        EdgeState::Rpc => "RPC",
        EdgeState::Fused => "fused",
        EdgeState::Mixed => "mixed",
    }
}

fn time(latency: Option<Latency>, of: impl Fn(Latency) -> f64) -> String {
    latency.map_or_else(unknown, |latency| nanos_f64(of(latency)))
}

fn unknown() -> String {
    NOTHING.to_owned()
}
