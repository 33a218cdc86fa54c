//! What a patch does once its workers have proven well: where calls were seen
//! to come through the entry of the worker's own routine, their sites are
//! rewritten in place by patching once more.
//!
//! Only a gain in speed is at stake: a worker for which it fails stays fused
//! as it is, and the report says why.

use crate::api::{PatchOutcome, PatchedWorker};
use crate::canary;
use crate::grafter::{GraftError, Grafter, PatchReceipt, Target};

/// Patches the workers of `fused` once more whose calls of `callee` came
/// through the routine's entry. Gives notes for people.
pub(super) fn rewrite(
    grafter: &dyn Grafter,
    callee: &str,
    targets: &[Target],
    workers: &mut [PatchedWorker],
    mut patch: impl FnMut(&Target) -> Result<PatchReceipt, GraftError>,
) -> Vec<String> {
    let mut notes = Vec::new();
    for worker in workers
        .iter_mut()
        .filter(|w| w.outcome == PatchOutcome::Fused)
    {
        let Some(target) = targets.iter().find(|t| t.pid == worker.pid) else {
            continue;
        };
        let seen = grafter.status(target).ok().flatten();
        if canary::edge(seen.as_ref(), callee).is_none_or(|graft| graft.seen.is_empty()) {
            continue;
        }
        match (patch(target), worker.receipt.as_mut()) {
            (Ok(more), Some(receipt)) => merge(receipt, more),
            (Ok(_) | Err(GraftError::WorkerGone { .. }), _) => {}
            (Err(error), _) => notes.push(format!(
                "worker {}: the sites of calls seen since could not be rewritten, they go \
                 through the entry of its own routine: {error}",
                worker.pid
            )),
        }
    }
    notes
}

fn merge(receipt: &mut PatchReceipt, more: PatchReceipt) {
    receipt.through_routine = more.through_routine;
    if more.already {
        return;
    }
    receipt.sites.extend(more.sites);
    receipt.commit_stop_ns = receipt.commit_stop_ns.max(more.commit_stop_ns);
    receipt.stops_ns.extend(more.stops_ns);
    receipt.disturbed.extend(more.disturbed);
}
