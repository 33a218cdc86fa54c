//! A call at a rewritten site: whether it runs fused, and the run itself.
//!
//! Up to the first instruction of the callee every doubt answers "take the
//! RPC", with nothing changed. After it, a failure of ours is what a failed
//! RPC would be: -1 and no output.

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed},
};

use crate::abi::{
    Control, Graft, INLINE_INPUT, SAMPLE_EVERY, STATE_ARMED, STATE_READY, SharedEdge, Site, Worker,
};
use crate::entry::{Frame, TAKE_RPC};
use crate::{start, sys};

/// `faas_func_call`.
type FuncCall = unsafe extern "C" fn(*mut c_void, *const u8, usize) -> c_int;
/// `invoke_func`.
type Invoke = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    *const u8,
    usize,
    *mut *const u8,
    *mut usize,
) -> c_int;
/// `memcpy`.
type Memcpy = unsafe extern "C" fn(*mut u8, *const u8, usize) -> *mut u8;

/// Decides and, if all is in order, runs the callee.
///
/// Gives what the RPC would have returned (0 or -1), or [`TAKE_RPC`] with
/// nothing changed.
///
/// # Safety
/// Called by [`crate::entry::ng_enter`] alone, with the frame it built and a
/// site whose structures the patcher has written.
pub unsafe extern "C" fn ng_call(frame: *const Frame) -> i64 {
    // SAFETY: see above; what the structures point at is never unmapped while
    // a stub leads here.
    let (frame, site) = unsafe { (&*frame, &*((*frame).site as *const Site)) };
    let graft = if frame.name == site.name && frame.name != 0 {
        site.graft
    } else {
        // SAFETY: as above.
        match unsafe { by_name(site, frame.name) } {
            Some(graft) => graft,
            None => return TAKE_RPC,
        }
    };
    // SAFETY: as above.
    let (graft, worker, shared) = unsafe {
        let graft = &*(graft as *const Graft);
        (
            graft,
            &*(graft.worker as *const Worker),
            &*(graft.shared as *const SharedEdge),
        )
    };
    if shared.gate.load(Relaxed) == 0 {
        return rpc(&shared.rpc_gate_off);
    }
    if frame.target != worker.invoke {
        return rpc(&shared.rpc_target);
    }
    if sys::thread_pointer() != worker.thread {
        return rpc(&shared.rpc_thread);
    }
    if graft.state.load(Acquire) != STATE_READY {
        if graft.state.load(Acquire) == STATE_ARMED {
            // SAFETY: this is the worker's thread in ordinary code, at a call.
            unsafe { start::begin(graft, worker) };
        }
        return rpc(&shared.rpc_not_ready);
    }
    if graft.busy.get() != 0 {
        return rpc(&shared.rpc_busy);
    }
    if (core::ptr::from_ref(frame) as u64) < worker.stack_floor {
        return rpc(&shared.rpc_stack);
    }
    // A call may need a lot, and once the callee has started there is no way
    // back to the RPC: start only while half of the budget is free.
    if worker.arena.mapped() > worker.arena_budget / 2 {
        return rpc(&shared.rpc_memory);
    }
    let entered = shared.entered.load(Relaxed);
    shared.entered.store(entered + 1, Relaxed);
    if entered % SAMPLE_EVERY == SAMPLE_EVERY / 2 {
        let before = sys::cycles();
        // SAFETY: all checks passed.
        let result = unsafe { run(frame, graft, shared) };
        add(&shared.sampled_cycles, sys::cycles().wrapping_sub(before));
        add(&shared.samples, 1);
        result
    } else {
        // SAFETY: all checks passed.
        unsafe { run(frame, graft, shared) }
    }
}

/// The graft whose name equals the bytes at `name`, terminator included.
#[cold]
#[inline(never)]
unsafe fn by_name(site: &Site, name: u64) -> Option<u64> {
    if name == 0 {
        return None;
    }
    // SAFETY: the patcher wrote `worker`; `name` is the NUL-terminated string
    // that the RPC itself would read next.
    unsafe {
        let worker = &*(site.worker as *const Worker);
        let mut index = 0;
        while index < worker.count.load(Acquire) as usize {
            let graft = *worker.grafts.as_ptr().add(index);
            if same(
                (*(graft as *const Graft)).name as *const u8,
                name as *const u8,
            ) {
                return Some(graft);
            }
            index += 1;
        }
        add(&(*(worker.control as *const Control)).other_name, 1);
    }
    None
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
fn rpc(reason: &AtomicU64) -> i64 {
    add(reason, 1);
    TAKE_RPC
}

/// One writer per counter: no locked instruction.
#[inline(always)]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

/// Runs the callee.
#[inline(always)]
unsafe fn run(frame: &Frame, graft: &Graft, shared: &SharedEdge) -> i64 {
    // SAFETY: output and output_len are what the caller passes to the RPC,
    // which stores to both first of all; the graft is ready and not busy.
    unsafe {
        let (output, output_len) = (frame.output as *mut u64, frame.output_len as *mut u64);
        output.write(0);
        output_len.write(0);
        graft.busy.set(1);
        graft.starved.set(0);
        graft.caller_context.set(frame.context);
        graft.out.set(0);
        graft.out_len.set(0);
        let input = hand_over(graft, frame.input, frame.input_len);

        let theirs = sys::floating_point();
        let ours = (graft.mxcsr.get(), graft.fpucw.get() as u16);
        if differs(theirs, ours) {
            sys::set_floating_point(ours.0, ours.1);
        }
        let call: FuncCall = core::mem::transmute(graft.call as usize);
        let result = call(
            graft.handle.get() as *mut c_void,
            input as *const u8,
            frame.input_len as usize,
        );
        let after = sys::floating_point();
        if differs(theirs, after) {
            sys::set_floating_point(theirs.0, theirs.1);
        }
        // A mode that the callee changed on purpose is its own next time.
        if differs(after, ours) {
            graft.mxcsr.set(after.0 & !EXCEPTION_FLAGS);
            graft.fpucw.set(u32::from(after.1));
        }

        let (out, len) = (graft.out.get(), graft.out_len.get());
        graft.busy.set(0);
        add(&shared.bytes_in, frame.input_len);
        add(&shared.returned, 1);
        if result != 0 || graft.starved.get() != 0 {
            add(&shared.errors, 1);
            return -1;
        }
        if len != 0 {
            // The arena keeps room for it.
            ((out + len) as *mut u8).write(0);
            output.write(out);
            output_len.write(len);
            add(&shared.bytes_out, len);
        }
        0
    }
}

/// MXCSR's sticky exception flags: no mode, and volatile across calls.
const EXCEPTION_FLAGS: u32 = 0x3f;

#[inline(always)]
fn differs(a: (u32, u16), b: (u32, u16)) -> bool {
    (a.0 ^ b.0) & !EXCEPTION_FLAGS != 0 || a.1 != b.1
}

/// Small inputs go into the graft's scratch: 64-byte aligned and zero behind,
/// as in a nightcore message. Larger ones are passed on where they are.
#[inline(always)]
unsafe fn hand_over(graft: &Graft, input: u64, len: u64) -> u64 {
    if len > INLINE_INPUT as u64 {
        return input;
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
    scratch as u64
}

/// Copies short runs inline, longer ones by the C library.
#[inline(always)]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize, graft: &Graft) {
    // SAFETY: the callers own `len` bytes at `to` and may read them at `from`;
    // the unaligned overlapping loads stay inside both.
    unsafe {
        if len >= 8 {
            if len <= 16 {
                let head = from.cast::<u64>().read_unaligned();
                let tail = from.add(len - 8).cast::<u64>().read_unaligned();
                to.cast::<u64>().write_unaligned(head);
                to.add(len - 8).cast::<u64>().write_unaligned(tail);
            } else {
                let memcpy: Memcpy =
                    core::mem::transmute((*(graft.worker as *const Worker)).memcpy.get() as usize);
                memcpy(to, from, len);
            }
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
        worker.dirty.set(1);
        match worker
            .arena
            .grow(graft.out.get(), out_len, len as u64, worker.arena_budget)
        {
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
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_invoke(
    context: *mut c_void,
    name: *const c_char,
    input: *const u8,
    input_len: usize,
    output: *mut *const u8,
    output_len: *mut usize,
) -> c_int {
    // SAFETY: the context was given by `start`, and only it; the outputs are
    // the callee's to write.
    unsafe {
        let graft = &*(context as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        output.write(core::ptr::null());
        output_len.write(0);
        if graft.busy.get() == 0 || sys::thread_pointer() != worker.thread {
            return -1;
        }
        let invoke: Invoke = core::mem::transmute(worker.invoke as usize);
        invoke(
            graft.caller_context.get() as *mut c_void,
            name,
            input,
            input_len,
            output,
            output_len,
        )
    }
}

/// At the entry of the caller's `faas_func_call`, when the arena holds
/// something. `return_slot` is where the entry's return address lies, `dirty`
/// the address of the worker's flag of that name.
///
/// Only the worker enters from outside the library, and never while a call is
/// active: then whatever the arena holds belongs to a call that is over.
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
            &*dirty
                .sub(core::mem::offset_of!(Worker, dirty))
                .cast::<Worker>(),
        )
    };
    if sys::thread_pointer() != worker.thread || (worker.text_low..worker.text_high).contains(&from)
    {
        return;
    }
    worker.dirty.set(0);
    // SAFETY: see above.
    unsafe { worker.arena.reset() };
}
