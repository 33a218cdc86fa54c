//! Coverage-guided fuzzing of everything that reads what it is given.
//!
//! libFuzzer, with the counters that the stable compiler can put in. The kept
//! corpora are in `fuzz/corpus`; what a run adds stays below the target folder
//! until `--keep` takes the best of it over.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::run::{finish, root, target_folder};

/// What is fuzzed, by the programs of `fuzz/src/bin`.
const TARGETS: [&str; 9] = [
    "library",
    "code",
    "planner",
    "link_map",
    "record",
    "journal",
    "proc_text",
    "filter",
    "api",
];
const MACHINE: &str = "x86_64-unknown-linux-gnu";
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// One input may take so long (seconds), and so much memory (MiB).
const HANG: u32 = 20;
const MEMORY: u32 = 2048;

/// Options of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to fuzz; everything if none is named.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    targets: Vec<String>,
    /// Seconds per target.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Targets at a time.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// Take the inputs that were found into fuzz/corpus, as few as cover the
    /// same.
    #[arg(long)]
    keep: bool,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

impl Options {
    /// Every target for a short time, as tests do.
    pub(crate) fn brief() -> Options {
        Options {
            targets: Vec::new(),
            seconds: 30,
            jobs: 2,
            keep: false,
            json: false,
        }
    }
}

/// Where things are.
struct Places {
    programs: PathBuf,
    work: PathBuf,
    code: PathBuf,
    caller: PathBuf,
}

pub(crate) fn fuzz(options: &Options) -> Result<()> {
    let places = build()?;
    let mut wanted: VecDeque<&str> = match options.targets.as_slice() {
        [] => TARGETS.into(),
        some => some.iter().map(String::as_str).collect(),
    };
    let mut running: Vec<Run<'_>> = Vec::new();
    let mut done = Vec::new();
    while !wanted.is_empty() || !running.is_empty() {
        while running.len() < options.jobs.into()
            && let Some(target) = wanted.pop_front()
        {
            running.push(Run::start(&places, target, options.seconds)?);
        }
        std::thread::sleep(Duration::from_millis(100));
        let mut index = 0;
        while index < running.len() {
            match running[index].end()? {
                Some(outcome) => {
                    println!("{outcome}");
                    done.push(outcome);
                    running.swap_remove(index);
                }
                None => index += 1,
            }
        }
    }
    let found: Vec<&Outcome> = done.iter().filter(|o| o.finding.is_some()).collect();
    if options.json {
        let targets: serde_json::Map<_, _> = done
            .iter()
            .map(|o| {
                let value = serde_json::json!({
                    "runs": o.runs, "seconds": o.seconds, "edges": o.edges, "inputs": o.inputs
                });
                (o.target.clone(), value)
            })
            .collect();
        let line = serde_json::json!({ "targets": targets, "findings": found.len() });
        println!("{line}");
    }
    if !found.is_empty() {
        let names: Vec<&str> = found.iter().map(|o| o.target.as_str()).collect();
        bail!("findings in {}: see above", names.join(", "));
    }
    if options.keep {
        for outcome in &done {
            keep(&places, &outcome.target)?;
        }
    }
    Ok(())
}

fn build() -> Result<Places> {
    let work = target_folder().join("fuzz");
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command
        .current_dir(root().join("fuzz"))
        .args([
            "build",
            "--release",
            "--quiet",
            "--locked",
            "--target",
            MACHINE,
        ])
        .arg("--target-dir")
        .arg(&work)
        .env("RUSTFLAGS", FLAGS)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    finish(command)?;
    let libraries = work.join("libraries");
    fs::create_dir_all(&libraries)?;
    let compile = |name: &str, source: &str, flags: &[&str]| -> Result<PathBuf> {
        let library = libraries.join(name);
        let mut command = Command::new("gcc");
        command
            .current_dir(root())
            .args(["-shared", "-fPIC", "-O2"])
            .args(flags)
            .arg("-o")
            .arg(&library)
            .arg(source);
        finish(command)?;
        Ok(library)
    };
    Ok(Places {
        programs: work.join(MACHINE).join("release"),
        code: compile("libcode.so", "fuzz/code.S", &["-nostdlib"])?,
        caller: compile("libfoo.so", "tests/fixtures/foo.c", &[])?,
        work,
    })
}

impl Places {
    fn kept(target: &str) -> PathBuf {
        root().join("fuzz/corpus").join(target)
    }

    fn found(&self, target: &str) -> Result<PathBuf> {
        let folder = self.work.join("corpus").join(target);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    fn command(&self, target: &str) -> Command {
        let mut command = Command::new(self.programs.join(target));
        command
            .env("NIGHTGRAFT_FUZZ_CODE", &self.code)
            .env("NIGHTGRAFT_FUZZ_CALLER", &self.caller)
            .arg(format!("-timeout={HANG}"))
            .arg(format!("-rss_limit_mb={MEMORY}"));
        command
    }
}

/// A target at work.
struct Run<'a> {
    target: &'a str,
    child: Child,
    log: PathBuf,
    since: Instant,
}

impl<'a> Run<'a> {
    fn start(places: &Places, target: &'a str, seconds: u32) -> Result<Run<'a>> {
        let kept = Places::kept(target);
        ensure!(
            fs::read_dir(&kept).is_ok_and(|mut all| all.next().is_some()),
            "{}: no inputs to begin with",
            kept.display()
        );
        let folder = places.work.join("findings");
        fs::create_dir_all(&folder)?;
        let log = places.work.join(format!("{target}.log"));
        let output = File::create(&log)?;
        let child = places
            .command(target)
            .current_dir(&folder)
            .arg(format!("-max_total_time={seconds}"))
            .arg("-print_final_stats=1")
            .arg(format!("-artifact_prefix={}/{target}-", folder.display()))
            .arg(places.found(target)?)
            .arg(kept)
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("{target} cannot be started"))?;
        Ok(Run {
            target,
            child,
            log,
            since: Instant::now(),
        })
    }

    fn end(&mut self) -> Result<Option<Outcome>> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(None);
        };
        let log = fs::read(&self.log)?;
        let log = String::from_utf8_lossy(&log);
        let number = |name: &str| {
            let line = log.lines().rev().find_map(|line| line.strip_prefix(name));
            line.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        // "#1234 REDUCE cov: 812 ft: 3000 corp: 99/7kb …"
        let word = |name: &str| {
            let line = log.lines().rev().find(|line| line.contains(name))?;
            let mut words = line.split_whitespace().skip_while(|word| *word != name);
            words.nth(1)?.split('/').next()?.parse().ok()
        };
        let tail = || {
            let lines: Vec<&str> = log.lines().collect();
            let from = log.lines().position(|line| line.contains("panicked at"));
            let from = from.unwrap_or(lines.len().saturating_sub(20));
            let some: Vec<&str> = lines[from..].iter().take(20).copied().collect();
            let unit = lines.iter().find(|line| line.contains("Test unit written"));
            format!("{}\n{}", some.join("\n"), unit.unwrap_or(&""))
        };
        Ok(Some(Outcome {
            target: self.target.to_owned(),
            runs: number("stat::number_of_executed_units:"),
            edges: word("cov:").unwrap_or(0),
            inputs: word("corp:").unwrap_or(0),
            seconds: self.since.elapsed().as_secs(),
            finding: (!status.success()).then(|| format!("{status}\n{}", tail())),
        }))
    }
}

/// What came of it.
struct Outcome {
    target: String,
    runs: u64,
    /// Edges of code that were taken.
    edges: u64,
    /// Inputs that take edges which others don't.
    inputs: u64,
    seconds: u64,
    /// The failure, with the end of the log.
    finding: Option<String>,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:<10} {:>10} runs in {} s, {} edges by {} inputs",
            self.target, self.runs, self.seconds, self.edges, self.inputs
        )?;
        match &self.finding {
            Some(finding) => write!(f, ": FOUND {finding}"),
            None => Ok(()),
        }
    }
}

/// Makes the kept corpus anew, of it and of what was found.
fn keep(places: &Places, target: &str) -> Result<()> {
    let kept = Places::kept(target);
    let fresh = places.work.join("kept").join(target);
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh)?;
    let mut command = places.command(target);
    // By the edges alone: what loops how often is found again quickly.
    command.args(["-set_cover_merge=1", "-use_counters=0"]);
    command.arg(&fresh).arg(&kept);
    command.arg(places.found(target)?);
    command.stderr(File::create(
        places.work.join(format!("{target}.keep.log")),
    )?);
    finish(command)?;
    replace(&kept, &fresh)
}

fn replace(kept: &Path, fresh: &Path) -> Result<()> {
    let names = |folder: &Path| -> Result<Vec<OsString>> {
        let entries = fs::read_dir(folder)?;
        entries.map(|entry| Ok(entry?.file_name())).collect()
    };
    let new = names(fresh)?;
    ensure!(!new.is_empty(), "nothing is left of {}", kept.display());
    for name in &new {
        fs::copy(fresh.join(name), kept.join(name))?;
    }
    for name in names(kept)? {
        if !new.contains(&name) {
            fs::remove_file(kept.join(name))?;
        }
    }
    Ok(())
}
