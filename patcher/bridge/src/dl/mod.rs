//! The dynamic linker's functions for images: to it, they are not there.
//!
//! ```text
//!  dlsym(handle)
//!    RTLD_DEFAULT ── the worker's global scope, then the graft's modules
//!    RTLD_NEXT ───── what comes after the calling module in Graft::scope
//!    a Module ────── it and what it needs, breadth first
//!    else ────────── the dynamic linker
//! ```
//!
//! A library that is neither in the graft nor in the worker can't be opened: a
//! function that does that at run time is told so (`dlerror`). What it had
//! opened in its own worker is in the graft, and is initialised here when it
//! opens it.
//!
//! What `dlsym` finds is the library's own function, also where images are
//! given one of ours for it.

mod find;

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

pub use find::{ng_dlsym, ng_dlvsym};

use crate::abi::{Graft, MODULE_INITIALISING, Module, Worker};
use crate::symbols::{by_address, by_handle, by_name, module, nearest, needed};
use crate::{start, sys, tls};

const RTLD_LAZY: c_int = 1;
const RTLD_NOLOAD: c_int = 4;
/// `dladdr1`: `*extra` becomes the symbol.
const RTLD_DL_SYMENT: c_int = 1;
/// `dladdr1`: `*extra` becomes the link map.
const RTLD_DL_LINKMAP: c_int = 2;
/// `dlinfo`: `*info` becomes the link map.
const RTLD_DI_LINKMAP: c_int = 2;

/// `Dl_info`.
#[derive(Debug)]
#[repr(C)]
pub struct DlInfo {
    /// `dli_fname`.
    pub path: u64,
    /// `dli_fbase`.
    pub base: u64,
    /// `dli_sname`.
    pub symbol: u64,
    /// `dli_saddr`.
    pub address: u64,
}

/// `struct dl_phdr_info`.
#[derive(Debug)]
#[repr(C)]
pub struct PhdrInfo {
    /// `dlpi_addr`.
    pub bias: u64,
    /// `dlpi_name`.
    pub path: u64,
    /// `dlpi_phdr`.
    pub phdr: u64,
    /// `dlpi_phnum`, and padding.
    pub phnum: u64,
    /// `dlpi_adds`.
    pub adds: u64,
    /// `dlpi_subs`.
    pub subs: u64,
    /// `dlpi_tls_modid`.
    pub tls_module: u64,
    /// `dlpi_tls_data`.
    pub tls_data: u64,
}

type PhdrCallback = unsafe extern "C" fn(*mut PhdrInfo, usize, *mut c_void) -> c_int;

unsafe fn records<'a>(module: *const Module) -> (&'a Module, &'a Graft, &'a Worker) {
    // SAFETY: thunks pass the image's own record; none is ever unmapped.
    unsafe {
        let module = &*module;
        let graft = &*(module.graft as *const Graft);
        (module, graft, &*(graft.worker as *const Worker))
    }
}

/// Whether a module counts as loaded.
fn loaded(module: &Module) -> bool {
    module.on_demand == 0 || module.initialised.get() != 0
}

/// `dl_iterate_phdr`: the worker's, then ours.
///
/// # Safety
/// As the C function; `module` is the image's own, here and below.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dl_iterate_phdr(
    callback: PhdrCallback,
    data: *mut c_void,
    module_: *const Module,
) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let (_, graft, worker) = records(module_);
        // All entries show the same counts: who caches what it finds here
        // looks at any one.
        let mut counts = [0_u64; 2];
        worker.dl_iterate_phdr(take_counts as *const () as u64, &raw mut counts as u64);
        let result = worker.dl_iterate_phdr(callback as *const () as u64, data as u64);
        if result != 0 {
            return result;
        }
        let mut index = 0;
        while let Some(module) = module(graft, index) {
            index += 1;
            if !loaded(module) {
                continue;
            }
            let mut info = PhdrInfo {
                bias: module.bias,
                path: module.path,
                phdr: module.phdr,
                phnum: module.phnum & 0xffff,
                adds: counts[0],
                subs: counts[1],
                tls_module: 0,
                tls_data: 0,
            };
            if module.tls.mem_size != 0 {
                info.tls_module = core::ptr::from_ref(module) as u64;
                info.tls_data = tls::existing(module);
            }
            let result = callback(&mut info, size_of::<PhdrInfo>(), data);
            if result != 0 {
                return result;
            }
        }
    }
    0
}

unsafe extern "C" fn take_counts(
    info: *const PhdrInfo,
    _len: usize,
    counts: *mut [u64; 2],
) -> c_int {
    // SAFETY: glibc 2.34 and later, which a worker has, fill them in.
    unsafe { *counts = [(*info).adds, (*info).subs] };
    1
}

/// `dladdr`.
///
/// # Safety
/// See [`ng_dl_iterate_phdr`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dladdr(
    address: u64,
    info: *mut DlInfo,
    module: *const Module,
) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let (_, graft, worker) = records(module);
        match by_address(graft, address) {
            Some(module) => {
                describe(module, address, info);
                1
            }
            None => worker.dladdr(address, info.cast()),
        }
    }
}

/// `dladdr1`.
///
/// # Safety
/// See [`ng_dl_iterate_phdr`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dladdr1(
    address: u64,
    info: *mut DlInfo,
    extra: *mut u64,
    flags: c_int,
    module: *const Module,
) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let (_, graft, worker) = records(module);
        let Some(module) = by_address(graft, address) else {
            return worker.dladdr1(address, info.cast(), extra, flags);
        };
        let symbol = describe(module, address, info);
        match flags {
            RTLD_DL_SYMENT => *extra = symbol,
            RTLD_DL_LINKMAP => *extra = link_map(module),
            _ => {}
        }
    }
    1
}

/// Fills `info`; gives the address of the symbol's entry, 0 for none.
unsafe fn describe(module: &Module, address: u64, info: *mut DlInfo) -> u64 {
    // SAFETY: the caller's structure.
    unsafe {
        let found = nearest(module, address);
        let (symbol, name, start) = found.unwrap_or((core::ptr::null(), 0, 0));
        info.write(DlInfo {
            path: module.path,
            base: module.range.start,
            symbol: name,
            address: start,
        });
        symbol as u64
    }
}

fn link_map(module: &Module) -> u64 {
    module.link_map.addr.set(module.bias);
    module.link_map.name.set(module.path);
    module.link_map.ld.set(module.dynamic);
    (&raw const module.link_map) as u64
}

/// `dlopen`: what is there already.
///
/// # Safety
/// See [`ng_dl_iterate_phdr`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dlopen(path: *const c_char, mode: c_int, module: *const Module) -> u64 {
    // SAFETY: as the caller promises.
    unsafe {
        let (_, graft, worker) = records(module);
        forget_error(graft);
        if path.is_null() || *path == 0 {
            return worker.dlopen(path, mode);
        }
        let Some(module) = by_name(graft, path) else {
            let handle = worker.dlopen(path, mode | RTLD_NOLOAD);
            if handle == 0 {
                worker.dlerror();
                if mode & RTLD_NOLOAD == 0 {
                    error(graft, b"not available in a fused function: \0", path);
                }
            }
            return handle;
        };
        worker.dlerror();
        if mode & RTLD_NOLOAD != 0 && !loaded(module) {
            return 0;
        }
        // One thread at a time; an initialiser may itself open others.
        let me = sys::thread_pointer();
        let nested = graft.opener.load(Relaxed) == me;
        if !nested {
            while graft
                .opener
                .compare_exchange(0, me, Acquire, Relaxed)
                .is_err()
            {
                sys::relax();
            }
        }
        let done = initialise(graft, module);
        if !nested {
            graft.opener.store(0, Release);
        }
        if !done {
            error(graft, b"an initialiser threw an exception: \0", path);
            return 0;
        }
        core::ptr::from_ref(module) as u64
    }
}

/// Runs the initialisers of a module and, before them, of what it needs.
unsafe fn initialise(graft: &Graft, module: &Module) -> bool {
    if module.initialised.get() != 0 || module.on_demand == 0 {
        return true;
    }
    module.initialised.set(MODULE_INITIALISING);
    let mut index = 0;
    // SAFETY: the module is the graft's, and bound since its start.
    unsafe {
        while let Some(library) = needed(module, index) {
            index += 1;
            if let Some(other) = by_name(graft, library)
                && !initialise(graft, other)
            {
                return false;
            }
        }
        start::run_initialisers(graft, module, core::ptr::null())
    }
}

/// `dlclose`: images stay.
///
/// # Safety
/// See [`ng_dl_iterate_phdr`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dlclose(handle: u64, module: *const Module) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let (_, graft, worker) = records(module);
        forget_error(graft);
        match by_handle(graft, handle) {
            Some(_) => 0,
            None => worker.dlclose(handle),
        }
    }
}

/// `dlinfo`: of ours there is the link map.
///
/// # Safety
/// See [`ng_dl_iterate_phdr`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dlinfo(
    handle: u64,
    request: c_int,
    info: *mut c_void,
    module: *const Module,
) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let (_, graft, worker) = records(module);
        forget_error(graft);
        match by_handle(graft, handle) {
            None => worker.dlinfo(handle, request, info),
            Some(module) if request == RTLD_DI_LINKMAP => {
                info.cast::<u64>().write(link_map(module));
                0
            }
            Some(module) => {
                let name = module.path as *const c_char;
                error(graft, b"not known of a fused function's library: \0", name);
                -1
            }
        }
    }
}

/// `dlerror`: ours first.
///
/// # Safety
/// See [`ng_dl_iterate_phdr`].
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_dlerror(module: *const Module) -> *const c_char {
    // SAFETY: as the caller promises; the text stays until the thread's next.
    unsafe {
        let (_, graft, worker) = records(module);
        if let Some(table) = tls::errors(graft, false)
            && (*table).error != 0
        {
            let text = (*table).error;
            (*table).error = 0;
            return text as *const c_char;
        }
        worker.dlerror()
    }
}

unsafe fn forget_error(graft: &Graft) {
    // SAFETY: the table is this thread's.
    unsafe {
        if let Some(table) = tls::errors(graft, false) {
            (*table).error = 0;
        }
    }
}

/// Makes `what` and `name` the thread's error; without memory `what` alone.
unsafe fn error(graft: &Graft, what: &'static [u8], name: *const c_char) {
    // SAFETY: both are NUL-terminated, and the text has room for both.
    unsafe {
        let worker = &*(graft.worker as *const Worker);
        let Some(table) = tls::errors(graft, true) else {
            return;
        };
        if (*table).error_text != 0 {
            worker.free((*table).error_text as *mut u8);
            (*table).error_text = 0;
        }
        (*table).error = what.as_ptr() as u64;
        let mut len = 0;
        while *name.add(len) != 0 {
            len += 1;
        }
        let text = worker.malloc(what.len() + len);
        if text.is_null() {
            return;
        }
        core::ptr::copy_nonoverlapping(what.as_ptr(), text, what.len() - 1);
        let rest = text.add(what.len() - 1);
        core::ptr::copy_nonoverlapping(name.cast(), rest, len + 1);
        (*table).error_text = text as u64;
        (*table).error = text as u64;
    }
}
