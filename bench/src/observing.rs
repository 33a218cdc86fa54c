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

pub(crate) fn measure(rounds: usize) -> Result<Observing> {
    let mut spec = NodeSpec::new([
        FunctionSpec::new("Plain", 1, library("foo", &[])?),
        FunctionSpec::new("Counted", 2, library("foo", &[])?),
        FunctionSpec::new("PlainNobody", 3, library("foo", NOBODY)?),
        FunctionSpec::new("CountedNobody", 4, library("foo", NOBODY)?),
        FunctionSpec::new("Bar", 5, library("bar", &[])?),
    ]);
    spec.cpus = vec![0];
    let node = Node::start(spec)?;
    let agent = Agent::start()?;
    let request = json!({
        "on": true, "functions": ["Counted", "CountedNobody"], "engine": node.engine_pid(),
    });
    let (code, answer) = agent.post("/v1/observe", &request)?;
    ensure!(code == 200, "{answer}");
    let mut client = node.client()?;
    let (rpcs, calls) = (400, 50_000);
    let (mut plain, mut counted, mut cost, mut share) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds + 2 {
        let rpc = one(&mut client, "Plain", rpcs, PAYLOAD, PAYLOAD)?;
        counted.push(one(&mut client, "Counted", rpcs, PAYLOAD, PAYLOAD)?);
        let without = one(&mut client, "PlainNobody", calls, PAYLOAD, 0)?;
        let with = one(&mut client, "CountedNobody", calls, PAYLOAD, 0)?;
        plain.push(rpc);
        cost.push(with - without);
        share.push((with - without) / rpc);
    }
    // The first two rounds warm up.
    for values in [&mut plain, &mut counted, &mut cost, &mut share] {
        values.drain(..2);
    }
    let graph = agent.get("/v1/graph")?;
    let edges = graph["edges"].as_array().map_or(&[][..], Vec::as_slice);
    let nobody = edges
        .iter()
        .find(|e| e["caller"] == "CountedNobody" && e["engine"] == node.engine_pid());
    let seen = nobody.and_then(|e| e["rpc_calls"].as_u64()).unwrap_or(0);
    ensure!(
        seen == (calls * (rounds + 2)) as u64,
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
