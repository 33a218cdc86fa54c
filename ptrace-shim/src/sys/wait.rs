//! `waitid(2)` for one thread that we trace.
//!
//! A stop is looked at, never consumed (`WNOWAIT`): the kernel forgets the
//! signal of a signal-delivery-stop once it was waited for, and a tracer that
//! dies between the wait and the resume would take the signal with it.

use super::step;
use crate::{Tid, faults};
use nix::errno::Errno;
use std::mem::MaybeUninit;

/// The kernel's name for it: a stop that is no signal's.
const PTRACE_EVENT_STOP: i32 = 128;

/// What a traced thread has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Stopped since we asked for it, or since a group-stop began or ended.
    Trap,
    /// In a group-stop (SIGSTOP and the like).
    GroupStop,
    /// About to receive this signal.
    Signal(i32),
    /// At the entry to or exit from a system call.
    Syscall,
    /// It has executed another program.
    Exec,
    /// It is about to exit.
    Exit,
    /// It has exited or was killed, and awaits its burial.
    Dead,
    /// Not a thread that we trace (any more).
    NotOurs,
}

/// Whether to wait for something to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until something happens or a signal of ours comes.
    Block,
    /// Not at all.
    Poll,
}

/// What `tid` has come to; `None` if nothing yet.
pub(crate) fn look(tid: Tid, patience: Patience) -> Result<Option<Event>, Errno> {
    step();
    let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT;
    match waitid(tid, flags, patience) {
        Ok(None) | Err(Errno::EINTR) => Ok(None),
        Ok(Some((code, status))) => Ok(Some(event(code, status))),
        Err(Errno::ECHILD) => Ok(Some(Event::NotOurs)),
        Err(errno) => Err(errno),
    }
}

/// Consumes the present stop of `tid`: its signal, if it has one, is ours now.
pub(crate) fn consume_stop(tid: Tid) -> Result<(), Errno> {
    waitid(tid, libc::WSTOPPED, Patience::Poll).map(drop)
}

/// Reaps `tid` if it is dead; true if it was or is no longer ours.
pub(crate) fn bury(tid: Tid) -> bool {
    match waitid(tid, libc::WEXITED, Patience::Poll) {
        Ok(found) => found.is_some(),
        Err(errno) => errno == Errno::ECHILD,
    }
}

fn waitid(tid: Tid, flags: i32, patience: Patience) -> Result<Option<(i32, i32)>, Errno> {
    let flags = flags
        | libc::__WALL
        | match patience {
            Patience::Block => 0,
            Patience::Poll => libc::WNOHANG,
        };
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    faults::hit(faults::WAIT.before);
    // SAFETY: the pointer is to a siginfo_t of ours.
    let result = Errno::result(unsafe {
        libc::waitid(
            libc::P_PID,
            tid.as_raw().cast_unsigned(),
            info.as_mut_ptr(),
            flags,
        )
    });
    faults::hit(faults::WAIT.after);
    result?;
    // SAFETY: zeroed is a valid value of this plain structure; where the
    // kernel reported something, si_status is the field it filled in.
    let (found, code, status) = unsafe {
        let info = info.assume_init();
        (info.si_pid() != 0, info.si_code, info.si_status())
    };
    Ok(found.then_some((code, status)))
}

/// A stop's status is its signal, and in the byte above it the event.
fn event(code: i32, status: i32) -> Event {
    if !matches!(code, libc::CLD_TRAPPED | libc::CLD_STOPPED) {
        return Event::Dead;
    }
    match (status >> 8, status & 0xff) {
        (PTRACE_EVENT_STOP, libc::SIGTRAP) => Event::Trap,
        (PTRACE_EVENT_STOP, _) => Event::GroupStop,
        (libc::PTRACE_EVENT_EXEC, _) => Event::Exec,
        (libc::PTRACE_EVENT_EXIT, _) => Event::Exit,
        (_, signal) if signal == libc::SIGTRAP | 0x80 => Event::Syscall,
        (_, signal) => Event::Signal(signal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_told_by_signal_and_event() {
        let trapped = |status| event(libc::CLD_TRAPPED, status);
        assert_eq!(trapped(libc::SIGTRAP | 128 << 8), Event::Trap);
        assert_eq!(trapped(libc::SIGSTOP | 128 << 8), Event::GroupStop);
        assert_eq!(trapped(libc::SIGSTOP), Event::Signal(libc::SIGSTOP));
        assert_eq!(trapped(libc::SIGTRAP), Event::Signal(libc::SIGTRAP));
        assert_eq!(trapped(libc::SIGTRAP | 0x80), Event::Syscall);
        assert_eq!(trapped(libc::SIGTRAP | 4 << 8), Event::Exec);
        assert_eq!(trapped(libc::SIGTRAP | 6 << 8), Event::Exit);
        assert_eq!(event(libc::CLD_KILLED, libc::SIGKILL), Event::Dead);
    }
}
