//! The observer on a node of the tests'.

use super::*;
use crate::discover::scan;
use crate::grafter::Reading;
use crate::testing::{FakeGrafter, FakeProc, FakeWorker, IDLE, graft, living};
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
fn a_worker_that_ends_while_its_counters_are_opened_anew_is_counted_to_its_end() {
    let proc = FakeProc::example();
    let grafter = FakeGrafter::new([(11, living(&[])), (12, living(&[])), (21, living(&[]))]);
    let with =
        |act: &dyn Fn(&mut FakeWorker)| act(grafter.workers.lock().unwrap().get_mut(&11).unwrap());
    with(&|worker| worker.reading = counted(5));
    let observer = Observer::default();
    let node = scan(&proc.root()).unwrap();
    assert_eq!(calls_of(&observer, &grafter, &node), 5);
    // It ends behind the scan, right after somebody changed workers.
    with(&|worker| worker.gone = true);
    observer.nudge();
    assert_eq!(calls_of(&observer, &grafter, &node), 5);
    assert_eq!(observer.inner().open.len(), 1, "it can be read once more");
    let mut without = node.clone();
    for function in &mut without.functions {
        function.workers.retain(|worker| worker.pid != 11);
    }
    assert_eq!(calls_of(&observer, &grafter, &without), 5);
    assert!(observer.inner().open.is_empty() && observer.inner().metered.is_empty());
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

/// An agent of the tests', with an observer and a driver.
struct Stage {
    grafter: Arc<FakeGrafter>,
    observer: Arc<Observer>,
    driver: crate::driver::DriverHandle,
    _proc: FakeProc,
}

impl Stage {
    fn new(foo: impl Fn() -> FakeWorker) -> Self {
        let proc = FakeProc::example();
        let workers = [(11, foo()), (12, foo()), (21, living(&[]))];
        let grafter = Arc::new(FakeGrafter::new(workers));
        let observer: Arc<Observer> = Arc::default();
        let (driver, _thread) = crate::driver::start(
            grafter.clone(),
            proc.root(),
            Arc::default(),
            Arc::default(),
            observer.clone(),
            None,
        )
        .unwrap();
        let (root, weak) = (proc.root(), driver.weak());
        observer.start(grafter.clone(), root, weak).unwrap();
        Self {
            grafter,
            observer,
            driver,
            _proc: proc,
        }
    }

    fn observe(&self, function: &str) -> api::ObserveReport {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let request = api::ObserveRequest {
            on: true,
            functions: vec![function.to_owned()],
            engine: None,
        };
        runtime.block_on(self.driver.observe(request)).unwrap()
    }
}

#[test]
fn after_a_worker_that_ended_of_it_no_other_is_observed() {
    let stage = Stage::new(|| FakeWorker {
        dies_after_moments: true,
        moments: [IDLE].into(),
        grafts: vec![graft("Bar", IDLE)],
        ..living(&[])
    });
    let report = stage.observe("Foo");
    assert_eq!(report.workers.len(), 2, "{report:?}");
    std::thread::sleep(2 * TICK);
    stage.observer.stop();
    assert_eq!(stage.grafter.log(), ["observe 11"]);
    let notes = stage.observer.due().notes(&stage.observer.wanted);
    assert!(notes[0].contains("worker 11"), "{notes:?}");
}

#[test]
fn counters_that_nobody_counts_in_any_more_are_opened_anew() {
    let not_yet = || Reading {
        observing: false,
        ..counted(1)
    };
    let stage = Stage::new(|| FakeWorker {
        reading: not_yet(),
        ..living(&[])
    });
    // They are open by now, and the fake's stay as they are.
    std::thread::sleep(TICK / 2);
    stage.observe("Foo");
    std::thread::sleep(3 * TICK);
    stage.observer.stop();
    // Nobody was asked again.
    assert_eq!(stage.grafter.log(), ["observe 11", "observe 12"]);
}

#[test]
fn a_worker_that_cannot_be_read_holds_up_neither_the_driver_nor_the_end() {
    let stage = Stage::new(|| living(&[]));
    // Whoever reads a worker waits here.
    let hangs = stage.grafter.workers.lock().unwrap();
    stage.observer.nudge();
    std::thread::sleep(Duration::from_millis(200));
    let since = Instant::now();
    stage.observer.nudge();
    stage.observer.stop();
    assert!(since.elapsed() < Duration::from_secs(5));
    drop(hangs);
}
