//! The graph over time: steps of some seconds, kept for a month.
//!
//! ```text
//!  add ─► index (all steps, by time) ─► older than a day: 5 minutes become one
//!             │                         older than 30 days, or too much: dropped
//!             ▼
//!  DIR/history.redb
//!    meta    "format" ─► 1
//!    steps   milliseconds since 1970 ─► 1 (version), then JSON
//! ```
//!
//! Every step is one commit of redb, with what became of older ones: one sync of
//! the file in ten seconds. So an agent that is killed, or a machine that fails,
//! loses the step that is being counted and none that was added. (A commit that
//! does not sync would not outlive the process either: redb finds a file as of
//! the last commit that did.) Damage is found by redb's checksums when the file
//! is opened, so values have none of their own.
//!
//! The disk may be away: full, read-only, or not there at all. Steps are then
//! kept in memory, up to [`MEMORY_BYTES`], and the disk is tried again every
//! [`RETRY_STEPS`] steps. A file that is damaged, or another version's, is set
//! aside under another name (`history.redb.damaged`, `history.redb.format-2`;
//! one of a name, the latest), and a new one begun: the past is worth less than
//! the present.
//!
//! A step's time is its key. Where the clock was set back, a step gets the time
//! of the one before and a millisecond, until the clock has caught up: none is
//! lost, and they stay in the order in which they were counted. Ages are
//! reckoned from the newest step.

mod disk;
mod merge;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::api::HistoryStep;
use disk::Disk;

/// Steps are kept as they are for so many milliseconds: a day, which is 8,640
/// steps of ten seconds.
pub const FULL_MS: u64 = 24 * 3_600 * 1_000;
/// Older ones become one for each such part of the day: five minutes.
pub const MERGED_MS: u64 = 5 * 60 * 1_000;
/// And those are kept so long: 30 days, which is 8,640 steps again.
pub const KEPT_MS: u64 = 30 * 24 * 3_600 * 1_000;
/// Bytes of all steps, as they are stored, on the disk and not yet on it. The
/// oldest go first. The file is larger, by what redb leaves free between them.
pub const MAX_BYTES: usize = 64 << 20;
/// All steps: reached only by steps shorter than ten seconds, or by a clock
/// that stands still.
pub const MAX_STEPS: usize = 20_000;
/// Bytes of the steps that are not on the disk. The oldest go first.
pub const MEMORY_BYTES: usize = 8 << 20;
/// While the disk is away, it is tried again when so many steps were added.
pub const RETRY_STEPS: u32 = 6;

/// Parts of the day that are merged whenever a step is added: there are many
/// when an agent starts that others have run before.
const MERGES_AT_ONCE: usize = 4;
/// First byte of a value.
const VERSION: u8 = 1;

/// The steps, on disk or in memory.
#[derive(Debug)]
pub struct History(Mutex<State>);

/// One step that is kept.
#[derive(Debug)]
struct Kept {
    len: usize,
    /// The value, while it is not on the disk.
    unwritten: Option<Vec<u8>>,
    /// A commit of it has failed: it may be on the disk nevertheless.
    tried: bool,
}

#[derive(Debug)]
struct State {
    disk: Option<Disk>,
    /// Steps to be added before the disk is tried again.
    rest: u32,
    index: BTreeMap<u64, Kept>,
    /// Of all in the index.
    bytes: usize,
    /// Of those that are not on the disk.
    unwritten_bytes: usize,
    /// Time of the newest step ever.
    last: Option<u64>,
    /// To be taken out of the file with the next commit.
    removed: BTreeSet<u64>,
    /// Nothing before is to be merged.
    merged_to: u64,
    /// Of opening the file.
    notes: Vec<String>,
    /// Steps that memory had no room for.
    dropped: u64,
    /// Steps whose values say nothing.
    unreadable: u64,
}

impl History {
    /// Opens the history in the agent's directory, or begins one. Without a
    /// directory, or where the file cannot be used, it is in memory alone, and
    /// the notes of [`History::since`] say why.
    #[must_use]
    pub fn open(directory: Option<&Path>) -> History {
        let mut state = State {
            disk: directory.map(Disk::in_directory),
            rest: 0,
            index: BTreeMap::new(),
            bytes: 0,
            unwritten_bytes: 0,
            last: None,
            removed: BTreeSet::new(),
            merged_to: 0,
            notes: Vec::new(),
            dropped: 0,
            unreadable: 0,
        };
        state.open();
        History(Mutex::new(state))
    }

    /// Adds a step, the newest. Its time is made later than that of the one
    /// before, should it not be.
    pub fn add(&self, step: HistoryStep) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.insert(step);
        if state
            .disk
            .as_ref()
            .is_some_and(|disk| disk.away().is_some())
        {
            state.rest = state.rest.saturating_sub(1);
            if state.rest == 0 {
                state.open();
            }
        }
        state.merge();
        state.prune();
        state.write();
        // Behind the write, which may have made room.
        state.prune_memory();
    }

    /// The steps that ended after this time, oldest first and at most so many,
    /// and what is not known, in sentences.
    #[must_use]
    pub fn since(&self, at_ms: u64, limit: usize) -> (Vec<HistoryStep>, Vec<String>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let after = (Bound::Excluded(at_ms), Bound::Unbounded);
        let mut later = state.index.range(after).map(|(key, _)| *key);
        let keys: Vec<u64> = later.by_ref().take(limit).collect();
        let more = later.count();
        let steps = state.steps(&keys);
        let mut notes = state.notes();
        let missing = keys.len() - steps.len();
        if missing > 0 {
            notes.push(format!("{missing} steps of this time cannot be read"));
        }
        if more > 0 {
            notes.push(format!("{more} later steps are not shown"));
        }
        (steps, notes)
    }

    /// What should be known of the history itself, in sentences.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.notes()
    }
}

impl State {
    /// Opens the file, and takes what is in it for what is kept, besides what is
    /// not in it yet.
    fn open(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        self.rest = RETRY_STEPS;
        let Some(lengths) = disk.open(&mut self.notes) else {
            return;
        };
        self.index.retain(|_, kept| kept.unwritten.is_some());
        for (key, len) in lengths {
            if !self.removed.contains(&key) {
                self.index.entry(key).or_insert(Kept {
                    len,
                    unwritten: None,
                    tried: false,
                });
            }
        }
        self.bytes = self.index.values().map(|kept| kept.len).sum();
        let newest = self.index.last_key_value();
        self.last = newest.map(|(key, _)| *key).max(self.last);
        self.merged_to = 0;
    }

    fn insert(&mut self, mut step: HistoryStep) {
        if let Some(last) = self.last {
            step.at_ms = step.at_ms.max(last.saturating_add(1));
        }
        self.last = Some(step.at_ms);
        self.put(&step);
    }

    fn put(&mut self, step: &HistoryStep) {
        let mut value = vec![VERSION];
        if serde_json::to_writer(&mut value, step).is_err() {
            self.unreadable += 1;
            return;
        }
        self.forget(step.at_ms);
        self.bytes += value.len();
        self.unwritten_bytes += value.len();
        let kept = Kept {
            len: value.len(),
            unwritten: Some(value),
            tried: false,
        };
        self.index.insert(step.at_ms, kept);
    }

    /// Takes a step out, here and, with the next commit, on the disk.
    fn forget(&mut self, key: u64) {
        if let Some(kept) = self.index.remove(&key) {
            self.bytes -= kept.len;
            match kept.unwritten {
                Some(_) => self.unwritten_bytes -= kept.len,
                None => drop(self.removed.insert(key)),
            }
            if kept.tried {
                self.removed.insert(key);
            }
        }
    }

    /// Makes one step of those of each part of the day that is over for long
    /// enough.
    fn merge(&mut self) {
        for _ in 0..MERGES_AT_ONCE {
            let next = self.index.range(self.merged_to..).next();
            let Some((&first, _)) = next else { return };
            let begin = first - first % MERGED_MS;
            let end = begin.saturating_add(MERGED_MS);
            if self.last < Some(end.saturating_add(FULL_MS)) {
                return;
            }
            let keys: Vec<u64> = self.index.range(begin..end).map(|(key, _)| *key).collect();
            if keys.len() > 1 {
                let away = self.disk.as_ref().is_some_and(|disk| disk.away().is_some());
                if away && keys.iter().any(|key| self.index[key].unwritten.is_none()) {
                    // When it is back.
                    return;
                }
                let steps = self.steps(&keys);
                if self.disk.as_ref().is_some_and(|disk| disk.away().is_some()) != away {
                    return;
                }
                self.unreadable += (keys.len() - steps.len()) as u64;
                for key in keys {
                    self.forget(key);
                }
                if !steps.is_empty() {
                    self.put(&merge::merge(steps));
                }
            }
            self.merged_to = end;
        }
    }

    /// Drops the oldest while there are too many, or too old.
    fn prune(&mut self) {
        let oldest = self.last.unwrap_or(0).saturating_sub(KEPT_MS);
        while let Some((&key, _)) = self.index.first_key_value()
            && (key < oldest || self.bytes > MAX_BYTES || self.index.len() > MAX_STEPS)
        {
            self.forget(key);
        }
    }

    /// Drops the oldest that are in memory alone while they are too many.
    fn prune_memory(&mut self) {
        if self.unwritten_bytes <= MEMORY_BYTES {
            return;
        }
        let mut over = self.unwritten_bytes - MEMORY_BYTES;
        let mut keys = Vec::new();
        for (key, kept) in &self.index {
            if kept.unwritten.is_some() {
                keys.push(*key);
                over = over.saturating_sub(kept.len);
                if over == 0 {
                    break;
                }
            }
        }
        for key in keys {
            self.dropped += 1;
            self.forget(key);
        }
    }

    /// Brings the file to what is kept.
    fn write(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        if disk.away().is_some() {
            return;
        }
        let into: Vec<(u64, &[u8])> = self
            .index
            .iter()
            .filter_map(|(key, kept)| Some((*key, kept.unwritten.as_deref()?)))
            .collect();
        let out: Vec<u64> = self.removed.iter().copied().collect();
        let written = disk.commit(&out, &into).is_ok();
        let keys: Vec<u64> = into.into_iter().map(|(key, _)| key).collect();
        for key in keys {
            if let Some(kept) = self.index.get_mut(&key) {
                kept.tried = !written;
                if written {
                    kept.unwritten = None;
                }
            }
        }
        if written {
            self.removed.clear();
            self.unwritten_bytes = 0;
        }
    }

    /// These steps, as far as they can be read.
    fn steps(&mut self, keys: &[u64]) -> Vec<HistoryStep> {
        let on_disk = |key: &u64| {
            let kept = self.index.get(key);
            kept.is_some_and(|kept| kept.unwritten.is_none())
        };
        let wanted: Vec<u64> = keys.iter().copied().filter(on_disk).collect();
        let read = match &mut self.disk {
            Some(disk) if !wanted.is_empty() => disk.read(&wanted).unwrap_or_default(),
            _ => BTreeMap::new(),
        };
        let value = |key| {
            let unwritten = self.index.get(key).and_then(|kept| kept.unwritten.as_ref());
            unwritten.or_else(|| read.get(key))
        };
        keys.iter()
            .filter_map(|key| decoded(*key, value(key)?))
            .collect()
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        match &self.disk {
            None => notes.push(
                "the history is in memory alone, as the agent has no directory of its own"
                    .to_owned(),
            ),
            Some(disk) => {
                if let Some(why) = disk.away() {
                    notes.push(format!(
                        "the history is not written to the disk, and tried again ({why})"
                    ));
                }
            }
        }
        if self.dropped > 0 {
            notes.push(format!(
                "{} steps were dropped: while they are not on the disk, memory holds {} MiB of \
                 them",
                self.dropped,
                MEMORY_BYTES >> 20
            ));
        }
        if self.unreadable > 0 {
            notes.push(format!(
                "{} steps could not be read and were dropped",
                self.unreadable
            ));
        }
        notes
    }
}

/// A value as a step. Its key is its time.
fn decoded(key: u64, value: &[u8]) -> Option<HistoryStep> {
    let (&version, text) = value.split_first()?;
    if version != VERSION {
        return None;
    }
    let step: HistoryStep = serde_json::from_slice(text).ok()?;
    Some(HistoryStep { at_ms: key, ..step })
}
