//! The best set, by trying all of them; it shares nothing with the solver but
//! what a set comes to.

use crate::flow::Model;

/// Most sets that are tried.
const MOST: f64 = 30_000.0;

/// The value of the best set that breaks no constraint; `None` if there are too
/// many to try.
pub(super) fn best(model: &Model<'_>) -> Option<f64> {
    let n = model.forest.candidates.len();
    if sets(model) > MOST {
        return None;
    }
    let mut selected = vec![false; n];
    let mut best = f64::NEG_INFINITY;
    try_from(model, 0, &mut selected, &mut best);
    Some(best)
}

/// Closed sets: for each path, none, or it with those below it.
fn sets(model: &Model<'_>) -> f64 {
    let candidates = &model.forest.candidates;
    let mut of = vec![1.0_f64; candidates.len()];
    let mut all = 1.0;
    for c in (0..candidates.len()).rev() {
        let with = of[c];
        match candidates[c].parent {
            Some(parent) => of[parent] *= 1.0 + with,
            None => all *= 1.0 + with,
        }
    }
    all
}

fn try_from(model: &Model<'_>, from: usize, selected: &mut Vec<bool>, best: &mut f64) {
    if from == selected.len() {
        let outcome = model.outcome(selected);
        if outcome.violations == 0 {
            *best = best.max(outcome.value());
        }
        return;
    }
    try_from(
        model,
        from + 1 + model.forest.candidates[from].below,
        selected,
        best,
    );
    selected[from] = true;
    try_from(model, from + 1, selected, best);
    selected[from] = false;
}
