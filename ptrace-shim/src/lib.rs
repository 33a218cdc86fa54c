//! Stopping the threads of a running process, and doing system calls through
//! them, such that the process goes on as if nothing had been; whatever happens
//! to us meanwhile.
//!
//! ```text
//!   Process ──> Memory                       read and write while it runs
//!      │   └──> where_threads_are            look before stopping
//!      │
//!      ├─ stop_thread ──> StoppedThread ── borrow ──> Borrowed ── syscall ...
//!      │                     │   ^                        │
//!      │                  resume └────── give_back ───────┘
//!      │
//!      └─ stop_all ─────> StoppedProcess ── registers, write_code ... ── resume
//! ```
//!
//! - A stop is a value: registers exist only on it, it is consumed by
//!   `resume`, and dropping it resumes too. It is bound to the OS thread that
//!   made it, as ptrace is. [`tracer_thread`] gives it one of its own.
//! - If this process dies at any instruction, the traced one goes on: nothing
//!   that needs an undoing by us is ever left in it (see `borrow.rs`).
//! - Signals, group-stops and exits that come meanwhile are passed on.
//! - Every wait has a deadline.
//!
//! What this asks of the process that it is used in:
//! - Each stop sends it a SIGCHLD, as the death of a child does. Nobody in it
//!   may wait for *any* child (`waitpid(-1)`): that takes stops away from here.
//! - While an OS thread makes or holds a stop, its own blocking calls may
//!   return EINTR every 3 ms (the timer that looks at deadlines; it takes the
//!   highest real-time signal that has no handler).
//! - A thread of the traced process that exits or is killed in a stop waits at
//!   its exit until the stop is over.
//!
//! x86-64 Linux, 5.4 or later. This crate knows nothing of ELF files, of
//! instructions (but for the two runs in [`Gadgets`]), or of whose processes
//! these are. It reads seccomp filters where it may, and lifts none.

#![deny(unsafe_code)]

mod borrow;
mod borrowable;
mod error;
pub mod faults;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gadgets;
mod ids;
mod maps;
mod memory;
mod options;
mod process;
mod registers;
mod scheduling;
mod seccomp;
mod stop_all;
mod stop_thread;
#[expect(unsafe_code, reason = "the one place of it, see there")]
mod sys;
mod syscall_names;
mod syscalls;
mod tracee;
mod tracer_thread;
mod whereabouts;
mod xstate;

pub use borrow::Borrowed;
pub use error::{Error, NotBorrowable, Result};
pub use gadgets::Gadgets;
pub use ids::{Address, Pid, Tid};
pub use maps::Mapping;
pub use memory::{Memory, WriteMethod};
pub use nix::errno::Errno;
pub use options::StopOptions;
pub use process::Process;
pub use registers::{Interrupted, Registers};
pub use scheduling::{SameCpu, Scheduling};
pub use seccomp::{SeccompAnswer, SeccompFilters, SeccompState};
pub use stop_all::{Stop, StoppedProcess, stop_all};
pub use stop_thread::{StoppedThread, stop_thread};
pub use syscall_names::syscall_name;
pub use syscalls::{Disturbed, Sees};
pub use tracee::yama_scope;
pub use tracer_thread::tracer_thread;
pub use whereabouts::{Place, Whereabouts, where_threads_are};

#[doc(hidden)]
pub use sys::die_at_step;

/// The size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;
