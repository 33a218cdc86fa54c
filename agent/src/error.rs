//! Why the agent did not do what it was asked.
//!
//! One enum for the whole agent. Each variant has a stable code, a message
//! that says what and where, and a hint that says what to do. HTTP status
//! codes are the server's business ([`crate::server`]), exit codes those of
//! [`crate::cli`].

use crate::api::{ErrorInfo, PatchOutcome, PatchReport, Quarantined, RevertReport};
use crate::grafter::GraftError;

/// A request that was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The request is no request: malformed JSON, an unknown field.
    #[error("the request can't be read: {detail}")]
    BadRequest {
        /// What is wrong with it, and where.
        detail: String,
    },
    /// No function of that name is known on this node.
    #[error("there is no function \"{name}\" on this node{}", near_text(.near))]
    UnknownFunction {
        /// The name as it was asked for.
        name: String,
        /// Names that are near, nearest first; empty where none is.
        near: Vec<String>,
        /// How many functions are known at all.
        known: usize,
    },
    /// The name means more than one function.
    #[error("\"{name}\" means more than one function: {}", .choices.join(", "))]
    AmbiguousFunction {
        /// The name as it was asked for.
        name: String,
        /// The functions that it may mean, with their engines.
        choices: Vec<String>,
    },
    /// The way to the callee comes by one function twice.
    #[error("the way {way}/{again} comes by {again} twice")]
    Recursive {
        /// The way so far.
        way: String,
        /// The function that is on it already.
        again: String,
    },
    /// The function is configured but nothing runs it.
    #[error("function {name} has no running worker")]
    NoWorkers {
        /// The function.
        name: String,
    },
    /// The function's workers run no C or C++ library.
    #[error(
        "function {name} runs in a worker that is not native (pid {pid}, {language}): only libraries in a func_worker_v1 can be fused"
    )]
    NotNative {
        /// The function.
        name: String,
        /// Go, Node.js, Python, or "no func_worker_v1" where that is not known.
        language: String,
        /// One of its workers.
        pid: i32,
    },
    /// A worker died while the callee's code ran, and nobody has said that it
    /// may run fused again.
    #[error("{} → {} is quarantined: worker {} {}", .0.caller, .0.callee, .0.pid, .0.how)]
    Quarantined(Box<Quarantined>),
    /// The patcher's answer for the one worker in question.
    #[error(transparent)]
    Graft(#[from] GraftError),
    /// The first worker was patched but did not prove well, and was reverted if
    /// it was still there; the others were not touched.
    #[error("the first worker (pid {pid}) did not prove well and {}: {why}", became(.report, *.pid))]
    CanaryFailed {
        /// The worker.
        pid: i32,
        /// What was seen.
        why: String,
        /// All that was done.
        report: Box<PatchReport>,
    },
    /// Some or all workers could not be patched.
    #[error("{} of {} workers of {} are not fused: {first}", .report.not_fused(), .report.workers.len(), .report.caller)]
    PatchIncomplete {
        /// The first failure.
        first: ErrorInfo,
        /// All that was done.
        report: Box<PatchReport>,
    },
    /// Some or all workers could not be reverted.
    #[error("{} of {} workers of {} are not reverted: {first}", .report.not_reverted(), .report.workers.len(), .report.caller)]
    RevertIncomplete {
        /// The first failure.
        first: ErrorInfo,
        /// All that was done.
        report: Box<RevertReport>,
    },
    /// `/proc` could not be searched.
    #[error("can't look for workers in {path}: {cause}")]
    Discovery {
        /// Where.
        path: String,
        /// Why.
        cause: std::io::Error,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests wait for the driver already")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// The time limit of a request has passed.
    #[error("{operation} took longer than {seconds} s")]
    Timeout {
        /// Which operation.
        operation: String,
        /// The limit, in seconds.
        seconds: u64,
    },
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
    /// The peer is not allowed to talk to the agent.
    #[error("user {uid} (pid {pid}) may not talk to the agent")]
    Denied {
        /// The peer's user id.
        uid: u32,
        /// The peer's process id; 0 where the kernel does not say.
        pid: i32,
    },
    /// No such path in the API.
    #[error("the agent has no {method} {path}")]
    NoSuchPath {
        /// HTTP method.
        method: String,
        /// Path.
        path: String,
    },
    /// What was asked for cannot be kept on the disk, and is not done.
    #[error("{what} can't be written down: {why}")]
    NotKept {
        /// What.
        what: String,
        /// Why.
        why: String,
    },
    /// A mistake of the agent's own.
    #[error("the agent failed: {detail}")]
    Internal {
        /// What.
        detail: String,
    },
}

fn near_text(near: &[String]) -> String {
    if near.is_empty() {
        String::new()
    } else {
        format!(" (near: {})", near.join(", "))
    }
}

/// The stable code of a patcher's error.
#[must_use]
pub fn graft_code(error: &GraftError) -> &'static str {
    match error {
        GraftError::Refused(refused) => refused.code(),
        GraftError::TracedBy { .. } => "worker-traced",
        GraftError::MissingCapability { .. } => "missing-capability",
        GraftError::TracingForbidden => "tracing-forbidden",
        GraftError::WorkerGone { .. } => "worker-gone",
        GraftError::Claimed { .. } => "worker-claimed",
        GraftError::Failed(_) => "graft-failed",
    }
}

fn graft_hint(error: &GraftError) -> Option<String> {
    match error {
        GraftError::Refused(refused) => Some(refused.lift()),
        GraftError::TracedBy { tracer_pid, .. } => Some(format!(
            "detach the tracer (pid {tracer_pid}) and try again"
        )),
        GraftError::MissingCapability { flag, .. } => Some(format!(
            "start the agent with {flag}, or as root outside of a container"
        )),
        GraftError::TracingForbidden => Some(
            "boot the node with another value: this one can't be changed while it runs".to_owned(),
        ),
        GraftError::WorkerGone { .. } => {
            Some("see `agentctl ps` for the workers that are there now".to_owned())
        }
        GraftError::Claimed { .. } => {
            Some("wait for the other agent, or stop it: one agent is enough for a node".to_owned())
        }
        GraftError::Failed(_) => None,
    }
}

/// A patcher's error as the API shows it.
#[must_use]
pub fn graft_info(error: &GraftError) -> ErrorInfo {
    ErrorInfo {
        code: graft_code(error).to_owned(),
        message: error.to_string(),
        hint: graft_hint(error),
    }
}

/// What became of a worker that did not prove well.
fn became(report: &PatchReport, pid: i32) -> &'static str {
    let mut workers = report.workers.iter();
    match workers.any(|w| w.pid == pid && w.outcome == PatchOutcome::Gone) {
        true => "is gone",
        false => "was reverted",
    }
}

impl AgentError {
    /// The stable code, in kebab case. A refusal has its own.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Self::BadRequest { .. } => "bad-request",
            Self::UnknownFunction { .. } => "unknown-function",
            Self::AmbiguousFunction { .. } => "ambiguous-function",
            Self::Recursive { .. } => "recursive",
            Self::NoWorkers { .. } => "no-workers",
            Self::NotNative { .. } => "not-native",
            Self::Quarantined(_) => "quarantined",
            Self::Graft(error) => graft_code(error),
            Self::CanaryFailed { .. } => "canary-failed",
            Self::PatchIncomplete { first, .. } | Self::RevertIncomplete { first, .. } => {
                &first.code
            }
            Self::Discovery { .. } => "discovery-failed",
            Self::Busy { .. } => "busy",
            Self::Timeout { .. } => "timeout",
            Self::Stopping => "stopping",
            Self::Denied { .. } => "denied",
            Self::NoSuchPath { .. } => "no-such-path",
            Self::NotKept { .. } => "not-kept",
            Self::Internal { .. } => "internal",
        }
    }

    /// What would help, where something would.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::BadRequest { .. } => {
                "send a JSON object such as {\"caller\": \"Foo\", \"callee\": \"Bar\"}".to_owned()
            }
            Self::UnknownFunction { known: 0, .. } => {
                "no engine or worker is visible: start the node, and an agent in a container \
                 with --pid=host"
                    .to_owned()
            }
            Self::UnknownFunction { .. } => "`agentctl ps` lists the functions".to_owned(),
            Self::AmbiguousFunction { .. } => {
                "say which one: name its engine with --engine PID, or spell its name exactly"
                    .to_owned()
            }
            Self::Recursive { .. } => {
                "leave that call to the RPC, as it is without being fused".to_owned()
            }
            Self::NoWorkers { .. } => {
                "send it a request or raise its minWorkers, then try again".to_owned()
            }
            Self::NotNative { .. } => {
                "only functions that func_worker_v1 runs (C and C++) can be fused".to_owned()
            }
            Self::Quarantined(edge) => format!(
                "when the callee is mended: agentctl unquarantine {} {}, then patch again",
                edge.caller, edge.callee
            ),
            Self::Graft(error) => return graft_hint(error),
            Self::CanaryFailed { .. } => {
                "the other workers were not touched; a callee that is slow to start needs a \
                 longer --canary-wait"
                    .to_owned()
            }
            Self::PatchIncomplete { first, .. } | Self::RevertIncomplete { first, .. } => {
                return first.hint.clone();
            }
            Self::Discovery { .. } => {
                "the agent needs to read /proc: run it as root, in a container with --pid=host"
                    .to_owned()
            }
            Self::Busy { .. } | Self::Stopping => "try again later".to_owned(),
            Self::Timeout { .. } => "what was begun goes on: see `agentctl status`".to_owned(),
            Self::Denied { .. } => "use agentctl as root".to_owned(),
            Self::NoSuchPath { .. } => {
                "GET /v1/health, /v1/ps, /v1/status, /v1/graph, /v1/history; POST /v1/explain, \
                 /v1/patch, /v1/revert, /v1/unquarantine, /v1/observe"
                    .to_owned()
            }
            Self::NotKept { .. } => {
                "the agent's --state-dir must be writable and have room".to_owned()
            }
            Self::Internal { .. } => return None,
        };
        Some(text)
    }

    /// The error as the API shows it.
    #[must_use]
    pub fn info(&self) -> ErrorInfo {
        ErrorInfo {
            code: self.code().to_owned(),
            message: self.to_string(),
            hint: self.hint(),
        }
    }
}
