//! The callee's initialisers, on a thread that the bridge starts at the first
//! call: the worker is then in ordinary code and no lock of the C library is
//! held by us. Until they are through, requests take the RPC.
//!
//! ```text
//!  Armed ──first call──► Initialising ──► Initialised ──next call──► Ready
//!                            │                 └─(no memory)─► Failed
//!                            └──────────► Failed (gate off)
//! ```

use core::arch::naked_asm;
use core::ffi::c_void;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::abi::{
    FAILURE_EXCEPTION, FAILURE_FAAS_CREATE, FAILURE_FAAS_INIT, FAILURE_MEMORY, FAILURE_RELRO,
    FAILURE_THREAD, Graft, IfuncSlot, MODULE_INITIALISED, MODULE_INITIALISING, Module, STATE_ARMED,
    STATE_FAILED, STATE_INITIALISED, STATE_INITIALISING, STATE_READY, SharedEdge, Worker,
};
use crate::{call, exit, legacy, sys, tls, unwind};

type Resolver = unsafe extern "C" fn() -> u64;

/// A step's outcome: else a `FAILURE_…` and the code that goes with it.
type Outcome = Result<(), (u32, i32)>;

/// What a call does about a graft that is not ready; true if it is now.
///
/// # Safety
/// On the worker's thread, in ordinary code.
#[cold]
#[inline(never)]
pub unsafe fn advance(graft: &Graft, worker: &Worker) -> bool {
    // SAFETY: as the caller promises; each state is left once.
    unsafe {
        match graft.state.load(Acquire) {
            STATE_ARMED => begin(graft, worker),
            STATE_INITIALISED => match legacy::adopt(graft, worker) {
                Ok(()) => {
                    graft.state.store(STATE_READY, Release);
                    return true;
                }
                Err(failure) => fail(graft, failure),
            },
            _ => {}
        }
    }
    false
}

/// Starts the thread.
unsafe fn begin(graft: &Graft, worker: &Worker) {
    graft.state.store(STATE_INITIALISING, Release);
    mark(graft, 1);
    let mut thread = 0_u64;
    // SAFETY: the graft outlives the thread.
    unsafe {
        let argument = core::ptr::from_ref(graft).cast_mut().cast();
        let error = worker.pthread_create(&mut thread, core::ptr::null(), run, argument);
        if error != 0 {
            return fail(graft, (FAILURE_THREAD, error));
        }
        worker.pthread_detach(thread);
    }
}

/// Says where the agent sees it, also when the worker has died meanwhile, that
/// the initialisers run.
fn mark(graft: &Graft, running: u8) {
    // SAFETY: the patcher wrote the address.
    unsafe {
        (*(graft.shared as *const SharedEdge))
            .initialising
            .store(running, Release);
    }
}

fn fail(graft: &Graft, (failure, code): (u32, i32)) {
    mark(graft, 0);
    graft.failure.set(failure);
    graft.failure_code.set(code);
    // SAFETY: the patcher wrote the address.
    unsafe {
        (*(graft.shared as *const SharedEdge))
            .gate
            .store(0, Relaxed);
    };
    graft.state.store(STATE_FAILED, Release);
}

/// What [`guarded`] gives, in `rax` and `rdx`.
#[repr(C)]
struct Guarded {
    result: i64,
    /// Not 0: an exception came instead of a result.
    threw: u64,
}

/// Calls `function` with the arguments, for `graft` if that is not null. An
/// exception ends here; forced unwinding passes, and what it passes then is
/// plain frames of ours, in which nothing runs any more.
#[unsafe(naked)]
unsafe extern "C" fn guarded(
    function: u64,
    first: u64,
    second: u64,
    third: u64,
    fourth: u64,
    graft: *const Graft,
) -> Guarded {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_personality 0x1b, {personality}", // pcrel, sdata4
        "endbr64",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "push r9",
        "push r9",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov rcx, r8",
        "call rax",
        "cdqe",
        "xor edx, edx",
        "leave",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
        personality = sym unwind::guarded_personality,
    );
}

/// Where an exception ends: in [`guarded`]'s frame.
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
        "mov rdi, rax",
        "call {end}",
        "mov edx, 1",
        "leave",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
        end = sym unwind::end,
    );
}

/// Where forced unwinding comes through: an initialiser ended its thread.
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
        "mov rdi, [rbp - 8]",
        "push rax",
        "push rax",
        "call {ended}",
        "call {resume}",
        "pop rdi",
        "pop rdi",
        "call rax",
        "ud2", // it does not come back
        ".cfi_endproc",
        ended = sym ended,
        resume = sym unwind::resume,
    );
}

unsafe extern "C" fn ended(graft: *const Graft) {
    if !graft.is_null() {
        // SAFETY: this is the thread of its initialisers.
        unsafe { finish(&*graft, Err((FAILURE_EXCEPTION, 0))) };
    }
}

/// [`guarded`], on the initialisers' thread.
unsafe fn checked(graft: &Graft, function: u64, arguments: [u64; 4]) -> Result<i32, (u32, i32)> {
    let [first, second, third, fourth] = arguments;
    // SAFETY: a function of the callee's, with its arguments.
    let Guarded { result, threw } =
        unsafe { guarded(function, first, second, third, fourth, graft) };
    match threw {
        0 => Ok(result as i32),
        _ => Err((FAILURE_EXCEPTION, 0)),
    }
}

/// The thread's routine.
unsafe extern "C" fn run(graft: *mut c_void) -> *mut c_void {
    // SAFETY: `begin` passed the graft; while it is initialising no other
    // thread touches the fields used here.
    unsafe {
        let graft = &*(graft as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        finish(graft, initialise(graft, worker));
    }
    core::ptr::null_mut()
}

/// Takes off the thread what is not its own, and says how it went.
unsafe fn finish(graft: &Graft, mut outcome: Outcome) {
    // SAFETY: as for `run`.
    unsafe {
        if !legacy::leave(graft, &*(graft.worker as *const Worker)) && outcome.is_ok() {
            outcome = Err((FAILURE_MEMORY, 0));
        }
    }
    match outcome {
        Ok(()) => {
            mark(graft, 0);
            graft.state.store(STATE_INITIALISED, Release);
        }
        Err(failure) => fail(graft, failure),
    }
}

unsafe fn initialise(graft: &Graft, worker: &Worker) -> Outcome {
    // SAFETY: slots, functions and ranges were computed by the patcher for
    // these images, and the order is the dynamic linker's own: relocations,
    // RELRO, thread-local storage, initialisers.
    unsafe {
        // A thread starts with its creator's modes, and the caller may have
        // changed its own.
        sys::set_modes(sys::DEFAULT_MODES);
        // Two grafts may get ready at once: both store the same.
        if worker.memcpy_resolver != 0 {
            let resolver: Resolver = core::mem::transmute(worker.memcpy_resolver as usize);
            worker.memcpy.set(resolver());
        }
        worker.xsave_len.set(sys::xsave_len());
        tls::create_key(graft, worker)?;
        if !legacy::begin(graft, worker) {
            return Err((FAILURE_MEMORY, 0));
        }
        unwind::register(graft, worker);
        // Before the first constructor: exit handlers run last first, and
        // what constructors register comes before what the linker's own
        // finalisers do.
        if !exit::register(graft, worker) {
            return Err((FAILURE_MEMORY, 0));
        }
        // What an image depends on comes behind it: bound before it, as its
        // own resolvers may call there.
        let modules = graft.modules as *const Module;
        let mut left = graft.module_count as usize;
        while left > 0 {
            left -= 1;
            let error = bind(&*modules.add(left));
            if error != 0 {
                return Err((FAILURE_RELRO, error));
            }
        }
        if !tls::make_all(graft) {
            return Err((FAILURE_MEMORY, 0));
        }
        let order = graft.init_order as *const u64;
        let mut index = 0;
        while index < graft.init_order_count as usize {
            if !construct(graft, &*(*order.add(index) as *const Module), graft) {
                return Err((FAILURE_EXCEPTION, 0));
            }
            index += 1;
        }
        let code = checked(graft, graft.faas_init, [0; 4])?;
        if code != 0 {
            return Err((FAILURE_FAAS_INIT, code));
        }
        let mut handle = 0_u64;
        let arguments = [
            core::ptr::from_ref(graft) as u64,
            call::ng_invoke as *const () as u64,
            call::ng_append as *const () as u64,
            &raw mut handle as u64,
        ];
        let code = checked(graft, graft.faas_create, arguments)?;
        if code != 0 {
            return Err((FAILURE_FAAS_CREATE, code));
        }
        graft.handle.set(handle);
        graft.modes.set(sys::modes(false) & !sys::EXCEPTION_FLAGS);
        Ok(())
    }
}

/// Fills the slots whose values only the process knows and seals what RELRO
/// covers; gives 0 or an errno.
unsafe fn bind(module: &Module) -> i32 {
    let slots = module.ifuncs as *const IfuncSlot;
    let mut index = 0;
    // SAFETY: the patcher computed slots, resolvers and range for this image.
    unsafe {
        while index < module.ifunc_count as usize {
            let IfuncSlot {
                slot,
                resolver,
                addend,
            } = *slots.add(index);
            let resolver: Resolver = core::mem::transmute(resolver as usize);
            (slot as *mut u64).write_unaligned(resolver().wrapping_add(addend));
            index += 1;
        }
        match module.relro.len {
            0 => 0,
            len => sys::seal(module.relro.start, len),
        }
    }
}

/// Runs an image's initialisers, once; false if one of them let an exception
/// out. `thread` is the graft on the thread of its initialisers, else null.
///
/// # Safety
/// The module is bound, and is one of the graft's.
pub(crate) unsafe fn construct(graft: &Graft, module: &Module, thread: *const Graft) -> bool {
    if module.initialised.get() != 0 {
        return true;
    }
    module.initialised.set(MODULE_INITIALISING);
    // SAFETY: as the caller promises.
    unsafe { run_initialisers(graft, module, thread) }
}

/// The same for a module that is marked [`MODULE_INITIALISING`] already.
///
/// # Safety
/// As for [`construct`].
pub(crate) unsafe fn run_initialisers(
    graft: &Graft,
    module: &Module,
    thread: *const Graft,
) -> bool {
    let inits = module.inits as *const u64;
    let mut index = 0;
    while index < module.init_count as usize {
        // SAFETY: the patcher computed the addresses for this image.
        let threw = unsafe {
            let init = *inits.add(index);
            guarded(init, graft.argc, graft.argv, graft.environ, 0, thread).threw
        };
        if threw != 0 {
            return false;
        }
        index += 1;
    }
    module.initialised.set(MODULE_INITIALISED);
    true
}
