//! Guarded callees: a SIGSEGV, SIGBUS, SIGFPE or SIGILL that the callee's own
//! code raises ends its call with -1 instead of ending the worker.
//!
//! ```text
//!  ng_enter ─► ng_guarded: keeps registers and rsp ─► Bar's faas_func_call
//!                  │ (first call, and now and then:         ╳ SIGSEGV
//!                  │  are the signals ours?)                │ on the alternate stack
//!                  ▼                                        ▼
//!      -1 ◄─ ng_recovered ◄──(signal returns there)── ng_signal: Bar's own code, and
//!      gate off, failed                                    │ nothing else between?
//!                                                          ▼ no
//!                            the worker's own action is put back, the signal
//!                            sent again: the kernel does what it would have done
//! ```
//!
//! Taken is only what can be left without harm to others. The kernel raised the
//! signal, on the worker's thread, in a guarded call; the instruction is one of
//! the callee's images; and the unwinder finds nothing but frames of these
//! images up to the call. A frame of a shared library in between (`qsort` with a
//! comparison that crashes, `exit` with a handler, a signal handler) may hold a
//! lock or be half done: there the worker dies, as without a guard. So it does
//! where the crash is in a library that it shares with the worker, and where the
//! unwinder can't tell. [`crate::crash`] is the judgement.
//!
//! What is not ours is not imitated. The worker's action is put back with the
//! system call that it was read with, and the signal sent again to this thread
//! with all that came with it: default actions, ignored signals, masks, stacks
//! and one-shot handlers are the kernel's affair. The next guarded call puts
//! ours back. Once the worker (or something in it) has replaced an action of
//! ours, it is left alone: the guard is off and says so.
//!
//! A callee that is not guarded does not come by here: its `call` is the
//! function itself.

use core::arch::naked_asm;
use core::cell::Cell;
use core::ffi::c_int;
use core::mem::offset_of;
use core::sync::atomic::Ordering::{Relaxed, Release};

use crate::abi::{
    ACTION_OURS, ACTION_TAKEN, ACTION_THEIRS, Action, FAILURE_CRASHED, GUARD_DENIED, GUARD_ON,
    GUARD_TAKEN, GUARDED_SIGNALS, Graft, Guard, Import, SAMPLE_EVERY, STATE_FAILED, SharedEdge,
    Worker,
};
use crate::{crash, imports, sys};

/// Bytes of the mapping that holds our stacks: a page that nobody may touch,
/// the stack on which a signal is looked into, and above it the thread's
/// alternate stack, if it has none.
const STACKS: usize = 256 << 10;
/// Where in it the upper one begins.
const UPPER: usize = 128 << 10;
const PAGE: usize = 4096;

/// `SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_RESTORER`. Restarted, as a signal
/// that we pass on has interrupted nothing yet.
const FLAGS: u64 = 0x4 | 0x0800_0000 | 0x1000_0000 | 0x0400_0000;
/// All signals: another one's handler would find the alternate stack free.
const BLOCKED: u64 = !0;
/// [`GUARDED_SIGNALS`], as the kernel has them in a mask.
pub(crate) const GUARDED: u64 = 1 << 3 | 1 << 6 | 1 << 7 | 1 << 10;

/// Bytes from the stack pointer at the call up to where [`ng_guarded`] keeps
/// the graft.
pub(crate) const TO_GRAFT: u64 = 16;

/// What is called instead of a guarded graft's function, with the graft in
/// `rax`.
///
/// # Safety
/// Called by [`crate::entry::ng_enter`] and its like alone, as the function.
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_guarded() {
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "push rbp", // rsp = 0 (mod 16)
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rax", // rsp = 0 (mod 16)
        ".cfi_offset rbx, -24",
        ".cfi_offset r12, -32",
        ".cfi_offset r13, -40",
        ".cfi_offset r14, -48",
        ".cfi_offset r15, -56",
        "mov r10, [rax + {worker}]",
        "sub dword ptr [r10 + {left}], 1",
        "jb 3f",
        "2:",
        "mov r11, [r10 + {exceptions}]",
        "push [r11 + 8]",
        "push [r11]",
        "mov [rax + {recovery}], rsp",
        "call [rax + {function}]",
        "leave", // the callee has kept the others
        ".cfi_remember_state",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        "3:",
        ".cfi_restore_state",
        "push rdi",
        "push rsi",
        "push rdx",
        "push rdx",
        "mov rdi, rax",
        "call {look}",
        "pop rdx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "mov rax, [rsp]",
        "mov r10, [rax + {worker}]",
        "jmp 2b",
        ".cfi_endproc",
        recovery = const offset_of!(Graft, recovery),
        worker = const offset_of!(Graft, worker),
        left = const offset_of!(Worker, guard) + offset_of!(Guard, left),
        exceptions = const offset_of!(Worker, guard) + offset_of!(Guard, exceptions),
        function = const offset_of!(Graft, function),
        look = sym look,
    );
}

/// Where a signal returns that was taken: in [`ng_guarded`]'s frame, with the
/// stack pointer as at the call. The result is a failed call's; what the ABI
/// says of the direction flag and the x87 stack at a return is made true, and
/// the thread has caught and thrown no more exceptions than before.
///
/// # Safety
/// Entered from [`ng_signal`] alone.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn ng_recovered() {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_def_cfa rsp, 80",
        ".cfi_offset rbp, -16",
        ".cfi_offset rbx, -24",
        ".cfi_offset r12, -32",
        ".cfi_offset r13, -40",
        ".cfi_offset r14, -48",
        ".cfi_offset r15, -56",
        "endbr64",
        "cld",
        "fninit",
        "mov rax, [rsp + {to_graft}]",
        "mov rax, [rax + {worker}]",
        "mov rax, [rax + {exceptions}]",
        "pop [rax]",
        ".cfi_def_cfa_offset 72",
        "pop [rax + 8]",
        ".cfi_def_cfa_offset 64",
        "mov eax, -1",
        "lea rbp, [rsp + 48]",
        ".cfi_def_cfa rbp, 16",
        "mov rbx, [rbp - 8]",
        "mov r12, [rbp - 16]",
        "mov r13, [rbp - 24]",
        "mov r14, [rbp - 32]",
        "mov r15, [rbp - 40]",
        "leave",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        ".cfi_restore rbx",
        ".cfi_restore r12",
        ".cfi_restore r13",
        ".cfi_restore r14",
        ".cfi_restore r15",
        "ret",
        ".cfi_endproc",
        to_graft = const TO_GRAFT,
        worker = const offset_of!(Graft, worker),
        exceptions = const offset_of!(Worker, guard) + offset_of!(Guard, exceptions),
    );
}

/// The handler. On the worker's thread it goes on on our own stack: nobody knows
/// how large the alternate one is, and the unwinder needs some.
///
/// # Safety
/// Called by the kernel, or by a handler that took us for the one before it.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn ng_signal(signal: c_int, info: *const Info, context: *mut Context) {
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        // The kernel leaves EFLAGS.AC as it was: with it, whatever is not
        // aligned here would raise the next signal.
        "pushfq",
        "and dword ptr [rsp], 0xfffbffff",
        "popfq",
        "push rdi",
        "push rsi",
        "push rdx",
        "push rdx",
        "call {stack}",
        "mov rdx, [rbp - 24]",
        "mov rsi, [rbp - 16]",
        "mov rdi, [rbp - 8]",
        "test rax, rax",
        "cmovnz rsp, rax",
        "call {handle}",
        "leave",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
        stack = sym stack,
        handle = sym handle,
    );
}

/// What the handler returns to: `rt_sigreturn`, in the bytes by which debuggers,
/// unwinders and our own patcher know it. The unwinder must find no table for
/// the byte before it.
#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    naked_asm!("nop", "mov rax, 15", "syscall", "ud2");
}

/// `siginfo_t`, as far as it is looked at.
#[repr(C)]
pub(crate) struct Info {
    signal: i32,
    error: i32,
    code: i32,
    pad: i32,
    pub(crate) address: u64,
}

/// `ucontext_t` up to the flags (arch/x86/include/uapi/asm/ucontext.h,
/// sigcontext.h). In cells: the unwinder reads it too.
#[repr(C)]
pub(crate) struct Context {
    head: [u64; 5],
    /// `r8` to `r15`, `rdi`, `rsi`, `rbp`, `rbx`, `rdx`, `rax`, `rcx`.
    registers: [u64; 15],
    pub(crate) rsp: Cell<u64>,
    pub(crate) rip: Cell<u64>,
    flags: Cell<u64>,
}

/// `EFLAGS.DF` and `.AC`: clear at a return.
const DIRECTION_AND_ALIGNMENT: u64 = 1 << 10 | 1 << 18;

/// Sees to it that the signals come to us: at the first guarded call, and at one
/// of [`SAMPLE_EVERY`] of them.
unsafe extern "C" fn look(graft: *const Graft) {
    // SAFETY: `ng_guarded` passes the graft that is called, on the worker's
    // thread in ordinary code.
    unsafe {
        let worker = &*((*graft).worker as *const Worker);
        worker.guard.left.set(SAMPLE_EVERY as u32 - 1);
        arm(worker);
    }
}

/// # Safety
/// On the worker's thread, in ordinary code.
unsafe fn arm(worker: &Worker) {
    let guard = &worker.guard;
    let pid = u64::from(sys::process());
    if guard.exceptions.get() == 0 {
        let none = guard.none.as_ptr() as u64;
        // SAFETY: libstdc++'s own function, on the thread whose it is.
        let own = || unsafe { worker.cxa_get_globals() } as u64;
        let has = worker.has(Import::CxaGetGlobals);
        guard.exceptions.set(if has { own() } else { none });
    }
    let first = guard.stack.get() == 0;
    if first && !make_stack(guard) {
        return guard.state.store(GUARD_DENIED, Relaxed);
    }
    let ours = ng_signal as *const () as u64;
    let mut state = GUARD_ON;
    let mut index = 0;
    while index < GUARDED_SIGNALS.len() {
        // SAFETY: both arrays have one for each.
        let (signal, is, saved) = unsafe { guard.of(index) };
        let now = Action::default();
        if !sys::action(signal, None, Some(&now)) {
            state = GUARD_DENIED;
        } else if now.handler.get() == ours {
            is.store(ACTION_OURS, Relaxed);
        } else if is.load(Relaxed) == ACTION_THEIRS {
            // Saved before it can be needed.
            saved.copy(&now);
            guard.pid.set(pid);
            guard.handler.set(ours);
            let action = Action::default();
            action.handler.set(ours);
            action.flags.set(FLAGS);
            action.restorer.set(restorer as *const () as u64 + 1);
            action.mask.set(BLOCKED);
            is.store(ACTION_OURS, Release);
            if sys::action(signal, Some(&action), Some(&now)) {
                saved.copy(&now);
            } else {
                is.store(ACTION_THEIRS, Relaxed);
                state = GUARD_DENIED;
            }
        } else {
            is.store(ACTION_TAKEN, Relaxed);
            state = GUARD_TAKEN;
        }
        index += 1;
    }
    guard.state.store(state, Release);
    if first {
        // The unwinder sorts tables the first time, which takes memory. Better
        // now than in the face of a crash.
        // SAFETY: in ordinary code the unwinder may be called.
        unsafe { crash::warm_up(worker) };
    }
}

/// Maps our stacks, and gives the thread an alternate one if it has none.
fn make_stack(guard: &Guard) -> bool {
    let Some(low) = sys::map(STACKS) else {
        return false;
    };
    let low = low as u64;
    // SAFETY: nothing of the new mapping is in use; the upper part is given to
    // the thread for good.
    unsafe {
        sys::forbid(low, PAGE as u64);
        if !sys::alternate_stack(low + UPPER as u64, (STACKS - UPPER) as u64) {
            sys::unmap(low as *mut u8, STACKS);
            return false;
        }
    }
    guard.stack.set(low + UPPER as u64);
    true
}

impl Guard {
    /// A signal, whose its action is, and the worker's own.
    ///
    /// # Safety
    /// `index` is below the number of [`GUARDED_SIGNALS`].
    unsafe fn of(&self, index: usize) -> (u32, &core::sync::atomic::AtomicU8, &Action) {
        // SAFETY: as the caller promises.
        unsafe {
            (
                *GUARDED_SIGNALS.as_ptr().add(index),
                &*self.ours.as_ptr().add(index),
                &*self.saved.as_ptr().add(index),
            )
        }
    }
}

impl Action {
    fn copy(&self, other: &Action) {
        self.handler.set(other.handler.get());
        self.flags.set(other.flags.get());
        self.restorer.set(other.restorer.get());
        self.mask.set(other.mask.get());
    }
}

/// The stack to look into a signal on; 0 for where we are.
unsafe extern "C" fn stack() -> u64 {
    // SAFETY: the handler is installed by a worker's bridge alone.
    let worker = unsafe { imports::worker() };
    let guard = &worker.guard;
    // Only where there is something to look into: whoever looks through the
    // thread's stacks for interrupted windows finds them by their signal frames.
    // In a child of `vfork` it may be in use by the parent.
    let mine = sys::thread_pointer() == worker.thread
        && worker.active.get() != 0
        && guard.handling.get() == 0
        && guard.pid.get() == u64::from(sys::process());
    if mine { guard.stack.get() } else { 0 }
}

unsafe extern "C" fn handle(signal: c_int, info: *const Info, context: *mut Context) {
    // SAFETY: the kernel's, or those of a handler that passes them on.
    unsafe {
        let worker = imports::worker();
        if !take(worker, signal, &*info, &*context) {
            give_back(worker, signal, info, context);
        }
    }
}

/// Ends the guarded call that raised the signal, if that is sound.
unsafe fn take(worker: &Worker, signal: c_int, info: &Info, context: &Context) -> bool {
    let guard = &worker.guard;
    if info.code <= 0 // sent by somebody
        || sys::thread_pointer() != worker.thread
        || guard.pid.get() != u64::from(sys::process())
        || worker.active.get() == 0
    {
        return false;
    }
    if guard.handling.get() != 0 {
        // Our own, in looking at a stack that is no whole one.
        context.rsp.set(guard.attempt.get());
        context.rip.set(crash::ng_gave_up as *const () as u64);
        return true;
    }
    // SAFETY: the chain links grafts; what is active is never unmapped.
    let graft = unsafe { &*(worker.active.get() as *const Graft) };
    let recovery = graft.recovery.get();
    if graft.busy.get() == 0
        || graft.call != ng_guarded as *const () as u64
        || context.rsp.get() >= recovery
    {
        return false;
    }
    let (rsp, rip) = (context.rsp.get(), context.rip.get());
    // SAFETY: the kernel's signal, on our stack, or on one of a handler's that
    // hands on to us.
    if !unsafe { crash::is_sound(worker, graft, info, context) } {
        context.rsp.set(rsp);
        context.rip.set(rip);
        return false;
    }
    let at = context.rip.get();
    context.rsp.set(recovery);
    context.rip.set(ng_recovered as *const () as u64);
    context
        .flags
        .set(context.flags.get() & !DIRECTION_AND_ALIGNMENT);
    graft.failure.set(FAILURE_CRASHED);
    graft.failure_code.set(signal);
    graft.crash.set(at);
    // SAFETY: the patcher wrote the address.
    let shared = unsafe { &*(graft.shared as *const SharedEdge) };
    shared.gate.store(0, Relaxed);
    graft.state.store(STATE_FAILED, Release);
    shared.crashed.store(signal as u8, Release);
    true
}

/// Has the kernel do what it would have done without us.
unsafe fn give_back(worker: &Worker, signal: c_int, info: *const Info, context: *mut Context) {
    let guard = &worker.guard;
    let mut index = 0;
    while index < GUARDED_SIGNALS.len() {
        // SAFETY: as in `arm`.
        let (number, is, saved) = unsafe { guard.of(index) };
        index += 1;
        if number != signal.cast_unsigned() {
            continue;
        }
        let now = Action::default();
        let known = sys::action(number, None, Some(&now));
        let handler = saved.handler.get();
        if known && now.handler.get() == ng_signal as *const () as u64 {
            is.store(ACTION_THEIRS, Relaxed);
            sys::action(number, Some(saved), None);
            // A child's actions are its own, its memory may be its parent's.
            guard.left.set(0);
        } else if now.handler.get() != handler {
            // Somebody who came after us calls us as the one before. What we
            // took the place of is called in the same way.
            if handler > 1 {
                type Handler = unsafe extern "C" fn(c_int, *const Info, *mut Context);
                // SAFETY: it was the process's handler.
                unsafe {
                    let handler: Handler = core::mem::transmute(handler as usize);
                    handler(signal, info, context);
                }
                return;
            }
            sys::action(number, Some(saved), None);
        }
        // Comes when we return and it is blocked no more. Should it be lost, an
        // instruction that faults does so again.
        // SAFETY: the kernel's, or as in `handle`.
        unsafe {
            if !sys::send_again(number, info.cast()) && (*info).code <= 0 {
                sys::send(number);
            }
        }
    }
}
