//! Processes and threads that exit, are killed, execute or fork in mid-stop.

use crate::child::{Random, Subject, patient, until};
use crate::subject::{hear, say_ready};
use ptrace_shim::{Error, StopOptions, Tid, stop_all, stop_thread, tracer_thread};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

fn execute(role: &str) -> ! {
    let program = std::env::current_exe().unwrap();
    let error = Command::new(program).env(crate::child::ROLE, role).exec();
    panic!("{error}");
}

/// Role: executes itself again and again, also from other threads.
pub(crate) fn exec_chain(left: u32) {
    if left == 0 {
        println!("arrived");
        return;
    }
    let next = format!("exec-chain {}", left - 1);
    std::thread::scope(|scope| {
        scope.spawn(|| std::thread::sleep(Duration::from_secs(100)));
        scope.spawn(|| std::thread::sleep(Duration::from_secs(100)));
        let executing = || {
            std::thread::sleep(Duration::from_micros(500 + 137 * u64::from(left % 7)));
            execute(&next);
        };
        if left.is_multiple_of(2) {
            executing();
        } else {
            scope.spawn(executing);
        }
    });
}

/// Role: the leader, told so, executes another program while another thread
/// (that it names) spins.
pub(crate) fn exec_beside() {
    std::thread::spawn(|| {
        say_ready();
        loop {
            std::hint::spin_loop();
        }
    });
    hear();
    execute("exec-done");
}

/// Role: the leader is gone, another thread goes on.
pub(crate) fn leader_gone() {
    std::thread::spawn(|| {
        let leader = format!("/proc/self/task/{}/stat", std::process::id());
        until(
            || std::fs::read_to_string(&leader).is_ok_and(|stat| stat.contains(") Z ")),
            || "the leader lives on".to_owned(),
        );
        say_ready();
        hear();
        println!("well");
        std::process::exit(0);
    });
    // SAFETY: ends this thread only; nothing of ours is left on its stack.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// Role: forks and spawns children, whose results must be right, until told.
pub(crate) fn fork() {
    say_ready();
    let ended = std::thread::spawn(hear);
    let mut children = 0;
    while !ended.is_finished() {
        // SAFETY: the child only exits.
        match unsafe { libc::fork() } {
            // SAFETY: as after any fork.
            0 => unsafe { libc::_exit(7) },
            child => {
                let mut status = 0;
                // SAFETY: the pointer is to a number of ours.
                while unsafe { libc::waitpid(child, &raw mut status, 0) } != child {}
                assert_eq!(libc::WEXITSTATUS(status), 7);
            }
        }
        // posix_spawn: shares memory and suspends the caller until it executes.
        let status = Command::new("/bin/sh").args(["-c", "exit 5"]).status();
        assert_eq!(status.unwrap().code(), Some(5));
        children += 2;
    }
    println!("children {children}");
}

/// Role: in the middle of a vfork, until told to go on.
pub(crate) fn vfork_wait() {
    say_ready();
    #[expect(deprecated, reason = "the wait of its caller is what is wanted")]
    // SAFETY: the child reads one byte and exits, with system calls only.
    let child = unsafe { libc::vfork() };
    if child == 0 {
        let mut byte = 0u8;
        // SAFETY: one byte into ours.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::read(0, (&raw mut byte).cast(), 1);
            libc::_exit(3);
        }
    }
    let mut status = 0;
    // SAFETY: the pointer is to a number of ours.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    println!("{}", libc::WEXITSTATUS(status));
}

#[test]
fn a_process_killed_in_a_stop_is_reported_dead() {
    for _ in 0..20 {
        let (mut subject, leader) = Subject::ready("threads 3");
        let process = subject.process();
        let stopped = stop_all(&process, patient()).unwrap();
        subject.kill(libc::SIGKILL);
        let error = stopped.resume();
        // The kill may take a moment to reach the stopped threads.
        assert!(
            matches!(error, Ok(_) | Err(Error::ProcessDied { .. })),
            "{error:?}"
        );
        assert!(!subject.end().success());
        let error = stop_all(&process, patient()).map(drop).unwrap_err();
        assert!(
            matches!(
                error,
                Error::ProcessDied { .. } | Error::NoSuchProcess { .. }
            ),
            "{error}"
        );
        let error = stop_thread(&process, leader, patient()).map(drop);
        assert!(
            matches!(error, Err(Error::NoSuchProcess { .. })),
            "{error:?}"
        );
        assert!(!process.is_alive());
    }
}

#[test]
fn a_process_killed_while_borrowed_is_reported_dead() {
    for own_call in [false, true] {
        let (mut subject, leader) = Subject::ready("threads 3");
        let process = subject.process();
        let thread = stop_thread(&process, leader, patient()).unwrap();
        let mut borrowed = thread.borrow(&subject.gadgets()).unwrap();
        if own_call {
            let pid = subject.pid() as u64;
            let error = borrowed
                .syscall(libc::SYS_kill, [pid, libc::SIGKILL as u64, 0, 0, 0, 0])
                .unwrap_err();
            assert!(
                matches!(error, Error::ProcessDied { .. } | Error::ThreadGone { .. }),
                "{error}"
            );
        } else {
            assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
            subject.kill(libc::SIGKILL);
            let error = borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap_err();
            assert!(
                matches!(error, Error::ProcessDied { .. } | Error::ThreadGone { .. }),
                "{error}"
            );
        }
        drop(borrowed);
        assert!(!subject.end().success());
    }
}

#[test]
fn a_thread_that_is_gone_is_said_to_be() {
    let (mut subject, _) = Subject::ready("threads 1");
    let process = subject.process();
    let nobody = Tid::from_raw(i32::MAX);
    let error = stop_thread(&process, nobody, patient())
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, Error::ThreadGone { .. }), "{error}");
    // A thread of another process is not one of this.
    let (_other, stranger) = Subject::ready("threads 0");
    let error = stop_thread(&process, stranger, patient())
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, Error::ThreadGone { .. }), "{error}");
    subject.hang_up();
    assert!(subject.end().success());
}

#[test]
fn a_leader_that_is_gone_does_not_stop_the_others_from_being_stopped() {
    let (mut subject, other) = Subject::ready("leader-gone");
    let process = subject.process();
    for _ in 0..20 {
        let stopped = stop_all(&process, patient()).unwrap();
        let found: Vec<_> = stopped.threads().map(|(tid, _)| tid).collect();
        assert_eq!(found, [other]);
        stopped.resume().unwrap();
        let thread = stop_thread(&process, other, patient()).unwrap();
        let mut borrowed = thread.borrow(&subject.gadgets()).unwrap();
        assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
        borrowed.give_back().unwrap().resume().unwrap();
    }
    subject.tell("x");
    assert_eq!(subject.line(), "well");
    assert!(subject.end().success());
}

#[test]
fn a_process_that_executes_another_program_gets_there() {
    let mut subject = Subject::start("exec-chain 40");
    let process = subject.process();
    let mut random = Random(3);
    let mut executed = 0;
    loop {
        std::thread::sleep(Duration::from_micros(random.below(300)));
        match stop_all(&process, patient()) {
            Ok(stopped) => drop(stopped.resume().unwrap()),
            Err(Error::Executed { .. }) => executed += 1,
            Err(Error::ThreadGone { .. } | Error::AddressSpaceGone { .. }) => {}
            Err(Error::ProcessDied { .. } | Error::NoSuchProcess { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(subject.line(), "arrived");
    assert!(subject.end().success());
    println!("{executed} stops met an execve");
}

/// Has the leader of `exec-beside` execute a program while its other thread is
/// stopped, or borrowed, and gives what comes of that thread's resumption (of a
/// call).
fn executes_beside(borrow: bool) -> ptrace_shim::Result<()> {
    let (mut subject, other) = Subject::ready("exec-beside");
    let process = subject.process();
    let thread = stop_thread(&process, other, patient()).unwrap();
    // The leader waits for the others to die; or, an instant before, for
    // something else, such as another processor to run on.
    let tell = |subject: &mut Subject| {
        subject.tell("x");
        subject.until_state(subject.pid(), 'D');
    };
    let result = if borrow {
        let mut borrowed = thread.borrow(&subject.gadgets()).unwrap();
        assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
        tell(&mut subject);
        borrowed.syscall(libc::SYS_getpid, [0; 6]).map(drop)
    } else {
        tell(&mut subject);
        thread.resume().map(drop)
    };
    assert_eq!(subject.line(), "executed");
    assert!(subject.end().success());
    result
}

#[test]
fn a_stopped_thread_does_not_keep_others_from_executing() {
    for borrow in [false, true] {
        // One that was met too early shows nothing.
        let met = (0..20).any(|_| match executes_beside(borrow) {
            Ok(()) => false,
            Err(Error::ThreadGone { .. }) => true,
            Err(error) => panic!("{error}"),
        });
        assert!(met, "the leader never waited for the others");
    }
}

#[test]
fn forks_in_and_between_stops_go_well() {
    let (mut subject, leader) = Subject::ready("fork");
    let process = subject.process();
    let gadgets = subject.gadgets();
    for round in 0..200 {
        if round % 3 == 0 {
            let thread = stop_thread(&process, leader, patient()).unwrap();
            match thread.borrow(&gadgets) {
                Ok(mut borrowed) => {
                    assert!(borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap().is_ok());
                    borrowed.give_back().unwrap().resume().unwrap();
                }
                Err(Error::NotBorrowable { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        } else {
            stop_all(&process, patient()).unwrap().resume().unwrap();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    subject.tell("x");
    let line = subject.line();
    assert!(line.starts_with("children "), "{line}");
    assert!(subject.end().success());
}

/// A thread in an uninterruptible wait does not stop in time: it is left as
/// it was, at once from a thread of our own.
#[test]
fn a_thread_that_does_not_stop_in_time_is_let_go_of() {
    let (mut subject, leader) = Subject::ready("vfork-wait");
    let process = subject.process();
    subject.until_state(leader, 'D');
    let hasty = StopOptions::from(Duration::from_millis(50));
    for all in [false, true] {
        let start = std::time::Instant::now();
        let error = tracer_thread(|| match all {
            true => stop_all(&process, hasty).map(drop),
            false => stop_thread(&process, leader, hasty).map(drop),
        })
        .unwrap_err();
        assert!(
            matches!(error, Error::Timeout { state: 'D', .. }),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(4));
        until(
            || process.tracer_of().unwrap().is_none(),
            || subject.status(),
        );
    }
    subject.tell("x");
    assert_eq!(subject.line(), "3");
    assert!(subject.end().success());
}

/// Elsewhere than in a thread of our own it is waited for.
#[test]
fn a_thread_that_stops_late_is_let_go_of_then() {
    let (mut subject, leader) = Subject::ready("vfork-wait");
    let process = subject.process();
    subject.until_state(leader, 'D');
    let hasty = StopOptions::from(Duration::from_millis(50));
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| stop_all(&process, hasty).map(drop));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!stopping.is_finished());
        subject.tell("x");
        let error = stopping.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
    });
    assert_eq!(subject.line(), "3");
    assert!(subject.end().success());
}

/// One that has reached its stop by then, late, is taken over by the next try
/// from the same OS thread, and by no other.
#[test]
fn a_thread_that_stopped_late_is_stopped_again_from_the_same_thread() {
    for all in [false, true] {
        let (mut subject, leader) = Subject::ready("vfork-wait");
        let process = subject.process();
        subject.until_state(leader, 'D');
        let hasty = StopOptions::from(Duration::from_millis(50));
        tracer_thread(|| {
            let stop = |options| match all {
                true => stop_all(&process, options)?.resume().map(drop),
                false => stop_thread(&process, leader, options)?.resume().map(drop),
            };
            let error = stop(hasty).unwrap_err();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            // Still waiting: no better the second time.
            let error = stop(hasty).unwrap_err();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            subject.tell("x");
            subject.until_state(leader, 't');
            stop(patient())
        })
        .unwrap();
        assert_eq!(subject.line(), "3");
        assert!(subject.end().success());
    }
}
