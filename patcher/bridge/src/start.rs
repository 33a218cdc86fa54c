//! The callee's initialisers, on a thread that the bridge starts at the first
//! call: the worker is then in ordinary code and no lock of the C library is
//! held by us. Until they are through, requests take the RPC.
//!
//! ```text
//!  Armed ──first call──► Initialising ──► Initialised ──next call──► Ready
//!                            │                 └─(no memory)─► Failed
//!                            └──────────► Failed (gate off)
//! ```

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::abi::{
    FAILURE_FAAS_CREATE, FAILURE_FAAS_INIT, FAILURE_MEMORY, FAILURE_RELRO, FAILURE_THREAD, Graft,
    IfuncSlot, MODULE_INITIALISED, MODULE_INITIALISING, Module, STATE_ARMED, STATE_FAILED,
    STATE_INITIALISED, STATE_INITIALISING, STATE_READY, SharedEdge, Worker,
};
use crate::{call, legacy, sys, tls};

type Resolver = unsafe extern "C" fn() -> u64;
type Initialiser = unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char);
type FaasInit = unsafe extern "C" fn() -> c_int;
type FaasCreate = unsafe extern "C" fn(
    *mut c_void,
    unsafe extern "C" fn(
        *mut c_void,
        *const c_char,
        *const u8,
        usize,
        *mut *const u8,
        *mut usize,
    ) -> c_int,
    unsafe extern "C" fn(*mut c_void, *const u8, usize),
    *mut *mut c_void,
) -> c_int;

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

fn fail(graft: &Graft, (failure, code): (u32, i32)) {
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

/// The thread's routine.
unsafe extern "C" fn run(graft: *mut c_void) -> *mut c_void {
    // SAFETY: `begin` passed the graft; while it is initialising no other
    // thread touches the fields used here.
    unsafe {
        let graft = &*(graft as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        let mut outcome = initialise(graft, worker);
        if !legacy::leave(graft, worker) && outcome.is_ok() {
            outcome = Err((FAILURE_MEMORY, 0));
        }
        match outcome {
            Ok(()) => graft.state.store(STATE_INITIALISED, Release),
            Err(failure) => fail(graft, failure),
        }
    }
    core::ptr::null_mut()
}

unsafe fn initialise(graft: &Graft, worker: &Worker) -> Outcome {
    // SAFETY: slots, functions and ranges were computed by the patcher for
    // these images, and the order is the dynamic linker's own: relocations,
    // RELRO, thread-local storage, initialisers.
    unsafe {
        // A thread starts with its creator's modes, and the caller may have
        // changed its own.
        sys::set_floating_point(sys::DEFAULT_MXCSR, sys::DEFAULT_FPUCW);
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
            construct(graft, &*(*order.add(index) as *const Module));
            index += 1;
        }
        let faas_init: FaasInit = core::mem::transmute(graft.faas_init as usize);
        let code = faas_init();
        if code != 0 {
            return Err((FAILURE_FAAS_INIT, code));
        }
        let faas_create: FaasCreate = core::mem::transmute(graft.faas_create as usize);
        let mut handle = core::ptr::null_mut();
        let context = core::ptr::from_ref(graft).cast_mut().cast();
        let code = faas_create(context, call::ng_invoke, call::ng_append, &mut handle);
        if code != 0 {
            return Err((FAILURE_FAAS_CREATE, code));
        }
        graft.handle.set(handle as u64);
        let (mxcsr, fpucw) = sys::floating_point(false);
        graft.mxcsr.set(mxcsr & !0x3f);
        graft.fpucw.set(u32::from(fpucw));
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

/// Runs an image's initialisers, once.
pub(crate) unsafe fn construct(graft: &Graft, module: &Module) {
    if module.initialised.get() != 0 {
        return;
    }
    module.initialised.set(MODULE_INITIALISING);
    let inits = module.inits as *const u64;
    let mut index = 0;
    // SAFETY: as for `bind`.
    unsafe {
        while index < module.init_count as usize {
            let init: Initialiser = core::mem::transmute(*inits.add(index) as usize);
            init(
                graft.argc as c_int,
                graft.argv as *const *const c_char,
                graft.environ as *const *const c_char,
            );
            index += 1;
        }
    }
    module.initialised.set(MODULE_INITIALISED);
}
