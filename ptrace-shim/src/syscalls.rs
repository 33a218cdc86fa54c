//! Which system calls let user code see that its thread was stopped.
//!
//! A stop interrupts a blocking call. Most are started again by the kernel and
//! nobody knows. The others:
//! - return EINTR: `epoll_wait`, `sigtimedwait`, `semop`, `io_getevents`, and
//!   socket calls with a timeout (signal(7), "Interruption of system calls and
//!   library functions by stop signals");
//! - return early with what they have done so far: a large `write` or `send`.
//!
//! Before a stop, the number of the call tells what *may* happen
//! ([`crate::where_threads_are`]); at the stop, the registers tell what did.

use crate::registers::Interrupted;
use crate::{Address, Memory, Registers, Tid, syscall_name};
use serde::{Deserialize, Serialize};

/// A thread whose system call ended early by a stop, in a way that user code
/// sees (or that it ended so by itself at that moment: that can't be told).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disturbed {
    /// The thread.
    pub tid: Tid,
    /// The call's number.
    pub nr: u64,
    /// The call's name.
    pub name: String,
    /// What its caller sees.
    pub sees: Sees,
}

/// What user code sees of a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sees {
    /// The call returns EINTR.
    Eintr,
    /// The call returns that it transferred `done` bytes, fewer than asked for.
    Short {
        /// Bytes transferred.
        done: u64,
    },
}

/// What the caller of the system call that `registers` stand behind will see.
pub(crate) fn disturbance(tid: Tid, registers: &Registers, memory: &Memory) -> Option<Disturbed> {
    let Interrupted::Returning { nr, result } = registers.interrupted() else {
        return None;
    };
    let sees = if result == -i64::from(libc::EINTR) {
        Sees::Eintr
    } else {
        let done = u64::try_from(result).ok().filter(|&done| done > 0)?;
        (done < asked_for(nr, registers, memory)?).then_some(Sees::Short { done })?
    };
    Some(Disturbed {
        tid,
        nr,
        name: syscall_name(nr).to_owned(),
        sees,
    })
}

/// How many bytes a call was asked to transfer, if it blocks until all are.
fn asked_for(nr: u64, registers: &Registers, memory: &Memory) -> Option<u64> {
    let wait_all = |flags: u64| flags & libc::MSG_WAITALL as u64 != 0;
    match nr.cast_signed() {
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_sendto => Some(registers.rdx),
        libc::SYS_recvfrom => wait_all(registers.r10).then_some(registers.rdx),
        libc::SYS_sendfile => Some(registers.r10),
        libc::SYS_splice | libc::SYS_copy_file_range => Some(registers.r8),
        libc::SYS_writev | libc::SYS_pwritev | libc::SYS_pwritev2 | libc::SYS_vmsplice => {
            total(memory, Address(registers.rsi), registers.rdx)
        }
        libc::SYS_sendmsg => message_total(memory, Address(registers.rsi)),
        libc::SYS_recvmsg if wait_all(registers.rdx) => {
            message_total(memory, Address(registers.rsi))
        }
        _ => None,
    }
}

/// The bytes that a `struct msghdr` describes.
fn message_total(memory: &Memory, message: Address) -> Option<u64> {
    // msg_name (8), msg_namelen (8 with padding), msg_iov (8), msg_iovlen (8)
    let vectors = memory.read_u64(message.checked_add(16)?).ok()?;
    let count = memory.read_u64(message.checked_add(24)?).ok()?;
    total(memory, Address(vectors), count)
}

/// The bytes that `count` of `struct iovec` describe.
fn total(memory: &Memory, vectors: Address, count: u64) -> Option<u64> {
    const MOST: u64 = 1024;
    let length = usize::try_from(count.min(MOST) * 16).ok()?;
    let bytes = memory.read_vec(vectors, length).ok()?;
    let lengths = bytes.chunks_exact(16).filter_map(|vector| {
        vector[8..]
            .first_chunk()
            .map(|length| u64::from_le_bytes(*length))
    });
    Some(lengths.fold(0, u64::saturating_add))
}

/// How a call may answer to a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It restarts unseen, or does not block.
    Unseen,
    /// It may return EINTR or early.
    MaySee,
    /// It may if its descriptor (its first argument) is a socket with a
    /// timeout, or of a kind that does not restart.
    DependsOnFile,
}

/// Not in libc for this target.
const SYS_IO_PGETEVENTS: libc::c_long = 333;

/// How a blocking call of this number may answer to a stop.
pub(crate) fn answer(nr: u64) -> Answer {
    match nr.cast_signed() {
        libc::SYS_epoll_wait
        | libc::SYS_epoll_wait_old
        | libc::SYS_epoll_pwait
        | libc::SYS_epoll_pwait2
        | libc::SYS_rt_sigtimedwait
        | libc::SYS_semop
        | libc::SYS_semtimedop
        | libc::SYS_msgrcv
        | libc::SYS_msgsnd
        | libc::SYS_io_getevents
        | SYS_IO_PGETEVENTS
        | libc::SYS_io_uring_enter
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_recvmmsg
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg
        | libc::SYS_accept
        | libc::SYS_accept4
        | libc::SYS_connect
        | libc::SYS_write
        | libc::SYS_writev
        | libc::SYS_pwrite64
        | libc::SYS_pwritev
        | libc::SYS_pwritev2
        | libc::SYS_sendfile
        | libc::SYS_splice
        | libc::SYS_vmsplice
        | libc::SYS_copy_file_range
        | libc::SYS_fallocate
        | libc::SYS_getrandom => Answer::MaySee,
        libc::SYS_read | libc::SYS_readv => Answer::DependsOnFile,
        _ => Answer::Unseen,
    }
}
