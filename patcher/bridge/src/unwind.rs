//! What unwinds through us: C++ exceptions that leave a callee, and forced
//! unwinding (`pthread_exit`, cancellation), which passes.
//!
//! Exceptions stop where the caller's code begins. To it the call is an RPC,
//! and its compiler may have taken it for one that throws nothing.
//!
//! ```text
//!  Foo's code       not its affair           passes
//!   stub            (entered by a jump: not on the stack)
//!   ng_enter        caught: -1, no output     put in order, passes
//!   ng_nested       the same, between Bar and what Bar calls
//!  Bar's code       exception ──┘             pthread_exit ──┘
//! ```
//!
//! Only [`ng_enter`](crate::entry::ng_enter) and what calls initialisers have a
//! personality routine (System V ABI, x86-64: 6.2; Itanium C++ ABI: level
//! I). It has no tables to read: a function has one landing pad for exceptions
//! and one for forced unwinding, functions of their own that run in its frame.

use core::ffi::{c_int, c_void};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::abi::{Graft, Import, Module, Worker};
use crate::{entry, imports, start};

/// `_UA_SEARCH_PHASE`.
const SEARCH_PHASE: c_int = 1;
/// `_UA_HANDLER_FRAME`.
const HANDLER_FRAME: c_int = 4;
/// `_UA_FORCE_UNWIND`.
const FORCE_UNWIND: c_int = 8;

/// `_URC_FATAL_PHASE1_ERROR`.
const FATAL_PHASE1_ERROR: c_int = 3;
/// `_URC_HANDLER_FOUND`.
const HANDLER_FOUND: c_int = 6;
/// `_URC_INSTALL_CONTEXT`.
const INSTALL_CONTEXT: c_int = 7;
/// `_URC_CONTINUE_UNWIND`.
const CONTINUE_UNWIND: c_int = 8;

/// `GNUCC++` with the byte that tells primary and dependent exceptions apart
/// cut off.
const GNU_CXX: u64 = 0x0047_4e55_4343_2b2b;

/// Two landing pads; they find the exception's address in `rax`.
struct Landings {
    caught: u64,
    forced: u64,
}

/// Personality of [`entry::ng_enter`].
pub(crate) unsafe extern "C" fn enter_personality(
    version: c_int,
    actions: c_int,
    _class: u64,
    exception: *mut c_void,
    context: *mut c_void,
) -> c_int {
    let landings = Landings {
        caught: entry::landing_caught as *const () as u64,
        forced: entry::landing_forced as *const () as u64,
    };
    // SAFETY: called by the unwinder alone.
    unsafe { personality(version, actions, exception, context, &landings) }
}

/// Personality of `start::guarded`.
pub(crate) unsafe extern "C" fn guarded_personality(
    version: c_int,
    actions: c_int,
    _class: u64,
    exception: *mut c_void,
    context: *mut c_void,
) -> c_int {
    let landings = Landings {
        caught: start::landing_caught as *const () as u64,
        forced: start::landing_forced as *const () as u64,
    };
    // SAFETY: as above.
    unsafe { personality(version, actions, exception, context, &landings) }
}

unsafe fn personality(
    version: c_int,
    actions: c_int,
    exception: *mut c_void,
    context: *mut c_void,
    landings: &Landings,
) -> c_int {
    if version != 1 {
        return FATAL_PHASE1_ERROR;
    }
    // SAFETY: the image is loaded.
    let worker = unsafe { imports::worker() };
    if !worker.has(Import::UnwindSetGr)
        || !worker.has(Import::UnwindSetIp)
        || !worker.has(Import::UnwindResume)
    {
        // Another unwinder than the worker's, which has none: its contexts are
        // not ours to change.
        return CONTINUE_UNWIND;
    }
    if actions & SEARCH_PHASE != 0 {
        return HANDLER_FOUND;
    }
    let landing = if actions & FORCE_UNWIND != 0 {
        landings.forced
    } else if actions & HANDLER_FRAME != 0 {
        landings.caught
    } else {
        return CONTINUE_UNWIND;
    };
    // SAFETY: the context is the unwinder's; an unwinder that got here is the
    // one that the worker has.
    unsafe {
        worker.unwind_set_gr(context, 0, exception as u64); // rax
        worker.unwind_set_ip(context, landing);
    }
    INSTALL_CONTEXT
}

/// Ends an exception that was caught.
///
/// # Safety
/// In a landing pad, with the exception that led there.
pub(crate) unsafe extern "C" fn end(exception: *mut c_void) {
    // SAFETY: an `_Unwind_Exception` begins with its class.
    unsafe {
        let worker = imports::worker();
        let class = exception.cast::<u64>().read();
        if class >> 8 == GNU_CXX
            && worker.has(Import::CxaBeginCatch)
            && worker.has(Import::CxaEndCatch)
        {
            worker.cxa_begin_catch(exception);
            worker.cxa_end_catch();
        } else if worker.has(Import::UnwindDeleteException) {
            worker.unwind_delete_exception(exception);
        }
    }
}

/// `_Unwind_Resume`, for the end of a landing pad. There is one: it was the
/// same library that led there.
///
/// # Safety
/// As for [`imports::worker`].
pub(crate) unsafe extern "C" fn resume() -> u64 {
    // SAFETY: as the caller promises.
    unsafe { imports::worker().imports[Import::UnwindResume as usize] }
}

/// Makes the images', the stubs' and our own unwind tables known to the
/// worker's unwinder. Without them an exception would end the worker at the
/// first frame that nobody knows.
///
/// # Safety
/// On the initialisers' thread, once per graft.
pub(crate) unsafe fn register(graft: &Graft, worker: &Worker) {
    if !worker.has(Import::RegisterFrame) {
        return;
    }
    // SAFETY: the patcher gave zero-terminated tables of what it mapped, and
    // that is never unmapped.
    unsafe {
        register_own(worker);
        tables(worker, graft.stub_eh_frame);
        let modules = graft.modules as *const Module;
        let mut index = 0;
        while index < graft.module_count as usize {
            table(worker, (*modules.add(index)).eh_frame);
            index += 1;
        }
    }
}

/// The same for our own alone, once: whether frames of ours are known. Not while
/// another thread is at it.
///
/// # Safety
/// In ordinary code: the unwinder allocates.
#[inline(always)]
pub(crate) unsafe fn register_own(worker: &Worker) -> bool {
    match worker.eh_frame_registered.load(Acquire) {
        REGISTERED => true,
        // SAFETY: as the caller promises.
        _ => unsafe { claim_own(worker) },
    }
}

/// [`Worker::eh_frame_registered`]: a thread is at it.
const REGISTERING: u8 = 1;
/// [`Worker::eh_frame_registered`]: done, or there is no unwinder to know it.
const REGISTERED: u8 = 2;

#[cold]
#[inline(never)]
unsafe fn claim_own(worker: &Worker) -> bool {
    let state = &worker.eh_frame_registered;
    if state
        .compare_exchange(0, REGISTERING, AcqRel, Relaxed)
        .is_err()
    {
        return state.load(Acquire) == REGISTERED;
    }
    if worker.has(Import::RegisterFrame) {
        // SAFETY: as for `register`.
        unsafe { table(worker, worker.eh_frame) };
    }
    state.store(REGISTERED, Release);
    true
}

/// Tables one after another, up to an empty one.
unsafe fn tables(worker: &Worker, first: u64) {
    if first == 0 {
        return;
    }
    let mut at = first as *const u8;
    // SAFETY: as the caller promises; an entry begins with the length of what
    // follows, 0 where a table ends.
    unsafe {
        while at.cast::<u32>().read_unaligned() != 0 {
            table(worker, at as u64);
            let mut length = 1;
            while length != 0 {
                length = at.cast::<u32>().read_unaligned();
                at = at.add(4 + length as usize);
            }
        }
    }
}

unsafe fn table(worker: &Worker, eh_frame: u64) {
    if eh_frame != 0 {
        // SAFETY: as the caller promises.
        unsafe { worker.register_frame(eh_frame) };
    }
}
