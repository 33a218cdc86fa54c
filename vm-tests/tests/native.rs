//! The trial that guests run, on this kernel: what fails here is no matter of
//! theirs.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nightgraft_vm_tests::verdict::Verdict;

/// Runs the trial, which ends by itself (every wait in it has an end).
fn trial(arguments: &[&str]) -> Result<Verdict> {
    let output = Command::new(env!("CARGO_BIN_EXE_vm_trial"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let verdict = Verdict::find(&text).with_context(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        format!("no verdict ({}): {text}{error}", output.status)
    })?;
    ensure!(output.status.success() == verdict.passed, "{verdict:?}");
    ensure!(verdict.passed, "{text}");
    Ok(verdict)
}

fn as_it_must(verdict: &Verdict) -> Result<()> {
    let seen = &verdict.seen["trial"];
    ensure!(seen["outcome"] == "patched", "{seen}");
    ensure!(seen["failed"] == 0 && seen["wrong"] == 0, "{seen}");
    ensure!(seen["requests"].as_u64() > Some(100), "{seen}");
    Ok(())
}

#[test]
fn this_kernel_passes() -> Result<()> {
    as_it_must(&trial(&[])?)
}

#[test]
fn this_kernel_passes_with_overlay_roots() -> Result<()> {
    let known = std::fs::read_to_string("/proc/filesystems")?;
    if !known.lines().any(|line| line.ends_with("\toverlay")) {
        println!("SKIP: this kernel has no overlay file system (or it is a module to be loaded)");
        return Ok(());
    }
    as_it_must(&trial(&["--overlay"])?)
}
