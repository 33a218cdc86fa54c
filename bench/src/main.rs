//! What a fused call costs, beside the RPC that it replaces and beside the
//! same two functions compiled into one library; how long workers stand still
//! for it; what it costs them to be observed; and what the analysis of libraries
//! costs.
//!
//! What is compared is measured in turn, round by round, in workers on one
//! processor: a machine that slows down slows both. Medians of the rounds are
//! given with the quartiles, ratios pair by pair.

mod analysis;
mod calls;
mod observing;
mod statistics;
mod stops;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// Measures calls and stops side by side.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", version)]
struct Arguments {
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// Fewer rounds: a minute instead of several.
    #[arg(long)]
    quick: bool,
    /// Only analyse this file, once, in this process.
    #[arg(long, value_name = "FILE", hide = true)]
    analyse: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(file) = &arguments.analyse {
        println!("{}", serde_json::to_string(&analysis::sample(file)?)?);
        return Ok(());
    }
    let rounds = if arguments.quick { 15 } else { 61 };
    let calls = calls::measure(rounds)?;
    calls::print(&calls);
    let stops = stops::measure(if arguments.quick { 8 } else { 30 })?;
    stops::print(&stops);
    let observing = observing::measure(rounds)?;
    observing::print(&observing);
    let analysis = analysis::measure(if arguments.quick { 3 } else { 11 })?;
    analysis::print(&analysis);
    if arguments.json {
        let all = serde_json::json!({ "calls": calls, "stops": stops, "observing": observing,
            "analysis": analysis });
        println!("{all}");
    }
    Ok(())
}
