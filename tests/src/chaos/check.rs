//! What must be so after an agent has died.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use nightgraft_patcher::manifest;
use nightgraft_patcher::snapshot::{Map, ProcMemory};

use crate::WorkerInfo;

/// What of a worker must not grow, but by what its record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Bytes of mappings of kinds that only we make (anonymous and read-only
    /// or executable, or the control area) that no record names.
    unrecorded: u64,
    descriptors: usize,
}

pub(super) fn size(worker: &WorkerInfo) -> Result<Size> {
    let pid = worker.host_pid;
    let (start_time, maps) = Map::all(pid)?;
    let memory = ProcMemory::open(pid)?;
    let regions = manifest::find(pid, start_time, &maps, &memory)?
        .map(|present| present.manifest.regions)
        .unwrap_or_default();
    let mut unrecorded = 0;
    for map in &maps {
        ensure!(
            !(map.writable && map.executable),
            "worker {pid}: {:#x} is writable and executable",
            map.start
        );
        let control = map.name.starts_with("/memfd:nightgraft");
        if !(control || map.name.is_empty() && !map.writable) {
            continue;
        }
        let recorded: u64 = regions
            .iter()
            .map(|r| {
                let end = map.end.min(r.start.saturating_add(r.len));
                end.saturating_sub(map.start.max(r.start))
            })
            .sum();
        let inaccessible = inaccessible(pid, map.start)?;
        if !inaccessible {
            unrecorded += (map.end - map.start).saturating_sub(recorded);
        }
    }
    Ok(Size {
        unrecorded,
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
    })
}

/// Whether what begins at an address has no access at all: guards of stacks
/// and reserves of `malloc` come and go.
fn inaccessible(pid: i32, start: u64) -> Result<bool> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let begins = format!("{start:x}-");
    Ok(maps
        .lines()
        .filter(|line| line.trim_start_matches('0').starts_with(&begins))
        .any(|line| line.split(' ').nth(1) == Some("---p")))
}

/// Threads of a worker that are stopped or traced, told.
pub(super) fn held_threads(worker: &WorkerInfo) -> Result<Vec<String>> {
    let mut held = Vec::new();
    let tasks = format!("/proc/{}/task", worker.host_pid);
    for task in fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        // One that ends meanwhile is not held.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else {
            continue;
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        let (state, tracer) = (field("State:"), field("TracerPid:"));
        if state.starts_with(['t', 'T']) || tracer != "0" {
            held.push(format!(
                "thread {}: {state}, traced by {tracer}",
                field("Pid:")
            ));
        }
    }
    Ok(held)
}
