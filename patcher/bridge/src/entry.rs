//! Where stubs arrive, in assembly: the RPC's six arguments must survive
//! untouched until it is decided that the callee runs here.
//!
//! The callee is called from here: between its frames and the caller's there
//! is none of Rust's, which may not be unwound ([`crate::unwind`]).
//!
//! On entry `r11` is the site record, `[rsp]` the call's original target and
//! `[rsp+8]` the address that the call returns to; everything else is as the
//! caller's code left it for the RPC.

use core::arch::naked_asm;
use core::cell::Cell;
use core::mem::offset_of;

use crate::abi::Graft;

/// What [`ng_enter`] saves; the order is the stack's.
#[derive(Debug)]
#[repr(C)]
pub struct Frame {
    /// Address of the [`crate::abi::Site`]; once the callee runs, of its
    /// [`crate::abi::Graft`].
    pub record: Cell<u64>,
    /// `rdi`: the caller's context.
    pub context: Cell<u64>,
    /// `rsi`: the callee's name.
    pub name: u64,
    /// `rdx`: input.
    pub input: u64,
    /// `rcx`: input length.
    pub input_len: u64,
    /// `r8`: where the output's address goes.
    pub output: u64,
    /// `r9`: where the output's length goes.
    pub output_len: u64,
    /// `rax`, kept for the RPC's sake.
    pub rax: u64,
    /// `r10`, kept for the RPC's sake.
    pub r10: u64,
    /// The call's original target; where the RPC goes.
    pub target: Cell<u64>,
    /// The caller's frame pointer, where who walks along them looks for it:
    /// right below the return address.
    pub rbp: u64,
    /// The address that the call returns to.
    pub return_address: u64,
}

/// Builds a [`Frame`] where `[rsp]` is what goes into its `target` and `[rsp+8]` the
/// return address: the two change places with `rbp`, so that this lies where who
/// walks along frame pointers looks for it. `rsp` is 0 (mod 16) then.
macro_rules! save {
    () => {
        concat!(
            "push rbp\n",
            ".cfi_adjust_cfa_offset 8\n",
            ".cfi_rel_offset rbp, 0\n",
            "mov rbp, [rsp + 8]\n",
            "pop qword ptr [rsp]\n",
            ".cfi_adjust_cfa_offset -8\n",
            ".cfi_rel_offset rbp, 0\n",
            "push rbp\n",
            ".cfi_adjust_cfa_offset 8\n",
            "lea rbp, [rsp + 8]\n",
            ".cfi_def_cfa rbp, 16\n",
            "push r10\n",
            "push rax\n",
            "push r9\n",
            "push r8\n",
            "push rcx\n",
            "push rdx\n",
            "push rsi\n",
            "push rdi\n",
            "push r11\n",
        )
    };
}
pub(crate) use save;

/// Takes a [`Frame`] down whose `record` is popped already, with every register as
/// it was; `[rsp]` is the return address then.
macro_rules! restore {
    () => {
        concat!(
            "pop rdi\n",
            "pop rsi\n",
            "pop rdx\n",
            "pop rcx\n",
            "pop r8\n",
            "pop r9\n",
            "pop rax\n",
            "pop r10\n",
            "pop r11\n",
            "pop rbp\n",
            ".cfi_def_cfa rsp, 8\n",
            ".cfi_restore rbp\n",
        )
    };
}
pub(crate) use restore;

/// An entry with this function to decide. The frame is whole where the callee
/// is called, so that all entries share their landing pads.
macro_rules! entry {
    ($prepare:path) => {
        naked_asm!(
            ".cfi_startproc",
            ".cfi_personality 0x1b, {personality}", // pcrel, sdata4
            ".cfi_adjust_cfa_offset 8", // the target, pushed by the stub
            "endbr64",
            crate::entry::save!(),
            "mov rdi, rsp",
            "call {prepare}",
            "test rax, rax",
            "jz 2f",
            "mov rdi, [rax + {handle}]",
            "mov rsi, rdx",
            "mov rdx, [rsp + {input_len}]",
            "call [rax + {call}]",
            "mov rdi, rsp",
            "mov esi, eax",
            "call {finish}",
            "mov rsp, rbp",
            "pop rbp",
            ".cfi_remember_state",
            ".cfi_def_cfa rsp, 8",
            ".cfi_restore rbp",
            "ret",
            "2:",
            ".cfi_restore_state",
            "pop r11",
            crate::entry::restore!(),
            "jmp r11",
            ".cfi_endproc",
            personality = sym crate::unwind::enter_personality,
            prepare = sym $prepare,
            finish = sym crate::call::finish,
            handle = const offset_of!(Graft, handle),
            call = const offset_of!(Graft, call),
            input_len = const offset_of!(Frame, input_len),
        )
    };
}

/// See the module.
///
/// # Safety
/// Entered by a stub alone, never called from Rust.
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_enter() {
    entry!(crate::call::prepare);
}

/// The same for a call that a fused callee makes: `r11` is its graft, `[rsp]`
/// room for the target.
///
/// # Safety
/// Entered by [`crate::call::ng_invoke`] alone.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn ng_nested() {
    entry!(crate::call::prepare_nested);
}

/// Where an exception ends that the callee let out: in [`ng_enter`]'s frame,
/// with its frame pointer and the stack pointer at its [`Frame`].
///
/// # Safety
/// Entered by the unwinder alone.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn landing_caught() {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_def_cfa rbp, 16",
        ".cfi_offset rbp, -16",
        "endbr64",
        "mov rdi, rsp",
        "mov rsi, rax",
        "call {caught}",
        "mov rsp, rbp",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
        caught = sym crate::call::caught,
    );
}

/// Where forced unwinding comes through.
///
/// # Safety
/// As for [`landing_caught`].
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn landing_forced() {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_def_cfa rbp, 16",
        ".cfi_offset rbp, -16",
        "endbr64",
        "mov rdi, rsp",
        "push rax",
        "push rax",
        "call {abandoned}",
        "call {resume}",
        "pop rdi",
        "pop rdi",
        "call rax",
        "ud2", // it does not come back
        ".cfi_endproc",
        abandoned = sym crate::call::abandoned,
        resume = sym crate::unwind::resume,
    );
}
