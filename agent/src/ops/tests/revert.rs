//! Reverting.

use super::*;

#[test]
fn revert_restores_all_and_says_what_was_there() {
    let bench = bench([fused(), living(&[])]);
    let report = bench.revert("bar").unwrap();
    assert!(!report.nothing);
    let outcomes: Vec<_> = report.workers.iter().map(|w| w.outcome.clone()).collect();
    assert_eq!(outcomes, [RevertOutcome::Restored, RevertOutcome::Nothing]);
    assert_eq!(report.workers[0].fused_calls, Some(12));
    assert_eq!(bench.grafter.log(), ["revert 11", "revert 12"]);
}

#[test]
fn nothing_to_revert_is_no_failure() {
    let report = bench([living(&[]), living(&[])]).revert("Bar").unwrap();
    assert!(report.nothing);
}

#[test]
fn a_callee_that_left_the_configuration_can_still_be_reverted() {
    let old = FakeWorker {
        grafts: vec![graft("Retired", PROVEN)],
        ..living(&[])
    };
    let bench = bench([old, living(&[])]);
    assert_eq!(bench.revert("retired").unwrap().callee, "Retired");
    assert_eq!(
        bench.revert("Nonesuch").unwrap_err().code(),
        "unknown-function"
    );
}

#[test]
fn a_worker_that_can_not_be_stopped_gets_its_gate_off_and_the_others_go_on() {
    let traced = GraftError::TracedBy {
        pid: 11,
        tracer_pid: 77,
        tracer_name: "gdb".to_owned(),
    };
    let bench = bench([
        FakeWorker {
            revert_error: Some(traced),
            ..fused()
        },
        fused(),
    ]);
    let error = bench.revert("Bar").unwrap_err();
    assert_eq!(error.code(), "worker-traced");
    assert_eq!(
        error.to_string(),
        "1 of 2 workers of Foo are not reverted: worker 11 is traced by gdb (pid 77) (its gate \
         is off: calls take the RPC)"
    );
    assert_eq!(
        bench.grafter.log(),
        ["revert 11", "gate 11 false", "revert 12"]
    );
}
