//! What a dead agent left in a worker, and what is to be done about it.
//!
//! ```text
//!  record in the worker ─┐
//!  entry in the journal ─┼─► look ─► Evidence ─► decide (pure) ─► Decision ─► act
//!  live bytes, mappings ─┘                                          │
//!                                  clean, adopted, completed, undone, left
//! ```
//!
//! The rules, in short:
//! - Of two records the newer one counts (they are numbered). One that the
//!   worker has lost or never got is written from the journal, if every
//!   address in it still lies where it must.
//! - Memory that was being mapped when the agent died is unmapped: nothing led
//!   there yet. It must look exactly as the plan makes it ([`Held`]).
//! - Once the record may be there, memory is kept, and recorded for the next
//!   patch: a thread may be on its way through it.
//! - A patch that was complete but for its last word is adopted. One that was
//!   not is turned back into RPCs, and a revert is brought to its end: both
//!   lead to what is always right.
//! - Bytes at a window that are neither the library's nor ours, records that
//!   contradict each other, and memory that is not as it must be are reported
//!   and left alone, with the worker running.

mod decide;
mod held;
mod look;

use serde::{Deserialize, Serialize};

pub use decide::decide;
pub use held::Held;
#[cfg(fuzzing)]
pub(crate) use look::read_smaps;

use crate::apply::{self, Limits};
use crate::faults::{self, hit};
use crate::journal::{Entry, Journal};
use crate::manifest::{self, Manifest, Region};
use crate::session::{Failure, Function};
use crate::snapshot::{Map, ProcMemory, SnapshotError};

/// What the worker's memory says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// There is no record.
    Nothing,
    /// There is one.
    Record(Box<Manifest>),
    /// There is something that is no record for us.
    Damaged(String),
}

/// What a window holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The library's bytes.
    Before,
    /// Ours.
    After,
    /// Others.
    Other,
    /// No code is there any more: its library was closed.
    Gone,
}

/// What lives in a worker, by one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// Per window of the record.
    pub windows: Vec<Side>,
    /// Per graft of the record: whether its gate is open.
    pub gates: Vec<bool>,
    /// Whether the worker's calls are counted.
    pub observing: bool,
}

/// All that is known of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// What its memory says.
    pub found: Found,
    /// What lives by that record.
    pub found_live: Option<Live>,
    /// What the journal says.
    pub entry: Option<Entry>,
    /// What lives by the journal's record; or why that cannot be the record of
    /// this worker.
    pub entry_live: Option<Result<Live, String>>,
    /// Per mapping that was under way: what lies there.
    pub held: Vec<Held>,
    /// Of the journal's record: whether anything is mapped in each region.
    pub mapped: Vec<bool>,
    /// Descriptors of control areas that the worker still has open.
    pub descriptors: Vec<i32>,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// There is nothing of ours.
    Clean,
    /// Everything is as the record says.
    Adopted,
    /// What was half done was brought to its end.
    Completed,
    /// What was half done was undone.
    Undone,
    /// It cannot be reconciled; nothing (more) was touched.
    Left,
}

/// Something to be done to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Close descriptors of control areas.
    Close(Vec<i32>),
    /// Unmap what was being mapped.
    Unmap(Vec<Region>),
    /// Write the record.
    Record(Box<Manifest>),
    /// Close an edge's gate and take its windows out;
    /// [`OBSERVING`](crate::manifest::OBSERVING) for the counting of calls.
    Revert(String),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What it will come to.
    pub verdict: Verdict,
    /// What was found, and what is done about it; sentences.
    pub notes: Vec<String>,
    /// In this order.
    pub steps: Vec<Step>,
    /// The entry that holds afterwards; `None` where the old one stays.
    pub entry: Option<Entry>,
}

/// What was done about one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {
    /// The worker, as the host numbers it.
    pub pid: i32,
    /// What came of it.
    pub verdict: Verdict,
    /// What was found and done; sentences.
    pub notes: Vec<String>,
    /// Edges that were reverted.
    #[serde(default)]
    pub reverted: Vec<String>,
}

/// Whether anything would be done to the worker. Touches nothing, not even
/// the journal.
///
/// # Errors
/// The worker cannot be read.
pub fn is_due(worker: Function<'_>, journal: &dyn Journal) -> Result<bool, Failure> {
    // A journal that is away is no reason to touch anybody.
    let entry = journal.entry(worker.pid, worker.start_time).unwrap_or(None);
    let unsettled = entry.as_ref().is_some_and(|entry| !entry.is_settled());
    let decision = decide(worker.pid, worker.start_time, &look::look(worker, entry)?);
    Ok(unsettled || !decision.steps.is_empty() || decision.verdict == Verdict::Left)
}

/// Puts a worker in order, and the journal with it. What cannot be done is no
/// error: the verdict is then [`Verdict::Left`], and the notes say why.
///
/// # Errors
/// The worker cannot be read.
pub fn recover(
    worker: Function<'_>,
    limits: &Limits,
    journal: &dyn Journal,
) -> Result<Recovered, Failure> {
    let (pid, start_time) = (worker.pid, worker.start_time);
    let mut notes = Vec::new();
    let (entry, mut keep) = match journal.entry(pid, start_time) {
        Ok(entry) => (entry, true),
        Err(error) => {
            notes.push(format!("what the journal has of it is not used: {error}"));
            (None, false)
        }
    };
    let before = entry.clone();
    let decision = decide(pid, start_time, &look::look(worker, entry)?);
    hit(faults::DECIDED);
    notes.extend(decision.notes);
    let mut verdict = decision.verdict;
    let mut reverted = Vec::new();
    for step in &decision.steps {
        match act(worker, step, limits) {
            Ok(None) => {
                if let Step::Revert(callee) = step {
                    reverted.push(callee.clone());
                }
            }
            Ok(Some(note)) => notes.push(note),
            Err(Failure::Snapshot(SnapshotError::Gone { pid })) => {
                return Err(Failure::Snapshot(SnapshotError::Gone { pid }));
            }
            Err(failure) => {
                verdict = Verdict::Left;
                notes.push(failure.to_string());
                keep = false;
                break;
            }
        }
    }
    if let Some(entry) = decision
        .entry
        .filter(|entry| keep && before.as_ref() != Some(entry))
        && let Err(error) = journal.write(&entry)
    {
        notes.push(format!("the journal cannot be written: {error}"));
    }
    hit(faults::RECOVERED);
    Ok(Recovered {
        pid,
        verdict,
        notes,
        reverted,
    })
}

/// Takes one step; a note says what it did not come to.
fn act(worker: Function<'_>, step: &Step, limits: &Limits) -> Result<Option<String>, Failure> {
    let (pid, start_time) = (worker.pid, worker.start_time);
    match step {
        Step::Close(descriptors) => {
            apply::repair::close(pid, start_time, descriptors, limits)?;
        }
        Step::Unmap(regions) => apply::repair::unmap(pid, start_time, regions, limits)?,
        Step::Record(record) => apply::repair::record(pid, start_time, record)?,
        Step::Revert(callee) => {
            let (started, maps) = Map::all(pid)?;
            if started != start_time {
                return Err(Failure::Snapshot(SnapshotError::Gone { pid }));
            }
            let memory = ProcMemory::open(pid)?;
            let Some(present) = manifest::find(pid, start_time, &maps, &memory)? else {
                return Ok(None);
            };
            let receipt = apply::revert(&present, callee, limits, &crate::journal::Nowhere)?;
            hit(faults::RECOVER_REVERTED);
            if !receipt.restored {
                let callee = decide::called(callee);
                return Ok(Some(format!(
                    "the gate of {callee} is closed, and its windows stay for now: {}",
                    receipt.reason.unwrap_or_default()
                )));
            }
        }
    }
    Ok(None)
}
