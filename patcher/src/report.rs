//! What was done to a worker, and what is there: the values that the agent
//! shows and stores. All of them serialise.

use serde::{Deserialize, Serialize};

use crate::effects::Effect;

/// The state of a callee inside one caller's worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CalleeState {
    /// Mapped; its initialisers have not been started (they start at the
    /// first call that passes a site).
    Armed,
    /// Its initialisers are running on the bridge's thread; calls take the RPC.
    Initialising,
    /// Fused calls run.
    Ready,
    /// Its initialisers failed or overran their deadline; calls take the RPC.
    Failed,
    /// It crashed in a guarded call; calls take the RPC, and this image is never
    /// called again.
    Crashed,
}

/// What keeps a worker from a crash of one callee.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuardState {
    /// Nothing: nobody asked for it.
    #[default]
    None,
    /// It begins with the next call.
    Waiting,
    /// The signals come to the guard first.
    On,
    /// It is off: the worker has taken one of the signals for itself since.
    Taken,
    /// It is off: the kernel gave it no memory, or none of the signals.
    Denied,
}

/// Why calls that passed a site took the RPC, counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RpcReasons {
    /// The gate was off.
    pub gate_off: u64,
    /// The name was of no fused callee. Counted for the worker, as none of the
    /// edge's.
    pub other_name: u64,
    /// The call's target was not the worker's `invoke_func`. Counted for the
    /// worker, whatever the site.
    pub other_target: u64,
    /// The callee was not ready (yet).
    pub not_ready: u64,
    /// The callee was already running (re-entered).
    pub busy: u64,
    /// The call came from a thread other than the worker's own.
    pub other_thread: u64,
    /// Too little stack was left.
    pub stack: u64,
    /// The output arena was over its budget.
    pub memory: u64,
}

/// Counters of one edge in one worker, since its first patch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EdgeCounters {
    /// Calls that ran fused and returned.
    pub fused_calls: u64,
    /// Of them, those that returned -1.
    pub fused_errors: u64,
    /// Fused calls that have begun and not returned: 1 for long is a callee that
    /// does not come back.
    #[serde(default)]
    pub in_flight: u64,
    /// Input bytes of the fused calls.
    pub bytes_in: u64,
    /// Output bytes of the fused calls.
    pub bytes_out: u64,
    /// Calls at this edge's sites that took the RPC, by reason.
    pub rpc: RpcReasons,
    /// Mean duration of a fused call in nanoseconds, from one call in 1,024;
    /// `None` until one was sampled.
    pub fused_ns_mean: Option<f64>,
}

/// One edge in one worker, as read back from the worker itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraftStatus {
    /// The callee's function name.
    pub callee: String,
    /// Build-id of the callee's image, lower-case hex.
    pub build_id: String,
    /// Whether the gate lets calls run fused.
    pub gate_on: bool,
    /// Whether the sites' windows are in place (the live bytes were compared).
    pub windows_in_place: bool,
    /// The callee's state.
    pub state: CalleeState,
    /// What the callee's initialisers returned or did when they failed, or the
    /// crash that a guarded call ended with.
    pub failure: Option<String>,
    /// What keeps the worker from a crash of it.
    #[serde(default)]
    pub guard: GuardState,
    /// Addresses of the sites in the worker.
    pub sites: Vec<u64>,
    /// Whether the entry of the worker's own routine leads to it as well.
    #[serde(default)]
    pub routine: bool,
    /// Return addresses of the calls that came through that entry, from sites
    /// that are not rewritten.
    #[serde(default)]
    pub seen: Vec<u64>,
    /// Counters.
    pub counters: EdgeCounters,
}

/// Everything of ours in one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// The worker, as the host numbers it.
    pub pid: i32,
    /// Version of the bridge in it.
    pub bridge_version: u32,
    /// Bytes of memory that we mapped in it.
    pub mapped_bytes: u64,
    /// Edges, in the order in which they were first fused.
    pub grafts: Vec<GraftStatus>,
    /// Its RPCs and the calls of its function are counted.
    #[serde(default)]
    pub observing: bool,
}

/// One site, proven: its bytes read back after the commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteProof {
    /// Address of the window's first byte in the worker.
    pub address: u64,
    /// Bytes before, as hex.
    pub before: String,
    /// Live bytes read back after, as hex.
    pub live: String,
}

/// A thread that may have seen the stop (its system call returns EINTR or
/// short when it is stopped).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disturbed {
    /// The thread, as the host numbers it.
    pub tid: i32,
    /// The system call's name.
    pub syscall: String,
}

/// What a patch did to one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PatchReceipt {
    /// The worker.
    pub pid: i32,
    /// The edge was fused already and nothing was done.
    pub already: bool,
    /// The image was there from an earlier patch and was used again.
    pub image_reused: bool,
    /// Calls that are known to reach the callee through the entry of the
    /// worker's own routine, as their sites cannot be rewritten; `None` where
    /// that entry is left alone.
    #[serde(default)]
    pub through_routine: Option<usize>,
    /// What the callee may touch that is the caller's.
    pub effects: Vec<Effect>,
    /// Windows written, read back.
    pub sites: Vec<SiteProof>,
    /// Nanoseconds of the stop in which the windows were written: from the
    /// first thread's interrupt to the last thread's resume.
    pub commit_stop_ns: u64,
    /// Nanoseconds of every stop of this patch, the commit's last.
    pub stops_ns: Vec<u64>,
    /// Threads that may have seen a stop.
    pub disturbed: Vec<Disturbed>,
    /// Why the journal does not know that the patch is done; `None` where it
    /// does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
}

/// What became of a guard's signals when the last guarded edge was reverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignalsBack {
    /// Each has the action that it had before; what the worker has changed
    /// since was left alone.
    GivenBack,
    /// A guarded call was under way: the guard stays, and passes on all that is
    /// not the callee's. The next revert tries again.
    CallUnderWay,
    /// The thread could not be borrowed, or a call was denied: as above.
    NotReached,
}

/// What a revert did to one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RevertReceipt {
    /// The worker.
    pub pid: i32,
    /// There was nothing to revert in this worker.
    pub nothing: bool,
    /// The original bytes are back (`false`: the gate is off, calls take the
    /// RPC, and the bytes stay until `reason` is gone).
    pub restored: bool,
    /// Why the bytes could not be restored within the deadline.
    pub reason: Option<String>,
    /// Windows restored, read back.
    pub sites: Vec<SiteProof>,
    /// Nanoseconds of every stop.
    pub stops_ns: Vec<u64>,
    /// Threads that may have seen a stop.
    pub disturbed: Vec<Disturbed>,
    /// What became of the signals that the guard had taken over; `None` where
    /// that does not matter: it had none, or others are guarded still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signals: Option<SignalsBack>,
    /// Why the journal does not know of the revert; `None` where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
}
