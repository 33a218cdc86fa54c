//! What the initialisers leave to the worker's thread.
//!
//! In the callee's own worker the thread that runs the initialisers is the one
//! that serves requests later. Here it is a thread of the bridge's, which
//! ends. So what they bind to their thread goes to the worker's thread before
//! its first fused call: thread-local storage, values of thread keys, and the
//! destructors of thread-local C++ objects.
//!
//! ```text
//!  initialisers' thread                        worker's thread
//!    begin: lists
//!    ng_setspecific, ng_thread_atexit: noted
//!    leave: taken off the thread ──Initialised──► adopt: put on the thread
//! ```
//!
//! Only what images themselves bind is moved: what the worker's libraries keep
//! per thread is theirs.

use core::ffi::{c_int, c_void};
use core::sync::atomic::Ordering::Relaxed;

use crate::abi::{FAILURE_MEMORY, Graft, Module, Worker};
use crate::{sys, tls};

/// `ENOMEM`, `EINVAL`.
const ENOMEM: c_int = 12;
const EINVAL: c_int = 22;

/// [`Graft::legacy`] points at it. Made by [`begin`], freed by [`adopt`]; an
/// initialisation that failed keeps it, as threads that it started may use
/// what hangs on it.
#[repr(C)]
struct Legacy {
    /// Table of blocks of thread-local storage, 0 for none.
    table: u64,
    /// Keys and, once left, their values.
    keys: List,
    /// Destructors, objects, handles.
    destructors: List,
    /// There was no memory for an entry of `destructors`.
    lost: bool,
}

/// A growing array in `malloc`ed memory.
#[repr(C)]
struct List {
    start: u64,
    len: usize,
    capacity: usize,
}

type Entry = [u64; 3];

impl List {
    /// The `index`th of `len`.
    unsafe fn at(&self, index: usize) -> *mut Entry {
        // SAFETY: as the callers promise.
        unsafe { (self.start as *mut Entry).add(index) }
    }

    /// Adds `entry`; false if there is no memory for it.
    unsafe fn push(&mut self, worker: &Worker, entry: Entry) -> bool {
        // SAFETY: the array is ours.
        unsafe {
            if self.len == self.capacity {
                let capacity = self.capacity * 2 + 8;
                let new = worker.malloc(capacity * size_of::<Entry>());
                if new.is_null() {
                    return false;
                }
                if self.len != 0 {
                    core::ptr::copy_nonoverlapping(self.at(0), new.cast(), self.len);
                    worker.free(self.start as *mut u8);
                }
                (self.start, self.capacity) = (new as u64, capacity);
            }
            self.at(self.len).write(entry);
        }
        self.len += 1;
        true
    }

    unsafe fn free(&self, worker: &Worker) {
        if self.capacity != 0 {
            // SAFETY: the array is ours.
            unsafe { worker.free(self.start as *mut u8) };
        }
    }
}

/// Makes this thread the graft's initialisers'; false if there is no memory.
///
/// # Safety
/// On that thread, before the first initialiser.
pub(crate) unsafe fn begin(graft: &Graft, worker: &Worker) -> bool {
    // SAFETY: `malloc` gave it.
    unsafe {
        let legacy = worker.malloc(size_of::<Legacy>()).cast::<Legacy>();
        if legacy.is_null() {
            return false;
        }
        legacy.write_bytes(0, 1);
        graft.legacy.set(legacy as u64);
    }
    graft.initialiser.store(sys::thread_pointer(), Relaxed);
    true
}

/// Takes off this thread what the initialisers bound to it, so that nothing of
/// it is destroyed at its end. False if something was lost before.
///
/// # Safety
/// On the initialisers' thread, after the last initialiser. May be called
/// more than once.
pub(crate) unsafe fn leave(graft: &Graft, worker: &Worker) -> bool {
    if graft.initialiser.load(Relaxed) != sys::thread_pointer() {
        return true;
    }
    graft.initialiser.store(0, Relaxed);
    // SAFETY: `begin` made it on this thread; the keys were valid when they
    // were set, and one that was deleted since reads as 0.
    unsafe {
        let legacy = &mut *(graft.legacy.get() as *mut Legacy);
        legacy.table = tls::give_up(graft, worker);
        let mut index = 0;
        while index < legacy.keys.len {
            let entry = &mut *legacy.keys.at(index);
            let key = entry[0] as u32;
            entry[1] = worker.pthread_getspecific(key);
            if entry[1] != 0 {
                worker.pthread_setspecific(key, 0);
            }
            index += 1;
        }
        !legacy.lost
    }
}

/// Puts it on this thread. Gives the failure and its code.
///
/// # Safety
/// On the worker's thread, with the graft initialised.
pub(crate) unsafe fn adopt(graft: &Graft, worker: &Worker) -> Result<(), (u32, i32)> {
    // SAFETY: the initialisers' thread has left it to this one.
    unsafe {
        let address = graft.legacy.replace(0);
        if address == 0 {
            return Ok(());
        }
        let legacy = &*(address as *const Legacy);
        let mut error = tls::adopt(graft, worker, legacy.table);
        let mut index = 0;
        while index < legacy.keys.len && error == 0 {
            let [key, value, _] = *legacy.keys.at(index);
            if value != 0 {
                error = worker.pthread_setspecific(key as u32, value);
                // Deleted in between, by a thread of the callee's.
                if error == EINVAL {
                    error = 0;
                }
            }
            index += 1;
        }
        index = 0;
        while index < legacy.destructors.len && error == 0 {
            let [destructor, object, dso] = *legacy.destructors.at(index);
            error = worker.thread_atexit(destructor, object, dso);
            index += 1;
        }
        if error != 0 {
            return Err((FAILURE_MEMORY, error));
        }
        legacy.keys.free(worker);
        legacy.destructors.free(worker);
        worker.free(address as *mut u8);
        Ok(())
    }
}

/// The lists of this thread, if it runs the graft's initialisers.
unsafe fn noting(graft: &Graft) -> Option<*mut Legacy> {
    (graft.initialiser.load(Relaxed) == sys::thread_pointer())
        .then(|| graft.legacy.get() as *mut Legacy)
}

/// `pthread_setspecific` for an image.
///
/// # Safety
/// `module` is the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_setspecific(
    key: u32,
    value: *const c_void,
    module: *const Module,
) -> c_int {
    // SAFETY: the patcher wrote the records; the lists are this thread's.
    unsafe {
        let graft = &*((*module).graft as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        if let Some(legacy) = noting(graft) {
            let keys = &mut (*legacy).keys;
            let mut index = 0;
            while index < keys.len && (*keys.at(index))[0] != u64::from(key) {
                index += 1;
            }
            if index == keys.len && !keys.push(worker, [u64::from(key), 0, 0]) {
                return ENOMEM;
            }
        }
        worker.pthread_setspecific(key, value as u64)
    }
}

/// `tss_set` for an image.
///
/// # Safety
/// As for [`ng_setspecific`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_tss_set(
    key: u32,
    value: *const c_void,
    module: *const Module,
) -> c_int {
    // SAFETY: as the caller promises.
    match unsafe { ng_setspecific(key, value, module) } {
        0 => 0,      // thrd_success
        ENOMEM => 3, // thrd_nomem
        _ => 2,      // thrd_error
    }
}

/// `__cxa_thread_atexit` and `__cxa_thread_atexit_impl` for an image.
///
/// # Safety
/// As for [`ng_setspecific`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_thread_atexit(
    destructor: u64,
    object: u64,
    dso: u64,
    module: *const Module,
) -> c_int {
    // SAFETY: as above.
    unsafe {
        let graft = &*((*module).graft as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        match noting(graft) {
            Some(legacy) => {
                if !(*legacy)
                    .destructors
                    .push(worker, [destructor, object, dso])
                {
                    // Compiled code does not look at the result.
                    (*legacy).lost = true;
                    return -1;
                }
                0
            }
            None => worker.thread_atexit(destructor, object, dso),
        }
    }
}
