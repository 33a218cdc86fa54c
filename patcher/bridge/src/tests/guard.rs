//! Guarded callees: the image's own handler, real signals, and children that
//! die where that is to happen.

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::image::{bridge, functions};
use super::unwind::{call, counts, first_call, idle, site, world};
use super::{NAME, World, string};
use crate::abi::{
    ACTION_OURS, ACTION_THEIRS, Action, FAILURE_CRASHED, GUARD_DENIED, GUARD_ON, GUARD_TAKEN,
    GUARD_WAITING, GUARDED_SIGNALS, Range, SAMPLE_EVERY, STATE_FAILED, STATE_INITIALISED,
    STATE_READY,
};
use crate::sys;

/// The mappings of the tests' C++ functions.
fn range() -> Range {
    let inside = functions().get("crashing");
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let parse = |line: &str| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let hex = |text| u64::from_str_radix(text, 16).unwrap();
        let path = rest.split_whitespace().nth(4).unwrap_or("").to_owned();
        (hex(start), hex(end), path)
    };
    let all: Vec<_> = maps.lines().map(parse).collect();
    let own = all.iter().find(|m| m.0 <= inside && inside < m.1).unwrap();
    let of = || all.iter().filter(|m| m.2 == own.2);
    let start = of().map(|m| m.0).min().unwrap();
    let len = of().map(|m| m.1).max().unwrap() - start;
    Range { start, len }
}

/// A ready callee that crashes as it is told to, guarded or not.
fn crashing(guarded: bool) -> World {
    let world = world();
    world.graft.function = functions().get("crashing");
    world.graft.call = if guarded {
        bridge().get("ng_guarded")
    } else {
        world.graft.function
    };
    world.modules[0].range = range();
    assert_eq!(first_call(&world), STATE_INITIALISED);
    assert_eq!(call("a"), (0, Some(b"a".to_vec())));
    assert_eq!(world.graft.state.load(SeqCst), STATE_READY);
    world
}

/// The kernel's idea of the four actions.
fn actions() -> Vec<[u64; 4]> {
    let all = GUARDED_SIGNALS.iter().map(|signal| {
        let now = Action::default();
        assert!(sys::action(*signal, None, Some(&now)));
        let Action {
            handler,
            flags,
            restorer,
            mask,
        } = now;
        [handler.get(), flags.get(), restorer.get(), mask.get()]
    });
    all.collect()
}

/// Puts the worker's own actions back, as a revert does.
fn disarm(world: &World) {
    let guard = &world.worker.guard;
    for (index, signal) in GUARDED_SIGNALS.iter().enumerate() {
        if guard.ours[index].load(SeqCst) == ACTION_OURS {
            assert!(sys::action(*signal, Some(&guard.saved[index]), None));
            guard.ours[index].store(ACTION_THEIRS, SeqCst);
        }
    }
}

/// Runs it in a child, whose end is told as `wait` does: (signal, exit code).
fn ends(child: impl FnOnce() -> c_int) -> (c_int, c_int) {
    // SAFETY: this thread goes on alone, with nothing that others hold but
    // perhaps the lock of the standard output, which nobody there needs.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let nothing = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: no core files; ends whatever happens.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &nothing);
            libc::alarm(20);
            let code = child();
            libc::_exit(code);
        }
    }
    let mut status = 0;
    // SAFETY: a child of this process.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    (status & 0x7f, status >> 8 & 0xff)
}

/// The child's own actions are the default ones, and its bridge's are fresh.
fn by_default(world: &World) {
    for signal in GUARDED_SIGNALS {
        // SAFETY: no handler.
        unsafe { libc::signal(signal.cast_signed(), libc::SIG_DFL) };
    }
    forget(world);
}

/// The bridge has not been here yet.
fn forget(world: &World) {
    let guard = &world.worker.guard;
    guard
        .ours
        .iter()
        .for_each(|is| is.store(ACTION_THEIRS, SeqCst));
    guard.left.set(0);
}

#[test]
fn what_the_callee_s_own_code_raises_ends_its_call() {
    let cases = [
        ("0", libc::SIGSEGV),
        ("d", libc::SIGFPE),
        ("u", libc::SIGILL),
        ("b", libc::SIGBUS),
        ("A", libc::SIGBUS),  // not aligned, while EFLAGS.AC forbids that
        ("p", libc::SIGSEGV), // no canonical address: the kernel names none
        ("s", libc::SIGSEGV),
        ("n", libc::SIGSEGV),
        ("w", libc::SIGSEGV),
        ("k", libc::SIGILL),
        ("m", libc::SIGSEGV),
        ("c", libc::SIGSEGV), // while it handles an exception
        ("D", libc::SIGSEGV), // while one is thrown
    ];
    for (how, signal) in cases {
        let world = crashing(true);
        assert_eq!(world.worker.guard.state.load(SeqCst), GUARD_ON);
        let modes = sys::modes(false);
        let before = counts(&world);
        assert_eq!(call(how), (-1, None), "{how}");
        idle(&world);
        let (entered, returned, errors) = counts(&world);
        assert_eq!(
            (entered, returned, errors),
            (before.0 + 1, before.1 + 1, before.2 + 1),
            "{how}"
        );
        let graft = &world.graft;
        assert_eq!(graft.state.load(SeqCst), STATE_FAILED, "{how}");
        assert_eq!(graft.failure.get(), FAILURE_CRASHED, "{how}");
        assert_eq!(graft.failure_code.get(), signal, "{how}");
        let Range { start, len } = world.modules[0].range;
        assert!((start..start + len).contains(&graft.crash.get()), "{how}");
        let shared = world.shared;
        assert_eq!(i32::from(shared.crashed.load(SeqCst)), signal, "{how}");
        assert_eq!(shared.gate.load(SeqCst), 0, "{how}");
        assert!(!sys::differ(sys::modes(false), modes), "{how}");
        let exceptions: extern "C" fn() -> c_int =
            // SAFETY: its type.
            unsafe { core::mem::transmute(functions().get("exceptions") as usize) };
        assert_eq!(exceptions(), 0, "{how}");
        // It is not called again, whatever the gate says.
        shared.gate.store(1, SeqCst);
        assert_eq!(call("a").0, -2, "{how}");
        assert_eq!(counts(&world).0, entered, "{how}");
        disarm(&world);
    }
}

/// Makes a call with known values in the registers that a call keeps, and tells
/// whether they were kept, with the x87 tags and the direction flag as they must
/// be.
#[unsafe(naked)]
unsafe extern "C" fn keeps(
    name: u64,
    input: *const u8,
    output: *mut u64,
    tags: *mut [u32; 7],
) -> u64 {
    naked_asm!(
        "push rbp", "push rbx", "push r12", "push r13", "push r14", "push r15",
        "push rcx",
        "mov r8, rdx",
        "lea r9, [rdx + 8]",
        "mov rdx, rsi",
        "mov rsi, rdi",
        "xor edi, edi",
        "mov ecx, 1",
        "mov rbx, 0x1111", "mov rbp, 0x2222", "mov r12, 0x3333",
        "mov r13, 0x4444", "mov r14, 0x5555", "mov r15, 0x6666",
        "call {site}",
        "pop rcx",
        "fnstenv [rcx]",
        "fldenv [rcx]",
        "cdqe",
        "pushfq", "pop rdx", "shr rdx, 10", "and edx, 1",
        "sub rbx, 0x1111", "sub rbp, 0x2222", "sub r12, 0x3333",
        "sub r13, 0x4444", "sub r14, 0x5555", "sub r15, 0x6666",
        "or rbx, rbp", "or rbx, r12", "or rbx, r13", "or rbx, r14", "or rbx, r15",
        "or rbx, rdx",
        "not rbx", // all ones: kept
        "and rax, rbx",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbx", "pop rbp",
        "cld",
        "ret",
        site = sym site,
    );
}

#[test]
fn the_caller_finds_everything_that_a_call_keeps() {
    let world = crashing(true);
    let (mut output, mut environment) = ([7_u64; 2], [0_u32; 7]);
    // SAFETY: the call's own arguments.
    let result = unsafe {
        keeps(
            string(NAME),
            b"k".as_ptr(),
            output.as_mut_ptr(),
            &mut environment,
        )
    };
    assert_eq!(result, u64::MAX);
    assert_eq!(output, [0, 0]);
    assert_eq!(
        environment[2] & 0xffff,
        0xffff,
        "the x87 stack is not empty"
    );
    assert_eq!(world.graft.failure_code.get(), libc::SIGILL);
    disarm(&world);
}

#[test]
fn what_cannot_be_left_soundly_ends_the_worker_with_the_same_signal() {
    let world = crashing(true);
    disarm(&world);
    let dies = |how: &'static str| {
        ends(|| {
            by_default(&world);
            assert_eq!(call("a").0, 0);
            call(how).0
        })
    };
    let segv = (libc::SIGSEGV, 0);
    // Something of the C library's lies between, or it is where it crashed.
    assert_eq!((dies("q"), dies("l"), dies("e")), (segv, segv, segv));
    assert_eq!(dies("t"), segv, "a thread of the callee's");
    assert_eq!(
        dies("j"),
        (libc::SIGILL, 0),
        "from there nothing leads to the call"
    );
    let recovery = world.graft.recovery.as_ptr() as u64;
    // SAFETY: the library's variable.
    unsafe { (functions().get("recovery") as *mut u64).write(recovery) };
    assert_eq!(dies("g"), segv, "it has written over what was kept");
    // The unwinder faults: still it is the callee's signal, and a handler's.
    assert_eq!(dies("r"), (libc::SIGILL, 0));
    let handled = ends(|| {
        by_default(&world);
        // SAFETY: a handler of the test's.
        unsafe { libc::signal(libc::SIGILL, says_77 as *const () as usize) };
        assert_eq!(call("a").0, 0);
        call("r").0
    });
    assert_eq!(handled, (0, 77));
    // And what is recovered there is, so that the above says something.
    assert_eq!(dies("0"), (0, 255));
    // The caller's own code; and the callee's, but in no call of it.
    let outside = |function: fn()| {
        ends(|| {
            by_default(&world);
            assert_eq!(call("a").0, 0);
            function();
            0
        })
    };
    let own = || {
        // SAFETY: ends the child.
        unsafe { std::arch::asm!("ud2") }
    };
    assert_eq!(outside(own), (libc::SIGILL, 0));
    let stray = || {
        // SAFETY: ends the child.
        unsafe {
            let function: unsafe extern "C" fn(*mut c_void, *const u8, usize) -> c_int =
                core::mem::transmute(functions().get("crashing") as usize);
            function(core::ptr::null_mut(), b"u".as_ptr(), 0);
        }
    };
    assert_eq!(outside(stray), (libc::SIGILL, 0));
}

#[test]
fn without_memory_for_its_stacks_calls_go_on_unguarded_until_there_is_some() {
    let world = crashing(false);
    world.graft.call = bridge().get("ng_guarded");
    let before = actions();
    let limited = |bytes| {
        let limit = libc::rlimit {
            rlim_cur: bytes,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: of this child alone.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
    };
    let state = || world.worker.guard.state.load(SeqCst);
    let ended = ends(|| {
        limited(4096);
        let code = call("x").0;
        let denied = state();
        let unchanged = actions() == before;
        limited(libc::RLIM_INFINITY);
        assert_eq!((code, denied, unchanged), (0, GUARD_DENIED, true));
        // Looked at again at one call of so many.
        for _ in 0..SAMPLE_EVERY {
            assert_eq!(call("x").0, 0);
        }
        assert_eq!(state(), GUARD_ON);
        assert_eq!(call("0").0, -1);
        6
    });
    assert_eq!(ended, (0, 6));
}

#[test]
fn a_signal_that_somebody_sends_is_not_the_callee_s() {
    let world = crashing(true);
    disarm(&world);
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL] {
        let raised = |action: libc::sighandler_t| {
            ends(|| {
                by_default(&world);
                // SAFETY: no handler.
                unsafe { libc::signal(signal, action) };
                assert_eq!(call("a").0, 0);
                // SAFETY: what it is about.
                unsafe { libc::raise(signal) };
                3
            })
        };
        assert_eq!(raised(libc::SIG_DFL), (signal, 0));
        assert_eq!(raised(libc::SIG_IGN), (0, 3));
    }
    // One that is raised by an instruction is not ignored.
    let ignored = ends(|| {
        by_default(&world);
        // SAFETY: no handler.
        unsafe { libc::signal(libc::SIGSEGV, libc::SIG_IGN) };
        assert_eq!(call("a").0, 0);
        call("l").0
    });
    assert_eq!(ignored, (libc::SIGSEGV, 0));
}

/// What the worker's own handler found: address, instruction, mask.
static FOUND: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
static PAGE: AtomicU64 = AtomicU64::new(0);

/// Lets the access through, as a garbage collector's would.
unsafe extern "C" fn lets_through(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's; the page is the test's.
    unsafe {
        let context = &*context.cast::<libc::ucontext_t>();
        FOUND[0].store((*info).si_addr() as u64, SeqCst);
        FOUND[1].store(
            context.uc_mcontext.gregs[libc::REG_RIP as usize] as u64,
            SeqCst,
        );
        let mut mask = core::mem::zeroed();
        libc::sigprocmask(libc::SIG_BLOCK, core::ptr::null(), &mut mask);
        let blocked = |signal| u64::from(libc::sigismember(&mask, signal) == 1);
        FOUND[2].store(
            blocked(libc::SIGSEGV) | blocked(libc::SIGUSR1) << 1 | blocked(libc::SIGUSR2) << 2,
            SeqCst,
        );
        FOUND[3].fetch_add(1, SeqCst);
        let page = PAGE.load(SeqCst) as *mut c_void;
        libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_WRITE);
    }
}

#[test]
fn the_worker_s_own_handler_gets_its_signals_as_before_and_the_guard_stays() {
    let world = crashing(true);
    disarm(&world);
    let ended = ends(|| {
        by_default(&world);
        // SAFETY: a handler, with SIGUSR1 blocked while it runs.
        let page = unsafe {
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = lets_through as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigaddset(&mut action.sa_mask, libc::SIGUSR1);
            libc::sigaction(libc::SIGSEGV, &action, core::ptr::null_mut());
            libc::mmap(
                core::ptr::null_mut(),
                4096,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        PAGE.store(page as u64, SeqCst);
        let before = actions();
        for round in 1..=3 {
            assert_eq!(call("a").0, 0);
            assert_ne!(actions()[3], before[3]);
            assert_eq!(world.worker.guard.state.load(SeqCst), GUARD_ON);
            // SAFETY: the page is there; the handler lets it be written.
            unsafe {
                libc::mprotect(page, 4096, libc::PROT_NONE);
                page.cast::<u8>().add(8).write_volatile(7);
            }
            assert_eq!(FOUND[0].load(SeqCst), page as u64 + 8);
            assert_ne!(FOUND[1].load(SeqCst), 0);
            assert_eq!(FOUND[2].load(SeqCst), 0b010, "NODEFER, and its mask");
            assert_eq!(FOUND[3].load(SeqCst), round);
            // Its action is back until the next guarded call.
            assert_eq!(actions()[3], before[3]);
            assert_ne!(actions()[0], before[0]);
        }
        assert_eq!(call("a").0, 0);
        assert_eq!(call("0").0, -1);
        assert_eq!(FOUND[3].load(SeqCst), 3);
        disarm(&world);
        assert_eq!(actions(), before);
        9
    });
    assert_eq!(ended, (0, 9));
}

/// Ends the process.
unsafe extern "C" fn says_77(_: c_int) {
    // SAFETY: ends the child.
    unsafe { libc::_exit(77) }
}

#[test]
fn an_action_that_the_worker_takes_for_itself_is_left_to_it() {
    let world = crashing(true);
    disarm(&world);
    let own = says_77 as *const () as libc::sighandler_t;
    // At once it gets what comes.
    let at_once = ends(|| {
        by_default(&world);
        assert_eq!(call("a").0, 0);
        // SAFETY: a handler of the test's.
        unsafe { libc::signal(libc::SIGSEGV, own) };
        call("0").0
    });
    assert_eq!(at_once, (0, 77));
    // And it is seen and said, soon enough; the others stay.
    let later = ends(|| {
        by_default(&world);
        assert_eq!(call("a").0, 0);
        // SAFETY: as above.
        unsafe { libc::signal(libc::SIGSEGV, own) };
        let theirs = actions()[3];
        for _ in 0..=SAMPLE_EVERY {
            assert_eq!(call("a").0, 0);
        }
        assert_eq!(world.worker.guard.state.load(SeqCst), GUARD_TAKEN);
        assert_eq!(actions()[3], theirs);
        assert_eq!(call("u").0, -1);
        4
    });
    assert_eq!(later, (0, 4));
    // A handler that hands on to the one before it hands on to us.
    static BEFORE: AtomicU64 = AtomicU64::new(0);
    unsafe extern "C" fn hands_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: the action before was one of this kind.
        unsafe {
            let before: unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                core::mem::transmute(BEFORE.load(SeqCst) as usize);
            before(signal, info, context);
        }
    }
    let hands = |how: &'static str| {
        ends(|| {
            by_default(&world);
            assert_eq!(call("a").0, 0);
            BEFORE.store(actions()[3][0], SeqCst);
            // SAFETY: a handler of the test's.
            unsafe {
                let mut action: libc::sigaction = core::mem::zeroed();
                action.sa_sigaction = hands_on as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(libc::SIGSEGV, &action, core::ptr::null_mut());
            }
            call(how).0
        })
    };
    assert_eq!(hands("0"), (0, 255));
    assert_eq!(hands("l"), (libc::SIGSEGV, 0));
}

#[test]
fn a_forked_child_is_not_guarded_by_its_parent_s_guard() {
    let world = crashing(true);
    let forked = ends(|| {
        for signal in GUARDED_SIGNALS {
            let guard = &world.worker.guard;
            let index = GUARDED_SIGNALS.iter().position(|s| *s == signal).unwrap();
            guard.saved[index].handler.set(0);
        }
        call("0").0
    });
    assert_eq!(forked, (libc::SIGSEGV, 0));
    disarm(&world);
}

#[test]
fn who_is_not_guarded_pays_nothing_and_dies() {
    let before = {
        let world = crashing(false);
        assert_eq!(world.worker.guard.state.load(SeqCst), GUARD_WAITING);
        assert_eq!(world.worker.guard.stack.get(), 0);
        let ended = ends(|| {
            by_default(&world);
            call("0").0
        });
        assert_eq!(ended, (libc::SIGSEGV, 0));
        actions()
    };
    let world = crashing(true);
    assert_ne!(actions(), before);
    disarm(&world);
    assert_eq!(actions(), before);
}
