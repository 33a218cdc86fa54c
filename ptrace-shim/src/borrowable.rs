//! Which threads can be borrowed: only those that would heal completely.
//!
//! | not borrowed | since |
//! |---|---|
//! | 32-bit code | the frame and the instructions are 64-bit ones |
//! | a call that goes on from a restart block | returning from a signal frame forgets it |
//! | an active shadow stack | our `ret` is not on it |
//! | inside an rseq critical section | it must be aborted, and would be resumed |
//! | not on the thread's own stack | an alternate or a coroutine's stack may end right below |
//! | too little stack | the frame takes some 4 KiB (with AMX in use 12) |

use crate::error::{NotBorrowable, Result};
use crate::frame::{self, Layout};
use crate::stop_thread::StoppedThread;
use crate::sys::ptrace;
use crate::{Address, Registers};

/// What must be left of the stack below the frame, for a signal handler's
/// frame should the thread have to heal itself.
const MARGIN: u64 = 4096;

/// Checks what can be checked before the stack is looked at; the registers to
/// heal to.
pub(crate) fn check(stopped: &StoppedThread) -> Result<Registers> {
    let registers = stopped.registers();
    let refuse = |reason| Err(stopped.not_borrowable(reason));
    if !registers.is_64_bit() {
        return refuse(NotBorrowable::Not64Bit);
    }
    let Some(healed) = registers.restarted_by_hand() else {
        let nr = registers.orig_rax;
        return refuse(NotBorrowable::RestartBlock { nr });
    };
    if ptrace::has_shadow_stack(stopped.tid()) {
        return refuse(NotBorrowable::ShadowStack);
    }
    if in_rseq_critical_section(stopped)? {
        return refuse(NotBorrowable::RseqCriticalSection);
    }
    Ok(healed)
}

/// Whether the thread is between start and commit of an rseq critical section.
fn in_rseq_critical_section(stopped: &StoppedThread) -> Result<bool> {
    /// Of `struct rseq`: where it names the critical section.
    const RSEQ_CS: u64 = 8;
    let rseq = ptrace::rseq_address(stopped.tid())
        .map_err(|cause| stopped.failed("asking for rseq", cause))?;
    let Some(rseq) = rseq else {
        return Ok(false);
    };
    let memory = stopped.memory();
    let section = memory.read_u64(Address(rseq.wrapping_add(RSEQ_CS)))?;
    if section == 0 {
        return Ok(false);
    }
    // struct rseq_cs: version, flags (4 each), start, length, abort (8 each)
    let mut descriptor = [0; 32];
    memory.read(Address(section), &mut descriptor)?;
    let word = |at: usize| {
        descriptor[at..]
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    Ok(stopped.registers().rip.wrapping_sub(word(8)) < word(16))
}

/// Finds a place for the frame in the thread's own stack.
pub(crate) fn find_room(stopped: &StoppedThread, fpstate: usize) -> Result<Layout> {
    let registers = stopped.registers();
    let stack_pointer = registers.stack_pointer();
    let refuse = |reason| Err(stopped.not_borrowable(reason));
    let area = match stack_pointer.checked_sub(1) {
        Some(top) => stopped.area_at(top)?,
        None => None,
    };
    let Some(area) = area.filter(|area| area.writable) else {
        return refuse(NotBorrowable::NoStack { stack_pointer });
    };
    let block = registers.fs_base;
    let own = area.main_stack || (stack_pointer.0..area.end).contains(&block);
    if !own {
        return refuse(NotBorrowable::ForeignStack { stack_pointer });
    }
    let layout = frame::lay_out(stack_pointer, fpstate);
    match layout {
        Some(layout) if layout.frame.0 >= area.start.saturating_add(MARGIN) => Ok(layout),
        _ => refuse(NotBorrowable::StackFull {
            room: stack_pointer.0 - area.start,
            needed: layout.map_or(u64::MAX, |layout| stack_pointer.0 - layout.frame.0 + MARGIN),
        }),
    }
}
