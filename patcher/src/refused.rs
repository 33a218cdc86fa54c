//! Why an edge is not fused, as a value.

use serde::{Deserialize, Serialize};

use crate::effects::EffectsSeen;

/// Defines the enum together with each refusal's stable code and what lifts
/// it, so that none can be forgotten.
macro_rules! refusals {
    ($($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $field:ident: $type:ty),* $(,)? }
        = $code:literal, $text:literal, $lift:literal;)*) => {
        /// A reason, found by reading alone, why an edge cannot be fused right.
        ///
        /// A refusal leaves the worker byte for byte as it was.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
        #[serde(tag = "code")]
        #[non_exhaustive]
        pub enum Refused {
            $($(#[$meta])* #[error($text)] #[serde(rename = $code)] $name { $($(#[$fmeta])* $field: $type),* },)*
        }

        impl Refused {
            /// The stable code of this refusal, in kebab case.
            #[must_use]
            pub fn code(&self) -> &'static str {
                match self { $(Refused::$name { .. } => $code,)* }
            }

            /// What would lift the refusal.
            #[must_use]
            #[expect(unused_variables, reason = "few texts name a field")]
            pub fn lift(&self) -> String {
                match self { $(Refused::$name { $($field),* } => format!($lift),)* }
            }
        }
    };
}

refusals! {
    /// The caller's library never passes the callee's name to an RPC that the
    /// analysis can see.
    NoSite {
        /// The caller's library, as its container names it.
        library: String,
        /// The callee's name.
        callee: String,
    } = "no-site", "{library} has no call that passes the constant name \"{callee}\" to the RPC",
        "pass the name as a string constant at the call";
    /// A call was found, but its bytes cannot be replaced safely.
    NoWindow {
        /// The caller's library.
        library: String,
        /// The call's address in the library.
        at: u64,
        /// What is in the way.
        reason: String,
    } = "no-window", "the call at {library}+{at:#x} cannot be rewritten: {reason}",
        "compile the caller with other optimisation flags";
    /// The entry of the caller's `faas_func_call` cannot be replaced safely.
    NoEntryWindow {
        /// The caller's library.
        library: String,
        /// What is in the way.
        reason: String,
    } = "no-entry-window", "the entry of faas_func_call in {library} cannot be rewritten: {reason}",
        "compile the caller with other optimisation flags";
    /// A call of the callee cannot be rewritten in place, and neither can the
    /// entry of the worker's own routine, through which it would go instead.
    NoRoutineWindow {
        /// The worker's executable.
        executable: String,
        /// What is in the way.
        reason: String,
    } = "no-routine-window",
        "not every call that may be for the callee can be rewritten, nor can the entry of invoke_func in {executable}: {reason}",
        "pass the name as a string constant at the call, or use a func_worker_v1 compiled with other optimisation flags";
    /// Code of the caller could not be analysed.
    Analysis {
        /// The caller's library.
        library: String,
        /// What is wrong.
        reason: String,
    } = "analysis", "{library} cannot be analysed: {reason}", "rebuild the library with standard tools";
    /// The worker's own RPC routine was not found.
    NoInvokeRoutine {
        /// The worker's executable.
        executable: String,
        /// How many candidates there are.
        found: usize,
    } = "no-invoke-routine", "{executable} has no symbol for FuncWorker::InvokeFuncWrapper, and {found} functions where one is needed that it may pass to faas_create_func_worker as invoke_func",
        "use a func_worker_v1 that is not stripped";
    /// What should make the call is not fused itself.
    NotFused {
        /// The callee that would have to be.
        callee: String,
        /// The worker.
        pid: i32,
    } = "not-fused", "{callee} is not fused in worker {pid}, so nothing below it can be",
        "patch that edge first";
    /// The callee's library lacks a function of the worker_v1 ABI.
    MissingExport {
        /// The callee's library.
        library: String,
        /// The function.
        symbol: String,
    } = "missing-export", "{library} does not export {symbol}", "build the callee as a worker_v1 function library";
    /// A function of the worker_v1 ABI is exported, but not as one that can be
    /// called at its address.
    UnusableExport {
        /// The callee's library.
        library: String,
        /// The function.
        symbol: String,
        /// What it is instead.
        reason: String,
    } = "unusable-export", "{library} exports {symbol}, which {reason}",
        "export it as a plain function: without target_clones or ifunc, and visible";
    /// A segment must lie at an address of more than a page's alignment.
    Alignment {
        /// The callee's library.
        library: String,
        /// The alignment in bytes.
        bytes: u64,
    } = "alignment", "{library} must lie at a multiple of {bytes} bytes",
        "link the callee with -Wl,-z,max-page-size=4096, and align no variable to more than a page";
    /// The callee's image is too large.
    ImageTooLarge {
        /// The callee's library.
        library: String,
        /// Bytes of address space that it takes.
        bytes: u64,
        /// The limit.
        most: u64,
    } = "image-too-large", "{library} takes {bytes} bytes of memory where {most} is the limit",
        "allocate large buffers in faas_init instead of declaring them";
    /// The callee wants thread-local storage of its own at a fixed distance
    /// from the thread pointer, where the threads have none left.
    Tls {
        /// The callee's library.
        library: String,
    } = "tls", "{library} uses the initial-exec model for thread-local storage of its own", "compile it without -ftls-model=initial-exec (and -fPIC instead of -fPIE)";
    /// The callee wants its code changed by relocations.
    TextRelocations {
        /// The callee's library.
        library: String,
    } = "text-relocations", "{library} has text relocations", "compile the callee with -fPIC";
    /// The callee wants executable stacks.
    ExecutableStack {
        /// The callee's library.
        library: String,
    } = "executable-stack", "{library} needs an executable stack", "link the callee with -z noexecstack";
    /// The callee needs a library that it cannot have in the caller's worker.
    Dependency {
        /// The callee's library.
        library: String,
        /// What it needs.
        needed: String,
        /// Why it cannot be had.
        reason: String,
    } = "dependency", "{library} needs {needed}: {reason}",
        "link it statically into the callee, or into the caller's worker as well";
    /// A library that caller and callee would share is not the same one.
    DifferentLibrary {
        /// The library.
        library: String,
        /// Its build-id in the caller's worker, or why there is none.
        caller: String,
        /// Its build-id in the callee's worker.
        callee: String,
    } = "different-library", "{library} is {callee} in the callee's worker but {caller} in the caller's",
        "build both containers from the same base image";
    /// The callee's worker runs on another C library than the caller's.
    OtherLibc {
        /// The callee's library.
        library: String,
        /// The callee's worker's C library.
        callee: String,
        /// The caller's worker's.
        caller: String,
    } = "other-libc", "{library} runs on the C library {callee}, and the caller's worker on {caller}",
        "build both containers on the same C library";
    /// A library that caller and callee would share is older in the caller's
    /// worker than what the callee wants of it.
    TooOld {
        /// The callee's library.
        library: String,
        /// The symbol that it wants, with its version.
        symbol: String,
        /// The caller's library.
        provider: String,
    } = "too-old", "{library} wants {symbol}, which {provider} of the caller's worker does not have",
        "build the caller's container from a base image that is as new as the callee's";
    /// A worker, or what it runs, is not for 64-bit x86-64 Linux.
    OtherMachine {
        /// The file.
        library: String,
        /// What differs.
        what: String,
    } = "other-machine", "{library} is not for 64-bit x86-64 Linux: {what}",
        "build it for x86-64";
    /// A symbol that the callee imports is nowhere in its scope.
    UnresolvedSymbol {
        /// The callee's library.
        library: String,
        /// The symbol, with its version.
        symbol: String,
    } = "unresolved-symbol", "{library} imports {symbol}, which nothing in its worker defines",
        "link the callee against what defines it";
    /// The callee imports a function that would see the process as its own.
    UnsupportedImport {
        /// The callee's library.
        library: String,
        /// The function.
        symbol: String,
        /// What would go wrong.
        reason: String,
    } = "unsupported-import", "{library} imports {symbol}, which {reason}", "do without it in the callee";
    /// The callee throws or catches exceptions, or cleans up behind them.
    Exceptions {
        /// The callee's library.
        library: String,
        /// The import that shows it.
        symbol: String,
    } = "exceptions", "{library} imports {symbol}: it takes part in exceptions, and the worker's unwinder would not know its frames",
        "use a worker that has libgcc_s loaded (every C++ worker has), or build the callee with -fno-exceptions";
    /// Caller and callee use one hidden variable of the C library, in the
    /// middle of whose use the caller may be when it makes the call.
    SharedState {
        /// The caller's library.
        caller: String,
        /// The callee's library.
        library: String,
        /// The function or variable that the callee imports.
        symbol: String,
    } = "shared-state", "{library} and {caller} would share the hidden state of {symbol}",
        "use the re-entrant function in either of them (hsearch_r, getpwent_r, ...)";
    /// The callee may touch what is the caller's, and that is not allowed.
    Effects {
        /// The callee's library.
        library: String,
        /// What it shows and is not allowed.
        seen: EffectsSeen,
        /// Everything that needs to be allowed, as `--allow-effects` takes it.
        flag: String,
    } = "effects", "fused, {library} would use the caller's, which nobody allowed: {seen}",
        "if that may be the caller's, patch with --allow-effects {flag}, or have allow-effects say so for the edge in the agent's configuration";
    /// A crash of the callee's could not be kept from the caller.
    NoGuard {
        /// The library that is in the way.
        library: String,
        /// Why.
        reason: String,
    } = "no-guard", "calls of {library} cannot be guarded: {reason}",
        "patch without --guard, or take `guard = true` for this edge out of the agent's configuration: a crash of the callee is then one of its caller";
    /// A relocation that is not supported.
    UnsupportedRelocation {
        /// The callee's library.
        library: String,
        /// `R_X86_64_…`, as a number.
        kind: u32,
        /// The address in the image that it changes.
        at: u64,
    } = "unsupported-relocation", "{library} has a relocation of kind {kind} at {at:#x}",
        "build the callee with standard tools and flags";
    /// The callee's file is not consistent.
    BrokenImage {
        /// The callee's library.
        library: String,
        /// What is wrong.
        reason: String,
    } = "broken-image", "{library} cannot be loaded: {reason}", "rebuild the callee";
    /// A file was replaced on disk since it was mapped.
    Replaced {
        /// The file.
        path: String,
        /// The worker that has the old one mapped.
        pid: i32,
    } = "replaced", "{path} was replaced on disk since worker {pid} has mapped it", "restart that worker";
    /// No free addresses near the caller's library.
    NoRoomNear {
        /// The caller's library.
        library: String,
        /// Bytes that were wanted.
        bytes: u64,
    } = "no-room-near", "no {bytes} free bytes of address space within 2 GiB of {library}",
        "raise the worker's address space limit";
    /// The worker's memory limit leaves too little room.
    MemoryLimit {
        /// Bytes wanted.
        bytes: u64,
        /// Bytes left below the limit.
        room: u64,
    } = "memory-limit", "{bytes} bytes are needed and the worker's limit leaves {room}",
        "raise the container's memory limit";
    /// The worker's limits of address space leave too little.
    AddressSpaceLimit {
        /// The limit: `RLIMIT_AS` or `RLIMIT_DATA`.
        limit: String,
        /// Bytes wanted.
        bytes: u64,
        /// Bytes left below the limit.
        room: u64,
    } = "address-space-limit", "{bytes} bytes of address space are needed and {limit} leaves {room}",
        "raise the worker's {limit}";
    /// The kernel gave the worker no memory, for a reason that could not be
    /// read beforehand. What had been mapped is unmapped again.
    NoMemory {
        /// The worker.
        pid: i32,
        /// The call that failed.
        call: String,
    } = "no-memory", "worker {pid} has no memory left for {call}",
        "raise the worker's limits (memory, address space, vm.max_map_count)";
    /// The worker cannot make a system call that is needed. Where that was
    /// found by trying, what had been done is undone.
    CallDenied {
        /// The worker.
        pid: i32,
        /// The call's name.
        call: String,
        /// What happens instead.
        why: String,
    } = "call-denied", "worker {pid} cannot call {call}: {why}",
        "let the worker's seccomp profile or security module allow {call}";
    /// The worker has added seccomp filters of its own, which the agent cannot
    /// read: a call may kill it.
    FilterUnknown {
        /// The worker.
        pid: i32,
        /// The first call that is needed.
        call: String,
    } = "filter-unknown", "worker {pid} has a seccomp filter of its own, which cannot be read: it may kill at {call} or another call that is needed",
        "give the agent CAP_SYS_ADMIN and no seccomp filter (--cap-add SYS_ADMIN --security-opt seccomp=unconfined), so that it can read the worker's";
    /// The worker is frozen: its threads cannot be stopped, nor do they run.
    Frozen {
        /// The worker.
        pid: i32,
    } = "frozen", "worker {pid} is in a frozen control group", "thaw it (docker unpause), and try again";
    /// A thread did not stop in time.
    NotStopping {
        /// The worker.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Its state as in `/proc/PID/stat`: D is an uninterruptible wait.
        state: char,
    } = "not-stopping", "thread {tid} of worker {pid} (state {state}) cannot be stopped",
        "try again when the thread has what it waits for (a vfork's child, storage), or the node is less busy";
    /// No thread could be found or left where it may be changed.
    NoMoment {
        /// The worker.
        pid: i32,
        /// Milliseconds that were tried.
        waited_ms: u64,
        /// What was in the way.
        reason: String,
    } = "no-moment", "no safe moment in worker {pid} within {waited_ms} ms: {reason}",
        "try again when the thread has moved on";
    /// The bytes at a site are neither the library's nor ours.
    ForeignBytes {
        /// Live address.
        at: u64,
        /// Bytes expected, hex.
        expected: String,
        /// Bytes found, hex.
        found: String,
    } = "foreign-bytes", "the bytes at {at:#x} are {found} instead of {expected}: another tool was here",
        "remove the other tool's breakpoint or patch";
    /// What would be done cannot be written down, or what is written down of
    /// the worker is not for this agent.
    Journal {
        /// Why.
        reason: String,
    } = "journal", "the journal cannot be relied on: {reason}",
        "make the agent's --state-dir readable and writable again, with room on its disk (`agentctl health` says how it is); reverts work all the same";
    /// The worker cannot be put in order after an agent died in it.
    Unreconciled {
        /// The worker.
        pid: i32,
        /// What was found.
        reason: String,
    } = "unreconciled", "what is in worker {pid} cannot be reconciled with its records: {reason}",
        "leave it running as it is, or restart it";
    /// The worker holds a bridge of another version, or its record is damaged.
    OtherBridge {
        /// What was found.
        found: String,
    } = "other-bridge", "the worker holds {found}", "revert with the agent that made it, or restart the worker";
    /// The worker holds as many callees as it can.
    TooManyGrafts {
        /// The limit.
        most: usize,
    } = "too-many-grafts", "the worker holds {most} callees already", "restart the worker to drop unused images";
}
