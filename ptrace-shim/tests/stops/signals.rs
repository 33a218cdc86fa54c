//! Signals that come while threads are stopped or borrowed; and group-stops.

use crate::blocking::handle;
use crate::child::{Subject, patient, until};
use crate::subject::say_ready;
use ptrace_shim::{Process, stop_all, stop_thread};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

static QUEUED: AtomicU64 = AtomicU64::new(0);
static SUM: AtomicU64 = AtomicU64::new(0);
static USR1: AtomicU64 = AtomicU64::new(0);

/// Role: counts real-time signals (and sums up their values) in some threads
/// that block; says the counts when asked.
pub(crate) fn count(threads: usize) {
    extern "C" fn queued(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a siginfo to SA_SIGINFO handlers.
        let value = unsafe { (*info).si_value().sival_ptr };
        QUEUED.fetch_add(1, Ordering::SeqCst);
        SUM.fetch_add(value as u64, Ordering::SeqCst);
    }
    extern "C" fn usr1(_: libc::c_int) {
        USR1.fetch_add(1, Ordering::SeqCst);
    }
    let queued = queued as extern "C" fn(_, _, _) as *const () as usize;
    // SAFETY: a handler with three parameters is what SA_SIGINFO asks for.
    let queued = unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(queued) };
    handle(
        libc::SIGRTMIN(),
        queued,
        libc::SA_SIGINFO | libc::SA_RESTART,
    );
    // Without SA_RESTART: an interrupted read returns EINTR.
    handle(libc::SIGUSR1, usr1, 0);
    for _ in 0..threads {
        std::thread::spawn(|| {
            let (reader, _writer) = std::io::pipe().unwrap();
            loop {
                let mut byte = [0];
                drop(std::io::Read::read(&mut (&reader), &mut byte));
            }
        });
    }
    say_ready();
    let mut byte = 0u8;
    loop {
        // SAFETY: one byte into ours.
        let read = unsafe { libc::read(0, (&raw mut byte).cast(), 1) };
        match read {
            1 => println!(
                "{} {} {}",
                QUEUED.load(Ordering::SeqCst),
                SUM.load(Ordering::SeqCst),
                USR1.load(Ordering::SeqCst)
            ),
            0 => return,
            _ => println!("interrupted"),
        }
    }
}

pub(crate) fn queue(pid: i32, value: usize) {
    let value = libc::sigval {
        sival_ptr: value as *mut libc::c_void,
    };
    // SAFETY: numbers only.
    assert_eq!(unsafe { libc::sigqueue(pid, libc::SIGRTMIN(), value) }, 0);
}

/// Asks for the counts until they are complete or no longer change.
pub(crate) fn assert_counts(subject: &mut Subject, expected: &str) {
    for _ in 0..200 {
        subject.tell("?");
        let line = subject.line();
        if line == expected {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    subject.tell("?");
    assert_eq!(subject.line(), expected);
}

#[test]
fn no_signal_is_lost_in_stops_of_all() {
    const COUNT: usize = 1500;
    let (mut subject, _) = Subject::ready("count-signals 3");
    let process = subject.process();
    let pid = subject.pid();
    let sender = std::thread::spawn(move || {
        for value in 1..=COUNT {
            queue(pid, value);
            std::thread::sleep(Duration::from_micros(40));
        }
    });
    while !sender.is_finished() {
        stop_all(&process, patient()).unwrap().resume().unwrap();
    }
    sender.join().unwrap();
    let sum = COUNT * (COUNT + 1) / 2;
    assert_counts(&mut subject, &format!("{COUNT} {sum} 0"));
    subject.assert_untraced();
}

#[test]
fn no_signal_is_lost_by_a_borrowed_thread() {
    const COUNT: usize = 1500;
    // No other thread could take them.
    let (mut subject, tid) = Subject::ready("count-signals 0");
    let process = subject.process();
    let gadgets = subject.gadgets();
    let pid = subject.pid();
    let sender = std::thread::spawn(move || {
        for value in 1..=COUNT {
            queue(pid, value);
            std::thread::sleep(Duration::from_micros(60));
        }
    });
    let mut heals = false;
    while !sender.is_finished() {
        let thread = stop_thread(&process, tid, patient()).unwrap();
        let mut borrowed = thread.borrow(&gadgets).unwrap();
        for _ in 0..3 {
            let own = borrowed.syscall(libc::SYS_gettid, [0; 6]).unwrap();
            assert_eq!(own, Ok(tid.as_raw() as u64));
        }
        heals = !heals;
        if heals {
            drop(borrowed);
        } else {
            borrowed.give_back().unwrap().resume().unwrap();
        }
    }
    sender.join().unwrap();
    let sum = COUNT * (COUNT + 1) / 2;
    assert_counts(&mut subject, &format!("{COUNT} {sum} 0"));
    subject.assert_untraced();
}

/// A handler without SA_RESTART makes a read return EINTR, also when the
/// signal came while the thread was borrowed.
#[test]
fn a_signal_interrupts_the_call_that_a_borrowed_thread_was_in() {
    for _ in 0..10 {
        let (mut subject, tid) = Subject::ready("count-signals 0");
        subject.until_in_call(tid, libc::SYS_read);
        let gadgets = subject.gadgets();
        let thread = stop_thread(&subject.process(), tid, patient()).unwrap();
        let mut borrowed = thread.borrow(&gadgets).unwrap();
        assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
        subject.kill(libc::SIGUSR1);
        assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
        borrowed.give_back().unwrap().resume().unwrap();
        assert_eq!(subject.line(), "interrupted");
        assert_counts(&mut subject, "0 0 1");
    }
}

#[test]
fn a_signal_interrupts_the_call_that_a_stopped_thread_was_in() {
    let (mut subject, tid) = Subject::ready("count-signals 0");
    subject.until_in_call(tid, libc::SYS_read);
    let stopped = stop_all(&subject.process(), patient()).unwrap();
    subject.kill(libc::SIGUSR1);
    stopped.resume().unwrap();
    assert_eq!(subject.line(), "interrupted");
    assert_counts(&mut subject, "0 0 1");
}

fn assert_still_stopped(subject: &Subject) {
    until(
        || {
            let process = subject.process();
            let threads = process.threads().unwrap();
            threads.iter().all(|&tid| subject.state(tid) == 'T')
        },
        || subject.status(),
    );
    subject.assert_untraced();
}

fn borrow_once(process: &Process, subject: &Subject, tid: ptrace_shim::Tid) {
    let thread = stop_thread(process, tid, patient()).unwrap();
    let mut borrowed = thread.borrow(&subject.gadgets()).unwrap();
    for _ in 0..2 {
        let pid = borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap();
        assert_eq!(pid, Ok(subject.pid() as u64));
    }
    borrowed.give_back().unwrap().resume().unwrap();
}

#[test]
fn a_group_stop_stays_one() {
    let (mut subject, tid) = Subject::ready("count-signals 2");
    let process = subject.process();
    subject.until_in_call(tid, libc::SYS_read);
    subject.kill(libc::SIGSTOP);
    subject.until_state(tid, 'T');
    for _ in 0..5 {
        let stop = stop_all(&process, patient()).unwrap().resume().unwrap();
        assert_eq!((stop.threads, stop.disturbed.len()), (3, 0));
        assert_still_stopped(&subject);
        borrow_once(&process, &subject, tid);
        assert_still_stopped(&subject);
    }
    subject.kill(libc::SIGCONT);
    assert_counts(&mut subject, "0 0 0");
}

#[test]
fn a_group_stop_that_begins_in_a_stop_takes_place() {
    let (mut subject, tid) = Subject::ready("count-signals 2");
    let process = subject.process();
    for round in 0..20 {
        subject.until_in_call(tid, libc::SYS_read);
        if round % 2 == 0 {
            let stopped = stop_all(&process, patient()).unwrap();
            subject.kill(libc::SIGSTOP);
            stopped.resume().unwrap();
        } else {
            let thread = stop_thread(&process, tid, patient()).unwrap();
            let mut borrowed = thread.borrow(&subject.gadgets()).unwrap();
            assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
            subject.kill(libc::SIGSTOP);
            assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
            borrowed.give_back().unwrap().resume().unwrap();
        }
        assert_still_stopped(&subject);
        subject.kill(libc::SIGCONT);
        assert_counts(&mut subject, "0 0 0");
    }
}

#[test]
fn a_group_stop_that_ends_in_a_stop_is_over() {
    let (mut subject, tid) = Subject::ready("count-signals 2");
    let process = subject.process();
    for round in 0..20 {
        subject.until_in_call(tid, libc::SYS_read);
        subject.kill(libc::SIGSTOP);
        assert_still_stopped(&subject);
        if round % 2 == 0 {
            let stopped = stop_all(&process, patient()).unwrap();
            subject.kill(libc::SIGCONT);
            stopped.resume().unwrap();
        } else {
            let thread = stop_thread(&process, tid, patient()).unwrap();
            let mut borrowed = thread.borrow(&subject.gadgets()).unwrap();
            assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
            subject.kill(libc::SIGCONT);
            assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
            borrowed.give_back().unwrap().resume().unwrap();
        }
        assert_counts(&mut subject, "0 0 0");
        subject.assert_untraced();
    }
}
