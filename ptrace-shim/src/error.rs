//! What can go wrong: the operation, its subject, and the cause.

use crate::{Address, Pid, Tid};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on a process failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such process (any more), or the id is that of a thread.
    #[error("process {pid}: no such process")]
    NoSuchProcess {
        /// The process that was asked for.
        pid: Pid,
    },
    /// The process died meanwhile, or its last thread is on its way out.
    #[error("process {pid} died during: {operation}")]
    ProcessDied {
        /// The process.
        pid: Pid,
        /// What was being done.
        operation: &'static str,
    },
    /// The thread exited meanwhile; its process lives, or is just about to end
    /// as well.
    #[error("thread {tid} of process {pid} exited during: {operation}")]
    ThreadGone {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// What was being done.
        operation: &'static str,
    },
    /// The process executed another program meanwhile: nothing that was known
    /// of its memory holds any more.
    #[error("process {pid} executed another program during: {operation}")]
    Executed {
        /// The process.
        pid: Pid,
        /// What was being done.
        operation: &'static str,
    },
    /// Somebody else traces the thread; a thread has one tracer at most.
    #[error("thread {tid} of process {pid} is already traced by {tracer} ({comm})")]
    TracedByAnother {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// The thread that traces it.
        tracer: Pid,
        /// Its name; empty if it could not be read.
        comm: String,
    },
    /// The kernel does not let us trace: CAP_SYS_PTRACE is missing (in the
    /// user namespace of the process), or a security module forbids it.
    #[error(
        "tracing thread {tid} of process {pid} is not permitted{}",
        match yama_scope {
            Some(scope) => format!(" (kernel.yama.ptrace_scope is {scope})"),
            None => String::new(),
        }
    )]
    NotPermitted {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// `kernel.yama.ptrace_scope` where there is one and it restricts
        /// (1: only descendants, 2: only with CAP_SYS_PTRACE, 3: nobody).
        yama_scope: Option<u8>,
    },
    /// A deadline passed. The thread was or will be let go of.
    #[error(
        "thread {tid} of process {pid} (state {state}) did not get there within {limit:?}: {operation}"
    )]
    Timeout {
        /// The process.
        pid: Pid,
        /// The thread that was waited for.
        tid: Tid,
        /// Its state letter as in `/proc/PID/stat`: D is an uninterruptible
        /// wait (`vfork`, storage), R wants a CPU.
        state: char,
        /// What was being done.
        operation: &'static str,
        /// The deadline that was given.
        limit: Duration,
    },
    /// The thread can't be borrowed; it was resumed untouched.
    #[error("thread {tid} of process {pid} can't be borrowed: {reason}")]
    NotBorrowable {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// Why.
        reason: NotBorrowable,
    },
    /// This call would outlive or destroy the borrowed state, so it is never
    /// made remotely (`fork`, `execve`, `exit`, `rt_sigreturn`, ...).
    #[error("system call {nr} ({}) is not made on a borrowed thread", crate::syscall_name(*nr))]
    CallRefused {
        /// The call's number.
        nr: u64,
    },
    /// A seccomp filter (or syscall user dispatch) of the process answered the
    /// call with a SIGSYS. It was kept from the process.
    #[error("system call {nr} ({}) was trapped by a filter of process {pid}", crate::syscall_name(*nr))]
    CallTrapped {
        /// The process.
        pid: Pid,
        /// The call's number.
        nr: u64,
    },
    /// No executable mapping of a file holds these instructions.
    #[error("process {pid} has no `{instructions}` mapped executable")]
    NoGadget {
        /// The process.
        pid: Pid,
        /// The instructions that were looked for.
        instructions: &'static str,
    },
    /// The instructions found earlier are no longer there.
    #[error("process {pid} no longer has `{instructions}` at {address}")]
    GadgetGone {
        /// The process.
        pid: Pid,
        /// The instructions.
        instructions: &'static str,
        /// Where they were.
        address: Address,
    },
    /// Memory could not be read or written.
    #[error("{operation} {length} bytes at {address} of process {pid} failed: {cause}")]
    Memory {
        /// "reading" or "writing".
        operation: &'static str,
        /// The process.
        pid: Pid,
        /// The first byte that failed.
        address: Address,
        /// How many bytes were left to do.
        length: usize,
        /// EIO where nothing is mapped.
        cause: Errno,
    },
    /// The process no longer has the address space that was opened: it has
    /// executed another program, or died.
    #[error("the address space of process {pid} is gone")]
    AddressSpaceGone {
        /// The process.
        pid: Pid,
    },
    /// The memory is not writable for the process itself, and the kernel
    /// forbids to write there through `/proc/PID/mem`
    /// (`proc_mem.force_override`); stopped threads can be written through.
    #[error(
        "writing {length} bytes at {address} of process {pid} needs a stop: the kernel forbids forced writes to /proc/PID/mem"
    )]
    ForcedWriteForbidden {
        /// The process.
        pid: Pid,
        /// Where.
        address: Address,
        /// How many bytes.
        length: usize,
    },
    /// A piece of code must lie within one page to be written in one go.
    #[error("{length} bytes of code at {address} do not lie within {unit}")]
    CodeSpans {
        /// Where.
        address: Address,
        /// How many bytes.
        length: usize,
        /// "one page", or with word-wise writing "one word".
        unit: &'static str,
    },
    /// The thread's registers decide how an interrupted system call goes on,
    /// so it can't be moved elsewhere.
    #[error("thread {tid} is in system call {nr} ({}) and can't be moved", crate::syscall_name(*nr))]
    InSystemCall {
        /// The thread.
        tid: Tid,
        /// The call's number.
        nr: u64,
    },
    /// The thread is not one of the stopped ones.
    #[error("thread {tid} of process {pid} is not among the stopped threads")]
    NotStopped {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
    },
    /// A request to the kernel failed in a way that has no name here.
    #[error("{operation} for thread {tid} of process {pid} failed: {cause}")]
    Request {
        /// What was being done.
        operation: &'static str,
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// The cause.
        cause: Errno,
    },
    /// A file of `/proc` could not be read or understood.
    #[error("reading /proc/{pid}/{file} failed: {cause}")]
    Proc {
        /// The process.
        pid: Pid,
        /// The file.
        file: String,
        /// The cause; EPROTO for an unexpected format.
        cause: Errno,
    },
    /// Something that this OS thread needs for tracing could not be had.
    #[error("preparing to trace process {pid}: {operation} failed: {cause}")]
    Setup {
        /// The process.
        pid: Pid,
        /// What was being done.
        operation: &'static str,
        /// The cause.
        cause: Errno,
    },
}

/// Why a thread can't be borrowed for system calls. Another thread of the
/// process, or the same one a moment later, may do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NotBorrowable {
    /// Its interrupted call goes on from the kernel's restart block, which a
    /// return from a signal frame forgets.
    #[error("its interrupted call {nr} ({}) goes on from a restart block", crate::syscall_name(*nr))]
    RestartBlock {
        /// The call's number.
        nr: u64,
    },
    /// It is inside an rseq critical section, which must be aborted, not
    /// resumed.
    #[error("it is inside an rseq critical section")]
    RseqCriticalSection,
    /// It has an active shadow stack, on which our return is not.
    #[error("it has an active shadow stack")]
    ShadowStack,
    /// It runs 32-bit code.
    #[error("it runs 32-bit code")]
    Not64Bit,
    /// Its stack pointer is not in writable memory.
    #[error("its stack pointer {stack_pointer} is not in writable memory")]
    NoStack {
        /// RSP.
        stack_pointer: Address,
    },
    /// Its stack pointer is neither in the main thread's stack nor in the same
    /// mapping as its thread control block, below it: an alternate signal
    /// stack or a coroutine's, of unknown size.
    #[error("its stack pointer {stack_pointer} is not on the thread's own stack")]
    ForeignStack {
        /// RSP.
        stack_pointer: Address,
    },
    /// Too little stack is left.
    #[error("{room} bytes of stack are left, {needed} are needed")]
    StackFull {
        /// Bytes between the end of the mapping and the red zone.
        room: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// Its extended state does not look like one that can be restored.
    #[error("its extended state is not understood: {0}")]
    ExtendedState(String),
}
