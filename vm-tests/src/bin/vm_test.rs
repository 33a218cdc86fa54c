//! Boots kernels, and says under which conditions all was well.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nightgraft_testbed::bin_dir;
use nightgraft_vm_tests::conditions::{Condition, Series};
use nightgraft_vm_tests::kernel::Kernel;
use nightgraft_vm_tests::machine::Outcome;
use nightgraft_vm_tests::{initramfs, machine};
use serde_json::{Value, json};

/// Boots Debian's cloud kernels in QEMU, each under many conditions, and runs
/// the patch under load in each.
#[derive(Parser)]
#[command(
    name = "cargo xtask vm-test",
    bin_name = "cargo xtask vm-test",
    version
)]
struct Arguments {
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// Conditions in which every two values meet (the default).
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Conditions in which every three values meet.
    #[arg(long)]
    full: bool,
    /// Only this kernel: 6.1 or 6.12.
    #[arg(long, value_name = "SERIES")]
    kernel: Option<String>,
    /// Only conditions that contain this, as they are printed ("yama=3").
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Print the conditions and boot nothing.
    #[arg(long)]
    list: bool,
    /// Tell what was seen in each, on stderr.
    #[arg(long)]
    verbose: bool,
    /// Machines at a time.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// The tests of ptrace-shim, built.
    #[arg(long, hide = true)]
    stops: Option<PathBuf>,
}

/// A guest ends its trial before that.
const BOOT_WITHIN: Duration = Duration::from_secs(720);

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let started = Instant::now();
    let conditions = chosen(&arguments)?;
    if arguments.list {
        for condition in &conditions {
            println!("{condition}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let stops = arguments
        .stops
        .context("--stops: run this as `cargo xtask vm-test`, which builds what is needed")?;
    let programs = bin_dir()?;
    let cache = programs.join("vm-tests");
    let consoles = cache.join("consoles");
    let work = cache.join("work");
    for folder in [&consoles, &work] {
        std::fs::create_dir_all(folder)?;
    }
    let mut kernels = Vec::new();
    for series in Series::ALL {
        if conditions.iter().any(|c| c.kernel == series) {
            let kernel = Kernel::get(series, &cache.join("kernels"))?;
            let archive = work.join(format!("initramfs-{}", series.name()));
            initramfs::make(&programs, &stops, &kernel.overlay, &work, &archive)?;
            kernels.push((kernel, archive));
        }
    }

    let waiting = Mutex::new(conditions.iter().enumerate());
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().ok().and_then(|mut w| w.next());
                    let Some((number, condition)) = next else {
                        break;
                    };
                    let console = consoles.join(format!("{number:02}.log"));
                    let outcome = kernels
                        .iter()
                        .find(|(k, _)| k.series == condition.kernel)
                        .context("its kernel is not there")
                        .and_then(|(kernel, archive)| {
                            machine::boot(condition, kernel, archive, &console, BOOT_WITHIN)
                        });
                    let result = judge(condition, outcome);
                    say(condition, &result, arguments.verbose);
                    if let Ok(mut all) = results.lock() {
                        all.push(result);
                    }
                }
            });
        }
    });
    let results = results
        .into_inner()
        .map_err(|_| anyhow::anyhow!("a thread has panicked"))?;
    let failed = conditions.len() - results.iter().filter(|r| r.complaint.is_none()).count();
    let mut releases: Vec<String> = results.iter().filter_map(|r| r.kernel.clone()).collect();
    releases.sort_by_key(|r| {
        Series::ALL
            .iter()
            .position(|s| r.starts_with(&format!("{}.", s.name())))
    });
    releases.dedup();
    let sum = |name: &str| -> u64 {
        let of = |r: &Judged| r.seen.pointer(name).and_then(Value::as_u64);
        results.iter().filter_map(of).sum()
    };
    println!(
        "{} conditions on {}, {failed} failed, in {} s; {} requests, {} agents killed before they were done",
        conditions.len(),
        releases.join(" and "),
        started.elapsed().as_secs(),
        sum("/trial/requests"),
        sum("/trial/agents/agents_killed_before_they_were_done"),
    );
    if arguments.json {
        println!(
            "{}",
            json!({"kernels": releases, "conditions": conditions.len(), "failed": failed})
        );
    }
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn chosen(arguments: &Arguments) -> Result<Vec<Condition>> {
    if let Some(kernel) = &arguments.kernel {
        ensure!(
            Series::ALL.iter().any(|s| s.name() == kernel),
            "there is no kernel {kernel}: 6.1 or 6.12"
        );
    }
    let mut conditions = Condition::stops(arguments.full);
    conditions.extend(Condition::combined(if arguments.full { 3 } else { 2 }));
    conditions.retain(|c| {
        arguments
            .kernel
            .as_ref()
            .is_none_or(|k| c.kernel.name() == k)
            && arguments
                .only
                .as_ref()
                .is_none_or(|only| c.to_string().contains(only.as_str()))
    });
    ensure!(
        !conditions.is_empty(),
        "no condition is like that (--list lists them)"
    );
    Ok(conditions)
}

/// What came of one condition.
struct Judged {
    kernel: Option<String>,
    complaint: Option<String>,
    took: Duration,
    seen: Value,
}

fn judge(condition: &Condition, outcome: Result<Outcome>) -> Judged {
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            return Judged {
                kernel: None,
                complaint: Some(format!("{error:#}")),
                took: Duration::ZERO,
                seen: Value::Null,
            };
        }
    };
    let console = outcome.console.display();
    let kernel = outcome.verdict.as_ref().map(|v| v.kernel.clone());
    let complaint = match &outcome.verdict {
        None if outcome.overdue => Some(format!(
            "no verdict within {BOOT_WITHIN:?}; its console: {console}"
        )),
        None => Some(format!(
            "it ended without a verdict; its console: {console}"
        )),
        Some(v) if !v.passed => Some(format!(
            "{}; its console: {console}",
            v.error.as_deref().unwrap_or("no reason given")
        )),
        Some(v)
            if !v
                .kernel
                .starts_with(&format!("{}.", condition.kernel.name())) =>
        {
            Some(format!(
                "the kernel was {}; its console: {console}",
                v.kernel
            ))
        }
        Some(_) => None,
    };
    Judged {
        kernel,
        complaint,
        took: outcome.took,
        seen: outcome.verdict.map_or(Value::Null, |v| v.seen),
    }
}

fn say(condition: &Condition, result: &Judged, verbose: bool) {
    // Progress goes to stderr: stdout is the result.
    let mut err = std::io::stderr().lock();
    let _ = match &result.complaint {
        None => writeln!(err, "ok     {condition} ({} s)", result.took.as_secs()),
        Some(complaint) => writeln!(
            err,
            "FAILED {condition} ({} s): {complaint}",
            result.took.as_secs()
        ),
    };
    if verbose {
        let _ = writeln!(err, "       {}", result.seen);
    }
}
