//! What only reads.

use super::*;

#[test]
fn explain_plans_and_touches_nothing() {
    let bench = bench([living(&[]), living(&[])]);
    let root = bench.proc.root();
    let context = Context {
        grafter: &bench.grafter,
        clock: &bench.clock,
        proc_root: &root,
        policy: &bench.policy,
        watch: &Watch::default(),
        observer: &Observer::default(),
    };
    let plan = explain(&context, &scan(&root).unwrap(), &planned("foo", "BAR")).unwrap();
    assert_eq!(plan.text, "map Bar of 21 into 11");
    assert_eq!((plan.caller_pid, plan.callee_pid), (11, 21));
    assert_eq!(bench.grafter.log(), Vec::<String>::new());
}

#[test]
fn explain_tells_of_workers_of_different_builds() {
    let other = FakeWorker {
        build_id: "other".to_owned(),
        ..living(&[])
    };
    let bench = bench([living(&[]), other]);
    let root = bench.proc.root();
    let context = Context {
        grafter: &bench.grafter,
        clock: &bench.clock,
        proc_root: &root,
        policy: &bench.policy,
        watch: &Watch::default(),
        observer: &Observer::default(),
    };
    let plan = explain(&context, &scan(&root).unwrap(), &planned("Foo", "Bar")).unwrap();
    let builds = format!("{}, other", "ab".repeat(20));
    assert_eq!(
        plan.notes,
        [format!("workers of Foo run different builds: {builds}")]
    );
}

#[test]
fn status_sums_over_an_edge_s_workers() {
    let mut slow = graft("Bar", PROVEN);
    slow.counters.fused_calls = 3_000;
    slow.counters.fused_ns_mean = Some(60.0);
    let mut fast = graft("Bar", PROVEN);
    fast.counters.fused_calls = 1_000;
    fast.counters.fused_ns_mean = Some(20.0);
    fast.counters.fused_errors = 7;
    let with = |graft| FakeWorker {
        grafts: vec![graft],
        ..living(&[])
    };
    let bench = bench([with(slow), with(fast)]);
    let root = bench.proc.root();
    let context = Context {
        grafter: &bench.grafter,
        clock: &bench.clock,
        proc_root: &root,
        policy: &bench.policy,
        watch: &Watch::default(),
        observer: &Observer::default(),
    };
    let status = status(&context, scan(&root).unwrap());
    let [edge] = status.edges.as_slice() else {
        panic!("{status:?}")
    };
    assert_eq!((edge.caller.as_str(), edge.callee.as_str()), ("Foo", "Bar"));
    assert_eq!(
        (edge.totals.fused_calls, edge.totals.fused_errors),
        (4_000, 7)
    );
    assert_eq!(edge.totals.rpc_calls, 8);
    assert_eq!(edge.totals.fused_ns_mean, Some(50.0));
}

#[test]
fn ps_shows_what_is_fused_and_leaves_out_the_dead() {
    let bench = bench([
        fused(),
        FakeWorker {
            gone: true,
            ..living(&[])
        },
    ]);
    let root = bench.proc.root();
    let context = Context {
        grafter: &bench.grafter,
        clock: &bench.clock,
        proc_root: &root,
        policy: &bench.policy,
        watch: &Watch::default(),
        observer: &Observer::default(),
    };
    let names = [(
        "c".repeat(64),
        crate::discover::docker::Description {
            name: Some("foo-1".to_owned()),
            ..Default::default()
        },
    )];
    let ps = ps(
        &context,
        scan(&root).unwrap(),
        &names.into_iter().collect(),
        None,
    );
    let foo = &ps.functions[0];
    assert_eq!(foo.workers.len(), 1);
    assert_eq!(
        foo.workers[0].build_id.as_deref(),
        Some("ab".repeat(20).as_str())
    );
    assert_eq!(foo.workers[0].fused[0].callee, "Bar");
    let container = foo.workers[0].container.as_ref().unwrap();
    assert_eq!(container.name.as_deref(), Some("foo-1"));
    assert!(
        ps.functions[2].workers.is_empty(),
        "functions without workers are listed"
    );
}
