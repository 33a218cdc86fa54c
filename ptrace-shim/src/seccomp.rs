//! What the seccomp filters of a thread answer to a call, before it is made.
//!
//! A filter that kills cannot be tried. With the rights to read it, it is run
//! here, as the kernel would: a program of the classic Berkeley packet filter,
//! which sees the call's number, its arguments and nothing that they point to.
//! Several filters all run, and the sternest answer holds.
//!
//! Reading takes CAP_SYS_ADMIN and a reader that has no filter itself. Without,
//! only how many there are is known ([`SeccompState`]).

use std::fmt;

use nix::errno::Errno;

use crate::error::Result;
use crate::process::Process;
use crate::stop_thread::StoppedThread;
use crate::sys::ptrace;
use crate::{Address, Tid};

/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;
/// More filters than a thread can have: all of them together are limited to
/// 32,768 instructions.
const MOST: u32 = 32_768;

/// Of `/proc/PID/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeccompState {
    /// 0: none; 1: strict, only `read`, `write`, `_exit` and `rt_sigreturn` do
    /// not kill; 2: filters.
    pub mode: u32,
    /// How many filters; `None` before Linux 5.9.
    pub filters: Option<u32>,
}

impl Process {
    /// What is known of the leader's seccomp filters without stopping it.
    ///
    /// # Errors
    /// [`crate::Error::NoSuchProcess`] if it is gone.
    pub fn seccomp(&self) -> Result<SeccompState> {
        let status = self.read_text("status")?;
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse().ok()
        };
        Ok(SeccompState {
            mode: number("Seccomp:").unwrap_or(0),
            filters: number("Seccomp_filters:"),
        })
    }

    /// Its parent, by the number that it has here; 0 where there is none.
    ///
    /// # Errors
    /// [`crate::Error::NoSuchProcess`] if it is gone.
    pub fn parent(&self) -> Result<crate::Pid> {
        Ok(self.stat(self.pid().leader())?.parent)
    }
}

impl StoppedThread {
    /// Reads its seccomp filters; `None` if we have not the rights to.
    ///
    /// # Errors
    /// [`crate::Error::ThreadGone`] or [`crate::Error::ProcessDied`] if it was
    /// killed meanwhile.
    pub fn seccomp_filters(&self) -> Result<Option<SeccompFilters>> {
        match read(self.tid()) {
            Ok(filters) => Ok(Some(filters)),
            // In this order: not permitted, a kernel that cannot, and a filter
            // that is not a program of the classic kind.
            Err(Errno::EACCES | Errno::EPERM | Errno::EIO | Errno::EMEDIUMTYPE) => Ok(None),
            Err(cause) => Err(self.failed("reading seccomp filters", cause)),
        }
    }

    /// Whether its calls from `address` may be turned into a SIGSYS by syscall
    /// user dispatch. (A kernel before 6.4 cannot tell, which is no.)
    ///
    /// # Errors
    /// As for [`StoppedThread::seccomp_filters`].
    pub fn is_dispatched(&self, address: Address) -> Result<bool> {
        let dispatch = ptrace::user_dispatch(self.tid())
            .map_err(|cause| self.failed("asking for syscall user dispatch", cause))?;
        // The `syscall` is over when the kernel compares.
        Ok(dispatch.is_some_and(|(start, length)| (address.0 + 2).wrapping_sub(start) >= length))
    }
}

fn read(tid: Tid) -> Result<SeccompFilters, Errno> {
    let mut programs = Vec::new();
    for index in 0..MOST {
        match ptrace::seccomp_filter(tid, index) {
            Ok(program) => programs.push(program),
            // No (more) filters; EINVAL where the thread has none at all.
            Err(Errno::ENOENT | Errno::EINVAL) => break,
            Err(cause) => return Err(cause),
        }
    }
    Ok(SeccompFilters { programs })
}

/// An instruction of a filter (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) if_true: u8,
    pub(crate) if_false: u8,
    pub(crate) k: u32,
}

/// The filters of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeccompFilters {
    pub(crate) programs: Vec<Vec<Instruction>>,
}

/// What filters answer to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeccompAnswer {
    /// The thread or its process is killed.
    Kill,
    /// The thread gets a SIGSYS.
    Trap,
    /// The call is not made and fails.
    Fail(Errno),
    /// A supervisor is asked, and may take any time.
    Notify,
    /// A tracer is asked; without one the call fails with ENOSYS.
    Trace,
    /// The call is made.
    Allow,
}

impl fmt::Display for SeccompAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill => f.write_str("kills"),
            Self::Trap => f.write_str("sends SIGSYS"),
            Self::Fail(errno) => write!(f, "fails with {errno:?}"),
            Self::Notify => f.write_str("asks a supervisor"),
            Self::Trace => f.write_str("asks a tracer"),
            Self::Allow => f.write_str("allows it"),
        }
    }
}

impl SeccompFilters {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.programs.len()
    }

    /// The answer to a call made at `instruction`, the address behind the
    /// `syscall`. A program that is not understood is taken to kill.
    #[must_use]
    pub fn answer(&self, nr: libc::c_long, arguments: [u64; 6], instruction: u64) -> SeccompAnswer {
        let mut data = [0_u32; 16];
        data[0] = nr as u32;
        data[1] = ARCHITECTURE;
        let words = [instruction].into_iter().chain(arguments);
        for (pair, word) in data[2..].chunks_exact_mut(2).zip(words) {
            pair[0] = word as u32;
            pair[1] = (word >> 32) as u32;
        }
        // The sternest has the least value, as a signed number.
        const ACTION: u32 = 0xffff_0000;
        let least = self
            .programs
            .iter()
            .map(|program| run(program, &data).unwrap_or(KILL_PROCESS))
            .min_by_key(|value| (value & ACTION).cast_signed());
        match least {
            None => SeccompAnswer::Allow,
            Some(value) => answer(value),
        }
    }
}

const KILL_PROCESS: u32 = 0x8000_0000;

/// `SECCOMP_RET_…`; what the kernel does not know kills.
fn answer(value: u32) -> SeccompAnswer {
    match value >> 16 {
        0x0003 => SeccompAnswer::Trap,
        0x0005 => SeccompAnswer::Fail(Errno::from_raw((value & 0xffff) as i32)),
        0x7fc0 => SeccompAnswer::Notify,
        0x7ff0 => SeccompAnswer::Trace,
        // Logged, or not.
        0x7ffc | 0x7fff => SeccompAnswer::Allow,
        _ => SeccompAnswer::Kill,
    }
}

/// Runs a program on the call's data; `None` where it does what the kernel
/// lets no filter do. Jumps only lead forward, so it ends.
fn run(program: &[Instruction], data: &[u32; 16]) -> Option<u32> {
    // The class of an instruction, and its parts (linux/bpf_common.h).
    const LD: u16 = 0x00;
    const LDX: u16 = 0x01;
    const ST: u16 = 0x02;
    const STX: u16 = 0x03;
    const ALU: u16 = 0x04;
    const JMP: u16 = 0x05;
    const RET: u16 = 0x06;
    const MISC: u16 = 0x07;
    const LENGTH: u32 = 64;
    let (mut a, mut x, mut memory, mut at) = (0_u32, 0_u32, [0_u32; 16], 0_usize);
    loop {
        let Instruction {
            code,
            if_true,
            if_false,
            k,
        } = *program.get(at)?;
        at += 1;
        let operand = if code & 0x08 == 0 { k } else { x };
        match code & 0x07 {
            class @ (LD | LDX) => {
                let value = match code & 0xe0 {
                    0x00 => k,
                    0x20 if class == LD && k % 4 == 0 => *data.get(k as usize / 4)?,
                    0x60 => *memory.get(k as usize)?,
                    0x80 => LENGTH,
                    _ => return None,
                };
                if class == LD { a = value } else { x = value }
            }
            ST => *memory.get_mut(k as usize)? = a,
            STX => *memory.get_mut(k as usize)? = x,
            ALU => {
                a = match code & 0xf0 {
                    0x00 => a.wrapping_add(operand),
                    0x10 => a.wrapping_sub(operand),
                    0x20 => a.wrapping_mul(operand),
                    0x30 => a.checked_div(operand)?,
                    0x40 => a | operand,
                    0x50 => a & operand,
                    0x60 => a.checked_shl(operand).unwrap_or(0),
                    0x70 => a.checked_shr(operand).unwrap_or(0),
                    0x80 => a.wrapping_neg(),
                    0xa0 => a ^ operand,
                    _ => return None,
                };
            }
            JMP => {
                let holds = match code & 0xf0 {
                    0x00 => {
                        at = at.checked_add(k as usize)?;
                        continue;
                    }
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                at += usize::from(if holds { if_true } else { if_false });
            }
            RET => {
                return match code & 0x18 {
                    0x00 => Some(k),
                    0x10 => Some(a),
                    _ => None,
                };
            }
            MISC => match code & 0xf8 {
                0x00 => x = a,
                0x80 => a = x,
                _ => return None,
            },
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const SET: u16 = 0x45;
    const RETURN: u16 = 0x06;

    fn filters(programs: &[&[(u16, u8, u8, u32)]]) -> SeccompFilters {
        let program = |text: &&[(u16, u8, u8, u32)]| {
            text.iter()
                .map(|&(code, if_true, if_false, k)| Instruction {
                    code,
                    if_true,
                    if_false,
                    k,
                })
                .collect()
        };
        SeccompFilters {
            programs: programs.iter().map(program).collect(),
        }
    }

    /// Kills `mmap` of what is executable, fails `close`.
    const STERN: &[(u16, u8, u8, u32)] = &[
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, ARCHITECTURE),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),
        (EQUAL, 0, 3, libc::SYS_mmap as u32),
        (LOAD, 0, 0, 32), // the low half of the third argument
        (SET, 0, 3, libc::PROT_EXEC as u32),
        (RETURN, 0, 0, KILL_PROCESS),
        (EQUAL, 0, 1, libc::SYS_close as u32),
        (RETURN, 0, 0, 0x0005_0001),
        (RETURN, 0, 0, 0x7fff_0000),
    ];

    fn mmap(filters: &SeccompFilters, protection: i32) -> SeccompAnswer {
        filters.answer(libc::SYS_mmap, [0, 4096, protection as u64, 0, 0, 0], 0)
    }

    #[test]
    fn arguments_decide() {
        let filters = filters(&[STERN]);
        assert_eq!(mmap(&filters, libc::PROT_READ), SeccompAnswer::Allow);
        let executable = libc::PROT_READ | libc::PROT_EXEC;
        assert_eq!(mmap(&filters, executable), SeccompAnswer::Kill);
        assert_eq!(
            filters.answer(libc::SYS_close, [0; 6], 0),
            SeccompAnswer::Fail(Errno::EPERM)
        );
    }

    #[test]
    fn the_sternest_of_several_holds() {
        let lenient: &[_] = &[(RETURN, 0, 0, 0x7ffc_0000)];
        let trap: &[_] = &[(RETURN, 0, 0, 0x0003_0000)];
        let all = [
            (&[lenient][..], SeccompAnswer::Allow),
            (&[], SeccompAnswer::Allow),
            (&[lenient, trap], SeccompAnswer::Trap),
            (&[trap, STERN, lenient], SeccompAnswer::Kill),
        ];
        for (programs, expected) in all {
            let executable = libc::PROT_READ | libc::PROT_EXEC;
            assert_eq!(mmap(&filters(programs), executable), expected);
        }
    }

    #[test]
    fn what_is_not_understood_kills() {
        for bad in [
            &[][..],
            &[(LOAD, 0, 0, 3)],
            &[(LOAD, 0, 0, 64)],
            &[(EQUAL, 9, 9, 0)],
            &[(0x34, 0, 0, 0)], // a division by nothing
            &[(0xff, 0, 0, 0)],
            &[(RETURN, 0, 0, 0x1234_0000)],
        ] {
            assert_eq!(mmap(&filters(&[bad]), 0), SeccompAnswer::Kill, "{bad:?}");
        }
    }

    #[test]
    fn every_arithmetic_is_the_kernels() {
        // a = 6; x = a; a = ((a + x) * 3 - 1) | 0x40 ^ … ; return a
        let program: &[_] = &[
            (0x00, 0, 0, 6),    // ld 6
            (0x07, 0, 0, 0),    // tax
            (0x0c, 0, 0, 0),    // add x: 12
            (0x24, 0, 0, 3),    // mul 3: 36
            (0x14, 0, 0, 1),    // sub 1: 35
            (0x44, 0, 0, 0x40), // or: 0x63
            (0xa4, 0, 0, 0x01), // xor: 0x62
            (0x54, 0, 0, 0xf0), // and: 0x60
            (0x74, 0, 0, 4),    // rsh: 6
            (0x64, 0, 0, 1),    // lsh: 12
            (0x34, 0, 0, 4),    // div: 3
            (0x02, 0, 0, 15),   // st m[15]
            (0x61, 0, 0, 15),   // ldx m[15]
            (0x84, 0, 0, 0),    // neg
            (0x87, 0, 0, 0),    // txa: 3
            (0x64, 0, 0, 16),   // lsh: 0x30000
            (0x05, 0, 0, 1),    // ja +1
            (RETURN, 0, 0, 0),
            (0x16, 0, 0, 0), // ret a
        ];
        assert_eq!(mmap(&filters(&[program]), 0), SeccompAnswer::Trap);
    }
}
