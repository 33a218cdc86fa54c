//! The callee's initialisers, on a thread that the bridge starts at the first
//! call: the worker is then in ordinary code and no lock of the C library is
//! held by us. Until they are through, requests take the RPC.
//!
//! ```text
//!  Armed ──first call──► Initialising ──► Ready
//!                            └──────────► Failed (gate off)
//! ```

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::Ordering::{Relaxed, Release};

use crate::abi::{
    FAILURE_FAAS_CREATE, FAILURE_FAAS_INIT, FAILURE_RELRO, FAILURE_THREAD, Graft, IfuncSlot,
    Import, Module, STATE_FAILED, STATE_INITIALISING, STATE_READY, SharedEdge, Worker,
};
use crate::{call, sys};

type PthreadCreate = unsafe extern "C" fn(
    *mut u64,
    *const c_void,
    unsafe extern "C" fn(*mut c_void) -> *mut c_void,
    *mut c_void,
) -> c_int;
type PthreadDetach = unsafe extern "C" fn(u64) -> c_int;
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

/// Starts the thread.
///
/// # Safety
/// On the worker's thread, in ordinary code, with the graft armed.
#[cold]
#[inline(never)]
pub unsafe fn begin(graft: &Graft, worker: &Worker) {
    graft.state.store(STATE_INITIALISING, Release);
    let mut thread = 0_u64;
    // SAFETY: the patcher resolved both in the worker's own C library.
    unsafe {
        let create: PthreadCreate =
            core::mem::transmute(worker.imports[Import::PthreadCreate as usize] as usize);
        let error = create(
            &mut thread,
            core::ptr::null(),
            run,
            core::ptr::from_ref(graft).cast_mut().cast(),
        );
        if error != 0 {
            fail(graft, FAILURE_THREAD, error);
            return;
        }
        let detach: PthreadDetach =
            core::mem::transmute(worker.imports[Import::PthreadDetach as usize] as usize);
        detach(thread);
    }
}

fn fail(graft: &Graft, failure: u32, code: i32) {
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
        initialise(graft, worker);
    }
    core::ptr::null_mut()
}

unsafe fn initialise(graft: &Graft, worker: &Worker) {
    // SAFETY: slots, functions and ranges were computed by the patcher for
    // this image, and the order is the dynamic linker's own: relocations,
    // RELRO, initialisers.
    unsafe {
        // A thread starts with its creator's modes, and the caller may have
        // changed its own.
        sys::set_floating_point(sys::DEFAULT_MXCSR, sys::DEFAULT_FPUCW);
        if worker.memcpy_resolver != 0 {
            // Two grafts may get ready at once: both store the same.
            let resolver: Resolver = core::mem::transmute(worker.memcpy_resolver as usize);
            worker.memcpy.set(resolver());
        }
        // What an image depends on comes behind it: bound before it, as its
        // own resolvers may call there.
        let modules = graft.modules as *const Module;
        let mut left = graft.module_count as usize;
        while left > 0 {
            left -= 1;
            let error = bind(&*modules.add(left));
            if error != 0 {
                return fail(graft, FAILURE_RELRO, error);
            }
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
            return fail(graft, FAILURE_FAAS_INIT, code);
        }
        let faas_create: FaasCreate = core::mem::transmute(graft.faas_create as usize);
        let mut handle = core::ptr::null_mut();
        let context = core::ptr::from_ref(graft).cast_mut().cast();
        let code = faas_create(context, call::ng_invoke, call::ng_append, &mut handle);
        if code != 0 {
            return fail(graft, FAILURE_FAAS_CREATE, code);
        }
        graft.handle.set(handle as u64);
        let (mxcsr, fpucw) = sys::floating_point(false);
        graft.mxcsr.set(mxcsr & !0x3f);
        graft.fpucw.set(u32::from(fpucw));
        graft.state.store(STATE_READY, Release);
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
unsafe fn construct(graft: &Graft, module: &Module) {
    if module.initialised.replace(1) != 0 {
        return;
    }
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
}
