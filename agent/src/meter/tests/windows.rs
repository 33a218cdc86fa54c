//! Rates and latencies over time, and steps.

use super::*;

fn foo(rpcs: u64, cycles: u64) -> Reading {
    reading(vec![rpc("", "Bar", calls(rpcs, cycles))], Vec::new())
}

fn rate(meter: &Meter) -> f64 {
    edge(&meter.graph(&node(), 0), "Foo", "Bar").calls_per_s
}

#[test]
fn what_was_counted_before_the_first_tick_is_in_no_rate_and_no_step() {
    let mut meter = Meter::new();
    meter.read(key("Foo", 11), &foo(1_000, 9));
    meter.tick(5_000, PER_NS);
    assert_eq!((rate(&meter), meter.step()), (0.0, None));
    meter.read(key("Foo", 11), &foo(1_010, 9));
    // Not in a sample yet.
    assert_eq!(rate(&meter), 0.0);
    meter.tick(7_000, PER_NS);
    assert_eq!(rate(&meter), 5.0);
    let graph = meter.graph(&node(), 0);
    assert_eq!(edge(&graph, "Foo", "Bar").rpc_calls, 1_010);
    assert_eq!(graph.window_s, 2.0);
    let step = meter.step().unwrap();
    assert_eq!((step.at_ms, step.seconds), (7_000, 2.0));
    assert_eq!(step.edges[0].rpc_calls, 10);
}

#[test]
fn the_window_slides_and_is_as_long_as_it_must_be() {
    let mut meter = begun();
    let mut sum = 0;
    // In the second number n, n calls.
    for second in 1..=30 {
        sum += second;
        meter.read(key("Foo", 11), &foo(sum, 9));
        meter.tick(second * 1_000, PER_NS);
        let first = second.saturating_sub(10) + 1;
        let expected = (first..=second).sum::<u64>() as f64 / (second - first + 1) as f64;
        assert!((rate(&meter) - expected).abs() < 1e-9, "{second}");
    }
    assert_eq!(meter.graph(&node(), 0).window_s, 10.0);
    // One long sample is a window by itself.
    meter.read(key("Foo", 11), &foo(sum + 600, 9));
    meter.tick(90_000, PER_NS);
    assert_eq!(
        (rate(&meter), meter.graph(&node(), 0).window_s),
        (10.0, 60.0)
    );
    meter.tick(91_000, PER_NS);
    assert!((rate(&meter) - 600.0 / 61.0).abs() < 1e-9);
    meter.tick(101_000, PER_NS);
    assert_eq!(rate(&meter), 0.0);
}

#[test]
fn ticks_that_follow_at_once_leave_the_sample_open() {
    let mut meter = begun();
    for tick in 1..=200 {
        meter.read(key("Foo", 11), &foo(tick, 9));
        meter.tick(tick * 10, PER_NS);
    }
    assert_eq!(meter.graph(&node(), 0).window_s, 2.0);
    assert_eq!(rate(&meter), 100.0);
}

#[test]
fn a_clock_that_is_set_back_costs_no_count() {
    let mut meter = begun();
    let mut steps = 0;
    let times = [1_000, 2_000, 500, 1_500, 0, 1_000];
    for (n, at_ms) in (1..).zip(times) {
        meter.read(key("Foo", 11), &foo(n * 10, 9));
        meter.tick(at_ms, PER_NS);
        assert!((rate(&meter) - 10.0).abs() < 1e-9, "{at_ms}");
        steps += meter.step().unwrap().edges[0].rpc_calls;
    }
    assert_eq!(steps, 60);
    // Back before there was a sample.
    let mut meter = Meter::new();
    meter.tick(9_000, PER_NS);
    meter.tick(4_000, PER_NS);
    meter.read(key("Foo", 11), &foo(10, 9));
    meter.tick(5_000, PER_NS);
    assert_eq!(rate(&meter), 10.0);
}

#[test]
fn latencies_are_of_the_window_and_else_of_all_time() {
    let mut meter = begun();
    let mut sum = calls(10, 1_000);
    meter.read(
        key("Foo", 11),
        &reading(vec![rpc("", "Bar", sum.clone())], vec![]),
    );
    meter.tick(1_000, PER_NS);
    for second in 2..=12 {
        (sum.entered, sum.returned) = (sum.entered + 5, sum.returned + 5);
        for _ in 0..5 {
            measure(&mut sum, 9_000);
        }
        meter.read(
            key("Foo", 11),
            &reading(vec![rpc("", "Bar", sum.clone())], vec![]),
        );
        meter.tick(second * 1_000, PER_NS);
    }
    let graph = meter.graph(&node(), 0);
    let bar = edge(&graph, "Foo", "Bar");
    let rpc = bar.rpc.unwrap();
    assert_eq!((rpc.samples, rpc.mean_ns), (50, 4_500.0));
    assert!((rpc.p50_ns / 4_500.0 - 1.0).abs() <= 0.125);
    assert_eq!(bar.fused, None);
    // 5 a second, 4.5 µs each.
    assert!((bar.concurrency.unwrap() - 5.0 * 4.5e-6).abs() < 1e-12);
    meter.tick(60_000, PER_NS);
    let graph = meter.graph(&node(), 0);
    let bar = edge(&graph, "Foo", "Bar");
    assert_eq!(bar.rpc.unwrap().samples, 65);
    assert_eq!(bar.concurrency, Some(0.0));
}

#[test]
fn a_rate_of_the_counter_that_makes_no_sense_is_not_taken() {
    let mut meter = begun();
    meter.read(key("Foo", 11), &foo(1, 1_000));
    for (second, wrong) in (1..).zip([0.0, -1.0, f64::NAN, f64::INFINITY]) {
        meter.tick(second * 1_000, wrong);
    }
    let graph = meter.graph(&node(), 0);
    assert_eq!(edge(&graph, "Foo", "Bar").rpc.unwrap().mean_ns, 500.0);
}

#[test]
fn steps_have_what_was_counted_since_the_last() {
    let mut meter = begun();
    assert_eq!(meter.step(), None);
    meter.tick(1_000, PER_NS);
    assert_eq!(meter.step(), None, "nobody is observed");
    let mut all = foo(4, 9);
    all.own = Some(calls(2, 100));
    all.fused = vec![
        fused("Bar", true, calls(6, 50)),
        fused("Bar/Baz", true, calls(1, 9)),
    ];
    meter.read(key("Foo", 11), &all);
    meter.tick(2_000, PER_NS);
    meter.tick(11_000, PER_NS);
    let step = meter.step().unwrap();
    assert_eq!((step.at_ms, step.seconds), (11_000, 10.0));
    let edges: Vec<_> = step
        .edges
        .iter()
        .map(|e| (&*e.caller, &*e.callee, e.rpc_calls, e.fused_calls))
        .collect();
    assert_eq!(edges, [("Bar", "Baz", 0, 1), ("Foo", "Bar", 4, 6)]);
    assert_eq!(step.edges[1].fused.unwrap().samples, 6);
    assert_eq!((&*step.nodes[0].function, step.nodes[0].calls), ("Foo", 2));
    assert_eq!(meter.step(), None, "no tick since");
    meter.tick(12_000, PER_NS);
    let step = meter.step().unwrap();
    assert_eq!(
        (step.nodes.len(), step.edges.len(), step.seconds),
        (0, 0, 1.0)
    );
}
