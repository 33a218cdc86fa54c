//! Readings by hand and by chance, against sums made the plain way.

mod chance;
mod edges;
mod windows;

use nightgraft_patcher::observed::{FusedSeries, Histogram, Reading, RpcSeries, Series};

use super::*;
use crate::api::{EdgeState, Graph, GraphEdge, GraphNode, WorkerKind};
use crate::discover::{Function, Node, Worker};
use crate::testing::{native_worker, other_worker};

/// Cycles of a nanosecond.
pub(super) const PER_NS: f64 = 2.0;

/// A simple generator: the same numbers each time.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Adds a duration, as the worker does it.
pub(super) fn measure(series: &mut Series, cycles: u64) {
    let latency = &mut series.latency;
    let within = |&at: &usize| (Histogram::bounds(at).0..Histogram::bounds(at).1).contains(&cycles);
    let last = latency.buckets.len() - 1;
    let bucket = (0..last).find(within).unwrap_or(last);
    latency.samples += 1;
    latency.cycles += cycles;
    latency.buckets[bucket] = (latency.buckets[bucket] + 1) & u64::from(u32::MAX);
}

/// So many calls, all of them back, each measured with so many cycles.
fn calls(number: u64, cycles: u64) -> Series {
    let mut series = Series {
        entered: number,
        returned: number,
        bytes_in: 10 * number,
        bytes_out: 20 * number,
        ..Series::default()
    };
    for _ in 0..number {
        measure(&mut series, cycles);
    }
    series
}

fn rpc(caller: &str, callee: &str, calls: Series) -> RpcSeries {
    RpcSeries {
        caller: caller.to_owned(),
        callee: callee.to_owned(),
        site: "libfoo.so+0x10".to_owned(),
        calls,
    }
}

fn fused(callee: &str, fused: bool, calls: Series) -> FusedSeries {
    FusedSeries {
        callee: callee.to_owned(),
        fused,
        calls,
    }
}

fn reading(rpcs: Vec<RpcSeries>, fused: Vec<FusedSeries>) -> Reading {
    Reading {
        observing: true,
        own: Some(Series::default()),
        rpcs,
        unattributed: 0,
        fused,
    }
}

fn key(function: &str, pid: i32) -> WorkerKey {
    WorkerKey {
        engine: Some(100),
        function: function.to_owned(),
        pid,
        start_time: native_worker(pid).start_time,
    }
}

fn function(name: &str, workers: Vec<Worker>) -> Function {
    Function {
        name: Some(name.to_owned()),
        id: 1,
        engine: Some(100),
        min_workers: None,
        max_workers: None,
        workers,
    }
}

/// Two workers of Foo, one of Bar and of Baz, one of Gopher, none of Idle.
fn node() -> Node {
    Node {
        functions: vec![
            function("Foo", vec![native_worker(11), native_worker(12)]),
            function("Bar", vec![native_worker(21)]),
            function("Baz", vec![native_worker(31)]),
            function("Gopher", vec![other_worker(41, "Go")]),
            function("Idle", Vec::new()),
        ],
        notes: Vec::new(),
    }
}

fn edge<'a>(graph: &'a Graph, caller: &str, callee: &str) -> &'a GraphEdge {
    let found = graph
        .edges
        .iter()
        .find(|e| e.caller == caller && e.callee == callee);
    found.unwrap_or_else(|| panic!("no {caller} -> {callee} in {graph:#?}"))
}

fn node_of<'a>(graph: &'a Graph, function: &str) -> &'a GraphNode {
    let found = graph.nodes.iter().find(|n| n.function == function);
    found.unwrap_or_else(|| panic!("no {function} in {graph:#?}"))
}

fn names(graph: &Graph) -> Vec<(&str, &str)> {
    let edges = graph.edges.iter();
    edges.map(|e| (&*e.caller, &*e.callee)).collect()
}

/// A meter whose first tick was at 0.
fn begun() -> Meter {
    let mut meter = Meter::new();
    meter.tick(0, PER_NS);
    meter
}
