//! The journal's disk is full, read-only, or fails in between.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use tempfile::TempDir;

use super::scenario::Act;
use super::{Chaos, check};
use crate::Agent;

/// Functions that are patched until a full disk is noticed: the journal's file
/// has some room within.
const UNTIL_FULL: usize = 12;

/// A small disk of its own, gone when this is dropped.
pub struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    /// Mounts one of 1 MiB.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("nightdisk-").tempdir()?;
        let options = Some("size=1m,mode=0700");
        mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .context("mounting a small disk")?;
        Ok(Self { dir })
    }

    /// A directory on it.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn ballast(&self) -> PathBuf {
        self.dir.path().join("ballast")
    }

    /// Fills it to the last byte.
    ///
    /// # Errors
    /// It does not get full.
    pub fn fill(&self) -> Result<()> {
        let mut file = File::create(self.ballast())?;
        for length in [64 << 10, 4096, 1] {
            while file.write_all(&vec![0x5a; length]).is_ok() {
                ensure!(
                    file.metadata()?.len() < 64 << 20,
                    "the disk does not get full"
                );
            }
        }
        Ok(())
    }

    /// Makes room again.
    ///
    /// # Errors
    /// The ballast is not there.
    pub fn clear(&self) -> Result<()> {
        std::fs::remove_file(self.ballast()).context("no ballast")
    }

    /// Makes it read-only, or writable again.
    ///
    /// # Errors
    /// It is in use.
    pub fn read_only(&self, on: bool) -> Result<()> {
        let flag = if on {
            MsFlags::MS_RDONLY
        } else {
            MsFlags::empty()
        };
        mount(
            None::<&str>,
            self.dir.path(),
            None::<&str>,
            MsFlags::MS_REMOUNT | flag,
            None::<&str>,
        )
        .context("mounting it anew")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.dir.path(), MntFlags::MNT_DETACH);
    }
}

pub(super) fn cases(chaos: &mut Chaos<'_>) {
    for (name, case) in [
        ("a full disk", full as fn(&mut Chaos<'_>) -> Result<()>),
        ("a read-only disk", read_only),
        ("a disk that fails in between", fails_between),
    ] {
        let result = case(chaos);
        chaos.conclude(result, name);
    }
}

fn full(chaos: &mut Chaos<'_>) -> Result<()> {
    let disk = SmallDisk::new()?;
    let agent = Agent::start_in(&disk.state())?;
    let first = chaos.farm.fresh()?;
    chaos.farm.ask(&agent, Act::Patch, &first)?;
    disk.fill()?;
    for number in 0.. {
        let function = chaos.farm.fresh()?;
        // A node of its own may have taken the place of the first.
        let (code, body) = refused_or_done(chaos, &agent, &function)?;
        if code != 200 {
            ensure!(body["error"]["code"] == "journal", "{code}: {body}");
            break;
        }
        ensure!(number < UNTIL_FULL, "a full disk is not noticed");
    }
    ensure!(
        !agent.health()?["journal"]["away"].is_null(),
        "it is not told"
    );
    if chaos.farm.workers(&first).is_ok() {
        unjournaled_revert(chaos, &agent, &first)?;
    }
    disk.clear()?;
    let function = chaos.farm.fresh()?;
    chaos.farm.ask(&agent, Act::Patch, &function)?;
    chaos.farm.ask(&agent, Act::Revert, &function)
}

fn read_only(chaos: &mut Chaos<'_>) -> Result<()> {
    let disk = SmallDisk::new()?;
    let agent = Agent::start_in(&disk.state())?;
    let function = chaos.farm.fresh()?;
    chaos.farm.ask(&agent, Act::Patch, &function)?;
    drop(agent);
    disk.read_only(true)?;
    let agent = Agent::start_in(&disk.state())?;
    ensure!(
        !agent.health()?["journal"]["away"].is_null(),
        "it is not told"
    );
    let other = chaos.farm.fresh()?;
    let (code, body) = refused_or_done(chaos, &agent, &other)?;
    ensure!(body["error"]["code"] == "journal", "{code}: {body}");
    if chaos.farm.workers(&function).is_ok() {
        unjournaled_revert(chaos, &agent, &function)?;
    }
    disk.read_only(false)?;
    chaos.farm.ask(&agent, Act::Patch, &other)
}

fn fails_between(chaos: &mut Chaos<'_>) -> Result<()> {
    let state = chaos.farm.state(super::scenario::Journal::Shared)?;
    for number in 1..=3 {
        let function = chaos.farm.fresh()?;
        let agent = Agent::start_program("agent-faults", &state, |command| {
            command.env("NIGHTGRAFT_FAULT_REFUSE", number.to_string());
        })?;
        let (code, body) = refused_or_done(chaos, &agent, &function)?;
        if number < 3 {
            ensure!(
                body["error"]["code"] == "journal",
                "{number}: {code}: {body}"
            );
        } else {
            // Only its last word is missing.
            ensure!(code == 200, "{number}: {code}: {body}");
            said(&body, "the journal does not know")?;
        }
        chaos.farm.ask(&agent, Act::Patch, &function)?;
    }
    Ok(())
}

/// Patches; where that is refused the worker must be as it was.
fn refused_or_done(chaos: &Chaos<'_>, agent: &Agent, function: &str) -> Result<(u16, Value)> {
    let workers = chaos.farm.workers(function)?;
    let sizes = || -> Result<Vec<_>> { workers.iter().map(check::size).collect() };
    let before = sizes()?;
    let (code, body) = chaos.farm.try_ask(agent, Act::Patch, function)?;
    let after = sizes()?;
    if after != before {
        bail!("it is refused, and something is left: {before:?}, {after:?}: {code}: {body}");
    }
    Ok((code, body))
}

fn unjournaled_revert(chaos: &Chaos<'_>, agent: &Agent, function: &str) -> Result<()> {
    let (code, body) = chaos.farm.try_ask(agent, Act::Revert, function)?;
    ensure!(code == 200, "{code}: {body}");
    ensure!(
        body["workers"][0]["outcome"]["outcome"] == "restored",
        "{body}"
    );
    said(&body, "the journal does not know")
}

fn said(body: &Value, what: &str) -> Result<()> {
    let notes = body["notes"].as_array().cloned().unwrap_or_default();
    let is = |note: &Value| note.as_str().is_some_and(|note| note.contains(what));
    ensure!(notes.iter().any(is), "nothing of {what:?} in {body}");
    Ok(())
}
