//! The worker's own functions that the bridge calls, by their C types.
//!
//! Some of ours are entered with nothing that leads to the worker's record
//! (`__tls_get_addr` of the dynamic linker's modules, a personality routine):
//! those read its address from the image itself, where the patcher put it.

use core::ffi::{c_char, c_int, c_void};

use crate::abi::{IMPORTS, Import, Worker};

/// Address of the [`Worker`]. The patcher fills it in when it loads the image;
/// nothing in the image writes to it.
#[cfg(bridge_image)]
#[unsafe(no_mangle)]
pub static ng_worker: u64 = 0;

/// Address of the [`Worker`]; in an ordinary process tests fill it in.
#[cfg(not(bridge_image))]
#[expect(non_upper_case_globals, reason = "the same name as in the image")]
pub static ng_worker: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);

/// The worker's record.
///
/// # Safety
/// The patcher (or a test) filled [`ng_worker`] in.
pub(crate) unsafe fn worker<'a>() -> &'a Worker {
    // SAFETY: the record outlives every stub. Volatile: the compiler takes
    // the constant in the image for what it is there before it is loaded.
    unsafe { &*((&raw const ng_worker).cast::<u64>().read_volatile() as *const Worker) }
}

/// `start_routine` of a thread.
pub(crate) type Routine = unsafe extern "C" fn(*mut c_void) -> *mut c_void;
/// What destroys an object: of a thread key, a thread, the process.
pub(crate) type Destructor = unsafe extern "C" fn(*mut c_void);

/// Declares how an import is called.
macro_rules! imports {
    ($($(#[$doc:meta])* $name:ident: $import:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        impl Worker {
            $(
                $(#[$doc])*
                ///
                /// # Safety
                /// The C function's own conditions, and [`Worker::has`].
                #[inline(always)]
                pub(crate) unsafe fn $name(&self, $($argument: $type),*) $(-> $result)? {
                    const { assert!((Import::$import as usize) < IMPORTS.len()) };
                    // SAFETY: the patcher resolved it in the worker's own
                    // libraries.
                    unsafe {
                        let function: unsafe extern "C" fn($($type),*) $(-> $result)? =
                            core::mem::transmute(self.imports[Import::$import as usize] as usize);
                        function($($argument),*)
                    }
                }
            )*
        }
    };
}

imports! {
    /// `pthread_create`.
    pthread_create: PthreadCreate(thread: *mut u64, attributes: *const c_void, routine: Routine, argument: *mut c_void) -> c_int;
    /// `pthread_detach`.
    pthread_detach: PthreadDetach(thread: u64) -> c_int;
    /// `pthread_key_create`.
    pthread_key_create: PthreadKeyCreate(key: *mut u32, destructor: Destructor) -> c_int;
    /// `pthread_getspecific`.
    pthread_getspecific: PthreadGetspecific(key: u32) -> u64;
    /// `pthread_setspecific`.
    pthread_setspecific: PthreadSetspecific(key: u32, value: u64) -> c_int;
    /// `malloc`.
    malloc: Malloc(len: usize) -> *mut u8;
    /// `free`.
    free: Free(block: *mut u8);
    /// `__errno_location`.
    errno_location: ErrnoLocation() -> *mut c_int;
    /// `gmtime_r`.
    gmtime_r: GmtimeR(time: *const i64, broken_down: *mut c_void) -> *mut c_void;
    /// `localtime_r`.
    localtime_r: LocaltimeR(time: *const i64, broken_down: *mut c_void) -> *mut c_void;
    /// `tzset`.
    tzset: Tzset();
    /// `__cxa_atexit`.
    cxa_atexit: CxaAtexit(destructor: Destructor, object: *mut c_void, dso: *const c_void) -> c_int;
    /// `__cxa_thread_atexit_impl`.
    thread_atexit: ThreadAtexit(destructor: u64, object: u64, dso: u64) -> c_int;
    /// `__tls_get_addr`.
    tls_get_addr: TlsGetAddr(index: *const crate::abi::TlsIndex) -> *mut u8;
    /// `__register_frame`.
    register_frame: RegisterFrame(eh_frame: u64);
    /// `_Unwind_SetGR`.
    unwind_set_gr: UnwindSetGr(context: *mut c_void, register: c_int, value: u64);
    /// `_Unwind_SetIP`.
    unwind_set_ip: UnwindSetIp(context: *mut c_void, address: u64);
    /// `_Unwind_Backtrace`.
    unwind_backtrace: UnwindBacktrace(step: crate::crash::Step, argument: *mut c_void) -> c_int;
    /// `_Unwind_GetIP`.
    unwind_get_ip: UnwindGetIp(context: *mut c_void) -> u64;
    /// `_Unwind_GetCFA`.
    unwind_get_cfa: UnwindGetCfa(context: *mut c_void) -> u64;
    /// `_Unwind_DeleteException`.
    unwind_delete_exception: UnwindDeleteException(exception: *mut c_void);
    /// `__cxa_begin_catch`.
    cxa_begin_catch: CxaBeginCatch(exception: *mut c_void) -> *mut c_void;
    /// `__cxa_get_globals`.
    cxa_get_globals: CxaGetGlobals() -> *mut c_void;
    /// `__cxa_end_catch`.
    cxa_end_catch: CxaEndCatch();
    /// `dl_iterate_phdr`.
    dl_iterate_phdr: DlIteratePhdr(callback: u64, data: u64) -> c_int;
    /// `dladdr`.
    dladdr: Dladdr(address: u64, info: *mut c_void) -> c_int;
    /// `dladdr1`.
    dladdr1: Dladdr1(address: u64, info: *mut c_void, extra: *mut u64, flags: c_int) -> c_int;
    /// `dlopen`.
    dlopen: Dlopen(path: *const c_char, mode: c_int) -> u64;
    /// `dlclose`.
    dlclose: Dlclose(handle: u64) -> c_int;
    /// `dlsym`.
    dlsym: Dlsym(handle: u64, name: *const c_char) -> u64;
    /// `dlvsym`.
    dlvsym: Dlvsym(handle: u64, name: *const c_char, version: *const c_char) -> u64;
    /// `dlerror`.
    dlerror: Dlerror() -> *const c_char;
    /// `dlinfo`.
    dlinfo: Dlinfo(handle: u64, request: c_int, info: *mut c_void) -> c_int;
}

impl Worker {
    /// Whether the worker has this one.
    pub(crate) fn has(&self, import: Import) -> bool {
        // SAFETY: the array has one for each of the enumeration.
        unsafe { *self.imports.as_ptr().add(import as usize) != 0 }
    }
}
