//! Stops of one thread and of all: who is stopped, and who runs on.

use crate::child::{Random, Subject, patient};
use ptrace_shim::{Address, Error, Interrupted, Pid, stop_all, stop_thread};
use std::time::Duration;

#[test]
fn exactly_one_thread_is_stopped() {
    let (mut subject, leader) = Subject::ready("patterns spin");
    let process = subject.process();
    // It says that it is ready a moment before it spins.
    let thread = loop {
        let thread = stop_thread(&process, leader, patient()).unwrap();
        if thread.registers().interrupted() == Interrupted::UserCode {
            break thread;
        }
    };
    assert_eq!(thread.tid(), leader);
    assert_ne!(thread.registers().fs_base, 0);
    assert_eq!(subject.state(leader), 't');
    for other in process.threads().unwrap() {
        if other != leader {
            assert_ne!(subject.state(other), 't');
        }
    }
    assert!(thread.resume().unwrap() > Duration::ZERO);
    subject.tell("x");
    assert_eq!(subject.line(), "kept");
    subject.assert_untraced();
}

#[test]
fn all_threads_are_stopped_and_run_on() {
    let (subject, _) = Subject::ready("threads 12");
    let process = subject.process();
    let threads = process.threads().unwrap();
    assert_eq!(threads.len(), 13);
    for &tid in &threads {
        subject.until_in_call(tid, libc::SYS_read);
    }
    let stopped = stop_all(&process, patient()).unwrap();
    let mut found: Vec<_> = stopped.threads().map(|(tid, _)| tid).collect();
    found.sort_unstable();
    assert_eq!(found, threads);
    for &tid in &threads {
        assert_eq!(subject.state(tid), 't');
        let registers = stopped.registers(tid).unwrap();
        let nr = libc::SYS_read as u64;
        assert_eq!(registers.interrupted(), Interrupted::Restarting { nr });
    }
    let stop = stopped.resume().unwrap();
    assert_eq!((stop.threads, stop.disturbed), (13, vec![]));
    subject.assert_untraced();
    for &tid in &threads {
        subject.until_in_call(tid, libc::SYS_read);
    }
}

#[test]
fn dropping_resumes() {
    let (subject, leader) = Subject::ready("threads 3");
    let process = subject.process();
    drop(stop_all(&process, patient()).unwrap());
    drop(stop_thread(&process, leader, patient()).unwrap());
    let thread = stop_thread(&process, leader, patient()).unwrap();
    drop(thread.borrow(&subject.gadgets()).unwrap());
    subject.assert_untraced();
    subject.until_in_call(leader, libc::SYS_read);
}

#[test]
fn threads_may_come_and_go_during_stops_of_all() {
    let (mut subject, _) = Subject::ready("churn");
    let counter = Address(subject.line().parse().unwrap());
    let process = subject.process();
    let mut most = 0;
    for _ in 0..300 {
        let stopped = stop_all(&process, patient()).unwrap();
        // Nobody was missed: none but those that are exiting, in the kernel,
        // are not stopped, and nobody counts.
        let before = stopped.memory().read_u64(counter).unwrap();
        for tid in process.threads().unwrap() {
            let found = stopped.registers(tid).is_some();
            assert!(found || subject.is_exiting(tid), "{}", subject.status());
        }
        assert_eq!(stopped.memory().read_u64(counter).unwrap(), before);
        most = most.max(stopped.threads().count());
        stopped.resume().unwrap();
    }
    assert!(most > 2, "{most}");
    subject.tell("x");
    assert_eq!(subject.line(), "all sums right");
    assert!(subject.end().success());
}

#[test]
fn threads_may_come_and_go_during_loans() {
    let (mut subject, leader) = Subject::ready("churn");
    subject.line();
    let process = subject.process();
    let gadgets = subject.gadgets();
    let mut random = Random(7);
    let mut loans = 0;
    for _ in 0..400 {
        let threads = process.threads().unwrap();
        let tid = threads[random.below(threads.len() as u64) as usize];
        let thread = match stop_thread(&process, tid, patient()) {
            Ok(thread) => thread,
            Err(Error::ThreadGone { .. }) if tid != leader => continue,
            Err(error) => panic!("{error}"),
        };
        match thread.borrow(&gadgets) {
            Ok(mut borrowed) => {
                let own = borrowed.syscall(libc::SYS_gettid, [0; 6]).unwrap();
                assert_eq!(own, Ok(tid.as_raw() as u64));
                borrowed.give_back().unwrap().resume().unwrap();
                loans += 1;
            }
            // In a sleep; or at the very start or end of its life.
            Err(Error::NotBorrowable { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(loans > 50, "{loans}");
    subject.tell("x");
    assert_eq!(subject.line(), "all sums right");
    assert!(subject.end().success());
}

#[test]
fn another_tracer_is_named() {
    let (mut subject, leader) = Subject::ready("threads 2");
    let mut other = Subject::start(&format!("hold {}", subject.pid()));
    assert_eq!(other.line(), "holding");
    let process = subject.process();
    let (tracer, comm) = process.tracer_of().unwrap().unwrap();
    assert_eq!(tracer, Pid::from_raw(other.pid()));
    for error in [
        stop_all(&process, patient()).map(drop).unwrap_err(),
        stop_thread(&process, leader, patient())
            .map(drop)
            .unwrap_err(),
    ] {
        let Error::TracedByAnother {
            tracer: named,
            comm: name,
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!((*named, name), (tracer, &comm));
        assert!(
            error
                .to_string()
                .ends_with(&format!("traced by {tracer} ({comm})"))
        );
    }
    other.hang_up();
    assert!(other.end().success());
    subject.assert_untraced();
    stop_all(&process, patient()).unwrap().resume().unwrap();
    subject.hang_up();
    assert!(subject.end().success());
}

#[test]
fn without_the_right_to_trace_is_said_so() {
    let (subject, _) = Subject::ready("threads 1");
    // Another user, without capabilities.
    let mut other = Subject::start(&format!("trace unprivileged {} 0 0", subject.pid()));
    let line = other.line();
    assert!(
        line.starts_with(&format!(
            "tracing thread {0} of process {0} is not permitted",
            subject.pid()
        )),
        "{line}"
    );
    subject.assert_untraced();
}
