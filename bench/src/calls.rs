//! One call as Foo sees it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

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
    /// What Bar does.
    bar: &'static str,
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
pub(crate) fn library(name: &str, flags: &[&str]) -> Result<PathBuf> {
    let text = match name {
        "foo" => format!(
            "#define LEAN_FOO\n#define LEAN_INVOKE(c, ...) (c)->invoke((c)->caller_context, __VA_ARGS__)\n{LEAN}\n{FOO}"
        ),
        "together" => format!(
            "#include \"worker_v1.h\"\nstatic int together(const struct context *, const char *, const char *, size_t, const char **, size_t *);\n#define LEAN_BAR\n#define LEAN_FOO\n#define LEAN_INVOKE together\n{LEAN}\n{TOGETHER}"
        ),
        _ => format!("#define LEAN_BAR\n{LEAN}\n{BAR}"),
    };
    let flags = [&["-O2"], flags].concat();
    fixtures::compile_text(&format!("lean{name}"), &text, Compiler::Gcc, &flags)
}

/// Measures the leanest Bar with all payloads, and nightcore's example with
/// the smallest.
pub(crate) fn measure(rounds: usize) -> Result<Vec<Calls>> {
    // All outputs of a request stay valid to its end: so many that they take
    // a megabyte or two, not more.
    let payloads = [
        (16, 20_000, 200),
        (1024, 1_000, 200),
        (16 << 10, 64, 64),
        (256 << 10, 8, 8),
    ];
    let mut all = with_bar("leanest", &[], &payloads, rounds)?;
    all.extend(with_bar("example", &["-DEXAMPLE"], &payloads[..1], rounds)?);
    Ok(all)
}

/// Payload in bytes, calls per request fused or compiled in, and by RPC.
type Payload = (usize, usize, usize);

fn with_bar(
    bar: &'static str,
    flags: &[&str],
    payloads: &[Payload],
    rounds: usize,
) -> Result<Vec<Calls>> {
    let mut spec = NodeSpec::new([
        FunctionSpec::new("Plain", 1, library("foo", &[])?),
        FunctionSpec::new("Fused", 2, library("foo", &[])?),
        FunctionSpec::new("Together", 3, library("together", flags)?),
        FunctionSpec::new("Bar", 4, library("bar", flags)?),
    ]);
    // Everything on one processor: across two, how fast an RPC is depends on
    // where the scheduler happens to put engine and workers.
    spec.cpus = vec![0];
    let node = Node::start(spec)?;
    let agent = Agent::start()?;
    agent.patch(&node, "Fused", "Bar")?;
    let mut client = node.client()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while agent.fused_calls(&node, "Fused", "Bar")? == 0 {
        one(&mut client, "Fused", 1, 16, 16)?;
        ensure!(
            Instant::now() < deadline,
            "Bar does not get ready: {}",
            agent.edge_status(&node, "Fused", "Bar")?
        );
    }
    let mut all = Vec::new();
    for &(payload, fused_times, rpc_times) in payloads {
        let (mut rpc, mut fused, mut together) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds + 2 {
            rpc.push(one(&mut client, "Plain", rpc_times, payload, payload)?);
            fused.push(one(&mut client, "Fused", fused_times, payload, payload)?);
            together.push(one(&mut client, "Together", fused_times, payload, payload)?);
        }
        // The first two rounds warm up.
        for values in [&mut rpc, &mut fused, &mut together] {
            values.drain(..2);
        }
        let ratios = |a: &[f64], b: &[f64]| {
            Spread::of(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>())
        };
        all.push(Calls {
            bar,
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
    ensure!(
        calls > 20_000 * rounds as u64,
        "only {calls} calls ran fused: {status}"
    );
    node.stop()?;
    Ok(all)
}

/// Nanoseconds of a call, of so many with such a payload, each of which gives at
/// least `answered` bytes.
pub(crate) fn one(
    client: &mut HttpClient,
    function: &str,
    times: usize,
    payload: usize,
    answered: usize,
) -> Result<f64> {
    let mut input = format!("{times} ").into_bytes();
    input.resize(input.len() + payload, b'x');
    let answer = client
        .call(function, &input)
        .with_context(|| function.to_owned())?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let (ns, len) = text
        .split_once(' ')
        .with_context(|| format!("{function}: {text:?}"))?;
    ensure!(
        len.parse().is_ok_and(|len: usize| len >= answered),
        "{function} got {len} bytes instead of {answered}"
    );
    Ok(ns.parse()?)
}

/// A table for people.
pub(crate) fn print(all: &[Calls]) {
    println!(
        "one call as Foo sees it: median (quartiles); ratios pair by pair; all on one processor"
    );
    println!(
        "{:>8} {:>7} {:>26} {:>24} {:>24} {:>20} {:>20}",
        "Bar",
        "bytes",
        "RPC ns",
        "fused ns",
        "compiled in ns",
        "fused / compiled in",
        "RPC / fused"
    );
    for c in all {
        println!(
            "{:>8} {:>7} {:>26} {:>24} {:>24} {:>20} {:>20}",
            c.bar,
            c.payload,
            c.rpc_ns.to_string(),
            c.fused_ns.to_string(),
            c.compiled_in_ns.to_string(),
            c.fused_to_compiled_in.to_string(),
            c.rpc_to_fused.to_string()
        );
    }
}
