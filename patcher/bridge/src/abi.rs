//! Layouts that the patcher writes and the bridge reads, and the other way
//! round. Everything is `repr(C)`; addresses are `u64` because the patcher
//! builds these structures for another process.
//!
//! ```text
//!  Control (memfd, shared with forked children; gates and counters only)
//!    ├─ edges[i]  SharedEdge ◄────────────┐
//!    └─ manifest slots A, B               │
//!  Worker (private) ─ grafts[i] ─► Graft ─┘ (private; one per callee)
//!                                    └─ modules[i] ─► Module (private; one per image)
//!  Site (private; one per rewritten call) ─► inline cache ─► Graft
//!  Routine (private; at invoke_func's entry) ─► Worker ─ names ─► Graft
//! ```

use core::cell::Cell;
use core::sync::atomic::{AtomicU8, AtomicU64};

use crate::cells::{Cells, Series};
use crate::histogram::Histogram;
use crate::state::CLibrary;

/// First bytes of a [`Control`] area.
pub const MAGIC: [u8; 8] = *b"NGRAFT\0\x01";
/// Version of every layout in this module; an agent refuses others.
pub const BRIDGE_VERSION: u32 = 5;
/// The memfd's name, as `/proc/PID/maps` shows it behind `/memfd:`.
pub const CONTROL_NAME: &str = "nightgraft";
/// Callees that one worker can hold.
pub const MAX_GRAFTS: usize = 64;
/// Bytes of each of the two manifest slots.
pub const MANIFEST_SLOT: usize = 128 * 1024;
/// Inputs up to this many bytes are handed over from aligned, zero-tailed
/// scratch, as nightcore's inline messages are (its inline limit).
pub const INLINE_INPUT: usize = 960;
/// Bytes of a graft's input scratch: a nightcore message.
pub const SCRATCH: usize = 1024;

/// [`Graft::state`]: mapped, initialisers not started.
pub const STATE_ARMED: u8 = 0;
/// [`Graft::state`]: the bridge's thread runs the initialisers.
pub const STATE_INITIALISING: u8 = 1;
/// [`Graft::state`]: fused calls run.
pub const STATE_READY: u8 = 2;
/// [`Graft::state`]: initialisers failed ([`Graft::failure`] says how).
pub const STATE_FAILED: u8 = 3;
/// [`Graft::state`]: the initialisers are through; the worker's thread takes
/// over what they left in their own thread at its next call, which makes the
/// graft ready.
pub const STATE_INITIALISED: u8 = 4;

/// [`Graft::failure`]: the thread for the initialisers could not be started;
/// the code is an errno.
pub const FAILURE_THREAD: u32 = 1;
/// [`Graft::failure`]: `faas_init` returned the code.
pub const FAILURE_FAAS_INIT: u32 = 2;
/// [`Graft::failure`]: `faas_create_func_worker` returned the code.
pub const FAILURE_FAAS_CREATE: u32 = 3;
/// [`Graft::failure`]: sealing the RELRO pages failed; the code is an errno.
pub const FAILURE_RELRO: u32 = 4;
/// [`Graft::failure`]: no thread key was left; the code is an errno.
pub const FAILURE_THREAD_KEY: u32 = 5;
/// [`Graft::failure`]: there was no memory for the graft's thread-local
/// storage or for lists of ours.
pub const FAILURE_MEMORY: u32 = 6;
/// [`Graft::failure`]: an initialiser let a C++ exception out.
pub const FAILURE_EXCEPTION: u32 = 7;
/// [`Graft::failure`]: a guarded call raised the signal that the code says, at
/// [`Graft::crash`]; the image is not called any more.
pub const FAILURE_CRASHED: u32 = 8;

/// Signals that a guarded callee may raise, in the order of [`Guard::saved`]:
/// SIGILL, SIGBUS, SIGFPE, SIGSEGV.
pub const GUARDED_SIGNALS: [u32; 4] = [4, 7, 8, 11];

/// [`Guard::state`]: no guarded call has come by yet.
pub const GUARD_WAITING: u8 = 0;
/// [`Guard::state`]: the signals come to us first.
pub const GUARD_ON: u8 = 1;
/// [`Guard::state`]: the worker has taken one of the signals for itself since.
pub const GUARD_TAKEN: u8 = 2;
/// [`Guard::state`]: there was no memory for its stack, or the kernel did not
/// let us have a signal.
pub const GUARD_DENIED: u8 = 3;

/// [`Guard::ours`]: the action is the worker's.
pub const ACTION_THEIRS: u8 = 0;
/// [`Guard::ours`]: the action is ours; the worker's is saved.
pub const ACTION_OURS: u8 = 1;
/// [`Guard::ours`]: it was ours, and somebody has changed it.
pub const ACTION_TAKEN: u8 = 2;

/// Functions of the worker's own libraries that the bridge calls, in the order
/// of [`Worker::imports`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Import {
    /// `pthread_create`.
    PthreadCreate,
    /// `pthread_detach`.
    PthreadDetach,
    /// `pthread_key_create`.
    PthreadKeyCreate,
    /// `pthread_getspecific`.
    PthreadGetspecific,
    /// `pthread_setspecific`.
    PthreadSetspecific,
    /// `malloc`.
    Malloc,
    /// `free`.
    Free,
    /// `__cxa_atexit`.
    CxaAtexit,
    /// `__cxa_thread_atexit_impl`.
    ThreadAtexit,
    /// `__tls_get_addr`.
    TlsGetAddr,
    /// `dl_iterate_phdr`.
    DlIteratePhdr,
    /// `dladdr`.
    Dladdr,
    /// `dladdr1`.
    Dladdr1,
    /// `dlopen`.
    Dlopen,
    /// `dlclose`.
    Dlclose,
    /// `dlsym`.
    Dlsym,
    /// `dlvsym`.
    Dlvsym,
    /// `dlerror`.
    Dlerror,
    /// `dlinfo`.
    Dlinfo,
    /// `__errno_location`.
    ErrnoLocation,
    /// `gmtime_r`.
    GmtimeR,
    /// `localtime_r`.
    LocaltimeR,
    /// `tzset`.
    Tzset,
    /// libgcc_s: `__register_frame`.
    RegisterFrame,
    /// libgcc_s: `_Unwind_Resume`.
    UnwindResume,
    /// libgcc_s: `_Unwind_SetGR`.
    UnwindSetGr,
    /// libgcc_s: `_Unwind_SetIP`.
    UnwindSetIp,
    /// libgcc_s: `_Unwind_GetIP`.
    UnwindGetIp,
    /// libgcc_s: `_Unwind_DeleteException`.
    UnwindDeleteException,
    /// libstdc++: `__cxa_begin_catch`.
    CxaBeginCatch,
    /// libstdc++: `__cxa_end_catch`.
    CxaEndCatch,
    /// libgcc_s: `_Unwind_Backtrace`.
    UnwindBacktrace,
    /// libgcc_s: `_Unwind_GetCFA`.
    UnwindGetCfa,
    /// libstdc++: `__cxa_get_globals`.
    CxaGetGlobals,
}

/// Names of [`Import`]s, in their order. From `RegisterFrame` on they are 0 in
/// a worker that has no such library; the ones before it are always there.
pub const IMPORTS: [&str; 34] = [
    "pthread_create",
    "pthread_detach",
    "pthread_key_create",
    "pthread_getspecific",
    "pthread_setspecific",
    "malloc",
    "free",
    "__cxa_atexit",
    "__cxa_thread_atexit_impl",
    "__tls_get_addr",
    "dl_iterate_phdr",
    "dladdr",
    "dladdr1",
    "dlopen",
    "dlclose",
    "dlsym",
    "dlvsym",
    "dlerror",
    "dlinfo",
    "__errno_location",
    "gmtime_r",
    "localtime_r",
    "tzset",
    "__register_frame",
    "_Unwind_Resume",
    "_Unwind_SetGR",
    "_Unwind_SetIP",
    "_Unwind_GetIP",
    "_Unwind_DeleteException",
    "__cxa_begin_catch",
    "__cxa_end_catch",
    "_Unwind_Backtrace",
    "_Unwind_GetCFA",
    "__cxa_get_globals",
];

/// Number of the [`IMPORTS`] that every worker has.
pub const REQUIRED_IMPORTS: usize = Import::RegisterFrame as usize;

/// Gate and counters of one edge, in shared memory.
///
/// Each counter has one writer, the worker's thread, and is written without a
/// lock prefix; readers see every value whole or a little late.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct SharedEdge {
    /// 1: calls may run fused; 0: they take the RPC.
    pub gate: AtomicU8,
    /// 1 while the initialisers run, whose crash would be the worker's.
    pub initialising: AtomicU8,
    /// The signal that ended a guarded call, 0 for none; stored last, after all
    /// that tells more. An agent clears it when the edge's quarantine is lifted.
    pub crashed: AtomicU8,
    /// Padding, so that the counters start aligned.
    pub pad: [u8; 5],
    /// Fused calls begun.
    pub entered: AtomicU64,
    /// Fused calls that came back.
    pub returned: AtomicU64,
    /// Of them, those that gave -1.
    pub errors: AtomicU64,
    /// Input bytes of fused calls.
    pub bytes_in: AtomicU64,
    /// Output bytes of fused calls.
    pub bytes_out: AtomicU64,
    /// Calls whose duration was measured (one in [`SAMPLE_EVERY`]).
    pub samples: AtomicU64,
    /// Sum of the measured durations, in TSC cycles.
    pub sampled_cycles: AtomicU64,
    /// Calls that took the RPC because the gate was off.
    pub rpc_gate_off: AtomicU64,
    /// … because the callee was not ready.
    pub rpc_not_ready: AtomicU64,
    /// … because the callee was running already.
    pub rpc_busy: AtomicU64,
    /// … because too little stack was left.
    pub rpc_stack: AtomicU64,
    /// … because the output arena was over its budget.
    pub rpc_memory: AtomicU64,
    /// … because they came from another thread than the worker's. Several
    /// threads may count at once.
    pub rpc_thread: AtomicU64,
    /// The measured durations by size.
    pub histogram: Histogram,
}

/// Of how many fused calls one is timed.
pub const SAMPLE_EVERY: u64 = 1024;

/// Entries of [`Control::seen`].
pub const SEEN: usize = 128;
/// Registers in [`Seen::registers`].
pub const SEEN_REGISTERS: usize = 16;
/// Entries of [`Worker::names`]: twice as many as there can be grafts.
pub const NAME_SLOTS: usize = 2 * MAX_GRAFTS;

/// Calls with one return address. Written by the worker's thread alone; the
/// address last, once.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Seen {
    /// The return address, 0 for none yet.
    pub address: AtomicU64,
    /// Calls.
    pub count: AtomicU64,
    /// Bit `i` is set if a call meant the graft with [`Graft::index`] `i`.
    pub grafts: AtomicU64,
    /// The general registers at the first call, by their number in the
    /// encoding, `rsp` as before the call: they tell what was called.
    pub registers: [AtomicU64; SEEN_REGISTERS],
}

/// The area that the worker shares with its forked children, a memfd named
/// [`CONTROL_NAME`]. It is how a new agent finds what is there.
#[repr(C)]
pub struct Control {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`BRIDGE_VERSION`].
    pub version: u32,
    /// Which manifest slot holds: 0 none yet, 1 the first, 2 the second. One
    /// byte, stored after the slot is whole.
    pub manifest: AtomicU8,
    /// 1: RPCs and calls of the worker's own function are counted.
    pub observing: AtomicU8,
    /// Padding.
    pub pad: [u8; 2],
    /// Address of the [`Worker`].
    pub worker: u64,
    /// Calls that passed a site with a name that no graft has.
    pub other_name: AtomicU64,
    /// Calls that passed a site with another target than `invoke_func`.
    pub other_target: AtomicU64,
    /// One per graft, by [`Graft::index`].
    pub edges: [SharedEdge; MAX_GRAFTS],
    /// Calls of known callees that came through the entry of the worker's own
    /// routine, by return address; a hash table.
    pub seen: [Seen; SEEN],
    /// Calls of the worker's own function that came from its engine.
    pub own: Series,
    /// RPCs by where they come from.
    pub cells: Cells,
    /// Each slot: length (u32 little-endian), CRC-32 of the text, the text.
    pub slots: [[u8; MANIFEST_SLOT]; 2],
}

/// A signal's action, as the kernel has it (`struct sigaction`, x86-64).
#[derive(Debug, Default)]
#[repr(C)]
pub struct Action {
    /// The handler, or `SIG_DFL` (0) or `SIG_IGN` (1).
    pub handler: Cell<u64>,
    /// `SA_…`.
    pub flags: Cell<u64>,
    /// What the handler returns to.
    pub restorer: Cell<u64>,
    /// What is blocked while it runs.
    pub mask: Cell<u64>,
}

/// The guard around guarded callees, one for all of a worker's; see
/// [`crate::guard`].
#[derive(Debug)]
#[repr(C)]
pub struct Guard {
    /// Guarded calls until the signals' actions are looked at again.
    pub left: Cell<u32>,
    /// `GUARD_…`.
    pub state: AtomicU8,
    /// 1 while a signal of the worker's thread is looked into.
    pub handling: Cell<u8>,
    /// Padding.
    pub pad: [u8; 2],
    /// The process whose actions these are: a forked child has its own.
    pub pid: Cell<u64>,
    /// Our handler, once it was installed.
    pub handler: Cell<u64>,
    /// Top of the stack on which a signal is looked into; 0 for none yet.
    pub stack: Cell<u64>,
    /// Stack pointer to go back to when looking into it faults.
    pub attempt: Cell<u64>,
    /// What libstdc++ knows of the worker's thread's exceptions
    /// (`__cxa_eh_globals`: those caught, and how many are thrown), or `none`; 0
    /// before the first guarded call.
    pub exceptions: Cell<u64>,
    /// Stands for it in a worker without libstdc++.
    pub none: Cell<[u64; 2]>,
    /// `ACTION_…` of each of [`GUARDED_SIGNALS`].
    pub ours: [AtomicU8; 4],
    /// Padding.
    pub pad1: [u8; 4],
    /// The worker's own actions, which hold when ours don't.
    pub saved: [Action; 4],
    /// Where an agent has the kernel put an action.
    pub probe: Action,
}

/// What the bridge knows of its worker; private memory.
#[derive(Debug)]
#[repr(C)]
pub struct Worker {
    /// Address of the [`Control`] area.
    pub control: u64,
    /// The worker's own `invoke_func`.
    pub invoke: u64,
    /// Thread pointer (`fs:0`) of the thread on which the worker calls
    /// `faas_func_call`; only calls from there run fused.
    pub thread: u64,
    /// Fused calls start only with the stack pointer above this address.
    pub stack_floor: u64,
    /// The worker's executable, `[low, high)`: an entry into the caller's
    /// `faas_func_call` from there is an outermost one.
    pub text_low: u64,
    /// See `text_low`.
    pub text_high: u64,
    /// Functions of the worker's libraries, by [`Import`]; 0 where one is not
    /// there.
    pub imports: [u64; IMPORTS.len()],
    /// `.eh_frame` of the bridge itself, zero-terminated.
    pub eh_frame: u64,
    /// 2 once `eh_frame` is registered, 1 while a thread is at it; claimed by a
    /// compare-and-swap.
    pub eh_frame_registered: AtomicU8,
    /// Padding.
    pub pad0: [u8; 7],
    /// The C library's `memcpy`; 0 until `memcpy_resolver` was asked, which
    /// is before any graft is ready.
    pub memcpy: Cell<u64>,
    /// The IFUNC resolver of `memcpy`, 0 if it is none.
    pub memcpy_resolver: u64,
    /// Fused calls start only while outputs and inputs take fewer bytes.
    pub arena_budget: u64,
    /// The outputs of fused calls.
    pub arena: crate::arena::Arena,
    /// Grafts in `grafts`; one byte, stored after the entry.
    pub count: AtomicU8,
    /// A fused call began since the last outermost entry, or calls are counted:
    /// the window in `faas_func_call` has work.
    pub dirty: Cell<u8>,
    /// Padding.
    pub pad: [u8; 6],
    /// The innermost graft whose call is active, 0 for none.
    pub active: Cell<u64>,
    /// Bytes of an XSAVE area for what TLS descriptors must keep; 0: the
    /// processor or the system has no XSAVE (FXSAVE is used), or no graft was
    /// initialised yet.
    pub xsave_len: Cell<u64>,
    /// Addresses of [`Graft`]s.
    pub grafts: [u64; MAX_GRAFTS],
    /// Hash table of the grafts' names: places in `grafts`, plus one; 0 for
    /// none. Made by [`crate::names::fill`], stored while the worker is stopped.
    pub names: [u8; NAME_SLOTS],
    /// The displaced entry of `invoke_func`, which goes on behind our window
    /// there; 0 while there has been none. Stays true when the window is gone.
    pub resume: AtomicU64,
    /// The guard.
    pub guard: Guard,
    /// Draws which calls are timed while they are counted.
    pub lottery: AtomicU64,
}

/// The window at the entry of `invoke_func`, or of the caller's
/// `faas_func_call`; private memory. Its stub carries the address.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct Routine {
    /// Address of the [`Worker`].
    pub worker: u64,
    /// The displaced code, which goes on behind the window; of `invoke_func` as
    /// [`Worker::resume`].
    pub resume: u64,
}

/// A relocation whose value only the process knows.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct IfuncSlot {
    /// Where the result goes.
    pub slot: u64,
    /// The resolver, `extern "C" fn() -> u64`.
    pub resolver: u64,
    /// Added to the result.
    pub addend: u64,
}

/// An address range, `[start, start + len)`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Thread-local storage of one image, as `PT_TLS` says.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Tls {
    /// Live address of the initial values.
    pub image: u64,
    /// Bytes of initial values.
    pub file_size: u64,
    /// Bytes of a block, the rest zero; 0 if the image has none.
    pub mem_size: u64,
    /// Alignment of a block, a power of two.
    pub align: u64,
    /// `PT_TLS`'s address modulo `align`: a block's address is the same.
    pub skew: u64,
    /// The block's place in a thread's table, below [`Graft::tls_count`].
    pub index: u64,
}

/// What an image hands to `__tls_get_addr`, and the argument of a TLS
/// descriptor.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct TlsIndex {
    /// Address of the [`Module`], [`TLS_STATIC`], or one of the dynamic
    /// linker's own module numbers (below 2^32).
    pub module: u64,
    /// Offset in the module's block; with [`TLS_STATIC`] from the thread
    /// pointer.
    pub offset: u64,
}

/// [`TlsIndex::module`]: the variable lies at a fixed distance from the thread
/// pointer, in a library that the worker started with.
pub const TLS_STATIC: u64 = 1 << 63;

/// One image of a graft: the function's library or a private copy of what it
/// depends on.
#[derive(Debug)]
#[repr(C)]
pub struct Module {
    /// Address of its [`Graft`].
    pub graft: u64,
    /// Live address = address in the image + `bias` (wrapping).
    pub bias: u64,
    /// Live addresses.
    pub range: Range,
    /// Its path in the callee's container, NUL-terminated.
    pub path: u64,
    /// `DT_SONAME` or the path's last part, NUL-terminated.
    pub soname: u64,
    /// Program headers: live address of an array of `Elf64_Phdr`.
    pub phdr: u64,
    /// Number of program headers.
    pub phnum: u64,
    /// Live address of `PT_DYNAMIC`, 0 for none.
    pub dynamic: u64,
    /// Live address of `DT_SYMTAB`, `Elf64_Sym`s.
    pub symbols: u64,
    /// Number of symbols, the null symbol included.
    pub symbol_count: u64,
    /// Live address of `DT_STRTAB`.
    pub strings: u64,
    /// Live address of `DT_VERSYM`, 0 for none.
    pub versions: u64,
    /// Live address of `DT_VERDEF`, 0 for none.
    pub version_definitions: u64,
    /// Number of version definitions.
    pub version_definition_count: u64,
    /// `.eh_frame`, zero-terminated; 0 for none.
    pub eh_frame: u64,
    /// `[IfuncSlot]`.
    pub ifuncs: u64,
    /// Number of `ifuncs`.
    pub ifunc_count: u64,
    /// Made read-only once the slots are bound.
    pub relro: Range,
    /// Functions to call first, `[u64]`, in order (DT_INIT, DT_INIT_ARRAY).
    pub inits: u64,
    /// Number of `inits`.
    pub init_count: u64,
    /// Functions to call when the process exits, `[u64]`, in order
    /// (DT_FINI_ARRAY from its end, DT_FINI).
    pub finis: u64,
    /// Number of `finis`.
    pub fini_count: u64,
    /// 1: not part of the function's own dependencies; it was loaded by
    /// `dlopen` in the callee's worker, and is initialised by `dlopen` here.
    pub on_demand: u64,
    /// [`MODULE_INITIALISING`] from its first initialiser on,
    /// [`MODULE_INITIALISED`] once they ran.
    pub initialised: Cell<u64>,
    /// Thread-local storage.
    pub tls: Tls,
    /// Its block on the worker's thread, 0 while that has none: the one that
    /// is found without asking the C library.
    pub home_block: Cell<u64>,
    /// What `dladdr1` and `dlinfo` show of it; filled in by the bridge.
    pub link_map: LinkMap,
}

/// The public head of a `struct link_map` (link.h). Ours are not linked: the
/// dynamic linker's list is its own.
#[derive(Debug)]
#[repr(C)]
pub struct LinkMap {
    /// The bias.
    pub addr: Cell<u64>,
    /// The path.
    pub name: Cell<u64>,
    /// `PT_DYNAMIC`.
    pub ld: Cell<u64>,
    /// 0.
    pub next: u64,
    /// 0.
    pub prev: u64,
}

/// [`Module::initialised`]: its initialisers run (or one of them failed).
pub const MODULE_INITIALISING: u64 = 2;
/// [`Module::initialised`]: its initialisers ran.
pub const MODULE_INITIALISED: u64 = 1;

/// One entry of the order in which `dlsym` looks for a symbol.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ScopeEntry {
    /// Address of a [`Module`] of the graft's, or 0.
    pub module: u64,
    /// Where `module` is 0: the path of a library of the worker's own, as the
    /// worker names it, NUL-terminated.
    pub path: u64,
}

/// One callee in this worker; private memory.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Graft {
    /// Address of its [`SharedEdge`].
    pub shared: u64,
    /// Address of the [`Worker`].
    pub worker: u64,
    /// What a call of it calls: `function`, or [`crate::guard::ng_guarded`].
    /// Stored while the worker is stopped.
    pub call: u64,
    /// What its `faas_create_func_worker` gave.
    pub handle: Cell<u64>,
    /// `STATE_…`.
    pub state: AtomicU8,
    /// 1 while its `faas_func_call` runs: one active call per image.
    pub busy: Cell<u8>,
    /// An append of the running call found no memory: the call fails, and
    /// the gate goes off.
    pub starved: Cell<u8>,
    /// Padding.
    pub pad: u8,
    /// Bytes of `scratch` that are not zero.
    pub scratch_used: Cell<u32>,
    /// Floating-point modes as the initialisers left them: MXCSR, and in the
    /// upper half the x87 control word.
    pub modes: Cell<u64>,
    /// Where inputs go that are too long for `scratch`; 0 for nowhere yet.
    pub large: Cell<u64>,
    /// Bytes mapped at `large`.
    pub large_len: Cell<u64>,
    /// Bytes at `large` that are not zero.
    pub large_used: Cell<u64>,
    /// The caller's context of the running call.
    pub caller_context: Cell<u64>,
    /// Output of the running call: first byte, 0 while nothing was appended.
    pub out: Cell<u64>,
    /// Output of the running call: bytes.
    pub out_len: Cell<u64>,
    /// The callee's name, NUL-terminated.
    pub name: u64,
    /// The image's `faas_init`.
    pub faas_init: u64,
    /// The image's `faas_create_func_worker`.
    pub faas_create: u64,
    /// Its images, `[Module]`: the function's library first, then what it
    /// depends on, in the dynamic linker's order (breadth first), then those
    /// that are loaded on demand.
    pub modules: u64,
    /// Number of `modules`.
    pub module_count: u64,
    /// Order of initialisation, `[u64]`: addresses of the modules that are not
    /// on demand, each after what it depends on.
    pub init_order: u64,
    /// Number of `init_order`.
    pub init_order_count: u64,
    /// Where `dlsym` looks, in order: `[ScopeEntry]`.
    pub scope: u64,
    /// Number of `scope`.
    pub scope_count: u64,
    /// Modules that have thread-local storage.
    pub tls_count: u64,
    /// Thread key of what each thread has of the graft, plus one; 0 for none
    /// yet.
    pub tls_key: Cell<u64>,
    /// Thread pointer of the thread that runs initialisers in `dlopen`, 0 when
    /// none does.
    pub opener: AtomicU64,
    /// What the initialisers left to the worker's thread; 0 for nothing.
    pub legacy: Cell<u64>,
    /// Thread pointer of the thread that runs the initialisers, 0 when none.
    pub initialiser: AtomicU64,
    /// `.eh_frame`s of the graft's stubs and of filler that leads there, each
    /// zero-terminated, one after another, an empty one last; 0 for none.
    /// Bridges that knew of one alone register the first.
    pub stub_eh_frame: u64,
    /// The [`Graft`] whose nested calls go here, 0 for the worker's function.
    pub parent: u64,
    /// The graft whose call is active around this one's, 0 for none.
    pub outer: Cell<u64>,
    /// Time-stamp counter at the running call's start, 0 if it is not timed.
    pub started: Cell<u64>,
    /// Floating-point modes of the running call's caller, as `modes`.
    pub caller_modes: Cell<u64>,
    /// Given to initialisers: argument count of the callee's own worker.
    pub argc: u64,
    /// Given to initialisers: arguments of the callee's own worker.
    pub argv: u64,
    /// Environment of the callee's own worker, `char **`; also the variable
    /// that `environ` means to the image.
    pub environ: u64,
    /// Its own of what the C library has once per process.
    pub c_library: CLibrary,
    /// `FAILURE_…`.
    pub failure: Cell<u32>,
    /// What goes with `failure`.
    pub failure_code: Cell<i32>,
    /// Index into [`Control::edges`].
    pub index: u64,
    /// Not 0: neither the caller nor the callee can change MXCSR's modes, so
    /// they are the default ones at every call.
    pub mxcsr_fixed: u64,
    /// The image's `faas_func_call`.
    pub function: u64,
    /// The stack pointer at the call of a guarded `function`.
    pub recovery: Cell<u64>,
    /// Where a guarded call crashed.
    pub crash: Cell<u64>,
    /// Input scratch.
    pub scratch: Scratch,
}

/// Aligned as a nightcore message is.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Scratch(pub core::cell::UnsafeCell<[u8; SCRATCH]>);

/// One rewritten call; private memory. Stubs carry its address.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct Site {
    /// Inline cache: address of the name in a read-only segment of the
    /// caller's library, 0 for none.
    pub name: u64,
    /// The [`Graft`] that `name` means.
    pub graft: u64,
    /// Address of the [`Worker`].
    pub worker: u64,
}
