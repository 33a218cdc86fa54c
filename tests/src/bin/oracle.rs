//! `oracle --jobs 2`: loads every shared library of the machine with the
//! machine's own dynamic linker, relocates it with our loader for the same
//! addresses, and compares. Fails if anything differs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use nightgraft_testbed::oracle::{self, Program, Verdict};

/// Compares what our loader makes of libraries with what ld.so makes of them.
#[derive(Debug, Parser)]
struct Options {
    /// Libraries; without any, all in the standard folders.
    libraries: Vec<PathBuf>,
    /// A folder whose libraries are compared as well.
    #[arg(long, value_name = "DIR")]
    fixtures: Vec<PathBuf>,
    /// Only those whose path contains this.
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// At most so many, evenly chosen.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// So many at once.
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// Seconds to wait for each answer of a library's process.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    /// Print what became of every library, not only of those that differ.
    #[arg(long)]
    all: bool,
    /// End with one line of JSON instead of a table.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let mut libraries = Vec::new();
    for library in &options.libraries {
        let path = library.canonicalize();
        libraries.push(path.with_context(|| library.display().to_string())?);
    }
    for folder in &options.fixtures {
        libraries.extend(oracle::below(folder));
    }
    if options.libraries.is_empty() {
        libraries.extend(oracle::standard());
    }
    if let Some(pattern) = &options.only {
        libraries.retain(|path| path.to_string_lossy().contains(pattern));
    }
    if let Some(limit) = options.limit {
        libraries = oracle::sample(libraries, limit);
    }
    let program = Program::compile()?;
    let patience = Duration::from_secs(options.timeout);
    let tally = oracle::judge_all(&program, &libraries, options.jobs, patience, &|outcome| {
        if options.all || matches!(outcome.verdict, Verdict::Differ(_)) {
            println!("{outcome}");
        }
    })?;
    if options.json {
        println!("{}", tally.json());
    } else {
        println!("{}", tally.table());
    }
    Ok(if tally.differ == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
