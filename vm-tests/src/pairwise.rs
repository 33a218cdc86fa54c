//! Few rows that contain every combination of any two values.
//!
//! A fault that shows only where two conditions meet is found by rows in which
//! every two values of different parameters meet somewhere: some fifteen rows
//! instead of a product of hundreds. With `strength` 3 every three do.
//!
//! Two things are not as in a textbook's covering array:
//!
//! - Some rows cannot be (a parameter that an old kernel does not have): they
//!   are never chosen, and combinations that only they contain are not asked
//!   for.
//! - Some values end the trial before it gets to the rest (a setting under
//!   which the agent must refuse). Such a row says nothing about its other
//!   values among themselves: it counts only for combinations with the value
//!   that ends it.
//!
//! Greedy, and the same rows each time: the row that has most of what is
//! missing, the first of equals.

use std::collections::HashSet;

/// A row: for each parameter the index of its value.
pub type Row = Vec<usize>;

/// A combination: parameters with their values, ascending by parameter.
type Combination = Vec<(usize, usize)>;

/// What is asked for.
pub struct Problem<'a> {
    /// For each parameter the number of its values.
    pub levels: &'a [usize],
    /// How many values of a combination: 2 for pairs.
    pub strength: usize,
    /// Whether a row can be.
    pub possible: &'a dyn Fn(&[usize]) -> bool,
    /// The parameter whose value ends a row's trial early, if one does.
    pub ended_by: &'a dyn Fn(&[usize]) -> Option<usize>,
}

/// The rows.
pub fn rows(problem: &Problem<'_>) -> Vec<Row> {
    let candidates: Vec<(Row, Vec<Combination>)> = product(problem.levels)
        .into_iter()
        .filter(|row| (problem.possible)(row))
        .map(|row| {
            let shown = shown(problem, &row);
            (row, shown)
        })
        .collect();
    let mut missing: HashSet<&Combination> =
        candidates.iter().flat_map(|(_, shown)| shown).collect();
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let news = |shown: &[Combination]| shown.iter().filter(|c| missing.contains(c)).count();
        // The last of equals by `max_by_key` is the first of them reversed.
        let Some((row, shown)) = candidates.iter().rev().max_by_key(|(_, s)| news(s)) else {
            break;
        };
        for combination in shown {
            missing.remove(combination);
        }
        chosen.push(row.clone());
    }
    chosen
}

/// All rows, in ascending order.
fn product(levels: &[usize]) -> Vec<Row> {
    levels.iter().fold(vec![Row::new()], |rows, &values| {
        rows.iter()
            .flat_map(|row| (0..values).map(move |v| [&row[..], &[v]].concat()))
            .collect()
    })
}

/// The combinations that a row says something about.
fn shown(problem: &Problem<'_>, row: &[usize]) -> Vec<Combination> {
    let ended = (problem.ended_by)(row);
    let mut all = vec![Combination::new()];
    for (parameter, &value) in row.iter().enumerate() {
        let with: Vec<Combination> = all
            .iter()
            .filter(|c| c.len() < problem.strength)
            .map(|c| [&c[..], &[(parameter, value)]].concat())
            .collect();
        all.extend(with);
    }
    all.retain(|c| {
        c.len() == problem.strength && ended.is_none_or(|p| c.iter().any(|(q, _)| *q == p))
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(levels: &[usize], strength: usize) -> Vec<Row> {
        rows(&Problem {
            levels,
            strength,
            possible: &|_| true,
            ended_by: &|_| None,
        })
    }

    /// Counted in another way than above.
    fn has(rows: &[Row], values: &[(usize, usize)]) -> bool {
        rows.iter()
            .any(|row| values.iter().all(|(p, v)| row[*p] == *v))
    }

    #[test]
    fn every_two_values_meet() {
        let levels = [2, 2, 3, 4, 2, 2, 3, 2];
        let rows = plain(&levels, 2);
        for p in 0..levels.len() {
            for q in p + 1..levels.len() {
                for v in 0..levels[p] {
                    for w in 0..levels[q] {
                        assert!(has(&rows, &[(p, v), (q, w)]), "{p}={v} {q}={w}");
                    }
                }
            }
        }
        // The two largest parameters alone need as many.
        assert!((12..=16).contains(&rows.len()), "{} rows", rows.len());
    }

    #[test]
    fn every_three_values_meet() {
        let rows = plain(&[2, 3, 2, 2], 3);
        for skipped in 0..4 {
            let levels = [2, 3, 2, 2];
            let three: Vec<usize> = (0..4).filter(|p| *p != skipped).collect();
            for values in product(&three.iter().map(|p| levels[*p]).collect::<Vec<_>>()) {
                let wanted: Vec<_> = three.iter().copied().zip(values).collect();
                assert!(has(&rows, &wanted), "{wanted:?}");
            }
        }
    }

    #[test]
    fn it_is_the_same_each_time() {
        assert_eq!(plain(&[3, 3, 2, 2], 2), plain(&[3, 3, 2, 2], 2));
    }

    #[test]
    fn rows_that_cannot_be_are_not_chosen() {
        // The first value of 0 knows only the first of 1.
        let possible = |row: &[usize]| row[0] != 0 || row[1] == 0;
        let rows = rows(&Problem {
            levels: &[2, 3, 2],
            strength: 2,
            possible: &possible,
            ended_by: &|_| None,
        });
        assert!(rows.iter().all(|r| possible(r)), "{rows:?}");
        assert!(has(&rows, &[(0, 1), (1, 2)]));
        assert!(has(&rows, &[(1, 1), (2, 1)]));
    }

    #[test]
    fn a_row_that_ends_early_says_nothing_about_the_rest() {
        let ended_by = |row: &[usize]| (row[0] == 1).then_some(0);
        let rows = rows(&Problem {
            levels: &[2, 2, 2],
            strength: 2,
            possible: &|_| true,
            ended_by: &ended_by,
        });
        let whole: Vec<Row> = rows.iter().filter(|r| r[0] == 0).cloned().collect();
        for (v, w) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            assert!(has(&whole, &[(1, v), (2, w)]), "{v} {w} in {rows:?}");
        }
        assert!(has(&rows, &[(0, 1), (1, 1)]));
        assert!(has(&rows, &[(0, 1), (2, 0)]));
    }
}
