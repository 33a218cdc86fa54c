//! The agent's API, version 1: the values that go over the socket.
//!
//! | method and path | request | answer |
//! |---|---|---|
//! | `GET /v1/health` | | [`Health`] |
//! | `GET /v1/ps` | | [`Ps`] |
//! | `GET /v1/status` | | [`Status`] |
//! | `POST /v1/explain` | [`ExplainRequest`] | [`Explanation`] |
//! | `POST /v1/patch` | [`PatchRequest`] | [`PatchReport`] |
//! | `POST /v1/revert` | [`EdgeRequest`] | [`RevertReport`] |
//! | `POST /v1/unquarantine` | [`EdgeRequest`] | [`UnquarantineReport`] |
//! | `POST /v1/observe` | [`ObserveRequest`] | [`ObserveReport`] |
//! | `GET /v1/graph` | | [`Graph`] |
//! | `GET /v1/plan` | | [`PlanReport`] |
//! | `GET /v1/history` | `?since=SECONDS` | [`History`] |
//!
//! An answer other than 200 carries an [`ErrorBody`]. Fields may be added
//! within a version; none is removed or changes its meaning.

mod graph;
mod plan;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::grafter::{CalleeState, GraftStatus, PatchReceipt, RevertReceipt, Verdict};

pub use graph::*;
pub use plan::*;

/// Path of the health check.
pub const HEALTH: &str = "/v1/health";
/// Path of the list of functions and workers.
pub const PS: &str = "/v1/ps";
/// Path of the list of fused edges.
pub const STATUS: &str = "/v1/status";
/// Path that plans an edge.
pub const EXPLAIN: &str = "/v1/explain";
/// Path that fuses an edge.
pub const PATCH: &str = "/v1/patch";
/// Path that un-fuses an edge.
pub const REVERT: &str = "/v1/revert";
/// Path that lifts an edge's quarantine.
pub const UNQUARANTINE: &str = "/v1/unquarantine";

/// Path that begins or ends observing.
pub const OBSERVE: &str = "/v1/observe";
/// Path of the graph.
pub const GRAPH: &str = "/v1/graph";
/// Path of the plan.
pub const PLAN: &str = "/v1/plan";
/// Path of the graph's history.
pub const HISTORY: &str = "/v1/history";

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/nightgraft/agent.sock";
/// How long the first patched worker is watched unless told otherwise, in
/// milliseconds.
pub const DEFAULT_CANARY_WAIT_MS: u64 = 2_000;
/// The longest that a patched worker may be watched, in milliseconds.
pub const MAX_CANARY_WAIT_MS: u64 = 60_000;

/// What is wrong, for programs and for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorInfo {
    /// Stable, in kebab case.
    pub code: String,
    /// What, and where.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl fmt::Display for ErrorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// The body of every answer that is not 200.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: ErrorInfo,
    /// What was done to the workers nevertheless: a [`PatchReport`] or
    /// [`RevertReport`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<serde_json::Value>,
}

/// Names an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeRequest {
    /// The function that invokes. Case does not matter where it is clear.
    pub caller: String,
    /// The function that is invoked.
    pub callee: String,
    /// Pid of the engine, where several engines know functions of these names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<i32>,
}

/// Asks what a patch would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// The function that invokes.
    pub caller: String,
    /// The function that is invoked.
    pub callee: String,
    /// Pid of the engine, where several engines know functions of these names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<i32>,
    /// Of a patch that guards calls against crashes of the callee.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guard: bool,
}

/// Asks for an edge to be fused in all of the caller's workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchRequest {
    /// The function that invokes.
    pub caller: String,
    /// The function that is invoked.
    pub callee: String,
    /// Pid of the engine, where several engines know functions of these names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<i32>,
    /// How long to watch a patched worker, in milliseconds, up to
    /// [`MAX_CANARY_WAIT_MS`].
    #[serde(default = "default_canary_wait_ms")]
    pub canary_wait_ms: u64,
    /// What the callee may touch that is the caller's: `files`, `network`,
    /// `credentials`, or `all`. The agent's configuration may allow more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_effects: Vec<String>,
    /// Calls are to be guarded against crashes of the callee. The agent's
    /// configuration may say so as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guard: bool,
}

fn default_canary_wait_ms() -> u64 {
    DEFAULT_CANARY_WAIT_MS
}

/// How the agent is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Version of the agent.
    pub version: String,
    /// Its pid, in its own pid namespace.
    pub pid: i32,
    /// Seconds since it started to listen.
    pub uptime_s: u64,
    /// Requests that wait for the driver or run in it.
    pub queued: usize,
    /// What the agent lacks, each with the flag that grants it.
    pub missing: Vec<MissingCapability>,
    /// Edges that are not fused again until that is asked for.
    #[serde(default)]
    pub quarantined: Vec<Quarantined>,
    /// Workers are still being put in order, which is done when the agent
    /// starts: requests that change workers wait for it.
    #[serde(default)]
    pub recovering: bool,
    /// How the journal is.
    #[serde(default)]
    pub journal: JournalHealth,
    /// Workers in which there was something to be done when the agent started.
    #[serde(default)]
    pub recovered: Vec<RecoveredWorker>,
}

/// An edge whose callee ran when a worker died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// The caller's name, or `#id`.
    pub caller: String,
    /// The callee's name, with the way to it.
    pub callee: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// The worker that died.
    pub pid: i32,
    /// How, and what ran, completing "worker … ".
    pub how: String,
    /// All callees whose code had begun, outermost first; the last is this
    /// edge's.
    pub in_flight: Vec<String>,
    /// Seconds since 1970.
    pub since: u64,
}

/// What lifting a quarantine did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnquarantineReport {
    /// The caller's name.
    pub caller: String,
    /// The callee's name.
    pub callee: String,
    /// What it was there for; `None` if it was not quarantined.
    pub was: Option<Quarantined>,
}

/// How the journal is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalHealth {
    /// Where it is.
    pub path: String,
    /// Why it is away: then nothing is patched. `None` while it is not.
    pub away: Option<String>,
    /// What was found when it was opened, in sentences.
    pub notes: Vec<String>,
}

/// What was found in a worker when the agent started, and done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveredWorker {
    /// The worker.
    pub pid: i32,
    /// What came of it.
    pub verdict: Verdict,
    /// What was found and done, in sentences.
    pub notes: Vec<String>,
}

/// Something that the agent may not do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingCapability {
    /// Such as `CAP_SYS_PTRACE`.
    pub capability: String,
    /// What it is needed for, completing "needed to …".
    pub purpose: String,
    /// The container flag that grants it.
    pub flag: String,
}

/// The functions of the node and their workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ps {
    /// Sorted by engine, then function id.
    pub functions: Vec<Function>,
    /// What could not be found out, in sentences.
    pub notes: Vec<String>,
}

/// One function.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Function {
    /// Name; `None` where neither an engine's configuration nor the worker's
    /// log file tells it.
    pub name: Option<String>,
    /// nightcore's function id.
    pub id: u32,
    /// Pid of the engine that dispatches it; `None` where that is not known
    /// or not clear.
    pub engine: Option<i32>,
    /// `minWorkers` of the configuration.
    pub min_workers: Option<i64>,
    /// `maxWorkers` of the configuration.
    pub max_workers: Option<i64>,
    /// Sorted by pid.
    pub workers: Vec<Worker>,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// Pid as the agent's `/proc` numbers it.
    pub pid: i32,
    /// Pid inside the worker's own pid namespace.
    pub pid_inside: Option<i32>,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
    /// nightcore's number of the process within its launcher.
    pub fprocess_id: Option<u32>,
    /// nightcore's client id.
    pub client_id: Option<u32>,
    /// The container that it runs in; `None` outside of any.
    pub container: Option<Container>,
    /// Whether it runs a native library.
    pub kind: WorkerKind,
    /// The function library, as its container names it.
    pub library: Option<String>,
    /// Build-id of the library, lower-case hex.
    pub build_id: Option<String>,
    /// Number of threads.
    pub threads: u32,
    /// The process that traces it, other than the agent.
    pub traced_by: Option<Tracer>,
    /// What is fused into it.
    pub fused: Vec<FusedEdge>,
    /// Its RPCs and the calls of its function are counted.
    #[serde(default)]
    pub observed: bool,
    /// What could not be read of it.
    pub problem: Option<ErrorInfo>,
}

/// What a worker runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum WorkerKind {
    /// `func_worker_v1` and a C or C++ library.
    Native,
    /// Anything else: can't be fused.
    NotNative {
        /// `Go`, `Node.js`, `Python`, or `no func_worker_v1` where that is not known.
        language: String,
    },
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// 64 hex digits, where the runtime uses such; else the control group's
    /// last component.
    pub id: String,
    /// Name, from Docker.
    pub name: Option<String>,
    /// Image, from Docker.
    pub image: Option<String>,
    /// Labels, from Docker.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// A process that traces a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracer {
    /// Its pid.
    pub pid: i32,
    /// Its command name; `?` where it can't be read.
    pub name: String,
}

/// A callee that is fused into a worker, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FusedEdge {
    /// The callee's name.
    pub callee: String,
    /// Whether calls run fused as far as the gate is concerned.
    pub gate_on: bool,
    /// Whether the windows are in place.
    pub windows_in_place: bool,
    /// The callee's state in this worker.
    pub state: CalleeState,
}

/// All fused edges of the node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Sorted by caller, then callee.
    pub edges: Vec<Edge>,
    /// Edges that are not fused again until that is asked for.
    #[serde(default)]
    pub quarantined: Vec<Quarantined>,
    /// What could not be read, in sentences.
    pub notes: Vec<String>,
}

/// One fused edge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Edge {
    /// The caller's name, or `#id`.
    pub caller: String,
    /// The callee's name.
    pub callee: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// The caller's workers that hold the callee, sorted by pid.
    pub workers: Vec<EdgeWorker>,
    /// Sums over the workers.
    pub totals: EdgeTotals,
}

/// One edge in one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EdgeWorker {
    /// The worker.
    pub pid: i32,
    /// The container's id, in short.
    pub container: Option<String>,
    /// Version of the bridge.
    pub bridge_version: u32,
    /// Bytes that we mapped in this worker, for all its edges.
    pub mapped_bytes: u64,
    /// The edge, read back from the worker.
    pub graft: GraftStatus,
}

/// Sums of an edge over its workers, since each one's first patch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EdgeTotals {
    /// Calls that ran fused.
    pub fused_calls: u64,
    /// Of them, those that returned -1.
    pub fused_errors: u64,
    /// Calls at the edge's sites that took the RPC, other callees' left out.
    pub rpc_calls: u64,
    /// Mean duration of a fused call in nanoseconds, weighted by calls.
    pub fused_ns_mean: Option<f64>,
}

/// A plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The caller's name.
    pub caller: String,
    /// The callee's name.
    pub callee: String,
    /// The worker that the plan is for.
    pub caller_pid: i32,
    /// The worker that the callee was read from.
    pub callee_pid: i32,
    /// The plan for a human reader.
    pub text: String,
    /// The plan as the patcher serialises it.
    pub plan: serde_json::Value,
    /// What a patch without any allowance of its own would be refused with.
    #[serde(default)]
    pub refused: Option<ErrorInfo>,
    /// What else should be known.
    pub notes: Vec<String>,
}

/// What a patch did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PatchReport {
    /// The caller's name.
    pub caller: String,
    /// The callee's name.
    pub callee: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// Every worker was fused already, and nothing was done.
    pub already: bool,
    /// In the order in which they were dealt with.
    pub workers: Vec<PatchedWorker>,
    /// What else should be known.
    pub notes: Vec<String>,
}

impl PatchReport {
    /// How many workers should be fused and are not. One that has exited
    /// need not be.
    #[must_use]
    pub fn not_fused(&self) -> usize {
        let missing = |worker: &&PatchedWorker| {
            matches!(
                worker.outcome,
                PatchOutcome::Reverted { .. }
                    | PatchOutcome::Failed { .. }
                    | PatchOutcome::NotTried
            )
        };
        self.workers.iter().filter(missing).count()
    }
}

/// One worker of a patch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PatchedWorker {
    /// The worker.
    pub pid: i32,
    /// Its pid inside the container.
    pub pid_inside: Option<i32>,
    /// The container's id, in short.
    pub container: Option<String>,
    /// It was the first, watched before the others were touched.
    pub canary: bool,
    /// What became of it.
    pub outcome: PatchOutcome,
    /// What the patcher did; `None` where nothing was.
    pub receipt: Option<PatchReceipt>,
    /// What was seen afterwards; `None` where nothing was.
    pub proof: Option<Proof>,
}

/// What became of a worker that was to be patched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum PatchOutcome {
    /// Fused.
    Fused,
    /// It had been fused before, and nothing was done.
    Already,
    /// It was fused, did not prove well, and was reverted.
    Reverted {
        /// What was seen.
        why: String,
    },
    /// It could not be fused, or fused and not reverted: see `error`.
    Failed {
        /// Why.
        error: ErrorInfo,
    },
    /// It exited meanwhile.
    Gone,
    /// It was left alone because the first one failed.
    NotTried,
}

/// How far a fused worker was seen to work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// The verdict.
    pub verdict: ProofVerdict,
    /// The callee's state when last looked at.
    pub state: Option<CalleeState>,
    /// Fused calls between the patch and the last look.
    pub fused_calls: u64,
    /// Of them, those that returned -1.
    pub fused_errors: u64,
    /// Calls of this edge that took the RPC between the patch and the last
    /// look.
    pub rpc_calls: u64,
    /// Milliseconds from the patch to the last look.
    pub waited_ms: u64,
}

/// What the counters said of a fused worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProofVerdict {
    /// The callee is ready and fused calls were counted.
    Proven,
    /// Nobody called in the time that was watched, or it was not watched; it is
    /// in place.
    Idle,
    /// There were calls, and yet none ran fused, or the callee failed.
    Failed,
}

/// What a revert did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RevertReport {
    /// The caller's name.
    pub caller: String,
    /// The callee's name.
    pub callee: String,
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// No worker was fused, and nothing was done.
    pub nothing: bool,
    /// Sorted by pid.
    pub workers: Vec<RevertedWorker>,
    /// What else should be known.
    pub notes: Vec<String>,
}

impl RevertReport {
    /// How many workers should have been un-fused and are not.
    #[must_use]
    pub fn not_reverted(&self) -> usize {
        let failed =
            |worker: &&RevertedWorker| matches!(worker.outcome, RevertOutcome::Failed { .. });
        self.workers.iter().filter(failed).count()
    }
}

/// One worker of a revert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RevertedWorker {
    /// The worker.
    pub pid: i32,
    /// Its pid inside the container.
    pub pid_inside: Option<i32>,
    /// The container's id, in short.
    pub container: Option<String>,
    /// What became of it.
    pub outcome: RevertOutcome,
    /// What the patcher did; `None` where it could not.
    pub receipt: Option<RevertReceipt>,
    /// Fused calls that were counted up to the revert.
    pub fused_calls: Option<u64>,
}

/// What became of a worker that was to be reverted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum RevertOutcome {
    /// The original bytes are back.
    Restored,
    /// Calls take the RPC; the bytes stay until the reason in the receipt is
    /// gone.
    GateOff,
    /// It was not fused.
    Nothing,
    /// It could not be reverted.
    Failed {
        /// Why.
        error: ErrorInfo,
    },
    /// It has exited.
    Gone,
}

#[cfg(test)]
mod tests;
