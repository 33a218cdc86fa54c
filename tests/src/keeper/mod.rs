//! The keeper: the process that owns a node.
//!
//! ```text
//! test ─spawns─► keeper ─┬─ gateway        all die with the keeper,
//!   │  requests  ▲       ├─ engine         the keeper ends when the test does
//!   └───────────►│       └─ containers
//!    replies ◄───┘
//! ```
//!
//! It reads requests as lines of JSON from its standard input and answers on
//! its standard output. End of file (the test has ended, or was killed) is the
//! order to end everything. Being a process of one thread it may fork into
//! namespaces, and what it starts can be tied to its own life by the kernel,
//! so that even a SIGKILL of the keeper leaves no process behind.

mod node;

use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::container::{Oddities, RuntimeKind};

/// What a node is to be. See [`crate::NodeSpec`], from which it is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeeperSpec {
    /// Which runtime makes the containers.
    pub runtime: RuntimeKind,
    /// The node's directory on a disk: roots and logs.
    pub dir: PathBuf,
    /// The node's shared directory, on a tmpfs.
    pub ipc: PathBuf,
    /// Where the testbed's binaries are.
    pub bins: PathBuf,
    /// The functions.
    pub functions: Vec<KeeperFunction>,
    /// `--use_fifo_for_nested_call`.
    pub fifo_for_nested_call: bool,
    /// Whether workers unmap answers at once (`FAAS_STRICT_LIFETIME`).
    pub strict_lifetime: bool,
    /// Processors that everything is confined to; empty for all.
    pub cpus: Vec<usize>,
    /// Another worker program than the one beside the other programs.
    pub worker: Option<PathBuf>,
    /// Whether containers have an overlay file system for a root.
    pub overlay_roots: bool,
}

/// One function of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeeperFunction {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u16,
    /// Its library, outside.
    pub library: PathBuf,
    /// Further files for its container: from, to.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Its containers' environment, beside what launchers add.
    pub env: Vec<(String, String)>,
    /// Workers that are started at once.
    pub min_workers: u16,
    /// Workers that there may be.
    pub max_workers: u16,
    /// Limit of its container's memory, in bytes.
    pub memory_limit: Option<u64>,
    /// In what its container differs from the usual.
    pub oddities: Oddities,
}

/// What the keeper can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Ask {
    /// Start the node.
    Start(Box<KeeperSpec>),
    /// End a function's container and start another, with another library if
    /// one is given.
    Redeploy {
        /// The function's name.
        name: String,
        /// The new library.
        library: Option<PathBuf>,
    },
}

/// What the keeper says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Say {
    /// It is done; the node is now this.
    Done(Box<NodeState>),
    /// It could not be done.
    Failed(String),
}

/// A node that runs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NodeState {
    /// The gateway's process.
    pub gateway: i32,
    /// The engine's process.
    pub engine: i32,
    /// The port for HTTP requests.
    pub http_port: u16,
    /// The containers, in the order of the functions.
    pub containers: Vec<ContainerState>,
}

/// A container that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerState {
    /// The function's name.
    pub function: String,
    /// The container's id.
    pub id: String,
    /// PID 1, as the host sees it.
    pub init: i32,
}

/// Serves its starter until standard input ends.
pub fn run() -> Result<()> {
    let mut node = None;
    for line in std::io::stdin().lock().lines() {
        let ask: Ask = serde_json::from_str(&line?).context("not a request")?;
        let result = match (ask, node.as_mut()) {
            (Ask::Start(spec), None) => node::Node::start(*spec).map(|n| {
                let state = n.state();
                node = Some(n);
                state
            }),
            (Ask::Redeploy { name, library }, Some(n)) => {
                n.redeploy(&name, library).map(|()| n.state())
            }
            (Ask::Start(_), Some(_)) => Err(anyhow::anyhow!("the node runs already")),
            (Ask::Redeploy { .. }, None) => Err(anyhow::anyhow!("there is no node")),
        };
        let say = match result {
            Ok(state) => Say::Done(Box::new(state)),
            Err(e) => Say::Failed(format!("{e:#}")),
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&say)?)?;
        out.flush()?;
    }
    drop(node);
    Ok(())
}
