//! Finds the node's functions and workers in `/proc`.
//!
//! ```text
//!  /proc ──► processes ─┬─► engines, gateways ─► func_config.json (in their root)
//!                       │                               │ names
//!                       └─► workers (FAAS_* in the environment) ──► matching ──► Node
//! ```
//!
//! A worker is a process with nightcore's variables in its environment. Those
//! are inherited, so a process that a worker forked, and a shell that a
//! launcher started one through, are told apart here. Nothing is cached: a
//! [`Node`] is how things were during one scan. A process that exits meanwhile
//! is left out. It does not look into a worker's memory; what is fused there
//! is [`crate::ops`]'s question to the patcher.

pub mod cgroup;
pub mod config;
pub mod docker;
mod limited;
pub mod matching;
pub mod proc;
mod scan;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use crate::api::{Tracer, WorkerKind};
use crate::grafter::Target;

pub use limited::scan_within;
pub use matching::Engine;
pub use proc::ProcRoot;
pub use scan::{own_capabilities, scan, sees_the_node, tracer_of};

/// The node as one scan saw it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Node {
    /// Functions, sorted by engine and id.
    pub functions: Vec<Function>,
    /// What could not be found out, in sentences.
    pub notes: Vec<String>,
}

/// One function of one engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// Its name, where it is known.
    pub name: Option<String>,
    /// nightcore's function id.
    pub id: u32,
    /// The engine's pid, where it is known.
    pub engine: Option<i32>,
    /// `minWorkers` of the configuration.
    pub min_workers: Option<i64>,
    /// `maxWorkers` of the configuration.
    pub max_workers: Option<i64>,
    /// Its workers, by pid.
    pub workers: Vec<Worker>,
}

impl Function {
    /// The name, or `#id` where there is none.
    #[must_use]
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("#{}", self.id))
    }
}

/// One worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    /// Its pid as the agent's `/proc` numbers it.
    pub pid: i32,
    /// Its pid in its own namespace.
    pub pid_inside: Option<i32>,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
    /// `FAAS_FPROCESS_ID`.
    pub fprocess_id: u32,
    /// `FAAS_CLIENT_ID`.
    pub client_id: Option<u32>,
    /// The container's id, or the control group's name where a runtime uses
    /// no ids; `None` outside of any container.
    pub container: Option<String>,
    /// Whether it is native.
    pub kind: WorkerKind,
    /// The function library, absolute where the worker named it by a path.
    pub library: Option<PathBuf>,
    /// Number of threads.
    pub threads: u32,
    /// Processor time so far, in clock ticks: which worker is the busiest.
    pub cpu_ticks: u64,
    /// The process that traces it.
    pub tracer: Option<Tracer>,
}

impl Worker {
    /// What the patcher must know of it; `None` where it is not native.
    #[must_use]
    pub fn target(&self) -> Option<Target> {
        match self.kind {
            WorkerKind::Native => Some(Target {
                pid: self.pid,
                start_time: self.start_time,
                library: self.library.clone()?,
            }),
            WorkerKind::NotNative { .. } => None,
        }
    }

    /// The container's id in the length that Docker shows.
    #[must_use]
    pub fn container_short(&self) -> Option<String> {
        self.container.as_deref().map(short_id)
    }
}

/// A container's id in the length that Docker shows; other names whole.
#[must_use]
pub fn short_id(id: &str) -> String {
    let hex = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    if hex {
        id[..12].to_owned()
    } else {
        id.to_owned()
    }
}
