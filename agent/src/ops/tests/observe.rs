//! Observing: who is, in which order, and what is kept of it.

use super::*;
use crate::api::{ObserveOutcome, ObserveReport, ObserveRequest};
use crate::grafter::GraftError;

fn request(on: bool, functions: &[&str]) -> ObserveRequest {
    ObserveRequest {
        on,
        functions: functions.iter().map(|f| (*f).to_owned()).collect(),
        engine: None,
    }
}

impl Bench {
    fn observe(&self, on: bool, functions: &[&str]) -> Result<ObserveReport, AgentError> {
        self.with(|context, node| observe(context, node, &request(on, functions)))
    }
}

fn outcomes(report: &ObserveReport) -> Vec<(&str, i32, &ObserveOutcome)> {
    report
        .workers
        .iter()
        .map(|w| (w.function.as_str(), w.pid, &w.outcome))
        .collect()
}

#[test]
fn every_worker_of_the_functions_is_observed_and_left_again() {
    let bench = bench([living(&[]), living(&[])]);
    let report = bench.observe(true, &["foo"]).unwrap();
    let observed = &ObserveOutcome::Observed;
    assert_eq!(
        outcomes(&report),
        [("Foo", 11, observed), ("Foo", 12, observed)]
    );
    assert!(bench.observer.wanted.wants("Foo", None));
    assert!(!bench.observer.wanted.wants("Bar", None));
    let report = bench.observe(true, &["Foo", "Bar"]).unwrap();
    let already = &ObserveOutcome::Already;
    assert_eq!(
        outcomes(&report),
        [
            ("Foo", 11, already),
            ("Foo", 12, already),
            ("Bar", 21, observed)
        ]
    );
    let report = bench.observe(false, &["Foo"]).unwrap();
    let restored = &ObserveOutcome::Restored;
    assert_eq!(
        outcomes(&report),
        [("Foo", 11, restored), ("Foo", 12, restored)]
    );
    assert!(!bench.observer.wanted.wants("Foo", None));
    assert!(bench.observer.wanted.wants("Bar", None));
}

#[test]
fn an_unknown_name_changes_nothing() {
    let bench = bench([living(&[]), living(&[])]);
    let error = bench.observe(true, &["Foo", "Fo"]).unwrap_err();
    assert!(
        matches!(error, AgentError::UnknownFunction { .. }),
        "{error}"
    );
    assert!(bench.grafter.log().is_empty());
    assert!(!bench.observer.wanted.any());
}

#[test]
fn the_others_are_left_alone_when_the_first_one_exits() {
    let dying = FakeWorker {
        dies_in_patch: true,
        ..living(&[])
    };
    // One that exits while it is changed is nothing to go by.
    let exits = bench([dying, living(&[])]);
    let report = exits.observe(true, &["Foo"]).unwrap();
    let found = outcomes(&report);
    assert_eq!(found[0].2, &ObserveOutcome::Gone);
    assert_eq!(found[1].2, &ObserveOutcome::Observed);
    // One that exits right afterwards is.
    let dying = FakeWorker {
        dies_after_moments: true,
        moments: [IDLE].into(),
        grafts: vec![graft("Bar", IDLE)],
        ..living(&[])
    };
    let exits = bench([dying, living(&[])]);
    let report = exits.observe(true, &["Foo"]).unwrap();
    let found = outcomes(&report);
    assert_eq!(found[0].2, &ObserveOutcome::Observed);
    let ObserveOutcome::Failed { error } = found[1].2 else {
        panic!("{found:?}")
    };
    assert!(error.message.contains("worker 11"), "{error}");
    assert_eq!(exits.grafter.log(), ["observe 11"]);
    // Nor does anybody come back to it until it is asked for again.
    let engine = report.workers[0].engine;
    assert!(!exits.observer.wanted.wants("Foo", engine));
}

#[test]
fn what_fails_in_one_worker_is_told_and_the_others_go_on() {
    let stubborn = FakeWorker {
        patch_error: Some(GraftError::from(refusal())),
        ..living(&[])
    };
    let bench = bench([stubborn, living(&[])]);
    let report = bench.observe(true, &[]).unwrap();
    let found = outcomes(&report);
    assert!(
        matches!(found[0].2, ObserveOutcome::Failed { .. }),
        "{found:?}"
    );
    assert_eq!(found[1].2, &ObserveOutcome::Observed);
    // They are tried again without being asked for.
    let missing: Vec<(i32, u64)> = bench.with(|_, node| {
        let workers = node.functions.iter().flat_map(|f| &f.workers);
        let foos = workers.filter(|w| [11, 12].contains(&w.pid));
        foos.map(|w| (w.pid, w.start_time)).collect()
    });
    let again = bench.with(|context, node| catch_up(context, node, &missing));
    assert_eq!(again.workers.len(), 2, "no others: {again:?}");
    assert!(matches!(
        outcomes(&again)[0].2,
        ObserveOutcome::Failed { .. }
    ));
    assert_eq!(outcomes(&again)[1].2, &ObserveOutcome::Already);
}
