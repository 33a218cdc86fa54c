//! Ends agents, workers and containers at every point, and looks what is lost.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use nightgraft_testbed::chaos::{self, NOT_PASSED, Options};

/// Ends the agent at each of its fault points under load, starts another, and
/// checks that no request failed, nothing leaked, and the state is as asked
/// for; then workers and containers, the journal's disk, and cycles of patch
/// and revert.
#[derive(Parser)]
#[command(name = "cargo xtask chaos", bin_name = "cargo xtask chaos", version)]
struct Arguments {
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// Go on with random points and hits until so many minutes are over
    /// (without: every point once), and have 10000 cycles instead of 500.
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u64).range(1..))]
    minutes: Option<u64>,
    /// Patch/revert cycles.
    #[arg(long, value_name = "N")]
    cycles: Option<u64>,
    /// Program of tests with hostile workers, run as well; repeated. `cargo
    /// xtask chaos` gives all of them.
    #[arg(long, value_name = "PATH")]
    hostile: Vec<PathBuf>,
    /// Seed of the random choices.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let options = Options {
        minutes: arguments.minutes,
        cycles: arguments.cycles.unwrap_or(if arguments.minutes.is_some() {
            10_000
        } else {
            500
        }),
        seed: arguments.seed,
        hostile: arguments.hostile,
    };
    let report = chaos::run(&options, &|text| {
        // Progress goes to stderr: stdout is the result.
        let _ = writeln!(std::io::stderr(), "{text}");
    })?;
    for (point, why) in NOT_PASSED {
        println!("not passed: {point} ({why})");
    }
    for complaint in &report.complaints {
        println!("- {complaint}");
    }
    println!(
        "{} points, {} kills, {} cycles, {} requests: {} failed, {} wrong; {} leaks, {} unrecovered; {} hostile cases, {} unexpected",
        report.fault_points,
        report.kills,
        report.cycles,
        report.requests,
        report.failed,
        report.wrong,
        report.leaked,
        report.unrecovered,
        report.hostile_cases,
        report.unexpected
    );
    if arguments.json {
        println!("{}", report.json());
    }
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
