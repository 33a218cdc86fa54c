//! A call at a rewritten site: whether it runs fused, and the run itself.
//!
//! Up to the first instruction of the callee every doubt answers "take the
//! RPC", with nothing changed. After it, a failure of ours is what a failed
//! RPC would be: -1 and no output.

use core::arch::naked_asm;
use core::ffi::{c_char, c_int, c_void};
use core::mem::offset_of;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, SeqCst},
    compiler_fence,
};

use crate::abi::{Control, Graft, Routine, SAMPLE_EVERY, STATE_READY, SharedEdge, Site, Worker};
use crate::entry::Frame;
use crate::input::{copy, hand_over};
use crate::routine::{self, RoutineFrame};
use crate::{names, start, sys, unwind};

/// What [`crate::entry::ng_enter`] goes on with, in `rax` and `rdx`.
#[derive(Debug)]
#[repr(C)]
pub struct Decision {
    /// The [`Graft`] whose function to call; 0: take the RPC, with nothing
    /// changed.
    graft: u64,
    /// The input to give to it.
    input: u64,
}

/// Decides and, if all is in order, prepares the callee's run.
///
/// # Safety
/// Called by [`crate::entry::ng_enter`] alone, with the frame it built and a
/// site whose structures the patcher has written.
pub(crate) unsafe extern "C" fn prepare(frame: *const Frame) -> Decision {
    // SAFETY: see above; what the structures point at is never unmapped while
    // a stub leads here.
    let (frame, site) = unsafe { (&*frame, &*((*frame).record.get() as *const Site)) };
    // SAFETY: as above.
    let worker = unsafe { &*(site.worker as *const Worker) };
    // First of all: with another target the "name" may be anything.
    if frame.target.get() != worker.invoke {
        return other(worker, offset_of!(Control, other_target));
    }
    // SAFETY: as above; this is an RPC, so `name` is its name.
    let decision = unsafe { at_site(frame, site, worker) };
    if decision.graft == 0 {
        // It is decided: not again at the routine's entry.
        frame.target.set(routine::rpc(worker));
    }
    decision
}

/// The same at the entry of the worker's own routine, for all names.
///
/// # Safety
/// Called by [`routine::ng_routine`] alone, with the frame it built and a
/// record that the patcher has written.
pub(crate) unsafe extern "C" fn prepare_routine(frame: *const RoutineFrame) -> Decision {
    // SAFETY: see above; what the structures point at is never unmapped while
    // a stub leads here.
    unsafe {
        let frame = &*frame;
        let routine = &*(frame.frame.record.get() as *const Routine);
        let worker = &*(routine.worker as *const Worker);
        let decision = at_routine(frame, worker);
        if decision.graft == 0 {
            frame.frame.record.set(routine::rpc(worker));
        }
        decision
    }
}

#[inline(always)]
unsafe fn at_routine(frame: &RoutineFrame, worker: &Worker) -> Decision {
    // SAFETY: as the caller promises.
    unsafe {
        let Some(graft) = names::find(worker, frame.frame.name) else {
            return nobodys(worker);
        };
        if !on_its_thread(worker) {
            return elsewhere(graft);
        }
        routine::note(worker, frame, graft);
        fused(&frame.frame, worker, graft)
    }
}

/// The same for a call that a fused callee makes, with its graft as the
/// record. It is the caller's call to whoever answers it.
///
/// # Safety
/// Called by [`crate::entry::ng_nested`] alone, with the frame it built.
pub(crate) unsafe extern "C" fn prepare_nested(frame: *const Frame) -> Decision {
    // SAFETY: see above; the graft is busy, on the worker's thread.
    unsafe {
        let frame = &*frame;
        let parent = &*(frame.record.get() as *const Graft);
        let worker = &*(parent.worker as *const Worker);
        frame.context.set(parent.caller_context.get());
        frame.target.set(routine::rpc(worker));
        match names::below(worker, parent, frame.name) {
            Some(graft) => fused(frame, worker, graft),
            // Nobody asked for it: no edge to count it at.
            None => Decision { graft: 0, input: 0 },
        }
    }
}

#[inline(always)]
unsafe fn at_site(frame: &Frame, site: &Site, worker: &Worker) -> Decision {
    let graft = if frame.name == site.name && frame.name != 0 {
        site.graft
    } else {
        // SAFETY: as the caller promises.
        match unsafe { names::find(worker, frame.name) } {
            Some(graft) => graft,
            None => return nobodys(worker),
        }
    };
    // SAFETY: the graft is the worker's.
    unsafe {
        if !on_its_thread(worker) {
            return elsewhere(graft);
        }
        fused(frame, worker, graft)
    }
}

/// Whether this is the thread on which calls run fused.
#[inline(always)]
fn on_its_thread(worker: &Worker) -> bool {
    sys::thread_pointer() == worker.thread
}

/// An edge's call from another thread than the worker's.
///
/// # Safety
/// `graft` is one of the worker's.
#[cold]
unsafe fn elsewhere(graft: u64) -> Decision {
    // SAFETY: as the caller promises; the patcher wrote the address.
    let shared = unsafe { &*((*(graft as *const Graft)).shared as *const SharedEdge) };
    // Locked: any number of threads may be here.
    shared.rpc_thread.fetch_add(1, Relaxed);
    Decision { graft: 0, input: 0 }
}

/// A call that is none of an edge's by its name.
#[cold]
fn nobodys(worker: &Worker) -> Decision {
    if !on_its_thread(worker) {
        // The counter has one writer.
        return Decision { graft: 0, input: 0 };
    }
    other(worker, offset_of!(Control, other_name))
}

/// Runs a graft if all is in order.
///
/// # Safety
/// The call is an RPC on the worker's own thread, `graft` one of the worker's.
#[inline(always)]
unsafe fn fused(frame: &Frame, worker: &Worker, graft: u64) -> Decision {
    // SAFETY: as the caller promises.
    let (graft, shared) = unsafe {
        let graft = &*(graft as *const Graft);
        (graft, &*(graft.shared as *const SharedEdge))
    };
    if shared.gate.load(Relaxed) == 0 {
        return rpc(&shared.rpc_gate_off);
    }
    // SAFETY: this is the worker's thread in ordinary code, at a call.
    if graft.state.load(Acquire) != STATE_READY && !unsafe { start::advance(graft, worker) } {
        return rpc(&shared.rpc_not_ready);
    }
    if graft.busy.get() != 0 {
        return rpc(&shared.rpc_busy);
    }
    if (core::ptr::from_ref(frame) as u64) < worker.stack_floor {
        return rpc(&shared.rpc_stack);
    }
    // Once the callee has started there is no way back to the RPC.
    if worker.arena.mapped() > worker.arena_budget {
        return rpc(&shared.rpc_memory);
    }
    // SAFETY: the graft is not busy; the caller vouches for its input.
    let Some(input) = (unsafe { hand_over(graft, frame.input, frame.input_len) }) else {
        return rpc(&shared.rpc_memory);
    };
    let entered = shared.entered.load(Relaxed);
    shared.entered.store(entered + 1, Relaxed);
    // SAFETY: output and output_len are what the caller passes to the RPC,
    // which stores to both first of all; the graft is ready and not busy.
    unsafe {
        (frame.output as *mut u64).write(0);
        (frame.output_len as *mut u64).write(0);
    }
    // A signal handler may leave by a jump at any instruction: what is active
    // is busy.
    graft.busy.set(1);
    worker.dirty.set(1);
    compiler_fence(SeqCst);
    graft.outer.set(worker.active.get());
    worker.active.set(core::ptr::from_ref(graft) as u64);
    frame.record.set(core::ptr::from_ref(graft) as u64);
    graft.starved.set(0);
    graft.caller_context.set(frame.context.get());
    graft.out.set(0);
    graft.out_len.set(0);
    if entered % SAMPLE_EVERY == SAMPLE_EVERY / 2 {
        graft.started.set(sys::cycles());
    }
    // Reading MXCSR is as much as a third of the whole call: not where it is
    // proven that nobody changes it.
    let theirs = sys::modes(graft.mxcsr_fixed != 0);
    graft.caller_modes.set(theirs);
    let ours = graft.modes.get();
    if sys::differ(theirs, ours) {
        sys::set_modes(ours);
    }
    Decision {
        graft: core::ptr::from_ref(graft) as u64,
        input,
    }
}

/// After the callee: what the RPC would have returned (0 or -1).
///
/// # Safety
/// Called by [`crate::entry::ng_enter`] alone, with the frame that
/// [`prepare`] prepared and the callee's result.
pub(crate) unsafe extern "C" fn finish(frame: *const Frame, result: c_int) -> i64 {
    // SAFETY: see above.
    let (frame, graft, worker, shared) = unsafe {
        let graft = &*((*frame).record.get() as *const Graft);
        (
            &*frame,
            graft,
            &*(graft.worker as *const Worker),
            &*(graft.shared as *const SharedEdge),
        )
    };
    if worker.active.get() != core::ptr::from_ref(graft) as u64 {
        // The callee left calls of its own by a jump. (Not called in the
        // middle: that would cost saved registers where it never happens.)
        // SAFETY: as the caller promises.
        return unsafe { finish_outer(frame, result) };
    }
    let (theirs, ours) = (graft.caller_modes.get(), graft.modes.get());
    let after = sys::modes(graft.mxcsr_fixed != 0);
    if sys::differ(theirs, after) {
        sys::set_modes(theirs);
    }
    // A mode that the callee changed on purpose is its own next time.
    if sys::differ(after, ours) {
        graft.modes.set(after & !sys::EXCEPTION_FLAGS);
    }
    if graft.started.get() != 0 {
        let cycles = sys::cycles().wrapping_sub(graft.started.replace(0));
        add(&shared.sampled_cycles, cycles);
        add(&shared.samples, 1);
        shared.histogram.count(cycles);
    }
    let (out, len, starved) = (graft.out.get(), graft.out_len.get(), graft.starved.get());
    worker.active.set(graft.outer.get());
    compiler_fence(SeqCst);
    graft.busy.set(0);
    add(&shared.bytes_in, frame.input_len);
    add(&shared.returned, 1);
    if result != 0 || starved != 0 {
        if starved != 0 {
            // The next one would fail as well.
            shared.gate.store(0, Relaxed);
        }
        add(&shared.errors, 1);
        return -1;
    }
    if len != 0 {
        // SAFETY: the arena keeps room for the NUL; `prepare` stored to both
        // of the others.
        unsafe {
            ((out + len) as *mut u8).write(0);
            (frame.output as *mut u64).write(out);
            (frame.output_len as *mut u64).write(len);
        }
        add(&shared.bytes_out, len);
    }
    0
}

/// Counts a call that is none of an edge's, in the control area.
#[cold]
fn other(worker: &Worker, offset: usize) -> Decision {
    // SAFETY: the control area outlives every stub; the offset is a counter's.
    rpc(unsafe { &*((worker.control + offset as u64) as *const AtomicU64) })
}

#[cold]
fn rpc(reason: &AtomicU64) -> Decision {
    add(reason, 1);
    Decision { graft: 0, input: 0 }
}

/// One writer per counter: no locked instruction.
#[inline(always)]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

#[cold]
#[inline(never)]
unsafe fn finish_outer(frame: &Frame, result: c_int) -> i64 {
    // SAFETY: as for `finish`; the chain of active grafts is the worker's.
    unsafe {
        let graft = &*(frame.record.get() as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        abandon_inner(worker, graft);
        worker.active.set(core::ptr::from_ref(graft) as u64);
        finish(frame, result)
    }
}

/// In the landing pad for exceptions: the call's result.
///
/// # Safety
/// Called by [`crate::entry::landing_caught`] alone.
pub(crate) unsafe extern "C" fn caught(frame: *const Frame, exception: *mut c_void) -> i64 {
    // SAFETY: the frame is that of a call whose callee ran. What the exception
    // holds is destroyed in the callee's modes, and before others run it.
    unsafe {
        unwind::end(exception);
        abandoned(frame);
    }
    -1
}

/// In the landing pads: puts in order what a call that does not come back has
/// left.
///
/// # Safety
/// As for [`caught`].
pub(crate) unsafe extern "C" fn abandoned(frame: *const Frame) {
    // SAFETY: as above; the modes were read from this thread.
    unsafe {
        let graft = &*((*frame).record.get() as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        abandon_inner(worker, graft);
        worker.active.set(graft.outer.get());
        let shared = &*(graft.shared as *const SharedEdge);
        add(&shared.bytes_in, (*frame).input_len);
        give_up(graft);
        if sys::differ(graft.caller_modes.get(), sys::modes(false)) {
            sys::set_modes(graft.caller_modes.get());
        }
    }
}

/// Gives up the calls that are active inside of `graft`'s.
#[cold]
#[inline(never)]
unsafe fn abandon_inner(worker: &Worker, graft: &Graft) {
    let mut active = worker.active.get();
    let mut left = worker.count.load(Relaxed);
    while active != 0 && active != core::ptr::from_ref(graft) as u64 && left != 0 {
        // SAFETY: the chain links grafts.
        unsafe {
            let inner = &*(active as *const Graft);
            give_up(inner);
            active = inner.outer.get();
        }
        left -= 1;
    }
}

/// Counts a call that will not come back as one that failed.
unsafe fn give_up(graft: &Graft) {
    // SAFETY: the patcher wrote the address.
    let shared = unsafe { &*(graft.shared as *const SharedEdge) };
    add(&shared.returned, 1);
    add(&shared.errors, 1);
    graft.started.set(0);
    graft.busy.set(0);
}

/// The callee's `append_output`; its context is its [`Graft`].
///
/// # Safety
/// Called by the callee with the context and bytes that the worker_v1 ABI
/// promises.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_append(context: *mut c_void, data: *const u8, len: usize) {
    // SAFETY: the context was given by `start`, and only it.
    let graft = unsafe { &*(context as *const Graft) };
    // Outside of a call there is no answer to add to (in a nightcore worker it
    // would end up in the next one's).
    if len == 0 || graft.busy.get() == 0 {
        return;
    }
    // SAFETY: the graft's pointers are the patcher's; one call is active.
    unsafe {
        let worker = &*(graft.worker as *const Worker);
        let out_len = graft.out_len.get();
        match worker.arena.grow(graft.out.get(), out_len, len as u64) {
            Some(out) => {
                graft.out.set(out);
                copy((out + out_len) as *mut u8, data, len, graft);
                graft.out_len.set(out_len + len as u64);
            }
            None => graft.starved.set(1),
        }
    }
}

/// The callee's `invoke_func`: an RPC by the worker's own routine, with the
/// *caller's* context, and only while a call is active: at other times the
/// worker's thread may be waiting for its next message in the same place.
///
/// From another thread of the callee's it is always the RPC. The routine is made
/// for calls from any thread, one at a time; the worker's thread is in the
/// callee, which waits for that thread as it would in its own worker.
///
/// # Safety
/// Called by the callee with what the worker_v1 ABI promises.
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_invoke(
    context: *mut c_void,
    name: *const c_char,
    input: *const u8,
    input_len: usize,
    output: *mut *const u8,
    output_len: *mut usize,
) -> c_int {
    // Without a frame of Rust's: cancellation may have to pass.
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "mov qword ptr [r8], 0",
        "mov qword ptr [r9], 0",
        "cmp byte ptr [rdi + {busy}], 0",
        "je 2f",
        "mov rax, [rdi + {worker}]",
        "mov r10, fs:[0]",
        "cmp r10, [rax + {thread}]",
        "jne 3f",
        "mov r11, rdi",
        "push rax", // where the target will be
        ".cfi_adjust_cfa_offset 8",
        "jmp {nested}",
        ".cfi_adjust_cfa_offset -8",
        "2:",
        "mov eax, -1",
        "ret",
        "3:",
        "mov rdi, [rdi + {context}]",
        "mov r10, [rax + {resume}]", // see `routine::rpc`
        "test r10, r10",
        "cmovz r10, [rax + {invoke}]",
        "mov rax, [rax + {control}]",
        "lea r11, [rip + {observed}]",
        "cmp byte ptr [rax + {observing}], 0",
        "cmovnz r10, r11",
        "jmp r10",
        ".cfi_endproc",
        context = const offset_of!(Graft, caller_context),
        resume = const offset_of!(Worker, resume),
        invoke = const offset_of!(Worker, invoke),
        busy = const offset_of!(Graft, busy),
        worker = const offset_of!(Graft, worker),
        thread = const offset_of!(Worker, thread),
        control = const offset_of!(Worker, control),
        observing = const offset_of!(Control, observing),
        observed = sym crate::observe::ng_observed,
        nested = sym crate::entry::ng_nested,
    );
}

/// As [`give_up`]; the caller's floating-point modes come back if nobody
/// touched the callee's.
#[cold]
#[inline(never)]
pub(crate) unsafe fn left_by_jump(graft: &Graft) {
    if !sys::differ(graft.modes.get(), sys::modes(false)) {
        sys::set_modes(graft.caller_modes.get());
    }
    // SAFETY: as the caller promises.
    unsafe { give_up(graft) };
}
