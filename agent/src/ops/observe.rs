//! Having functions observed, in all of their workers, and left alone again.
//!
//! ```text
//!  asked for ─► kept on disk ─► one worker of each function ─► it lives? ─► the others
//! ```
//!
//! What could not be done now, and workers that come later, are the observer's
//! affair ([`crate::observer`]): it asks again.

use std::time::Duration;

use super::Context;
use crate::api::{ObserveOutcome, ObserveReport, ObserveRequest, ObservedWorker, WorkerKind};
use crate::discover::{Function, Node};
use crate::error::{AgentError, graft_info};
use crate::grafter::{GraftError, Target};
use crate::observer::Rule;
use crate::select;

/// How long the first worker of a function is looked at before the others follow.
const CANARY: Duration = Duration::from_millis(100);

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
    Ok(carry_out(context, &functions, request.on))
}

/// The same for functions that are to be observed already: workers of theirs that
/// are not yet.
#[must_use]
pub fn catch_up(context: &Context<'_>, node: &Node) -> ObserveReport {
    let wanted = |f: &&Function| context.observer.wanted.wants(&f.label(), f.engine);
    let functions: Vec<&Function> = node.functions.iter().filter(wanted).collect();
    carry_out(context, &functions, true)
}

fn carry_out(context: &Context<'_>, functions: &[&Function], on: bool) -> ObserveReport {
    let mut report = ObserveReport {
        on,
        ..ObserveReport::default()
    };
    for function in functions {
        match select::native_workers(function) {
            Ok(workers) => {
                let targets: Vec<Target> = workers.into_iter().map(|(_, target)| target).collect();
                let outcomes = of_function(context, &targets, on);
                let with = |(target, (outcome, stops_ns)): (&Target, (_, _))| ObservedWorker {
                    function: function.label(),
                    engine: function.engine,
                    pid: target.pid,
                    outcome,
                    stops_ns,
                };
                report
                    .workers
                    .extend(targets.iter().zip(outcomes).map(with));
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

fn of_function(context: &Context<'_>, targets: &[Target], on: bool) -> Vec<Outcome> {
    let failed = |error: &GraftError| {
        let error = graft_info(error);
        (ObserveOutcome::Failed { error }, Vec::new())
    };
    let claim = context.grafter.claim(targets);
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
        let first = on && !proven && outcome.0 == ObserveOutcome::Observed;
        outcomes.push(outcome);
        if first {
            context.clock.sleep(CANARY);
            if let Err(GraftError::WorkerGone { pid }) = context.grafter.status(target) {
                let error = GraftError::Failed(format!(
                    "worker {pid}, the first one that was observed, has exited at once: the others are left alone"
                ));
                tracing::error!(pid, "exited right after observing began");
                outcomes.extend(targets[outcomes.len()..].iter().map(|_| failed(&error)));
                break;
            }
            proven = true;
        }
    }
    outcomes
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
