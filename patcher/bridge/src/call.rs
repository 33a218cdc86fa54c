//! A call at a rewritten site: whether it runs fused, and the run itself.
//!
//! Up to the first instruction of the callee every doubt answers "take the
//! RPC", with nothing changed. After it, a failure of ours is what a failed
//! RPC would be: -1 and no output.

use core::arch::naked_asm;
use core::arch::x86_64::__m128i;
use core::ffi::{c_char, c_int, c_void};
use core::mem::offset_of;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, SeqCst},
    compiler_fence,
};

use crate::abi::{
    Control, Graft, INLINE_INPUT, SAMPLE_EVERY, STATE_READY, SharedEdge, Site, Worker,
};
use crate::entry::Frame;
use crate::{arena, start, sys, unwind};

/// `memcpy`.
type Memcpy = unsafe extern "C" fn(*mut u8, *const u8, usize) -> *mut u8;

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
    if frame.target != worker.invoke {
        return other(worker, offset_of!(Control, other_target));
    }
    if sys::thread_pointer() != worker.thread {
        return other(worker, offset_of!(Control, other_thread));
    }
    let graft = if frame.name == site.name && frame.name != 0 {
        site.graft
    } else {
        // SAFETY: as above; this is an RPC, so `name` is its name.
        match unsafe { by_name(worker, frame.name) } {
            Some(graft) => graft,
            None => return other(worker, offset_of!(Control, other_name)),
        }
    };
    // SAFETY: as above.
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
    graft.caller_context.set(frame.context);
    graft.out.set(0);
    graft.out_len.set(0);
    if entered % SAMPLE_EVERY == SAMPLE_EVERY / 2 {
        graft.started.set(sys::cycles());
    }
    // Reading MXCSR is as much as a third of the whole call: not where it is
    // proven that nobody changes it.
    let theirs = sys::floating_point(graft.mxcsr_fixed != 0);
    graft.caller_mxcsr.set(theirs.0);
    graft.caller_fpucw.set(u32::from(theirs.1));
    let ours = (graft.mxcsr.get(), graft.fpucw.get() as u16);
    if differs(theirs, ours) {
        sys::set_floating_point(ours.0, ours.1);
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
    let theirs = (graft.caller_mxcsr.get(), graft.caller_fpucw.get() as u16);
    let ours = (graft.mxcsr.get(), graft.fpucw.get() as u16);
    let after = sys::floating_point(graft.mxcsr_fixed != 0);
    if differs(theirs, after) {
        sys::set_floating_point(theirs.0, theirs.1);
    }
    // A mode that the callee changed on purpose is its own next time.
    if differs(after, ours) {
        graft.mxcsr.set(after.0 & !EXCEPTION_FLAGS);
        graft.fpucw.set(u32::from(after.1));
    }
    if graft.started.get() != 0 {
        let cycles = sys::cycles().wrapping_sub(graft.started.replace(0));
        add(&shared.sampled_cycles, cycles);
        add(&shared.samples, 1);
    }
    if worker.active.get() != core::ptr::from_ref(graft) as u64 {
        // The callee left calls of its own by a jump.
        // SAFETY: the chain is the worker's.
        unsafe { abandon_inner(worker, graft) };
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

/// The graft whose name equals the bytes at `name`, terminator included.
#[cold]
#[inline(never)]
unsafe fn by_name(worker: &Worker, name: u64) -> Option<u64> {
    if name == 0 {
        return None;
    }
    let mut index = 0;
    while index < worker.count.load(Acquire) as usize {
        // SAFETY: the patcher wrote the table, 0 where an entry is not there
        // (yet); `name` is the string that the RPC itself would read next.
        unsafe {
            let graft = *worker.grafts.as_ptr().add(index);
            if graft != 0
                && same(
                    (*(graft as *const Graft)).name as *const u8,
                    name as *const u8,
                )
            {
                return Some(graft);
            }
        }
        index += 1;
    }
    None
}

/// Counts a call that is none of an edge's, in the control area.
#[cold]
fn other(worker: &Worker, offset: usize) -> Decision {
    // SAFETY: the control area outlives every stub; the offset is a counter's.
    rpc(unsafe { &*((worker.control + offset as u64) as *const AtomicU64) })
}

unsafe fn same(mut a: *const u8, mut b: *const u8) -> bool {
    // SAFETY: both are NUL-terminated; the loop ends at the first difference
    // or at the common NUL.
    unsafe {
        loop {
            if *a != *b {
                return false;
            }
            if *a == 0 {
                return true;
            }
            (a, b) = (a.add(1), b.add(1));
        }
    }
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
        let theirs = (graft.caller_mxcsr.get(), graft.caller_fpucw.get() as u16);
        if differs(theirs, sys::floating_point(false)) {
            sys::set_floating_point(theirs.0, theirs.1);
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

/// MXCSR's sticky exception flags: no mode, and volatile across calls.
const EXCEPTION_FLAGS: u32 = 0x3f;

#[inline(always)]
fn differs(a: (u32, u16), b: (u32, u16)) -> bool {
    (a.0 ^ b.0) & !EXCEPTION_FLAGS != 0 || a.1 != b.1
}

/// Copies the input to where it is aligned and followed by zeros, as in
/// nightcore's messages and shared-memory files: careless functions live on
/// that. `None` if there is no memory for it.
#[inline(always)]
unsafe fn hand_over(graft: &Graft, input: u64, len: u64) -> Option<u64> {
    if len > INLINE_INPUT as u64 {
        // SAFETY: as the caller promises.
        return unsafe { hand_over_large(graft, input, len) };
    }
    let scratch = graft.scratch.0.get().cast::<u8>();
    // SAFETY: the scratch is larger than INLINE_INPUT, the graft is not busy,
    // and the caller vouches for `len` bytes at `input`.
    unsafe {
        copy(scratch, input as *const u8, len as usize, graft);
        let used = graft.scratch_used.get();
        if u64::from(used) > len {
            core::ptr::write_bytes(
                scratch.add(len as usize),
                0,
                (u64::from(used) - len) as usize,
            );
        }
    }
    graft.scratch_used.set(len as u32);
    Some(scratch as u64)
}

/// The same for what is no inline message: page-aligned, and zero up to the
/// end of a page at least.
#[inline(never)]
unsafe fn hand_over_large(graft: &Graft, input: u64, len: u64) -> Option<u64> {
    const PAGE: u64 = 4096;
    let need = len.checked_add(1)?.checked_next_multiple_of(PAGE)?;
    // SAFETY: the block is the graft's own, and the graft is not busy.
    unsafe {
        let excess = graft.large_len.get() > arena::KEEP as u64 && need <= arena::KEEP as u64;
        if need > graft.large_len.get() || excess {
            let block = sys::map(usize::try_from(need).ok()?)?;
            if graft.large_len.get() != 0 {
                sys::unmap(graft.large.get() as *mut u8, graft.large_len.get() as usize);
            }
            graft.large.set(block as u64);
            graft.large_len.set(need);
            graft.large_used.set(0);
        }
        let block = graft.large.get() as *mut u8;
        copy(block, input as *const u8, len as usize, graft);
        let dirty = graft.large_used.get().min(need);
        if dirty > len {
            core::ptr::write_bytes(block.add(len as usize), 0, (dirty - len) as usize);
        }
        if graft.large_used.get() <= need {
            graft.large_used.set(len);
        }
        Some(block as u64)
    }
}

/// Copies short runs inline, longer ones by the C library.
#[inline(always)]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize, graft: &Graft) {
    // SAFETY: the callers own `len` bytes at `to` and may read them at `from`;
    // the unaligned overlapping loads stay inside both.
    unsafe {
        // As wide as the copy allows: who reads it next, and likely as wide,
        // would wait for two narrow stores to reach the cache.
        if len >= 16 {
            if len <= 64 {
                let head = from.cast::<__m128i>().read_unaligned();
                let tail = from.add(len - 16).cast::<__m128i>().read_unaligned();
                if len > 32 {
                    let second = from.add(16).cast::<__m128i>().read_unaligned();
                    let third = from.add(len - 32).cast::<__m128i>().read_unaligned();
                    to.add(16).cast::<__m128i>().write_unaligned(second);
                    to.add(len - 32).cast::<__m128i>().write_unaligned(third);
                }
                to.cast::<__m128i>().write_unaligned(head);
                to.add(len - 16).cast::<__m128i>().write_unaligned(tail);
            } else {
                let memcpy: Memcpy =
                    core::mem::transmute((*(graft.worker as *const Worker)).memcpy.get() as usize);
                memcpy(to, from, len);
            }
        } else if len >= 8 {
            let head = from.cast::<u64>().read_unaligned();
            let tail = from.add(len - 8).cast::<u64>().read_unaligned();
            to.cast::<u64>().write_unaligned(head);
            to.add(len - 8).cast::<u64>().write_unaligned(tail);
        } else if len >= 4 {
            let head = from.cast::<u32>().read_unaligned();
            let tail = from.add(len - 4).cast::<u32>().read_unaligned();
            to.cast::<u32>().write_unaligned(head);
            to.add(len - 4).cast::<u32>().write_unaligned(tail);
        } else if len != 0 {
            let (first, middle, last) = (*from, *from.add(len / 2), *from.add(len - 1));
            *to = first;
            *to.add(len / 2) = middle;
            *to.add(len - 1) = last;
        }
    }
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
/// *caller's* context, and only where the worker itself could make it.
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
    // A jump leaves no frame that cancellation would have to pass.
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
        "jne 2f",
        "mov rdi, [rdi + {caller_context}]",
        "jmp [rax + {invoke}]",
        "2:",
        "mov eax, -1",
        "ret",
        ".cfi_endproc",
        busy = const offset_of!(Graft, busy),
        worker = const offset_of!(Graft, worker),
        thread = const offset_of!(Worker, thread),
        caller_context = const offset_of!(Graft, caller_context),
        invoke = const offset_of!(Worker, invoke),
    );
}

/// At the entry of the caller's `faas_func_call`, when there was a fused call
/// since the last one. `return_slot` is where the entry's return address lies, `dirty`
/// the address of the worker's flag of that name.
///
/// Only an entry from the worker's own executable is an outermost one, and it
/// never happens while a call is active: whatever the arena holds then belongs
/// to a call that is over. A graft that is still busy was left by a jump: a
/// signal handler's `siglongjmp`, or the callee's own.
///
/// # Safety
/// Called by the entry stub alone.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_hook(return_slot: *const u64, dirty: *const u8) {
    // SAFETY: a function's entry has its return address on the stack, and the
    // stub's flag is the worker's `dirty`.
    let (from, worker) = unsafe {
        (
            return_slot.read(),
            &*dirty.sub(offset_of!(Worker, dirty)).cast::<Worker>(),
        )
    };
    if sys::thread_pointer() != worker.thread
        || !(worker.text_low..worker.text_high).contains(&from)
    {
        return;
    }
    worker.dirty.set(0);
    // SAFETY: see above.
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
}

/// As [`give_up`]; the caller's floating-point modes come back if nobody
/// touched the callee's.
#[cold]
#[inline(never)]
unsafe fn left_by_jump(graft: &Graft) {
    let ours = (graft.mxcsr.get(), graft.fpucw.get() as u16);
    if !differs(ours, sys::floating_point(false)) {
        sys::set_floating_point(graft.caller_mxcsr.get(), graft.caller_fpucw.get() as u16);
    }
    // SAFETY: as the caller promises.
    unsafe { give_up(graft) };
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: `copy` passes its own promise on.
        unsafe { core::ptr::copy_nonoverlapping(from, to, len) };
        to
    }

    /// A graft and its worker, all zero but for `memcpy`.
    fn graft() -> (Box<Graft>, Box<Worker>) {
        // SAFETY: every field is an integer, a cell or an array of them.
        let (mut graft, worker): (Box<Graft>, Box<Worker>) =
            unsafe { (Box::new(core::mem::zeroed()), Box::new(core::mem::zeroed())) };
        worker.memcpy.set(memcpy as *const () as u64);
        graft.worker = core::ptr::from_ref(&*worker) as u64;
        (graft, worker)
    }

    #[test]
    fn copies_of_every_length_are_exact() {
        let (graft, _worker) = graft();
        let from: Vec<u8> = (0..300_u32).map(|i| (i * 7 + 1) as u8).collect();
        for len in 0..from.len() {
            let mut to = vec![0xee; len + 32];
            // SAFETY: both are long enough.
            unsafe { copy(to.as_mut_ptr().add(16), from.as_ptr(), len, &graft) };
            assert_eq!(to[16..16 + len], from[..len], "{len} bytes");
            assert!(
                to[..16].iter().chain(&to[16 + len..]).all(|b| *b == 0xee),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn inputs_are_handed_over_aligned_and_followed_by_zeros() {
        let (graft, _worker) = graft();
        let text: Vec<u8> = (0..20_001_u32).map(|i| (i % 255 + 1) as u8).collect();
        // Long and short in turn: nothing of an earlier one may show behind.
        for len in [
            500, 3, 960, 0, 961, 20_000, 5_000, 4_096, 962, 40, 8_191, 1_000,
        ] {
            // SAFETY: the graft is not busy, the input lives.
            let at = unsafe { hand_over(&graft, text[1..].as_ptr() as u64, len as u64) };
            let at = at.expect("there is memory");
            let page_end =
                (len + 1_usize).next_multiple_of(if len > INLINE_INPUT { 4096 } else { 64 });
            // SAFETY: the block is longer than its page's or line's end.
            let got = unsafe {
                core::slice::from_raw_parts(at as *const u8, page_end.min(len + 1 + 4096))
            };
            assert_eq!(at % 64, 0);
            assert_eq!(got[..len], text[1..=len]);
            assert!(
                got[len..].iter().all(|b| *b == 0),
                "{len} bytes are not followed by zeros"
            );
        }
    }
}
