//! Doing what a plan says: the only part that touches a worker.
//!
//! ```text
//!            journal: what will be mapped
//!  prepare   one thread stopped, some ten system calls of ours: mappings
//!            the worker runs: images, stubs and structures are written
//!            journal: the record as it will be
//!  record    the record is written
//!  commit    all threads stopped: nobody in a window? then stores, gate,
//!            windows
//!            journal: done
//! ```
//!
//! Every prefix of this is harmless: nothing points at what is mapped until
//! the first window is written, and a window is written in one go. What is
//! mapped by a patch that does not get to its record is unmapped again, by this
//! agent or, from the journal, by the next ([`crate::recover`]).

mod commit;
mod filters;
mod frames;
mod guard;
mod prepare;
pub(crate) mod repair;
mod revert;

use std::cell::Cell;
use std::fs::File;
use std::time::Duration;

use ptrace_shim::{Process, SameCpu, Scheduling, StopOptions};

use crate::faults::{self, hit};
use crate::journal::{Entry, Journal, JournalError, Planned, Stage};
use crate::manifest::Manifest;
use crate::plan::PatchPlan;
use crate::refused::Refused;
use crate::report::{Disturbed, PatchReceipt, SiteProof};
use crate::snapshot::SnapshotError;

pub(crate) use filters::foresee as foresee_calls;
pub use revert::revert;

/// Bounds on the time that a patch or revert takes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For each stop: how long it may take until all threads have stopped.
    pub stop: Duration,
    /// How long to wait for a moment in which no thread is in a call that can
    /// see a stop.
    pub quiet: Duration,
    /// How long to try when a thread is in the middle of a window.
    pub commit: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            stop: Duration::from_millis(100),
            quiet: Duration::from_millis(20),
            commit: Duration::from_secs(2),
        }
    }
}

/// Why a plan was not carried out. The worker is as it was, but for memory
/// that nothing points at where that is said.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Found out only by touching.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Stopping, reading or writing failed.
    #[error(transparent)]
    Trace(#[from] ptrace_shim::Error),
    /// The worker could not be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The worker is not the one that was planned for.
    #[error("worker {pid} is gone (another process has its pid)")]
    Gone {
        /// The worker.
        pid: i32,
    },
    /// The worker has mapped something where the plan wanted to: plan again.
    #[error("worker {pid} has taken the planned addresses at {at:#x} meanwhile")]
    Occupied {
        /// The worker.
        pid: i32,
        /// The planned address.
        at: u64,
    },
    /// A system call of ours failed in the worker.
    #[error("worker {pid}: {call} failed: {errno}")]
    Call {
        /// The worker.
        pid: i32,
        /// The call.
        call: &'static str,
        /// The kernel's answer.
        errno: nix::errno::Errno,
    },
    /// A thread stayed in the middle of a window, or was too slow to stop.
    #[error("worker {pid}: no safe moment within {waited:?}: {reason}")]
    NoMoment {
        /// The worker.
        pid: i32,
        /// How long was tried.
        waited: Duration,
        /// What was in the way.
        reason: String,
    },
    /// What was written does not read back.
    #[error("worker {pid}: what was written at {at:#x} does not read back")]
    Unproven {
        /// The worker.
        pid: i32,
        /// Where.
        at: u64,
    },
}

impl ApplyError {
    /// The refusal that this comes to, if it is one: something of the worker's
    /// that would have to be otherwise. The worker is as it was.
    pub(crate) fn refusal(&self) -> Option<Refused> {
        use ptrace_shim::Error;
        Some(match self {
            ApplyError::Call {
                pid,
                call,
                errno: nix::errno::Errno::ENOMEM,
            } => Refused::NoMemory {
                pid: *pid,
                call: (*call).to_owned(),
            },
            ApplyError::Call { pid, call, errno } => Refused::CallDenied {
                pid: *pid,
                call: (*call).to_owned(),
                why: format!("it fails with {errno:?}"),
            },
            ApplyError::Trace(Error::CallTrapped { pid, nr }) => {
                let nr = libc::c_long::try_from(*nr).ok()?;
                filters::denied(pid.as_raw(), nr, "a filter sends SIGSYS")
            }
            ApplyError::Trace(Error::Timeout {
                pid, tid, state, ..
            }) => Refused::NotStopping {
                pid: pid.as_raw(),
                tid: tid.as_raw(),
                state: *state,
            },
            ApplyError::NoMoment {
                pid,
                waited,
                reason,
            } => Refused::NoMoment {
                pid: *pid,
                waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
                reason: reason.clone(),
            },
            _ => return None,
        })
    }
}

/// What carrying out a plan gave.
#[derive(Debug)]
pub struct Applied {
    /// What was done.
    pub receipt: PatchReceipt,
    /// The worker's control memory, if this patch made it.
    pub control: Option<File>,
}

impl From<JournalError> for ApplyError {
    fn from(error: JournalError) -> ApplyError {
        ApplyError::Refused(Refused::Journal { reason: error.0 })
    }
}

/// Carries out a plan, which was made where `before` was the worker's record.
///
/// # Errors
/// See [`ApplyError`].
pub fn apply(
    plan: &PatchPlan,
    before: Option<&Manifest>,
    limits: &Limits,
    journal: &dyn Journal,
) -> Result<Applied, ApplyError> {
    let applied = |receipt, control| Applied { receipt, control };
    if plan.already {
        return Ok(applied(receipt(plan, true), None));
    }
    let diary = Diary {
        plan,
        before,
        journal,
    };
    on_tracer_thread(|| {
        let process = open(plan.pid, plan.start_time)?;
        let mut stops = Vec::new();
        let mut disturbed = Vec::new();
        commit::expect_bytes(&process, plan)?;
        hit(faults::CHECKED);
        let undo = if plan.mappings().next().is_some() {
            diary.mapping()?;
            hit(faults::INTENT);
            let undo = prepare::prepare(&process, plan, limits, &mut stops, &mut disturbed)?;
            Some(undo)
        } else {
            if plan.guarded {
                // What the bridge will call was not looked at for that yet.
                prepare::foresee(&process, plan, limits, &mut stops, &mut disturbed)?;
            }
            None
        };
        if let Err(error) = diary.committing() {
            if let Some(undo) = &undo {
                // As far as anybody reads, it is still being mapped.
                diary.take_back(&process, undo, limits);
            }
            return Err(error.into());
        }
        hit(faults::COMMITTING);
        let touched = Cell::new(false);
        let committed = prepare::record(&process, plan)
            .and_then(|()| commit::commit(&process, plan, limits, &touched));
        let stop = match committed {
            Ok(stop) => stop,
            Err(failure) => {
                // Only while nothing can lead to the mapping.
                if let Some(undo) = &undo
                    && !touched.get()
                    && diary.may_take_back()
                {
                    diary.take_back(&process, undo, limits);
                }
                return Err(failure);
            }
        };
        let mut receipt = finish(plan, &process, &stop, stops, disturbed)?;
        receipt.journal = diary.settled(Some(&plan.manifest)).err().map(|e| e.0);
        hit(faults::SETTLED);
        Ok(applied(receipt, undo.and_then(|undo| undo.control)))
    })
}

/// Whether the windows still hold what the plan took them for. Touches nothing.
///
/// # Errors
/// [`Refused::ForeignBytes`] and the like.
pub fn check(plan: &PatchPlan) -> Result<(), ApplyError> {
    commit::expect_bytes(&open(plan.pid, plan.start_time)?, plan)
}

/// What is written down while a plan is carried out.
struct Diary<'a> {
    plan: &'a PatchPlan,
    before: Option<&'a Manifest>,
    journal: &'a dyn Journal,
}

impl Diary<'_> {
    fn write(&self, stage: Stage, record: Option<&Manifest>) -> Result<(), JournalError> {
        self.journal.write(&Entry {
            pid: self.plan.pid,
            start_time: self.plan.start_time,
            stage,
            record: record.cloned(),
        })
    }

    fn mapping(&self) -> Result<(), JournalError> {
        let callee = self.plan.callee.clone();
        let mappings = self.plan.mappings().map(Planned::from).collect();
        self.write(Stage::Mapping { callee, mappings }, self.before)
    }

    fn committing(&self) -> Result<(), JournalError> {
        let callee = self.plan.callee.clone();
        self.write(Stage::Committing { callee }, Some(&self.plan.manifest))
    }

    fn settled(&self, record: Option<&Manifest>) -> Result<(), JournalError> {
        self.write(Stage::Settled, record)
    }

    /// Whether it is written down that what was mapped will be unmapped. Else
    /// it stays, which is harmless, as the journal has its record.
    fn may_take_back(&self) -> bool {
        match self.mapping() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(pid = self.plan.pid, %error, "unused memory stays in the worker");
                false
            }
        }
    }

    fn take_back(&self, process: &Process, undo: &prepare::Undo, limits: &Limits) {
        hit(faults::TAKING_BACK);
        if prepare::take_back(process, self.plan, undo, limits)
            && let Err(error) = self.settled(self.before)
        {
            tracing::warn!(pid = self.plan.pid, %error, "the journal is behind");
        }
    }
}

fn receipt(plan: &PatchPlan, already: bool) -> PatchReceipt {
    PatchReceipt {
        pid: plan.pid,
        already,
        image_reused: plan.mapping.is_none(),
        through_routine: plan.has_routine().then_some(plan.through_routine.len()),
        effects: plan.effects.clone(),
        sites: Vec::new(),
        commit_stop_ns: 0,
        stops_ns: Vec::new(),
        disturbed: Vec::new(),
        journal: None,
    }
}

fn finish(
    plan: &PatchPlan,
    process: &Process,
    stop: &ptrace_shim::Stop,
    mut stops: Vec<u64>,
    mut disturbed: Vec<Disturbed>,
) -> Result<PatchReceipt, ApplyError> {
    let commit_stop_ns = nanoseconds(stop.duration);
    stops.push(commit_stop_ns);
    disturbed.extend(stop.disturbed.iter().map(disturbance));
    let sites = plan
        .windows
        .iter()
        .filter(|w| w.is_site())
        .map(|window| prove(process, window, &window.after))
        .collect::<Result<_, _>>()?;
    Ok(PatchReceipt {
        sites,
        commit_stop_ns,
        stops_ns: stops,
        disturbed,
        ..receipt(plan, false)
    })
}

/// Reads a window back.
fn prove(
    process: &Process,
    window: &crate::manifest::WindowRecord,
    expected: &[u8],
) -> Result<SiteProof, ApplyError> {
    let memory = ptrace_shim::Memory::open(process)?;
    let live = memory.read_vec(window.address.into(), window.before.len())?;
    if live != expected {
        return Err(ApplyError::Unproven {
            pid: process.pid().as_raw(),
            at: window.address,
        });
    }
    Ok(SiteProof {
        address: window.address,
        before: crate::elf::hex(if expected == window.after {
            &window.before
        } else {
            &window.after
        }),
        live: crate::elf::hex(&live),
    })
}

fn open(pid: i32, start_time: u64) -> Result<Process, ApplyError> {
    let process = Process::open(pid)?;
    if process.start_time() != start_time {
        return Err(ApplyError::Gone { pid });
    }
    Ok(process)
}

fn options(limits: &Limits) -> StopOptions {
    StopOptions {
        deadline: limits.stop,
        // A tracer on the CPU of the thread that it stops is switched to and
        // from without waking another one: a third of the time, also on a busy
        // node (some ten calls in 0.4 ms instead of 1 ms).
        scheduling: Scheduling {
            same_cpu: SameCpu::Always,
            ..Scheduling::default()
        },
        ..StopOptions::default()
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn disturbance(d: &ptrace_shim::Disturbed) -> Disturbed {
    Disturbed {
        tid: d.tid.as_raw(),
        syscall: ptrace_shim::syscall_name(d.nr).to_owned(),
    }
}

/// ptrace ties tracees to the OS thread that attached; see
/// [`ptrace_shim::tracer_thread`].
fn on_tracer_thread<T: Send>(
    work: impl FnOnce() -> Result<T, ApplyError> + Send,
) -> Result<T, ApplyError> {
    ptrace_shim::tracer_thread(|| Ok(work()))?
}
