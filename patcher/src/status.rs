//! What a worker holds, as the agent reports it: read from the worker itself,
//! without stopping it.

use std::mem::offset_of;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nightgraft_bridge::abi::{self, Control, Graft, Module, Range, SharedEdge};

use crate::manifest::{GraftRecord, Manifest, Present, Region};
use crate::report::{CalleeState, EdgeCounters, GraftStatus, GuardState, RpcReasons, WorkerStatus};
use crate::snapshot::{Memory, SnapshotError};

/// Reads the status of everything in `present`.
///
/// # Errors
/// The worker's memory cannot be read (any more).
pub fn status(present: &Present, memory: &dyn Memory) -> Result<WorkerStatus, SnapshotError> {
    let manifest = &present.manifest;
    // A call that is none of an edge's is counted for the worker.
    let common = |offset: usize| memory.u64(manifest.control + offset as u64);
    let common = RpcReasons {
        other_name: common(offset_of!(Control, other_name))?,
        other_target: common(offset_of!(Control, other_target))?,
        ..RpcReasons::default()
    };
    let mut grafts = Vec::new();
    for (index, graft) in manifest
        .grafts
        .iter()
        .enumerate()
        .filter(|(_, g)| !g.replaced)
    {
        let sites: Vec<usize> = (0..manifest.windows.len())
            .filter(|i| manifest.windows[*i].passed_by(graft.outermost()))
            .filter(|i| !present.is_gone(*i))
            .collect();
        let windows_in_place = !sites.is_empty() && sites.iter().all(|i| present.in_place(*i));
        let routine = sites
            .iter()
            .any(|i| manifest.windows[*i].routine && present.in_place(*i));
        let (state, failure) = match present.states[index] {
            abi::STATE_ARMED => (CalleeState::Armed, None),
            abi::STATE_INITIALISING => (CalleeState::Initialising, None),
            abi::STATE_READY | abi::STATE_INITIALISED => (CalleeState::Ready, None),
            _ => {
                let (state, why) = failure(graft, memory)?;
                (state, Some(why))
            }
        };
        grafts.push(GraftStatus {
            callee: graft.callee.clone(),
            build_id: graft.build_id.clone(),
            gate_on: present.gates[index],
            windows_in_place,
            state,
            failure,
            guard: if present.guards[index] {
                guard(manifest, memory)?
            } else {
                GuardState::None
            },
            sites: sites
                .into_iter()
                .filter(|i| manifest.windows[*i].is_site())
                .map(|i| manifest.windows[i].address)
                .collect(),
            routine,
            seen: present
                .unresolved(graft)
                .map(|call| call.seen.return_address)
                .collect(),
            counters: counters(manifest, graft, &common, memory)?,
        });
    }
    Ok(WorkerStatus {
        pid: manifest.pid,
        bridge_version: manifest.version,
        mapped_bytes: total(&manifest.regions),
        grafts,
        observing: present.observing,
    })
}

/// Bytes of all regions. The record is the worker's, so is what it adds up to.
fn total(regions: &[Region]) -> u64 {
    regions
        .iter()
        .fold(0, |sum, region| sum.saturating_add(region.len))
}

fn failure(
    graft: &GraftRecord,
    memory: &dyn Memory,
) -> Result<(CalleeState, String), SnapshotError> {
    let kind = memory.u64(graft.graft + offset_of!(Graft, failure) as u64)? as u32;
    let code = memory.u64(graft.graft + offset_of!(Graft, failure_code) as u64)? as u32 as i32;
    let state = match kind {
        abi::FAILURE_CRASHED => CalleeState::Crashed,
        _ => CalleeState::Failed,
    };
    let why = match kind {
        abi::FAILURE_THREAD => {
            format!(
                "its thread could not be started: {}",
                nix::errno::Errno::from_raw(code)
            )
        }
        abi::FAILURE_FAAS_INIT => format!("faas_init returned {code}"),
        abi::FAILURE_FAAS_CREATE => format!("faas_create_func_worker returned {code}"),
        abi::FAILURE_RELRO => {
            format!(
                "its RELRO pages could not be sealed: {}",
                nix::errno::Errno::from_raw(code)
            )
        }
        abi::FAILURE_THREAD_KEY => format!(
            "no thread key was left for its thread-local storage: {}",
            nix::errno::Errno::from_raw(code)
        ),
        abi::FAILURE_MEMORY => "there was no memory for its thread-local storage".to_owned(),
        abi::FAILURE_EXCEPTION => "an initialiser let an exception out".to_owned(),
        abi::FAILURE_CRASHED => {
            let at = memory.u64(graft.graft + offset_of!(Graft, crash) as u64)?;
            format!(
                "a guarded call raised {} at {}",
                signal(code),
                place(graft, at, memory)?
            )
        }
        other => format!("failure {other} with code {code}"),
    };
    Ok((state, why))
}

/// The name of a signal that a guard takes.
fn signal(number: i32) -> String {
    match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => signal.to_string(),
        Err(_) => format!("signal {number}"),
    }
}

/// More images than any callee has.
const MOST_MODULES: u64 = 1024;

/// A live address, by the callee's image that it is in.
pub(crate) fn place(
    graft: &GraftRecord,
    address: u64,
    memory: &dyn Memory,
) -> Result<String, SnapshotError> {
    let field = |offset: usize| memory.u64(graft.graft.wrapping_add(offset as u64));
    let modules = field(offset_of!(Graft, modules))?;
    let count = field(offset_of!(Graft, module_count))?.min(MOST_MODULES);
    for index in 0..count {
        let module = modules.wrapping_add(index * size_of::<Module>() as u64);
        let field = |offset: usize| memory.u64(module.wrapping_add(offset as u64));
        let start = field(offset_of!(Module, range) + offset_of!(Range, start))?;
        let len = field(offset_of!(Module, range) + offset_of!(Range, len))?;
        if address.wrapping_sub(start) < len {
            let path = memory.string(field(offset_of!(Module, path))?, MOST_PATH)?;
            let file = path.rsplit('/').next().unwrap_or_default();
            let bias = field(offset_of!(Module, bias))?;
            return Ok(format!("{file}+{:#x}", address.wrapping_sub(bias)));
        }
    }
    Ok(format!("{address:#x}"))
}

/// `PATH_MAX`.
const MOST_PATH: usize = 4096;

fn guard(manifest: &Manifest, memory: &dyn Memory) -> Result<GuardState, SnapshotError> {
    let mut state = [0];
    let guard = manifest.worker + offset_of!(abi::Worker, guard) as u64;
    memory.read(guard + offset_of!(abi::Guard, state) as u64, &mut state)?;
    Ok(match state[0] {
        abi::GUARD_WAITING => GuardState::Waiting,
        abi::GUARD_ON => GuardState::On,
        abi::GUARD_TAKEN => GuardState::Taken,
        _ => GuardState::Denied,
    })
}

fn counters(
    manifest: &Manifest,
    graft: &GraftRecord,
    common: &RpcReasons,
    memory: &dyn Memory,
) -> Result<EdgeCounters, SnapshotError> {
    let edge = manifest.edge(graft);
    let read = |offset: usize| memory.u64(edge + offset as u64);
    let returned = read(offset_of!(SharedEdge, returned))?;
    let samples = read(offset_of!(SharedEdge, samples))?;
    let cycles = read(offset_of!(SharedEdge, sampled_cycles))?;
    Ok(EdgeCounters {
        fused_calls: returned,
        in_flight: read(offset_of!(SharedEdge, entered))?.saturating_sub(returned),
        fused_errors: read(offset_of!(SharedEdge, errors))?,
        bytes_in: read(offset_of!(SharedEdge, bytes_in))?,
        bytes_out: read(offset_of!(SharedEdge, bytes_out))?,
        rpc: RpcReasons {
            gate_off: read(offset_of!(SharedEdge, rpc_gate_off))?,
            not_ready: read(offset_of!(SharedEdge, rpc_not_ready))?,
            busy: read(offset_of!(SharedEdge, rpc_busy))?,
            stack: read(offset_of!(SharedEdge, rpc_stack))?,
            memory: read(offset_of!(SharedEdge, rpc_memory))?,
            other_thread: read(offset_of!(SharedEdge, rpc_thread))?,
            ..common.clone()
        },
        fused_ns_mean: (samples > 0)
            .then(|| cycles as f64 / samples as f64 / cycles_per_nanosecond()),
    })
}

/// The rate of the time-stamp counter, measured once against the monotonic
/// clock (to about 0.1 %).
#[must_use]
pub fn cycles_per_nanosecond() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (start, from) = (Instant::now(), cycles());
        std::thread::sleep(Duration::from_millis(20));
        cycles().wrapping_sub(from) as f64 / start.elapsed().as_nanos() as f64
    })
}

fn cycles() -> u64 {
    // SAFETY: RDTSC reads a counter; it faults only where prctl(PR_SET_TSC)
    // forbade it to this process, which nobody does to an agent.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_add_up_to_more_than_there_is_do_not_overflow() {
        let regions = [u64::MAX - 1, 1, u64::MAX].map(|len| Region { start: 0, len });
        assert_eq!(total(&regions[..2]), u64::MAX);
        assert_eq!(total(&regions), u64::MAX);
        assert_eq!(total(&[]), 0);
    }
}
