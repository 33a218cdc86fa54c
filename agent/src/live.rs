//! [`Grafter`] on real workers: the patcher, with its errors in the agent's
//! words.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nightgraft_patcher::analyses::Analyses;
use nightgraft_patcher::apply::{Applied, ApplyError, Limits};
use nightgraft_patcher::manifest::OBSERVING;
use nightgraft_patcher::observed::Counters;
use nightgraft_patcher::recover;
use nightgraft_patcher::session::{self, Failure, Function};
use nightgraft_patcher::snapshot::SnapshotError;

use crate::claim::{self, Claim};
use crate::grafter::{
    Counting, Explained, GraftError, Grafter, Held, PatchReceipt, Reading, Recovered,
    RevertReceipt, Target, Wanted, WorkerStatus,
};
use crate::journal::Disk;

/// How long a request waits for another agent that works in its workers: that
/// one may be watching a canary.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);

/// The patcher.
#[derive(Debug)]
pub struct Live {
    limits: Limits,
    analyses: Analyses,
    /// Control memories of workers that were patched for the first time by this
    /// agent; by pid and start time. Others take a capability to be found.
    controls: Mutex<HashMap<(i32, u64), File>>,
    journal: Arc<Disk>,
}

impl Live {
    /// A patcher that writes down what it does.
    #[must_use]
    pub fn new(journal: Arc<Disk>) -> Self {
        Self {
            limits: Limits::default(),
            analyses: Analyses::default(),
            controls: Mutex::default(),
            journal,
        }
    }
}

impl Live {
    /// Keeps the control memory that was just made, for as long as the worker
    /// lives.
    fn keep(&self, worker: &Target, applied: Applied) -> PatchReceipt {
        if let Some(control) = applied.control {
            let mut controls = self.controls.lock().unwrap_or_else(PoisonError::into_inner);
            controls.insert((worker.pid, worker.start_time), control);
        }
        applied.receipt
    }

    /// The control memory of a worker that was kept.
    fn control(&self, worker: &Target) -> Option<File> {
        let key = (worker.pid, worker.start_time);
        let controls = self.controls.lock().unwrap_or_else(PoisonError::into_inner);
        controls.get(&key)?.try_clone().ok()
    }
}

/// The counters of a worker, with errors in the agent's words.
#[derive(Debug)]
struct OfWorker {
    counters: Counters,
    of: Target,
}

impl Counting for OfWorker {
    fn read(&mut self) -> Result<Option<Reading>, GraftError> {
        let read = self.counters.read();
        read.map_err(|error| failed(error.into(), &[&self.of]))
    }
}

fn function(target: &Target) -> Function<'_> {
    Function {
        pid: target.pid,
        start_time: target.start_time,
        library: &target.library,
    }
}

impl Grafter for Live {
    fn explain(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
        wanted: Wanted,
    ) -> Result<Explained, GraftError> {
        let plan = session::explain(
            function(caller),
            function(callee),
            callee_name,
            wanted,
            &self.analyses,
        )
        .map_err(|failure| failed(failure, &[caller, callee]))?;
        let text = plan.render();
        let refused = plan.refusal();
        let bytes = plan.resident_bytes();
        match serde_json::to_value(&plan) {
            Ok(plan) => Ok(Explained {
                text,
                plan,
                refused,
                bytes,
            }),
            Err(error) => Err(GraftError::Failed(format!(
                "the plan can't be serialised: {error}"
            ))),
        }
    }

    fn patch(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
        wanted: Wanted,
    ) -> Result<PatchReceipt, GraftError> {
        session::patch(
            function(caller),
            function(callee),
            callee_name,
            wanted,
            &self.analyses,
            &self.limits,
            &*self.journal,
        )
        .map(|applied| self.keep(caller, applied))
        .map_err(|failure| failed(failure, &[caller, callee]))
    }

    fn hold(&self, worker: &Target) -> Result<Option<Held>, GraftError> {
        session::hold(function(worker), self.control(worker))
            .map_err(|failure| failed(failure, &[worker]))
    }

    fn revert(&self, caller: &Target, callee_name: &str) -> Result<RevertReceipt, GraftError> {
        session::revert(function(caller), callee_name, &self.limits, &*self.journal)
            .map_err(|failure| failed(failure, &[caller]))
    }

    fn observe(&self, worker: &Target) -> Result<PatchReceipt, GraftError> {
        session::observe(
            function(worker),
            &self.analyses,
            &self.limits,
            &*self.journal,
        )
        .map(|applied| self.keep(worker, applied))
        .map_err(|failure| failed(failure, &[worker]))
    }

    fn leave(&self, worker: &Target) -> Result<RevertReceipt, GraftError> {
        self.revert(worker, OBSERVING)
    }

    fn counters(&self, worker: &Target) -> Result<Option<Box<dyn Counting>>, GraftError> {
        let control = self.control(worker);
        let counters = Counters::open(function(worker), control)
            .map_err(|failure| failed(failure, &[worker]))?;
        let of = worker.clone();
        Ok(counters.map(|counters| Box::new(OfWorker { counters, of }) as Box<dyn Counting>))
    }

    fn status(&self, worker: &Target) -> Result<Option<WorkerStatus>, GraftError> {
        session::read_status(function(worker)).map_err(|failure| failed(failure, &[worker]))
    }

    fn build_id(&self, worker: &Target) -> Result<Option<String>, GraftError> {
        let id =
            session::build_id(function(worker)).map_err(|failure| failed(failure, &[worker]))?;
        Ok((!id.is_empty()).then_some(id))
    }

    fn tidy(&self) {
        let mut controls = self.controls.lock().unwrap_or_else(PoisonError::into_inner);
        controls.retain(|&(pid, start_time), _| started(pid) == Some(start_time));
        drop(controls);
        self.analyses.tidy();
    }

    fn set_gate(&self, caller: &Target, callee_name: &str, on: bool) -> Result<(), GraftError> {
        match session::set_gate(function(caller), callee_name, on) {
            Ok(true) => Ok(()),
            Ok(false) => Err(GraftError::Failed(format!(
                "{callee_name} is not fused into worker {}",
                caller.pid
            ))),
            Err(failure) => Err(failed(failure, &[caller])),
        }
    }

    fn forget_crash(&self, caller: &Target, callee_name: &str) -> Result<(), GraftError> {
        session::forget_crash(function(caller), callee_name)
            .map_err(|failure| failed(failure, &[caller]))
    }

    fn claim(&self, workers: &[Target]) -> Result<Claim, GraftError> {
        claim::claim(workers, CLAIM_PATIENCE)
    }

    fn claim_at_once(&self, workers: &[Target]) -> Result<Claim, GraftError> {
        claim::claim(workers, Duration::ZERO)
    }

    fn recover(
        &self,
        worker: &Target,
        patience: Duration,
    ) -> Result<Option<Recovered>, GraftError> {
        let failed = |failure| failed(failure, &[worker]);
        // Most workers need nothing: they are not even claimed for that.
        if !recover::is_due(function(worker), &*self.journal).map_err(failed)? {
            return Ok(None);
        }
        let _claim = claim::claim([worker], patience)?;
        session::recovered(function(worker), &self.limits, &*self.journal).map_err(failed)
    }

    fn journal(&self) -> (String, Option<String>) {
        (
            self.journal.path().display().to_string(),
            self.journal.away(),
        )
    }
}

/// How long a process that may be dying is watched.
const DYING: Duration = Duration::from_millis(50);

/// The error of a call on these workers. A worker that dies while it is read
/// or traced shows in many ways (short reads, threads that are gone): whatever
/// failed, a dead worker is the reason to give.
fn failed(failure: Failure, workers: &[&Target]) -> GraftError {
    let error = graft_error(failure);
    if !matches!(error, GraftError::Failed(_)) {
        return error;
    }
    match workers.iter().find(|worker| !lives(worker)) {
        Some(worker) => GraftError::WorkerGone { pid: worker.pid },
        None => error,
    }
}

/// Whether the worker goes on living: one with a SIGKILL pending, or without
/// memory already, is given a moment to be gone.
fn lives(worker: &Target) -> bool {
    let since = Instant::now();
    loop {
        let dying = match procfs_state(worker) {
            None => return false,
            Some(dying) => dying,
        };
        if since.elapsed() > DYING {
            return !dying;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// When a process has started, in clock ticks since boot; `None` for one that
/// is gone, or dead and not buried yet.
pub(crate) fn started(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may hold anything: state is field 3, start time 22.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let start_time = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X" | "x")).then_some(start_time)
}

/// `None` if the process is gone, else whether it is on its way out.
fn procfs_state(worker: &Target) -> Option<bool> {
    const SIGKILL: u64 = 1 << 8;
    if started(worker.pid) != Some(worker.start_time) {
        return None;
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid)).ok()?;
    let pending = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let killed = ["SigPnd:", "ShdPnd:"]
        .into_iter()
        .filter_map(pending)
        .any(|p| p & SIGKILL != 0);
    Some(killed || !status.contains("VmSize:"))
}

fn graft_error(failure: Failure) -> GraftError {
    match failure {
        Failure::Refused(refused) => GraftError::Refused(refused),
        Failure::Snapshot(error) => snapshot_error(error),
        Failure::Apply(ApplyError::Trace(error)) => trace_error(error),
        Failure::Apply(ApplyError::Gone { pid }) => GraftError::WorkerGone { pid },
        other => GraftError::Failed(other.to_string()),
    }
}

fn snapshot_error(error: SnapshotError) -> GraftError {
    match error {
        SnapshotError::Gone { pid } => GraftError::WorkerGone { pid },
        SnapshotError::Read { what, source, .. }
            if source.kind() == ErrorKind::PermissionDenied =>
        {
            may_not(&format!("read {what} of a worker"))
        }
        other => GraftError::Failed(other.to_string()),
    }
}

/// What was denied: to everyone, or to us for want of a capability.
fn may_not(purpose: &str) -> GraftError {
    match ptrace_shim::yama_scope() {
        Some(3) => GraftError::TracingForbidden,
        _ => missing_ptrace(purpose),
    }
}

fn missing_ptrace(purpose: &str) -> GraftError {
    GraftError::MissingCapability {
        capability: "CAP_SYS_PTRACE".to_owned(),
        purpose: purpose.to_owned(),
        flag: "--cap-add SYS_PTRACE".to_owned(),
    }
}

fn trace_error(error: ptrace_shim::Error) -> GraftError {
    use ptrace_shim::Error;
    match error {
        Error::TracedByAnother {
            pid, tracer, comm, ..
        } => GraftError::TracedBy {
            pid: pid.as_raw(),
            tracer_pid: tracer.as_raw(),
            tracer_name: if comm.is_empty() {
                "?".to_owned()
            } else {
                comm
            },
        },
        Error::NotPermitted {
            yama_scope: Some(3),
            ..
        } => GraftError::TracingForbidden,
        Error::NotPermitted { .. } => missing_ptrace("stop a worker"),
        Error::NoSuchProcess { pid }
        | Error::ProcessDied { pid, .. }
        // It lives, but is no worker any more.
        | Error::Executed { pid, .. }
        | Error::AddressSpaceGone { pid } => GraftError::WorkerGone { pid: pid.as_raw() },
        other => GraftError::Failed(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn target(pid: u32) -> Target {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let start_time = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .nth(19)
            .unwrap();
        Target {
            pid: pid.cast_signed(),
            start_time: start_time.parse().unwrap(),
            library: "/functions/libfoo.so".into(),
        }
    }

    fn broken() -> Failure {
        Failure::Snapshot(SnapshotError::LinkMap {
            what: "the chain does not end".into(),
        })
    }

    #[test]
    fn whatever_failed_a_dead_worker_is_the_reason() {
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let worker = target(child.id());
        assert!(matches!(
            failed(broken(), &[&worker]),
            GraftError::Failed(_)
        ));
        child.kill().unwrap();
        // Not reaped: a zombie is as good as gone.
        let gone = GraftError::WorkerGone { pid: worker.pid };
        assert_eq!(failed(broken(), &[&worker]), gone);
        child.wait().unwrap();
        assert_eq!(failed(broken(), &[&worker]), gone);
    }

    #[test]
    fn another_process_with_the_pid_is_not_the_worker() {
        let mut me = target(std::process::id());
        assert!(lives(&me));
        me.start_time += 1;
        assert!(!lives(&me));
    }
}
