//! The requests that only read.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Context, missing_capabilities};
use crate::api::{
    Container, Edge, EdgeRequest, EdgeTotals, EdgeWorker, ExplainRequest, Explanation, Function,
    FusedEdge, Ps, Status, UnquarantineReport, Worker, WorkerKind,
};
use crate::canary::rpc_calls;
use crate::discover::docker::Description;
use crate::discover::{self, Node};
use crate::error::{AgentError, graft_info};
use crate::grafter::{GraftError, Grafter, Target, Wanted, WorkerStatus};
use crate::select;

/// Functions and workers, with what is fused in each.
#[must_use]
pub fn ps(
    context: &Context<'_>,
    node: Node,
    containers: &HashMap<String, Description>,
    docker_note: Option<String>,
) -> Ps {
    let mut notes = node.notes;
    notes.extend(docker_note);
    // An agent in a pid namespace of its own may well be meant to see only the
    // node that is in there with it.
    let lacking = missing_capabilities(context.proc_root);
    for missing in lacking
        .iter()
        .filter(|m| m.required() || node.functions.is_empty())
    {
        notes.push(format!(
            "the agent lacks {}, needed to {}: start it with {}",
            missing.capability, missing.purpose, missing.flag
        ));
    }
    let functions = node
        .functions
        .into_iter()
        .map(|function| Function {
            workers: function
                .workers
                .into_iter()
                .filter_map(|found| worker(context, found, containers))
                .collect(),
            name: function.name,
            id: function.id,
            engine: function.engine,
            min_workers: function.min_workers,
            max_workers: function.max_workers,
        })
        .collect();
    Ps { functions, notes }
}

/// `None` where the worker has exited since the scan.
fn worker(
    context: &Context<'_>,
    found: discover::Worker,
    containers: &HashMap<String, Description>,
) -> Option<Worker> {
    let mut problem = None;
    let mut build_id = None;
    let mut fused = Vec::new();
    let mut observed = false;
    if let Some(target) = found.target() {
        match read_worker(context.grafter, &target) {
            Ok((id, status)) => {
                build_id = id;
                fused = status.as_ref().map(fused_edges).unwrap_or_default();
                observed = status.is_some_and(|status| status.observing);
            }
            Err(GraftError::WorkerGone { .. }) => return None,
            Err(error) => problem = Some(graft_info(&error)),
        }
    }
    let container = found.container.map(|id| {
        let known = containers.get(&id).cloned().unwrap_or_default();
        Container {
            id,
            name: known.name,
            image: known.image,
            labels: known.labels,
        }
    });
    Some(Worker {
        pid: found.pid,
        pid_inside: found.pid_inside,
        start_time: found.start_time,
        fprocess_id: Some(found.fprocess_id),
        client_id: found.client_id,
        container,
        kind: found.kind,
        library: found.library.map(|path| path.display().to_string()),
        build_id,
        threads: found.threads,
        traced_by: found.tracer,
        fused,
        observed,
        problem,
    })
}

fn read_worker(
    grafter: &dyn Grafter,
    target: &Target,
) -> Result<(Option<String>, Option<WorkerStatus>), GraftError> {
    Ok((grafter.build_id(target)?, grafter.status(target)?))
}

fn fused_edges(status: &WorkerStatus) -> Vec<FusedEdge> {
    let edge = |graft: &crate::grafter::GraftStatus| FusedEdge {
        callee: graft.callee.clone(),
        gate_on: graft.gate_on,
        windows_in_place: graft.windows_in_place,
        state: graft.state,
    };
    status.grafts.iter().map(edge).collect()
}

/// All edges that are in any worker, with their counters.
#[must_use]
pub fn status(context: &Context<'_>, node: Node) -> Status {
    let mut notes = node.notes;
    let mut edges: BTreeMap<(String, String, Option<i32>), Vec<EdgeWorker>> = BTreeMap::new();
    for function in &node.functions {
        for worker in &function.workers {
            let Some(target) = worker.target() else {
                continue;
            };
            let status = match context.grafter.status(&target) {
                Ok(Some(status)) => status,
                Ok(None) | Err(GraftError::WorkerGone { .. }) => continue,
                Err(error) => {
                    notes.push(format!("worker {}: {error}", worker.pid));
                    continue;
                }
            };
            for graft in status.grafts {
                let key = (function.label(), graft.callee.clone(), function.engine);
                edges.entry(key).or_default().push(EdgeWorker {
                    pid: worker.pid,
                    container: worker.container_short(),
                    bridge_version: status.bridge_version,
                    mapped_bytes: status.mapped_bytes,
                    graft,
                });
            }
        }
    }
    let edges = edges
        .into_iter()
        .map(|((caller, callee, engine), workers)| Edge {
            caller,
            callee,
            engine,
            totals: totals(&workers),
            workers,
        })
        .collect();
    Status {
        edges,
        quarantined: context.watch.quarantine.all(),
        notes,
    }
}

/// Lifts an edge's quarantine. It stays as it is in the workers, an RPC, until
/// it is patched.
///
/// # Errors
/// What [`select`] finds wrong with the names.
pub fn unquarantine(
    context: &Context<'_>,
    node: &Node,
    request: &EdgeRequest,
) -> Result<UnquarantineReport, AgentError> {
    let select::Edge { caller, name, .. } =
        select::edge(node, &request.caller, &request.callee, request.engine)
            .map_err(|error| context.explained(error))?;
    let label = caller.label();
    // First: a crash that is still in the worker would be found once more.
    for (_, target) in select::native_workers(caller).unwrap_or_default() {
        match context.grafter.forget_crash(&target, &name) {
            Ok(()) | Err(GraftError::WorkerGone { .. }) => {}
            Err(error) => {
                tracing::warn!(pid = target.pid, %error, "its crash can't be forgotten");
            }
        }
    }
    let was = context
        .watch
        .quarantine
        .remove(caller.engine, &label, &name);
    if let Some(was) = &was {
        tracing::warn!(
            caller = label,
            callee = name,
            how = was.how,
            "unquarantined"
        );
    }
    Ok(UnquarantineReport {
        caller: label,
        callee: name,
        was,
    })
}

fn totals(workers: &[EdgeWorker]) -> EdgeTotals {
    let mut totals = EdgeTotals::default();
    let (mut weighted, mut weight) = (0.0, 0.0);
    for counters in workers.iter().map(|worker| &worker.graft.counters) {
        totals.fused_calls = totals.fused_calls.saturating_add(counters.fused_calls);
        totals.fused_errors = totals.fused_errors.saturating_add(counters.fused_errors);
        totals.rpc_calls = totals.rpc_calls.saturating_add(rpc_calls(counters));
        if let Some(mean) = counters.fused_ns_mean {
            // A mean of nanoseconds: what f64 rounds away does not matter.
            #[expect(clippy::cast_precision_loss, reason = "a weight")]
            let calls = counters.fused_calls as f64;
            weighted += mean * calls;
            weight += calls;
        }
    }
    totals.fused_ns_mean = (weight > 0.0).then(|| weighted / weight);
    totals
}

/// Plans an edge for the first of the caller's workers.
///
/// # Errors
/// What [`select`] finds wrong with the names, or [`AgentError::Graft`].
pub fn explain(
    context: &Context<'_>,
    node: &Node,
    request: &ExplainRequest,
) -> Result<Explanation, AgentError> {
    let select::Edge {
        caller,
        callee,
        name,
    } = select::edge(node, &request.caller, &request.callee, request.engine)
        .map_err(|error| context.explained(error))?;
    let callers = select::native_workers(caller)?;
    let callees = select::native_workers(callee)?;
    let mut notes: Vec<String> = other_kinds(caller).into_iter().collect();
    notes.extend(mixed_builds(context.grafter, caller, &callers));
    notes.extend(mixed_builds(context.grafter, callee, &callees));
    notes.extend(traced(&callers));
    let edge = (caller.label(), callee.label());
    let wanted = Wanted {
        allowed: context.policy.allowed(&edge.0, &edge.1),
        guard: request.guard || context.policy.guards(&edge.0, &edge.1),
    };
    let mut last = None;
    for (caller_worker, caller_target) in &callers {
        for (callee_worker, callee_target) in newest_first(&callees) {
            match context
                .grafter
                .explain(caller_target, callee_target, &name, wanted)
            {
                Ok(explained) => {
                    return Ok(Explanation {
                        caller: caller.label(),
                        callee: name,
                        caller_pid: caller_worker.pid,
                        callee_pid: callee_worker.pid,
                        text: explained.text,
                        plan: explained.plan,
                        refused: explained.refused.map(|refused| graft_info(&refused.into())),
                        notes,
                    });
                }
                Err(error @ GraftError::WorkerGone { .. }) => last = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
    }
    Err(last.map_or_else(
        || AgentError::NoWorkers {
            name: caller.label(),
        },
        AgentError::from,
    ))
}

/// Workers by start time, latest first: after a deployment the newest runs
/// the code that is meant to run.
pub(super) fn newest_first<'a, 'b>(
    workers: &'b [(&'a discover::Worker, Target)],
) -> Vec<(&'a discover::Worker, &'b Target)> {
    let mut sorted: Vec<_> = workers
        .iter()
        .map(|(worker, target)| (*worker, target))
        .collect();
    sorted.sort_by_key(|(worker, _)| (std::cmp::Reverse(worker.start_time), worker.pid));
    sorted
}

/// A note for workers of the function that are not native, if it has native
/// ones too.
pub(super) fn other_kinds(function: &discover::Function) -> Option<String> {
    let others: Vec<String> = function
        .workers
        .iter()
        .filter(|worker| worker.kind != WorkerKind::Native)
        .map(|worker| worker.pid.to_string())
        .collect();
    (!others.is_empty()).then(|| {
        format!(
            "left out, since they are not native: workers {}",
            others.join(", ")
        )
    })
}

/// A note for a function whose workers run different builds.
pub(super) fn mixed_builds(
    grafter: &dyn Grafter,
    function: &discover::Function,
    workers: &[(&discover::Worker, Target)],
) -> Option<String> {
    if workers.len() < 2 {
        return None;
    }
    let builds: BTreeSet<String> = workers
        .iter()
        .filter_map(|(_, target)| grafter.build_id(target).ok())
        .map(|id| id.unwrap_or_else(|| "without build-id".to_owned()))
        .collect();
    (builds.len() > 1).then(|| {
        let builds: Vec<String> = builds.into_iter().collect();
        format!(
            "workers of {} run different builds: {}",
            function.label(),
            builds.join(", ")
        )
    })
}

fn traced(workers: &[(&discover::Worker, Target)]) -> Vec<String> {
    let note = |(worker, _): &(&discover::Worker, Target)| {
        let tracer = worker.tracer.as_ref()?;
        Some(format!(
            "worker {} is traced by {} (pid {}): it can't be patched meanwhile",
            worker.pid, tracer.name, tracer.pid
        ))
    };
    workers.iter().filter_map(note).collect()
}
