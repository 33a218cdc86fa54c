//! Each graft's own state, against the C library's in a process of its own
//! making: the same calls give the same.

use std::ffi::{CStr, CString, c_char, c_long, c_ushort};

use super::{World, string};
use crate::abi::{Module, Tls};
use crate::environment::{ng_clearenv, ng_getenv, ng_putenv, ng_setenv, ng_unsetenv};
use crate::state::*;

unsafe extern "C" {
    fn random() -> c_long;
    fn srandom(seed: u32);
    fn seed48(seed: *const c_ushort) -> *mut c_ushort;
    fn lcong48(parameters: *const c_ushort);
    fn inet_ntoa(address: u32) -> *const c_char;
    fn setstate(state: *mut c_char) -> *mut c_char;
    fn initstate(seed: u32, state: *mut c_char, len: usize) -> *mut c_char;
}

fn world() -> World {
    let world = World::new(&[const { unsafe_zeroed() }]);
    assert_eq!(world.modules.len(), 1);
    world
}

/// No thread-local storage.
const fn unsafe_zeroed() -> Tls {
    // SAFETY: integers and cells of them.
    unsafe { core::mem::zeroed() }
}

fn module(world: &World) -> *const Module {
    &raw const world.modules[0]
}

fn text(at: *const c_char) -> Option<String> {
    // SAFETY: NULL, or NUL-terminated.
    (!at.is_null()).then(|| {
        unsafe { CStr::from_ptr(at) }
            .to_str()
            .expect("ASCII")
            .to_owned()
    })
}

#[test]
fn random_numbers_are_the_c_library_s_from_every_seed() {
    let world = world();
    let m = module(&world);
    // SAFETY: the functions' own arguments; `World` serialises the tests.
    unsafe {
        // Nobody has seeded: as with 1. The C library's own table may have
        // been used by others: seeded alike it starts alike.
        srandom(1);
        for _ in 0..1_000 {
            assert_eq!(ng_random(m), random());
        }
        for seed in [0, 1, 2, 42, 127_773, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            ng_srandom(seed, m);
            libc::srand(seed);
            for _ in 0..1_000 {
                assert_eq!(ng_rand(m), libc::rand(), "{seed}");
            }
        }
    }
}

#[test]
fn the_first_number_of_a_process_is_known() {
    let world = world();
    // SAFETY: as above. The first of glibc's in any program.
    assert_eq!(unsafe { ng_rand(module(&world)) }, 1_804_289_383);
}

#[test]
fn a_table_of_another_size_is_not_the_default_one() {
    // What `initstate` would mean, and why it is not given: another sequence.
    let world = world();
    let mut table = [0 as c_char; 32];
    // SAFETY: the table lives until the former one is set again.
    unsafe {
        let former = initstate(1, table.as_mut_ptr(), table.len());
        let other = random();
        setstate(former);
        ng_srandom(1, module(&world));
        assert_ne!(ng_random(module(&world)), other);
    }
}

#[test]
fn numbers_of_48_bits_are_the_c_library_s() {
    let world = world();
    let m = module(&world);
    let alike = || {
        // SAFETY: as above.
        unsafe {
            let (mut ours, mut theirs) = ([1_u16, 2, 0xffff], [1_u16, 2, 0xffff]);
            for _ in 0..300 {
                assert_eq!(ng_drand48(m).to_bits(), libc::drand48().to_bits());
                assert_eq!(ng_lrand48(m), libc::lrand48());
                assert_eq!(ng_mrand48(m), libc::mrand48());
                let (our, their) = (ours.as_mut_ptr(), theirs.as_mut_ptr());
                assert_eq!(ng_erand48(our, m).to_bits(), libc::erand48(their).to_bits());
                assert_eq!(ng_nrand48(our, m), libc::nrand48(their));
                assert_eq!(ng_jrand48(our, m), libc::jrand48(their));
                assert_eq!(ours, theirs);
            }
        }
    };
    // SAFETY: as above.
    unsafe {
        // A new process: all zeros.
        let zeros = [0_u16; 3];
        seed48(zeros.as_ptr());
        alike();
        for seed in [0, 1, -1, 0x1234_5678, c_long::MAX, c_long::MIN] {
            ng_srand48(seed, m);
            libc::srand48(seed);
            alike();
        }
        let seed = [7_u16, 8, 9];
        let (ours, theirs) = (ng_seed48(seed.as_ptr(), m), seed48(seed.as_ptr()));
        for at in 0..3 {
            assert_eq!(*ours.add(at), *theirs.add(at));
        }
        alike();
        let parameters = [1_u16, 2, 3, 0x4141, 0x42, 0x43, 99];
        ng_lcong48(parameters.as_ptr(), m);
        lcong48(parameters.as_ptr());
        alike();
        ng_srand48(5, m);
        libc::srand48(5);
        alike();
    }
}

#[test]
fn words_are_told_as_by_the_c_library() {
    let world = world();
    let m = module(&world);
    for (line, delimiters) in [
        ("one two  three", " "),
        (",,a,b,,", ","),
        ("", " "),
        ("   ", " "),
        ("whole", ""),
        ("a;b,c", ",;"),
        ("x", "x"),
    ] {
        let set = CString::new(delimiters).expect("no NUL");
        let split = |next: &dyn Fn(*mut c_char) -> *mut c_char| {
            let copy = CString::new(line).expect("no NUL").into_raw();
            let mut words = Vec::new();
            let mut at = next(copy);
            while let Some(word) = text(at) {
                words.push(word);
                at = next(std::ptr::null_mut());
            }
            // At the end it stays at the end.
            assert!(next(std::ptr::null_mut()).is_null());
            words
        };
        // SAFETY: as above.
        let ours = split(&|s| unsafe { ng_strtok(s, set.as_ptr(), m) });
        // SAFETY: as above.
        let theirs = split(&|s| unsafe { libc::strtok(s, set.as_ptr()) });
        assert_eq!(ours, theirs, "{line:?} {delimiters:?}");
    }
}

#[test]
fn the_caller_s_position_stays_where_it_is() {
    let world = world();
    let comma = c",".as_ptr();
    let (theirs, ours) = (string("a,b,c") as *mut c_char, string("x,y") as *mut c_char);
    // SAFETY: as above.
    unsafe {
        assert_eq!(text(libc::strtok(theirs, comma)).as_deref(), Some("a"));
        assert_eq!(
            text(ng_strtok(ours, comma, module(&world))).as_deref(),
            Some("x")
        );
        let null = std::ptr::null_mut();
        assert_eq!(text(libc::strtok(null, comma)).as_deref(), Some("b"));
        assert_eq!(
            text(ng_strtok(null, comma, module(&world))).as_deref(),
            Some("y")
        );
    }
}

#[test]
fn addresses_are_written_as_by_the_c_library() {
    let world = world();
    for address in [
        0,
        u32::MAX,
        0x0100_007f,
        0x0102_0304,
        0x630a_6409,
        0xc8c7_6400,
    ] {
        // SAFETY: as above.
        let (ours, theirs) = unsafe { (ng_inet_ntoa(address, module(&world)), inet_ntoa(address)) };
        assert_eq!(text(ours), text(theirs));
    }
}

#[test]
fn times_are_broken_down_apart_from_the_c_library_s() {
    let world = world();
    let m = module(&world);
    // SAFETY: as above; the functions of the C library that share a buffer.
    unsafe {
        for time in [0_i64, 1_700_000_000, -1, 253_402_300_800] {
            let other = 86_400_i64;
            let theirs = libc::gmtime(&other);
            let before = (*theirs).tm_mday;
            for (ours, expected) in [
                (
                    ng_gmtime(&time, m),
                    libc::gmtime_r as unsafe extern "C" fn(_, _) -> _,
                ),
                (ng_localtime(&time, m), libc::localtime_r),
            ] {
                let ours = &*ours.cast::<libc::tm>();
                let mut tm: libc::tm = std::mem::zeroed();
                expected(&time, &mut tm);
                assert_eq!(
                    (
                        ours.tm_sec,
                        ours.tm_min,
                        ours.tm_hour,
                        ours.tm_mday,
                        ours.tm_mon
                    ),
                    (tm.tm_sec, tm.tm_min, tm.tm_hour, tm.tm_mday, tm.tm_mon)
                );
                assert_eq!(
                    (
                        ours.tm_year,
                        ours.tm_wday,
                        ours.tm_yday,
                        ours.tm_isdst,
                        ours.tm_gmtoff
                    ),
                    (
                        tm.tm_year,
                        tm.tm_wday,
                        tm.tm_yday,
                        tm.tm_isdst,
                        tm.tm_gmtoff
                    )
                );
            }
            assert_eq!((*theirs).tm_mday, before);
        }
        // A year that no `int` holds.
        assert!(ng_gmtime(&i64::MAX, m).is_null());
        assert_eq!(errno(), libc::EOVERFLOW);
    }
    assert_eq!(size_of::<libc::tm>(), 56);
}

/// The world's environment, as its image sees it.
fn entries(world: &World) -> Vec<String> {
    let mut all = Vec::new();
    let mut at = (&raw const world.graft.environ).cast::<*const *const c_char>();
    // SAFETY: NULL, or a NULL-terminated array.
    unsafe {
        at = at.read_volatile().cast();
        let mut entry = at.cast::<*const c_char>();
        while !entry.is_null() && !(*entry).is_null() {
            all.extend(text(*entry));
            entry = entry.add(1);
        }
    }
    all
}

fn set(world: &World, name: &str, value: &str, overwrite: bool) -> i32 {
    let (name, value) = (
        string(name) as *const c_char,
        string(value) as *const c_char,
    );
    // SAFETY: as above.
    unsafe { ng_setenv(name, value, overwrite.into(), module(world)) }
}

fn get(world: &World, name: &str) -> Option<String> {
    // SAFETY: as above.
    text(unsafe { ng_getenv(string(name) as *const c_char, module(world)) })
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

#[test]
fn the_environment_is_the_graft_s_own() {
    let world = world();
    let initial = [string("A=1"), string("AB=2"), string("A=again"), 0];
    world.graft.environ = Box::leak(Box::new(initial)).as_ptr() as u64;
    let m = module(&world);
    assert_eq!(set(&world, "A", "3", false), 0);
    assert_eq!(get(&world, "A").as_deref(), Some("1"));
    assert_eq!(set(&world, "A", "3", true), 0);
    assert_eq!(get(&world, "A").as_deref(), Some("3"));
    assert_eq!(set(&world, "NG_NEW", "", false), 0);
    assert_eq!(get(&world, "NG_NEW").as_deref(), Some(""));
    assert_eq!(entries(&world), ["A=3", "AB=2", "A=again", "NG_NEW="]);
    assert!(std::env::var_os("NG_NEW").is_none());
    for index in 0..100 {
        assert_eq!(set(&world, &format!("NG_{index}"), "x=y", true), 0);
    }
    assert_eq!(entries(&world).len(), 104);
    assert_eq!(get(&world, "NG_99").as_deref(), Some("x=y"));
    for name in ["", "A=", "=", "A=B"] {
        assert_eq!((set(&world, name, "x", true), errno()), (-1, libc::EINVAL));
        // SAFETY: as above.
        let removed = unsafe { ng_unsetenv(string(name) as *const c_char, m) };
        assert_eq!((removed, errno()), (-1, libc::EINVAL));
    }
    // SAFETY: as above.
    unsafe {
        assert_eq!(ng_setenv(std::ptr::null(), c"x".as_ptr(), 1, m), -1);
        assert_eq!(ng_unsetenv(c"A".as_ptr(), m), 0);
        assert_eq!(get(&world, "A"), None);
        assert_eq!(get(&world, "AB").as_deref(), Some("2"));
        assert_eq!(ng_unsetenv(c"NG_NOT_THERE".as_ptr(), m), 0);
        // The string itself, which may change afterwards.
        let own = string("AB=4") as *mut c_char;
        assert_eq!(ng_putenv(own, m), 0);
        *own.add(3) = b'5' as c_char;
        assert_eq!(get(&world, "AB").as_deref(), Some("5"));
        assert_eq!(ng_putenv(c"AB".as_ptr(), m), 0);
        assert_eq!(get(&world, "AB"), None);
        assert_eq!(ng_clearenv(m), 0);
        assert_eq!((entries(&world).len(), get(&world, "NG_1")), (0, None));
        assert_eq!(set(&world, "B", "1", true), 0);
        assert_eq!(entries(&world), ["B=1"]);
    }
}

#[test]
fn threads_draw_every_number_once() {
    let world = world();
    let m = module(&world) as usize;
    // SAFETY: as above.
    unsafe { ng_srandom(9, module(&world)) };
    let mut drawn: Vec<c_long> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            // SAFETY: as above.
            .map(|_| {
                scope.spawn(move || {
                    (0..5_000)
                        .map(|_| unsafe { ng_random(m as *const Module) })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|t| t.join().expect("no panic"))
            .collect()
    });
    // SAFETY: as above.
    let mut alone: Vec<c_long> = unsafe {
        ng_srandom(9, module(&world));
        (0..20_000).map(|_| ng_random(module(&world))).collect()
    };
    drawn.sort_unstable();
    alone.sort_unstable();
    assert_eq!(drawn, alone);
}
