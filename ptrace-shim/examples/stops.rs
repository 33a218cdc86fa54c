//! Measures stops: `cargo run --release -p ptrace-shim --example stops [PID]`.
//!
//! Without a PID it starts a process with four threads blocked in `read`.
//! Prints medians and 99th percentiles in microseconds; `getppid` is the remote
//! system call.

use ptrace_shim::{
    Gadgets, Memory, Process, SameCpu, Scheduling, StopOptions, stop_all, stop_thread,
    tracer_thread,
};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 1000;
const CALLS: usize = 20;

fn main() -> ptrace_shim::Result<()> {
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some("--subject") {
        subject();
        return Ok(());
    }
    let Some(pid) = argument.and_then(|argument| argument.parse().ok()) else {
        return measure_a_child();
    };
    measure(pid)
}

/// Four threads, three of them in reads that never return; ends with our pipe.
fn subject() {
    for _ in 0..3 {
        std::thread::spawn(|| {
            let Ok((reader, _writer)) = std::io::pipe() else {
                return;
            };
            drop((&reader).read(&mut [0]));
        });
    }
    drop(std::io::stdin().read(&mut [0]));
}

fn measure_a_child() -> ptrace_shim::Result<()> {
    let child = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .arg("--subject")
            .stdin(Stdio::piped())
            .spawn()
    });
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            eprintln!("starting the subject: {error}");
            std::process::exit(1);
        }
    };
    std::thread::sleep(Duration::from_millis(100));
    let result = measure(child.id().cast_signed());
    // It ends with its input.
    drop(child.stdin.take());
    drop(child.wait());
    result
}

fn measure(pid: i32) -> ptrace_shim::Result<()> {
    let process = Process::open(pid)?;
    let gadgets = Gadgets::find(&Memory::open(&process)?)?;
    println!("{} threads; µs: median, p99", process.threads()?.len());
    for (name, raise_priority, same_cpu) in [
        ("untouched", false, SameCpu::Never),
        ("raised", true, SameCpu::Never),
        ("same CPU", false, SameCpu::Always),
        ("raised, same CPU", true, SameCpu::Always),
        ("default", true, SameCpu::WhenIdle),
    ] {
        let options = StopOptions {
            scheduling: Scheduling {
                raise_priority,
                same_cpu,
            },
            deadline: Duration::from_secs(1),
            ..StopOptions::default()
        };
        tracer_thread(|| {
            let mut stops = Vec::new();
            let mut borrows = Vec::new();
            let mut calls = Vec::new();
            for _ in 0..ROUNDS {
                stops.push(stop_all(&process, options)?.resume()?.duration);
            }
            for _ in 0..ROUNDS / CALLS {
                let thread = stop_thread(&process, process.pid().leader(), options)?;
                let mut borrowed = thread.borrow(&gadgets)?;
                for _ in 0..CALLS {
                    let start = Instant::now();
                    let parent = borrowed.syscall(libc::SYS_getppid, [0; 6])?;
                    calls.push(start.elapsed());
                    assert!(parent.is_ok(), "{parent:?}");
                }
                let start = Instant::now();
                let thread = borrowed.give_back()?;
                let giving_back = start.elapsed();
                drop(thread);
                borrows.push(giving_back);
            }
            println!(
                "{name:18} stop_all {}   remote call {}   give back {}",
                summary(stops),
                summary(calls),
                summary(borrows)
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn summary(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_nanos() as f64 / 1000.0;
    format!("{:6.1} {:6.1}", at(50), at(99))
}
