//! Un-fusing an edge in all of a function's workers.
//!
//! The safe direction: nothing is checked beforehand that could keep other
//! workers from being reverted, and where a worker can't be stopped (somebody
//! traces it), its gate is switched off, which needs no stop.

use super::Context;
use crate::api::{EdgeRequest, ErrorInfo, RevertOutcome, RevertReport, RevertedWorker};
use crate::canary;
use crate::discover::{Function, Node, Worker};
use crate::error::{AgentError, graft_info};
use crate::grafter::{GraftError, RevertReceipt, Target};
use crate::select;

/// Un-fuses `request.callee` in every native worker of `request.caller`.
///
/// # Errors
/// What [`select`] finds wrong with the names; a callee that is no function
/// (any more) is taken as long as it is fused somewhere.
/// [`AgentError::RevertIncomplete`], with a report, where a worker could not
/// be reverted.
pub fn revert(
    context: &Context<'_>,
    node: &Node,
    request: &EdgeRequest,
) -> Result<RevertReport, AgentError> {
    let (caller, callee) = names(context, node, request)?;
    let mut report = RevertReport {
        caller: caller.label(),
        callee,
        engine: caller.engine,
        nothing: false,
        workers: Vec::new(),
        notes: Vec::new(),
    };
    let workers = match select::native_workers(caller) {
        Ok(workers) => workers,
        Err(AgentError::NoWorkers { name }) => {
            report.nothing = true;
            report
                .notes
                .push(format!("function {name} has no running worker"));
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    let targets: Vec<Target> = workers.iter().map(|(_, target)| target.clone()).collect();
    let claim = context.grafter.claim(&targets);
    for (worker, target) in workers {
        let refused = claim.as_ref().err();
        report.workers.push(revert_one(
            context,
            worker,
            &target,
            &report.callee,
            refused,
        ));
    }
    report
        .notes
        .extend(report.workers.iter().filter_map(unjournaled));
    conclude(report)
}

fn unjournaled(worker: &RevertedWorker) -> Option<String> {
    let why = worker.receipt.as_ref()?.journal.as_ref()?;
    Some(format!(
        "worker {} is reverted, and the journal does not know of it (its own record does): {why}",
        worker.pid
    ))
}

fn conclude(mut report: RevertReport) -> Result<RevertReport, AgentError> {
    let first = report
        .workers
        .iter()
        .find_map(|worker| match &worker.outcome {
            RevertOutcome::Failed { error } => Some(error.clone()),
            _ => None,
        });
    if let Some(first) = first {
        return Err(AgentError::RevertIncomplete {
            first,
            report: Box::new(report),
        });
    }
    let untouched =
        |w: &RevertedWorker| matches!(w.outcome, RevertOutcome::Nothing | RevertOutcome::Gone);
    report.nothing = report.workers.iter().all(untouched);
    Ok(report)
}

/// The caller, and the callee's name as it is spelled in the workers.
fn names<'a>(
    context: &Context<'_>,
    node: &'a Node,
    request: &EdgeRequest,
) -> Result<(&'a Function, String), AgentError> {
    let error = match select::edge(node, &request.caller, &request.callee, request.engine) {
        Ok(edge) => return Ok((edge.caller, edge.name)),
        Err(error) => context.explained(error),
    };
    if matches!(error, AgentError::Graft(_)) {
        return Err(error);
    }
    // The callee may be out of the configuration, or its engine not clear, and
    // still be fused.
    let callers = select::named(node, &request.caller, request.engine)?;
    let [caller] = callers.as_slice() else {
        return Err(error);
    };
    let statuses = caller
        .workers
        .iter()
        .filter_map(Worker::target)
        .filter_map(|target| context.grafter.status(&target).ok().flatten());
    let mut fused: Vec<String> = statuses
        .flat_map(|status| status.grafts)
        .map(|graft| graft.callee)
        .collect();
    fused.sort();
    fused.dedup();
    let exact = fused.iter().find(|name| **name == request.callee);
    let found = exact.or_else(|| {
        let mut like = fused
            .iter()
            .filter(|name| name.eq_ignore_ascii_case(&request.callee));
        like.next().filter(|_| like.next().is_none())
    });
    found.map(|name| (*caller, name.clone())).ok_or(error)
}

fn revert_one(
    context: &Context<'_>,
    worker: &Worker,
    target: &Target,
    callee: &str,
    refused: Option<&GraftError>,
) -> RevertedWorker {
    let before = context.grafter.status(target).ok().flatten();
    let fused_calls = canary::edge(before.as_ref(), callee).map(|graft| graft.counters.fused_calls);
    let began = context.clock.now();
    let reverted = match refused {
        None => context.grafter.revert(target, callee),
        Some(error) => Err(error.clone()),
    };
    if let Ok(RevertReceipt { nothing: false, .. }) = &reverted {
        let took = context.clock.now().duration_since(began);
        context.observer.planning.reverted(took);
    }
    let (outcome, receipt) = match reverted {
        Ok(receipt) => (outcome(&receipt), Some(receipt)),
        Err(GraftError::WorkerGone { .. }) => (RevertOutcome::Gone, None),
        Err(error) => {
            let error = gate_off_instead(context, target, callee, &error);
            (RevertOutcome::Failed { error }, None)
        }
    };
    tracing::info!(pid = worker.pid, callee, ?outcome, "revert");
    RevertedWorker {
        pid: worker.pid,
        pid_inside: worker.pid_inside,
        container: worker.container_short(),
        outcome,
        receipt,
        fused_calls,
    }
}

fn outcome(receipt: &RevertReceipt) -> RevertOutcome {
    if receipt.nothing {
        RevertOutcome::Nothing
    } else if receipt.restored {
        RevertOutcome::Restored
    } else {
        RevertOutcome::GateOff
    }
}

fn gate_off_instead(
    context: &Context<'_>,
    target: &Target,
    callee: &str,
    error: &GraftError,
) -> ErrorInfo {
    let mut info = graft_info(error);
    info.message = match context.grafter.set_gate(target, callee, false) {
        Ok(()) => format!("{} (its gate is off: calls take the RPC)", info.message),
        Err(gate) => format!(
            "{} (nor could its gate be switched off: {gate})",
            info.message
        ),
    };
    info
}
