//! One seized thread: from running to stopped and back.
//!
//! ```text
//!   seize ──> Seized ──interrupt──> (on its way) ──settle──> stopped ──release──> free
//!                                        │                      │
//!                                        └── gone: it exited or was killed, and is buried
//! ```
//!
//! *Stopped* is always one kind of stop, a `PTRACE_EVENT_STOP` (of a trap or
//! of a group-stop): there the kernel has delivered what it was about to
//! deliver, an interrupted call's restart is still ahead of it, and detaching
//! leaves the rest to it. A thread that comes with a signal instead is sent on
//! with that signal and a new request to stop, which it meets before it runs an
//! instruction.
//!
//! A thread that dies stops once more, at its exit, and is let go of there. If
//! another thread executes a program, everyone else dies, and that thread goes
//! on under the leader's id, still ours: the *heir*, which has to be let go of
//! as well.
//!
//! A running tracee can't be detached from. One that does not stop in time (an
//! uninterruptible wait) is *left over*: in a [`crate::tracer_thread`] the
//! kernel detaches it cleanly when that OS thread ends; elsewhere we wait for
//! it some seconds more.

use crate::error::{Error, Result};
use crate::process::Process;
use crate::sys::ptrace;
use crate::sys::wait::{self, Event, Patience};
use crate::{Pid, Tid};
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// How long a thread that did not stop in time is waited for, where the end of
/// the OS thread will not free it.
const GRACE: Duration = Duration::from_secs(5);

/// When to give up, and what the limit was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    pub(crate) limit: Duration,
}

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Deadline {
        let now = Instant::now();
        Deadline {
            at: now
                .checked_add(limit)
                .unwrap_or(now + Duration::from_secs(86_400)),
            limit,
        }
    }

    pub(crate) fn has_passed(&self) -> bool {
        Instant::now() >= self.at
    }

    /// The error for a thread that did not get there in time.
    pub(crate) fn overrun(&self, process: &Process, tid: Tid, operation: &'static str) -> Error {
        Error::Timeout {
            pid: process.pid(),
            tid,
            state: process.state(tid),
            operation,
            limit: self.limit,
        }
    }
}

/// What became of a thread that was asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It is stopped.
    Stopped,
    /// It has exited, or is no longer ours.
    Gone,
}

/// What became of the attempt to seize a thread.
#[derive(Debug)]
pub(crate) enum Seizure {
    /// It is seized.
    Done(Tracee),
    /// It is gone.
    Gone,
    /// The process is executing a program, which may be waiting for threads
    /// that we have seized to be let go of at their exit. Try again.
    Busy,
}

/// A thread that this OS thread has seized. Must be released; does nothing by
/// itself when dropped.
#[derive(Debug)]
pub(crate) struct Tracee {
    pub(crate) tid: Tid,
    stopped: bool,
}

impl Tracee {
    /// Seizes a thread without stopping it.
    pub(crate) fn seize(process: &Process, tid: Tid) -> Result<Seizure> {
        const ATTEMPTS: u32 = 10;
        const PAUSE: Duration = Duration::from_micros(200);
        let mut refused = None;
        for _ in 0..ATTEMPTS {
            match ptrace::seize(tid) {
                Ok(()) => {
                    // Another with the number of one that was left.
                    crate::tracer_thread::take_back(tid);
                    let tracee = Tracee::of(tid);
                    // The number may have become another process's thread.
                    if process.stat(tid).is_err() {
                        tracee.release(process);
                        return Ok(Seizure::Gone);
                    }
                    return Ok(Seizure::Done(tracee));
                }
                Err(Errno::ESRCH) => return Ok(Seizure::Gone),
                // Skipped by a tick.
                Err(Errno::ENOSYS) => return Ok(Seizure::Busy),
                Err(Errno::EPERM) => match refusal(process, tid) {
                    None => return Ok(Seizure::Gone),
                    // One that did not stop in time before, and may have since;
                    // or the heir. One that is held is not taken twice.
                    Some(Error::TracedByAnother { tracer, .. })
                        if is_us(tracer)
                            && (crate::tracer_thread::take_back(tid)
                                || !Tracee::of(tid).stands_still()) =>
                    {
                        return Ok(Seizure::Done(Tracee::of(tid)));
                    }
                    // The dead get EPERM as well, and while a process executes
                    // a program its leader may be a dead one in one moment and
                    // the heir in the next.
                    Some(error @ Error::NotPermitted { .. }) => {
                        refused = Some(error);
                        std::thread::sleep(PAUSE);
                    }
                    Some(error) => return Err(error),
                },
                Err(cause) => return Err(failed(process, tid, "seizing", cause)),
            }
        }
        refused.map_or(Ok(Seizure::Gone), Err)
    }

    fn of(tid: Tid) -> Tracee {
        Tracee {
            tid,
            stopped: false,
        }
    }

    /// Asks it to stop.
    pub(crate) fn interrupt(&self) {
        // Fails only if it is gone, which the wait will tell.
        let _ = ptrace::interrupt(self.tid);
    }

    /// Waits until it is stopped, passing on what it is stopped for meanwhile.
    pub(crate) fn settle(
        &mut self,
        process: &Process,
        deadline: Deadline,
        operation: &'static str,
    ) -> Result<Settled> {
        self.stopped = false;
        loop {
            match self.wait(process, deadline, operation)? {
                Event::Trap | Event::GroupStop => {
                    self.stopped = true;
                    return Ok(Settled::Stopped);
                }
                Event::Signal(signal) => {
                    self.interrupt();
                    self.go_on(ptrace::resume(self.tid, signal));
                }
                Event::Syscall => {
                    self.interrupt();
                    self.go_on(ptrace::resume(self.tid, 0));
                }
                Event::Exec => {
                    self.stopped = true;
                    // One that was not consumed can't be detached from, if it
                    // is the heir's (`looks_like_a_spurious_pid`).
                    let _ = wait::consume_stop(self.tid);
                    return Err(Error::Executed {
                        pid: process.pid(),
                        operation,
                    });
                }
                Event::Exit => {
                    // On its way out: nobody's to hold up.
                    self.stopped = true;
                    return Ok(Settled::Gone);
                }
                Event::Dead => return Ok(Settled::Gone),
                // Nobody but us reaps it, so it has become the heir.
                Event::NotOurs if self.tid != process.pid().leader() => {
                    return Err(Error::Executed {
                        pid: process.pid(),
                        operation,
                    });
                }
                Event::NotOurs => return Ok(Settled::Gone),
            }
        }
    }

    /// Waits for whatever it comes to next.
    pub(crate) fn wait(
        &self,
        process: &Process,
        deadline: Deadline,
        operation: &'static str,
    ) -> Result<Event> {
        loop {
            match wait::look(self.tid, Patience::Block) {
                Ok(Some(event)) => return Ok(event),
                // A tick, or another signal of the agent's.
                Ok(None) => {}
                Err(cause) => return Err(failed(process, self.tid, operation, cause)),
            }
            // A leader that others outlive, or that waits for traced threads'
            // burial, is never reported dead.
            let state = process.state(self.tid);
            if matches!(state, 'Z' | 'X' | 'x') {
                return Ok(wait::look(self.tid, Patience::Poll)
                    .ok()
                    .flatten()
                    .unwrap_or(Event::Dead));
            }
            if deadline.has_passed() {
                return Err(deadline.overrun(process, self.tid, operation));
            }
        }
    }

    /// What it has come to by now, without waiting.
    pub(crate) fn now(&self) -> Option<Event> {
        wait::look(self.tid, Patience::Poll).ok().flatten()
    }

    /// Whether it is in a stop that it stays in until we resume it.
    pub(crate) fn stands_still(&self) -> bool {
        matches!(
            self.now(),
            Some(Event::Trap | Event::GroupStop | Event::Syscall)
        )
    }

    /// Whether it is stopped at its exit.
    pub(crate) fn is_at_exit(&self) -> bool {
        self.now() == Some(Event::Exit)
    }

    /// Notes that it runs again, from a request that can only fail because it
    /// was killed.
    fn go_on(&mut self, _resumed: Result<(), Errno>) {
        self.stopped = false;
    }

    /// Marks it as running, for those who resume it by themselves.
    pub(crate) fn runs(&mut self) {
        self.stopped = false;
    }

    /// Marks it as stopped, for those who wait for it by themselves.
    pub(crate) fn stands(&mut self) {
        self.stopped = true;
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Lets go of it, if that takes no wait; else it is handed back.
    pub(crate) fn detach(self) -> Result<(), Tracee> {
        ptrace::detach(self.tid).map_err(|_| self)
    }

    /// Lets go of it, whatever it is doing: stopped threads run on (or stay in
    /// their group-stop), running ones are stopped first, dead ones buried.
    /// Returns false if it is dead or dying.
    pub(crate) fn release(mut self, process: &Process) -> bool {
        let dying = self.stopped && self.is_at_exit();
        if self.stopped && ptrace::detach(self.tid).is_ok() {
            return !dying;
        }
        // Stopped, but not any more: it was killed, and will soon be at its
        // exit. Else it may be anywhere.
        let limit = if self.stopped || !crate::tracer_thread::is_current() {
            GRACE
        } else {
            Duration::ZERO
        };
        self.interrupt();
        // A failed exec-check is no matter here: it is let go of in any case.
        match self.settle(process, Deadline::after(limit), "letting go") {
            Ok(Settled::Stopped) | Err(Error::Executed { .. }) => {
                if ptrace::detach(self.tid).is_ok() {
                    return true;
                }
                bury(process, self.tid);
                false
            }
            Ok(Settled::Gone) => {
                if !(self.stopped && ptrace::detach(self.tid).is_ok()) {
                    bury(process, self.tid);
                }
                false
            }
            Err(_) if self.now() == Some(Event::NotOurs) => false,
            Err(error) => {
                if crate::tracer_thread::is_current() {
                    crate::tracer_thread::leave(self.tid);
                    tracing::warn!(tid = %self.tid, %error, "left over to the end of this OS thread");
                } else {
                    tracing::error!(tid = %self.tid, %error, "stays traced until this OS thread ends");
                }
                true
            }
        }
    }
}

/// Lets go of a thread that goes on under the leader's id, having executed a
/// program, if it is ours. For when all others have been let go of.
pub(crate) fn release_heir(process: &Process) {
    // A wait can't tell: the leader may be a child of ours anyway.
    if matches!(process.tracer_of(), Ok(Some((tracer, _))) if is_us(tracer)) {
        Tracee::of(process.pid().leader()).release(process);
    }
}

/// Whether a tracer is the calling OS thread.
fn is_us(tracer: Pid) -> bool {
    nix::unistd::gettid().as_raw() == tracer.as_raw()
}

/// Reaps a dead thread, so that its own parent hears of it.
///
/// A dead child of ours that leads its process is left to whoever started it:
/// our reaping would take its exit status away.
pub(crate) fn bury(process: &Process, tid: Tid) {
    const PATIENCE: Duration = Duration::from_secs(1);
    const STEP: Duration = Duration::from_micros(50);
    let us = Pid::from_raw(std::process::id().cast_signed());
    let deadline = Deadline::after(PATIENCE);
    loop {
        let stat = process.stat(tid).ok();
        let leader = tid == process.pid().leader();
        if leader && stat.is_some_and(|stat| stat.parent == us) {
            return;
        }
        if wait::bury(tid) {
            return;
        }
        if deadline.has_passed() {
            // A leader that pthread_exit()s in the instant between our SEIZE
            // and our INTERRUPT; or a death that takes its time.
            tracing::warn!(%tid, "a dead thread stays traced until this OS thread ends");
            return;
        }
        std::thread::sleep(STEP);
    }
}

/// Tells why a thread could not be seized; `None` if it is a dead one.
fn refusal(process: &Process, tid: Tid) -> Option<Error> {
    let pid = process.pid();
    match process.tracer_of_thread(tid) {
        Ok(Some((tracer, comm))) => {
            return Some(Error::TracedByAnother {
                pid,
                tid,
                tracer,
                comm,
            });
        }
        Ok(None) if !matches!(process.state(tid), 'Z' | 'X' | 'x') => {}
        _ => return None,
    }
    Some(Error::NotPermitted {
        pid,
        tid,
        yama_scope: yama_scope(),
    })
}

/// `kernel.yama.ptrace_scope`, if it restricts anything: 1 to descendants, 2 to
/// CAP_SYS_PTRACE, and with 3 nobody may trace or write to another process.
#[must_use]
pub fn yama_scope() -> Option<u8> {
    let text = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?;
    text.trim().parse().ok().filter(|&scope| scope > 0)
}

/// An unexpected failure of a request, or the thread's end.
pub(crate) fn failed(process: &Process, tid: Tid, operation: &'static str, cause: Errno) -> Error {
    let pid = process.pid();
    if cause != Errno::ESRCH {
        return Error::Request {
            operation,
            pid,
            tid,
            cause,
        };
    }
    gone(process, tid, operation)
}

/// The error for a thread that is no more.
pub(crate) fn gone(process: &Process, tid: Tid, operation: &'static str) -> Error {
    let pid = process.pid();
    // A process that was killed takes a moment to be seen as dead. A thread
    // that a signal kills does not die alone.
    let killed = || {
        const SIGNAL: u64 = 0x7f;
        let tracee = Tracee::of(tid);
        tracee.is_at_exit() && ptrace::event_message(tid).is_ok_and(|status| status & SIGNAL != 0)
    };
    let dead_leader = || tid == pid.leader() && matches!(process.state(tid), 'Z' | 'X' | 'x');
    if !process.is_alive() || dead_leader() || killed() {
        return Error::ProcessDied { pid, operation };
    }
    Error::ThreadGone {
        pid,
        tid,
        operation,
    }
}
