//! Points at which a test may end the agent while it changes a worker; see
//! [`ptrace_shim::faults`].

pub use ptrace_shim::faults::hit;

ptrace_shim::fault_points! {
    /// All is checked; nothing is touched or written down.
    CHECKED = "patch::checked";
    /// It is written down that memory will be mapped.
    INTENT = "patch::intent";
    /// Before a system call of ours in the worker.
    CALL_BEFORE = "prepare::call#before";
    /// Behind it.
    CALL_AFTER = "prepare::call#after";
    /// Everything is mapped, and the borrowed thread runs on.
    MAPPED = "prepare::mapped";
    /// A part is filled.
    FILLED_PART = "prepare::filled-part";
    /// The thread pointer is stored.
    THREAD_FIELD = "prepare::thread-field";
    /// Everything is filled and read back.
    FILLED = "prepare::filled";
    /// It is written down that the record and the windows come now.
    COMMITTING = "patch::committing";
    /// The record is in its slot, which does not hold yet.
    RECORD_SLOT = "record::slot";
    /// A new control area knows the bridge's structure.
    RECORD_WORKER = "record::worker";
    /// A new control area has its version.
    RECORD_VERSION = "record::version";
    /// The slot holds.
    RECORD_HOLDS = "record::holds";
    /// A new control area has its mark.
    RECORD_MARK = "record::mark";
    /// All threads are stopped at a safe moment.
    STOPPED = "commit::stopped";
    /// A thread was moved out of a window.
    MOVED = "commit::moved";
    /// A word of the bridge's was stored.
    STORED = "commit::stored";
    /// The gate is open, no window in place.
    GATE = "commit::gate";
    /// A window is in place.
    WINDOW = "commit::window";
    /// All threads run again.
    RESUMED = "commit::resumed";
    /// It is written down that the patch is done.
    SETTLED = "patch::settled";
    /// It is written down that what was mapped will be unmapped.
    TAKING_BACK = "take-back::intent";
    /// The record of before holds again.
    UNRECORDED = "take-back::unrecorded";
    /// What was mapped is unmapped.
    TAKEN_BACK = "take-back::unmapped";
    /// It is written down that an edge is being reverted.
    REVERTING = "revert::intent";
    /// A gate is closed.
    REVERT_GATE = "revert::gate";
    /// A window has the library's bytes again.
    REVERT_WINDOW = "revert::window";
    /// All threads run again.
    REVERT_RESUMED = "revert::resumed";
    /// It is written down that the revert is done.
    REVERTED = "revert::settled";
    /// What is to be recovered is known.
    DECIDED = "recover::decided";
    /// A descriptor left open is closed.
    RECOVER_CLOSED = "recover::closed";
    /// Memory left mapped is unmapped.
    RECOVER_UNMAPPED = "recover::unmapped";
    /// A record is written from the journal.
    RECOVER_RECORDED = "recover::recorded";
    /// An edge left half fused is reverted.
    RECOVER_REVERTED = "recover::reverted";
    /// It is written down that nothing is under way any more.
    RECOVERED = "recover::settled";
}
