//! Layouts that the patcher writes and the bridge reads, and the other way
//! round. Everything is `repr(C)`; addresses are `u64` because the patcher
//! builds these structures for another process.
//!
//! ```text
//!  Control (memfd, shared with forked children; gates and counters only)
//!    ├─ edges[i]  SharedEdge ◄────────────┐
//!    └─ manifest slots A, B               │
//!  Worker (private) ─ grafts[i] ─► Graft ─┘ (private; one per callee image)
//!  Site (private; one per rewritten call) ─► inline cache ─► Graft
//!  Routine (private; at invoke_func's entry) ─► Worker ─ names ─► Graft
//! ```

use core::cell::Cell;
use core::sync::atomic::{AtomicU8, AtomicU64};

/// First bytes of a [`Control`] area.
pub const MAGIC: [u8; 8] = *b"NGRAFT\0\x01";
/// Version of every layout in this module; an agent refuses others.
pub const BRIDGE_VERSION: u32 = 1;
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

/// [`Graft::failure`]: the thread for the initialisers could not be started;
/// the code is an errno.
pub const FAILURE_THREAD: u32 = 1;
/// [`Graft::failure`]: `faas_init` returned the code.
pub const FAILURE_FAAS_INIT: u32 = 2;
/// [`Graft::failure`]: `faas_create_func_worker` returned the code.
pub const FAILURE_FAAS_CREATE: u32 = 3;
/// [`Graft::failure`]: sealing the RELRO pages failed; the code is an errno.
pub const FAILURE_RELRO: u32 = 4;

/// Gate and counters of one edge, in shared memory.
///
/// Each counter has one writer, the worker's thread, and is written without a
/// lock prefix; readers see every value whole or a little late.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct SharedEdge {
    /// 1: calls may run fused; 0: they take the RPC.
    pub gate: AtomicU8,
    /// Padding, so that the counters start aligned.
    pub pad: [u8; 7],
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
    /// Padding.
    pub pad: [u8; 3],
    /// Address of the [`Worker`].
    pub worker: u64,
    /// Calls that passed a site with a name that no graft has.
    pub other_name: AtomicU64,
    /// Calls that passed a site with another target than `invoke_func`.
    pub other_target: AtomicU64,
    /// Calls that passed a site on another thread than the worker's.
    pub other_thread: AtomicU64,
    /// One per graft, by [`Graft::index`].
    pub edges: [SharedEdge; MAX_GRAFTS],
    /// Calls of known callees that came through the entry of the worker's own
    /// routine, by return address; a hash table.
    pub seen: [Seen; SEEN],
    /// Each slot: length (u32 little-endian), CRC-32 of the text, the text.
    pub slots: [[u8; MANIFEST_SLOT]; 2],
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
    /// The C library's `pthread_create`.
    pub pthread_create: u64,
    /// The C library's `pthread_detach`.
    pub pthread_detach: u64,
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
    /// Something lies in the arena: the hook in `faas_func_call` has work.
    pub dirty: Cell<u8>,
    /// Padding.
    pub pad: [u8; 6],
    /// Addresses of [`Graft`]s.
    pub grafts: [u64; MAX_GRAFTS],
    /// Hash table of the grafts' names: places in `grafts`, plus one; 0 for
    /// none. Made by [`crate::names::fill`], stored while the worker is stopped.
    pub names: [u8; NAME_SLOTS],
    /// The displaced entry of `invoke_func`, which goes on behind our window
    /// there; 0 while there has been none. Stays true when the window is gone.
    pub resume: AtomicU64,
}

/// The window at the entry of `invoke_func`; private memory. Its stub carries
/// the address.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct Routine {
    /// Address of the [`Worker`].
    pub worker: u64,
    /// Where the RPC goes on: as [`Worker::resume`].
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

/// One callee's image in this worker; private memory.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Graft {
    /// Address of its [`SharedEdge`].
    pub shared: u64,
    /// Address of the [`Worker`].
    pub worker: u64,
    /// The image's `faas_func_call`.
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
    /// MXCSR as the initialisers left it.
    pub mxcsr: Cell<u32>,
    /// x87 control word as the initialisers left it.
    pub fpucw: Cell<u32>,
    /// Bytes of `scratch` that are not zero.
    pub scratch_used: Cell<u32>,
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
    /// Given to `inits`: argument count of the callee's own worker.
    pub argc: u64,
    /// Given to `inits`: arguments of the callee's own worker.
    pub argv: u64,
    /// Environment of the callee's own worker, `char **`; also the variable
    /// that `environ` means to the image.
    pub environ: u64,
    /// `FAILURE_…`.
    pub failure: Cell<u32>,
    /// What goes with `failure`.
    pub failure_code: Cell<i32>,
    /// Index into [`Control::edges`].
    pub index: u64,
    /// Not 0: neither the caller nor the callee can change MXCSR's modes, so
    /// they are the default ones at every call.
    pub mxcsr_fixed: u64,
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
