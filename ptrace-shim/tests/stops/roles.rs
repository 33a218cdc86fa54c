//! What the subjects do.

use crate::child::Random;
use crate::patterns;
use crate::subject::{hear, say_ready};
use crate::{blocking, borrowing, ends, killed, memory, signals};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Plays the role given as words.
pub(crate) fn play(words: &[&str]) {
    match words {
        ["threads", count] => threads(count.parse().unwrap()),
        ["churn"] => churn(),
        ["patterns", kind] => keep_patterns(kind),
        ["patterns-in-thread", kind] => {
            let kind = (*kind).to_owned();
            std::thread::spawn(move || keep_patterns(&kind))
                .join()
                .unwrap();
        }
        ["block", call] => blocking::block(call),
        ["filtered"] => borrowing::filtered(),
        ["alternate-stack"] => borrowing::on_alternate_stack(),
        ["rseq"] => borrowing::in_rseq_section(),
        ["little-stack"] => borrowing::with_little_stack(),
        ["count-signals", threads] => signals::count(threads.parse().unwrap()),
        ["exec-chain", left] => ends::exec_chain(left.parse().unwrap()),
        ["exec-beside"] => ends::exec_beside(),
        ["exec-done"] => println!("executed"),
        ["leader-gone"] => ends::leader_gone(),
        ["fork"] => ends::fork(),
        ["vfork-wait"] => ends::vfork_wait(),
        ["code"] => memory::run_code(),
        ["hold", pid] => killed::hold(pid.parse().unwrap()),
        ["trace", how, pid, tid, step] => killed::trace(
            how,
            pid.parse().unwrap(),
            tid.parse().unwrap(),
            step.parse().unwrap(),
        ),
        other => panic!("no such role: {other:?}"),
    }
}

/// The leader and `count` more, all blocked in a `read`.
fn threads(count: usize) {
    let (reader, _writer) = std::io::pipe().unwrap();
    let started = std::sync::Barrier::new(count + 1);
    std::thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                started.wait();
                let mut byte = [0];
                drop(std::io::Read::read(&mut (&reader), &mut byte));
            });
        }
        started.wait();
        say_ready();
        hear();
        std::process::exit(0);
    });
}

/// Threads come and go until the input ends, and each must come to its result.
fn churn() {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    fn sum(random: &mut Random) -> u64 {
        COUNTER.fetch_add(1, Ordering::SeqCst);
        let length = 100 + random.below(2000);
        let result: u64 = (0..length).fold(0, |sum, n| std::hint::black_box(sum + n));
        assert_eq!(result, length * (length - 1) / 2);
        length
    }
    say_ready();
    println!("{}", (&raw const COUNTER).addr());
    let ended = std::sync::Arc::new(AtomicBool::new(false));
    let makers: Vec<_> = (0..3)
        .map(|seed| {
            let ended = ended.clone();
            std::thread::spawn(move || {
                let mut random = Random(seed);
                while !ended.load(Ordering::Relaxed) {
                    let children: Vec<_> = (0..3)
                        .map(|child| {
                            let mut random = Random(random.0 ^ child);
                            std::thread::spawn(move || {
                                if random.below(4) == 0 {
                                    std::thread::sleep(Duration::from_micros(random.below(200)));
                                }
                                sum(&mut random)
                            })
                        })
                        .collect();
                    sum(&mut random);
                    for child in children {
                        child.join().unwrap();
                    }
                }
            })
        })
        .collect();
    hear();
    ended.store(true, Ordering::Relaxed);
    for maker in makers {
        maker.join().unwrap();
    }
    println!("all sums right");
}

/// Patterns in all registers while spinning or reading; after each byte that
/// is heard, says whether they were kept.
fn keep_patterns(kind: &str) {
    let say = |result: Result<(), String>| match result {
        Ok(()) => println!("kept"),
        Err(what) => println!("changed {what}"),
    };
    match kind {
        "read" => {
            say_ready();
            for seed in 1.. {
                match patterns::read(seed) {
                    Ok(Some(_)) => say(Ok(())),
                    Ok(None) => return,
                    Err(what) => say(Err(what)),
                }
            }
        }
        _ => {
            // Another thread hears and ends the spins.
            let (sender, receiver) = std::sync::mpsc::channel::<patterns::EndSpin>();
            std::thread::spawn(move || {
                for spin in receiver {
                    if hear().is_none() {
                        std::process::exit(0);
                    }
                    spin.end();
                }
            });
            let mut ready = Some(say_ready);
            for seed in 1.. {
                say(patterns::spin(seed, |spin| {
                    sender.send(spin).unwrap();
                    if let Some(say_ready) = ready.take() {
                        say_ready();
                    }
                }));
            }
        }
    }
}
