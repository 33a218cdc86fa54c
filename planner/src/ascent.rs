//! A good set where there are too many candidates for the exact solver.
//!
//! With everybody else's trees as they are, the best tree of one root is a
//! knapsack on a tree: a path that is fused saves its own overhead and takes from
//! its callee's own workers what a call is worth there. Root after root gets its
//! best, again and again, as long as the whole gains by it; from several starts.

use crate::flow::{Model, Outcome};

/// Parts that a memory limit is counted in.
const UNITS: usize = 128;
/// Most rounds over all roots.
const ROUNDS: usize = 8;
/// Prices of processor time that are tried where there is too little of it.
const PRICES: usize = 16;
/// Candidates from which on it is a large graph.
const LARGE: usize = 2000;
/// Candidates up to which single changes are tried one by one at the end.
const SINGLE_UP_TO: usize = 200;

/// Finds a good selection that breaks no constraint (of `starts`, those that
/// break one are not taken).
pub(crate) fn climb(model: &Model<'_>, required: &[bool], starts: &[Vec<bool>]) -> Vec<bool> {
    let mut best: Option<(f64, Vec<bool>)> = None;
    let mut climbed = false;
    for start in starts {
        let outcome = model.outcome(start);
        if outcome.violations > 0 || !holds(required, start) {
            continue;
        }
        // What is there is given up for nothing worse.
        if best
            .as_ref()
            .is_none_or(|(most, _)| outcome.value() > *most)
        {
            best = Some((outcome.value(), start.clone()));
        }
        // Of a large graph one climb has to do.
        let ways = match model.forest.candidates.len() {
            0..=LARGE => &[false, true][..],
            _ if climbed => continue,
            _ => &[false][..],
        };
        climbed = true;
        for &upwards in ways {
            let mut selected = start.clone();
            let value = from(model, required, &mut selected, upwards);
            if best.as_ref().is_none_or(|(most, _)| value > *most) {
                best = Some((value, selected));
            }
        }
    }
    best.map_or_else(|| required.to_vec(), |(_, selected)| selected)
}

/// Whether all that is required is there.
fn holds(required: &[bool], selected: &[bool]) -> bool {
    required.iter().zip(selected).all(|(r, s)| !r || *s)
}

fn from(model: &Model<'_>, required: &[bool], selected: &mut Vec<bool>, upwards: bool) -> f64 {
    let mut roots: Vec<usize> = (0..model.forest.of_root.len())
        .filter(|&root| !model.forest.of_root[root].is_empty())
        .collect();
    let of = |root: &usize| model.calls.executions[*root];
    roots.sort_by(|a, b| of(b).total_cmp(&of(a)).then(a.cmp(b)));
    if upwards {
        roots.reverse();
    }
    let mut spilled = model.all_spilled(selected);
    let mut now = model.outcome_of(selected, &spilled);
    for _ in 0..ROUNDS {
        let before = now.value();
        // As it is at the begin of the round: what changes in it is small beside
        // all, and the whole is looked at before it is kept.
        let batches = match model.forest.candidates.len() {
            0..=LARGE => 64,
            _ => 8,
        };
        for batch in roots.chunks(roots.len().div_ceil(batches).max(1)) {
            let worth = model.worth(selected, &spilled);
            let mut next = selected.clone();
            for &root in batch {
                tree(model, required, root, now.own[root], &worth, &mut next);
            }
            try_it(model, selected, &mut spilled, &mut now, next, batch);
        }
        let little = match model.forest.candidates.len() {
            0..=LARGE => 1e-12,
            _ => 1e-4,
        };
        if now.value() <= before + little * before.abs() {
            break;
        }
    }
    if model.forest.candidates.len() <= SINGLE_UP_TO {
        single(model, required, selected, &mut spilled, &mut now);
    }
    now.value()
}

/// Keeps `next` if it is better.
fn try_it(
    model: &Model<'_>,
    selected: &mut Vec<bool>,
    spilled: &mut [Vec<(usize, f64)>],
    now: &mut Outcome,
    next: Vec<bool>,
    roots: &[usize],
) -> bool {
    if next == *selected {
        return false;
    }
    let before: Vec<_> = roots.iter().map(|&r| spilled[r].clone()).collect();
    for &root in roots {
        model.spill_again(root, &next, spilled);
    }
    let outcome = model.outcome_of(&next, spilled);
    if outcome.violations == 0 && outcome.value() > now.value() + 1e-12 {
        *now = outcome;
        *selected = next;
        return true;
    }
    for (&root, old) in roots.iter().zip(before) {
        spilled[root] = old;
    }
    false
}

/// A root's best tree, with everything else as it is.
fn tree(
    model: &Model<'_>,
    required: &[bool],
    root: usize,
    own: f64,
    worth: &[f64],
    selected: &mut [bool],
) {
    let calls = model.calls;
    let graph = calls.graph;
    let range = model.forest.of_root[root].clone();
    let gains: Vec<f64> = range
        .clone()
        .map(|c| {
            let candidate = &model.forest.candidates[c];
            let callee = candidate.function();
            let onward: f64 = calls.out[callee]
                .iter()
                .map(|&(edge, n)| n * worth[graph.edges[edge].callee])
                .sum();
            let (on, off) = model.price[c];
            let a_call = model.saves(c) + onward - worth[callee];
            own * candidate.per_root * a_call - on + off
        })
        .collect();
    let busy: Vec<f64> = range
        .clone()
        .map(|c| {
            let candidate = &model.forest.candidates[c];
            own * candidate.per_root * graph.functions[candidate.function()].own_s
        })
        .collect();
    let alone = own * graph.functions[root].own_s;
    let (room, room_kept) = model.busy_room(root);
    let mut best = within(model, required, root, &gains, &busy, room - alone);
    if room_kept > room {
        // What is there may stay where nothing new would fit.
        let kept: Vec<f64> = range
            .clone()
            .zip(&gains)
            .map(|(c, gain)| match model.forest.candidates[c].fused {
                true => *gain,
                false => f64::NEG_INFINITY,
            })
            .collect();
        let other = within(model, required, root, &kept, &busy, room_kept - alone);
        let sum = |tree: &[bool]| -> f64 {
            let chosen = tree.iter().zip(&gains).filter(|(c, _)| **c);
            chosen.map(|(_, gain)| gain).sum()
        };
        if sum(&other) > sum(&best) {
            best = other;
        }
    }
    for (c, chosen) in range.zip(best) {
        selected[c] = chosen;
    }
}

/// The best tree for these gains, that keeps processors busy for no longer than
/// there is room.
fn within(
    model: &Model<'_>,
    required: &[bool],
    root: usize,
    gains: &[f64],
    busy: &[f64],
    room: f64,
) -> Vec<bool> {
    let first = model.forest.of_root[root].start;
    let required = &required[first..first + gains.len()];
    let knapsack = |price: f64| -> (Vec<bool>, f64) {
        let priced: Vec<f64> = gains.iter().zip(busy).map(|(g, b)| g - price * b).collect();
        let chosen = best_tree(model, required, root, &priced);
        let taken: f64 = chosen
            .iter()
            .zip(busy)
            .filter(|(c, _)| **c)
            .map(|(_, b)| b)
            .sum();
        (chosen, taken)
    };
    let (mut chosen, taken) = knapsack(0.0);
    if taken > room {
        // Processor time gets a price, as low as it may be.
        let most = gains
            .iter()
            .zip(busy)
            .map(|(g, b)| g / b.max(1e-12))
            .fold(0.0, f64::max);
        let (mut low, mut high) = (0.0, most * 2.0);
        chosen = required.to_vec();
        for _ in 0..PRICES {
            let price = f64::midpoint(low, high);
            let (tree, taken) = knapsack(price);
            if taken <= room {
                chosen = tree;
                high = price;
            } else {
                low = price;
            }
        }
        fill(model, root, gains, busy, room, &mut chosen);
    }
    chosen
}

/// Adds what still fits, the most gainful first.
fn fill(
    model: &Model<'_>,
    root: usize,
    gains: &[f64],
    busy: &[f64],
    room: f64,
    chosen: &mut [bool],
) {
    let range = model.forest.of_root[root].clone();
    let graph = model.calls.graph;
    let bytes = |i: usize| {
        let function = model.forest.candidates[range.start + i].function();
        graph.functions[function].graft_bytes
    };
    let sum = |chosen: &[bool]| -> (f64, u64) {
        let on = (0..chosen.len()).filter(|&i| chosen[i]);
        on.fold((0.0, 0), |(b, m), i| (b + busy[i], m + bytes(i)))
    };
    loop {
        let (taken, held) = sum(chosen);
        let fits = |&i: &usize| {
            let parent = model.forest.candidates[range.start + i].parent;
            !chosen[i]
                && gains[i] > 0.0
                && parent.is_none_or(|p| chosen[p - range.start])
                && taken + busy[i] <= room
                && graph.functions[root]
                    .memory_room
                    .is_none_or(|most| held + bytes(i) <= most)
        };
        let next = (0..chosen.len())
            .filter(fits)
            .max_by(|&a, &b| gains[a].total_cmp(&gains[b]));
        match next {
            Some(i) => chosen[i] = true,
            None => return,
        }
    }
}

/// The best closed subtree for these gains and the root's memory: over the
/// preorder from its end, a path is either left out with all below it or taken.
fn best_tree(model: &Model<'_>, required: &[bool], root: usize, gains: &[f64]) -> Vec<bool> {
    let range = model.forest.of_root[root].clone();
    let functions = &model.calls.graph.functions;
    let n = range.len();
    let (units, weight): (usize, Vec<usize>) = match functions[root].memory_room {
        None => (0, vec![0; n]),
        Some(room) => {
            let bytes = |c: usize| functions[model.forest.candidates[c].function()].graft_bytes;
            // What is required has its place, to the byte.
            let taken = range
                .clone()
                .filter(|&c| required[c - range.start])
                .map(bytes);
            let room = room.saturating_sub(taken.fold(0, u64::saturating_add));
            // Rounded up: what fits in units fits in bytes.
            let unit = (room / UNITS as u64).max(1);
            let of = |c: usize| match required[c - range.start] {
                true => 0,
                false => usize::try_from(bytes(c).div_ceil(unit)).unwrap_or(usize::MAX),
            };
            (
                usize::try_from(room / unit).unwrap_or(UNITS),
                range.clone().map(of).collect(),
            )
        }
    };
    let width = units + 1;
    let mut best = vec![0.0; (n + 1) * width];
    for i in (0..n).rev() {
        let behind = i + 1 + model.forest.candidates[range.start + i].below;
        for left in 0..width {
            let without = best[behind * width + left];
            let with = match left.checked_sub(weight[i]) {
                Some(rest) => gains[i] + best[(i + 1) * width + rest],
                None => f64::NEG_INFINITY,
            };
            best[i * width + left] = match required[i] {
                true => with,
                false => without.max(with),
            };
        }
    }
    let mut chosen = vec![false; n];
    let (mut i, mut left) = (0, units);
    while i < n {
        let behind = i + 1 + model.forest.candidates[range.start + i].below;
        if required[i] || best[i * width + left] > best[behind * width + left] {
            chosen[i] = true;
            left -= weight[i];
            i += 1;
        } else {
            i = behind;
        }
    }
    chosen
}

/// Single changes, one by one, and exchanges of two, as long as one helps.
fn single(
    model: &Model<'_>,
    required: &[bool],
    selected: &mut Vec<bool>,
    spilled: &mut [Vec<(usize, f64)>],
    now: &mut Outcome,
) {
    let candidates = &model.forest.candidates;
    let n = candidates.len();
    // With a path comes what it takes; with one that goes, what lies below it.
    let flip = |selected: &mut Vec<bool>, roots: &mut Vec<usize>, c: usize| {
        if selected[c] {
            selected[c..=c + candidates[c].below].fill(false);
        } else {
            let mut above = Some(c);
            while let Some(one) = above {
                selected[one] = true;
                above = candidates[one].parent;
            }
        }
        roots.push(candidates[c].root());
    };
    for _ in 0..ROUNDS {
        let mut better = false;
        let mut moves: Vec<Vec<usize>> = (0..n).map(|c| vec![c]).collect();
        if n <= SINGLE_UP_TO / 4 {
            moves.extend((0..n).flat_map(|a| (0..a).map(move |b| vec![b, a])));
        }
        for flips in moves {
            let (mut next, mut roots) = (selected.clone(), Vec::new());
            for c in flips {
                flip(&mut next, &mut roots, c);
            }
            roots.sort_unstable();
            roots.dedup();
            if holds(required, &next) {
                better |= try_it(model, selected, spilled, now, next, &roots);
            }
        }
        if !better {
            break;
        }
    }
}
