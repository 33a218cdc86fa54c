//! What is written down of a worker outside of it, before it takes effect.
//!
//! ```text
//!  patch    Mapping ─► mapped, filled ─► Committing ─► record, stop, windows ─► Settled
//!  revert   Reverting ─► gate off, stop, windows ─► Settled
//! ```
//!
//! One [`Entry`] per worker; a later one takes the earlier one's place. It says
//! what was under way, and holds the whole record of the worker as it is (or
//! will be once the record in the worker is written): a new agent can tell from
//! it what a dead one may have done, and make the record in the worker anew
//! should that be lost.
//!
//! Here are the values, their encoding and the trait. Where they are kept is
//! the agent's business; what follows from them is [`crate::recover`]'s.

mod encoding;

use serde::{Deserialize, Serialize};

pub use encoding::{FORMAT, Unreadable};

use crate::manifest::{Manifest, Region};
use crate::plan::{Access, Mapping};

/// A mapping that was planned: what one would see of it in `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// The whole, reserved first, read-only.
    pub reservation: Region,
    /// What is then mapped anew within it, in this order.
    pub parts: Vec<(Region, Access)>,
    /// Where the control area goes last, if one does.
    pub control: Option<Region>,
}

impl From<&Mapping> for Planned {
    fn from(mapping: &Mapping) -> Planned {
        let own = mapping.parts.iter().filter(|p| p.access != Access::Read);
        Planned {
            reservation: mapping.reservation,
            parts: own
                .map(|p| {
                    let (start, len) = (p.start, p.len);
                    (Region { start, len }, p.access)
                })
                .collect(),
            control: mapping.control,
        }
    }
}

/// How far it has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "kebab-case")]
pub enum Stage {
    /// Nothing is under way.
    Settled,
    /// Memory is being mapped and filled, or unmapped again. Nothing leads
    /// there, and the record in the worker does not name it.
    Mapping {
        /// The callee that it is for.
        callee: String,
        /// What is being mapped.
        mappings: Vec<Planned>,
    },
    /// The record in the worker is being written, then the windows.
    Committing {
        /// The callee that is being fused.
        callee: String,
    },
    /// The gate is being closed and the windows are being taken out.
    Reverting {
        /// The callee that is being reverted.
        callee: String,
    },
}

/// What is written down of one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The worker, as the host numbers it.
    pub pid: i32,
    /// Its start time in clock ticks since boot.
    pub start_time: u64,
    /// What was under way.
    #[serde(flatten)]
    pub stage: Stage,
    /// The worker's record: while mapping the one before, else the one that
    /// holds or is about to. `None` where there is none.
    pub record: Option<Manifest>,
}

impl Entry {
    /// An entry that says that nothing is under way.
    #[must_use]
    pub fn settled(pid: i32, start_time: u64, record: Option<Manifest>) -> Entry {
        Entry {
            pid,
            start_time,
            stage: Stage::Settled,
            record,
        }
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.stage == Stage::Settled
    }
}

/// Why something could not be written down or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct JournalError(pub String);

/// Where entries are kept.
pub trait Journal: Send + Sync {
    /// Keeps an entry, in place of the worker's last one. It is durable when
    /// this returns. One that is settled without a record is dropped.
    ///
    /// # Errors
    /// It is not kept, and must be taken for not kept.
    fn write(&self, entry: &Entry) -> Result<(), JournalError>;

    /// The entry of a worker.
    ///
    /// # Errors
    /// There may be one, and it cannot be read or is not for this version.
    fn entry(&self, pid: i32, start_time: u64) -> Result<Option<Entry>, JournalError>;
}

/// Keeps nothing: for tools and tests that need no journal. With it the record
/// in the worker is all that is left behind.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nowhere;

impl Journal for Nowhere {
    fn write(&self, _entry: &Entry) -> Result<(), JournalError> {
        Ok(())
    }

    fn entry(&self, _pid: i32, _start_time: u64) -> Result<Option<Entry>, JournalError> {
        Ok(None)
    }
}
