//! The observer on a node of the tests'.

use super::*;
use crate::discover::scan;
use crate::grafter::Reading;
use crate::testing::{FakeGrafter, FakeProc, living};
use nightgraft_patcher::observed::{RpcSeries, Series};

fn counted(calls: u64) -> Reading {
    let series = |calls| Series {
        entered: calls,
        returned: calls,
        ..Series::default()
    };
    Reading {
        observing: true,
        own: Some(series(calls)),
        rpcs: vec![RpcSeries {
            caller: String::new(),
            callee: "Bar".to_owned(),
            site: "libfoo.so+0x1234".to_owned(),
            calls: series(calls),
        }],
        ..Reading::default()
    }
}

fn calls_of(observer: &Observer, grafter: &FakeGrafter, node: &Node) -> u64 {
    calls(&observer.graph(grafter, node))
}

fn calls(graph: &api::Graph) -> u64 {
    graph.edges.iter().map(|edge| edge.rpc_calls).sum()
}

#[test]
fn the_graph_is_that_of_the_moment_and_outlives_workers() {
    let proc = FakeProc::example();
    let grafter = FakeGrafter::new([(11, living(&[])), (12, living(&[])), (21, living(&[]))]);
    let observer = Observer::default();
    let node = scan(&proc.root()).unwrap();
    assert!(observer.graph(&grafter, &node).edges.is_empty());
    grafter
        .workers
        .lock()
        .unwrap()
        .get_mut(&11)
        .unwrap()
        .reading = counted(5);
    // It was found to have nothing; whoever changed that says so.
    assert!(observer.graph(&grafter, &node).edges.is_empty());
    observer.nudge();
    assert_eq!(calls(&observer.graph(&grafter, &node)), 5);
    // The worker ends: what it counted stays.
    let mut without = node.clone();
    for function in &mut without.functions {
        function.workers.retain(|worker| worker.pid != 11);
    }
    assert_eq!(calls(&observer.graph(&grafter, &without)), 5);
    assert_eq!(calls(&observer.graph(&grafter, &without)), 5);
}

#[test]
fn what_is_counted_comes_into_the_history() {
    let proc = FakeProc::example();
    let grafter = FakeGrafter::new([(11, living(&[])), (12, living(&[])), (21, living(&[]))]);
    let dir = tempfile::tempdir().unwrap();
    let observer = Observer::open(Some(dir.path()));
    let node = scan(&proc.root()).unwrap();
    // What was counted before anybody looked may be hours old.
    let set = |calls| {
        let mut workers = grafter.workers.lock().unwrap();
        workers.get_mut(&11).unwrap().reading = counted(calls);
        drop(workers);
        // Counters are opened once: the fake's are those of that moment.
        observer.inner().open.clear();
        observer.nudge();
        assert_eq!(calls_of(&observer, &grafter, &node), calls);
        std::thread::sleep(Duration::from_millis(150));
    };
    set(2);
    set(9);
    set(9);
    observer.stop();
    drop(observer);
    let observer = Observer::open(Some(dir.path()));
    let history = observer.history(0, 100);
    let sum: u64 = history
        .steps
        .iter()
        .flat_map(|s| &s.edges)
        .map(|e| e.rpc_calls)
        .sum();
    assert_eq!(sum, 7, "{history:?}");
}
