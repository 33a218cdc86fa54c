//! Having functions observed, in all of their workers, and left alone again.
//!
//! ```text
//!  asked for ─► kept on disk ─► one worker of each function ─► it lives? ─► the others
//! ```
//!
//! What could not be done now, and workers that come later, are the observer's
//! affair ([`crate::observer`]): it asks again.

use std::cmp::Reverse;
use std::time::Duration;

use super::Context;
use crate::api::{ObserveOutcome, ObserveReport, ObserveRequest, ObservedWorker, WorkerKind};
use crate::discover::{Function, Node, Worker};
use crate::error::{AgentError, graft_info};
use crate::grafter::{GraftError, Target};
use crate::observer::Rule;
use crate::select;

/// How long the first worker of a function is looked at before the others follow: to
/// the first call that is counted, but no longer.
const CANARY: Duration = Duration::from_millis(300);
/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// Has functions observed, or left alone.
///
/// # Errors
/// What [`select`] finds wrong with the names, a missing capability, or that what
/// was asked for cannot be kept. What goes wrong with workers is in the report.
pub fn observe(
    context: &Context<'_>,
    node: &Node,
    request: &ObserveRequest,
) -> Result<ObserveReport, AgentError> {
    let functions = functions(context, node, request)?;
    if request.on {
        context.require_capabilities()?;
    }
    let rule = |function: Option<String>| Rule {
        on: request.on,
        function,
        engine: request.engine,
    };
    let rules: Vec<Rule> = match request.functions.is_empty() {
        true => vec![rule(None)],
        false => functions.iter().map(|f| rule(Some(f.label()))).collect(),
    };
    let kept = context.observer.wanted.change(&rules);
    kept.map_err(|error| AgentError::NotKept {
        what: "what is to be observed".to_owned(),
        why: error.to_string(),
    })?;
    for function in &functions {
        context.observer.asked(&function.label(), function.engine);
    }
    Ok(carry_out(context, &functions, request.on, None))
}

/// The same for workers (by pid and start time) of functions that are to be observed
/// already.
#[must_use]
pub fn catch_up(context: &Context<'_>, node: &Node, missing: &[(i32, u64)]) -> ObserveReport {
    let wanted = |f: &&Function| {
        let lacks = |w: &Worker| missing.contains(&(w.pid, w.start_time));
        f.workers.iter().any(lacks) && context.observer.wanted.wants(&f.label(), f.engine)
    };
    let functions: Vec<&Function> = node.functions.iter().filter(wanted).collect();
    carry_out(context, &functions, true, Some(missing))
}

fn carry_out(
    context: &Context<'_>,
    functions: &[&Function],
    on: bool,
    only: Option<&[(i32, u64)]>,
) -> ObserveReport {
    let mut report = ObserveReport {
        on,
        ..ObserveReport::default()
    };
    for function in functions {
        match select::native_workers(function) {
            Ok(mut workers) => {
                // The busiest first: one that nobody calls proves nothing.
                workers.sort_by_key(|(worker, _)| (Reverse(worker.cpu_ticks), worker.pid));
                let targets = workers.into_iter().map(|(_, target)| target);
                let meant = |t: &Target| only.is_none_or(|o| o.contains(&(t.pid, t.start_time)));
                let targets: Vec<Target> = targets.filter(meant).collect();
                let outcomes = of_function(context, function, &targets, on, only.is_none());
                for (target, (outcome, stops_ns)) in targets.iter().zip(outcomes) {
                    if let ObserveOutcome::Failed { error } = &outcome {
                        let why = format!("worker {}: {}", target.pid, error.message);
                        context
                            .observer
                            .failed(&function.label(), function.engine, &why);
                    }
                    report.workers.push(ObservedWorker {
                        function: function.label(),
                        engine: function.engine,
                        pid: target.pid,
                        outcome,
                        stops_ns,
                    });
                }
            }
            Err(AgentError::NoWorkers { name }) => {
                let later = match on {
                    true => ": those that come will be observed",
                    false => "",
                };
                report
                    .notes
                    .push(format!("function {name} has no running worker{later}"));
            }
            Err(error) => report.notes.push(format!("{error}: it can't be observed")),
        }
    }
    report
}

type Outcome = (ObserveOutcome, Vec<u64>);

fn of_function(
    context: &Context<'_>,
    function: &Function,
    targets: &[Target],
    on: bool,
    patient: bool,
) -> Vec<Outcome> {
    let failed = |error: &GraftError| {
        let error = graft_info(error);
        (ObserveOutcome::Failed { error }, Vec::new())
    };
    let claim = match patient {
        true => context.grafter.claim(targets),
        false => context.grafter.claim_at_once(targets),
    };
    if let Err(error) = &claim {
        return targets.iter().map(|_| failed(error)).collect();
    }
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut proven = false;
    for target in targets {
        let outcome = match on {
            true => begin(context, target),
            false => end(context, target),
        };
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(GraftError::WorkerGone { .. }) => (ObserveOutcome::Gone, Vec::new()),
            Err(error) => {
                tracing::warn!(pid = target.pid, %error, on, "observing was not changed");
                failed(&error)
            }
        };
        let begun = on && outcome.0 == ObserveOutcome::Observed;
        outcomes.push(outcome);
        if begun {
            let (grafter, observer) = (context.grafter, context.observer);
            observer.began(grafter, target, &function.label(), function.engine);
        }
        if begun && !proven {
            if lives_on(context, target) {
                proven = true;
                continue;
            }
            let why = format!(
                "worker {}, the first one that was observed, ended at once",
                target.pid
            );
            context
                .observer
                .suspend(&function.label(), function.engine, &why);
            let error = GraftError::Failed(format!("{why}: the others are left alone"));
            outcomes.extend(targets[outcomes.len()..].iter().map(|_| failed(&error)));
            break;
        }
    }
    outcomes
}

/// Whether the worker is still there when a call of it was counted, or none came.
fn lives_on(context: &Context<'_>, target: &Target) -> bool {
    let counted = || {
        let mut counters = context.grafter.counters(target).ok()??;
        let reading = counters.read().ok()??;
        let own = reading.own.map_or(0, |own| own.returned);
        Some(
            own + reading
                .rpcs
                .iter()
                .map(|rpc| rpc.calls.returned)
                .sum::<u64>(),
        )
    };
    let before = counted();
    let deadline = context.clock.now() + CANARY;
    loop {
        context.clock.sleep(PAUSE);
        if let Err(GraftError::WorkerGone { .. }) = context.grafter.status(target) {
            return false;
        }
        if counted() > before || context.clock.now() >= deadline {
            return true;
        }
    }
}

fn begin(context: &Context<'_>, target: &Target) -> Result<Outcome, GraftError> {
    let receipt = context.grafter.observe(target)?;
    if receipt.already {
        return Ok((ObserveOutcome::Already, Vec::new()));
    }
    tracing::info!(pid = target.pid, stops_ns = ?receipt.stops_ns, "observed");
    Ok((ObserveOutcome::Observed, receipt.stops_ns))
}

fn end(context: &Context<'_>, target: &Target) -> Result<Outcome, GraftError> {
    let receipt = context.grafter.leave(target)?;
    let outcome = match (receipt.nothing, receipt.restored) {
        (true, _) => ObserveOutcome::Already,
        (false, true) => ObserveOutcome::Restored,
        (false, false) => ObserveOutcome::Off {
            reason: receipt.reason.unwrap_or_default(),
        },
    };
    tracing::info!(pid = target.pid, ?outcome, "not observed any more");
    Ok((outcome, receipt.stops_ns))
}

/// The functions that are meant; none named for all of them.
fn functions<'a>(
    context: &Context<'_>,
    node: &'a Node,
    request: &ObserveRequest,
) -> Result<Vec<&'a Function>, AgentError> {
    if request.functions.is_empty() {
        let of_engine = |f: &&Function| request.engine.is_none() || f.engine == request.engine;
        let native = |f: &&Function| f.workers.iter().any(|w| w.kind == WorkerKind::Native);
        return Ok(node
            .functions
            .iter()
            .filter(of_engine)
            .filter(native)
            .collect());
    }
    let mut all: Vec<&Function> = Vec::new();
    for name in &request.functions {
        let found = select::named(node, name, request.engine);
        for function in found.map_err(|error| context.explained(error))? {
            if request.on
                && let Err(error @ AgentError::NotNative { .. }) = select::native_workers(function)
            {
                return Err(error);
            }
            if !all.iter().any(|known| std::ptr::eq(*known, function)) {
                all.push(function);
            }
        }
    }
    Ok(all)
}
