//! The images' finalisers (`DT_FINI_ARRAY`, `DT_FINI`), when the process exits.

use core::ffi::c_void;
use core::sync::atomic::Ordering::Acquire;

use crate::abi::{
    FAILURE_CRASHED, FAILURE_EXCEPTION, Graft, MODULE_INITIALISED, Module, STATE_FAILED, Worker,
};

type Finaliser = unsafe extern "C" fn();

/// Asks the C library to run them; false if it has no memory.
///
/// # Safety
/// On the initialisers' thread, before the first initialiser.
pub(crate) unsafe fn register(graft: &Graft, worker: &Worker) -> bool {
    let graft = core::ptr::from_ref(graft).cast_mut().cast();
    // SAFETY: the graft is never unmapped. No handle: the handler belongs to
    // no library that can be closed.
    unsafe { worker.cxa_atexit(ng_exit, graft, core::ptr::null()) == 0 }
}

/// The handler: modules that were loaded on demand, then the others, in the
/// reverse of the order of their initialisation.
///
/// # Safety
/// Called by the C library alone.
pub unsafe extern "C" fn ng_exit(graft: *mut c_void) {
    // SAFETY: `register` passed the graft; its records are the patcher's.
    unsafe {
        let graft = &*(graft as *const Graft);
        if graft.state.load(Acquire) == STATE_FAILED && graft.failure.get() == FAILURE_CRASHED {
            // It was left in the middle of something: not called any more.
            return;
        }
        // As the dynamic linker does, also where `exit` comes from within an
        // initialiser; not where one was left half done.
        let broken =
            graft.state.load(Acquire) == STATE_FAILED && graft.failure.get() == FAILURE_EXCEPTION;
        let modules = graft.modules as *const Module;
        let mut left = graft.module_count as usize;
        while left > 0 {
            left -= 1;
            let module = &*modules.add(left);
            if module.on_demand != 0 {
                finalise(module, broken);
            }
        }
        let order = graft.init_order as *const u64;
        left = graft.init_order_count as usize;
        while left > 0 {
            left -= 1;
            finalise(&*(*order.add(left) as *const Module), broken);
        }
    }
}

unsafe fn finalise(module: &Module, broken: bool) {
    let done = module.initialised.replace(0);
    if done == 0 || broken && done != MODULE_INITIALISED {
        return;
    }
    let finis = module.finis as *const u64;
    let mut index = 0;
    while index < module.fini_count as usize {
        // SAFETY: the patcher computed the addresses for this image.
        unsafe {
            let fini: Finaliser = core::mem::transmute(*finis.add(index) as usize);
            fini();
        }
        index += 1;
    }
}
