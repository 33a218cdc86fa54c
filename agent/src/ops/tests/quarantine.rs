//! Edges that a worker died of.

use super::*;
use crate::api::Quarantined;

fn quarantined(engine: Option<i32>) -> Quarantined {
    Quarantined {
        caller: "Foo".to_owned(),
        callee: "Bar".to_owned(),
        engine,
        pid: 99,
        how: "died of SIGSEGV while a call of it ran".to_owned(),
        in_flight: vec!["Bar".to_owned()],
        since: 1,
    }
}

fn engine(bench: &Bench) -> Option<i32> {
    let node = scan(&bench.proc.root()).unwrap();
    let foo = node.functions.iter().find(|f| f.label() == "Foo").unwrap();
    foo.engine
}

#[test]
fn what_is_quarantined_is_not_patched_until_it_is_lifted() {
    let bench = bench([living(&[PROVEN]), living(&[PROVEN])]);
    let engine = engine(&bench);
    bench.watch.quarantine.add(quarantined(engine));
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "quarantined");
    assert_eq!(
        error.to_string(),
        "Foo → Bar is quarantined: worker 99 died of SIGSEGV while a call of it ran"
    );
    assert!(
        error
            .hint()
            .unwrap()
            .contains("agentctl unquarantine Foo Bar")
    );
    assert!(bench.grafter.log().is_empty(), "something was touched");
    let status = bench.with(|context, _| status(context, scan(context.proc_root).unwrap()));
    assert_eq!(status.quarantined, [quarantined(engine)]);

    let lift = || {
        bench
            .with(|context, node| unquarantine(context, node, &edge("foo", "BAR")))
            .unwrap()
            .was
    };
    assert_eq!(lift(), Some(quarantined(engine)));
    // A crash that a worker outlived is in its counters still.
    let log = bench.grafter.log();
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(log.iter().all(|line| line.starts_with("forget Bar in ")));
    assert_eq!(lift(), None);
    assert_eq!(bench.patch().unwrap().not_fused(), 0);
}

#[test]
fn the_same_names_on_another_engine_are_another_edge() {
    let bench = bench([living(&[PROVEN]), living(&[PROVEN])]);
    bench.watch.quarantine.add(quarantined(Some(123_456)));
    assert_eq!(bench.patch().unwrap().not_fused(), 0);
}
