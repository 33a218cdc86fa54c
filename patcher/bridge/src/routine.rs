//! The entry of the worker's own `invoke_func`: the way of all calls whose site
//! is not rewritten.
//!
//! ```text
//!  any call ─► invoke_func: jmp stub ─► push r11; r11 = Routine ─► ng_routine
//!                  ▲                                                  │ by name
//!                  └── displaced code (`resume`) ◄── RPC ─────────────┴─► callee
//! ```
//!
//! On entry `[rsp]` is the `r11` that the call came with, `[rsp+8]` its return
//! address, `r11` the [`Routine`](crate::abi::Routine); everything else is as the caller left it,
//! and is so again at `resume`, `r10`, `r11` and `rax` included.
//!
//! What has been decided already does not come by again: rewritten sites and
//! nested calls that take the RPC go to `resume` themselves ([`rpc`]).

use core::arch::naked_asm;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use crate::abi::{Control, Graft, SEEN, SEEN_REGISTERS, Worker};
use crate::entry::Frame;
use crate::observe;

/// What [`ng_routine`] saves. In `frame`, `target` is the `r11` that the call
/// came with and `record` the [`Routine`](crate::abi::Routine); once it is decided
/// that the RPC is taken, where that begins.
#[derive(Debug)]
#[repr(C)]
pub struct RoutineFrame {
    /// `r15`, `r14`, `r13`, `r12`, `rbx`.
    pub kept: [u64; 5],
    /// Padding.
    pub pad: u64,
    /// The rest.
    pub frame: Frame,
}

/// Bytes from the lowest slot of a [`Frame`] up to the return address.
const TO_RETURN_ADDRESS: usize = offset_of!(Frame, return_address) - offset_of!(Frame, record);
// The address to go on at is read from below the stack pointer, where signal
// handlers leave 128 bytes alone.
const _: () = assert!(TO_RETURN_ADDRESS <= 120);

/// See the module.
///
/// # Safety
/// Entered by the stub at the routine's entry alone, never called from Rust.
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_routine() {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_personality 0x1b, {personality}", // pcrel, sdata4
        ".cfi_adjust_cfa_offset 8", // r11, pushed by the stub
        "endbr64",
        crate::entry::save!(),
        "sub rsp, 8",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15", // rsp = 0 (mod 16), and a whole RoutineFrame
        "mov rdi, rsp",
        "call {prepare}",
        "add rsp, {kept}", // as in ng_enter from here on
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
        // The record's slot has the address to go on at.
        "lea rsp, [rsp + 8]",
        crate::entry::restore!(),
        "jmp qword ptr [rsp - {slot}]",
        ".cfi_endproc",
        personality = sym crate::unwind::enter_personality,
        prepare = sym crate::call::prepare_routine,
        finish = sym crate::call::finish,
        handle = const offset_of!(Graft, handle),
        call = const offset_of!(Graft, call),
        input_len = const offset_of!(Frame, input_len),
        kept = const offset_of!(RoutineFrame, frame),
        slot = const TO_RETURN_ADDRESS,
    );
}

/// Where an RPC begins that must not come by the routine's entry (again).
#[must_use]
pub fn rpc(worker: &Worker) -> u64 {
    match observe::is_on(worker) {
        true => observe::ng_observed as *const () as u64,
        false => original(worker),
    }
}

/// The worker's own routine, without the window at its entry.
pub(crate) fn original(worker: &Worker) -> u64 {
    match worker.resume.load(Relaxed) {
        0 => worker.invoke,
        resume => resume,
    }
}

/// Counts a call of a known callee by its return address, so that its site can
/// be found. One thread writes; a table without room leaves the call out.
///
/// # Safety
/// The worker's structures are the patcher's, `graft` is one of its grafts.
pub(crate) unsafe fn note(worker: &Worker, frame: &RoutineFrame, graft: u64) {
    // SAFETY: the control area outlives every stub.
    let control = unsafe { &*(worker.control as *const Control) };
    let address = frame.frame.return_address;
    let first = (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize;
    for step in 0..PROBES {
        let seen = &control.seen[(first + step) % SEEN];
        let there = seen.address.load(Relaxed);
        if there == 0 {
            let registers = registers(frame);
            for (to, from) in seen.registers.iter().zip(registers) {
                to.store(from, Relaxed);
            }
            seen.address
                .store(address, core::sync::atomic::Ordering::Release);
        } else if there != address {
            continue;
        }
        // SAFETY: the name led to it.
        let index = unsafe { (*(graft as *const Graft)).index };
        seen.count
            .store(seen.count.load(Relaxed).wrapping_add(1), Relaxed);
        seen.grafts
            .store(seen.grafts.load(Relaxed) | 1_u64 << (index % 64), Relaxed);
        return;
    }
}

/// Entries of [`Control::seen`] that are tried for an address.
const PROBES: usize = 8;

/// The general registers as the call left them, by their number in the
/// encoding; `rsp` as it was before the call.
fn registers(frame: &RoutineFrame) -> [u64; SEEN_REGISTERS] {
    let [r15, r14, r13, r12, rbx] = frame.kept;
    let f = &frame.frame;
    let rsp = core::ptr::from_ref(&f.return_address) as u64 + 8;
    [
        f.rax,
        f.input_len,
        f.input,
        rbx,
        rsp,
        f.rbp,
        f.name,
        f.context.get(),
        f.output,
        f.output_len,
        f.r10,
        f.target.get(),
        r12,
        r13,
        r14,
        r15,
    ]
}
