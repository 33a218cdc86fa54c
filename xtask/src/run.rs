//! Running cargo and what it built.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    // As cargo sets it now: a checkout may have been moved since it was built.
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().map(Path::to_path_buf).unwrap_or(here)
}

/// Runs cargo in the workspace; its failure is ours.
pub(crate) fn cargo<'a, const N: usize>(
    arguments: [&str; N],
    more: impl IntoIterator<Item = &'a OsStr>,
) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root()).args(arguments).args(more);
    finish(command)
}

/// Builds everything optimised and runs one of the testbed's programs, which
/// finds the others beside it.
pub(crate) fn released(program: &str, arguments: &[OsString]) -> Result<()> {
    cargo(
        ["build", "--release", "--workspace", "--bins", "--quiet"],
        [],
    )?;
    built("release", program, arguments)
}

/// Builds one package optimised and runs a program of it that needs no others.
pub(crate) fn released_of(package: &str, program: &str, arguments: &[OsString]) -> Result<()> {
    cargo(
        [
            "build",
            "--release",
            "--package",
            package,
            "--bins",
            "--quiet",
        ],
        [],
    )?;
    built("release", program, arguments)
}

/// The same as the tests have built it, for what measures nothing.
pub(crate) fn debug(program: &str, arguments: &[OsString]) -> Result<()> {
    cargo(["build", "--workspace", "--bins", "--quiet"], [])?;
    built("debug", program, arguments)
}

/// Builds everything, the tests called `name` as well, and runs one of the
/// testbed's programs with those tests' program as `--option PATH`.
pub(crate) fn debug_with_tests(
    program: &str,
    arguments: &[OsString],
    option: &str,
    name: &str,
) -> Result<()> {
    debug_with_all_tests(program, arguments, option, &[name])
}

/// The same with the tests of several names.
pub(crate) fn debug_with_all_tests(
    program: &str,
    arguments: &[OsString],
    option: &str,
    names: &[&str],
) -> Result<()> {
    cargo(["build", "--workspace", "--bins", "--quiet"], [])?;
    let mut all = arguments.to_vec();
    for name in names {
        all.extend([OsString::from(option), tests(name)?.into_os_string()]);
    }
    built("debug", program, &all)
}

/// The program of the tests called `name`, built.
fn tests(name: &str) -> Result<PathBuf> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // Of the whole workspace, as everything else: one set of features.
    let output = Command::new(program)
        .current_dir(root())
        .args(["test", "--workspace", "--no-run", "--quiet"])
        .args(["--message-format", "json", "--test", name])
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be started")?;
    if !output.status.success() {
        bail!("the tests {name} cannot be built ({})", output.status);
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo does not say where the tests {name} are"))
}

/// Builds the agent with its fault points, beside the others.
pub(crate) fn faulty() -> Result<()> {
    cargo(
        [
            "build",
            "--workspace",
            "--bin",
            "agent-faults",
            "--features",
            "nightgraft-agent/fault-points",
            "--quiet",
        ],
        [],
    )
}

/// Where cargo builds.
pub(crate) fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn built(profile: &str, program: &str, arguments: &[OsString]) -> Result<()> {
    let mut command = Command::new(target_folder().join(profile).join(program));
    command.current_dir(root()).args(arguments);
    finish(command)
}

/// Runs it. What went wrong it says itself: its exit code is ours.
pub(crate) fn finish(mut command: Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("{name} cannot be started"))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => std::process::exit(code),
        None => bail!("{name} was ended by a signal ({status})"),
    }
}
