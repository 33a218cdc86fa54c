//! Whether a crash in a guarded call can be left: nothing but frames of the
//! callee's own images lies between the instruction and the call.
//!
//! ```text
//!  on our stack:     unwinder ◄─ examine ◄─ attempt ◄─ handle ◄─ ng_signal
//!  signal frame:        ╎ (rt_sigreturn, known by its bytes)
//!  worker's stack:   Bar's frame that crashed ─► Bar's … ─► Bar's ─► ng_guarded
//!                    every one owned, each above the one before     ▲ where the
//!                                                                   call was made
//! ```
//!
//! A fault in the callee's own code, with only such frames around it, is like a
//! call that this instruction makes: no lock of any library's is held by this
//! thread, and the unwinder may be called as from anywhere. Should the stack be
//! no whole one, looking at it faults as well: that ends the attempt
//! ([`ng_gave_up`]), and the signal is passed on as any that is not ours.

use core::arch::naked_asm;
use core::ffi::{c_int, c_void};

use crate::abi::{Graft, Import, Module, Worker};
use crate::guard::{Context, GUARDED, Info, TO_GRAFT, ng_guarded};
use crate::{imports, sys};

/// What `_Unwind_Backtrace` calls for each frame.
pub(crate) type Step = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;

/// `_URC_NO_REASON`.
const GO_ON: c_int = 0;
/// `_URC_END_OF_STACK`: what a step answers to end the walk.
const ENOUGH: c_int = 5;

/// Longest code of [`ng_guarded`]: return addresses in it are told so.
const GUARDED_LEN: u64 = 160;
/// Frames that lie between the unwinder and the interrupted code at most.
const BEFORE: u32 = 16;

/// A crash that is looked at.
struct Crash<'a> {
    worker: &'a Worker,
    graft: &'a Graft,
    info: &'a Info,
    context: &'a Context,
}

/// Whether it can be left. What called an address without code is made the
/// interrupted code then.
///
/// # Safety
/// In the handler, in a signal that the kernel raised in a guarded call of
/// `graft`.
pub(crate) unsafe fn is_sound(
    worker: &Worker,
    graft: &Graft,
    info: &Info,
    context: &Context,
) -> bool {
    let guard = &worker.guard;
    let crash = Crash {
        worker,
        graft,
        info,
        context,
    };
    // A fault of ours is to come to our handler, and on this stack: the
    // alternate one holds the signal frame that the walk goes by.
    let mut before = [0; 3];
    // SAFETY: none of the stack that we are on is given away.
    unsafe {
        if !sys::exchange_alternate_stack(&sys::NO_STACK, &mut before) {
            return false;
        }
        guard.handling.set(1);
        sys::unblock(GUARDED);
        let sound = attempt(&raw const crash, guard.attempt.as_ptr());
        sys::block(GUARDED);
        guard.handling.set(0);
        sys::exchange_alternate_stack(&before, &mut [0; 3]);
        sound != 0
    }
}

/// Calls [`examine`], having stored where [`ng_gave_up`] finds what it needs;
/// gives its answer, or 0.
#[unsafe(naked)]
unsafe extern "C" fn attempt(crash: *const Crash<'_>, here: *mut u64) -> u64 {
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push r15", // rsp = 0 (mod 16)
        ".cfi_offset rbx, -24",
        ".cfi_offset r12, -32",
        ".cfi_offset r13, -40",
        ".cfi_offset r14, -48",
        ".cfi_offset r15, -56",
        "mov [rsi], rsp",
        "call {examine}",
        "movzx eax, al",
        "leave", // the others are kept
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
        examine = sym examine,
    );
}

/// Where a fault of our own leads: in [`attempt`]'s frame.
///
/// # Safety
/// Entered from the handler alone.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn ng_gave_up() {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_def_cfa rsp, 64",
        ".cfi_offset rbp, -16",
        "endbr64",
        "cld",
        "xor eax, eax",
        "pop r15",
        ".cfi_adjust_cfa_offset -8",
        "pop r15",
        ".cfi_adjust_cfa_offset -8",
        "pop r14",
        ".cfi_adjust_cfa_offset -8",
        "pop r13",
        ".cfi_adjust_cfa_offset -8",
        "pop r12",
        ".cfi_adjust_cfa_offset -8",
        "pop rbx",
        ".cfi_adjust_cfa_offset -8",
        "pop rbp",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
    );
}

unsafe extern "C" fn examine(crash: *const Crash<'_>) -> bool {
    // SAFETY: `is_sound` passed it; the graft's records are the patcher's. What
    // lies on the worker's stack may be anything: see the module.
    unsafe {
        let Crash {
            worker,
            graft,
            info,
            context,
        } = *crash;
        let (rsp, rip) = (context.rsp.get(), context.rip.get());
        if !owns(graft, rip) {
            // A call to where there is no code is the caller's mistake: the
            // return address is on the stack, and nothing else has happened.
            if info.address != rip || rsp % 8 != 0 {
                return false;
            }
            let back = *(rsp as *const u64);
            if !owns(graft, back.wrapping_sub(1)) {
                return false;
            }
            context.rsp.set(rsp + 8);
            context.rip.set(back - 1);
        }
        let recovery = graft.recovery.get();
        let mut walk = Walk {
            graft,
            rip: context.rip.get(),
            rsp: context.rsp.get(),
            recovery,
            begun: false,
            arrived: false,
            before: 0,
        };
        walk.run(worker);
        // Its return address is whole; so should what lies above it be.
        let kept = (recovery + TO_GRAFT) as *const u64;
        walk.arrived && *kept == core::ptr::from_ref(graft) as u64
    }
}

/// Whether an address is in one of a graft's images.
unsafe fn owns(graft: &Graft, address: u64) -> bool {
    let modules = graft.modules as *const Module;
    let mut index = 0;
    while index < graft.module_count as usize {
        // SAFETY: the patcher wrote as many records.
        let range = unsafe { (*modules.add(index)).range };
        if address.wrapping_sub(range.start) < range.len {
            return true;
        }
        index += 1;
    }
    false
}

/// Has the unwinder sort its tables, which takes memory: better now than in the
/// face of a crash.
///
/// # Safety
/// In ordinary code.
pub(crate) unsafe fn warm_up(worker: &Worker) {
    let mut walk = Walk {
        graft: core::ptr::null(),
        rip: 0,
        rsp: 0,
        recovery: 0,
        begun: false,
        arrived: false,
        before: BEFORE,
    };
    // SAFETY: as the caller promises.
    unsafe { walk.run(worker) };
}

/// A walk from where a signal came to the guarded call.
struct Walk {
    graft: *const Graft,
    rip: u64,
    /// Of the interrupted code, then of the frame that came by last.
    rsp: u64,
    recovery: u64,
    /// The interrupted frame has come by.
    begun: bool,
    /// And from there on nothing but the graft's frames up to the call.
    arrived: bool,
    /// Frames before it.
    before: u32,
}

impl Walk {
    /// # Safety
    /// Where the unwinder may be called.
    unsafe fn run(&mut self, worker: &Worker) {
        if worker.has(Import::UnwindBacktrace)
            && worker.has(Import::UnwindGetCfa)
            && worker.has(Import::UnwindGetIp)
        {
            // SAFETY: as the caller promises.
            unsafe { worker.unwind_backtrace(step, core::ptr::from_mut(self).cast()) };
        }
    }
}

unsafe extern "C" fn step(frame: *mut c_void, walk: *mut c_void) -> c_int {
    // SAFETY: `Walk::run` passed the walk, the unwinder its own context.
    let (walk, ip, sp) = unsafe {
        let worker = imports::worker();
        let (ip, sp) = (worker.unwind_get_ip(frame), worker.unwind_get_cfa(frame));
        (&mut *walk.cast::<Walk>(), ip, sp)
    };
    if !walk.begun {
        walk.begun = ip == walk.rip && sp == walk.rsp;
        walk.before += 1;
        return if walk.before > BEFORE { ENOUGH } else { GO_ON };
    }
    let guarded = ng_guarded as *const () as u64;
    if sp == walk.recovery && ip.wrapping_sub(guarded) < GUARDED_LEN {
        walk.arrived = true;
        return ENOUGH;
    }
    // SAFETY: begun, so there is a graft.
    let own = unsafe { owns(&*walk.graft, ip.wrapping_sub(1)) };
    // Always upwards: wrong tables must not lead it in circles.
    if !own || sp <= walk.rsp || sp > walk.recovery {
        return ENOUGH;
    }
    walk.rsp = sp;
    GO_ON
}
