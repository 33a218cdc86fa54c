use std::arch::naked_asm;
use std::ffi::{c_char, c_int, c_void};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::image::{self, bridge, functions};
use super::{NAME, World, string};
use crate::abi::{
    FAILURE_EXCEPTION, STATE_FAILED, STATE_INITIALISED, STATE_INITIALISING, STATE_READY, Worker,
};
use crate::sys;

/// What the stub of a site holds.
static SITE: AtomicU64 = AtomicU64::new(0);
static ENTER: AtomicU64 = AtomicU64::new(0);
/// What its call meant: the worker's `invoke_func`.
pub(super) static TARGET: AtomicU64 = AtomicU64::new(0);
/// Calls that took the RPC.
static RPCS: AtomicU64 = AtomicU64::new(0);

/// A site's stub: in place of `invoke_func`.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn site(
    context: *mut c_void,
    name: *const c_char,
    input: *const u8,
    len: usize,
    output: *mut *const u8,
    output_len: *mut usize,
) -> c_int {
    naked_asm!(
        "push [rip + {target}]",
        "mov r11, [rip + {site}]",
        "jmp [rip + {enter}]",
        target = sym TARGET,
        site = sym SITE,
        enter = sym ENTER,
    );
}

/// The worker's `invoke_func`.
unsafe extern "C" fn rpc(_: u64, _: u64, _: u64, _: u64, _: u64, _: u64) -> c_int {
    RPCS.fetch_add(1, SeqCst);
    -2
}

pub(super) fn call(input: &str) -> (c_int, Option<Vec<u8>>) {
    let (mut output, mut len) = (core::ptr::dangling::<u8>(), 1_usize);
    // SAFETY: the stub does what `invoke_func` does.
    let result = unsafe {
        site(
            core::ptr::null_mut(),
            string(NAME) as *const c_char,
            input.as_ptr(),
            input.len(),
            &mut output,
            &mut len,
        )
    };
    // SAFETY: as `invoke_func` promises.
    let bytes = (!output.is_null() && result != -2)
        .then(|| unsafe { core::slice::from_raw_parts(output, len) }.to_vec());
    assert!(result == -2 || bytes.is_some() || len == 0);
    (result, bytes)
}

/// A world whose bridge is the image, and whose callee is the C++ one.
pub(super) fn world() -> World {
    // Before the records: its libraries' functions are among the imports.
    let functions = functions();
    let world = World::new(&[crate::abi::Tls::default()]);
    let slot = bridge().get("ng_worker");
    let worker = core::ptr::from_mut(world.worker);
    // SAFETY: the page holds constants that nobody reads meanwhile.
    unsafe {
        let page = (slot & !4095) as *mut c_void;
        libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_WRITE);
        (slot as *mut u64).write(worker as u64);
        libc::mprotect(page, 4096, libc::PROT_READ);
        (functions.get("append") as *mut u64).write(bridge().get("ng_append"));
    }
    world.graft.call = functions.get("callee");
    world.worker.invoke = rpc as *const () as u64;
    TARGET.store(world.worker.invoke, SeqCst);
    (world.worker.text_low, world.worker.text_high) = super::observe::outermost();
    SITE.store(core::ptr::from_mut(world.site) as u64, SeqCst);
    ENTER.store(bridge().get("ng_enter"), SeqCst);
    world
}

/// First call and, once they are through, the state of the initialisers.
pub(super) fn first_call(world: &World) -> u8 {
    assert_eq!(call("a").0, -2);
    loop {
        match world.graft.state.load(SeqCst) {
            STATE_INITIALISING => std::thread::yield_now(),
            state => return state,
        }
    }
}

fn ready() -> World {
    let world = world();
    assert_eq!(first_call(&world), STATE_INITIALISED);
    assert_eq!(call("abc"), (0, Some(b"abc".to_vec())));
    assert_eq!(world.graft.state.load(SeqCst), STATE_READY);
    world
}

pub(super) fn idle(world: &World) {
    assert_eq!(world.graft.busy.get(), 0);
    assert_eq!(world.worker.active.get(), 0);
}

pub(super) fn counts(world: &World) -> (u64, u64, u64) {
    let shared = world.shared;
    (
        shared.entered.load(SeqCst),
        shared.returned.load(SeqCst),
        shared.errors.load(SeqCst),
    )
}

/// An entry into the caller's `faas_func_call` from the worker's executable.
fn outermost_entry(world: &World) {
    if world.worker.dirty.get() != 0 {
        assert_eq!(super::observe::enter(world, [0, 0, 0]), 9);
    }
}

#[test]
fn exceptions_become_failed_calls_and_are_destroyed() {
    let world = ready();
    for (index, input) in (1..).zip(["throw", "foreign", "throw", "error"]) {
        assert_eq!(call(input), (-1, None), "{input}");
        idle(&world);
        assert_eq!(counts(&world), (1 + index, 1 + index, index));
        assert_eq!(functions().int("alive"), 0, "{input}");
    }
    assert_eq!(call("xyz"), (0, Some(b"xyz".to_vec())));
    assert_eq!(world.shared.bytes_in.load(SeqCst), 3 + 5 + 7 + 5 + 5 + 3);
}

#[test]
fn an_exception_leaves_the_callers_floating_point_modes() {
    let world = ready();
    let before = sys::modes(false);
    // Denormals are zero; x87 in double precision.
    let theirs = 0x1fc0 | 0x27f << 32;
    sys::set_modes(theirs);
    let result = call("modes");
    let after = sys::modes(false);
    sys::set_modes(before);
    assert_eq!(result, (-1, None));
    assert_eq!(after & !sys::EXCEPTION_FLAGS, theirs);
    idle(&world);
}

#[test]
fn a_call_that_was_left_by_a_jump_is_over_at_the_next_outermost_entry() {
    let world = ready();
    let caller: extern "C" fn(*const c_void, *const c_char) -> c_int =
        // SAFETY: its type.
        unsafe { core::mem::transmute(functions().get("left_by_jump") as usize) };
    outermost_entry(&world);
    assert_eq!(world.worker.dirty.get(), 0);
    assert_eq!(
        caller(site as *const c_void, string(NAME) as *const c_char),
        77
    );
    assert_eq!(world.graft.busy.get(), 1);
    assert_eq!(call("abc").0, -2, "the image may be in any state");
    assert_eq!(world.shared.rpc_busy.load(SeqCst), 1);
    outermost_entry(&world);
    idle(&world);
    assert_eq!(counts(&world), (2, 2, 1));
    assert_eq!(call("abc"), (0, Some(b"abc".to_vec())));
}

#[test]
fn a_call_that_the_callee_left_by_a_jump_ends_with_the_callees() {
    let world = ready();
    // The same callee under another name, called by the one that is entered.
    let inner: &'static mut crate::abi::Graft = super::zeroed();
    // SAFETY: a record is integers and cells; the functions have these types.
    unsafe {
        core::ptr::copy_nonoverlapping(&raw const *world.graft, inner, 1);
        (functions().get("nested") as *mut u64).write(site as *const () as u64);
        (functions().get("nested_name") as *mut u64).write(string("Inner"));
    }
    inner.name = string("Inner");
    inner.handle.set(&raw const *inner as u64);
    world.graft.call = functions().get("outer");
    world.worker.grafts[1] = &raw const *inner as u64;
    world.worker.count = 2.into();
    world.worker.names = crate::names::fill([(NAME.as_bytes(), 0), (b"Inner", 1)]);
    // Both grafts count on one edge here: two calls each time.
    for (calls, errors, input, result) in [(3, 1, "ok", 0), (5, 3, "throw", -1)] {
        assert_eq!(call(input).0, result);
        idle(&world);
        assert_eq!(inner.busy.get(), 0, "its next call runs");
        assert_eq!(counts(&world), (calls, calls, errors));
    }
}

/// The worker that [`bind_thread`] tells its thread.
static WORKER: AtomicU64 = AtomicU64::new(0);

extern "C" fn bind_thread() {
    // SAFETY: the test waits for the thread.
    unsafe { (*(WORKER.load(SeqCst) as *mut Worker)).thread = sys::thread_pointer() };
}

/// A thread that calls `name` as the worker's, which ends it.
pub(super) fn ends_in_a_call(world: &World, name: &str) {
    WORKER.store(core::ptr::from_ref(&*world.worker) as u64, SeqCst);
    let argument = [
        site as *const () as u64,
        string(name),
        bind_thread as *const () as u64,
    ];
    // SAFETY: the thread's function is C++; no frame of Rust's is unwound.
    unsafe {
        let mut thread = 0;
        let main = core::mem::transmute::<usize, extern "C" fn(*mut c_void) -> *mut c_void>(
            functions().get("thread_main") as usize,
        );
        let argument = argument.as_ptr().cast_mut().cast();
        assert_eq!(
            libc::pthread_create(&mut thread, core::ptr::null(), main, argument),
            0
        );
        let mut result = core::ptr::dangling_mut();
        libc::pthread_join(thread, &mut result);
        assert!(result.is_null(), "the thread returned");
    }
}

#[test]
fn a_thread_that_ends_in_a_fused_call_ends_and_leaves_order() {
    let world = ready();
    let witnessed = functions().int("witnessed");
    ends_in_a_call(&world, NAME);
    assert_eq!(
        functions().int("witnessed"),
        witnessed + 1,
        "the caller's cleanups ran"
    );
    assert_eq!(
        functions().int("modes") & 0x40,
        0x40,
        "in the caller's modes"
    );
    assert_eq!(functions().int("alive"), 0, "the callee's too");
    idle(&world);
    assert_eq!(counts(&world), (2, 2, 1));
}

#[test]
fn initialisers_that_throw_or_end_their_thread_fail_the_graft() {
    for name in ["throwing_constructor", "exiting_constructor"] {
        let world = world();
        let module = &mut world.modules[0];
        module.inits = Vec::leak(vec![functions().get(name)]).as_ptr() as u64;
        module.init_count = 1;
        assert_eq!(first_call(&world), STATE_FAILED, "{name}");
        assert_eq!(world.graft.failure.get(), FAILURE_EXCEPTION, "{name}");
        assert_eq!(world.shared.gate.load(SeqCst), 0);
        assert_eq!(call("abc").0, -2);
    }
    let world = world();
    world.graft.faas_create = functions().get("throwing_create");
    assert_eq!(first_call(&world), STATE_FAILED);
    assert_eq!(world.graft.failure.get(), FAILURE_EXCEPTION);
}

/// `sub rsp, 8; movabs rax, function; call rax; add rsp, 8; ret` in memory
/// that no library knows.
fn generated(function: u64) -> u64 {
    let mut code = vec![0x48, 0x83, 0xec, 0x08, 0x48, 0xb8];
    code.extend(function.to_le_bytes());
    code.extend([0xff, 0xd0, 0x48, 0x83, 0xc4, 0x08, 0xc3]);
    // SAFETY: a new mapping.
    unsafe {
        let at = libc::mmap(
            core::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        core::ptr::copy_nonoverlapping(code.as_ptr(), at.cast(), code.len());
        libc::mprotect(at, 4096, libc::PROT_READ | libc::PROT_EXEC);
        at as u64
    }
}

/// Unwind table of [`generated`] code.
fn table(code: u64) -> u64 {
    Vec::leak(table_bytes(code)).as_ptr() as u64
}

/// Tables one after another.
fn tables(codes: &[u64]) -> u64 {
    let mut bytes: Vec<u8> = codes.iter().flat_map(|code| table_bytes(*code)).collect();
    bytes.extend([0; 4]);
    Vec::leak(bytes).as_ptr() as u64
}

fn table_bytes(code: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    // CIE: version 1, no augmentation, code and data alignment, rip;
    // DW_CFA_def_cfa rsp 8, DW_CFA_offset rip 1.
    bytes.extend(20_u32.to_le_bytes());
    bytes.extend([0, 0, 0, 0, 1, 0, 1, 0x78, 16, 0x0c, 7, 8, 0x90, 1]);
    bytes.resize(24, 0);
    // FDE: DW_CFA_advance_loc 4, DW_CFA_def_cfa_offset 16.
    bytes.extend(28_u32.to_le_bytes());
    bytes.extend(28_u32.to_le_bytes());
    bytes.extend(code.to_le_bytes());
    bytes.extend(21_u64.to_le_bytes());
    bytes.extend([0x44, 0x0e, 16]);
    bytes.resize(56, 0);
    bytes.extend([0; 4]);
    bytes
}

#[test]
fn unwind_tables_of_images_and_stubs_are_registered() {
    let world = world();
    let inner = generated(functions().get("thrower"));
    let middle = generated(inner);
    let outer = generated(middle);
    world.modules[0].eh_frame = table(inner);
    world.graft.stub_eh_frame = tables(&[middle, outer]);
    world.graft.call = outer;
    assert_eq!(first_call(&world), STATE_INITIALISED);
    assert_eq!(world.worker.eh_frame_registered.load(SeqCst), 2);
    assert_eq!(call("abc"), (-1, None));
    idle(&world);
    assert_eq!(functions().int("alive"), 0);
}

/// Address of `finalised` and a digit's functions.
static FINALISED: AtomicU64 = AtomicU64::new(0);

fn digit(digit: i32) {
    let at = FINALISED.load(SeqCst) as *mut i32;
    // SAFETY: the tests' variable.
    unsafe { *at = *at * 10 + digit };
}

unsafe extern "C" fn first_fini() {
    digit(1);
}

unsafe extern "C" fn second_fini() {
    digit(2);
}

unsafe extern "C" fn registered_by_constructor() {
    digit(3);
}

unsafe extern "C" fn registering_constructor() {
    // SAFETY: a plain exit handler.
    unsafe {
        let handler: extern "C" fn() = core::mem::transmute(registered_by_constructor as *const ());
        libc::atexit(handler);
    }
}

/// Runs last: it was registered first.
extern "C" fn report() {
    // SAFETY: ends the child with what ran.
    unsafe { libc::_exit(*(FINALISED.load(SeqCst) as *const i32) - 256) };
}

#[test]
fn finalisers_run_at_the_exit_after_what_constructors_registered() {
    let world = world();
    FINALISED.store(functions().get("finalised"), SeqCst);
    let module = &mut world.modules[0];
    module.inits = Vec::leak(vec![registering_constructor as *const () as u64]).as_ptr() as u64;
    module.init_count = 1;
    let finis = [
        second_fini as *const () as u64,
        first_fini as *const () as u64,
    ];
    module.finis = finis.as_ptr() as u64;
    module.fini_count = 2;
    // SAFETY: the child makes its own thread and exits.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::atexit(report);
            let state = first_call(&world);
            if state != STATE_INITIALISED || call("a").0 != 0 {
                libc::_exit(1);
            }
            libc::exit(0);
        }
        let mut status = -1;
        libc::waitpid(child, &mut status, 0);
        assert!(libc::WIFEXITED(status), "{status:#x}");
        assert_eq!(libc::WEXITSTATUS(status) + 256, 321);
    }
}

#[test]
fn the_image_needs_nobody_and_writes_nowhere() {
    let read = |argument: &str| {
        let output = Command::new("readelf")
            .arg(argument)
            .arg("-W")
            .arg(image::path())
            .output();
        String::from_utf8(output.expect("readelf").stdout).expect("text")
    };
    let symbols = read("--dyn-syms");
    assert!(symbols.contains(" ng_worker"), "{symbols}");
    let undefined = symbols
        .lines()
        .filter(|line| line.contains(" UND "))
        .count();
    assert_eq!(undefined, 1, "only the null symbol: {symbols}");
    let sections = read("-S");
    for name in [".data ", ".bss", ".data.rel.ro", ".gcc_except_table"] {
        assert!(!sections.contains(name), "{name}: {sections}");
    }
    for kind in read("-r").lines().filter(|line| line.contains("R_X86_64_")) {
        let own = kind.contains("R_X86_64_GLOB_DAT") && kind.contains(" ng_");
        assert!(own || kind.contains("R_X86_64_RELATIVE"), "{kind}");
    }
}
