//! The worker_v1 interface between a worker and a function library.
//!
//! ```text
//! worker                         library
//!   faas_init()              →
//!   faas_create_func_worker( →   keeps context, invoke, append
//!       context, invoke, append)
//!   faas_func_call(input)    →
//!                            ←   invoke(context, "Bar", …)   0 or -1
//!                            ←   append(context, …)
//! ```
//!
//! A library may throw or exit through us: the calls into it are `C-unwind`,
//! so an exception that nobody catches ends the process as it does in a C++
//! worker, and is never undefined. The routines that it calls are plain C and
//! never unwind.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use anyhow::{Context, Result, bail, ensure};

type AppendFn = extern "C" fn(*mut c_void, *const c_char, usize);
type InvokeFn = extern "C" fn(
    *mut c_void,
    *const c_char,
    *const c_char,
    usize,
    *mut *const c_char,
    *mut usize,
) -> c_int;
type InitFn = unsafe extern "C-unwind" fn() -> c_int;
type CreateFn =
    unsafe extern "C-unwind" fn(*mut c_void, InvokeFn, AppendFn, *mut *mut c_void) -> c_int;
type DestroyFn = unsafe extern "C-unwind" fn(*mut c_void) -> c_int;
type CallFn = unsafe extern "C-unwind" fn(*mut c_void, *const c_char, usize) -> c_int;

/// What a worker does for the library that it runs. A library may call it
/// from any thread.
pub trait Host: Sync {
    /// Calls another function. `None` is a failure; the buffer of a success
    /// must stay valid until the current [`FuncWorker::call`] has returned.
    fn invoke(&self, name: &[u8], input: &[u8]) -> Option<Handed>;
    /// Adds to the answer of the current call.
    fn append(&self, data: &[u8]);
}

/// A buffer handed to a library: null and 0 if it is empty.
#[derive(Clone, Copy, Debug)]
pub struct Handed {
    /// Where it begins.
    pub data: *const u8,
    /// Its length in bytes.
    pub len: usize,
}

/// What `caller_context` points at: opaque to the library.
struct CallerContext {
    host: &'static dyn Host,
}

/// A loaded function library.
#[derive(Debug)]
pub struct Library {
    create: CreateFn,
    destroy: DestroyFn,
    call: CallFn,
}

impl Library {
    /// Loads a library and runs its `faas_init`. Like nightcore's workers we
    /// never unload it.
    pub fn load(path: &Path) -> Result<Self> {
        let c_path = CString::new(path.as_os_str().as_bytes()).context("a path with a NUL")?;
        // SAFETY: the path is a C string; that the library's constructors do
        // what they should is what a worker has to assume of its function.
        let handle = unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_LAZY) };
        if handle.is_null() {
            bail!("cannot load {}: {}", path.display(), last_error());
        }
        let symbol = |name: &CStr| {
            // SAFETY: `handle` is a live handle, `name` a C string.
            let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
            ensure!(
                !address.is_null(),
                "{} has no {}",
                path.display(),
                name.to_string_lossy()
            );
            Ok(address)
        };
        let init = symbol(c"faas_init")?;
        let create = symbol(c"faas_create_func_worker")?;
        let destroy = symbol(c"faas_destroy_func_worker")?;
        let call = symbol(c"faas_func_call")?;
        // SAFETY: the worker_v1 ABI gives these four names these four types.
        let (init, library) = unsafe {
            (
                std::mem::transmute::<*mut c_void, InitFn>(init),
                Self {
                    create: std::mem::transmute::<*mut c_void, CreateFn>(create),
                    destroy: std::mem::transmute::<*mut c_void, DestroyFn>(destroy),
                    call: std::mem::transmute::<*mut c_void, CallFn>(call),
                },
            )
        };
        // SAFETY: called once, after loading, as the ABI wants it.
        let code = unsafe { init() };
        ensure!(code == 0, "faas_init of {} returned {code}", path.display());
        Ok(library)
    }

    /// Creates the function's worker, whose calls `host` serves. `host` and
    /// the context given to the library live as long as the process.
    pub fn create(&self, host: &'static dyn Host) -> Result<FuncWorker<'_>> {
        let context = Box::into_raw(Box::new(CallerContext { host }));
        let mut handle = ptr::null_mut();
        // SAFETY: the types are the ABI's; `context` is never freed; `handle`
        // is written before the library returns.
        let code = unsafe {
            (self.create)(
                context.cast(),
                invoke_func_wrapper,
                append_output_wrapper,
                &mut handle,
            )
        };
        ensure!(code == 0, "faas_create_func_worker returned {code}");
        Ok(FuncWorker {
            library: self,
            handle,
        })
    }
}

/// The function's worker: what `faas_create_func_worker` made.
#[derive(Debug)]
pub struct FuncWorker<'l> {
    library: &'l Library,
    handle: *mut c_void,
}

impl FuncWorker<'_> {
    /// Runs the function. Empty input is passed as null, as nightcore does.
    /// Exclusive, since a handle is never entered twice at a time.
    #[inline(never)]
    pub fn call(&mut self, input: &[u8]) -> c_int {
        let data = if input.is_empty() {
            ptr::null()
        } else {
            input.as_ptr().cast()
        };
        // SAFETY: the handle is the library's own, and `input` outlives the call.
        unsafe { (self.library.call)(self.handle, data, input.len()) }
    }

    /// Ends the function's worker.
    pub fn destroy(self) -> c_int {
        // SAFETY: the handle is the library's own; `self` is gone afterwards.
        unsafe { (self.library.destroy)(self.handle) }
    }
}

fn last_error() -> String {
    // SAFETY: dlerror returns null or a C string that is valid until this
    // thread's next dl call.
    unsafe {
        let e = libc::dlerror();
        if e.is_null() {
            "no reason given".into()
        } else {
            CStr::from_ptr(e).to_string_lossy().into_owned()
        }
    }
}

/// # Safety
/// `data` must be readable for `len` bytes, or `len` be 0.
unsafe fn bytes<'a>(data: *const c_char, len: usize) -> &'a [u8] {
    if len == 0 || data.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data.cast(), len) }
}

/// `invoke_func`, under the name that it has in nightcore's workers
/// (`faas::worker_v1::FuncWorker::InvokeFuncWrapper`): tools find it by that.
// SAFETY: no other item can have this name; it is mangled by the C++ rules.
#[unsafe(export_name = "_ZN4faas9worker_v110FuncWorker17InvokeFuncWrapperEPvPKcS4_mPS4_Pm")]
#[inline(never)]
extern "C" fn invoke_func_wrapper(
    caller_context: *mut c_void,
    func_name: *const c_char,
    input: *const c_char,
    input_length: usize,
    output: *mut *const c_char,
    output_length: *mut usize,
) -> c_int {
    // SAFETY: the ABI has the library pass places for both results.
    unsafe {
        *output = ptr::null();
        *output_length = 0;
    }
    // SAFETY: the ABI has the library pass its context unchanged (never freed),
    // a C string, and `input_length` readable bytes.
    let answer = unsafe {
        let context = &*caller_context.cast::<CallerContext>();
        let name = CStr::from_ptr(func_name).to_bytes();
        context.host.invoke(name, bytes(input, input_length))
    };
    let Some(answer) = answer else { return -1 };
    // SAFETY: as above.
    unsafe {
        *output = answer.data.cast();
        *output_length = answer.len;
    }
    0
}

/// `append_output`, likewise.
// SAFETY: no other item can have this name; it is mangled by the C++ rules.
#[unsafe(export_name = "_ZN4faas9worker_v110FuncWorker19AppendOutputWrapperEPvPKcm")]
#[inline(never)]
extern "C" fn append_output_wrapper(
    caller_context: *mut c_void,
    data: *const c_char,
    length: usize,
) {
    // SAFETY: the ABI has the library pass its context unchanged (never freed)
    // and `length` readable bytes.
    unsafe {
        let context = &*caller_context.cast::<CallerContext>();
        context.host.append(bytes(data, length));
    }
}
