//! How long a worker stands still: the tracer's clock, from the first
//! interrupt to the last detach.

use anyhow::{Context, Result};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use serde::Serialize;
use serde_json::Value;

use crate::statistics::Spread;

/// Microseconds of stops, on an idle node and at full load.
#[derive(Debug, Serialize)]
pub(crate) struct Stops {
    /// The commit, nothing running.
    commit_idle_us: Spread,
    /// All stops of a first patch, nothing running.
    total_idle_us: Spread,
    /// The commit, at full load.
    commit_load_us: Spread,
    /// All stops of a first patch, at full load.
    total_load_us: Spread,
    /// The revert, at full load.
    revert_load_us: Spread,
}

/// Patches a fresh worker `rounds` times, idle and under load.
pub(crate) fn measure(rounds: usize) -> Result<Stops> {
    let library = |source| fixtures::compile(source, Compiler::Gcc, &["-O2"]);
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")?),
        FunctionSpec::new("Bar", 2, library("bar.c")?),
    ]))?;
    let agent = Agent::start()?;
    let (mut commit_idle, mut total_idle) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        node.redeploy("Foo", None)?;
        let (commit, total) = patched(&agent.patch(&node, "Foo", "Bar")?)?;
        commit_idle.push(commit);
        total_idle.push(total);
    }
    let (mut commit_load, mut total_load, mut revert_load) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        node.redeploy("Foo", None)?;
        let load = Load::start(&LoadSpec::foo(node.http_port(), 4))?;
        std::thread::sleep(std::time::Duration::from_millis(200));
        let (commit, total) = patched(&agent.patch(&node, "Foo", "Bar")?)?;
        commit_load.push(commit);
        total_load.push(total);
        let reverted = agent.revert(&node, "Foo", "Bar")?;
        revert_load.push(sum(&reverted["workers"][0]["receipt"]["stops_ns"]));
        load.stop().all_correct()?;
    }
    node.stop()?;
    Ok(Stops {
        commit_idle_us: Spread::of(&commit_idle),
        total_idle_us: Spread::of(&total_idle),
        commit_load_us: Spread::of(&commit_load),
        total_load_us: Spread::of(&total_load),
        revert_load_us: Spread::of(&revert_load),
    })
}

fn patched(answer: &Value) -> Result<(f64, f64)> {
    let receipt = &answer["workers"][0]["receipt"];
    let commit = receipt["commit_stop_ns"]
        .as_f64()
        .context("no commit stop")?;
    Ok((commit / 1e3, sum(&receipt["stops_ns"])))
}

fn sum(stops: &Value) -> f64 {
    stops
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64)
        .sum::<f64>()
        / 1e3
}

/// A table for people.
pub(crate) fn print(stops: &Stops) {
    println!("\nstops of one worker, µs: median (quartiles)");
    println!("{:<28}{:>28}{:>28}", "", "idle node", "full load");
    let row = |name: &str, idle: String, load: String| println!("{name:<28}{idle:>28}{load:>28}");
    row(
        "commit",
        stops.commit_idle_us.to_string(),
        stops.commit_load_us.to_string(),
    );
    row(
        "all stops of a first patch",
        stops.total_idle_us.to_string(),
        stops.total_load_us.to_string(),
    );
    row("revert", String::new(), stops.revert_load_us.to_string());
}
