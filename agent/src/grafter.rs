//! What the agent asks of the patcher, as a trait.
//!
//! Everything else in this crate codes against [`Grafter`], so that discovery,
//! the canary and the API are tested with a fake and no process is touched.
//! Two kinds of call:
//!
//! * [`Grafter::patch`], [`Grafter::revert`], [`Grafter::observe`],
//!   [`Grafter::leave`], [`Grafter::recover`] change a worker. Only the driver's thread calls them, one at a time, always the same
//!   OS thread (a tracee belongs to the thread that seized it).
//! * [`Grafter::explain`], [`Grafter::status`], [`Grafter::build_id`],
//!   [`Grafter::hold`], [`Grafter::counters`] only read, and [`Grafter::set_gate`] and
//!   [`Grafter::forget_crash`] store one byte. Any
//!   thread may call them, also while a worker is being changed.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use nightgraft_patcher::Refused;
pub use nightgraft_patcher::effects::{Allowance, Effect};
pub use nightgraft_patcher::held::Held;
pub use nightgraft_patcher::observed::Reading;
pub use nightgraft_patcher::plan::Wanted;
pub use nightgraft_patcher::recover::{Recovered, Verdict};
pub use nightgraft_patcher::report::{
    CalleeState, Disturbed, EdgeCounters, GraftStatus, GuardState, PatchReceipt, RevertReceipt,
    RpcReasons, SignalsBack, SiteProof, WorkerStatus,
};

pub use crate::claim::Claim;

/// One worker, as the patcher must know it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Process id as the agent's `/proc` numbers it.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`):
    /// with the pid it names one process for as long as the node is up.
    pub start_time: u64,
    /// The function library as the worker names it, inside its own container.
    pub library: PathBuf,
}

/// What a patch would do, without having done it.
#[derive(Debug, Clone, PartialEq)]
pub struct Explained {
    /// The plan for a human reader: mappings, and each window's disassembly
    /// before and after.
    pub text: String,
    /// The plan as the patcher serialises it.
    pub plan: serde_json::Value,
    /// Why a patch would be refused nevertheless: effects that are not allowed.
    pub refused: Option<Refused>,
    /// Bytes that it adds to the worker's memory.
    pub bytes: u64,
}

/// Why a call of [`Grafter`] did not do what it was asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GraftError {
    /// The edge can't be fused right; the worker is as it was.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Another process traces the worker, and there can be only one.
    #[error("worker {pid} is traced by {tracer_name} (pid {tracer_pid})")]
    TracedBy {
        /// The worker.
        pid: i32,
        /// The process that traces it.
        tracer_pid: i32,
        /// That process's command name, or `?` where it can't be read.
        tracer_name: String,
    },
    /// The kernel denied the agent something that a capability or namespace
    /// would grant.
    #[error("the agent lacks {capability}, needed to {purpose}")]
    MissingCapability {
        /// What is missing, such as `CAP_SYS_PTRACE`.
        capability: String,
        /// What it is needed for, completing "needed to …".
        purpose: String,
        /// The container flag that grants it, such as `--cap-add SYS_PTRACE`.
        flag: String,
    },
    /// Yama forbids tracing to everyone.
    #[error("kernel.yama.ptrace_scope is 3 on this node: nobody may read or stop a worker")]
    TracingForbidden,
    /// The worker has exited, or its pid now belongs to another process.
    #[error("worker {pid} has exited")]
    WorkerGone {
        /// The worker.
        pid: i32,
    },
    /// Another agent works in the worker, or something keeps its lock.
    #[error("worker {pid} is claimed by another agent{}", holder_text(.holder))]
    Claimed {
        /// The worker.
        pid: i32,
        /// The process that has the lock, where the kernel tells.
        holder: Option<i32>,
    },
    /// Anything else. The text says the operation, its subject and the cause.
    #[error("{0}")]
    Failed(String),
}

fn holder_text(holder: &Option<i32>) -> String {
    holder.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// The counters of one worker.
pub trait Counting: Send + fmt::Debug {
    /// Reads them; `None` where nothing of ours is there any more. Of a worker that
    /// has ended this works once more, if its memory is held.
    ///
    /// # Errors
    /// They cannot be read (any more).
    fn read(&mut self) -> Result<Option<Reading>, GraftError>;
}

/// Fuses, un-fuses, observes and reads workers.
pub trait Grafter: Send + Sync {
    /// Plans the fusing of `callee` into `caller` and touches neither. The plan
    /// tells which effects are not allowed, and is made all the same.
    ///
    /// # Errors
    /// [`GraftError::Refused`] where the edge can't be fused right; else what
    /// kept the plan from being made.
    fn explain(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
        wanted: Wanted,
    ) -> Result<Explained, GraftError>;

    /// Fuses `callee` into `caller`. An edge that is fused already is left as
    /// it is, and the receipt says so ([`PatchReceipt::already`]). A callee
    /// that shows guarded effects which are not allowed is refused.
    ///
    /// # Errors
    /// Any [`GraftError`]; the worker then runs its original code.
    fn patch(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
        wanted: Wanted,
    ) -> Result<PatchReceipt, GraftError>;

    /// Un-fuses an edge: the gate at once, the bytes when no thread is inside.
    /// An edge that is not fused is no error ([`RevertReceipt::nothing`]).
    ///
    /// # Errors
    /// Any [`GraftError`] but [`GraftError::Refused`].
    fn revert(&self, caller: &Target, callee_name: &str) -> Result<RevertReceipt, GraftError>;

    /// Has a worker's RPCs and the calls of its function counted. Where they are
    /// already, the receipt says so ([`PatchReceipt::already`]).
    ///
    /// # Errors
    /// Any [`GraftError`]; the worker then runs its original code.
    fn observe(&self, worker: &Target) -> Result<PatchReceipt, GraftError>;

    /// The opposite. One whose calls are not counted is no error
    /// ([`RevertReceipt::nothing`]).
    ///
    /// # Errors
    /// Any [`GraftError`] but [`GraftError::Refused`].
    fn leave(&self, worker: &Target) -> Result<RevertReceipt, GraftError>;

    /// Opens a worker's counters; `None` where nothing of ours is in it. Stops
    /// nobody.
    ///
    /// # Errors
    /// As [`Grafter::status`].
    fn counters(&self, worker: &Target) -> Result<Option<Box<dyn Counting>>, GraftError>;

    /// Reads back what of ours is in a worker, through `/proc/PID/mem` alone;
    /// `None` where there is nothing.
    ///
    /// # Errors
    /// [`GraftError::WorkerGone`], [`GraftError::MissingCapability`] or
    /// [`GraftError::Failed`].
    fn status(&self, worker: &Target) -> Result<Option<WorkerStatus>, GraftError>;

    /// Build-id of the worker's function library, lower-case hex; `None` where
    /// it was linked without one.
    ///
    /// # Errors
    /// As [`Grafter::status`].
    fn build_id(&self, worker: &Target) -> Result<Option<String>, GraftError>;

    /// Holds a worker with something of ours in it, so that its end is seen and
    /// what ran then is known; `None` where nothing is.
    ///
    /// # Errors
    /// As [`Grafter::status`].
    fn hold(&self, worker: &Target) -> Result<Option<Held>, GraftError>;

    /// Stores the gate's byte of a fused edge: `true` lets calls run fused.
    /// Stops nobody.
    ///
    /// # Errors
    /// As [`Grafter::status`]; [`GraftError::Failed`] where the edge is not
    /// there.
    fn set_gate(&self, caller: &Target, callee_name: &str, on: bool) -> Result<(), GraftError>;

    /// Forgets that an edge crashed, so that the next crash is seen. Stops
    /// nobody; an edge that is not there is no error.
    ///
    /// # Errors
    /// As [`Grafter::status`].
    fn forget_crash(&self, _caller: &Target, _callee_name: &str) -> Result<(), GraftError> {
        Ok(())
    }

    /// Lets go of memory that was kept for later and that nobody has used for
    /// a while; called now and then.
    fn tidy(&self) {}

    /// Keeps other agents out of these workers for as long as the claim lives.
    /// Taken before they are changed, all that one request changes at once.
    ///
    /// # Errors
    /// [`GraftError::Claimed`] where another agent does not let go in time.
    fn claim(&self, _workers: &[Target]) -> Result<Claim, GraftError> {
        Ok(Claim::default())
    }

    /// The same, without waiting for others: for what nobody has asked for.
    ///
    /// # Errors
    /// [`GraftError::Claimed`] where another agent works in one of them.
    fn claim_at_once(&self, _workers: &[Target]) -> Result<Claim, GraftError> {
        Ok(Claim::default())
    }

    /// Puts a worker in order in which an agent may have died, claiming it for
    /// that; `None` where there is nothing of ours, and nothing to be done.
    ///
    /// # Errors
    /// As [`Grafter::status`], and [`GraftError::Claimed`] where another agent
    /// works in it for longer than `patience`.
    fn recover(
        &self,
        _worker: &Target,
        _patience: Duration,
    ) -> Result<Option<Recovered>, GraftError> {
        Ok(None)
    }

    /// Where the journal is, and why it is away if it is.
    fn journal(&self) -> (String, Option<String>) {
        Default::default()
    }
}
