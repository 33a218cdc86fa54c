//! The RPC graph, as it goes over the socket.

use serde::{Deserialize, Serialize};

use super::{ErrorInfo, WorkerKind};

/// Asks for functions to be observed, or to be left alone again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObserveRequest {
    /// Begin, or end.
    pub on: bool,
    /// The functions; none for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub functions: Vec<String>,
    /// Pid of the engine, where several engines know functions of these names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<i32>,
}

/// What was done about it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ObserveReport {
    /// As asked for.
    pub on: bool,
    /// Workers, in the order in which they were dealt with.
    pub workers: Vec<ObservedWorker>,
    /// What else should be known.
    pub notes: Vec<String>,
}

/// One worker that was to be observed, or not any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObservedWorker {
    /// Its function.
    pub function: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// The worker.
    pub pid: i32,
    /// What became of it.
    pub outcome: ObserveOutcome,
    /// Nanoseconds of each stop.
    #[serde(default)]
    pub stops_ns: Vec<u64>,
}

/// What became of a worker that was to be observed, or not any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum ObserveOutcome {
    /// Its calls are counted from now on.
    Observed,
    /// They were already, or it was left alone already.
    Already,
    /// Its original bytes are back, but those that fused edges need.
    Restored,
    /// Nothing is counted; bytes stay until the reason is gone.
    Off {
        /// Why.
        reason: String,
    },
    /// It could not be done.
    Failed {
        /// Why.
        error: ErrorInfo,
    },
    /// It has exited.
    Gone,
}

/// What the node's functions call, as far as it is observed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Graph {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Seconds over which rates and latencies are taken. Counts are since the
    /// counting of each worker began.
    pub window_s: f64,
    /// Sorted by engine, then name.
    pub nodes: Vec<GraphNode>,
    /// Sorted by engine, then caller, then callee.
    pub edges: Vec<GraphEdge>,
    /// What is not known, in sentences.
    pub notes: Vec<String>,
}

/// A function.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphNode {
    /// Its name, or `#id`.
    pub function: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// What its workers run; of a name that no engine knows nothing.
    pub kind: Option<WorkerKind>,
    /// Workers that run.
    pub workers: usize,
    /// Of them, those whose calls are counted.
    pub observed: usize,
    /// Calls that its own workers served while they were observed.
    pub calls: u64,
    /// Of them, those that failed.
    pub errors: u64,
    /// The same per second, within the window.
    pub calls_per_s: f64,
    /// Calls per second that none of the observed functions made: those that
    /// came from outside. `None` where that is not known.
    pub arrivals_per_s: Option<f64>,
    /// How long a call takes in its own workers, with what it calls in turn.
    pub own: Option<Latency>,
    /// Why it can't be fused, nor others into it; `None` where nothing is known
    /// against it.
    pub unfusable: Option<String>,
}

/// Calls of one function by another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphEdge {
    /// The function whose code calls, fused into others or not.
    pub caller: String,
    /// The function that is called.
    pub callee: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// How its calls run now.
    pub state: EdgeState,
    /// Calls by RPC.
    pub rpc_calls: u64,
    /// Calls that ran fused.
    pub fused_calls: u64,
    /// Of both, those that failed.
    pub errors: u64,
    /// Input bytes of both.
    pub bytes_in: u64,
    /// Output bytes of both.
    pub bytes_out: u64,
    /// Calls per second, within the window.
    pub calls_per_s: f64,
    /// Of them, those that failed, per second.
    pub errors_per_s: f64,
    /// Calls that were under way when last looked.
    pub in_flight: u64,
    /// Calls under way on average within the window (their rate times their mean
    /// latency); `None` where no latency is known.
    pub concurrency: Option<f64>,
    /// How long an RPC takes, the callee's work included.
    pub rpc: Option<Latency>,
    /// How long a fused call takes.
    pub fused: Option<Latency>,
    /// Where RPCs come from.
    pub sites: Vec<GraphSite>,
}

/// How an edge's calls run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EdgeState {
    /// By RPC.
    Rpc,
    /// Fused, in every worker of the caller.
    Fused,
    /// Fused in some workers.
    Mixed,
}

/// A place that calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphSite {
    /// `libfoo.so+0x1234`, the address that the call returns to.
    pub at: String,
    /// RPCs from there.
    pub calls: u64,
}

/// Durations, from samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Calls that were measured.
    pub samples: u64,
    /// Mean, in nanoseconds; exact for the samples.
    pub mean_ns: f64,
    /// Half of them took no longer, in nanoseconds, to an eighth.
    pub p50_ns: f64,
    /// 90 %.
    pub p90_ns: f64,
    /// 99 %.
    pub p99_ns: f64,
}

/// The graph over time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Oldest first.
    pub steps: Vec<HistoryStep>,
    /// What is not known, in sentences.
    pub notes: Vec<String>,
}

/// What was counted in some seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HistoryStep {
    /// When it ended, in milliseconds since 1970.
    pub at_ms: u64,
    /// How long it was, in seconds.
    pub seconds: f64,
    /// Functions that served calls, sorted as in [`Graph`].
    pub nodes: Vec<HistoryNode>,
    /// Edges with calls, sorted as in [`Graph`].
    pub edges: Vec<HistoryEdge>,
}

/// A function, in one step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HistoryNode {
    /// Its name.
    pub function: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// Calls that its own workers served.
    pub calls: u64,
    /// Of them, those that failed.
    pub errors: u64,
    /// How long they took.
    pub own: Option<Latency>,
}

/// An edge, in one step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HistoryEdge {
    /// The function that calls.
    pub caller: String,
    /// The function that is called.
    pub callee: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// Calls by RPC.
    pub rpc_calls: u64,
    /// Calls that ran fused.
    pub fused_calls: u64,
    /// Of both, those that failed.
    pub errors: u64,
    /// How long an RPC took.
    pub rpc: Option<Latency>,
    /// How long a fused call took.
    pub fused: Option<Latency>,
}
