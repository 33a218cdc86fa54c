//! Tracers that die: between any two requests, and at random moments.
//!
//! Role: `trace HOW PID TID STEP` does something to a subject, and kills itself
//! before the STEP-th request (0: never). What is left behind must not notice.

use crate::child::{PATIENCE, Random, Subject, patient, until};
use crate::signals;
use crate::subject::hear;
use ptrace_shim::{
    Error, Gadgets, Memory, Process, StopOptions, Tid, die_at_step, stop_all, stop_thread,
    tracer_thread,
};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

/// Role: holds a process until the input ends.
pub(crate) fn hold(pid: i32) {
    let process = Process::open(pid).unwrap();
    let stopped = stop_all(&process, patient()).unwrap();
    println!("holding");
    hear();
    stopped.resume().unwrap();
}

/// Role: does what it is told to a process, and may die of it.
pub(crate) fn trace(how: &str, pid: i32, tid: i32, step: u64) {
    let process = Process::open(pid).unwrap();
    if how == "unprivileged" {
        // SAFETY: numbers.
        assert_eq!(unsafe { libc::setuid(65534) }, 0);
        let error = stop_all(&process, patient()).map(drop).unwrap_err();
        println!("{error}");
        return;
    }
    let gadgets = loop {
        match Memory::open(&process).and_then(|memory| Gadgets::find(&memory)) {
            Ok(gadgets) => break gadgets,
            // It executes another program just now, whose C library is not
            // mapped yet.
            Err(Error::AddressSpaceGone { .. } | Error::NoGadget { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    };
    let tid = Tid::from_raw(tid);
    println!("tracing");
    if how == "until-dead" {
        until_dead(&process, tid, &gadgets);
        println!("dead");
        hear();
        return;
    }
    loop {
        let most = u64::MAX / 2;
        die_at_step(if step == 0 { most } else { step });
        tracer_thread(|| one(how, &process, tid, &gadgets)).unwrap();
        if step != 0 {
            let left = die_at_step(0);
            println!("done with {left} left");
            return;
        }
    }
}

/// Stops and borrows from one OS thread, which outlives the process.
fn until_dead(process: &Process, tid: Tid, gadgets: &Gadgets) {
    let once = || -> ptrace_shim::Result<()> {
        stop_all(process, patient())?.resume()?;
        let mut borrowed = stop_thread(process, tid, patient())?.borrow(gadgets)?;
        let own = borrowed.syscall(libc::SYS_gettid, [0; 6])?;
        assert_eq!(own, Ok(tid.as_raw() as u64));
        borrowed.give_back()?.resume()?;
        Ok(())
    };
    while process.is_alive() {
        match once() {
            Ok(())
            | Err(
                Error::ProcessDied { .. }
                | Error::NoSuchProcess { .. }
                | Error::ThreadGone { .. }
                | Error::NotBorrowable { .. }
                | Error::Executed { .. }
                | Error::AddressSpaceGone { .. }
                | Error::Memory { .. }
                | Error::GadgetGone { .. },
            ) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn one(how: &str, process: &Process, tid: Tid, gadgets: &Gadgets) -> ptrace_shim::Result<()> {
    match how {
        "stop" => {
            let mut stopped = stop_all(process, patient())?;
            // The same registers again, where they may be set.
            let threads: Vec<_> = stopped.threads().map(|(tid, r)| (tid, *r)).collect();
            for (tid, registers) in threads {
                if registers.orig_rax == u64::MAX {
                    stopped.set_registers(tid, &registers)?;
                }
            }
            // And the same code.
            let code = stopped.memory().read_vec(gadgets.restore_rt, 5)?;
            stopped.write_code(gadgets.restore_rt, &code)?;
            stopped.resume()?;
        }
        "borrow" | "borrow-drop" => {
            let mut borrowed = stop_thread(process, tid, patient())?.borrow(gadgets)?;
            for _ in 0..3 {
                let own = borrowed.syscall(libc::SYS_gettid, [0; 6])?;
                assert_eq!(own, Ok(tid.as_raw() as u64));
            }
            if how == "borrow" {
                borrowed.give_back()?.resume()?;
            }
        }
        // A call that must be given up.
        "overrun" => {
            let options = StopOptions {
                call_deadline: Duration::from_millis(1),
                deadline: PATIENCE,
                ..StopOptions::default()
            };
            let mut borrowed = stop_thread(process, tid, options)?.borrow(gadgets)?;
            let time = borrowed.put(0, &[[0; 8], 30_000_000u64.to_le_bytes()].concat())?;
            let late = borrowed.syscall(libc::SYS_nanosleep, [time.0, 0, 0, 0, 0, 0]);
            assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
            borrowed.give_back()?.resume()?;
        }
        other => panic!("{other}"),
    }
    Ok(())
}

const ROLES: [&str; 3] = ["patterns spin", "patterns read", "patterns-in-thread read"];

/// The subject is untraced and says that nothing changed.
fn assert_well(subject: &mut Subject, what: &str) {
    // The tracer's threads may still be on their way out.
    let process = subject.process();
    until(
        || {
            let threads = process.threads().unwrap();
            threads
                .iter()
                .all(|&tid| !matches!(process.tracer_of_thread(tid), Ok(Some(_))))
        },
        || subject.status(),
    );
    for _ in 0..2 {
        subject.tell("x");
        assert_eq!(subject.line(), "kept", "{what}");
    }
}

/// Has tracers do something, each dying one step later than the one before,
/// until one gets through; how many died.
fn die_at_every_step(how: &str, role: &str) -> u64 {
    let (mut subject, tid) = Subject::ready(role);
    for step in 1.. {
        let words = format!("trace {how} {} {tid} {step}", subject.pid());
        let mut tracer = Subject::start(&words);
        assert_eq!(tracer.line(), "tracing");
        let status = tracer.end();
        assert_well(&mut subject, &format!("{words}, {role}"));
        if status.success() {
            return step - 1;
        }
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{words}");
    }
    unreachable!()
}

#[test]
fn a_tracer_may_die_at_any_step_of_a_stop() {
    for role in ROLES {
        // Seize, interrupt, wait, look again, registers, detach; the code.
        let steps = die_at_every_step("stop", role);
        assert!(steps >= 7, "{role}: {steps}");
    }
}

#[test]
fn a_tracer_may_die_at_any_step_of_a_remote_call() {
    for role in ROLES {
        // Three calls: registers, twice resume and wait, registers.
        let steps = die_at_every_step("borrow", role);
        assert!(steps >= 30, "{role}: {steps}");
    }
}

#[test]
fn a_tracer_may_die_at_any_step_of_leaving_a_thread_to_heal() {
    let steps = die_at_every_step("borrow-drop", "patterns spin");
    assert!(steps >= 25, "{steps}");
}

#[test]
fn a_tracer_may_die_at_any_step_of_giving_up_a_call() {
    let steps = die_at_every_step("overrun", "patterns spin");
    assert!(steps >= 20, "{steps}");
}

#[test]
fn a_tracer_may_die_at_any_moment() {
    const DEATHS: u64 = 360;
    let mut random = Random(11);
    let kinds = ["borrow", "stop", "borrow-drop"];
    for (index, role) in ROLES.into_iter().enumerate() {
        let (mut subject, tid) = Subject::ready(role);
        for death in 0..DEATHS / ROLES.len() as u64 {
            let how = kinds[(death as usize + index) % kinds.len()];
            let words = format!("trace {how} {} {tid} 0", subject.pid());
            let mut tracer = Subject::start(&words);
            assert_eq!(tracer.line(), "tracing");
            std::thread::sleep(Duration::from_micros(500 + random.below(3000)));
            tracer.kill(libc::SIGKILL);
            assert_eq!(tracer.end().signal(), Some(libc::SIGKILL));
            assert_well(&mut subject, &words);
        }
    }
}

/// A process's own parent hears of its end, while a tracer that is not its
/// parent lives on.
#[test]
fn a_traced_process_that_ends_is_its_parents_again() {
    let mut random = Random(23);
    for round in 0..60 {
        let (mut subject, tid) = Subject::ready("threads 3");
        let words = format!("trace until-dead {} {tid} 0", subject.pid());
        let mut tracer = Subject::start(&words);
        assert_eq!(tracer.line(), "tracing");
        std::thread::sleep(Duration::from_micros(random.below(2000)));
        if round % 2 == 0 {
            subject.kill(libc::SIGKILL);
            assert_eq!(subject.end().signal(), Some(libc::SIGKILL));
        } else {
            subject.hang_up();
            assert!(subject.end().success());
        }
        assert_eq!(tracer.line(), "dead");
        tracer.hang_up();
        assert!(tracer.end().success());
    }
}

#[test]
fn a_process_of_another_that_executes_a_program_gets_there() {
    for _ in 0..3 {
        let mut subject = Subject::start("exec-chain 30");
        let pid = subject.pid();
        let words = format!("trace until-dead {pid} {pid} 0");
        let mut tracer = Subject::start(&words);
        assert_eq!(tracer.line(), "tracing");
        assert_eq!(subject.line(), "arrived");
        assert!(subject.end().success());
        assert_eq!(tracer.line(), "dead");
        tracer.hang_up();
        assert!(tracer.end().success());
    }
}

/// Signals are neither lost nor doubled when a tracer dies, at whatever it was
/// about to deliver.
#[test]
fn a_tracer_that_dies_takes_no_signal_with_it() {
    const ROUNDS: usize = 80;
    const EACH: usize = 10;
    let (mut subject, tid) = Subject::ready("count-signals 0");
    let mut random = Random(5);
    let mut sent = 0;
    for round in 0..ROUNDS {
        let how = ["borrow", "stop"][round % 2];
        let words = format!("trace {how} {} {tid} 0", subject.pid());
        let mut tracer = Subject::start(&words);
        assert_eq!(tracer.line(), "tracing");
        for _ in 0..EACH {
            sent += 1;
            signals::queue(subject.pid(), sent);
            std::thread::sleep(Duration::from_micros(random.below(100)));
        }
        tracer.kill(libc::SIGKILL);
        tracer.end();
    }
    let sum = sent * (sent + 1) / 2;
    signals::assert_counts(&mut subject, &format!("{sent} {sum} 0"));
}
