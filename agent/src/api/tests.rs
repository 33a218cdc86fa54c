//! The shapes that version 1 has promised.

use serde_json::json;

use super::*;
use crate::testing::opens_files;

/// Fields that scripts rely on. One that fails here breaks version 1.
#[test]
fn a_patch_report_keeps_its_shape() {
    let report = PatchReport {
        caller: "Foo".to_owned(),
        callee: "Bar".to_owned(),
        engine: Some(100),
        already: false,
        workers: vec![PatchedWorker {
            pid: 11,
            pid_inside: Some(8),
            container: None,
            canary: true,
            outcome: PatchOutcome::Reverted {
                why: "x".to_owned(),
            },
            receipt: Some(PatchReceipt {
                pid: 11,
                already: false,
                image_reused: true,
                through_routine: Some(1),
                effects: vec![opens_files()],
                sites: Vec::new(),
                commit_stop_ns: 88_000,
                stops_ns: vec![20_000, 88_000],
                disturbed: Vec::new(),
                journal: None,
            }),
            proof: Some(Proof {
                verdict: ProofVerdict::Proven,
                state: Some(CalleeState::Ready),
                fused_calls: 3,
                fused_errors: 1,
                rpc_calls: 2,
                waited_ms: 20,
            }),
        }],
        notes: vec!["n".to_owned()],
    };
    assert_eq!(
        serde_json::to_value(report).unwrap(),
        json!({
            "caller": "Foo", "callee": "Bar", "engine": 100, "already": false,
            "workers": [{
                "pid": 11, "pid_inside": 8, "container": null, "canary": true,
                "outcome": { "outcome": "reverted", "why": "x" },
                "receipt": {
                    "pid": 11, "already": false, "image_reused": true, "through_routine": 1, "sites": [],
                    "effects": [{
                        "kind": "files", "means": "opens files", "guarded": true,
                        "allowed": false, "seen": [{
                            "library": "/functions/lib.so", "imports": ["fopen"],
                            "strings": ["/etc/bar.conf"], "more_strings": 0,
                        }],
                    }],
                    "commit_stop_ns": 88_000, "stops_ns": [20_000, 88_000], "disturbed": [],
                },
                "proof": {
                    "verdict": "proven", "state": "ready", "fused_calls": 3,
                    "fused_errors": 1, "rpc_calls": 2, "waited_ms": 20,
                },
            }],
            "notes": ["n"],
        })
    );
}

#[test]
fn a_worker_keeps_its_shape() {
    let worker = Worker {
        observed: true,
        pid: 11,
        pid_inside: Some(8),
        start_time: 1_000,
        fprocess_id: Some(0),
        client_id: None,
        container: None,
        kind: WorkerKind::NotNative {
            language: "Go".to_owned(),
        },
        library: None,
        build_id: None,
        threads: 2,
        traced_by: Some(Tracer {
            pid: 7,
            name: "gdb".to_owned(),
        }),
        fused: vec![FusedEdge {
            callee: "Bar".to_owned(),
            gate_on: true,
            windows_in_place: true,
            state: CalleeState::Armed,
        }],
        problem: None,
    };
    assert_eq!(
        serde_json::to_value(worker).unwrap(),
        json!({
            "pid": 11, "pid_inside": 8, "start_time": 1_000, "fprocess_id": 0,
            "client_id": null, "container": null,
            "kind": { "kind": "not-native", "language": "Go" },
            "library": null, "build_id": null, "threads": 2,
            "traced_by": { "pid": 7, "name": "gdb" },
            "fused": [{
                "callee": "Bar", "gate_on": true, "windows_in_place": true, "state": "armed",
            }],
            "observed": true,
            "problem": null,
        })
    );
}

#[test]
fn a_patch_request_has_a_default_watch() {
    let request: PatchRequest =
        serde_json::from_value(json!({ "caller": "Foo", "callee": "Bar" })).unwrap();
    assert_eq!((request.canary_wait_ms, request.engine), (2_000, None));
    assert!(request.allow_effects.is_empty());
}
