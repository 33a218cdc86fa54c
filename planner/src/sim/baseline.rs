//! What others would do.

use crate::flow::Model;

/// The edges with the most calls per second, one after the other, as long as each
/// fits; a path whose begin is not fused has to wait for it.
pub(super) fn by_count(model: &Model<'_>) -> Vec<bool> {
    let candidates = &model.forest.candidates;
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let rate = |c: &usize| {
        let candidate = &candidates[*c];
        model.calls.executions[candidate.root()] * candidate.per_root
    };
    order.sort_by(|a, b| rate(b).total_cmp(&rate(a)).then(a.cmp(b)));
    let mut selected = vec![false; candidates.len()];
    for c in order {
        if candidates[c].parent.is_some_and(|parent| !selected[parent]) {
            continue;
        }
        selected[c] = true;
        if model.outcome(&selected).violations > 0 {
            selected[c] = false;
        }
    }
    selected
}
