//! Which edge is counted for, how it runs, and what is told of functions.

use super::*;

#[test]
fn the_code_that_calls_is_named_wherever_it_runs() {
    let mut meter = begun();
    let foo = reading(
        vec![
            rpc("", "Bar", calls(3, 100)),
            rpc("Bar/Baz", "Qux", calls(5, 100)),
            rpc("", "bar", calls(7, 100)),
        ],
        vec![
            fused("Bar", true, calls(11, 100)),
            fused("Bar/Baz", true, calls(13, 100)),
            fused("Never", false, Series::default()),
        ],
    );
    meter.read(key("Foo", 11), &foo);
    let graph = meter.graph(&node(), 5);
    assert_eq!(
        names(&graph),
        [
            ("Bar", "Baz"),
            ("Baz", "Qux"),
            ("Foo", "Bar"),
            ("Foo", "bar")
        ]
    );
    let bar = edge(&graph, "Foo", "Bar");
    assert_eq!((bar.rpc_calls, bar.fused_calls), (3, 11));
    assert_eq!((bar.bytes_in, bar.bytes_out), (140, 280));
    assert_eq!(edge(&graph, "Bar", "Baz").fused_calls, 13);
    // Names are told apart by case, and one that no engine knows has no kind.
    assert_eq!(node_of(&graph, "bar").kind, None);
    assert_eq!(node_of(&graph, "Bar").kind, Some(WorkerKind::Native));
    assert_eq!((graph.at_ms, graph.window_s), (5, 0.0));
}

#[test]
fn an_edge_is_fused_in_all_workers_or_in_some() {
    let mut meter = begun();
    let with = |gate| reading(Vec::new(), vec![fused("Bar", gate, calls(1, 9))]);
    let state = |meter: &Meter| edge(&meter.graph(&node(), 0), "Foo", "Bar").state;
    meter.read(key("Foo", 11), &with(true));
    assert_eq!(state(&meter), EdgeState::Mixed);
    meter.read(key("Foo", 12), &with(true));
    assert_eq!(state(&meter), EdgeState::Fused);
    meter.read(key("Foo", 11), &with(false));
    meter.read(key("Foo", 12), &with(false));
    assert_eq!(state(&meter), EdgeState::Rpc);
    meter.read(key("Foo", 12), &with(true));
    meter.gone(12, native_worker(12).start_time);
    assert_eq!(state(&meter), EdgeState::Rpc, "of those that live");
}

#[test]
fn an_edge_that_is_fused_and_not_called_yet_is_shown() {
    let mut meter = begun();
    let with = |gate| reading(Vec::new(), vec![fused("Bar", gate, Series::default())]);
    meter.read(key("Foo", 11), &with(true));
    assert_eq!(
        edge(&meter.graph(&node(), 0), "Foo", "Bar").state,
        EdgeState::Mixed
    );
    meter.read(key("Foo", 11), &with(false));
    assert!(meter.graph(&node(), 0).edges.is_empty());
}

#[test]
fn a_caller_that_only_runs_fused_is_judged_by_its_rpcs() {
    let mut meter = begun();
    let foo = |gate| {
        let below = vec![
            fused("Bar", gate, calls(9, 9)),
            fused("Bar/Baz", true, calls(9, 9)),
        ];
        reading(Vec::new(), below)
    };
    let state = |meter: &Meter| edge(&meter.graph(&node(), 0), "Bar", "Baz").state;
    meter.read(key("Foo", 11), &foo(true));
    meter.tick(1_000, PER_NS);
    assert_eq!(state(&meter), EdgeState::Fused);
    // Bar's own worker calls by RPC.
    let rpcs = reading(vec![rpc("", "Baz", calls(1, 9))], Vec::new());
    meter.read(key("Bar", 21), &rpcs);
    meter.tick(2_000, PER_NS);
    assert_eq!(state(&meter), EdgeState::Mixed);
    meter.tick(2_000 + WINDOW_MS, PER_NS);
    assert_eq!(state(&meter), EdgeState::Fused);
    // No call gets there while Bar's gate is shut.
    meter.read(key("Foo", 11), &foo(false));
    assert_eq!(state(&meter), EdgeState::Rpc);
}

#[test]
fn calls_under_way_are_those_of_the_present_readings() {
    let mut meter = begun();
    let under_way = |more: u64| Series {
        entered: 10 + more,
        returned: 10,
        ..Series::default()
    };
    let mut first = reading(
        vec![rpc("", "Bar", under_way(2))],
        vec![fused("Bar", true, under_way(1))],
    );
    // Torn: the return is there and the call is not.
    let torn = Series {
        entered: 3,
        returned: 4,
        ..Series::default()
    };
    meter.read(key("Foo", 11), &first);
    meter.read(
        key("Foo", 12),
        &reading(vec![rpc("", "Bar", torn)], Vec::new()),
    );
    let in_flight = |meter: &Meter| edge(&meter.graph(&node(), 0), "Foo", "Bar").in_flight;
    assert_eq!(in_flight(&meter), 3);
    // RPCs are counted no more: which of them came back is not known.
    first.observing = false;
    meter.read(key("Foo", 11), &first);
    assert_eq!(in_flight(&meter), 1);
    meter.gone(11, native_worker(11).start_time);
    assert_eq!(in_flight(&meter), 0);
}

#[test]
fn arrivals_are_own_calls_less_those_of_observed_functions() {
    let mut meter = begun();
    let own = |number| Reading {
        own: Some(calls(number, 4_000)),
        ..reading(Vec::new(), Vec::new())
    };
    meter.read(key("Bar", 21), &own(50));
    meter.read(
        key("Foo", 11),
        &reading(vec![rpc("", "Bar", calls(30, 9))], vec![]),
    );
    meter.tick(1_000, PER_NS);
    let graph = meter.graph(&node(), 0);
    let bar = node_of(&graph, "Bar");
    assert_eq!((bar.workers, bar.observed, bar.calls), (1, 1, 50));
    assert_eq!((bar.calls_per_s, bar.arrivals_per_s), (50.0, Some(20.0)));
    assert_eq!(bar.own.unwrap().mean_ns, 2_000.0);
    // One of two workers is observed: what went to the other is not known.
    assert_eq!(node_of(&graph, "Foo").arrivals_per_s, None);
    assert_eq!(node_of(&graph, "Baz").arrivals_per_s, None);
    // More RPCs than calls: some were counted there and not here yet.
    meter.read(
        key("Foo", 11),
        &reading(vec![rpc("", "Bar", calls(99, 9))], vec![]),
    );
    meter.tick(2_000, PER_NS);
    assert_eq!(
        node_of(&meter.graph(&node(), 0), "Bar").arrivals_per_s,
        Some(0.0)
    );
    // Its entry cannot be counted.
    let unknown = Reading {
        own: None,
        ..own(0)
    };
    meter.read(key("Bar", 21), &unknown);
    assert_eq!(
        node_of(&meter.graph(&node(), 0), "Bar").arrivals_per_s,
        None
    );
}

#[test]
fn functions_say_what_keeps_them_from_being_fused() {
    let graph = Meter::new().graph(&node(), 0);
    let all: Vec<&str> = graph.nodes.iter().map(|n| &*n.function).collect();
    assert_eq!(all, ["Bar", "Baz", "Foo", "Gopher", "Idle"]);
    let gopher = node_of(&graph, "Gopher");
    assert_eq!(
        gopher.unfusable.as_deref(),
        Some("its workers are in Go: only C and C++ functions in a func_worker_v1 can be fused")
    );
    assert!(matches!(gopher.kind, Some(WorkerKind::NotNative { .. })));
    let idle = node_of(&graph, "Idle");
    assert_eq!(
        (&idle.kind, &idle.unfusable, idle.workers),
        (&None, &None, 0)
    );
    assert_eq!(
        graph.notes,
        [
            "not all workers of Bar, Baz and Foo are observed: their calls are not counted, and \
             seem to come from outside where they arrive"
        ]
    );
    let many = Node {
        functions: (0..8)
            .map(|n| function(&format!("F{n}"), vec![native_worker(200 + n)]))
            .collect(),
        notes: Vec::new(),
    };
    let graph = Meter::new().graph(&many, 0);
    assert!(graph.notes[0].starts_with("not all workers of F0, F1, F2, F3, F4 and 3 more are"));
}

#[test]
fn what_is_lost_is_told() {
    let mut meter = begun();
    let mut lost = reading(Vec::new(), Vec::new());
    lost.unattributed = 4;
    meter.read(key("Foo", 11), &lost);
    lost.unattributed = 3;
    meter.read(key("Foo", 11), &lost);
    meter.read(key("Foo", 12), &lost);
    meter.gone(12, native_worker(12).start_time);
    let notes = meter.graph(&Node::default(), 0).notes;
    assert_eq!(
        notes,
        [
            "7 RPCs are on no edge: their workers had no room for them, or they had no name",
            "1 worker that was counted has ended: its calls are in the counts"
        ]
    );
}

#[test]
fn sites_are_told_apart_up_to_a_limit() {
    let mut meter = begun();
    let rpcs = (0..100u64).map(|n| RpcSeries {
        site: format!("libfoo.so+{n:#x}"),
        ..rpc("", "Bar", calls(n + 1, 9))
    });
    meter.read(key("Foo", 11), &reading(rpcs.collect(), Vec::new()));
    let graph = meter.graph(&node(), 0);
    let sites = &edge(&graph, "Foo", "Bar").sites;
    assert_eq!(sites.len(), MAX_SITES + 1);
    assert_eq!(sites[0].calls, MAX_SITES as u64, "most calls first");
    let rest: u64 = (MAX_SITES as u64 + 1..=100).sum();
    let last = sites.last().unwrap();
    assert_eq!((&*last.at, last.calls), (ELSEWHERE, rest));
    assert_eq!(sites.iter().map(|s| s.calls).sum::<u64>(), 5_050);
}

#[test]
fn memory_is_bounded_whatever_a_worker_makes_up() {
    let mut meter = begun();
    for round in 0..10 {
        let made_up = (0..600).map(|n| rpc("", &format!("{round}-{n}"), calls(1, 9)));
        let made_up = reading(made_up.collect(), Vec::new());
        for pid in 0..6 {
            let mut worker = key("Foo", 1_000 + pid);
            worker.engine = Some(pid);
            meter.read(worker, &made_up);
        }
    }
    let graph = meter.graph(&Node::default(), 0);
    assert_eq!(graph.edges.len(), MAX_EDGES);
    let told = |what: &str| graph.notes.iter().any(|note| note.contains(what));
    assert!(
        told("calls are not shown: there are more than 4096"),
        "{:?}",
        graph.notes
    );
    assert!(
        told("a worker has more than 1024 series"),
        "{:?}",
        graph.notes
    );
    // Those of workers that are gone make room.
    for pid in 0..6 {
        meter.gone(1_000 + pid, native_worker(1_000 + pid).start_time);
    }
    meter.read(
        key("Foo", 11),
        &reading(vec![rpc("", "Bar", calls(5, 9))], vec![]),
    );
    let graph = meter.graph(&node(), 0);
    assert_eq!(edge(&graph, "Foo", "Bar").rpc_calls, 5);
    assert!(meter.edges.iter().count() <= MAX_EDGES);
}

#[test]
fn an_engine_that_is_no_more_is_not_shown_for_ever() {
    let mut meter = begun();
    let mut old = key("Foo", 11);
    old.engine = Some(7);
    let own = Reading {
        own: Some(calls(1, 9)),
        ..reading(vec![rpc("", "Bar", calls(5, 9))], Vec::new())
    };
    meter.read(old.clone(), &own);
    meter.gone(old.pid, old.start_time);
    meter.tick(1_000, PER_NS);
    assert_eq!(
        meter.graph(&node(), 0).edges.len(),
        1,
        "it has just been called"
    );
    meter.tick(1_000 + WINDOW_MS, PER_NS);
    let graph = meter.graph(&node(), 0);
    assert_eq!((graph.edges.len(), graph.nodes.len()), (0, 5));
    let told = "what was counted under engines that have ended (pid 7) is not shown";
    assert_eq!(graph.notes.last().unwrap(), told);
}
