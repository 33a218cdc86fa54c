//! `ptrace(2)`, one function per request.
//!
//! All of them act on a thread that the *calling OS thread* traces; any other
//! thread is `ESRCH`, and so is one that is not stopped (all but `seize` and
//! `interrupt`) or has died.

use super::step;
use crate::faults::{self, Around};
use crate::seccomp::Instruction;
use crate::{Registers, Tid};
use nix::errno::Errno;
use std::mem::{MaybeUninit, size_of};
use std::ptr::{null_mut, without_provenance_mut};

const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;
const NT_X86_SHSTK: usize = 0x204;

const PTRACE_GETREGSET: libc::c_uint = 0x4204;
const PTRACE_SETREGSET: libc::c_uint = 0x4205;
const PTRACE_PEEKSIGINFO: libc::c_uint = 0x4209;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;

/// What a thread is seized with.
///
/// - TRACESYSGOOD: else a system-call stop that nobody waits for any more
///   becomes a real SIGTRAP when the tracer dies.
/// - TRACEEXEC: else a thread that execs before it stops would be taken for
///   the one that was asked for, in a program that is another.
/// - TRACEEXIT: a thread that exits or is killed is let go of before it is
///   dead, so that nobody is left to be buried by us. (Without, the end of a
///   leader that others outlive would not even be reported.) It waits for us
///   at that point: no longer than the stop lasts.
///
/// EXITKILL never.
const OPTIONS: libc::c_int =
    libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_TRACEEXIT;

/// A request whose address and data are numbers or pointers that the caller
/// vouches for.
///
/// # Safety
/// `address` and `data` must be what `request` wants: in particular a pointer
/// that the kernel reads or writes through must be valid for that.
unsafe fn request(
    request: libc::c_uint,
    tid: Tid,
    address: *mut libc::c_void,
    data: *mut libc::c_void,
) -> Result<libc::c_long, Errno> {
    step();
    let points = around(request);
    faults::hit(points.before);
    // SAFETY: passed on to our caller.
    let result = Errno::result(unsafe { libc::ptrace(request, tid.as_raw(), address, data) });
    faults::hit(points.after);
    result
}

/// The fault points of a request.
const fn around(request: libc::c_uint) -> Around {
    match request {
        libc::PTRACE_SEIZE => faults::SEIZE,
        libc::PTRACE_INTERRUPT => faults::INTERRUPT,
        libc::PTRACE_CONT => faults::CONT,
        libc::PTRACE_SYSCALL => faults::SYSCALL,
        libc::PTRACE_DETACH => faults::DETACH,
        PTRACE_SETREGSET => faults::SET_REGISTERS,
        PTRACE_GETSIGMASK => faults::GET_MASK,
        PTRACE_SETSIGMASK => faults::SET_MASK,
        PTRACE_GET_RSEQ_CONFIGURATION => faults::RSEQ,
        libc::PTRACE_POKEDATA => faults::POKE,
        libc::PTRACE_GETEVENTMSG => faults::EVENT,
        libc::PTRACE_GETSIGINFO => faults::SIGNAL,
        PTRACE_PEEKSIGINFO => faults::PENDING,
        _ => faults::GET_REGISTERS,
    }
}

/// A request that takes no address, and a number as its data.
fn plain(code: libc::c_uint, tid: Tid, data: i32) -> Result<(), Errno> {
    let data = without_provenance_mut(usize::try_from(data).unwrap_or(0));
    // SAFETY: only called with requests whose data is a number (a signal or
    // options), never dereferenced.
    unsafe { request(code, tid, null_mut(), data) }.map(drop)
}

/// Attaches without stopping.
pub(crate) fn seize(tid: Tid) -> Result<(), Errno> {
    plain(libc::PTRACE_SEIZE, tid, OPTIONS)
}

/// Asks a seized thread to stop; in a stopped one, to stop again once resumed.
pub(crate) fn interrupt(tid: Tid) -> Result<(), Errno> {
    plain(libc::PTRACE_INTERRUPT, tid, 0)
}

/// Resumes, delivering `signal` (0 for none) if this is a signal-delivery-stop.
pub(crate) fn resume(tid: Tid, signal: i32) -> Result<(), Errno> {
    plain(libc::PTRACE_CONT, tid, signal)
}

/// Resumes until the next entry to or exit from a system call.
pub(crate) fn resume_to_syscall(tid: Tid, signal: i32) -> Result<(), Errno> {
    plain(libc::PTRACE_SYSCALL, tid, signal)
}

/// Lets go of a stopped thread, which runs on, or stays in its group-stop.
pub(crate) fn detach(tid: Tid) -> Result<(), Errno> {
    plain(libc::PTRACE_DETACH, tid, 0)
}

/// Reads the general registers.
pub(crate) fn registers(tid: Tid) -> Result<Registers, Errno> {
    let mut registers = Registers::default();
    let mut vector = libc::iovec {
        iov_base: (&raw mut registers).cast(),
        iov_len: size_of::<Registers>(),
    };
    // SAFETY: the vector describes exactly `registers`, which is plain data of
    // the kernel's layout (asserted where it is defined) and outlives the call.
    unsafe {
        request(
            PTRACE_GETREGSET,
            tid,
            without_provenance_mut(NT_PRSTATUS),
            (&raw mut vector).cast(),
        )
    }?;
    // A 32-bit thread fills in its own, shorter layout.
    if vector.iov_len == size_of::<Registers>() {
        Ok(registers)
    } else {
        Err(Errno::ENOEXEC)
    }
}

/// Writes the general registers.
pub(crate) fn set_registers(tid: Tid, registers: &Registers) -> Result<(), Errno> {
    let mut registers = *registers;
    let mut vector = libc::iovec {
        iov_base: (&raw mut registers).cast(),
        iov_len: size_of::<Registers>(),
    };
    // SAFETY: as for `registers`; the kernel only reads.
    unsafe {
        request(
            PTRACE_SETREGSET,
            tid,
            without_provenance_mut(NT_PRSTATUS),
            (&raw mut vector).cast(),
        )
    }
    .map(drop)
}

/// Reads the extended state, in the layout of XSAVE's standard format, into
/// `buffer`; returns how many bytes that were.
pub(crate) fn extended_state(tid: Tid, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the vector describes exactly `buffer`.
    unsafe {
        request(
            PTRACE_GETREGSET,
            tid,
            without_provenance_mut(NT_X86_XSTATE),
            (&raw mut vector).cast(),
        )
    }?;
    Ok(vector.iov_len)
}

/// Length of what FXSAVE writes, in bytes.
pub(crate) const FXSAVE_LENGTH: usize = 512;

/// Reads the extended state of a thread on a processor without XSAVE.
pub(crate) fn fxsave_state(tid: Tid) -> Result<[u8; FXSAVE_LENGTH], Errno> {
    #[repr(C, align(16))]
    struct Image([u8; FXSAVE_LENGTH]);
    const { assert!(size_of::<libc::user_fpregs_struct>() == FXSAVE_LENGTH) };
    let mut image = Image([0; FXSAVE_LENGTH]);
    // SAFETY: data points to as much as a user_fpregs_struct.
    unsafe {
        request(
            libc::PTRACE_GETFPREGS,
            tid,
            null_mut(),
            (&raw mut image).cast(),
        )
    }?;
    Ok(image.0)
}

/// Whether the thread has an active shadow stack.
pub(crate) fn has_shadow_stack(tid: Tid) -> bool {
    let mut pointer = 0u64;
    let mut vector = libc::iovec {
        iov_base: (&raw mut pointer).cast(),
        iov_len: size_of::<u64>(),
    };
    // SAFETY: the vector describes exactly `pointer`. Without a shadow stack
    // (or in a kernel without them) this fails with ENODEV or EINVAL.
    unsafe {
        request(
            PTRACE_GETREGSET,
            tid,
            without_provenance_mut(NT_X86_SHSTK),
            (&raw mut vector).cast(),
        )
    }
    .is_ok()
}

/// The signal mask that user code has (bit n - 1 for signal n), even where the
/// kernel has put in another for the duration of a call such as `ppoll`.
pub(crate) fn signal_mask(tid: Tid) -> Result<u64, Errno> {
    let mut mask = 0u64;
    // SAFETY: address is the size of the kernel's mask, data points to as much.
    unsafe {
        request(
            PTRACE_GETSIGMASK,
            tid,
            without_provenance_mut(size_of::<u64>()),
            (&raw mut mask).cast(),
        )
    }?;
    Ok(mask)
}

/// Sets the signal mask; what was pending and is now allowed is delivered when
/// the thread resumes.
pub(crate) fn set_signal_mask(tid: Tid, mut mask: u64) -> Result<(), Errno> {
    // SAFETY: as for `signal_mask`; the kernel only reads.
    unsafe {
        request(
            PTRACE_SETSIGMASK,
            tid,
            without_provenance_mut(size_of::<u64>()),
            (&raw mut mask).cast(),
        )
    }
    .map(drop)
}

/// Where a thread's `struct rseq` lies; `None` if it has not registered one,
/// or the kernel (before 5.13) can't tell.
pub(crate) fn rseq_address(tid: Tid) -> Result<Option<u64>, Errno> {
    /// `struct ptrace_rseq_configuration`
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        address: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut configuration = Configuration::default();
    // SAFETY: address is the size of the structure that data points to.
    let result = unsafe {
        request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            tid,
            without_provenance_mut(size_of::<Configuration>()),
            (&raw mut configuration).cast(),
        )
    };
    match result {
        Ok(_) => Ok((configuration.address != 0).then_some(configuration.address)),
        Err(Errno::EIO | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Reads one of the thread's seccomp filters, counted from the one that was
/// added last. EACCES: we may not (see [`crate::seccomp`]).
pub(crate) fn seccomp_filter(tid: Tid, index: u32) -> Result<Vec<Instruction>, Errno> {
    /// `BPF_MAXINSNS`: no filter is longer.
    const LONGEST: usize = 4096;
    let mut program = vec![Instruction::default(); LONGEST];
    // SAFETY: address is a number, and data has room for the longest filter;
    // its instructions have the layout of `sock_filter`. (To ask for the length
    // first would not do: a thread that runs may add filters to all of them.)
    let length = unsafe {
        request(
            PTRACE_SECCOMP_GET_FILTER,
            tid,
            without_provenance_mut(index as usize),
            program.as_mut_ptr().cast(),
        )
    }?;
    program.truncate(usize::try_from(length).unwrap_or(0));
    Ok(program)
}

/// Where calls are *not* dispatched to user code, as start and length, if the
/// thread has syscall user dispatch on. `None` also where the kernel (before
/// 6.4) can't tell.
pub(crate) fn user_dispatch(tid: Tid) -> Result<Option<(u64, u64)>, Errno> {
    /// `struct ptrace_sud_config`
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        mode: u64,
        selector: u64,
        offset: u64,
        length: u64,
    }
    let mut configuration = Configuration::default();
    // SAFETY: address is the size of the structure that data points to.
    let result = unsafe {
        request(
            PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
            tid,
            without_provenance_mut(size_of::<Configuration>()),
            (&raw mut configuration).cast(),
        )
    };
    match result {
        Ok(_) => {
            Ok((configuration.mode != 0).then_some((configuration.offset, configuration.length)))
        }
        Err(Errno::EIO | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Reads the word at `address`, which need not be aligned.
pub(crate) fn peek(tid: Tid, address: u64) -> Result<u64, Errno> {
    // The C library's wrapper returns the word as its result: only errno tells
    // a word of all ones from a failure.
    Errno::clear();
    step();
    faults::hit(faults::PEEK.before);
    // SAFETY: the address is one in the traced process, not in ours.
    let word = unsafe {
        libc::ptrace(
            libc::PTRACE_PEEKDATA,
            tid.as_raw(),
            without_provenance_mut::<libc::c_void>(address as usize),
            null_mut::<libc::c_void>(),
        )
    };
    let last = Errno::last();
    faults::hit(faults::PEEK.after);
    match last {
        errno if word == -1 && errno != Errno::from_raw(0) => Err(errno),
        _ => Ok(word.cast_unsigned()),
    }
}

/// Writes the word at `address`, which need not be aligned, whatever its page's protection.
pub(crate) fn poke(tid: Tid, address: u64, word: u64) -> Result<(), Errno> {
    // SAFETY: the address is one in the traced process, and data is the word.
    unsafe {
        request(
            libc::PTRACE_POKEDATA,
            tid,
            without_provenance_mut(address as usize),
            without_provenance_mut(word as usize),
        )
    }
    .map(drop)
}

/// What an event-stop says; at the exit of a thread, its status as of `wait`.
pub(crate) fn event_message(tid: Tid) -> Result<u64, Errno> {
    let mut message = 0u64;
    // SAFETY: data points to a word.
    unsafe {
        request(
            libc::PTRACE_GETEVENTMSG,
            tid,
            null_mut(),
            (&raw mut message).cast(),
        )
    }?;
    Ok(message)
}

/// What is known of a signal: its number, and `si_code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signal {
    pub(crate) number: i32,
    pub(crate) code: i32,
}

/// The signal of a signal-delivery-stop.
pub(crate) fn signal(tid: Tid) -> Result<Signal, Errno> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: data points to a siginfo_t.
    unsafe {
        request(
            libc::PTRACE_GETSIGINFO,
            tid,
            null_mut(),
            info.as_mut_ptr().cast(),
        )
    }?;
    // SAFETY: zeroed is a valid value of this plain structure.
    let info = unsafe { info.assume_init() };
    Ok(Signal {
        number: info.si_signo,
        code: info.si_code,
    })
}

/// The signals pending for this thread alone, at most 32.
pub(crate) fn pending(tid: Tid) -> Result<Vec<Signal>, Errno> {
    const MOST: usize = 32;
    /// `struct ptrace_peeksiginfo_args`
    #[repr(C)]
    struct Arguments {
        offset: u64,
        flags: u32,
        count: i32,
    }
    let mut arguments = Arguments {
        offset: 0,
        flags: 0,
        count: MOST as i32,
    };
    let mut infos = [const { MaybeUninit::<libc::siginfo_t>::zeroed() }; MOST];
    // SAFETY: address points to the arguments, data to `count` structures.
    let count = unsafe {
        request(
            PTRACE_PEEKSIGINFO,
            tid,
            (&raw mut arguments).cast(),
            infos.as_mut_ptr().cast(),
        )
    }?;
    Ok(infos
        .iter()
        .take(usize::try_from(count).unwrap_or(0))
        .map(|info| {
            // SAFETY: zeroed is a valid value, and the kernel filled it in.
            let info = unsafe { info.assume_init_ref() };
            Signal {
                number: info.si_signo,
                code: info.si_code,
            }
        })
        .collect())
}
