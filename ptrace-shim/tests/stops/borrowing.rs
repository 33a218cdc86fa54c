//! Borrowed threads: what they keep, what they can do, and which are refused.

use crate::blocking::handle;
use crate::child::{PATIENCE, Subject, patient};
use crate::patterns;
use crate::subject::{hear, say_ready};
use ptrace_shim::{Borrowed, Errno, Error, NotBorrowable, Process, StopOptions, Tid, stop_thread};
use std::mem::MaybeUninit;
use std::time::Duration;

/// Role: a seccomp filter that denies `getpgid` with EPERM and traps `getsid`.
pub(crate) fn filtered() {
    const LOAD_NR: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let statement = |code, jt, k| libc::sock_filter {
        code,
        jt,
        jf: u8::from(code == JUMP_IF_EQUAL),
        k,
    };
    let filter = [
        statement(LOAD_NR, 0, 0),
        statement(JUMP_IF_EQUAL, 0, libc::SYS_getpgid as u32),
        statement(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(JUMP_IF_EQUAL, 0, libc::SYS_getsid as u32),
        statement(RETURN, 0, libc::SECCOMP_RET_TRAP),
        statement(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program and its filter live through the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let program = &raw const program;
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, program),
            0
        );
    }
    say_ready();
    while hear().is_some() {
        println!("well");
    }
}

/// Role: spins in a signal handler on an alternate stack in the heap.
pub(crate) fn on_alternate_stack() {
    extern "C" fn handler(_: libc::c_int) {
        say_ready();
        // Never to return.
        loop {
            std::hint::spin_loop();
        }
    }
    let stack = Box::leak(vec![0u8; 1 << 16].into_boxed_slice());
    let stack = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: 1 << 16,
    };
    // SAFETY: the stack is never freed.
    let result = unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
    assert_eq!(result, 0);
    handle(libc::SIGUSR1, handler, libc::SA_ONSTACK);
    // SAFETY: a number.
    unsafe { libc::raise(libc::SIGUSR1) };
}

std::arch::global_asm!(
    ".globl shim_test_rseq",
    "shim_test_rseq:",
    // rdi: where struct rseq names the section, rsi: the section
    "2:",
    "mov [rdi], rsi",
    ".globl shim_test_rseq_start",
    "shim_test_rseq_start:",
    "pause",
    "jmp shim_test_rseq_start",
    ".globl shim_test_rseq_end",
    "shim_test_rseq_end:",
    "ud2",
    // The signature that the C library registers, before where aborts go.
    ".long 0x53053053",
    ".globl shim_test_rseq_abort",
    "shim_test_rseq_abort:",
    "jmp 2b",
);

/// Role: stays in an rseq critical section (each abort begins it again).
pub(crate) fn in_rseq_section() {
    // SAFETY: the labels above; only the first is called.
    unsafe extern "C" {
        fn shim_test_rseq(rseq_cs: *mut u64, section: *const [u64; 4]) -> !;
        fn shim_test_rseq_start();
        fn shim_test_rseq_end();
        fn shim_test_rseq_abort();
    }
    let address = |function: unsafe extern "C" fn()| function as *const () as u64;
    let start = address(shim_test_rseq_start);
    let section: &[u64; 4] = Box::leak(Box::new([
        0,
        start,
        address(shim_test_rseq_end) - start,
        address(shim_test_rseq_abort),
    ]));
    // struct rseq_cs is aligned to 32 bytes.
    let aligned = Box::leak(Box::new([[0u64; 4]; 2]));
    let at = aligned.as_ptr().addr().div_ceil(32) * 32;
    // SAFETY: within the two; the C library's rseq area lies at this offset
    // from the thread pointer, and is this thread's.
    unsafe {
        let section_at = aligned.as_mut_ptr().with_addr(at);
        section_at.write(*section);
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr());
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr());
        if offset.is_null() || size.is_null() || *size.cast::<u32>() == 0 {
            println!("no rseq");
            return;
        }
        let thread: usize;
        // SAFETY: x86-64's ABI keeps the thread pointer there.
        std::arch::asm!("mov {}, fs:[0]", out(reg) thread);
        let rseq = thread.wrapping_add_signed(*offset.cast::<isize>());
        say_ready();
        shim_test_rseq((rseq + 8) as *mut u64, section_at);
    }
}

/// Role: spins near the end of a small stack of a thread.
pub(crate) fn with_little_stack() {
    use std::sync::atomic::Ordering::SeqCst;
    #[inline(never)]
    fn deeper(bottom: usize) {
        let mut local = MaybeUninit::<[u8; 256]>::uninit();
        let here = local.as_mut_ptr().addr();
        if here - bottom > 3000 {
            deeper(bottom);
            std::hint::black_box(&mut local);
            return;
        }
        READY.store(true, SeqCst);
        loop {
            std::hint::spin_loop();
        }
    }
    static READY: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    static TID: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(0);
    std::thread::spawn(|| {
        TID.store(nix::unistd::gettid().as_raw(), SeqCst);
        let process = Process::open(std::process::id().cast_signed()).unwrap();
        let local = 0u8;
        let here = ptrace_shim::Address((&raw const local).addr() as u64);
        let maps = process.mappings().unwrap();
        let stack = maps.iter().find(|map| map.contains(here)).unwrap();
        deeper(stack.start.0 as usize);
    });
    while !READY.load(SeqCst) {
        std::thread::yield_now();
    }
    println!("ready {}", TID.load(SeqCst));
    hear();
    std::process::exit(0);
}

fn borrow(subject: &Subject, tid: Tid) -> ptrace_shim::Result<Borrowed> {
    let gadgets = subject.gadgets();
    stop_thread(&subject.process(), tid, patient())?.borrow(&gadgets)
}

fn refusal(subject: &Subject, tid: Tid) -> NotBorrowable {
    match borrow(subject, tid) {
        Err(Error::NotBorrowable { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_registers_are_kept() {
    for role in [
        "patterns spin",
        "patterns read",
        "patterns-in-thread spin",
        "patterns-in-thread read",
    ] {
        let (mut subject, tid) = Subject::ready(role);
        for round in 0..60 {
            let mut borrowed = borrow(&subject, tid).unwrap();
            for _ in 0..round % 4 {
                let own = borrowed.syscall(libc::SYS_gettid, [0; 6]).unwrap();
                assert_eq!(own, Ok(tid.as_raw() as u64));
            }
            // By our hand, or by the frame alone.
            if round % 2 == 0 {
                borrowed.give_back().unwrap().resume().unwrap();
            } else {
                drop(borrowed);
            }
            if round % 5 == 0 {
                subject.tell("x");
                assert_eq!(subject.line(), "kept", "{role}");
            }
        }
        subject.tell("x");
        assert_eq!(subject.line(), "kept", "{role}");
        subject.assert_untraced();
    }
}

#[test]
fn given_back_the_thread_stands_where_it_stood() {
    for role in ["patterns spin", "patterns read"] {
        let (_subject, tid) = Subject::ready(role);
        let subject = &_subject;
        if role == "patterns read" {
            subject.until_in_call(tid, libc::SYS_read);
        }
        let gadgets = subject.gadgets();
        let mut thread = stop_thread(&subject.process(), tid, patient()).unwrap();
        let registers = *thread.registers();
        for _ in 0..10 {
            let mut borrowed = thread.borrow(&gadgets).unwrap();
            assert_eq!(borrowed.registers(), &registers);
            assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
            thread = borrowed.give_back().unwrap();
        }
        thread.resume().unwrap();
        if role == "patterns read" {
            subject.until_in_call(tid, libc::SYS_read);
            let again = stop_thread(&subject.process(), tid, patient()).unwrap();
            assert_eq!(again.registers(), &registers);
        }
    }
}

#[test]
fn calls_do_what_they_do() {
    let (mut subject, tid) = Subject::ready("patterns read");
    let mut borrowed = borrow(&subject, tid).unwrap();
    assert!(borrowed.scratch().0.is_multiple_of(64));
    const { assert!(Borrowed::SCRATCH_LENGTH >= 256) };

    // A mapping, filled through memory, found in maps, and gone again.
    let length = 3 * ptrace_shim::PAGE_SIZE;
    let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let mapped = borrowed
        .syscall(libc::SYS_mmap, [0, length, protection, flags, u64::MAX, 0])
        .unwrap()
        .unwrap();
    let mapped = ptrace_shim::Address(mapped);
    let memory = borrowed.stopped().memory().clone();
    borrowed.stopped().write_memory(mapped, b"there").unwrap();
    assert_eq!(memory.read_vec(mapped, 5).unwrap(), b"there");
    let maps = subject.process().mappings().unwrap();
    let mapping = maps.iter().find(|map| map.contains(mapped)).unwrap();
    assert!(mapping.executable && !mapping.writable);
    let unmapped = borrowed.syscall(libc::SYS_munmap, [mapped.0, length, 0, 0, 0, 0]);
    assert_eq!(unmapped.unwrap(), Ok(0));

    // A string in the scratch area, which lasts.
    let name = borrowed.put(64, b"remote\0").unwrap();
    assert_eq!(name.0, borrowed.scratch().0 + 64);
    let fd = borrowed.syscall(libc::SYS_memfd_create, [name.0, 0, 0, 0, 0, 0]);
    let fd = fd.unwrap().unwrap();
    let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", subject.pid())).unwrap();
    assert!(link.to_string_lossy().contains("memfd:remote"), "{link:?}");
    assert_eq!(memory.read_vec(name, 7).unwrap(), b"remote\0");
    assert_eq!(
        borrowed
            .syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0])
            .unwrap(),
        Ok(0)
    );

    // All six arguments arrive; errors are the call's.
    let bad = borrowed.syscall(libc::SYS_close, [u64::MAX; 6]).unwrap();
    assert_eq!(bad, Err(Errno::EBADF));
    let unknown = borrowed.syscall(9999, [0; 6]).unwrap();
    assert_eq!(unknown, Err(Errno::ENOSYS));
    let length = Borrowed::SCRATCH_LENGTH;
    assert!(borrowed.put(0, &vec![1; length]).is_ok());
    let error = borrowed.put(1, &vec![1; length]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Memory {
                cause: Errno::EMSGSIZE,
                ..
            }
        ),
        "{error}"
    );

    borrowed.give_back().unwrap().resume().unwrap();
    subject.tell("x");
    assert_eq!(subject.line(), "kept");
}

#[test]
fn calls_that_would_not_come_back_are_not_made() {
    let (mut subject, tid) = Subject::ready("patterns spin");
    let mut borrowed = borrow(&subject, tid).unwrap();
    for nr in [
        libc::SYS_fork,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_vfork,
        libc::SYS_execve,
        libc::SYS_exit_group,
        libc::SYS_rt_sigreturn,
    ] {
        let error = borrowed.syscall(nr, [0; 6]).unwrap_err();
        assert!(matches!(error, Error::CallRefused { .. }), "{error}");
    }
    assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
    borrowed.give_back().unwrap().resume().unwrap();
    subject.tell("x");
    assert_eq!(subject.line(), "kept");
}

#[test]
fn a_call_that_takes_too_long_is_given_up() {
    for (nr, arguments) in [
        (libc::SYS_pause, [0; 6]),
        // The subject's input, on which nothing comes.
        (libc::SYS_ppoll, [0; 6]),
        (libc::SYS_read, [0, 0, 1, 0, 0, 0]),
    ] {
        for role in ["patterns spin", "patterns-in-thread spin"] {
            let (mut subject, tid) = Subject::ready(role);
            let options = StopOptions {
                call_deadline: Duration::from_millis(20),
                deadline: PATIENCE,
                ..StopOptions::default()
            };
            let thread = stop_thread(&subject.process(), tid, options).unwrap();
            let mut borrowed = thread.borrow(&subject.gadgets()).unwrap();
            for _ in 0..2 {
                let error = borrowed.syscall(nr, arguments).unwrap_err();
                assert!(matches!(error, Error::Timeout { .. }), "{error}");
                let pid = borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap();
                assert_eq!(pid, Ok(subject.pid() as u64));
            }
            let error = borrowed.syscall(nr, arguments).unwrap_err();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            borrowed.give_back().unwrap().resume().unwrap();
            subject.tell("x");
            assert_eq!(subject.line(), "kept");
        }
    }
}

#[test]
fn a_filter_answers_as_it_is_told_to() {
    let (mut subject, tid) = Subject::ready("filtered");
    for heals in [false, true] {
        let mut borrowed = borrow(&subject, tid).unwrap();
        for _ in 0..3 {
            let denied = borrowed.syscall(libc::SYS_getpgid, [0; 6]).unwrap();
            assert_eq!(denied, Err(Errno::EPERM));
            let error = borrowed.syscall(libc::SYS_getsid, [0; 6]).unwrap_err();
            assert!(
                matches!(error, Error::CallTrapped { nr, .. } if nr == libc::SYS_getsid as u64)
            );
            let pid = borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap();
            assert_eq!(pid, Ok(subject.pid() as u64));
        }
        let error = borrowed.syscall(libc::SYS_getsid, [0; 6]).unwrap_err();
        assert!(matches!(error, Error::CallTrapped { .. }), "{error}");
        if heals {
            drop(borrowed);
        } else {
            borrowed.give_back().unwrap().resume().unwrap();
        }
        subject.tell("x");
        assert_eq!(subject.line(), "well");
    }
}

#[test]
fn a_thread_on_another_stack_is_refused() {
    let (subject, tid) = Subject::ready("alternate-stack");
    let reason = refusal(&subject, tid);
    assert!(
        matches!(reason, NotBorrowable::ForeignStack { .. }),
        "{reason}"
    );
    subject.assert_untraced();
}

#[test]
fn a_thread_with_little_stack_is_refused() {
    let (subject, tid) = Subject::ready("little-stack");
    let reason = refusal(&subject, tid);
    assert!(
        matches!(reason, NotBorrowable::StackFull { .. }),
        "{reason}"
    );
    subject.assert_untraced();
}

#[test]
fn a_thread_in_an_rseq_section_is_refused() {
    let mut subject = Subject::start("rseq");
    let line = subject.line();
    // A C library before 2.35 registers none, so there is nothing to refuse.
    let Some(tid) = line.strip_prefix("ready ") else {
        assert_eq!(line, "no rseq");
        return;
    };
    let tid = Tid::from_raw(tid.parse().unwrap());
    std::thread::sleep(Duration::from_millis(5));
    for _ in 0..20 {
        // Aborted, it is at the section's begin for an instant.
        let reason = match borrow(&subject, tid) {
            Ok(_) => continue,
            Err(Error::NotBorrowable { reason, .. }) => reason,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(reason, NotBorrowable::RseqCriticalSection);
        return;
    }
    panic!("never found in its section");
}

/// The patterns themselves work: without anybody stopping it.
#[test]
fn undisturbed_patterns_are_kept() {
    let (mut subject, _) = Subject::ready("patterns read");
    subject.tell("xx");
    assert_eq!(subject.line(), "kept");
    assert_eq!(subject.line(), "kept");
    subject.hang_up();
    assert!(subject.end().success());
    let spun = patterns::spin(3, patterns::EndSpin::end);
    assert_eq!(spun, Ok(()));
}
