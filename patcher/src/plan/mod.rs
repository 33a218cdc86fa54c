//! What a patch will do to one worker, as a value.
//!
//! ```text
//!  caller, callee, what is there already ─► plan() ─► PatchPlan
//!    mapping   what to map where, and with what in it   (or none: used again)
//!    stores    words that the bridge reads, changed while the worker is stopped
//!    windows   code, changed while the worker is stopped
//!    manifest  the record as it will be
//! ```
//!
//! Pure: no process is touched, and the same input gives the same plan. What
//! [`render`](PatchPlan::render) prints is what `apply` does.

mod build;
mod dynamic;
mod fresh;
mod guard;
mod images;
mod layout;
mod led;
mod modes;
mod observe;
mod placement;
mod render;
mod unwind;

use serde::{Deserialize, Serialize};

use crate::effects::{self, Allowance, Effect};
use crate::manifest::{Manifest, Region, WindowRecord, hex_bytes};
use crate::refused::Refused;

pub use build::{Input, analyse, plan};
pub(crate) use guard::ROUTINE as GUARDED;
pub use observe::observe;

/// What is asked of a patch besides its edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// What the callee may touch that is the caller's.
    pub allowed: Allowance,
    /// Calls are to be guarded against crashes of the callee.
    pub guard: bool,
}

impl From<Allowance> for Wanted {
    fn from(allowed: Allowance) -> Wanted {
        Wanted {
            allowed,
            guard: false,
        }
    }
}

/// How a part is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Read only; stays as the reservation mapped it.
    Read,
    /// Read and write.
    ReadWrite,
    /// Read and execute.
    ReadExecute,
}

/// A part of a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is, for people.
    pub what: String,
    /// First page, live.
    pub start: u64,
    /// Whole pages, in bytes.
    pub len: u64,
    /// Its protection.
    pub access: Access,
    /// Contents; zero behind them.
    #[serde(with = "hex_bytes")]
    pub bytes: Vec<u8>,
}

/// Memory that a patch maps. It is reserved as one read-only range, of which
/// the parts are then taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The whole.
    pub reservation: Region,
    /// Its parts, ascending; the rest stays read-only and untouched.
    pub parts: Vec<Part>,
    /// Where the control area goes, in a worker that has none.
    pub control: Option<Region>,
    /// Where the worker's thread pointer is to be stored, in a worker that has
    /// no bridge yet: it is known only once the thread is stopped.
    pub thread_field: Option<u64>,
}

/// Bytes stored into memory of ours while the worker is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Store {
    /// Live address.
    pub address: u64,
    /// What is stored.
    #[serde(with = "hex_bytes")]
    pub bytes: Vec<u8>,
    /// What it means, for people.
    pub what: String,
}

/// A site that stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfused {
    /// The call's live address; for one seen at run time its return address.
    pub at: u64,
    /// Why it cannot be rewritten.
    pub reason: String,
}

/// What a patch will do to one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchPlan {
    /// The caller's worker, as the host numbers it.
    pub pid: i32,
    /// Its start time in clock ticks since boot.
    pub start_time: u64,
    /// The caller's library, as its container names it, and its load bias.
    pub caller_library: String,
    /// Live address = address in the caller's library + `caller_bias`.
    pub caller_bias: u64,
    /// The callee's name.
    pub callee: String,
    /// The callee's library, as its container names it.
    pub callee_library: String,
    /// The image's build-id (or digest).
    pub build_id: String,
    /// Everything is as asked for; there is nothing to do.
    pub already: bool,
    /// What is mapped; `None` where an image of an earlier patch is used.
    pub mapping: Option<Mapping>,
    /// Stubs and their records that must lie elsewhere: near the worker's
    /// executable, or near a site that was seen at run time.
    pub islands: Vec<Mapping>,
    /// Relocations applied from outside, and those left to the bridge.
    pub relocations: (usize, usize),
    /// Libraries of which the callee gets copies of its own, as its container
    /// names them.
    pub libraries: Vec<String>,
    /// Initialisers that the bridge's thread will run before `faas_init`.
    pub initialisers: usize,
    /// Words changed in the stop.
    pub stores: Vec<Store>,
    /// Windows written in the stop, in this order.
    pub windows: Vec<WindowRecord>,
    /// Sites of this callee that stay RPCs.
    pub unfused: Vec<Unfused>,
    /// Sites that stay as they are, and calls that were seen at run time: they
    /// reach the callee through the entry of the worker's own routine.
    pub through_routine: Vec<Unfused>,
    /// The edge's gate.
    pub gate: u64,
    /// Its calls are guarded against crashes of the callee.
    #[serde(default)]
    pub guarded: bool,
    /// What the callee may touch that is the caller's.
    pub effects: Vec<Effect>,
    /// The record as it will be.
    pub manifest: Manifest,
    /// The slot that the record goes to: 1 or 2.
    pub slot: u8,
}

impl PatchPlan {
    /// Why it must not be applied, if the callee touches what is not allowed.
    #[must_use]
    pub fn refusal(&self) -> Option<Refused> {
        effects::refusal(&self.callee_library, &self.effects)
    }

    /// Bytes that the patch adds to the worker's address space.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.mappings().map(|m| m.reservation.len).sum()
    }

    /// Bytes of private writable memory that are mapped.
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        let parts = self.mappings().flat_map(|m| &m.parts);
        parts
            .filter(|p| p.access == Access::ReadWrite)
            .map(|p| p.len)
            .sum()
    }

    /// All that is mapped.
    pub fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mapping.iter().chain(&self.islands)
    }

    /// Whether the entry of the worker's own routine leads to the bridge once
    /// this is done.
    #[must_use]
    pub fn has_routine(&self) -> bool {
        let mut windows = self.manifest.windows.iter();
        windows.any(|w| w.routine && !w.for_observing)
    }

    /// Bytes that the patch may add to the worker's memory: what is written.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let parts: u64 = self.mappings().flat_map(|m| &m.parts).map(|p| p.len).sum();
        let control = self.mappings().filter_map(|m| m.control);
        parts + control.map(|c| c.len).sum::<u64>()
    }
}
