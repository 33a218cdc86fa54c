//! The planner on graphs that were never measured: made up at random, and those
//! of published applications; beside the best that there is, and beside simpler
//! ways to decide.

mod baseline;
mod exhaustive;
mod generate;
mod load;
mod topology;

use std::collections::HashSet;
use std::time::Instant;

use serde::Serialize;

use crate::exact;
use crate::flow::Model;
use crate::forest::Forest;
use crate::graph::{Calls, Graph};
use crate::plan::{Search, choose};
use crate::settings::Settings;

pub use load::Flaps;

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Options {
    /// Graphs made up at random that are small enough for every set to be tried.
    pub graphs: usize,
    /// Middling ones, whose best the exact solver proves.
    pub middling: usize,
    /// Larger ones, for constraints and time alone.
    pub large: usize,
    /// Seed of all that is random.
    pub seed: u64,
    /// Hours of noisy load on each topology.
    pub hours: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            graphs: 500,
            middling: 40,
            large: 20,
            seed: 1,
            hours: 6,
        }
    }
}

/// How one way to decide did, beside the best.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Shares {
    /// Mean of its value as a share of the best.
    pub mean: f64,
    /// Half of the graphs gave less.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// Sets of it that broke a constraint.
    pub violations: usize,
    #[serde(skip)]
    all: Vec<f64>,
}

impl Shares {
    fn add(&mut self, value: f64, best: f64, violations: usize) {
        self.violations += usize::from(violations > 0);
        self.all.push(value / best);
    }

    fn done(&mut self) {
        self.all.sort_by(f64::total_cmp);
        self.median = self.all.get(self.all.len() / 2).copied().unwrap_or(0.0);
        #[expect(clippy::cast_precision_loss, reason = "a mean")]
        let count = self.all.len().max(1) as f64;
        self.mean = self.all.iter().sum::<f64>() / count;
        self.min = self.all.iter().copied().fold(f64::INFINITY, f64::min);
    }
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Graphs on which the best is known and is worth something.
    pub graphs: usize,
    /// Of them, those on which every set was tried.
    pub tried: usize,
    /// Those whose best the exact solver has proved.
    pub by_solver: usize,
    /// Of them, published topologies.
    pub topologies: usize,
    /// The planner as it is used.
    pub planner: Shares,
    /// Its heuristic alone.
    pub heuristic: Shares,
    /// Plans of the planner that the exact solver proved.
    pub proven: usize,
    /// Proven plans that were not the best: there must be none.
    pub disproved: usize,
    /// Fusing nothing.
    pub nothing: Shares,
    /// Fusing everything; what breaks a constraint counts as worth nothing.
    pub everything: Shares,
    /// Fusing the edges with the most calls, as long as they fit.
    pub by_count: Shares,
    /// Larger graphs.
    pub large: usize,
    /// Plans for them that broke a constraint.
    pub large_violations: usize,
    /// Seconds that planning 1,000 functions with 10,000 edges took.
    pub thousand_functions_s: f64,
    /// What noisy load did.
    pub load: Flaps,
}

/// Runs it all.
#[must_use]
pub fn run(options: &Options, say: &dyn Fn(&str)) -> Report {
    let settings = Settings::default();
    let mut report = Report::default();
    for (name, graph) in topology::all() {
        let known = compare(&mut report, &graph, &HashSet::new(), &settings);
        report.topologies += usize::from(known);
        if !known {
            say(&format!("{name}: its best is not known"));
        }
    }
    let mut seed = options.seed;
    while report.tried < options.graphs {
        seed += 1;
        let graph = generate::small(seed);
        let fused = generate::fused(seed, &graph, &settings);
        compare(&mut report, &graph, &fused, &settings);
    }
    for number in 0..options.middling {
        let graph = generate::of_size(options.seed + number as u64, 10, 16);
        compare(&mut report, &graph, &HashSet::new(), &settings);
    }
    for shares in [
        &mut report.planner,
        &mut report.heuristic,
        &mut report.nothing,
        &mut report.everything,
        &mut report.by_count,
    ] {
        shares.done();
    }
    say("the best of every graph is known");
    for number in 0..options.large {
        let graph = generate::of_size(options.seed + number as u64, 40, 160);
        report.large += 1;
        report.large_violations += violations(&graph, &settings);
    }
    let graph = generate::of_size(options.seed, 1000, 10_000);
    let since = Instant::now();
    report.large_violations += violations(&graph, &settings);
    report.thousand_functions_s = since.elapsed().as_secs_f64();
    report.large += 1;
    say("larger ones are planned");
    report.load = load::run(options, &settings);
    report
}

fn violations(graph: &Graph, settings: &Settings) -> usize {
    let calls = Calls::of(graph);
    let forest = Forest::grow(&calls, &HashSet::new(), &HashSet::new(), settings);
    let model = Model::new(&calls, &forest, settings);
    let (selected, ..) = choose(&model, Search::Both);
    usize::from(model.outcome(&selected).violations > 0)
}

/// How long the solver may take to prove the best of a graph that has too many
/// sets to try them all.
const PROVING: u64 = 10_000;

/// Compares all ways on one graph; `false` if the best of it is not known.
fn compare(
    report: &mut Report,
    graph: &Graph,
    fused: &HashSet<crate::Path>,
    settings: &Settings,
) -> bool {
    let calls = Calls::of(graph);
    let forest = Forest::grow(&calls, fused, &HashSet::new(), settings);
    let model = Model::new(&calls, &forest, settings);
    let tried = exhaustive::best(&model);
    let best = tried.or_else(|| {
        let patient = Settings {
            exact_within_ms: PROVING,
            ..settings.clone()
        };
        let model = Model::new(&calls, &forest, &patient);
        let none = vec![false; forest.candidates.len()];
        let solved = exact::solve(&model, &none).filter(|solved| solved.proven)?;
        Some(model.outcome(&solved.selected).value())
    });
    let Some(best) = best else {
        return false;
    };
    // All beside changing nothing at all that may be left as it is.
    let n = forest.candidates.len();
    let base = -model.outcome(&vec![false; n]).cost;
    let best = best - base;
    // Where nothing is worth anything, everybody is right who does nothing.
    if best < 1e-9 {
        return true;
    }
    report.graphs += 1;
    report.tried += usize::from(tried.is_some());
    report.by_solver += usize::from(tried.is_none());
    let add = |shares: &mut Shares, selected: &[bool]| -> f64 {
        let outcome = model.outcome(selected);
        let value = match outcome.violations {
            0 => outcome.value() - base,
            _ => 0.0,
        };
        shares.add(value, best, outcome.violations);
        value
    };
    let (selected, proof, _) = choose(&model, Search::Both);
    let value = add(&mut report.planner, &selected);
    if proof == crate::Proof::Optimal {
        report.proven += 1;
        report.disproved += usize::from(value < best - 1e-6 * best.abs() - 1e-9);
    }
    let (selected, ..) = choose(&model, Search::Heuristic);
    add(&mut report.heuristic, &selected);
    add(&mut report.nothing, &vec![false; n]);
    add(&mut report.everything, &vec![true; n]);
    add(&mut report.by_count, &baseline::by_count(&model));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_run_is_as_good_as_the_large_one_must_be() {
        let options = Options {
            graphs: 40,
            middling: 5,
            large: 2,
            hours: 1,
            ..Options::default()
        };
        let report = run(&options, &|_| {});
        assert!(report.graphs >= 40 && report.topologies == 3, "{report:#?}");
        for shares in [&report.planner, &report.heuristic] {
            assert!(shares.mean >= 0.98 && shares.min >= 0.9, "{report:#?}");
            assert_eq!(shares.violations, 0, "{report:#?}");
        }
        assert_eq!(report.disproved, 0, "{report:#?}");
        assert_eq!(report.large_violations, 0, "{report:#?}");
        assert_eq!(report.load.flaps, 0, "{report:#?}");
        // What it is compared with can be worse.
        assert!(
            report.everything.mean < 0.9 && report.by_count.mean < 0.98,
            "{report:#?}"
        );
        assert!(report.nothing.mean < 0.2, "{report:#?}");
    }
}
