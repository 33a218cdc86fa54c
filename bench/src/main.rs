//! What a fused call costs, beside the RPC that it replaces and beside the
//! same two functions compiled into one library; and how long workers stand
//! still for it.
//!
//! What is compared is measured in turn, round by round, in workers on one
//! processor: a machine that slows down slows both. Medians of the rounds are
//! given with the quartiles, ratios pair by pair.

mod calls;
mod statistics;
mod stops;

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
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let rounds = if arguments.quick { 15 } else { 61 };
    let calls = calls::measure(rounds)?;
    calls::print(&calls);
    let stops = stops::measure(if arguments.quick { 8 } else { 30 })?;
    stops::print(&stops);
    if arguments.json {
        println!("{}", serde_json::json!({ "calls": calls, "stops": stops }));
    }
    Ok(())
}
