//! Reading all that is known of a worker, without stopping it.

use std::mem::offset_of;

use nightgraft_bridge::abi::Graft;
use ptrace_shim::Process;

use super::held::held;
use super::{Evidence, Found, Live, Side};
use crate::journal::{Entry, Stage};
use crate::manifest::{self, CONTROL_PATH, FindError, Manifest, Present};
use crate::session::{Failure, Function};
use crate::snapshot::{Map, Memory, ProcMemory, SnapshotError};

pub(super) fn look(worker: Function<'_>, entry: Option<Entry>) -> Result<Evidence, Failure> {
    let pid = worker.pid;
    let (start_time, maps) = Map::all(pid)?;
    if start_time != worker.start_time {
        return Err(Failure::Snapshot(SnapshotError::Gone { pid }));
    }
    let memory = ProcMemory::open(pid)?;
    let (found, found_live) = match manifest::find(pid, start_time, &maps, &memory) {
        Ok(None) => (Found::Nothing, None),
        Ok(Some(present)) => {
            let live = of_present(&present);
            (Found::Record(Box::new(present.manifest)), Some(live))
        }
        Err(FindError::Refused(why)) => (Found::Damaged(why.to_string()), None),
        Err(FindError::Snapshot(error)) => return Err(error.into()),
    };
    let record = entry.as_ref().and_then(|entry| entry.record.as_ref());
    let entry_live = record.map(|record| {
        manifest::fits(record, &maps)
            .and_then(|()| live(record, &maps, &memory).map_err(|e| e.to_string()))
    });
    let mapped = record.map_or_else(Vec::new, |record| {
        let overlaps = |start: u64, end: u64| maps.iter().any(|m| m.start < end && m.end > start);
        record
            .regions
            .iter()
            .map(|r| overlaps(r.start, r.start.saturating_add(r.len)))
            .collect()
    });
    let mut all_held = Vec::new();
    if let Some(Entry {
        stage: Stage::Mapping { mappings, .. },
        ..
    }) = &entry
    {
        let process = Process::open(pid).map_err(crate::apply::ApplyError::from)?;
        let maps = process.mappings().map_err(crate::apply::ApplyError::from)?;
        let mut set_aside = SetAside { pid, flags: None };
        for planned in mappings {
            all_held.push(held(planned, &maps, &mut |at| set_aside.at(at)));
        }
    }
    Ok(Evidence {
        found,
        found_live,
        entry,
        entry_live,
        held: all_held,
        mapped,
        descriptors: descriptors(pid),
    })
}

fn of_present(present: &Present) -> Live {
    let windows = present.manifest.windows.iter().zip(&present.live);
    Live {
        windows: windows
            .map(|(window, live)| side(live, &window.before, &window.after))
            .collect(),
        gates: present.gates.clone(),
        observing: present.observing,
    }
}

fn side(live: &[u8], before: &[u8], after: &[u8]) -> Side {
    if live.is_empty() {
        Side::Gone
    } else if live == after {
        Side::After
    } else if live == before {
        Side::Before
    } else {
        Side::Other
    }
}

fn live(record: &Manifest, maps: &[Map], memory: &dyn Memory) -> Result<Live, SnapshotError> {
    let mut windows = Vec::new();
    for window in &record.windows {
        let (start, end) = (window.address, window.end());
        let is_code = |m: &Map| m.executable && m.start <= start && end <= m.end;
        let mut bytes = Vec::new();
        if maps.iter().any(is_code) {
            bytes.resize(window.before.len(), 0);
            memory.read(start, &mut bytes)?;
        }
        windows.push(side(&bytes, &window.before, &window.after));
    }
    let mut gates = Vec::new();
    for graft in &record.grafts {
        let mut byte = [0];
        // Whether it is there at all.
        memory.read(graft.graft + offset_of!(Graft, state) as u64, &mut byte)?;
        memory.read(record.gate(graft), &mut byte)?;
        gates.push(byte[0] != 0);
    }
    let mut observing = [0];
    memory.read(record.observing(), &mut observing)?;
    Ok(Live {
        windows,
        gates,
        observing: observing[0] != 0,
    })
}

/// Descriptors of a control area that the worker has open. A patch closes its
/// own within the stop in which it was opened.
fn descriptors(pid: i32) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let mut found: Vec<i32> = entries
        .flatten()
        .filter(|entry| {
            std::fs::read_link(entry.path()).is_ok_and(|to| {
                let to = to.to_string_lossy();
                to.strip_suffix(" (deleted)").unwrap_or(&to) == CONTROL_PATH
            })
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    found.sort_unstable();
    found
}

/// Whether the kernel sets memory aside for mappings: their flag `nr` says
/// that it does not.
struct SetAside {
    pid: i32,
    /// Start, end, and whether the flag is there; read when first asked for.
    flags: Option<Vec<(u64, u64, bool)>>,
}

impl SetAside {
    fn at(&mut self, address: u64) -> bool {
        // There nobody gets the flag.
        let always = std::fs::read_to_string("/proc/sys/vm/overcommit_memory")
            .is_ok_and(|text| text.trim() == "2");
        if always {
            return false;
        }
        let pid = self.pid;
        let flags = self.flags.get_or_insert_with(|| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
            no_reserve(&text)
        });
        // What is not found is taken for the worker's own.
        !flags
            .iter()
            .any(|(start, end, flag)| *flag && (*start..*end).contains(&address))
    }
}

fn no_reserve(smaps: &str) -> Vec<(u64, u64, bool)> {
    let mut all: Vec<(u64, u64, bool)> = Vec::new();
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(last) = all.last_mut() {
                last.2 = flags.split_whitespace().any(|flag| flag == "nr");
            }
            continue;
        }
        let range = line.split(' ').next().and_then(|word| word.split_once('-'));
        if let Some((start, end)) = range
            && let (Some(start), Some(end)) = (hex(start), hex(end))
        {
            all.push((start, end, false));
        }
    }
    all
}

#[cfg(fuzzing)]
pub(crate) fn read_smaps(text: &str) {
    let _ = no_reserve(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_of_each_mapping_is_read() {
        let text = "\
7f0000000000-7f0000002000 r--p 00000000 00:00 0 \n\
Size:                  8 kB\n\
VmFlags: rd mr mw me nr sd \n\
7f0000002000-7f0000003000 rw-p 00000000 00:00 0                          [stack]\n\
Size:                  4 kB\n\
VmFlags: rd wr mr mw me ac sd \n";
        assert_eq!(
            no_reserve(text),
            [
                (0x7f00_0000_0000, 0x7f00_0000_2000, true),
                (0x7f00_0000_2000, 0x7f00_0000_3000, false)
            ]
        );
        assert_eq!(no_reserve("7f-x y\nVmFlags: nr"), []);
    }

    #[test]
    fn a_descriptor_is_told_by_what_it_is_of() {
        let pid = std::process::id().cast_signed();
        assert_eq!(descriptors(pid), [] as [i32; 0]);
        assert_eq!(descriptors(i32::MAX), [] as [i32; 0]);
    }
}
