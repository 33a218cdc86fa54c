//! The agent is ended at every point at which it can be, and so are workers
//! and containers; then it is looked whether anything was lost.
//!
//! ```text
//!  trace: which points does each scenario pass, how often?
//!  for each point: state ─► agent with the point armed ─► it dies there
//!                    ─► heir ─► nobody stopped or traced? nothing leaked?
//!                    ─► the same command again ─► is it as asked for?
//!  the same with the worker, and with its container, ended at the point
//!  the journal's disk full, read-only
//!  patch and revert, over and over
//!  tests with hostile workers, where their programs are given
//! ```
//!
//! A load is on the function in question all the while, and every answer is
//! checked. The agents that die are `agent-faults` (the agent, built with its
//! feature `fault-points`), their heirs the agent as it is installed.

mod check;
pub mod disk;
mod farm;
mod hostile;
mod kill;
mod scenario;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::load::Random;

pub use scenario::Scenario;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long to go on with random points and hits; `None` for the form that
    /// ends each point once.
    pub minutes: Option<u64>,
    /// Patch/revert cycles at the end.
    pub cycles: u64,
    /// Of the random choices.
    pub seed: u64,
    /// Programs of tests with hostile workers.
    pub hostile: Vec<PathBuf>,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Points at which something was ended.
    pub fault_points: usize,
    /// Agents, workers and containers that were ended.
    pub kills: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that got a wrong answer.
    pub wrong: u64,
    /// Requests in all.
    pub requests: u64,
    /// Mappings, descriptors or threads that were left as they must not be.
    pub leaked: u64,
    /// Times that the state was not as asked for, or the agent not as it must.
    pub unrecovered: u64,
    /// Cases of hostile workers.
    pub hostile_cases: u64,
    /// Those that did not come to what is expected of them.
    pub unexpected: u64,
    /// Patch/revert cycles.
    pub cycles: u64,
    /// Points that no scenario passes.
    pub unreached: Vec<String>,
    /// All that was wrong, told.
    pub complaints: Vec<String>,
}

impl Report {
    /// Whether nothing was wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.complaints.is_empty()
            && self.failed + self.wrong + self.leaked + self.unrecovered + self.unexpected == 0
            && self.kills > 0
    }

    /// The line that a run ends with.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "fault_points": self.fault_points,
            "kills": self.kills,
            "failed": self.failed,
            "wrong": self.wrong,
            "leaked": self.leaked,
            "unrecovered": self.unrecovered,
            "hostile_cases": self.hostile_cases,
            "unexpected": self.unexpected,
            "cycles": self.cycles,
        })
    }

    fn complain(&mut self, what: String) {
        self.complaints.push(what);
    }
}

/// Points that no scenario passes here, and why.
pub const NOT_PASSED: &[(&str, &str)] = &[
    (
        "ptrace::peek",
        "only where the kernel forbids writes to /proc/PID/mem",
    ),
    (
        "ptrace::poke",
        "only where the kernel forbids writes to /proc/PID/mem",
    ),
    (
        "ptrace::cont",
        "only when a signal or a group-stop comes into a remote call",
    ),
    (
        "ptrace::event-message",
        "only when a thread exits in a stop",
    ),
    ("ptrace::signal", "only when a signal comes into a stop"),
    ("ptrace::pending", "only when a filter denies a remote call"),
    (
        "commit::moved",
        "only when a thread is in a window just then",
    ),
];

/// What a run works with.
struct Chaos<'a> {
    farm: farm::Farm,
    report: Report,
    random: Random,
    points: BTreeSet<String>,
    /// System calls of a first patch.
    calls: u64,
    say: &'a dyn Fn(&str),
}

/// Runs it. `say` is told how it goes.
///
/// # Errors
/// It could not be run; what is wrong with the agent is in the report.
pub fn run(options: &Options, say: &dyn Fn(&str)) -> Result<Report> {
    let begun = Instant::now();
    let mut chaos = Chaos {
        farm: farm::Farm::start()?,
        report: Report::default(),
        random: Random::new(options.seed),
        points: BTreeSet::new(),
        calls: 0,
        say,
    };
    let all = farm::fault_points()?;
    say(&format!("{} fault points; tracing …", all.len()));
    let scenarios = Scenario::all();
    let mut passed: Vec<BTreeMap<String, u64>> = Vec::new();
    for scenario in &scenarios {
        let counts = chaos
            .trace(scenario)
            .with_context(|| format!("tracing: {}", scenario.name))?;
        say(&format!(
            "{}: passes {} points {} times",
            scenario.name,
            counts.len(),
            counts.values().sum::<u64>()
        ));
        passed.push(counts);
    }
    // Each point where it is passed first.
    let mut todo: Vec<(usize, &str)> = Vec::new();
    for point in &all {
        // The journal's file grows for certain only where it is new.
        let file = point.starts_with("journal-file::");
        let fits = |index: &usize| {
            passed[*index].contains_key(point)
                && (!file || scenarios[*index].journal == scenario::Journal::New)
        };
        match (0..scenarios.len()).find(fits) {
            Some(index) => todo.push((index, point)),
            None => chaos.report.unreached.push(point.clone()),
        }
    }
    for point in &chaos.report.unreached {
        let kind = point.split('#').next().unwrap_or(point);
        ensure!(
            NOT_PASSED.iter().any(|(known, _)| *known == kind),
            "no scenario passes {point}"
        );
    }
    for (index, point) in &todo {
        chaos.kill_agent(&scenarios[*index], point, 1);
    }
    for (index, scenario) in scenarios.iter().enumerate() {
        let points = passed[index]
            .keys()
            .filter(|_| scenario.is_looked_at_whole());
        for point in points.filter(|point| scenario::concerns_a_worker(point)) {
            chaos.kill_agent(scenario, point, 1);
        }
    }
    say(&format!("every point once: {:.0?}", begun.elapsed()));
    for (index, point) in &todo {
        if scenarios[*index].is_plain() && scenario::concerns_a_worker(point) {
            chaos.kill_worker(&scenarios[*index], point, 1);
        }
    }
    say(&format!("with workers ended: {:.0?}", begun.elapsed()));
    for (index, point) in &todo {
        if scenarios[*index].is_plain() && scenario::concerns_a_worker(point) {
            chaos.kill_container(&scenarios[*index], point);
        }
    }
    disk::cases(&mut chaos);
    say(&format!(
        "with containers and disks: {:.0?}",
        begun.elapsed()
    ));
    if let Some(minutes) = options.minutes {
        let until = begun + Duration::from_secs(60 * minutes);
        while Instant::now() < until {
            let index = chaos.random.below(scenarios.len());
            let counts: Vec<(&String, &u64)> = passed[index].iter().collect();
            let (point, count) = counts[chaos.random.below(counts.len())];
            let hit = 1 + chaos.random.below(usize::try_from(*count).unwrap_or(1)) as u64;
            match chaos.random.below(5) {
                0 if scenarios[index].is_plain() && scenario::concerns_a_worker(point) => {
                    chaos.kill_worker(&scenarios[index], point, hit);
                }
                _ => chaos.kill_agent(&scenarios[index], point, hit),
            }
        }
    }
    chaos.cycles(options.cycles);
    for tests in &options.hostile {
        hostile::run(tests, &mut chaos.report, say)?;
    }
    chaos.report.fault_points = chaos.points.len();
    say(&format!(
        "{} requests; in all {:.0?}",
        chaos.report.requests,
        begun.elapsed()
    ));
    let Chaos { farm, report, .. } = chaos;
    farm.stop()?;
    Ok(report)
}
