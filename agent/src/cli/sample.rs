//! Graphs for tests, made by hand.

use crate::api::{
    EdgeState, Graph, GraphEdge, GraphNode, GraphSite, History, HistoryEdge, HistoryNode,
    HistoryStep, Latency, WorkerKind,
};

/// A name that wants out of everything that it is written into.
pub(super) const HOSTILE: &str = "</script><script>alert(1)</script><!--\u{2028}\"'\\\u{1b}[2J";

fn latency(mean_us: f64) -> Latency {
    Latency {
        samples: 100,
        mean_ns: mean_us * 1e3,
        p50_ns: mean_us * 0.9e3,
        p90_ns: mean_us * 1.5e3,
        p99_ns: mean_us * 3e3,
    }
}

fn node(function: &str, calls: u64) -> GraphNode {
    GraphNode {
        function: function.to_owned(),
        engine: Some(5),
        kind: Some(WorkerKind::Native),
        workers: 2,
        observed: 2,
        calls,
        errors: 1,
        calls_per_s: 12.5,
        arrivals_per_s: Some(12.5),
        own: Some(latency(1_500.0)),
        unfusable: None,
    }
}

/// An edge by RPC.
pub(super) fn edge(caller: &str, callee: &str) -> GraphEdge {
    GraphEdge {
        caller: caller.to_owned(),
        callee: callee.to_owned(),
        engine: Some(5),
        state: EdgeState::Rpc,
        rpc_calls: 1_200,
        fused_calls: 0,
        errors: 2,
        bytes_in: 48_000,
        bytes_out: 3 << 20,
        calls_per_s: 120.4,
        errors_per_s: 0.2,
        in_flight: 3,
        concurrency: Some(0.42),
        rpc: Some(latency(150.0)),
        fused: None,
        sites: vec![GraphSite {
            at: "libfoo.so+0x1234".to_owned(),
            calls: 1_200,
        }],
    }
}

/// Foo calls Bar by RPC and Baz fused; Gopher can't be fused.
pub(super) fn graph() -> Graph {
    let gopher = GraphNode {
        kind: Some(WorkerKind::NotNative {
            language: "Go".to_owned(),
        }),
        workers: 1,
        observed: 0,
        calls_per_s: 0.0,
        errors: 0,
        arrivals_per_s: None,
        own: None,
        ..node("Gopher", 0)
    };
    let fused = GraphEdge {
        state: EdgeState::Fused,
        rpc_calls: 10,
        fused_calls: 9_000,
        errors: 0,
        calls_per_s: 1_000.0,
        errors_per_s: 0.0,
        in_flight: 0,
        concurrency: None,
        rpc: None,
        fused: Some(latency(0.08)),
        sites: vec![],
        ..edge("Foo", "Baz")
    };
    Graph {
        at_ms: 1_700_000_010_000,
        window_s: 10.0,
        nodes: vec![
            node("Bar", 1_200),
            node("Baz", 10),
            node("Foo", 4_000),
            gopher,
        ],
        edges: vec![edge("Foo", "Bar"), fused],
        notes: vec!["Gopher's calls are not seen".to_owned()],
    }
}

/// Two seconds of Foo's calls of Bar: by RPC, then fused.
pub(super) fn history() -> History {
    let step = |at_ms, rpc_calls, fused_calls| HistoryStep {
        at_ms,
        seconds: 1.0,
        nodes: vec![HistoryNode {
            function: "Foo".to_owned(),
            engine: Some(5),
            calls: 12,
            errors: 0,
            own: Some(latency(1_500.0)),
        }],
        edges: vec![HistoryEdge {
            caller: "Foo".to_owned(),
            callee: "Bar".to_owned(),
            engine: Some(5),
            rpc_calls,
            fused_calls,
            errors: 0,
            rpc: Some(latency(150.0)).filter(|_| rpc_calls > 0),
            fused: Some(latency(0.08)).filter(|_| fused_calls > 0),
        }],
    };
    History {
        steps: vec![
            step(1_700_000_008_000, 120, 0),
            step(1_700_000_009_000, 0, 130),
        ],
        notes: vec!["the history begins with the agent".to_owned()],
    }
}
