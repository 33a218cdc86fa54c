//! The best set, by a mixed-integer program.
//!
//! Which calls run where is linear in how much of the executions runs on each
//! path, and how much runs there is all or nothing:
//!
//! ```text
//!  e_v  of v's executions, the part that runs in its own workers      0 … 1
//!  f_p  of path p's calls if always fused, the part that runs there   0 … 1
//!  x_p  p is fused                                                    0 or 1
//!
//!  f_p ≤ x_p, f_p ≤ f_parent, f_p ≥ f_parent − (1 − x_p), x_p ≤ x_parent
//!  e_v = arrivals of v + what comes by RPC from every place
//!  memory and processors of each root's workers
//! ```
//!
//! All are parts of one, so that the numbers lie close together.

use microlp::{ComparisonOp, OptimizationDirection, Problem, SolveOptions, Variable};

use crate::flow::Model;

/// Shares of a function's calls below this come from nowhere.
const NOTHING: f64 = 1e-6;

/// What the solver found.
#[derive(Debug)]
pub(crate) struct Solved {
    pub(crate) selected: Vec<bool>,
    /// It is the best: proven.
    pub(crate) proven: bool,
}

/// Finds the best selection, as far as the time lasts. `None` if the solver gives
/// nothing, or if what the policy requires can't all be had.
pub(crate) fn solve(model: &Model<'_>, required: &[bool]) -> Option<Solved> {
    let calls = model.calls;
    let graph = calls.graph;
    let candidates = &model.forest.candidates;
    let scale = calls.overhead();
    if scale <= 0.0 {
        return None;
    }
    let mut problem = Problem::new(OptimizationDirection::Maximize);
    let own: Vec<Variable> = (0..graph.functions.len())
        .map(|_| problem.add_var(0.0, (0.0, 1.0)))
        .collect();
    // Calls per second on a path that is always fused.
    let full = |c: usize| calls.executions[candidates[c].root()] * candidates[c].per_root;
    let flow: Vec<Variable> = (0..candidates.len())
        .map(|c| problem.add_var(full(c) * model.saves(c) / scale, (0.0, 1.0)))
        .collect();
    let chosen: Vec<Variable> = (0..candidates.len())
        .map(|c| {
            let (on, off) = model.price[c];
            let objective = (off - on) / scale;
            match required[c] {
                true => problem.add_integer_var(objective, (1, 1)),
                false => problem.add_binary_var(objective),
            }
        })
        .collect();
    for (c, candidate) in candidates.iter().enumerate() {
        let above = candidate.parent.map_or(own[candidate.root()], |p| flow[p]);
        problem.add_constraint([(flow[c], 1.0), (chosen[c], -1.0)], ComparisonOp::Le, 0.0);
        problem.add_constraint([(flow[c], 1.0), (above, -1.0)], ComparisonOp::Le, 0.0);
        problem.add_constraint(
            [(flow[c], 1.0), (above, -1.0), (chosen[c], -1.0)],
            ComparisonOp::Ge,
            -1.0,
        );
        if let Some(parent) = candidate.parent {
            problem.add_constraint(
                [(chosen[c], 1.0), (chosen[parent], -1.0)],
                ComparisonOp::Le,
                0.0,
            );
        }
    }
    // Where each function's calls come from.
    let mut sources: Vec<Vec<(Variable, f64)>> = vec![Vec::new(); graph.functions.len()];
    let mut place = |function: usize, all: f64, here: Variable| {
        for &(edge, per_execution) in &calls.out[function] {
            let callee = graph.edges[edge].callee;
            let share = all * per_execution / calls.executions[callee].max(f64::MIN_POSITIVE);
            if share > NOTHING {
                sources[callee].push((here, share));
            }
        }
    };
    for (function, variable) in own.iter().enumerate() {
        place(function, calls.executions[function], *variable);
    }
    for (c, candidate) in candidates.iter().enumerate() {
        place(candidate.function(), full(c), flow[c]);
    }
    for (c, candidate) in candidates.iter().enumerate() {
        let callee = candidate.function();
        let share = full(c) / calls.executions[callee].max(f64::MIN_POSITIVE);
        if share > NOTHING {
            sources[callee].push((flow[c], -share));
        }
    }
    for (function, terms) in sources.into_iter().enumerate() {
        let all = calls.executions[function];
        let arrivals = match all > 0.0 {
            true => graph.functions[function].arrivals / all,
            false => 0.0,
        };
        let mut row = vec![(own[function], 1.0)];
        for (variable, share) in terms {
            match row.iter_mut().find(|(v, _)| *v == variable) {
                Some((_, sum)) => *sum -= share,
                None => row.push((variable, -share)),
            }
        }
        row.retain(|(_, factor)| factor.abs() > NOTHING);
        problem.add_constraint(row, ComparisonOp::Eq, arrivals);
    }
    for (root, function) in graph.functions.iter().enumerate() {
        let range = model.forest.of_root[root].clone();
        if range.is_empty() {
            continue;
        }
        if let Some(room) = function.memory_room {
            #[expect(clippy::cast_precision_loss, reason = "shares of a limit")]
            let part = |c: usize| {
                let bytes = graph.functions[candidates[c].function()].graft_bytes;
                bytes as f64 / (room as f64).max(1.0)
            };
            let row: Vec<_> = range.clone().map(|c| (chosen[c], part(c))).collect();
            problem.add_constraint(row, ComparisonOp::Le, 1.0);
        }
        let (room, kept) = model.busy_room(root);
        if room.is_finite() && room > 0.0 {
            let of_own = calls.executions[root] * function.own_s / room;
            let mut row = vec![(own[root], of_own)];
            row.extend(range.clone().map(|c| {
                let own_s = graph.functions[candidates[c].function()].own_s;
                (flow[c], full(c) * own_s / room)
            }));
            row.retain(|(_, factor)| *factor > NOTHING);
            // Each that is new takes the room that is only for what is there.
            let more = kept / room - 1.0;
            let new: Vec<usize> = range.filter(|&c| !candidates[c].fused).collect();
            if more > NOTHING {
                for c in new {
                    let mut row = row.clone();
                    row.push((chosen[c], more));
                    problem.add_constraint(row, ComparisonOp::Le, 1.0 + more);
                }
            }
            problem.add_constraint(row, ComparisonOp::Le, 1.0 + more);
        }
    }
    let mut options = SolveOptions::default();
    options.time_limit = Some(model.settings.exact_within());
    // What it can't solve, the other way is left for.
    let solution = problem.solve_with(options).ok()?.into_solution().ok()?;
    let proven = solution.status() == microlp::SolutionStatus::Optimal;
    let selected = chosen
        .iter()
        .map(|v| solution.var_value(*v) > 0.5)
        .collect();
    Some(Solved { selected, proven })
}
