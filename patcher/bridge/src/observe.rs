//! Counting a worker's RPCs, and the calls of its own function, in place.
//!
//! ```text
//!  an RPC, however it got here ─► ng_observed ─► begin ─► invoke_func ─► end ─┐
//!  faas_func_call: jmp stub ─► flag? ─► ng_called ─► begin ─► function ─► end ─┴► back
//! ```
//!
//! Both run the original code as a call of their own, so that its result, its
//! output's length and its duration are known. Where nothing is to be counted
//! they go on to it by a jump, with nothing changed.
//!
//! The frame that lies on the stack meanwhile has unwind tables: exceptions and
//! cancellation pass. Such a call never returns to be counted as returned.

use core::arch::naked_asm;
use core::cell::Cell;
use core::ffi::c_int;
use core::mem::offset_of;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
    compiler_fence,
};

use crate::abi::{Control, Graft, Routine, Worker};
use crate::call::left_by_jump;
use crate::cells::{self, Series};
use crate::entry::Frame;
use crate::{imports, routine, sys, unwind};

/// Of how many RPCs, and calls of the worker's own function, one is timed. Which
/// is left to chance: a caller may make its calls in turns.
pub const SAMPLE_RPC_EVERY: u64 = 8;

/// What surrounds a call that is counted; the order is the stack's. In `frame`,
/// `target` is the `r11` that the call came with.
#[derive(Debug)]
#[repr(C)]
pub struct Around {
    /// Where the original code begins.
    pub resume: Cell<u64>,
    /// What counts the call: the [`cells::Cell`] of an RPC, else the [`Series`] of
    /// the function's own calls.
    pub cell: Cell<u64>,
    /// Time-stamp counter at its start, 0 if it is not timed.
    pub started: Cell<u64>,
    /// Not 0: an RPC of the worker's thread.
    pub at_home: Cell<u64>,
    /// The call.
    pub frame: Frame,
}

/// Bytes from the slot that the jump reads up to the return address.
const TO_RETURN_ADDRESS: usize = offset_of!(Frame, return_address) - offset_of!(Frame, record);
// It is read from below the stack pointer, where signal handlers leave 128
// bytes alone.
const _: () = assert!(TO_RETURN_ADDRESS <= 120);
const _: () = assert!(offset_of!(Around, frame) % 16 == 0);

/// Calls `begin` with the [`Around`] that it builds; where that gives not 0, the
/// original code, and `end` with the result.
macro_rules! around {
    ($begin:path, $end:path, $($head:literal),*) => {
        naked_asm!(
            ".cfi_startproc",
            $($head,)*
            crate::entry::save!(),
            "sub rsp, {frame}", // a whole Around
            "mov rdi, rsp",
            "call {begin}",
            "test rax, rax",
            "jz 2f",
            "mov rdi, [rsp + {frame} + {context}]",
            "mov rsi, [rsp + {frame} + {name}]",
            "mov rdx, [rsp + {frame} + {input}]",
            "mov rcx, [rsp + {frame} + {input_len}]",
            "mov r8, [rsp + {frame} + {output}]",
            "mov r9, [rsp + {frame} + {output_len}]",
            "mov rax, [rsp + {frame} + {rax}]",
            "mov r10, [rsp + {frame} + {r10}]",
            "mov r11, [rsp + {frame} + {target}]",
            "call [rsp + {resume}]",
            "mov [rsp + {frame} + {rax}], rax",
            "mov rdi, rsp",
            "mov esi, eax",
            "call {end}",
            "mov rax, [rsp + {frame} + {rax}]",
            "mov rsp, rbp",
            "pop rbp",
            ".cfi_remember_state",
            ".cfi_def_cfa rsp, 8",
            ".cfi_restore rbp",
            "ret",
            "2:",
            ".cfi_restore_state",
            // The record's slot takes the address to go on at.
            "mov r11, [rsp + {resume}]",
            "mov [rsp + {frame}], r11",
            "lea rsp, [rsp + {frame} + 8]",
            crate::entry::restore!(),
            "jmp qword ptr [rsp - {slot}]",
            ".cfi_endproc",
            begin = sym $begin,
            end = sym $end,
            frame = const offset_of!(Around, frame),
            resume = const offset_of!(Around, resume),
            context = const offset_of!(Frame, context),
            name = const offset_of!(Frame, name),
            input = const offset_of!(Frame, input),
            input_len = const offset_of!(Frame, input_len),
            output = const offset_of!(Frame, output),
            output_len = const offset_of!(Frame, output_len),
            rax = const offset_of!(Frame, rax),
            r10 = const offset_of!(Frame, r10),
            target = const offset_of!(Frame, target),
            slot = const TO_RETURN_ADDRESS,
        )
    };
}

/// Where RPCs go while they are counted, in place of the worker's own routine
/// and with its arguments.
///
/// # Safety
/// Called or jumped to as the routine would be.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn ng_observed() {
    around!(
        rpc_begins,
        rpc_ends,
        "endbr64",
        "push r11",
        ".cfi_adjust_cfa_offset 8"
    );
}

/// The entry of the caller's `faas_func_call`, where the stub found the flag set
/// ([`Worker::dirty`]): `[rsp]` is the `r11` that the call came with, `r11` the
/// [`Routine`] whose `resume` is the function's displaced code.
///
/// # Safety
/// Entered by the stub at the function's entry alone, never called from Rust.
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_called() {
    around!(
        call_begins,
        call_ends,
        ".cfi_adjust_cfa_offset 8", // r11, pushed by the stub
        "endbr64"
    );
}

/// Whether RPCs are counted now.
#[inline(always)]
pub(crate) fn is_on(worker: &Worker) -> bool {
    control(worker).observing.load(Relaxed) != 0
}

fn control(worker: &Worker) -> &Control {
    // SAFETY: the control area outlives every stub.
    unsafe { &*(worker.control as *const Control) }
}

unsafe extern "C" fn rpc_begins(around: *const Around) -> u64 {
    // SAFETY: called by `ng_observed` alone, in the worker that the patcher
    // named; the name is the RPC's.
    unsafe {
        let (around, worker) = (&*around, imports::worker());
        around.resume.set(routine::original(worker));
        if !is_on(worker) {
            return 0;
        }
        let frame = &around.frame;
        let at_home = sys::thread_pointer() == worker.thread;
        let caller = match at_home {
            true => worker.active.get(),
            false => 0,
        };
        let cells = &control(worker).cells;
        // A frame that nobody knows must not lie on the stack.
        let cell = match unwind::register_own(worker) {
            true => cells.find(caller, frame.name, frame.return_address),
            false => None,
        };
        let Some(cell) = cell else {
            cells.unattributed.fetch_add(1, Relaxed);
            return 0;
        };
        if frame.output_len != 0 {
            // As the routine does first of all; what it may not do.
            (frame.output_len as *mut u64).write(0);
        }
        around.cell.set(core::ptr::from_ref(cell) as u64);
        around.at_home.set(u64::from(at_home));
        if at_home {
            add(&cell.calls.entered, 1);
            add(&cell.calls.bytes_in, frame.input_len);
            around.started.set(start(worker));
        } else {
            cell.elsewhere.entered.fetch_add(1, Relaxed);
            cell.elsewhere.bytes_in.fetch_add(frame.input_len, Relaxed);
            around.started.set(0);
        }
    }
    1
}

unsafe extern "C" fn rpc_ends(around: *const Around, result: c_int) {
    // SAFETY: as above; a cell is never unmapped.
    unsafe {
        let around = &*around;
        let cell = &*(around.cell.get() as *const cells::Cell);
        let len = match result == 0 && around.frame.output_len != 0 {
            true => (around.frame.output_len as *const u64).read(),
            false => 0,
        };
        if around.at_home.get() != 0 {
            ended(&cell.calls, around.started.get(), result);
            add(&cell.calls.bytes_out, len);
        } else {
            let calls = &cell.elsewhere;
            calls.returned.fetch_add(1, Relaxed);
            calls.errors.fetch_add(u64::from(result != 0), Relaxed);
            calls.bytes_out.fetch_add(len, Relaxed);
        }
    }
}

/// Counts the end of a call of the worker's thread.
fn ended(calls: &Series, started: u64, result: c_int) {
    if started != 0 {
        let cycles = sys::cycles().wrapping_sub(started);
        add(&calls.samples, 1);
        add(&calls.sampled_cycles, cycles);
        calls.histogram.count(cycles);
    }
    add(&calls.returned, 1);
    if result != 0 {
        add(&calls.errors, 1);
    }
}

unsafe extern "C" fn call_begins(around: *const Around) -> u64 {
    // SAFETY: called by `ng_called` alone, with a record that the patcher wrote.
    unsafe {
        let around = &*around;
        let record = &*(around.frame.record.get() as *const Routine);
        let worker = &*(record.worker as *const Worker);
        around.resume.set(record.resume);
        // On other threads nothing is ours, and an entry from elsewhere than the
        // worker's executable is none of its calls.
        if !outermost(worker, around.frame.return_address) {
            return 0;
        }
        if !is_on(worker) || !unwind::register_own(worker) {
            return 0;
        }
        let own = &control(worker).own;
        add(&own.entered, 1);
        // `faas_func_call(handle, input, input_length)`.
        add(&own.bytes_in, around.frame.input);
        around.cell.set(core::ptr::from_ref(own) as u64);
        around.started.set(start(worker));
    }
    1
}

unsafe extern "C" fn call_ends(around: *const Around, result: c_int) {
    // SAFETY: as above.
    unsafe {
        let around = &*around;
        let own = &*(around.cell.get() as *const Series);
        ended(own, around.started.get(), result);
    }
}

/// At an entry into the caller's `faas_func_call` that returns to `from`, when
/// there was a fused call since the last one: whether it is an outermost one.
///
/// Only an entry from the worker's own executable is, and it never happens while
/// a call is active: whatever the arena holds then belongs to a call that is
/// over. A graft that is still busy was left by a jump: a signal handler's
/// `siglongjmp`, or the callee's own.
///
/// # Safety
/// The worker's structures are the patcher's.
pub(crate) unsafe fn outermost(worker: &Worker, from: u64) -> bool {
    if sys::thread_pointer() != worker.thread
        || !(worker.text_low..worker.text_high).contains(&from)
    {
        return false;
    }
    worker.dirty.set(0);
    compiler_fence(SeqCst);
    // While calls are counted every entry comes by. Looked at after the store: the
    // agent may stop this thread in between and set both.
    if is_on(worker) {
        worker.dirty.set(1);
    }
    // SAFETY: the patcher wrote the addresses.
    unsafe {
        worker.arena.reset();
        let mut index = 0;
        while index < worker.count.load(Relaxed) as usize {
            let graft = *worker.grafts.as_ptr().add(index) as *const Graft;
            if !graft.is_null() && (*graft).busy.get() != 0 {
                left_by_jump(&*graft);
            }
            index += 1;
        }
    }
    worker.active.set(0);
    true
}

/// The time-stamp counter, for one call of so many; else 0.
fn start(worker: &Worker) -> u64 {
    // Knuth's MMIX; its high bits are good. Two threads may draw the same.
    let drawn = worker
        .lottery
        .load(Relaxed)
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    worker.lottery.store(drawn, Relaxed);
    match (drawn >> 33) % SAMPLE_RPC_EVERY {
        0 => sys::cycles(),
        _ => 0,
    }
}

/// One writer, the worker's thread: no locked instruction.
#[inline(always)]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}
