//! Reading a worker's counters: from memory that it shares with us, without
//! stopping anyone, and once more when it has ended.
//!
//! The worker can write there, so it is input like any other: every number is
//! taken as it is, every address looked up and never followed.

use std::collections::HashMap;
use std::fs::File;
use std::mem::offset_of;

use nightgraft_bridge::abi::{self, Control, SharedEdge};
use nightgraft_bridge::cells::{self, CELL_NAME, CELL_READY, CELLS, Cell, Cells, Elsewhere};
use nightgraft_bridge::histogram::BUCKETS;

use super::{FusedSeries, Histogram, Reading, RpcSeries, Series};
use crate::held::{Area, Shifted, open_area};
use crate::manifest::{self, GraftRecord, Manifest};
use crate::session::{Failure, Function};
use crate::snapshot::{Map, Memory, ProcMemory, SnapshotError};
use crate::status::place;

/// Places whose names are kept: as many as there can be cells, some of them of
/// libraries that are closed and opened again.
const MOST_PLACES: usize = 4 * CELLS;

/// One worker's counters.
#[derive(Debug)]
pub struct Counters {
    pid: i32,
    start_time: u64,
    source: Source,
    record: Option<Known>,
    places: HashMap<u64, String>,
}

#[derive(Debug)]
enum Source {
    /// The control memory itself, which outlives the worker.
    Shared(File),
    /// The worker's memory, and where it is there.
    Worker(Shifted),
}

/// The record, and what tells that there is another one: the slot, its length
/// and its checksum.
#[derive(Debug)]
struct Known {
    slot: u8,
    sizes: [u8; 8],
    manifest: Manifest,
}

impl Counters {
    /// Opens a worker's counters; `None` where nothing of ours is in it.
    /// `control` is its control memory, if it was just made. To find it again
    /// takes CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN): without, what a worker
    /// counted after the last reading is lost when it ends.
    ///
    /// # Errors
    /// The worker cannot be read.
    pub fn open(worker: Function<'_>, control: Option<File>) -> Result<Option<Counters>, Failure> {
        let (pid, start_time) = (worker.pid, worker.start_time);
        let (started, maps) = Map::all(pid)?;
        if started != start_time {
            return Err(Failure::Snapshot(SnapshotError::Gone { pid }));
        }
        let memory = ProcMemory::open(pid)?;
        let Some(present) = manifest::find(pid, start_time, &maps, &memory)? else {
            return Ok(None);
        };
        let base = present.manifest.control;
        let area = maps.iter().find(|m| m.start == base);
        let source = match control.or_else(|| open_area(pid, area?)) {
            Some(file) => Source::Shared(file),
            None => Source::Worker(Shifted { memory, base }),
        };
        Ok(Some(Counters {
            pid,
            start_time,
            source,
            record: None,
            places: HashMap::new(),
        }))
    }

    /// Reads all of them; `None` where there is no record (any more) to read them
    /// by. They go on changing meanwhile: each number is whole, but one may be a call
    /// ahead of another.
    ///
    /// # Errors
    /// They cannot be read, as when the worker has ended and its memory with it.
    pub fn read(&mut self) -> Result<Option<Reading>, SnapshotError> {
        let area: &dyn Memory = match &self.source {
            Source::Shared(file) => &Area(file),
            Source::Worker(shifted) => shifted,
        };
        let known = refreshed(self.record.take(), self.pid, self.start_time, area)?;
        let Some((known, changed)) = known else {
            return Ok(None);
        };
        if changed {
            // What had no name may have one now.
            self.places.clear();
        }
        let manifest = &known.manifest;
        let mut observing = [0];
        area.read(offset_of!(Control, observing) as u64, &mut observing)?;
        let own = match manifest.windows.iter().any(|w| w.entry) {
            true => Some(series(area, offset_of!(Control, own) as u64)?),
            false => None,
        };
        let mut places = Places {
            pid: self.pid,
            start_time: self.start_time,
            known: &mut self.places,
            maps: None,
        };
        let (rpcs, unattributed) = rpcs(area, manifest, &mut places)?;
        let reading = Reading {
            observing: observing[0] != 0,
            own,
            rpcs,
            unattributed,
            fused: fused(area, manifest)?,
        };
        self.record = Some(known);
        Ok(Some(reading))
    }
}

/// Reads all counters of an area by itself.
#[cfg(fuzzing)]
pub(crate) fn read_area(pid: i32, start_time: u64, area: &dyn Memory) {
    let Ok(Some((known, _))) = refreshed(None, pid, start_time, area) else {
        return;
    };
    let mut names = HashMap::new();
    let mut places = Places {
        pid,
        start_time,
        known: &mut names,
        maps: Some(Vec::new()),
    };
    let _ = rpcs(area, &known.manifest, &mut places);
    let _ = fused(area, &known.manifest);
    let _ = series(area, offset_of!(Control, own) as u64);
}

fn refreshed(
    known: Option<Known>,
    pid: i32,
    start_time: u64,
    area: &dyn Memory,
) -> Result<Option<(Known, bool)>, SnapshotError> {
    let mut head = [0; 16];
    area.read(0, &mut head)?;
    let slot = head[offset_of!(Control, manifest)];
    if head[..8] != abi::MAGIC || !(1..=2).contains(&slot) {
        return Ok(None);
    }
    let mut sizes = [0; 8];
    area.read(manifest::slot_address(0, slot), &mut sizes)?;
    if let Some(known) = known.filter(|k| (k.slot, k.sizes) == (slot, sizes)) {
        return Ok(Some((known, false)));
    }
    let record = manifest::in_area(pid, start_time, area)?;
    let known = |manifest| Known {
        slot,
        sizes,
        manifest,
    };
    Ok(record.map(|manifest| (known(manifest), true)))
}

fn rpcs(
    area: &dyn Memory,
    manifest: &Manifest,
    places: &mut Places<'_>,
) -> Result<(Vec<RpcSeries>, u64), SnapshotError> {
    const SIZE: usize = size_of::<Cell>();
    let table = offset_of!(Control, cells) as u64;
    let count = area.u64(table + offset_of!(Cells, count) as u64)? as u32 as usize;
    let unattributed = area.u64(table + offset_of!(Cells, unattributed) as u64)?;
    let mut bytes = vec![0; SIZE * count.min(CELLS)];
    area.read(table + offset_of!(Cells, cells) as u64, &mut bytes)?;
    let mut all = Vec::new();
    for cell in bytes.chunks_exact(SIZE) {
        if cell[offset_of!(Cell, state)] != CELL_READY {
            continue;
        }
        let (caller, site) = (
            word(cell, offset_of!(Cell, caller)),
            word(cell, offset_of!(Cell, site)),
        );
        let name = &cell[offset_of!(Cell, name)..][..CELL_NAME];
        let end = name.iter().position(|b| *b == 0).unwrap_or(CELL_NAME);
        let graft = caller_of(manifest, caller, site);
        all.push(RpcSeries {
            caller: graft.map(|g| g.callee.clone()).unwrap_or_default(),
            callee: String::from_utf8_lossy(&name[..end]).into_owned(),
            site: places.name(site, graft),
            calls: with_others(parsed(cell, offset_of!(Cell, calls)), cell),
        });
    }
    Ok((all, unattributed))
}

/// The calls of the worker's thread, and those of others.
fn with_others(mut calls: Series, cell: &[u8]) -> Series {
    let other = |offset: usize| word(cell, offset_of!(Cell, elsewhere) + offset);
    for (to, more) in [
        (&mut calls.entered, offset_of!(Elsewhere, entered)),
        (&mut calls.returned, offset_of!(Elsewhere, returned)),
        (&mut calls.errors, offset_of!(Elsewhere, errors)),
        (&mut calls.bytes_in, offset_of!(Elsewhere, bytes_in)),
        (&mut calls.bytes_out, offset_of!(Elsewhere, bytes_out)),
    ] {
        *to = to.wrapping_add(other(more));
    }
    calls
}

/// The fused callee whose code calls.
fn caller_of(manifest: &Manifest, caller: u64, site: u64) -> Option<&GraftRecord> {
    let mut grafts = manifest.grafts.iter();
    match caller {
        // Another thread than the worker's: where the code lies tells.
        0 => grafts.find(|g| site.wrapping_sub(g.image.start) < g.image.len),
        graft => grafts.find(|g| g.graft == graft),
    }
}

/// Fused calls, by callee: images that were replaced count on.
fn fused(area: &dyn Memory, manifest: &Manifest) -> Result<Vec<FusedSeries>, SnapshotError> {
    const SIZE: usize = size_of::<SharedEdge>();
    let mut all: Vec<FusedSeries> = Vec::new();
    for graft in (manifest.grafts.iter()).filter(|g| g.index < abi::MAX_GRAFTS) {
        let mut edge = [0; SIZE];
        let at = offset_of!(Control, edges) + graft.index * SIZE;
        area.read(at as u64, &mut edge)?;
        let field = |offset: usize| word(&edge, offset);
        let calls = Series {
            entered: field(offset_of!(SharedEdge, entered)),
            returned: field(offset_of!(SharedEdge, returned)),
            errors: field(offset_of!(SharedEdge, errors)),
            bytes_in: field(offset_of!(SharedEdge, bytes_in)),
            bytes_out: field(offset_of!(SharedEdge, bytes_out)),
            latency: Histogram {
                samples: field(offset_of!(SharedEdge, samples)),
                cycles: field(offset_of!(SharedEdge, sampled_cycles)),
                buckets: buckets(&edge, offset_of!(SharedEdge, histogram)),
            },
        };
        let fused = !graft.replaced && edge[offset_of!(SharedEdge, gate)] != 0;
        match all.iter_mut().find(|f| f.callee == graft.callee) {
            Some(known) => {
                known.fused |= fused;
                add(&mut known.calls, &calls);
            }
            None => all.push(FusedSeries {
                callee: graft.callee.clone(),
                fused,
                calls,
            }),
        }
    }
    Ok(all)
}

fn add(to: &mut Series, more: &Series) {
    for (to, more) in [
        (&mut to.entered, more.entered),
        (&mut to.returned, more.returned),
        (&mut to.errors, more.errors),
        (&mut to.bytes_in, more.bytes_in),
        (&mut to.bytes_out, more.bytes_out),
        (&mut to.latency.samples, more.latency.samples),
        (&mut to.latency.cycles, more.latency.cycles),
    ] {
        *to = to.wrapping_add(more);
    }
    for (to, more) in to.latency.buckets.iter_mut().zip(&more.latency.buckets) {
        *to = (*to + more) & u64::from(u32::MAX);
    }
}

fn series(area: &dyn Memory, at: u64) -> Result<Series, SnapshotError> {
    let mut bytes = [0; size_of::<cells::Series>()];
    area.read(at, &mut bytes)?;
    Ok(parsed(&bytes, 0))
}

fn parsed(bytes: &[u8], at: usize) -> Series {
    let field = |offset: usize| word(bytes, at + offset);
    Series {
        entered: field(offset_of!(cells::Series, entered)),
        returned: field(offset_of!(cells::Series, returned)),
        errors: field(offset_of!(cells::Series, errors)),
        bytes_in: field(offset_of!(cells::Series, bytes_in)),
        bytes_out: field(offset_of!(cells::Series, bytes_out)),
        latency: Histogram {
            samples: field(offset_of!(cells::Series, samples)),
            cycles: field(offset_of!(cells::Series, sampled_cycles)),
            buckets: buckets(bytes, at + offset_of!(cells::Series, histogram)),
        },
    }
}

fn buckets(bytes: &[u8], at: usize) -> Vec<u64> {
    let all = bytes[at..][..4 * BUCKETS].chunks_exact(4);
    all.map(|b| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
        .collect()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Names of addresses in one worker.
struct Places<'a> {
    pid: i32,
    start_time: u64,
    known: &'a mut HashMap<u64, String>,
    /// Read when an address comes up that has no name yet.
    maps: Option<Vec<Map>>,
}

impl Places<'_> {
    fn name(&mut self, address: u64, graft: Option<&GraftRecord>) -> String {
        if let Some(name) = self.known.get(&address) {
            return name.clone();
        }
        let found = match graft {
            Some(graft) => self.in_image(address, graft),
            None => self.mapped(address),
        };
        let name = found.unwrap_or_else(|| format!("{address:#x}"));
        if self.known.len() == MOST_PLACES {
            self.known.clear();
        }
        self.known.insert(address, name.clone());
        name
    }

    fn in_image(&self, address: u64, graft: &GraftRecord) -> Option<String> {
        let memory = ProcMemory::open(self.pid).ok()?;
        place(graft, address, &memory).ok()
    }

    /// By the file that is mapped there, from its first mapping on.
    fn mapped(&mut self, address: u64) -> Option<String> {
        let (pid, start_time) = (self.pid, self.start_time);
        let maps = match &self.maps {
            Some(maps) => maps,
            None => {
                let (started, maps) = Map::all(pid).ok()?;
                self.maps.insert(if started == start_time {
                    maps
                } else {
                    Vec::new()
                })
            }
        };
        let index = maps
            .iter()
            .position(|m| (m.start..m.end).contains(&address))?;
        let name = &maps[index].name;
        let file = name.strip_suffix(" (deleted)").unwrap_or(name);
        if !file.starts_with('/') {
            return None;
        }
        let first = maps[..index].iter().rposition(|m| m.name == *name);
        let mut start = maps[index].start;
        let mut at = first;
        while let Some(index) = at {
            start = maps[index].start;
            at = maps[..index].iter().rposition(|m| m.name == *name);
        }
        let file = file.rsplit('/').next().unwrap_or_default();
        Some(format!("{file}+{:#x}", address - start))
    }
}
