//! Counters of RPCs by where they come from and what they name, in the memory
//! that the agent reads.
//!
//! ```text
//!  (caller, name, return address) ─hash─► index[i] ─► cells[n] ─► Series
//! ```
//!
//! Cells are only ever added, so that they are found without a lock and read
//! without stopping anyone. Any thread may call: the worker's own counts without
//! locked instructions, each of which costs as much as all the rest, the others in
//! a place of theirs.

use core::sync::atomic::{
    AtomicU8, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use crate::histogram::Histogram;
use crate::names;

/// Cells of a worker.
pub const CELLS: usize = 128;
/// Bytes of a cell's name; what is longer is cut, and told apart by its hash.
pub const CELL_NAME: usize = 64;
/// Places of the index: twice as many as there are cells.
const PLACES: usize = 2 * CELLS;

/// [`Cell::state`]: it counts.
pub const CELL_READY: u8 = 1;

/// Calls of one kind.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Series {
    /// Calls begun.
    pub entered: AtomicU64,
    /// Calls that came back.
    pub returned: AtomicU64,
    /// Of them, those that gave anything but 0.
    pub errors: AtomicU64,
    /// Input bytes of the calls begun.
    pub bytes_in: AtomicU64,
    /// Output bytes of the calls that came back well.
    pub bytes_out: AtomicU64,
    /// Calls whose duration was measured (one in [`crate::observe::SAMPLE_RPC_EVERY`]).
    pub samples: AtomicU64,
    /// Sum of the measured durations, in TSC cycles.
    pub sampled_cycles: AtomicU64,
    /// The measured durations by size.
    pub histogram: Histogram,
}

/// Calls from other threads than the worker's, which several may count at once.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Elsewhere {
    /// As in [`Series`].
    pub entered: AtomicU64,
    /// As in [`Series`].
    pub returned: AtomicU64,
    /// As in [`Series`].
    pub errors: AtomicU64,
    /// As in [`Series`].
    pub bytes_in: AtomicU64,
    /// As in [`Series`].
    pub bytes_out: AtomicU64,
}

/// RPCs with one name from one place.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Cell {
    /// [`CELL_READY`], stored last; else nothing here counts.
    pub state: AtomicU8,
    /// Padding.
    pub pad: [u8; 7],
    /// The hash of what follows.
    pub hash: AtomicU64,
    /// The [`crate::abi::Graft`] whose code calls, 0 for the worker's function or
    /// where that is not known: on another thread than the worker's.
    pub caller: AtomicU64,
    /// The address that the call returns to.
    pub site: AtomicU64,
    /// The name, padded with NULs; cut if there is none.
    pub name: [AtomicU8; CELL_NAME],
    /// The calls of the worker's thread.
    pub calls: Series,
    /// Those of others; none of them is timed.
    pub elsewhere: Elsewhere,
}

/// All of them.
#[derive(Debug)]
#[repr(C)]
pub struct Cells {
    /// Cells that were taken; more than [`CELLS`] if threads asked for the last
    /// one at the same time.
    pub count: AtomicU32,
    /// Padding.
    pub pad: [u8; 4],
    /// RPCs that found no cell.
    pub unattributed: AtomicU64,
    /// Hash table: numbers of cells, plus one; 0 for none.
    pub index: [AtomicU8; PLACES],
    /// The cells.
    pub cells: [Cell; CELLS],
}

impl Cells {
    /// The cell of calls with the name at `name`, made if there is none; `None`
    /// where there is no room for it, or no name.
    ///
    /// # Safety
    /// `name` is 0 or the NUL-terminated string that the RPC itself reads next.
    #[must_use]
    pub unsafe fn find(&self, caller: u64, name: u64, site: u64) -> Option<&Cell> {
        if name == 0 {
            return None;
        }
        let name = name as *const u8;
        // SAFETY: as the caller promises.
        let hash = unsafe { names::hash_at(name) };
        let hash = names::mix(names::mix(hash, site), caller);
        let mut at = (hash >> 32) as usize % PLACES;
        let mut made: Option<(u32, &Cell)> = None;
        for _ in 0..PLACES {
            let place = &self.index[at];
            let mut number = place.load(Acquire);
            if number == 0 {
                if made.is_none() {
                    // SAFETY: as above.
                    made = Some(unsafe { self.make(hash, caller, name, site) }?);
                }
                let (own, cell) = made?;
                match place.compare_exchange(0, own as u8 + 1, AcqRel, Acquire) {
                    Ok(_) => return Some(cell),
                    // Another thread's, perhaps for the same calls.
                    Err(theirs) => number = theirs,
                }
            }
            let cell = self.cells.get(usize::from(number) - 1)?;
            // SAFETY: as above.
            if unsafe { cell.is_for(hash, caller, name, site) } {
                if let Some((_, wasted)) = made {
                    wasted.state.store(0, Release);
                }
                return Some(cell);
            }
            at = (at + 1) % PLACES;
        }
        None
    }

    /// Takes a new cell.
    unsafe fn make(
        &self,
        hash: u64,
        caller: u64,
        name: *const u8,
        site: u64,
    ) -> Option<(u32, &Cell)> {
        if self.count.load(Relaxed) as usize >= CELLS {
            return None;
        }
        let number = self.count.fetch_add(1, AcqRel);
        let cell = self.cells.get(number as usize)?;
        cell.hash.store(hash, Relaxed);
        cell.caller.store(caller, Relaxed);
        cell.site.store(site, Relaxed);
        for (index, to) in cell.name.iter().enumerate() {
            // SAFETY: nothing is read behind the NUL.
            let byte = unsafe { name.add(index).read() };
            to.store(byte, Relaxed);
            if byte == 0 {
                break;
            }
        }
        cell.state.store(CELL_READY, Release);
        Some((number, cell))
    }
}

impl Cell {
    unsafe fn is_for(&self, hash: u64, caller: u64, name: *const u8, site: u64) -> bool {
        let same = self.hash.load(Relaxed) == hash
            && self.site.load(Relaxed) == site
            && self.caller.load(Relaxed) == caller;
        if !same {
            return false;
        }
        for (index, ours) in self.name.iter().enumerate() {
            // SAFETY: the name goes on as long as all before was equal and no NUL.
            let byte = unsafe { name.add(index).read() };
            if ours.load(Relaxed) != byte {
                return false;
            }
            if byte == 0 {
                break;
            }
        }
        true
    }
}
