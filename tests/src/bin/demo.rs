//! The main job, shown: a node serves traffic, Foo's RPC to Bar is fused and
//! reverted under it, and nobody notices but by the latency.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::load::{Load, LoadReport, LoadSpec};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, RuntimeKind};
use serde_json::{Value, json};

/// Starts a node with two workers each of Foo and Bar, drives load, fuses
/// Foo → Bar live, reverts it live, and compares.
#[derive(Parser)]
#[command(name = "cargo xtask demo", bin_name = "cargo xtask demo", version)]
struct Arguments {
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// What functions run in: containers that need nothing installed, or
    /// Docker's (a dockerd is started if none runs).
    #[arg(long, value_enum, default_value = "embedded")]
    runtime: RuntimeKind,
    /// Seconds of load in each of the three phases.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
}

/// Connections that the load driver holds.
const CONNECTIONS: usize = 4;
/// Patch/revert cycles under load, for medians of the stops.
const CYCLES: usize = 10;
/// Requests from which a quiet per-call latency is taken.
const PROBES: usize = 41;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let say = |text: &str| {
        // Progress goes to stderr: stdout is the result.
        let _ = writeln!(std::io::stderr(), "{text}");
    };
    say("compiling Foo and Bar (gcc -O2) and starting a node with 2 workers each …");
    let caller = fixtures::compile("foo.c", Compiler::Gcc, &["-O2"])?;
    let callee = fixtures::compile("bar.c", Compiler::Gcc, &["-O2"])?;
    let functions = [
        FunctionSpec::new("Foo", 1, caller).workers(2, 2),
        FunctionSpec::new("Bar", 2, callee).workers(2, 2),
    ];
    let node = Node::start(NodeSpec::new(functions).runtime(arguments.runtime))?;
    let agent = Agent::start()?;

    let rpc_ns = per_call(&node, 200)?;
    say("load, Foo → Bar by RPC …");
    let mut load = Load::start(&LoadSpec::foo(node.http_port(), CONNECTIONS))?;
    let before = phase(&mut load, &node, arguments.seconds)?;
    say("agentctl patch Foo Bar, under load …");
    let first = agent.patch(&node, "Foo", "Bar")?;
    let fused = phase(&mut load, &node, arguments.seconds)?;
    say("agentctl revert Foo Bar, under load …");
    agent.revert(&node, "Foo", "Bar")?;
    let reverted = phase(&mut load, &node, arguments.seconds)?;
    say("ten more cycles of patch and revert, under load …");
    let mut commits = stops(&first, |receipt| receipt["commit_stop_ns"].as_u64());
    for _ in 0..CYCLES {
        commits.extend(stops(&agent.patch(&node, "Foo", "Bar")?, |r| {
            r["commit_stop_ns"].as_u64()
        }));
        agent.revert(&node, "Foo", "Bar")?;
    }
    let cycles = load.stop();
    let totals = stops(&first, |r| {
        r["stops_ns"]
            .as_array()
            .map(|all| all.iter().filter_map(Value::as_u64).sum())
    });

    say("per-call latency, quiet …");
    agent.patch(&node, "Foo", "Bar")?;
    let fused_ns = per_call(&node, 20_000)?;
    agent.revert(&node, "Foo", "Bar")?;
    let reverted_ns = per_call(&node, 200)?;

    let phases = [&before, &fused, &reverted, &cycles];
    let failed: u64 = phases.iter().map(|p| p.failed).sum();
    let wrong: u64 = phases.iter().map(|p| p.wrong).sum();
    let requests: u64 = phases.iter().map(|p| p.requests()).sum();
    let patched = commits.len() / (CYCLES + 1);
    print(&before, &fused, &reverted, [rpc_ns, fused_ns, reverted_ns]);
    println!(
        "requests {requests}, failed {failed}, wrong {wrong}; {} patches and {} reverts under load in {patched} workers",
        CYCLES + 1,
        CYCLES + 1
    );
    println!(
        "commit stop {:.0} µs median of {}; all stops of a first patch {:.0} µs median",
        micro(median(&commits)),
        commits.len(),
        micro(median(&totals))
    );
    for complaint in phases.iter().flat_map(|p| &p.complaints) {
        say(complaint);
    }
    if arguments.json {
        let line = json!({
            "runtime": arguments.runtime,
            "workers_patched": patched,
            "requests": requests,
            "failed": failed,
            "wrong": wrong,
            "rpc_p50_us": round(rpc_ns / 1e3),
            "fused_p50_ns": round(fused_ns),
            "reverted_p50_us": round(reverted_ns / 1e3),
            "rpc_rps": before.rate().round(),
            "fused_rps": fused.rate().round(),
            "reverted_rps": reverted.rate().round(),
            "commit_stop_p50_us": round(micro(median(&commits))),
            "total_stop_p50_us": round(micro(median(&totals))),
        });
        println!("{line}");
    }
    node.stop()?;
    ensure!(
        failed == 0 && wrong == 0,
        "{failed} requests failed and {wrong} answers were wrong"
    );
    ensure!(patched == 2, "{patched} workers were patched instead of 2");
    Ok(())
}

/// Lets the load run, and gives what it met; the next phase counts anew.
fn phase(load: &mut Load, node: &Node, seconds: u64) -> Result<LoadReport> {
    std::thread::sleep(Duration::from_secs(seconds));
    let next = Load::start(&LoadSpec::foo(node.http_port(), CONNECTIONS))?;
    Ok(std::mem::replace(load, next).stop())
}

/// Median nanoseconds of one call as Foo sees it: the mean of `times` calls in
/// a row with 16 bytes of input, measured several times on an idle node.
fn per_call(node: &Node, times: u32) -> Result<f64> {
    let input = format!("time {times} 0123456789abcdef");
    let mut client = node.client()?;
    let mut all = Vec::new();
    for _ in 0..PROBES {
        let answer = client.call("Foo", input.as_bytes())?;
        let text = String::from_utf8_lossy(&answer);
        let nanoseconds = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
        all.push(nanoseconds.with_context(|| format!("no time in {text:?}"))?);
    }
    // The first calls of a worker warm it up; both workers take part.
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

fn stops(answer: &Value, what: impl Fn(&Value) -> Option<u64>) -> Vec<u64> {
    let workers = answer["workers"].as_array().cloned().unwrap_or_default();
    workers
        .iter()
        .filter_map(|worker| what(&worker["receipt"]))
        .collect()
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

fn micro(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn print(before: &LoadReport, fused: &LoadReport, reverted: &LoadReport, per_call: [f64; 3]) {
    println!(
        "{:<34}{:>14}{:>14}{:>14}",
        "Foo → Bar", "before (RPC)", "fused", "reverted"
    );
    let row = |name: &str, cells: [String; 3]| {
        println!("{name:<34}{:>14}{:>14}{:>14}", cells[0], cells[1], cells[2]);
    };
    let phases = [before, fused, reverted];
    row("requests", phases.map(|p| p.requests().to_string()));
    row("failed", phases.map(|p| p.failed.to_string()));
    row("wrong answers", phases.map(|p| p.wrong.to_string()));
    row(
        "requests per second",
        phases.map(|p| format!("{:.0}", p.rate())),
    );
    row(
        "request p50",
        phases.map(|p| format!("{:.0} µs", p.quantile(0.5).as_secs_f64() * 1e6)),
    );
    row(
        "request p99",
        phases.map(|p| format!("{:.0} µs", p.quantile(0.99).as_secs_f64() * 1e6)),
    );
    row(
        "one call as Foo sees it, quiet",
        per_call.map(|ns| {
            if ns < 1e3 {
                format!("{ns:.1} ns")
            } else {
                format!("{:.1} µs", ns / 1e3)
            }
        }),
    );
}
