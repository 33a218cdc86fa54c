//! The operations against a patcher that touches nothing.

mod observe;
mod patch;
mod quarantine;
mod read;
mod revert;

use std::time::Duration;

use super::*;
use crate::api::{
    EdgeRequest, ExplainRequest, PatchOutcome, PatchReport, PatchRequest, ProofVerdict,
    RevertOutcome,
};
use crate::discover::{Node, scan};
use crate::error::AgentError;
use crate::testing::{
    BROKEN, FakeClock, FakeGrafter, FakeProc, FakeProcess, FakeWorker, IDLE, Moment, PROVEN,
    STARTING, graft, living, opens_files, refusal,
};

/// The example node with a patcher that knows its workers.
struct Bench {
    proc: FakeProc,
    grafter: FakeGrafter,
    clock: FakeClock,
    policy: Policy,
    watch: Watch,
    observer: Observer,
}

fn bench(foo: [FakeWorker; 2]) -> Bench {
    let [first, second] = foo;
    Bench {
        proc: FakeProc::example(),
        grafter: FakeGrafter::new([(11, first), (12, second), (21, living(&[]))]),
        clock: FakeClock::new(),
        policy: Policy::default(),
        watch: Watch::default(),
        observer: Observer::default(),
    }
}

impl Bench {
    fn patch(&self) -> Result<PatchReport, AgentError> {
        self.patch_edge("foo", "bar")
    }

    fn patch_edge(&self, caller: &str, callee: &str) -> Result<PatchReport, AgentError> {
        self.patch_within(caller, callee, 2_000)
    }

    fn patch_within(
        &self,
        caller: &str,
        callee: &str,
        canary_wait_ms: u64,
    ) -> Result<PatchReport, AgentError> {
        self.patch_as(&PatchRequest {
            caller: caller.to_owned(),
            callee: callee.to_owned(),
            engine: None,
            canary_wait_ms,
            allow_effects: Vec::new(),
            guard: false,
        })
    }

    fn patch_as(&self, request: &PatchRequest) -> Result<PatchReport, AgentError> {
        self.with(|context, node| patch(context, node, request))
    }

    fn with<T>(&self, act: impl FnOnce(&Context<'_>, &Node) -> T) -> T {
        let root = self.proc.root();
        let context = Context {
            grafter: &self.grafter,
            clock: &self.clock,
            proc_root: &root,
            policy: &self.policy,
            watch: &self.watch,
            observer: &self.observer,
        };
        act(&context, &scan(&root).unwrap())
    }

    fn revert(&self, callee: &str) -> Result<crate::api::RevertReport, AgentError> {
        self.with(|context, node| revert(context, node, &edge("Foo", callee)))
    }
}

fn edge(caller: &str, callee: &str) -> EdgeRequest {
    EdgeRequest {
        caller: caller.to_owned(),
        callee: callee.to_owned(),
        engine: None,
    }
}

/// What asks for the plan of an edge.
fn planned(caller: &str, callee: &str) -> ExplainRequest {
    ExplainRequest {
        caller: caller.to_owned(),
        callee: callee.to_owned(),
        engine: None,
        guard: false,
    }
}

fn outcomes(report: &PatchReport) -> Vec<(i32, &PatchOutcome)> {
    report
        .workers
        .iter()
        .map(|worker| (worker.pid, &worker.outcome))
        .collect()
}

fn fused() -> FakeWorker {
    FakeWorker {
        grafts: vec![graft("Bar", PROVEN)],
        ..living(&[])
    }
}
