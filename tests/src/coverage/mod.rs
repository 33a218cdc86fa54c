//! The table of what can be fused: every fixture, by every compiler, run as
//! RPC, fused, reverted and fused again.
//!
//! ```text
//! fixture ─► matrix ─► compile ─► trial ─────────────► report
//! (folders,  (rows)    (cached)   (reference, node,    (table, document,
//!  directives)                     agent)               numbers)
//! ```
//!
//! Each row has a node of its own; several run at a time. What a row is
//! expected to come to stands in the fixture ([`directives`]): the run is good
//! only if every row comes to just that.

pub mod compile;
pub mod directives;
pub mod fixture;
pub mod matrix;
pub mod oracle;
pub mod reference;
pub mod report;
pub mod trial;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::Agent;
use compile::BuildError;
use fixture::Fixture;
use matrix::Variant;
use report::{Report, Row};
use trial::{Outcome, Sites};

/// What is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder of fixtures.
    pub fixtures: PathBuf,
    /// Where built fixtures are kept.
    pub cache: PathBuf,
    /// The whole matrix of compilers and flags.
    pub whole: bool,
    /// Only fixtures whose name contains this.
    pub only: Option<String>,
    /// Rows at a time.
    pub jobs: usize,
}

/// Runs everything. `say` is told each row's outcome as it is known.
pub fn run(options: &Options, say: &(dyn Fn(&Row) + Sync)) -> Result<Report> {
    let mut fixtures = Fixture::all(&options.fixtures)?;
    if let Some(only) = &options.only {
        fixtures.retain(|f| f.name.contains(only.as_str()));
        ensure!(!fixtures.is_empty(), "no fixture's name contains {only:?}");
    }
    fixtures.sort_by(|a, b| (&a.directives.kind, &a.name).cmp(&(&b.directives.kind, &b.name)));
    let rows: Vec<(&Fixture, Variant)> = fixtures
        .iter()
        .flat_map(|f| {
            matrix::variants(f, options.whole)
                .into_iter()
                .map(move |v| (f, v))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<Row>>> = Mutex::new(vec![None; rows.len()]);
    std::thread::scope(|scope| {
        let runners: Vec<_> = (0..options.jobs.max(1))
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let agent = Agent::start()?;
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some((fixture, variant)) = rows.get(at) else {
                            return Ok(());
                        };
                        let row = one(fixture, variant, &options.cache, &agent);
                        say(&row);
                        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                        done[at] = Some(row);
                    }
                })
            })
            .collect();
        runners.into_iter().try_for_each(|r| match r.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Report {
        rows: done
            .into_iter()
            .collect::<Option<_>>()
            .context("a row was not run")?,
        machine: machine(),
        whole: options.whole,
        partial: options.only.is_some(),
        oracle: if options.only.is_some() {
            Err("only some fixtures were asked for".to_owned())
        } else {
            oracle::run()
        },
    })
}

fn one(fixture: &Fixture, variant: &Variant, cache: &Path, agent: &Agent) -> Row {
    let started = Instant::now();
    let d = &fixture.directives;
    let mut row = Row {
        kind: d.kind.clone(),
        fixture: fixture.name.clone(),
        about: d.about.clone(),
        role: d.role,
        variant: variant.to_string(),
        expect: d.expect.clone(),
        because: d.because.clone(),
        outcome: Outcome::Supported,
        sites: Sites::default(),
        caller: 0,
        took_ms: 0,
    };
    row.outcome = match compile::build(fixture, variant, cache) {
        Err(BuildError::Missing(program)) => {
            Outcome::Skipped(format!("{program} is not installed"))
        }
        Err(BuildError::Failed(e)) => Outcome::Broken(format!("it cannot be built: {e:#}")),
        Ok(built) => {
            row.caller = built
                .functions
                .get("Foo")
                .and_then(|library| std::fs::read(library).ok())
                .map_or(0, |bytes| {
                    let mut hasher = DefaultHasher::new();
                    bytes.hash(&mut hasher);
                    hasher.finish()
                });
            trial::run(fixture, variant, &built, agent, &mut row.sites)
                .unwrap_or_else(|e| Outcome::Broken(format!("{e:#}")))
        }
    };
    row.took_ms = started.elapsed().as_millis();
    row
}

/// Kernel, compilers and tools.
fn machine() -> Vec<String> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut lines = vec![format!("Linux {}", kernel.trim())];
    for program in ["gcc", "clang", "rustc", "ld.bfd", "ld.gold", "ld.lld"] {
        lines.push(compile::version(program));
    }
    lines
}
