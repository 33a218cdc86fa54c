//! Functions and variables that an image gets from us instead of from the
//! worker's libraries: those that would take the process for the callee's own.
//!
//! Each image has a thunk for each of them that it imports. A thunk puts the
//! image's record (`abi::Module`) behind the arguments that the caller passed,
//! in the next argument register, and goes on to the bridge.

use nightgraft_bridge::abi;

/// A function that the bridge gives to images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function {
    /// The import's name.
    pub name: &'static str,
    /// The bridge's function.
    pub export: &'static str,
    /// How many arguments it has already, 0-5: the record comes next.
    pub arguments: u8,
}

/// Every function.
pub const FUNCTIONS: &[Function] = &[
    function("getenv", "ng_getenv", 1),
    function("secure_getenv", "ng_getenv", 1),
    function("setenv", "ng_setenv", 3),
    function("putenv", "ng_putenv", 1),
    function("unsetenv", "ng_unsetenv", 1),
    function("clearenv", "ng_clearenv", 0),
    function("strtok", "ng_strtok", 2),
    function("rand", "ng_rand", 0),
    function("srand", "ng_srandom", 1),
    function("random", "ng_random", 0),
    function("srandom", "ng_srandom", 1),
    function("drand48", "ng_drand48", 0),
    function("lrand48", "ng_lrand48", 0),
    function("mrand48", "ng_mrand48", 0),
    function("erand48", "ng_erand48", 1),
    function("nrand48", "ng_nrand48", 1),
    function("jrand48", "ng_jrand48", 1),
    function("srand48", "ng_srand48", 1),
    function("seed48", "ng_seed48", 1),
    function("lcong48", "ng_lcong48", 1),
    function("gmtime", "ng_gmtime", 1),
    function("localtime", "ng_localtime", 1),
    function("inet_ntoa", "ng_inet_ntoa", 1),
    function("pthread_setspecific", "ng_setspecific", 2),
    function("tss_set", "ng_tss_set", 2),
    function("__cxa_thread_atexit", "ng_thread_atexit", 3),
    function("__cxa_thread_atexit_impl", "ng_thread_atexit", 3),
    function("dl_iterate_phdr", "ng_dl_iterate_phdr", 2),
    function("dladdr", "ng_dladdr", 2),
    function("dladdr1", "ng_dladdr1", 4),
    function("dlsym", "ng_dlsym", 2),
    function("dlvsym", "ng_dlvsym", 3),
    function("dlopen", "ng_dlopen", 2),
    function("dlclose", "ng_dlclose", 1),
    function("dlerror", "ng_dlerror", 0),
    function("dlinfo", "ng_dlinfo", 3),
];

/// Names of the variable that an image's `environ` is.
pub const ENVIRON: [&str; 3] = ["environ", "__environ", "_environ"];

const fn function(name: &'static str, export: &'static str, arguments: u8) -> Function {
    Function {
        name,
        export,
        arguments,
    }
}

/// What an import of this name is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interposed {
    /// The thunk of `FUNCTIONS[.0]`.
    Function(usize),
    /// The graft's `environ`.
    Environ,
    /// The bridge's `__tls_get_addr`, without a thunk.
    TlsGetAddr,
}

/// Whether an import of this name is ours to give.
#[must_use]
pub fn interposed(name: &str) -> Option<Interposed> {
    if ENVIRON.contains(&name) {
        return Some(Interposed::Environ);
    }
    if name == "__tls_get_addr" {
        return Some(Interposed::TlsGetAddr);
    }
    let found = FUNCTIONS.iter().position(|f| f.name == name);
    found.map(Interposed::Function)
}

/// Bytes of a thunk.
pub const THUNK: usize = 32;

/// `endbr64; movabs ARGUMENT, module; movabs r11, target; jmp r11`. Neither
/// register holds anything at a function's entry; rax, which says how many
/// vector registers a variadic call uses, stays.
#[must_use]
pub fn thunk(arguments: u8, module: u64, target: u64) -> Vec<u8> {
    let argument: [u8; 2] = match arguments {
        0 => [0x48, 0xbf], // rdi
        1 => [0x48, 0xbe], // rsi
        2 => [0x48, 0xba], // rdx
        3 => [0x48, 0xb9], // rcx
        4 => [0x49, 0xb8], // r8
        _ => [0x49, 0xb9], // r9
    };
    let mut bytes = vec![0xf3, 0x0f, 0x1e, 0xfa];
    bytes.extend(argument);
    bytes.extend(module.to_le_bytes());
    bytes.extend([0x49, 0xbb]);
    bytes.extend(target.to_le_bytes());
    bytes.extend([0x41, 0xff, 0xe3]);
    bytes.resize(THUNK, 0xcc);
    bytes
}

/// Where an image's record is, given its number.
#[must_use]
pub fn module_at(modules: u64, index: usize) -> u64 {
    modules + (index * size_of::<abi::Module>()) as u64
}
