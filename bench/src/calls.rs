//! One call as Foo sees it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nightgraft_testbed::client::HttpClient;
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use serde::Serialize;

use crate::statistics::Spread;

const LEAN: &str = include_str!("lean.h");
const BAR: &str = include_str!("bar.c");
const FOO: &str = include_str!("foo.c");
const TOGETHER: &str = include_str!("together.c");

/// One payload's figures.
#[derive(Debug, Serialize)]
pub(crate) struct Calls {
    /// Payload in bytes, in and out.
    payload: usize,
    /// Nanoseconds by RPC.
    rpc_ns: Spread,
    /// Nanoseconds fused.
    fused_ns: Spread,
    /// Nanoseconds compiled into one library.
    compiled_in_ns: Spread,
    /// Fused by compiled in.
    fused_to_compiled_in: Spread,
    /// RPC by fused.
    rpc_to_fused: Spread,
}

/// The leanest functions; the flags are those that functions are built with.
pub(crate) fn library(name: &str) -> Result<PathBuf> {
    let text = match name {
        "foo" => format!(
            "#define LEAN_FOO\n#define LEAN_INVOKE(c, ...) (c)->invoke((c)->caller_context, __VA_ARGS__)\n{LEAN}\n{FOO}"
        ),
        "together" => format!(
            "#include \"worker_v1.h\"\nstatic int together(const struct context *, const char *, const char *, size_t, const char **, size_t *);\n#define LEAN_FOO\n#define LEAN_INVOKE together\n{LEAN}\n{TOGETHER}"
        ),
        _ => format!("{LEAN}\n{BAR}"),
    };
    fixtures::compile_text(&format!("lean{name}"), &text, Compiler::Gcc, &["-O2"])
}

/// Measures all payloads.
pub(crate) fn measure(rounds: usize) -> Result<Vec<Calls>> {
    let mut spec = NodeSpec::new([
        FunctionSpec::new("Plain", 1, library("foo")?),
        FunctionSpec::new("Fused", 2, library("foo")?),
        FunctionSpec::new("Together", 3, library("together")?),
        FunctionSpec::new("Bar", 4, library("bar")?),
    ]);
    // Everything on one processor: across two, how fast an RPC is depends on
    // where the scheduler happens to put engine and workers.
    spec.cpus = vec![0];
    let node = Node::start(spec)?;
    let agent = Agent::start()?;
    agent.patch(&node, "Fused", "Bar")?;
    agent.warm_up(&node, "Fused", "Bar")?;
    let mut client = node.client()?;
    let mut all = Vec::new();
    for (payload, fused_times, rpc_times) in [(16, 20_000, 200), (1024, 10_000, 200), (16 << 10, 1_000, 100), (256 << 10, 100, 50)] {
        let (mut rpc, mut fused, mut together) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds + 2 {
            rpc.push(one(&mut client, "Plain", rpc_times, payload)?);
            fused.push(one(&mut client, "Fused", fused_times, payload)?);
            together.push(one(&mut client, "Together", fused_times, payload)?);
        }
        // The first two rounds warm up.
        for values in [&mut rpc, &mut fused, &mut together] {
            values.drain(..2);
        }
        let ratios = |a: &[f64], b: &[f64]| Spread::of(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>());
        all.push(Calls {
            payload,
            rpc_ns: Spread::of(&rpc),
            fused_ns: Spread::of(&fused),
            compiled_in_ns: Spread::of(&together),
            fused_to_compiled_in: ratios(&fused, &together),
            rpc_to_fused: ratios(&rpc, &fused),
        });
    }
    let status = agent.edge_status(&node, "Fused", "Bar")?;
    let calls = status["totals"]["fused_calls"].as_u64().unwrap_or(0);
    ensure!(calls > 20_000 * rounds as u64, "only {calls} calls ran fused: {status}");
    node.stop()?;
    Ok(all)
}

fn one(client: &mut HttpClient, function: &str, times: usize, payload: usize) -> Result<f64> {
    let mut input = format!("{times} ").into_bytes();
    input.resize(input.len() + payload, b'x');
    let answer = client.call(function, &input).with_context(|| function.to_owned())?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let (ns, len) = text.split_once(' ').with_context(|| format!("{function}: {text:?}"))?;
    ensure!(len.parse() == Ok(payload), "{function} got {len} bytes instead of {payload}");
    Ok(ns.parse()?)
}

/// A table for people.
pub(crate) fn print(all: &[Calls]) {
    println!("one call as Foo sees it: median (quartiles); ratios pair by pair; all on one processor");
    println!(
        "{:>9} {:>26} {:>24} {:>24} {:>22} {:>22}",
        "payload", "RPC ns", "fused ns", "compiled in ns", "fused / compiled in", "RPC / fused"
    );
    for c in all {
        println!(
            "{:>9} {:>26} {:>24} {:>24} {:>22} {:>22}",
            c.payload,
            c.rpc_ns.to_string(),
            c.fused_ns.to_string(),
            c.compiled_in_ns.to_string(),
            c.fused_to_compiled_in.to_string(),
            c.rpc_to_fused.to_string()
        );
    }
}
