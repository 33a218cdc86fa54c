//! A thread's general registers, and what they say about an interrupted
//! system call.
//!
//! A thread that was stopped *in* a system call stands behind its `syscall`
//! instruction: `orig_rax` is the call's number, `rax` what it returned. One of
//! the codes -512 to -516 there never reaches user code: the kernel, when it
//! lets the thread go, turns it into a restart (or EINTR, if a handler runs).
//! It does that only at the stop at which the thread was taken, so whoever
//! gives registers back elsewhere must do the restart himself.

use crate::Address;
use serde::{Deserialize, Serialize};

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// The length of `syscall` (0f 05), and of `int 0x80` (cd 80).
const SYSCALL_LENGTH: u64 = 2;

/// The general registers, in the order of the kernel's `user_regs_struct`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the registers' names are the processor's")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// The number of the system call that the thread is in; all ones in user
    /// code.
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

const _: () = assert!(size_of::<Registers>() == size_of::<libc::user_regs_struct>());

/// Where a stopped thread was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Interrupted {
    /// In user code.
    UserCode,
    /// In system call `nr`, which the kernel will start again unseen.
    Restarting {
        /// The call's number.
        nr: u64,
    },
    /// In system call `nr`, which the kernel will go on with from what it
    /// keeps in its restart block (`nanosleep`, `poll` with a timeout, ...).
    RestartingFromBlock {
        /// The call's number.
        nr: u64,
    },
    /// At the end of system call `nr`.
    Returning {
        /// The call's number.
        nr: u64,
        /// What it returned: a value, or -errno.
        result: i64,
    },
}

impl Registers {
    /// RIP.
    #[must_use]
    pub fn instruction_pointer(&self) -> Address {
        Address(self.rip)
    }

    /// RSP.
    #[must_use]
    pub fn stack_pointer(&self) -> Address {
        Address(self.rsp)
    }

    /// Where the thread was stopped.
    #[must_use]
    pub fn interrupted(&self) -> Interrupted {
        let nr = self.orig_rax;
        let result = self.rax.cast_signed();
        if nr.cast_signed() < 0 {
            return Interrupted::UserCode;
        }
        match result {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Interrupted::Restarting { nr },
            ERESTART_RESTARTBLOCK => Interrupted::RestartingFromBlock { nr },
            _ => Interrupted::Returning { nr, result },
        }
    }

    /// The same state with a pending restart done by hand, for where the
    /// kernel will not do it; `None` if only the kernel can.
    ///
    /// `restart_syscall` itself can't be started again: what it would go on
    /// from is lost when a signal frame is returned from.
    #[must_use]
    pub fn restarted_by_hand(&self) -> Option<Registers> {
        match self.interrupted() {
            Interrupted::UserCode | Interrupted::Returning { .. } => Some(Registers {
                orig_rax: u64::MAX,
                ..*self
            }),
            Interrupted::Restarting { nr } if nr != libc::SYS_restart_syscall as u64 => {
                Some(Registers {
                    rip: self.rip.wrapping_sub(SYSCALL_LENGTH),
                    rax: nr,
                    orig_rax: u64::MAX,
                    ..*self
                })
            }
            Interrupted::Restarting { .. } | Interrupted::RestartingFromBlock { .. } => None,
        }
    }

    /// Whether the thread runs 64-bit code.
    #[must_use]
    pub fn is_64_bit(&self) -> bool {
        const USER_CS: u64 = 0x33;
        self.cs == USER_CS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_call(nr: u64, rax: i64) -> Registers {
        Registers {
            rip: 0x1002,
            rax: rax.cast_unsigned(),
            orig_rax: nr,
            ..Registers::default()
        }
    }

    #[test]
    fn a_restart_by_hand_goes_back_to_the_call() {
        for code in [-512, -513, -514] {
            let read = in_call(0, code);
            assert_eq!(read.interrupted(), Interrupted::Restarting { nr: 0 });
            let again = read.restarted_by_hand().unwrap();
            assert_eq!(
                (again.rip, again.rax, again.orig_rax),
                (0x1000, 0, u64::MAX)
            );
        }
    }

    #[test]
    fn a_finished_call_stays_finished() {
        for result in [0, 7, -4, -11] {
            let read = in_call(0, result);
            assert_eq!(read.interrupted(), Interrupted::Returning { nr: 0, result });
            let same = read.restarted_by_hand().unwrap();
            assert_eq!((same.rip, same.rax), (read.rip, read.rax));
        }
    }

    #[test]
    fn what_the_kernel_keeps_is_not_restarted_by_hand() {
        assert_eq!(in_call(35, -516).restarted_by_hand(), None);
        let nr = libc::SYS_restart_syscall as u64;
        assert_eq!(in_call(nr, -512).restarted_by_hand(), None);
    }

    #[test]
    fn user_code_may_hold_any_rax() {
        let user = in_call(u64::MAX, -512);
        assert_eq!(user.interrupted(), Interrupted::UserCode);
        assert_eq!(user.restarted_by_hand(), Some(user));
    }
}
