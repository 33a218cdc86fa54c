//! The way from two pids to a fused edge, in one place: read, plan, apply.

use std::mem::offset_of;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use nightgraft_bridge::abi::SharedEdge;

use crate::analyses::Analyses;
use crate::apply::{self, Applied, ApplyError, Limits};
use crate::code::Live;
use crate::effects::Allowance;
use crate::elf::{ElfError, Image};
use crate::held::Held;
use crate::journal::Journal;
use crate::manifest::{self, FindError, OBSERVING, Present};
use crate::plan::{self, Input, PatchPlan, Wanted};
use crate::recover::{self, Recovered, Verdict};
use crate::refused::Refused;
use crate::report::{RevertReceipt, WorkerStatus};
use crate::room::{self, memory_room};
use crate::snapshot::{Map, Memory, ProcMemory, SnapshotError, Worker, invoke_routines};
use crate::status::status;

/// The bridge, compiled into the agent.
static BRIDGE: &[u8] = include_bytes!(env!("NIGHTGRAFT_BRIDGE_IMAGE"));

/// How often a plan is made anew when the worker has taken the planned
/// addresses meanwhile.
const TRIES: usize = 5;

/// Why an edge was not fused or reverted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// It cannot be done right.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A worker could not be read.
    #[error(transparent)]
    Snapshot(SnapshotError),
    /// The worker could not be changed.
    #[error(transparent)]
    Apply(ApplyError),
}

impl From<SnapshotError> for Failure {
    fn from(error: SnapshotError) -> Failure {
        match error {
            SnapshotError::Replaced { pid, path } => {
                Failure::Refused(Refused::Replaced { path, pid })
            }
            SnapshotError::Elf {
                path,
                source: ElfError::Foreign { what },
            } => Failure::Refused(Refused::OtherMachine {
                library: path,
                what,
            }),
            SnapshotError::Elf { path, source } => Failure::Refused(Refused::BrokenImage {
                library: path,
                reason: source.to_string(),
            }),
            other => Failure::Snapshot(other),
        }
    }
}

impl From<FindError> for Failure {
    fn from(error: FindError) -> Failure {
        match error {
            FindError::Snapshot(e) => e.into(),
            FindError::Refused(r) => Failure::Refused(r),
        }
    }
}

impl From<ApplyError> for Failure {
    fn from(error: ApplyError) -> Failure {
        match error {
            ApplyError::Refused(r) => Failure::Refused(r),
            ApplyError::Snapshot(e) => e.into(),
            other => match other.refusal() {
                Some(refused) => Failure::Refused(refused),
                None => Failure::Apply(other),
            },
        }
    }
}

/// A worker of a function.
#[derive(Debug, Clone, Copy)]
pub struct Function<'a> {
    /// The worker, as the host numbers it.
    pub pid: i32,
    /// Its start time in clock ticks since boot.
    pub start_time: u64,
    /// The function's library, as the worker names it.
    pub library: &'a Path,
}

impl Function<'_> {
    fn read(&self) -> Result<Worker, Failure> {
        let worker = Worker::read(self.pid, self.library)?;
        if worker.start_time != self.start_time {
            return Err(Failure::Snapshot(SnapshotError::Gone { pid: self.pid }));
        }
        Ok(worker)
    }
}

pub(crate) fn bridge() -> Result<Arc<Image>, Failure> {
    static PARSED: OnceLock<Result<Arc<Image>, String>> = OnceLock::new();
    PARSED
        .get_or_init(|| {
            Image::parse(BRIDGE.into())
                .map(Arc::new)
                .map_err(|e| e.to_string())
        })
        .clone()
        .map_err(|reason| {
            Failure::Refused(Refused::BrokenImage {
                library: "the bridge".into(),
                reason,
            })
        })
}

/// Plans the fusing of `name` (whose worker is `callee`) into `caller`,
/// without touching either. Effects that are not allowed are no refusal here:
/// see [`PatchPlan::refusal`].
///
/// # Errors
/// Another refusal, or a worker that cannot be read.
pub fn explain(
    caller: Function<'_>,
    callee: Function<'_>,
    name: &str,
    wanted: Wanted,
    analyses: &Analyses,
) -> Result<PatchPlan, Failure> {
    let callee = callee.read()?;
    Ok(planned(caller, Some(&callee), name, wanted, analyses)?.0)
}

/// The plan for `callee`; without one, that to count the worker's calls.
fn planned(
    caller: Function<'_>,
    callee: Option<&Worker>,
    name: &str,
    wanted: Wanted,
    analyses: &Analyses,
) -> Result<(PatchPlan, Option<Present>), Failure> {
    let caller = caller.read()?;
    apply::foresee_calls(caller.pid)?;
    if room::is_frozen(caller.pid) {
        return Err(Failure::Refused(Refused::Frozen { pid: caller.pid }));
    }
    let code = plan::analyse(caller.function(), analyses)?;
    let memory = ProcMemory::open(caller.pid)?;
    let present = manifest::find(caller.pid, caller.start_time, &caller.maps, &memory)?;
    let bridge = bridge()?;
    let invoke = routine(&caller, &memory, analyses);
    let live = LiveWorker {
        maps: &caller.maps,
        memory: &memory,
    };
    let input = Input {
        caller: &caller,
        code: &code,
        callee: callee.unwrap_or(&caller),
        name,
        present: present.as_ref(),
        bridge: &bridge,
        memory_room: memory_room(caller.pid),
        address_room: room::address_room(caller.pid),
        longest_window: ptrace_shim::WriteMethod::of_this_kernel().most_in_one_go(),
        invoke: &invoke,
        live: &live,
        wanted,
        analyses,
    };
    let plan = match callee {
        Some(_) => plan::plan(&input)?,
        None => plan::observe(&input)?,
    };
    Ok((plan, present))
}

/// The worker's own `invoke_func`.
fn routine(worker: &Worker, memory: &dyn Memory, analyses: &Analyses) -> Result<u64, Refused> {
    match invoke_routines(worker, memory, analyses).as_slice() {
        [one] => Ok(*one),
        several => Err(Refused::NoInvokeRoutine {
            executable: worker.executable().path.clone(),
            found: several.len(),
        }),
    }
}

/// The caller's worker while it runs on.
struct LiveWorker<'a> {
    maps: &'a [Map],
    memory: &'a dyn Memory,
}

impl LiveWorker<'_> {
    fn map(&self, at: u64) -> Option<&Map> {
        let index = self.maps.partition_point(|m| m.end <= at);
        self.maps.get(index).filter(|m| m.start <= at)
    }
}

impl Live for LiveWorker<'_> {
    fn word(&self, at: u64) -> Option<u64> {
        // Only what is mapped: a read just below the stack makes it grow.
        self.map(at)?;
        self.memory.u64(at).ok()
    }

    fn is_code(&self, at: u64) -> bool {
        self.map(at).is_some_and(|m| m.executable)
    }

    fn is_stack(&self, at: u64) -> bool {
        self.map(at).is_some_and(|m| m.name == "[stack]")
    }
}

/// Fuses `name` into one worker, if it shows no guarded effect but those
/// allowed; that holds for an edge that is fused already as well. What is
/// done is written down in the journal first, and refused where that cannot
/// be. A worker in which an agent died is put in order before.
///
/// # Errors
/// See [`Failure`].
pub fn patch(
    caller: Function<'_>,
    callee: Function<'_>,
    name: &str,
    wanted: Wanted,
    analyses: &Analyses,
    limits: &Limits,
    journal: &dyn Journal,
) -> Result<Applied, Failure> {
    let entry = journal.entry(caller.pid, caller.start_time);
    entry.map_err(|error| Refused::Journal { reason: error.0 })?;
    let recovered = recovered(caller, limits, journal)?;
    let callee = callee.read()?;
    if let Some(left) = recovered.filter(|r| r.verdict == Verdict::Left) {
        // What keeps the patch from being done has a name of its own, mostly.
        let (plan, _) = planned(caller, Some(&callee), name, wanted, analyses)?;
        apply::check(&plan)?;
        return Err(Failure::Refused(Refused::Unreconciled {
            pid: left.pid,
            reason: left.notes.join("; "),
        }));
    }
    let mut tries = 1;
    loop {
        let (plan, present) = planned(caller, Some(&callee), name, wanted, analyses)?;
        if let Some(refused) = plan.refusal() {
            return Err(Failure::Refused(refused));
        }
        let before = present.as_ref().map(|present| &present.manifest);
        match apply::apply(&plan, before, limits, journal) {
            Err(ApplyError::Occupied { .. }) if tries < TRIES => tries += 1,
            other => return Ok(other?),
        }
    }
}

/// Has a worker's RPCs and calls of its function counted from here on. Else as
/// [`patch`].
///
/// # Errors
/// See [`Failure`].
pub fn observe(
    worker: Function<'_>,
    analyses: &Analyses,
    limits: &Limits,
    journal: &dyn Journal,
) -> Result<Applied, Failure> {
    let entry = journal.entry(worker.pid, worker.start_time);
    entry.map_err(|error| Refused::Journal { reason: error.0 })?;
    if let Some(left) = recovered(worker, limits, journal)?.filter(|r| r.verdict == Verdict::Left) {
        return Err(Failure::Refused(Refused::Unreconciled {
            pid: left.pid,
            reason: left.notes.join("; "),
        }));
    }
    let mut tries = 1;
    loop {
        let (plan, present) = planned(worker, None, OBSERVING, Allowance::NONE.into(), analyses)?;
        let before = present.as_ref().map(|present| &present.manifest);
        match apply::apply(&plan, before, limits, journal) {
            Err(ApplyError::Occupied { .. }) if tries < TRIES => tries += 1,
            other => return Ok(other?),
        }
    }
}

/// Puts a worker in order in which an agent may have died; `None` where there
/// is nothing to be done.
///
/// # Errors
/// The worker cannot be read.
pub fn recovered(
    worker: Function<'_>,
    limits: &Limits,
    journal: &dyn Journal,
) -> Result<Option<Recovered>, Failure> {
    if !recover::is_due(worker, journal)? {
        return Ok(None);
    }
    recover::recover(worker, limits, journal).map(Some)
}

/// Reverts `name` in one worker. It needs the worker's record, which is
/// written from the journal should it be lost, but no journal that works.
///
/// # Errors
/// See [`Failure`].
pub fn revert(
    caller: Function<'_>,
    name: &str,
    limits: &Limits,
    journal: &dyn Journal,
) -> Result<RevertReceipt, Failure> {
    // What could not be put in order is reverted as far as it can be.
    let recovered = recovered(caller, limits, journal)?;
    let reverted = recovered.is_some_and(|r| r.reverted.iter().any(|callee| callee == name));
    match present(caller)? {
        Some((present, _)) => {
            let mut receipt = apply::revert(&present, name, limits, journal)?;
            // Putting it in order was just that.
            receipt.nothing &= !reverted;
            Ok(receipt)
        }
        None => Ok(RevertReceipt {
            pid: caller.pid,
            nothing: true,
            restored: true,
            reason: None,
            sites: Vec::new(),
            stops_ns: Vec::new(),
            disturbed: Vec::new(),
            signals: None,
            journal: None,
        }),
    }
}

/// What one worker holds of ours, `None` for nothing.
///
/// # Errors
/// See [`Failure`].
pub fn read_status(worker: Function<'_>) -> Result<Option<WorkerStatus>, Failure> {
    match present(worker)? {
        Some((present, memory)) => Ok(Some(status(&present, &memory)?)),
        None => Ok(None),
    }
}

/// Opens or closes an edge's gate in one worker: one byte, no stop. Gives
/// whether there is such an edge.
///
/// # Errors
/// See [`Failure`].
pub fn set_gate(worker: Function<'_>, callee: &str, on: bool) -> Result<bool, Failure> {
    let Some((present, _)) = present(worker)? else {
        return Ok(false);
    };
    let Some(graft) = present.manifest.graft(callee) else {
        return Ok(false);
    };
    let process = ptrace_shim::Process::open(worker.pid).map_err(ApplyError::from)?;
    if process.start_time() != worker.start_time {
        return Err(Failure::Snapshot(SnapshotError::Gone { pid: worker.pid }));
    }
    let memory = ptrace_shim::Memory::open(&process).map_err(ApplyError::from)?;
    memory
        .write(
            ptrace_shim::Address(present.manifest.gate(graft)),
            &[u8::from(on)],
        )
        .map_err(ApplyError::from)?;
    Ok(true)
}

/// Lets an edge's crash be forgotten, so that the next one counts; its image is
/// not called again all the same. Stops nobody.
///
/// # Errors
/// See [`Failure`].
pub fn forget_crash(worker: Function<'_>, callee: &str) -> Result<(), Failure> {
    let Some((present, _)) = present(worker)? else {
        return Ok(());
    };
    let manifest = &present.manifest;
    let process = ptrace_shim::Process::open(worker.pid).map_err(ApplyError::from)?;
    if process.start_time() != worker.start_time {
        return Err(Failure::Snapshot(SnapshotError::Gone { pid: worker.pid }));
    }
    let memory = ptrace_shim::Memory::open(&process).map_err(ApplyError::from)?;
    for graft in manifest.grafts.iter().filter(|g| g.callee == callee) {
        let at = manifest.edge(graft) + offset_of!(SharedEdge, crashed) as u64;
        memory
            .write(ptrace_shim::Address(at), &[0])
            .map_err(ApplyError::from)?;
    }
    Ok(())
}

/// Holds what tells of a worker when it has died; `None` where nothing of ours
/// is in it. `control` is its control memory, if a patch has just made it. To
/// find it again takes CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN): without, what
/// is held knows of the death alone.
///
/// # Errors
/// See [`Failure`].
pub fn hold(worker: Function<'_>, control: Option<std::fs::File>) -> Result<Option<Held>, Failure> {
    let (start_time, maps) = Map::all(worker.pid)?;
    let Some((present, _)) = present(worker)? else {
        return Ok(None);
    };
    let process = ptrace_shim::Process::open(worker.pid).map_err(ApplyError::from)?;
    if start_time != worker.start_time || process.start_time() != start_time {
        return Err(Failure::Snapshot(SnapshotError::Gone { pid: worker.pid }));
    }
    let area = maps.iter().find(|m| m.start == present.manifest.control);
    Ok(Some(Held::new(process, area, control)))
}

/// Build-id of a function's library, lower-case hex; empty if it has none.
///
/// # Errors
/// The worker cannot be read.
pub fn build_id(worker: Function<'_>) -> Result<String, Failure> {
    Ok(worker.read()?.function().image.build_id_hex())
}

fn present(worker: Function<'_>) -> Result<Option<(Present, ProcMemory)>, Failure> {
    let (start_time, maps) = Map::all(worker.pid)?;
    if start_time != worker.start_time {
        return Err(Failure::Snapshot(SnapshotError::Gone { pid: worker.pid }));
    }
    let memory = ProcMemory::open(worker.pid)?;
    Ok(manifest::find(worker.pid, start_time, &maps, &memory)?.map(|present| (present, memory)))
}
