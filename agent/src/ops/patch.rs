//! Fusing an edge in all of a function's workers.
//!
//! ```text
//!  check all ─► patch one ─► watch ─┬─ good ─► patch the rest ─► watch ─► report
//!  (refuse:      (canary)           │                             └─ bad ones reverted
//!   nothing                         └─ bad ──► revert, stop
//!   touched)
//! ```
//!
//! Where calls were seen meanwhile to come through the entry of the worker's own
//! routine, their sites are rewritten last ([`super::seen`]).
//!
//! The canary is the worker that has used most processor time: a node under
//! light load gives all calls to one, and only where there are calls is there
//! proof. A worker that exits before or during its own patch is reported and the next
//! one takes its place. One that exits while it is *watched* counts as bad: a
//! crash of the fused code would look the same, and the others must not follow.

use std::collections::HashSet;
use std::time::Duration;

use super::read::{mixed_builds, newest_first, other_kinds};
use super::{Context, canary_wait, seen};
use crate::api::{PatchOutcome, PatchReport, PatchRequest, PatchedWorker};
use crate::canary::{self, Watch, Watched};
use crate::discover::{self, Node, tracer_of};
use crate::error::{AgentError, graft_info};
use crate::grafter::{
    Allowance, CalleeState, EdgeCounters, Explained, GraftError, GraftStatus, PatchReceipt, Target,
    Wanted,
};
use crate::select;

/// Fuses `request.callee` into every native worker of `request.caller`.
///
/// # Errors
/// What [`select`] finds wrong with the names; [`AgentError::Graft`] where
/// nothing was changed; [`AgentError::CanaryFailed`] and
/// [`AgentError::PatchIncomplete`], with a report, where something was.
pub fn patch(
    context: &Context<'_>,
    node: &Node,
    request: &PatchRequest,
) -> Result<PatchReport, AgentError> {
    let select::Edge {
        caller,
        callee,
        name,
    } = select::edge(node, &request.caller, &request.callee, request.engine)
        .map_err(|error| context.explained(error))?;
    let mut callers = select::native_workers(caller)?;
    // The busiest first: a canary that nobody calls proves nothing.
    callers.sort_by_key(|(worker, _)| (std::cmp::Reverse(worker.cpu_ticks), worker.pid));
    let callees = select::native_workers(callee)?;
    let asked = Allowance::of(request.allow_effects.iter().map(String::as_str)).map_err(|e| {
        AgentError::BadRequest {
            detail: format!("allow_effects: {e}"),
        }
    })?;
    context.require_capabilities()?;
    let caller_label = caller.label();
    let quarantined = || {
        let quarantine = &context.watch.quarantine;
        quarantine.find(caller.engine, &caller_label, &name)
    };
    if let Some(why) = quarantined() {
        return Err(AgentError::Quarantined(Box::new(why)));
    }
    let targets: Vec<Target> = callers.iter().map(|(_, target)| target.clone()).collect();
    // To the end: another agent's patch or revert comes before all of this or
    // behind.
    let _claim = context.grafter.claim(&targets)?;
    let mut edge = Edge {
        context,
        caller: caller_label.clone(),
        engine: caller.engine,
        callees: newest_first(&callees)
            .into_iter()
            .map(|(_, target)| target.clone())
            .collect(),
        wanted: Wanted {
            allowed: asked.and(context.policy.allowed(&caller.label(), &callee.label())),
            guard: request.guard || context.policy.guards(&caller.label(), &callee.label()),
        },
        name: name.clone(),
        bound: canary_wait(request.canary_wait_ms),
    };
    let (todo, mut workers) = edge.check(&callers)?;
    let mut report = PatchReport {
        caller: caller.label(),
        callee: edge.name.clone(),
        engine: caller.engine,
        already: false,
        workers: Vec::new(),
        notes: other_kinds(caller).into_iter().collect(),
    };
    report
        .notes
        .extend(mixed_builds(context.grafter, callee, &callees));

    let mut todo = todo.into_iter();
    while let Some(one) = todo.next() {
        match edge.patch_one(&one) {
            Ok(receipt) if receipt.already => workers.push(one.already(receipt)),
            Ok(receipt) => {
                let canary = one.fused(receipt, true);
                let canary = edge.watch(vec![(one, canary)]).pop();
                let bad = canary.as_ref().and_then(bad_canary);
                workers.extend(canary);
                if let Some((pid, why)) = bad {
                    workers.extend(todo.map(|one| one.untouched()));
                    report.workers = workers;
                    return Err(AgentError::CanaryFailed {
                        pid,
                        why,
                        report: Box::new(report),
                    });
                }
                break;
            }
            Err(GraftError::WorkerGone { .. }) => workers.push(one.gone()),
            Err(error) if workers.is_empty() => return Err(error.into()),
            Err(error) => {
                workers.push(one.failed(&error));
                workers.extend(todo.map(|one| one.untouched()));
                report.workers = workers;
                return Err(incomplete(report, &error));
            }
        }
    }

    let mut watched = Vec::new();
    for one in todo {
        match edge.patch_one(&one) {
            Ok(receipt) if receipt.already => workers.push(one.already(receipt)),
            Ok(receipt) => {
                let patched = one.fused(receipt, false);
                watched.push((one, patched));
            }
            Err(GraftError::WorkerGone { .. }) => workers.push(one.gone()),
            Err(error) => workers.push(one.failed(&error)),
        }
    }
    workers.extend(edge.watch(watched));
    let name = edge.name.clone();
    let notes = seen::rewrite(context.grafter, &name, &targets, &mut workers, |target| {
        edge.patch_target(target)
    });
    report.notes.extend(notes);
    if let Some(why) = quarantined() {
        // One of them died of it meanwhile, perhaps before this one had a gate.
        for target in &targets {
            if let Err(error) = context.grafter.set_gate(target, &name, false) {
                tracing::debug!(pid = target.pid, %error, "no gate to close");
            }
        }
        return Err(AgentError::Quarantined(Box::new(why)));
    }
    report.notes.extend(workers.iter().filter_map(unjournaled));
    report.workers = workers;
    conclude(report)
}

fn unjournaled(worker: &PatchedWorker) -> Option<String> {
    let why = worker.receipt.as_ref()?.journal.as_ref()?;
    Some(format!(
        "worker {} is fused, and the journal does not know that it is done (its own record does): {why}",
        worker.pid
    ))
}

fn conclude(mut report: PatchReport) -> Result<PatchReport, AgentError> {
    let is = |wanted: &PatchOutcome| report.workers.iter().all(|w| w.outcome == *wanted);
    if let (true, Some(last)) = (is(&PatchOutcome::Gone), report.workers.last()) {
        return Err(GraftError::WorkerGone { pid: last.pid }.into());
    }
    report.already = is(&PatchOutcome::Already);
    let gone: Vec<String> = report
        .workers
        .iter()
        .filter(|worker| worker.outcome == PatchOutcome::Gone)
        .map(|worker| worker.pid.to_string())
        .collect();
    if !gone.is_empty() {
        report
            .notes
            .push(format!("exited meanwhile: workers {}", gone.join(", ")));
    }
    let first = report
        .workers
        .iter()
        .find_map(|worker| match &worker.outcome {
            PatchOutcome::Failed { error } => Some(error.clone()),
            PatchOutcome::Reverted { why } => Some(crate::api::ErrorInfo {
                code: "unproven".to_owned(),
                message: format!(
                    "worker {} did not prove well and was reverted: {why}",
                    worker.pid
                ),
                hint: Some("the others are fused; try again, or revert them".to_owned()),
            }),
            _ => None,
        });
    match first {
        None => Ok(report),
        Some(first) => Err(AgentError::PatchIncomplete {
            first,
            report: Box::new(report),
        }),
    }
}

fn incomplete(report: PatchReport, error: &GraftError) -> AgentError {
    AgentError::PatchIncomplete {
        first: graft_info(error),
        report: Box::new(report),
    }
}

/// Why the others must be left alone, if they must.
fn bad_canary(canary: &PatchedWorker) -> Option<(i32, String)> {
    let why = match &canary.outcome {
        PatchOutcome::Reverted { why } => why.clone(),
        PatchOutcome::Failed { error } => error.message.clone(),
        PatchOutcome::Gone => {
            "it exited while it was watched, which a crash of the fused code would look like"
                .to_owned()
        }
        PatchOutcome::Fused | PatchOutcome::Already | PatchOutcome::NotTried => return None,
    };
    Some((canary.pid, why))
}

/// One worker that is to be patched.
struct Todo<'a> {
    worker: &'a discover::Worker,
    target: Target,
    before: EdgeCounters,
}

impl Todo<'_> {
    fn with(&self, outcome: PatchOutcome) -> PatchedWorker {
        PatchedWorker {
            pid: self.worker.pid,
            pid_inside: self.worker.pid_inside,
            container: self.worker.container_short(),
            canary: false,
            outcome,
            receipt: None,
            proof: None,
        }
    }
    fn fused(&self, receipt: PatchReceipt, canary: bool) -> PatchedWorker {
        let fused = self.with(PatchOutcome::Fused);
        PatchedWorker {
            receipt: Some(receipt),
            canary,
            ..fused
        }
    }
    fn already(&self, receipt: PatchReceipt) -> PatchedWorker {
        PatchedWorker {
            receipt: Some(receipt),
            ..self.with(PatchOutcome::Already)
        }
    }
    fn gone(&self) -> PatchedWorker {
        self.with(PatchOutcome::Gone)
    }
    fn failed(&self, error: &GraftError) -> PatchedWorker {
        self.with(PatchOutcome::Failed {
            error: graft_info(error),
        })
    }
    fn untouched(&self) -> PatchedWorker {
        self.with(PatchOutcome::NotTried)
    }
}

/// The edge that is being fused.
struct Edge<'a> {
    context: &'a Context<'a>,
    /// The caller's label and engine.
    caller: String,
    engine: Option<i32>,
    /// Workers of the callee, the one to be read first.
    callees: Vec<Target>,
    name: String,
    /// What the callee may touch that is the caller's, and whether calls are
    /// guarded.
    wanted: Wanted,
    bound: Duration,
}

impl Edge<'_> {
    /// Everything that can be refused before the first worker is touched.
    /// Returns what is to be patched, and what has gone already.
    fn check<'w>(
        &mut self,
        callers: &[(&'w discover::Worker, Target)],
    ) -> Result<(Vec<Todo<'w>>, Vec<PatchedWorker>), AgentError> {
        let mut todo = Vec::new();
        let mut gone = Vec::new();
        let mut builds = HashSet::new();
        for (worker, target) in callers {
            let mut one = Todo {
                worker,
                target: target.clone(),
                before: EdgeCounters::default(),
            };
            let status = match self.context.grafter.status(target) {
                Ok(status) => status,
                Err(GraftError::WorkerGone { .. }) => {
                    gone.push(one.gone());
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let graft = canary::edge(status.as_ref(), &self.name);
            let fused = graft.is_some_and(in_force);
            if !fused && let Some(tracer) = tracer_of(self.context.proc_root, worker.pid) {
                let (tracer_pid, tracer_name) = (tracer.pid, tracer.name);
                let pid = worker.pid;
                return Err(GraftError::TracedBy {
                    pid,
                    tracer_pid,
                    tracer_name,
                }
                .into());
            }
            one.before = canary::baseline(status.as_ref(), &self.name);
            // The plan is the same for the same build; the first is made
            // anyway, when the canary is patched.
            let build = self.context.grafter.build_id(target).ok();
            if builds.insert(build) && builds.len() > 1 && !fused {
                self.plan(target)?;
            }
            todo.push(one);
        }
        Ok((todo, gone))
    }

    fn plan(&mut self, target: &Target) -> Result<(), AgentError> {
        let name = self.name.clone();
        let grafter = self.context.grafter;
        let wanted = self.wanted;
        match self.with_callee(|callee| grafter.explain(target, callee, &name, wanted)) {
            Ok(Explained {
                refused: Some(refused),
                ..
            }) => Err(GraftError::from(refused).into()),
            Ok(_) | Err(GraftError::WorkerGone { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn patch_one(&mut self, one: &Todo<'_>) -> Result<PatchReceipt, GraftError> {
        self.patch_target(&one.target)
    }

    fn patch_target(&mut self, target: &Target) -> Result<PatchReceipt, GraftError> {
        let name = self.name.clone();
        let grafter = self.context.grafter;
        let wanted = self.wanted;
        let clock = self.context.clock;
        let began = clock.now();
        let result = self.with_callee(|callee| grafter.patch(target, callee, &name, wanted));
        match &result {
            Ok(receipt) => {
                if !receipt.already {
                    let took = clock.now().duration_since(began);
                    let planning = &self.context.observer.planning;
                    planning.patched(took, &receipt.stops_ns);
                }
                tracing::info!(
                    pid = target.pid,
                    callee = name,
                    already = receipt.already,
                    commit_stop_ns = receipt.commit_stop_ns,
                    "patched"
                );
                let watch = self.context.watch;
                watch.track(grafter, target, &self.caller, self.engine);
            }
            Err(error) => {
                tracing::warn!(pid = target.pid, callee = name, %error, "not patched");
            }
        }
        result
    }

    /// Does something with a worker of the callee; one that exits meanwhile is
    /// replaced by the next.
    fn with_callee<T>(
        &mut self,
        mut act: impl FnMut(&Target) -> Result<T, GraftError>,
    ) -> Result<T, GraftError> {
        loop {
            let Some(callee) = self.callees.first() else {
                return Err(GraftError::Failed(format!(
                    "every worker of {} has exited meanwhile",
                    self.name
                )));
            };
            match act(callee) {
                Err(GraftError::WorkerGone { pid }) if pid == callee.pid => {
                    self.callees.remove(0);
                }
                result => return result,
            }
        }
    }

    /// Watches freshly patched workers and reverts those that do not prove.
    fn watch(&self, patched: Vec<(Todo<'_>, PatchedWorker)>) -> Vec<PatchedWorker> {
        let watched: Vec<Watched> = patched
            .iter()
            .map(|(one, _)| Watched {
                target: one.target.clone(),
                before: one.before.clone(),
            })
            .collect();
        let Context { grafter, clock, .. } = *self.context;
        let results = canary::watch(grafter, clock, &watched, &self.name, self.bound);
        let mut done = Vec::with_capacity(patched.len());
        for ((one, mut worker), result) in patched.into_iter().zip(results) {
            match result {
                Watch::Good(proof) => worker.proof = Some(proof),
                Watch::Gone => worker.outcome = PatchOutcome::Gone,
                Watch::Bad(proof, why) => {
                    tracing::warn!(pid = one.worker.pid, why, "did not prove well: reverting");
                    worker.proof = Some(proof);
                    worker.outcome = self.undo(&one.target, why);
                }
            }
            done.push(worker);
        }
        done
    }

    fn undo(&self, target: &Target, why: String) -> PatchOutcome {
        match self.context.grafter.revert(target, &self.name) {
            Ok(_) => PatchOutcome::Reverted { why },
            Err(GraftError::WorkerGone { .. }) => PatchOutcome::Gone,
            Err(error) => {
                let gate = self.context.grafter.set_gate(target, &self.name, false);
                let gate = match gate {
                    Ok(()) => "its gate is off: calls take the RPC".to_owned(),
                    Err(gate) => format!("nor its gate be switched off: {gate}"),
                };
                let mut info = graft_info(&error);
                info.message = format!(
                    "{why}; and it could not be reverted: {}; {gate}",
                    info.message
                );
                PatchOutcome::Failed { error: info }
            }
        }
    }
}

/// Whether an edge is fused for all that matters to a patch.
fn in_force(graft: &GraftStatus) -> bool {
    let lost = matches!(graft.state, CalleeState::Failed | CalleeState::Crashed);
    graft.gate_on && graft.windows_in_place && !lost
}
