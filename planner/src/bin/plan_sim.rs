//! `cargo xtask plan-sim`.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use nightgraft_planner::sim::{self, Options, Shares};
use serde_json::json;

/// Runs the planner on made-up graphs and on published topologies, beside the
/// best that there is and beside simpler ways to decide, and its governor under
/// hours of noisy load
#[derive(Parser)]
#[command(
    name = "cargo xtask plan-sim",
    bin_name = "cargo xtask plan-sim",
    version
)]
struct Arguments {
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
    /// Graphs made up at random on which every set is tried
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    graphs: u32,
    /// Hours of noisy load on each of some graphs
    #[arg(long, value_name = "H", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1000))]
    hours: u32,
    /// Seed of all that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// On average at least this share of the best.
const MEAN: f64 = 0.98;
/// And at worst this.
const LEAST: f64 = 0.9;

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let options = Options {
        graphs: arguments.graphs as usize,
        hours: arguments.hours,
        seed: arguments.seed,
        ..Options::default()
    };
    let report = sim::run(&options, &|text| {
        // Progress goes to stderr: stdout is the result.
        let _ = writeln!(std::io::stderr(), "{text}");
    });
    let row = |name: &str, shares: &Shares| {
        println!(
            "{name:<22} {:>7.2} % {:>7.2} % {:>9.2} %   {:>4}",
            100.0 * shares.mean,
            100.0 * shares.median,
            100.0 * shares.min,
            shares.violations
        );
    };
    println!(
        "{:<22} {:>9} {:>9} {:>11}   breaks a constraint",
        "of the best", "mean", "median", "least"
    );
    row("planner", &report.planner);
    row("its heuristic alone", &report.heuristic);
    row("the busiest edges", &report.by_count);
    row("everything", &report.everything);
    row("nothing", &report.nothing);
    println!(
        "{} graphs ({} with every set tried, {} by the exact solver, {} published topologies); {} plans proven best, {} of them not",
        report.graphs,
        report.tried,
        report.by_solver,
        report.topologies,
        report.proven,
        report.disproved
    );
    println!(
        "{} larger graphs, {} plans that break a constraint; 1,000 functions with 10,000 edges in {:.2} s",
        report.large, report.large_violations, report.thousand_functions_s
    );
    println!(
        "{} graphs under {} hours of noisy load: {} changes, {} of them reversed within an hour, {} flaps ({} without averages, waits and hysteresis); {} of {} edges gone cold un-fused",
        report.load.graphs,
        report.load.hours,
        report.load.changes,
        report.load.reversals,
        report.load.flaps,
        report.load.flaps_without,
        report.load.cold_unfused,
        report.load.cold
    );
    let violations =
        report.planner.violations + report.heuristic.violations + report.large_violations;
    let reached = |shares: &Shares| shares.mean >= MEAN && shares.min >= LEAST;
    let well = reached(&report.planner)
        && reached(&report.heuristic)
        && violations == 0
        && report.disproved == 0
        && report.load.flaps == 0
        && report.load.cold == report.load.cold_unfused;
    if arguments.json {
        println!(
            "{}",
            json!({
                "graphs": report.graphs,
                "optimum_share_mean": report.planner.mean.min(report.heuristic.mean),
                "optimum_share_min": report.planner.min.min(report.heuristic.min),
                "violations": violations,
                "flaps": report.load.flaps,
                "report": report,
            })
        );
    }
    Ok(match well {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
