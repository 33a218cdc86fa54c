//! The frame that heals a borrowed thread: a signal frame as the kernel itself
//! would have written it, with the thread's whole state.
//!
//! ```text
//!   original rsp ───────────────────────────────────
//!                  red zone, 128 bytes: not touched
//!                  ─────────────────────────────────
//!                  scratch, 1024 bytes: strings and buffers for the calls
//!                  ───────────────────────────────── 64-byte aligned
//!                  second magic
//!                  XSAVE image
//!      fpstate ──> ───────────────────────────────── 64-byte aligned
//!                  siginfo (zero)
//!                  ucontext: registers, signal mask
//!                  pretcode: address of __restore_rt
//!   borrowed rsp ─────────────────────────────────── 8 below 16-byte aligned
//!                  free: signal handlers' frames would go here
//! ```
//!
//! The borrowed thread stands at a `syscall; ret` with this rsp. Left to
//! itself, it makes the call, returns to `__restore_rt`, and `rt_sigreturn`
//! puts back everything: registers, mask, extended state. All that it takes is
//! pure data in its own stack, in a place that is below everything it uses.
//!
//! Layouts: `arch/x86/include/asm/sigframe.h` (`struct rt_sigframe`),
//! `arch/x86/include/uapi/asm/sigcontext.h` (`struct sigcontext_64`),
//! `arch/x86/kernel/signal_64.c`. Pure functions of registers and bytes.

use crate::{Address, Registers, xstate};

/// Below rsp, what a leaf function may use without moving rsp.
const RED_ZONE: u64 = 128;
/// Length of the scratch area in bytes.
pub(crate) const SCRATCH: u64 = 1024;
/// XRSTOR wants its image aligned so.
const XSAVE_ALIGNMENT: u64 = 64;

// Offsets within struct rt_sigframe.
const UC_FLAGS: usize = 8;
const UC_STACK_FLAGS: usize = 32;
const MCONTEXT: usize = 48;
const SIGMASK: usize = 304;
/// pretcode (8), ucontext (304), siginfo (128)
const LENGTH: usize = 440;

// Offsets within struct sigcontext_64.
const SEGMENTS: usize = 144;
const FPSTATE: usize = 184;

/// There is an XSAVE image with a second magic.
const UC_FP_XSTATE: u64 = 1;
/// ss is saved, and to be restored as it is.
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;

/// No such flag: `sigaltstack` refuses it, which `rt_sigreturn` ignores, so
/// the alternate stack stays what it is.
const INVALID_STACK_FLAGS: u32 = 4;

/// Where the frame's parts are to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The frame, and the borrowed thread's rsp.
    pub(crate) frame: Address,
    /// The XSAVE image.
    pub(crate) fpstate: Address,
    /// The scratch area.
    pub(crate) scratch: Address,
}

/// Lays the frame out below the stack pointer; `None` if it would pass zero.
pub(crate) fn lay_out(stack_pointer: Address, fpstate_length: usize) -> Option<Layout> {
    let scratch = stack_pointer
        .checked_sub(RED_ZONE + SCRATCH)?
        .align_down(XSAVE_ALIGNMENT);
    let fpstate = scratch
        .checked_sub(fpstate_length as u64)?
        .align_down(XSAVE_ALIGNMENT);
    let frame = fpstate
        .checked_sub(LENGTH as u64)?
        .align_down(16)
        .checked_sub(8)?;
    Some(Layout {
        frame,
        fpstate,
        scratch,
    })
}

/// The bytes to write at `layout.frame`, up to the end of `fpstate`.
///
/// `registers` are those to return to (a restart already done by hand), `mask`
/// the signal mask, `fpstate` the XSAVE image with its magics (or FXSAVE's
/// area), `restorer` the
/// address of `__restore_rt`.
pub(crate) fn build(
    layout: &Layout,
    registers: &Registers,
    mask: u64,
    fpstate: &[u8],
    restorer: Address,
) -> Vec<u8> {
    let gap = (layout.fpstate.0 - layout.frame.0) as usize;
    let mut bytes = vec![0; gap];
    bytes.reserve_exact(fpstate.len());
    let mut put = |at: usize, word: u64| bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    put(0, restorer.0);
    let extended = if xstate::is_of_xsave(fpstate) {
        UC_FP_XSTATE
    } else {
        0
    };
    put(UC_FLAGS, extended | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS);
    put(UC_STACK_FLAGS, u64::from(INVALID_STACK_FLAGS));
    let Registers {
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rdi,
        rsi,
        rbp,
        rbx,
        rdx,
        rax,
        rcx,
        rsp,
        rip,
        eflags,
        cs,
        ss,
        ..
    } = *registers;
    let in_order = [
        r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags,
    ];
    for (index, register) in in_order.into_iter().enumerate() {
        put(MCONTEXT + 8 * index, register);
    }
    // cs, gs, fs, ss; of these gs and fs are not restored.
    put(MCONTEXT + SEGMENTS, cs & 0xffff | (ss & 0xffff) << 48);
    put(MCONTEXT + FPSTATE, layout.fpstate.0);
    put(SIGMASK, mask);
    bytes.extend_from_slice(fpstate);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn offsets_are_those_of_the_c_library() {
        // The C library's ucontext_t begins as the kernel's does.
        assert_eq!(UC_FLAGS, 8 + offset_of!(libc::ucontext_t, uc_flags));
        assert_eq!(
            UC_STACK_FLAGS,
            8 + offset_of!(libc::ucontext_t, uc_stack) + offset_of!(libc::stack_t, ss_flags)
        );
        assert_eq!(MCONTEXT, 8 + offset_of!(libc::ucontext_t, uc_mcontext));
        assert_eq!(SIGMASK, 8 + offset_of!(libc::ucontext_t, uc_sigmask));
        assert_eq!(FPSTATE, offset_of!(libc::mcontext_t, fpregs));
        assert_eq!(SEGMENTS, 8 * libc::REG_CSGSFS as usize);
        assert_eq!(8 * libc::REG_RIP as usize, 16 * 8);
        assert_eq!(LENGTH, SIGMASK + 8 + size_of::<libc::siginfo_t>());
    }

    #[test]
    fn nothing_overlaps_whatever_the_stack_pointer() {
        for offset in 0..256 {
            let sp = Address(0x7fff_0000_0000 + offset);
            let length = 2700;
            let layout = lay_out(sp, length).unwrap();
            assert!(layout.scratch.0 + SCRATCH + RED_ZONE <= sp.0);
            assert!(layout.fpstate.0 + length as u64 <= layout.scratch.0);
            assert!(layout.frame.0 + LENGTH as u64 <= layout.fpstate.0);
            assert_eq!(layout.fpstate.0 % 64, 0);
            assert_eq!(layout.frame.0 % 16, 8);
        }
        assert_eq!(lay_out(Address(1000), 2700), None);
    }

    #[test]
    fn registers_go_where_the_kernel_takes_them_from() {
        let registers = Registers {
            r8: 8,
            rcx: 0xc,
            rsp: 0x7fff_0000_0000,
            rip: 0x1234,
            eflags: 0x246,
            cs: 0x33,
            ss: 0x2b,
            ..Registers::default()
        };
        let layout = lay_out(Address(registers.rsp), 600).unwrap();
        let bytes = build(&layout, &registers, 0xab, &[1; 600], Address(0x4000));
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let register = |index: i32| word(MCONTEXT + 8 * index as usize);
        assert_eq!(word(0), 0x4000);
        assert_eq!(word(UC_FLAGS), 7);
        let old = build(&layout, &registers, 0, &[1; 512], Address(0x4000));
        assert_eq!(old[UC_FLAGS], 6, "no XSAVE, no image of it");
        assert_eq!(register(libc::REG_R8), 8);
        assert_eq!(register(libc::REG_RCX), 0xc);
        assert_eq!(register(libc::REG_RSP), 0x7fff_0000_0000);
        assert_eq!(register(libc::REG_RIP), 0x1234);
        assert_eq!(register(libc::REG_EFL), 0x246);
        assert_eq!(register(libc::REG_CSGSFS), 0x2b_0000_0000_0033);
        assert_eq!(word(MCONTEXT + FPSTATE), layout.fpstate.0);
        assert_eq!(word(SIGMASK), 0xab);
        assert_eq!(bytes.len() as u64, layout.fpstate.0 - layout.frame.0 + 600);
    }
}
