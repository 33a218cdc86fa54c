//! Several steps as one.

use std::collections::BTreeMap;

use crate::api::{HistoryEdge, HistoryNode, HistoryStep, Latency};

/// One step for all of these, oldest first. It ends when the last of them did
/// and is as long as all together. Counts and samples are sums and the means
/// those of all samples; for quantiles see [`latency`].
pub(super) fn merge(steps: Vec<HistoryStep>) -> HistoryStep {
    let mut merged = HistoryStep::default();
    let mut nodes: BTreeMap<_, HistoryNode> = BTreeMap::new();
    let mut edges: BTreeMap<_, HistoryEdge> = BTreeMap::new();
    for step in steps {
        merged.at_ms = step.at_ms;
        merged.seconds += step.seconds;
        for node in step.nodes {
            let key = (node.engine, node.function.clone());
            nodes
                .entry(key)
                .and_modify(|sum| {
                    sum.calls = sum.calls.saturating_add(node.calls);
                    sum.errors = sum.errors.saturating_add(node.errors);
                    sum.own = latency(sum.own, node.own);
                })
                .or_insert(node);
        }
        for edge in step.edges {
            let key = (edge.engine, edge.caller.clone(), edge.callee.clone());
            edges
                .entry(key)
                .and_modify(|sum| {
                    sum.rpc_calls = sum.rpc_calls.saturating_add(edge.rpc_calls);
                    sum.fused_calls = sum.fused_calls.saturating_add(edge.fused_calls);
                    sum.errors = sum.errors.saturating_add(edge.errors);
                    sum.rpc = latency(sum.rpc, edge.rpc);
                    sum.fused = latency(sum.fused, edge.fused);
                })
                .or_insert(edge);
        }
    }
    merged.nodes = nodes.into_values().collect();
    merged.edges = edges.into_values().collect();
    merged
}

/// The durations of two steps together. Steps have no histograms any more: a
/// quantile of both is taken to be the mean of their quantiles, weighted by
/// samples. That lies between the two, as the true one does, and is right where
/// they are alike.
fn latency(a: Option<Latency>, b: Option<Latency>) -> Option<Latency> {
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) if a.samples > 0 && b.samples > 0 => (a, b),
        (Some(a), b) if a.samples > 0 || b.is_none() => return Some(a),
        (_, b) => return b,
    };
    let (of_a, of_b) = (a.samples as f64, b.samples as f64);
    let weighted = |a: f64, b: f64| (a * of_a + b * of_b) / (of_a + of_b);
    Some(Latency {
        samples: a.samples.saturating_add(b.samples),
        mean_ns: weighted(a.mean_ns, b.mean_ns),
        p50_ns: weighted(a.p50_ns, b.p50_ns),
        p90_ns: weighted(a.p90_ns, b.p90_ns),
        p99_ns: weighted(a.p99_ns, b.p99_ns),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn took(samples: u64, ns: f64) -> Option<Latency> {
        Some(Latency {
            samples,
            mean_ns: ns,
            p50_ns: ns + 1.0,
            p90_ns: ns + 2.0,
            p99_ns: ns + 3.0,
        })
    }

    #[test]
    fn counts_add_up_and_durations_are_weighted() {
        let edge = |callee: &str, calls, rpc| HistoryEdge {
            caller: "Foo".into(),
            callee: callee.into(),
            engine: Some(1),
            rpc_calls: calls,
            fused_calls: 1,
            errors: 2,
            rpc,
            fused: None,
        };
        let node = |engine, calls, own| HistoryNode {
            function: "Bar".into(),
            engine,
            calls,
            errors: 1,
            own,
        };
        let step = |at_ms, nodes, edges| HistoryStep {
            at_ms,
            seconds: 10.0,
            nodes,
            edges,
        };
        let merged = merge(vec![
            step(
                10,
                vec![node(Some(2), 1, None)],
                vec![edge("Bar", 5, took(1, 100.0))],
            ),
            step(
                20,
                vec![node(None, 1, None), node(Some(2), 2, took(4, 8.0))],
                vec![edge("Bar", 7, took(3, 500.0)), edge("Ann", 1, None)],
            ),
            step(35, Vec::new(), Vec::new()),
        ]);
        assert_eq!((merged.at_ms, merged.seconds), (35, 30.0));
        let nodes: Vec<_> = merged
            .nodes
            .iter()
            .map(|n| (n.engine, n.calls, n.errors))
            .collect();
        assert_eq!(nodes, [(None, 1, 1), (Some(2), 3, 2)]);
        assert_eq!(merged.nodes[1].own, took(4, 8.0));
        let edges: Vec<_> = merged
            .edges
            .iter()
            .map(|e| (&*e.callee, e.rpc_calls, e.fused_calls, e.errors))
            .collect();
        assert_eq!(edges, [("Ann", 1, 1, 2), ("Bar", 12, 2, 4)]);
        assert_eq!(merged.edges[1].rpc, took(4, 400.0));
        assert_eq!(merged.edges[1].fused, None);
    }

    #[test]
    fn what_has_no_samples_weighs_nothing() {
        assert_eq!(latency(took(0, 7.0), took(2, 9.0)), took(2, 9.0));
        assert_eq!(latency(took(2, 9.0), took(0, 7.0)), took(2, 9.0));
        assert_eq!(latency(None, None), None);
        assert_eq!(latency(took(0, 7.0), None), took(0, 7.0));
    }
}
