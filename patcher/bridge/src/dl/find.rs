//! `dlsym` and `dlvsym`.

use core::ffi::c_char;

use super::{RTLD_DL_LINKMAP, RTLD_LAZY, RTLD_NOLOAD, error, forget_error, records};
use crate::abi::{Graft, Module, ScopeEntry, Worker};
use crate::symbols::{by_handle, by_name, lookup, module, needed, value};

const RTLD_DEFAULT: u64 = 0;
const RTLD_NEXT: u64 = u64::MAX;

/// `dlsym`.
///
/// # Safety
/// As the C function; `module` is the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dlsym(handle: u64, name: *const c_char, module: *const Module) -> u64 {
    // SAFETY: as the caller promises.
    unsafe { find(handle, name, core::ptr::null(), module) }
}

/// `dlvsym`.
///
/// # Safety
/// As the C function; `module` is the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dlvsym(
    handle: u64,
    name: *const c_char,
    version: *const c_char,
    module: *const Module,
) -> u64 {
    // SAFETY: as the caller promises.
    unsafe { find(handle, name, version, module) }
}

unsafe fn find(
    handle: u64,
    name: *const c_char,
    version: *const c_char,
    caller: *const Module,
) -> u64 {
    // SAFETY: as the callers promise.
    unsafe {
        let (caller, graft, worker) = records(caller);
        let of_handle = by_handle(graft, handle);
        if of_handle.is_none() && handle != RTLD_DEFAULT && handle != RTLD_NEXT {
            forget_error(graft);
            return theirs(worker, handle, name, version);
        }
        // A symbol's value may be 0, but who asks can't tell either.
        let mut address = match (handle, of_handle) {
            (RTLD_NEXT, _) => next(caller, graft, worker, name, version),
            (_, Some(module)) => depth(module, graft, worker, name, version),
            _ => theirs(worker, RTLD_DEFAULT, name, version),
        };
        if handle == RTLD_DEFAULT && address == 0 {
            let mut index = 0;
            while let Some(module) = module(graft, index) {
                index += 1;
                // What was opened on demand was not opened for all.
                if module.on_demand == 0
                    && let Some(symbol) = lookup(module, name, version)
                {
                    address = value(module, symbol);
                    break;
                }
            }
        }
        // Failures on the way are none of the caller's.
        worker.dlerror();
        forget_error(graft);
        if address == 0 {
            error(graft, b"undefined symbol in a fused function: \0", name);
        }
        address
    }
}

unsafe fn theirs(worker: &Worker, handle: u64, name: *const c_char, version: *const c_char) -> u64 {
    // SAFETY: as the callers promise.
    unsafe {
        if version.is_null() {
            worker.dlsym(handle, name)
        } else {
            worker.dlvsym(handle, name, version)
        }
    }
}

/// What comes after `caller` in the graft's scope.
unsafe fn next(
    caller: &Module,
    graft: &Graft,
    worker: &Worker,
    name: *const c_char,
    version: *const c_char,
) -> u64 {
    let scope = graft.scope as *const ScopeEntry;
    let own = core::ptr::from_ref(caller) as u64;
    let (mut passed, mut index) = (false, 0);
    // SAFETY: the patcher wrote the scope.
    unsafe {
        while index < graft.scope_count as usize {
            let entry = &*scope.add(index);
            index += 1;
            if !passed {
                passed = entry.module == own;
            } else if entry.module != 0 {
                let module = &*(entry.module as *const Module);
                if let Some(symbol) = lookup(module, name, version) {
                    return value(module, symbol);
                }
            } else {
                let address = in_library(worker, entry.path as *const c_char, name, version);
                if address != 0 {
                    return address;
                }
            }
        }
    }
    0
}

/// The symbol if a library that the worker has defines it itself, not what
/// that depends on.
unsafe fn in_library(
    worker: &Worker,
    path: *const c_char,
    name: *const c_char,
    version: *const c_char,
) -> u64 {
    // SAFETY: the path is NUL-terminated. A handle is the library's link map.
    unsafe {
        let handle = worker.dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
        if handle == 0 {
            return 0;
        }
        let address = theirs(worker, handle, name, version);
        let mut owner = 0;
        let mut info = [0_u64; 4];
        // An IFUNC may have chosen what lies in no library (the vDSO).
        let known = address != 0
            && worker.dladdr1(
                address,
                info.as_mut_ptr().cast(),
                &mut owner,
                RTLD_DL_LINKMAP,
            ) != 0;
        worker.dlclose(handle);
        if known && owner != handle { 0 } else { address }
    }
}

/// In `first` and what it needs, breadth first.
unsafe fn depth(
    first: &Module,
    graft: &Graft,
    worker: &Worker,
    name: *const c_char,
    version: *const c_char,
) -> u64 {
    // SAFETY: the queue has room for each module once.
    unsafe {
        let queue = worker.malloc(graft.module_count as usize * 8).cast::<u64>();
        if queue.is_null() {
            return 0;
        }
        queue.write(core::ptr::from_ref(first) as u64);
        let (mut len, mut at, mut address) = (1_usize, 0_usize, 0);
        while at < len && address == 0 {
            let module = &*(*queue.add(at) as *const Module);
            at += 1;
            if let Some(symbol) = lookup(module, name, version) {
                address = value(module, symbol);
                break;
            }
            let mut index = 0;
            while let Some(library) = needed(module, index) {
                index += 1;
                let Some(other) = by_name(graft, library) else {
                    // Shared with the worker.
                    address = in_library(worker, library, name, version);
                    if address != 0 {
                        break;
                    }
                    continue;
                };
                let other = core::ptr::from_ref(other) as u64;
                let mut seen = 0;
                while seen < len && *queue.add(seen) != other {
                    seen += 1;
                }
                if seen == len {
                    queue.add(len).write(other);
                    len += 1;
                }
            }
        }
        worker.free(queue.cast());
        address
    }
}
