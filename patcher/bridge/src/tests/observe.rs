use std::arch::naked_asm;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::image::{bridge, functions};
use super::unwind::{TARGET, call, first_call, site, world};
use super::{World, string};
use crate::abi::{Control, Routine};
use crate::cells::{CELL_NAME, CELL_READY, CELLS, Cells, Series};
use crate::histogram::{BUCKETS, bucket, lowest};

fn control(world: &World) -> &'static Control {
    // SAFETY: the world's, leaked.
    unsafe { &*(world.worker.control as *const Control) }
}

fn observe(world: &World, on: bool) {
    control(world).observing.store(u8::from(on), SeqCst);
    world.worker.dirty.set(u8::from(on));
}

fn empty() -> Box<Cells> {
    // SAFETY: integers and atomics, too large for a stack.
    unsafe { Box::from_raw(std::alloc::alloc_zeroed(std::alloc::Layout::new::<Cells>()).cast()) }
}

fn find<'a>(cells: &'a Cells, caller: u64, name: &str, at: u64) -> Option<&'a crate::cells::Cell> {
    // SAFETY: a string.
    unsafe { cells.find(caller, string(name), at) }
}

fn name_of(cell: &crate::cells::Cell) -> String {
    let bytes = cell.name.iter().map(|b| b.load(SeqCst));
    String::from_utf8(bytes.take_while(|b| *b != 0).collect()).expect("UTF-8")
}

/// What is counted: (caller, name) by calls, errors, bytes in and out.
fn counted(cells: &Cells) -> BTreeMap<(u64, String), [u64; 4]> {
    let mut all = BTreeMap::new();
    for cell in cells
        .cells
        .iter()
        .filter(|c| c.state.load(SeqCst) == CELL_READY)
    {
        let key = (cell.caller.load(SeqCst), name_of(cell));
        let sum: &mut [u64; 4] = all.entry(key).or_default();
        for (to, from) in sum.iter_mut().zip(numbers(&cell.calls)) {
            *to += from;
        }
        let other = &cell.elsewhere;
        assert_eq!(other.entered.load(SeqCst), other.returned.load(SeqCst));
        let other = [
            &other.returned,
            &other.errors,
            &other.bytes_in,
            &other.bytes_out,
        ];
        for (to, from) in sum.iter_mut().zip(other) {
            *to += from.load(SeqCst);
        }
    }
    all
}

/// Calls that came back, errors, bytes in and out; all that began came back.
fn numbers(calls: &Series) -> [u64; 4] {
    let Series {
        entered,
        returned,
        errors,
        bytes_in,
        bytes_out,
        ..
    } = calls;
    assert_eq!(entered.load(SeqCst), returned.load(SeqCst));
    [returned, errors, bytes_in, bytes_out].map(|n| n.load(SeqCst))
}

#[test]
fn buckets_are_found_again_and_leave_nothing_out() {
    for at in 0..BUCKETS {
        assert_eq!(bucket(lowest(at)), at);
        assert_eq!(bucket(lowest(at + 1) - 1), at);
        let (low, high) = (lowest(at), lowest(at + 1));
        assert!(at == 0 || high - low <= low / 4, "{low} {high}");
    }
    assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS - 1));
}

#[test]
fn a_cell_is_found_again_by_all_that_makes_it() {
    let cells = empty();
    let long = "n".repeat(CELL_NAME);
    let longer = format!("{long}er");
    let keys = [
        (0, "Bar", 0x1000),
        (0, "Bar", 0x1001),
        (0, "Baz", 0x1000),
        (8, "Bar", 0x1000),
        (0, "", 0x1000),
        (0, long.as_str(), 0x1000),
        (0, longer.as_str(), 0x1000),
    ];
    let of = |(caller, name, at): (u64, &str, u64)| {
        core::ptr::from_ref(find(&cells, caller, name, at).expect("room")) as u64
    };
    let first: Vec<u64> = keys.iter().map(|key| of(*key)).collect();
    let again: Vec<u64> = keys.iter().map(|key| of(*key)).collect();
    assert_eq!(first, again);
    let different: std::collections::BTreeSet<u64> = first.into_iter().collect();
    assert_eq!(different.len(), keys.len());
    // SAFETY: no name is one.
    assert!(unsafe { cells.find(0, 0, 0x1000) }.is_none());
    assert_eq!(name_of(&cells.cells[5]), long);
    assert_eq!(name_of(&cells.cells[6]), long);
}

#[test]
fn a_name_at_the_end_of_a_page_is_read_no_further() {
    // SAFETY: two pages, the second of which nobody may read.
    let page = unsafe {
        let pages = libc::mmap(
            core::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        libc::mprotect(pages.byte_add(4096), 4096, libc::PROT_NONE);
        pages as u64
    };
    let cells = empty();
    for name in ["Bar", "Barbarian", "B", ""] {
        let at = page + 4096 - name.len() as u64 - 1;
        // SAFETY: within the page.
        let cell = unsafe {
            core::ptr::copy_nonoverlapping(name.as_ptr(), at as *mut u8, name.len());
            ((at + name.len() as u64) as *mut u8).write(0);
            cells.find(0, at, 1).expect("room")
        };
        assert_eq!(name_of(cell), name);
        // SAFETY: as above.
        let again = unsafe { cells.find(0, at, 1) };
        assert!(core::ptr::eq(cell, again.expect("there")));
    }
}

#[test]
fn what_finds_no_cell_is_told() {
    let cells = empty();
    for index in 0..CELLS {
        assert!(find(&cells, 0, &format!("f{index}"), 1).is_some());
    }
    assert!(find(&cells, 0, "one more", 1).is_none());
    assert!(find(&cells, 0, "f7", 1).is_some());
    assert!(find(&cells, 0, "f7", 2).is_none());
}

#[test]
fn threads_that_make_the_same_cell_share_it() {
    const THREADS: usize = 8;
    const ROUNDS: usize = 2_000;
    for _ in 0..20 {
        let cells = empty();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let cells = &cells;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let name = format!("f{}", (round + thread) % 7);
                        let cell = find(cells, 0, &name, 1).expect("room");
                        cell.elsewhere.entered.fetch_add(1, SeqCst);
                        cell.elsewhere.returned.fetch_add(1, SeqCst);
                    }
                });
            }
        });
        let ready = cells
            .cells
            .iter()
            .filter(|c| c.state.load(SeqCst) == CELL_READY);
        assert_eq!(ready.count(), 7);
        let sum: u64 = counted(&cells).values().map(|n| n[0]).sum();
        assert_eq!(sum, (THREADS * ROUNDS) as u64);
    }
}

/// An RPC through a site, with a name.
fn rpc(name: &str, input: &str) -> (c_int, Option<Vec<u8>>) {
    let (mut output, mut len) = (core::ptr::dangling::<u8>(), 1_usize);
    // SAFETY: the stub does what `invoke_func` does.
    let result = unsafe {
        site(
            core::ptr::null_mut(),
            string(name) as *const c_char,
            input.as_ptr(),
            input.len(),
            &mut output,
            &mut len,
        )
    };
    // SAFETY: the routine gives what it was given.
    let bytes = (!output.is_null())
        .then(|| unsafe { core::slice::from_raw_parts(output, len - 1) }.to_vec());
    (result, bytes)
}

fn with_routine() -> World {
    let world = world();
    world.worker.invoke = functions().get("own_routine");
    TARGET.store(world.worker.invoke, SeqCst);
    world
}

#[test]
fn rpcs_are_counted_while_that_is_on_and_give_what_they_gave() {
    let world = with_routine();
    let ok = |text: &str| (0, Some(text.as_bytes().to_vec()));
    assert_eq!(rpc("Qux", "abc"), ok("abc"));
    assert!(counted(&control(&world).cells).is_empty());
    observe(&world, true);
    for _ in 0..1_000 {
        assert_eq!(rpc("Qux", "abc"), ok("abc"));
    }
    assert_eq!(rpc("Qux", "error"), (-1, None));
    assert_eq!(rpc("Quux", "abcdef"), ok("abcdef"));
    let expected = BTreeMap::from([
        ((0, "Qux".to_owned()), [1_001, 1, 3_005, 4_000]),
        ((0, "Quux".to_owned()), [1, 0, 6, 7]),
    ]);
    assert_eq!(counted(&control(&world).cells), expected);
    let cell = &control(&world).cells.cells[0].calls;
    let samples = cell.samples.load(SeqCst);
    assert!((70..=190).contains(&samples), "{samples}");
    let in_buckets: u64 = cell
        .histogram
        .0
        .iter()
        .map(|n| u64::from(n.load(SeqCst)))
        .sum();
    assert_eq!(in_buckets, samples);
    assert!(cell.sampled_cycles.load(SeqCst) > samples);
    observe(&world, false);
    assert_eq!(rpc("Qux", "abc"), ok("abc"));
    assert_eq!(counted(&control(&world).cells), expected);
}

#[test]
fn while_another_thread_makes_our_frames_known_there_are_none() {
    let world = with_routine();
    observe(&world, true);
    world.worker.eh_frame_registered.store(1, SeqCst);
    assert_eq!(rpc("Qux", "abc"), (0, Some(b"abc".to_vec())));
    assert_eq!(enter(&world, [1, 2, 3]), 9);
    let control = control(&world);
    assert!(counted(&control.cells).is_empty());
    assert_eq!(control.cells.unattributed.load(SeqCst), 1);
    assert_eq!(control.own.entered.load(SeqCst), 0);
}

/// A routine that stores nothing.
unsafe extern "C" fn silent(_: u64, _: u64, _: u64, _: u64, _: u64, _: u64) -> c_int {
    0
}

#[test]
fn an_output_length_that_is_not_stored_counts_as_none() {
    let world = world();
    world.worker.invoke = silent as *const () as u64;
    TARGET.store(world.worker.invoke, SeqCst);
    observe(&world, true);
    let mut len = usize::MAX;
    for to in [core::ptr::null_mut(), &raw mut len] {
        // SAFETY: as a careless caller passes it.
        let result = unsafe {
            site(
                core::ptr::null_mut(),
                string("Qux") as *const c_char,
                b"abc".as_ptr(),
                3,
                core::ptr::null_mut(),
                to,
            )
        };
        assert_eq!(result, 0);
    }
    let all = counted(&control(&world).cells).into_values();
    assert_eq!(all.collect::<Vec<_>>(), [[2, 0, 6, 0]]);
}

#[test]
fn whose_code_calls_is_known() {
    let world = with_routine();
    observe(&world, true);
    let graft = core::ptr::from_ref(&*world.graft) as u64;
    // A fused callee is active, on the worker's thread.
    world.worker.active.set(graft);
    rpc("Qux", "a");
    let elsewhere = || rpc("Qux", "a");
    let thread = std::thread::spawn(elsewhere).join().expect("no panic");
    assert_eq!(thread, (0, Some(b"a".to_vec())));
    world.worker.active.set(0);
    rpc("Qux", "a");
    let expected = BTreeMap::from([
        ((graft, "Qux".to_owned()), [1, 0, 1, 2]),
        ((0, "Qux".to_owned()), [2, 0, 2, 4]),
    ]);
    assert_eq!(counted(&control(&world).cells), expected);
}

#[test]
fn a_known_callee_is_counted_where_its_calls_take_the_rpc() {
    let world = with_routine();
    observe(&world, true);
    world.shared.gate.store(0, SeqCst);
    assert_eq!(rpc("Bar", "abc"), (0, Some(b"abc".to_vec())));
    let expected = BTreeMap::from([((0, "Bar".to_owned()), [1, 0, 3, 4])]);
    assert_eq!(counted(&control(&world).cells), expected);
    assert_eq!(world.shared.rpc_gate_off.load(SeqCst), 1);
}

#[test]
fn fused_calls_are_none_of_the_rpcs() {
    let world = world();
    first_call(&world);
    observe(&world, true);
    for _ in 0..2_000 {
        assert_eq!(call("abc"), (0, Some(b"abc".to_vec())));
    }
    assert!(counted(&control(&world).cells).is_empty());
    let shared = world.shared;
    let in_buckets: u32 = shared.histogram.0.iter().map(|n| n.load(SeqCst)).sum();
    assert_eq!(u64::from(in_buckets), shared.samples.load(SeqCst));
    assert!(in_buckets > 0);
}

#[test]
fn exceptions_and_cancellation_pass() {
    let world = with_routine();
    observe(&world, true);
    let catches: extern "C" fn(*const c_void, *const c_char, *const c_char) -> c_int =
        // SAFETY: its type.
        unsafe { core::mem::transmute(functions().get("catches") as usize) };
    let site = site as *const c_void;
    for _ in 0..3 {
        let result = catches(site, string("Qux") as *const c_char, c"throw".as_ptr());
        assert_eq!(result, 55);
        assert_eq!(functions().int("alive"), 0);
    }
    assert_eq!(world.worker.eh_frame_registered.load(SeqCst), 2);
    let calls = &control(&world).cells.cells[0].calls;
    assert_eq!(calls.entered.load(SeqCst), 3);
    assert_eq!(calls.returned.load(SeqCst), 0);
    let witnessed = functions().int("witnessed");
    super::unwind::ends_in_a_call(&world, "Qux");
    assert_eq!(functions().int("witnessed"), witnessed + 1);
}

/// What a stub at the entry of `faas_func_call` does, and what lies behind it.
static RECORD: AtomicU64 = AtomicU64::new(0);
static CALLED: AtomicU64 = AtomicU64::new(0);
/// Arguments that the function got last.
static GOT: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

unsafe extern "C" fn function(handle: u64, input: u64, len: u64) -> c_int {
    for (to, from) in GOT.iter().zip([handle, input, len]) {
        to.store(from, SeqCst);
    }
    if len == 13 { -7 } else { 9 }
}

/// Calls `faas_func_call` as the worker's executable does, through the stub.
#[unsafe(naked)]
unsafe extern "C" fn from_the_worker(_handle: u64, _input: u64, _len: u64) -> c_int {
    naked_asm!(
        "sub rsp, 8",
        "mov r10d, 0x1010",
        "mov eax, 0x1111",
        "call 2f",
        "add rsp, 8",
        "ret",
        "2:",
        "push r11",
        "mov r11, [rip + {record}]",
        "jmp [rip + {called}]",
        record = sym RECORD,
        called = sym CALLED,
    );
}

/// The same from elsewhere.
#[unsafe(naked)]
unsafe extern "C" fn from_a_library(_handle: u64, _input: u64, _len: u64) -> c_int {
    naked_asm!(
        "push r11",
        "mov r11, [rip + {record}]",
        "jmp [rip + {called}]",
        record = sym RECORD,
        called = sym CALLED,
    );
}

/// Where outermost calls return to.
pub(super) fn outermost() -> (u64, u64) {
    let start = from_the_worker as *const () as u64;
    (start, start + 40)
}

fn by(
    world: &World,
    entry: unsafe extern "C" fn(u64, u64, u64) -> c_int,
    arguments: [u64; 3],
) -> c_int {
    let record: &mut Routine = super::zeroed();
    record.worker = core::ptr::from_ref(&*world.worker) as u64;
    record.resume = function as *const () as u64;
    RECORD.store(core::ptr::from_ref(record) as u64, SeqCst);
    CALLED.store(bridge().get("ng_called"), SeqCst);
    let [handle, input, len] = arguments;
    // SAFETY: as a worker calls it.
    let result = unsafe { entry(handle, input, len) };
    let got: Vec<u64> = GOT.iter().map(|n| n.load(SeqCst)).collect();
    assert_eq!(got, arguments);
    result
}

/// An outermost call, whose result is 9, or -7 where its input has 13 bytes.
pub(super) fn enter(world: &World, arguments: [u64; 3]) -> c_int {
    by(world, from_the_worker, arguments)
}

#[test]
fn calls_of_the_function_itself_are_counted() {
    let world = world();
    assert_eq!(enter(&world, [1, 2, 3]), 9);
    let own = &control(&world).own;
    assert_eq!(own.entered.load(SeqCst), 0);
    observe(&world, true);
    for _ in 0..1_000 {
        assert_eq!(enter(&world, [5, 6, 7]), 9);
    }
    assert_eq!(enter(&world, [5, 6, 13]), -7);
    // The function's own code, and other threads.
    assert_eq!(by(&world, from_a_library, [1, 2, 3]), 9);
    std::thread::scope(|scope| {
        let world = &world;
        scope.spawn(move || assert_eq!(enter(world, [1, 2, 3]), 9));
    });
    // 9 is no success, in nightcore's eyes.
    assert_eq!(numbers(own), [1_001, 1_001, 7_013, 0]);
    let samples = own.samples.load(SeqCst);
    assert!((70..=190).contains(&samples), "{samples}");
    assert_eq!(world.worker.dirty.get(), 1, "the next one comes by as well");
    observe(&world, false);
    assert_eq!(enter(&world, [1, 2, 3]), 9);
    assert_eq!(own.entered.load(SeqCst), 1_001);
    assert_eq!(world.worker.dirty.get(), 0);
}
