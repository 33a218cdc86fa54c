//! [`Grafter`] on real workers: the patcher, with its errors in the agent's
//! words.

use std::io::ErrorKind;

use nightgraft_patcher::apply::{ApplyError, Limits};
use nightgraft_patcher::session::{self, Failure, Function};
use nightgraft_patcher::snapshot::SnapshotError;

use crate::grafter::{
    Explained, GraftError, Grafter, PatchReceipt, RevertReceipt, Target, WorkerStatus,
};

/// The patcher.
#[derive(Debug, Default)]
pub struct Live {
    limits: Limits,
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
    ) -> Result<Explained, GraftError> {
        let plan = session::explain(function(caller), function(callee), callee_name)
            .map_err(graft_error)?;
        let text = plan.render();
        match serde_json::to_value(&plan) {
            Ok(plan) => Ok(Explained { text, plan }),
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
    ) -> Result<PatchReceipt, GraftError> {
        session::patch(
            function(caller),
            function(callee),
            callee_name,
            &self.limits,
        )
        .map_err(graft_error)
    }

    fn revert(&self, caller: &Target, callee_name: &str) -> Result<RevertReceipt, GraftError> {
        session::revert(function(caller), callee_name, &self.limits).map_err(graft_error)
    }

    fn status(&self, worker: &Target) -> Result<Option<WorkerStatus>, GraftError> {
        session::read_status(function(worker)).map_err(graft_error)
    }

    fn build_id(&self, worker: &Target) -> Result<Option<String>, GraftError> {
        let id = session::build_id(function(worker)).map_err(graft_error)?;
        Ok((!id.is_empty()).then_some(id))
    }

    fn set_gate(&self, caller: &Target, callee_name: &str, on: bool) -> Result<(), GraftError> {
        match session::set_gate(function(caller), callee_name, on) {
            Ok(true) => Ok(()),
            Ok(false) => Err(GraftError::Failed(format!(
                "{callee_name} is not fused into worker {}",
                caller.pid
            ))),
            Err(failure) => Err(graft_error(failure)),
        }
    }
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
            missing_ptrace(&format!("read {what} of a worker"))
        }
        other => GraftError::Failed(other.to_string()),
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
        } => GraftError::Failed(
            "kernel.yama.ptrace_scope is 3: nobody may trace until the node is restarted with \
             another value"
                .to_owned(),
        ),
        Error::NotPermitted { .. } => missing_ptrace("stop a worker"),
        Error::NoSuchProcess { pid }
        | Error::ProcessDied { pid, .. }
        | Error::AddressSpaceGone { pid } => GraftError::WorkerGone { pid: pid.as_raw() },
        other => GraftError::Failed(other.to_string()),
    }
}
