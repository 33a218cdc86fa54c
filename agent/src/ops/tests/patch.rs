//! Patching: the canary's every way.

use super::*;

#[test]
fn one_worker_is_patched_and_proven_before_the_rest() {
    let bench = bench([living(&[IDLE, STARTING, PROVEN]), living(&[PROVEN])]);
    let report = bench.patch().unwrap();
    assert_eq!(
        (report.caller.as_str(), report.callee.as_str()),
        ("Foo", "Bar")
    );
    assert_eq!(
        outcomes(&report),
        [(11, &PatchOutcome::Fused), (12, &PatchOutcome::Fused)]
    );
    assert_eq!(
        bench.grafter.log(),
        ["patch 11 from 21", "patch 12 from 21"]
    );
    assert_eq!(
        report.workers.iter().map(|w| w.canary).collect::<Vec<_>>(),
        [true, false]
    );
    let proof = report.workers[0].proof.as_ref().unwrap();
    assert_eq!(
        (proof.verdict, proof.fused_calls, proof.rpc_calls),
        (ProofVerdict::Proven, 12, 4)
    );
    assert_eq!(
        bench.clock.slept(),
        Duration::from_millis(20),
        "two looks were not enough"
    );
    assert!(!report.already);
}

#[test]
fn nobody_calls_and_that_is_no_failure() {
    let bench = bench([living(&[IDLE]), living(&[IDLE])]);
    let report = bench.patch().unwrap();
    let verdicts: Vec<_> = report
        .workers
        .iter()
        .map(|w| w.proof.as_ref().unwrap().verdict)
        .collect();
    assert_eq!(verdicts, [ProofVerdict::Idle, ProofVerdict::Idle]);
    assert_eq!(
        bench.clock.slept(),
        Duration::from_secs(4),
        "the bound, for each stage"
    );
}

#[test]
fn without_a_watch_being_in_place_is_enough() {
    let bench = bench([living(&[STARTING]), living(&[STARTING])]);
    let report = bench.patch_within("foo", "bar", 0).unwrap();
    assert_eq!(
        report.workers[0].proof.as_ref().unwrap().verdict,
        ProofVerdict::Idle
    );
    assert_eq!(bench.clock.slept(), Duration::ZERO);

    let bench = self::bench([living(&[BROKEN]), living(&[PROVEN])]);
    let error = bench.patch_within("foo", "bar", 0).unwrap_err();
    assert_eq!(
        error.code(),
        "canary-failed",
        "what is known to be broken is not kept"
    );
}

#[test]
fn a_canary_whose_callee_fails_is_reverted_and_the_rest_left_alone() {
    let bench = bench([living(&[STARTING, BROKEN]), living(&[PROVEN])]);
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "canary-failed");
    assert_eq!(
        error.to_string(),
        "the first worker (pid 11) did not prove well and was reverted: Bar failed to \
         initialise: faas_init returned 1"
    );
    assert_eq!(bench.grafter.log(), ["patch 11 from 21", "revert 11"]);
    let AgentError::CanaryFailed { report, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(report.workers[1].outcome, PatchOutcome::NotTried);
    assert_eq!(report.not_fused(), 2);
}

#[test]
fn a_canary_that_never_runs_fused_is_reverted_at_the_bound() {
    let starved = Moment {
        state: crate::grafter::CalleeState::Ready,
        fused: 0,
        not_ready: 50,
    };
    let bench = bench([living(&[starved]), living(&[PROVEN])]);
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "canary-failed");
    assert_eq!(bench.clock.slept(), Duration::from_secs(2));
    assert_eq!(bench.grafter.log(), ["patch 11 from 21", "revert 11"]);
}

#[test]
fn a_canary_that_dies_while_watched_stops_the_rest() {
    let dying = FakeWorker {
        dies_after_moments: true,
        ..living(&[STARTING, STARTING])
    };
    let bench = bench([dying, living(&[PROVEN])]);
    let error = bench.patch().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is gone: it exited while it was watched"),
        "{error}"
    );
    assert_eq!(bench.grafter.log(), ["patch 11 from 21"]);
}

#[test]
fn a_canary_that_can_not_be_reverted_has_its_gate_off() {
    let stuck = FakeWorker {
        revert_error: Some(GraftError::Failed("no stop within 1 s".to_owned())),
        ..living(&[BROKEN])
    };
    let bench = bench([stuck, living(&[PROVEN])]);
    let error = bench.patch().unwrap_err();
    assert_eq!(
        bench.grafter.log(),
        ["patch 11 from 21", "revert 11", "gate 11 false"]
    );
    let AgentError::CanaryFailed { why, .. } = &error else {
        panic!("{error}")
    };
    assert!(why.ends_with(
        "it could not be reverted: no stop within 1 s; its gate is off: calls take the RPC"
    ));
}

#[test]
fn a_worker_that_exits_in_its_patch_is_reported_and_the_others_go_on() {
    let dying = FakeWorker {
        dies_in_patch: true,
        ..living(&[])
    };
    let bench = bench([dying, living(&[PROVEN])]);
    let report = bench.patch().unwrap();
    assert_eq!(
        outcomes(&report),
        [(11, &PatchOutcome::Gone), (12, &PatchOutcome::Fused)]
    );
    assert!(report.workers[1].canary, "the next one takes its place");
    assert_eq!(report.notes, ["exited meanwhile: workers 11"]);
}

#[test]
fn when_all_workers_exit_nothing_was_done() {
    let dying = || FakeWorker {
        dies_in_patch: true,
        ..living(&[])
    };
    let error = bench([dying(), dying()]).patch().unwrap_err();
    assert_eq!(error.code(), "worker-gone");
}

#[test]
fn a_refusal_is_the_answer_and_nobody_else_is_tried() {
    let refusing = || FakeWorker {
        refuse_plan: true,
        ..living(&[])
    };
    let bench = bench([refusing(), refusing()]);
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "no-site");
    assert_eq!(error.to_string(), refusal().to_string());
    assert_eq!(error.hint(), Some(refusal().lift()));
    assert_eq!(bench.grafter.log(), ["patch 11 from 21"]);
}

#[test]
fn another_build_that_is_refused_keeps_the_first_from_being_touched() {
    let other = FakeWorker {
        refuse_plan: true,
        build_id: "other".to_owned(),
        ..living(&[])
    };
    let bench = bench([living(&[PROVEN]), other]);
    assert_eq!(bench.patch().unwrap_err().code(), "no-site");
    assert_eq!(bench.grafter.log(), Vec::<String>::new());
}

#[test]
fn a_later_failure_is_reported_beside_what_was_done() {
    let failing = FakeWorker {
        patch_error: Some(GraftError::Failed("no memory near the site".to_owned())),
        ..living(&[])
    };
    let bench = bench([living(&[PROVEN]), failing]);
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "graft-failed");
    assert_eq!(
        error.to_string(),
        "1 of 2 workers of Foo are not fused: no memory near the site"
    );
    let AgentError::PatchIncomplete { report, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(report.workers[0].outcome, PatchOutcome::Fused, "it stays");
}

#[test]
fn a_later_worker_that_does_not_prove_is_reverted_alone() {
    let bench = bench([living(&[PROVEN]), living(&[BROKEN])]);
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "unproven");
    assert_eq!(
        bench.grafter.log(),
        ["patch 11 from 21", "patch 12 from 21", "revert 12"]
    );
}

#[test]
fn patching_again_says_so_and_does_nothing() {
    let report = bench([fused(), fused()]).patch().unwrap();
    assert!(report.already);
    assert_eq!(
        outcomes(&report),
        [(11, &PatchOutcome::Already), (12, &PatchOutcome::Already)]
    );
}

#[test]
fn a_new_worker_beside_a_fused_one_is_the_canary() {
    let bench = bench([fused(), living(&[PROVEN])]);
    let report = bench.patch().unwrap();
    assert!(!report.already);
    assert_eq!(
        outcomes(&report),
        [(11, &PatchOutcome::Already), (12, &PatchOutcome::Fused)]
    );
    assert!(report.workers[1].canary);
}

#[test]
fn a_traced_worker_is_refused_by_name_before_any_is_touched() {
    let bench = bench([living(&[PROVEN]), living(&[PROVEN])]);
    bench.proc.add(&FakeProcess {
        pid: 12,
        argv: &["/nightcore/func_worker_v1", "/functions/libfoo.so"],
        env: &["FAAS_FUNC_ID=1", "FAAS_FPROCESS_ID=1"],
        tracer: 77,
        ..FakeProcess::default()
    });
    bench.proc.add(&FakeProcess {
        pid: 77,
        argv: &["gdb"],
        ..FakeProcess::default()
    });
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "worker-traced");
    assert_eq!(error.to_string(), "worker 12 is traced by worker (pid 77)");
    assert_eq!(
        error.hint().unwrap(),
        "detach the tracer (pid 77) and try again"
    );
    assert_eq!(bench.grafter.log(), Vec::<String>::new());
}

#[test]
fn a_missing_capability_is_named_with_its_flag() {
    let bench = bench([living(&[PROVEN]), living(&[PROVEN])]);
    let me = bench.proc.add(&FakeProcess {
        pid: 5,
        argv: &["agent"],
        ..FakeProcess::default()
    });
    std::os::unix::fs::symlink("5", me.parent().unwrap().join("self")).unwrap();
    std::fs::write(me.join("status"), "CapEff:\t00000000a80425fb\n").unwrap();
    let error = bench.patch().unwrap_err();
    assert_eq!(error.code(), "missing-capability");
    assert_eq!(
        error.to_string(),
        "the agent lacks CAP_SYS_PTRACE, needed to read and patch workers of other containers"
    );
    assert!(error.hint().unwrap().contains("--cap-add SYS_PTRACE"));
    assert_eq!(bench.grafter.log(), Vec::<String>::new());
    let missing = missing_capabilities(&bench.proc.root());
    assert_eq!(missing[1].flag, "--pid=host");
}

#[test]
fn functions_that_can_not_be_fused_say_why() {
    let bench = bench([living(&[PROVEN]), living(&[PROVEN])]);
    let code = |caller, callee| {
        bench
            .patch_edge(caller, callee)
            .unwrap_err()
            .code()
            .to_owned()
    };
    assert_eq!(code("Fo", "Bar"), "unknown-function");
    assert_eq!(code("Foo", "Baz"), "no-workers");
    assert_eq!(code("Baz", "Bar"), "no-workers");
    assert_eq!(code("Foo", "gopher"), "not-native");
    assert_eq!(code("Gopher", "Bar"), "not-native");
    assert_eq!(bench.grafter.log(), Vec::<String>::new());
}

#[test]
fn a_callee_s_worker_that_exits_is_replaced_by_the_next() {
    let bench = bench([living(&[PROVEN]), living(&[PROVEN])]);
    bench.proc.add(&FakeProcess {
        pid: 22,
        argv: &["/nightcore/func_worker_v1", "/functions/libbar.so"],
        env: &["FAAS_FUNC_ID=2", "FAAS_FPROCESS_ID=1"],
        start_time: 9_000,
        ..FakeProcess::default()
    });
    let report = bench.patch().unwrap();
    assert_eq!(report.not_fused(), 0);
    assert_eq!(
        bench.grafter.log(),
        ["patch 11 from 21", "patch 12 from 21"]
    );
}

#[test]
fn the_busiest_worker_is_the_canary() {
    let bench = bench([living(&[PROVEN]), living(&[PROVEN])]);
    let stat = bench.proc.path(12).join("stat");
    let text = std::fs::read_to_string(&stat).unwrap();
    // Fields 14 and 15 of proc_pid_stat(5), user and system time.
    let mut fields: Vec<&str> = text.split(' ').collect();
    (fields[13], fields[14]) = ("7", "2");
    std::fs::write(&stat, fields.join(" ")).unwrap();
    let report = bench.patch().unwrap();
    assert_eq!(
        (report.workers[0].pid, report.workers[0].canary),
        (12, true)
    );
    assert_eq!(
        bench.grafter.log(),
        ["patch 12 from 21", "patch 11 from 21"]
    );
}

fn touchy() -> Bench {
    let worker = || FakeWorker {
        effects: vec![opens_files()],
        ..living(&[PROVEN])
    };
    bench([worker(), worker()])
}

fn allowing(words: &[&str]) -> PatchRequest {
    PatchRequest {
        caller: "Foo".to_owned(),
        callee: "Bar".to_owned(),
        engine: None,
        canary_wait_ms: 2_000,
        allow_effects: words.iter().map(|word| (*word).to_owned()).collect(),
        guard: false,
    }
}

#[test]
fn effects_need_leave_of_the_request_or_the_configuration() {
    let refused = touchy();
    for words in [&[][..], &["network", "credentials"]] {
        let error = refused.patch_as(&allowing(words)).unwrap_err();
        assert_eq!(error.code(), "effects");
        assert_eq!(
            error.to_string(),
            "fused, /functions/lib.so would use the caller's, which nobody allowed: files (lib.so: fopen)"
        );
        let hint = error.hint().unwrap();
        assert!(hint.contains("--allow-effects files,"), "{hint}");
    }
    assert!(!refused.grafter.log().iter().any(|l| l.starts_with("gate")));

    for words in [&["files"][..], &["network", "files"], &["all"]] {
        let report = touchy().patch_as(&allowing(words)).unwrap();
        assert_eq!(report.not_fused(), 0);
        let receipt = report.workers[0].receipt.as_ref().unwrap();
        assert_eq!(receipt.effects[0].kind, "files");
    }

    let edge = |caller: &str| {
        let text =
            format!("[[edge]]\ncaller = \"{caller}\"\ncallee = \"*\"\nallow-effects = [\"files\"]");
        Bench {
            policy: Policy::parse(&text).unwrap(),
            ..touchy()
        }
    };
    assert_eq!(edge("Foo").patch().unwrap().not_fused(), 0);
    assert_eq!(edge("Baz").patch().unwrap_err().code(), "effects");
}

#[test]
fn an_edge_that_is_fused_already_needs_leave_as_well() {
    let bench = touchy();
    bench.patch_as(&allowing(&["files"])).unwrap();
    assert_eq!(bench.patch().unwrap_err().code(), "effects");
    assert!(bench.patch_as(&allowing(&["files"])).unwrap().already);
}

#[test]
fn an_effect_that_is_not_known_is_told_before_anything_is_done() {
    let bench = touchy();
    let error = bench.patch_as(&allowing(&["files", "tea"])).unwrap_err();
    assert_eq!(error.code(), "bad-request");
    assert!(error.to_string().contains("\"tea\""), "{error}");
    assert!(
        error
            .to_string()
            .contains("files, network, credentials and all"),
        "{error}"
    );
    assert!(bench.grafter.log().is_empty());
}

#[test]
fn explain_says_what_a_patch_would_be_refused_for() {
    let explained = |bench: &Bench| {
        let plan = bench.with(|context, node| explain(context, node, &planned("Foo", "Bar")));
        plan.unwrap().refused.map(|refused| refused.code)
    };
    assert_eq!(explained(&touchy()).as_deref(), Some("effects"));
    let text = "[[edge]]\ncaller = \"*\"\ncallee = \"Bar\"\nallow-effects = [\"all\"]";
    let allowed = Bench {
        policy: Policy::parse(text).unwrap(),
        ..touchy()
    };
    assert_eq!(explained(&allowed), None);
}

#[test]
fn an_edge_is_guarded_where_the_request_or_the_configuration_says_so() {
    let with = |text: &str| Bench {
        policy: Policy::parse(text).unwrap(),
        ..bench([living(&[]), living(&[])])
    };
    let request = |guard| PatchRequest {
        guard,
        ..allowing(&[])
    };
    let of =
        |callee: &str| format!("[[edge]]\ncaller = \"Foo\"\ncallee = \"{callee}\"\nguard = true");
    for (text, asked, guarded) in [
        (String::new(), false, false),
        (String::new(), true, true),
        (of("Bar"), false, true),
        (of("Baz"), false, false),
        (of("Baz"), true, true),
    ] {
        let bench = with(&text);
        let plan = bench.with(|context, node| {
            let request = ExplainRequest {
                guard: asked,
                ..planned("foo", "bar")
            };
            explain(context, node, &request)
        });
        let told = plan.unwrap().text;
        assert_eq!(told.ends_with(", guarded"), guarded, "{text}: {told}");
        bench.patch_as(&request(asked)).unwrap();
        let log = bench.grafter.log();
        let mut patches = log.iter().filter(|line| line.starts_with("patch "));
        assert!(
            patches.all(|line| line.ends_with(", guarded") == guarded),
            "{text}: {log:?}"
        );
    }
}
