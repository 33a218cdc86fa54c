//! Containers: each function in one of its own.
//!
//! Two runtimes stand behind one trait. [`embedded`] needs nothing but the
//! kernel and is the default; [`docker`] uses Docker, starting a daemon of its
//! own where it must. Both give a container the same shape:
//!
//! ```text
//! /nightcore/launcher        PID 1
//! /nightcore/func_worker_v1  its children
//! /functions/lib<name>.so    the function
//! /lib…                      just the libraries that these need
//! /outputs                   log files (writable, the node's)
//! /dev/shm/faas_ipc          the node's shared directory
//! ```
//!
//! own mount, pid, net, ipc and uts namespaces, a cgroup `/docker/<id>`, the
//! capabilities of Docker's default and its seccomp filter, no network.

pub(crate) mod cgroup;
pub mod docker;
pub mod embedded;
mod enter;
pub mod rootfs;
mod seccomp;

use std::path::PathBuf;

use anyhow::Result;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Where the shared directory is, inside.
pub const IPC_INSIDE: &str = crate::ipc::DEFAULT_ROOT;
/// Where log files go, inside.
pub const OUTPUTS_INSIDE: &str = "/outputs";
/// Where launcher and worker are, inside.
pub const BIN_INSIDE: &str = "/nightcore";
/// Where function libraries are, inside.
pub const FUNCTIONS_INSIDE: &str = "/functions";

/// Which runtime makes the containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// Namespaces made by the testbed itself.
    #[default]
    Embedded,
    /// Docker.
    Docker,
}

/// In what a container differs from the usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Oddities {
    /// It has a user namespace of its own, in which root is root outside too.
    pub user_namespace: bool,
    /// There is no `/proc` in it.
    pub no_proc: bool,
}

/// What a container is to be.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// 64 hexadecimal digits.
    pub id: String,
    /// The function's name: for messages and file names.
    pub name: String,
    /// A directory for the runtime's files; it exists and is empty.
    pub dir: PathBuf,
    /// What goes into the root.
    pub files: Vec<rootfs::Entry>,
    /// The node's shared directory, outside.
    pub ipc: PathBuf,
    /// The node's log directory, outside.
    pub logs: PathBuf,
    /// PID 1 and its arguments.
    pub command: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// Limit of its memory, in bytes.
    pub memory_limit: Option<u64>,
    /// In what it differs from the usual; Docker's know nothing of it.
    pub oddities: Oddities,
    /// Processors that it is confined to; empty for all.
    pub cpus: Vec<usize>,
    /// Whether its root is an overlay file system. Docker's is anyhow.
    pub overlay_root: bool,
}

/// A running container. Dropping it ends it and all that is in it.
pub trait Container {
    /// Its id. Docker gives its own.
    fn id(&self) -> &str;
    /// PID 1, as the host sees it.
    fn init(&self) -> Pid;
    /// Ends it, and waits until nothing of it is left.
    fn stop(&mut self) -> Result<()>;
}

/// Makes containers.
pub trait Runtime {
    /// Starts a container.
    fn start(&mut self, spec: &ContainerSpec) -> Result<Box<dyn Container>>;
}
