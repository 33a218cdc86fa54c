//! Runs every fixture and says what can be fused.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use nightgraft_testbed::coverage::{self, Options};

/// Runs every fixture as RPC, fused, reverted and fused again, compares, and
/// writes docs/coverage.md.
#[derive(Parser)]
#[command(
    name = "cargo xtask coverage",
    bin_name = "cargo xtask coverage",
    version
)]
struct Arguments {
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// All compilers with all flags, linkers and tools; else a reduced matrix.
    #[arg(long)]
    full: bool,
    /// Only fixtures whose name contains this; the document stays as it is.
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Rows at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// The workspace's folder.
    #[arg(long, default_value = ".", hide = true)]
    root: PathBuf,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let started = Instant::now();
    let options = Options {
        fixtures: arguments.root.join("tests/fixtures").canonicalize()?,
        cache: nightgraft_testbed::bin_dir()?.join("coverage-fixtures"),
        whole: arguments.full,
        only: arguments.only,
        jobs: arguments.jobs,
    };
    let report = coverage::run(&options, &|row| {
        // Progress goes to stderr: stdout is the result.
        let _ = writeln!(
            std::io::stderr(),
            "{:24} {:40} {}",
            row.fixture,
            row.variant,
            row.verdict().text()
        );
    })?;
    print!("{}", report.table());
    let complaints = report.complaints();
    if !complaints.is_empty() {
        println!("\nNot as it should be:");
        for complaint in &complaints {
            println!("- {complaint}");
        }
    }
    println!("\n{}", report.summary());
    println!(
        "{} rows in {} s",
        report.rows.len(),
        started.elapsed().as_secs()
    );
    if options.only.is_none() {
        std::fs::write(arguments.root.join("docs/coverage.md"), report.markdown())?;
    }
    if arguments.json {
        println!("{}", report.json());
    }
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
