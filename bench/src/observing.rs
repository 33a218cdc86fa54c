//! What it costs a worker that its calls are counted.
//!
//! An RPC varies by more than counting it costs. Calls of a name that nobody has
//! come back from the worker's own routine at once: their difference is what
//! counting costs, to the nanosecond; beside the RPCs of the same rounds it is a
//! share.

use anyhow::{Result, ensure};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use serde::Serialize;
use serde_json::json;

use crate::calls::{library, one};
use crate::statistics::Spread;

const NOBODY: &[&str] = &["-DLEAN_CALLEE=\"Nobody\"", "-DLEAN_MAY_FAIL"];
/// Bytes of the input.
const PAYLOAD: usize = 16;

/// Figures of observing.
#[derive(Debug, Serialize)]
pub(crate) struct Observing {
    /// Nanoseconds of an RPC.
    rpc_ns: Spread,
    /// The same while it is counted.
    observed_rpc_ns: Spread,
    /// Counted by not counted.
    observed_to_rpc: Spread,
    /// Nanoseconds that counting adds to a call.
    counting_ns: Spread,
    /// That by the RPC of the same round.
    counting_to_rpc: Spread,
}

/// The same two functions, observed and left alone in turn: another worker would
/// differ by more than what is measured.
pub(crate) fn measure(rounds: usize) -> Result<Observing> {
    let mut spec = NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo", &[])?),
        FunctionSpec::new("FooNobody", 2, library("foo", NOBODY)?),
        FunctionSpec::new("Bar", 3, library("bar", &[])?),
    ]);
    spec.cpus = vec![0];
    let node = Node::start(spec)?;
    let agent = Agent::start()?;
    let observe = |on: bool| -> Result<()> {
        let functions = ["Foo", "FooNobody"];
        let request = json!({"on": on, "functions": functions, "engine": node.engine_pid()});
        let (code, answer) = agent.post("/v1/observe", &request)?;
        ensure!(code == 200, "{answer}");
        Ok(())
    };
    let mut client = node.client()?;
    let (rpcs, calls) = (100, 50_000);
    let mut both = || -> Result<(f64, f64)> {
        // An RPC's time has two levels, by where the scheduler finds its threads: the
        // best of some is of the lower one.
        let mut rpc = f64::INFINITY;
        for _ in 0..8 {
            rpc = rpc.min(one(&mut client, "Foo", rpcs, PAYLOAD, PAYLOAD)?);
        }
        Ok((rpc, one(&mut client, "FooNobody", calls, PAYLOAD, 0)?))
    };
    let (mut plain, mut counted, mut cost, mut share) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds + 1 {
        let mut rpcs = [0.0; 2];
        let mut nobody = [0.0; 2];
        // The one first, then the other.
        for on in [round % 2 == 0, round % 2 != 0] {
            observe(on)?;
            (rpcs[usize::from(on)], nobody[usize::from(on)]) = both()?;
        }
        plain.push(rpcs[0]);
        counted.push(rpcs[1]);
        cost.push(nobody[1] - nobody[0]);
        share.push((nobody[1] - nobody[0]) / rpcs[0]);
    }
    // The first round warms up.
    for values in [&mut plain, &mut counted, &mut cost, &mut share] {
        values.drain(..1);
    }
    let graph = agent.get("/v1/graph")?;
    let edges = graph["edges"].as_array().map_or(&[][..], Vec::as_slice);
    let nobody = edges
        .iter()
        .find(|e| e["caller"] == "FooNobody" && e["engine"] == node.engine_pid());
    let seen = nobody.and_then(|e| e["rpc_calls"].as_u64()).unwrap_or(0);
    ensure!(
        seen == (calls * (rounds + 1)) as u64,
        "{seen} calls were counted"
    );
    node.stop()?;
    let ratios: Vec<f64> = counted.iter().zip(&plain).map(|(a, b)| a / b).collect();
    Ok(Observing {
        rpc_ns: Spread::of(&plain),
        observed_rpc_ns: Spread::of(&counted),
        observed_to_rpc: Spread::of(&ratios),
        counting_ns: Spread::of(&cost),
        counting_to_rpc: Spread::of(&share),
    })
}

/// Lines for people.
pub(crate) fn print(o: &Observing) {
    println!("\nobserving: median (quartiles); all on one processor, 16 bytes");
    println!(
        "  RPC {} ns; counted {} ns; ratio {}",
        o.rpc_ns, o.observed_rpc_ns, o.observed_to_rpc
    );
    let percent = |share: f64| 100.0 * share;
    println!(
        "  counting adds {} ns to a call: {:.2} % of an RPC ({:.2}–{:.2})",
        o.counting_ns,
        percent(o.counting_to_rpc.median),
        percent(o.counting_to_rpc.low),
        percent(o.counting_to_rpc.high)
    );
}
