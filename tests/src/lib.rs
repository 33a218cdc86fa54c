//! A small FaaS node that neither an agent nor a function library can tell
//! from nightcore.
//!
//! ```text
//! client ─HTTP─ gateway ─TCP─ engine ─┬─FIFOs── workers  ┐ container of Foo
//!                                     ├─socket─ launcher ┘
//!                                     ├─FIFOs── workers  ┐ container of Bar
//!                                     └─socket─ launcher ┘
//! ```
//!
//! - [`wire`], [`ipc`], [`func_config`], [`flags`]: what the processes share.
//! - [`gateway`], [`engine`], [`launcher`], [`worker`]: the processes.
//! - [`container`]: what functions run in.
//! - [`keeper`]: the process that owns a node; [`Node`]: its handle in a test.
//! - [`fixtures`]: functions in C; [`client`] and [`load`]: who calls them.
//! - [`agent`]: the agent and `agentctl`, the programs under test.
//! - [`oracle`]: the machine's dynamic linker as the judge of our loader.
//! - [`coverage`]: every kind of function, as RPC and fused.
//! - [`chaos`]: the agent, and workers, ended at every point.
//! - [`sys`]: all that is unsafe.

pub mod agent;
pub mod chaos;
pub mod client;
pub mod container;
pub mod coverage;
pub mod engine;
pub mod fixtures;
pub mod flags;
pub mod func_config;
pub mod gateway;
pub mod ipc;
pub mod keeper;
pub mod launcher;
pub mod load;
mod node;
pub mod oracle;
mod procs;
pub mod sys;
pub mod wire;
pub mod worker;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

pub use agent::Agent;
pub use client::CallError;
pub use container::RuntimeKind;
pub use keeper::ContainerState;
pub use node::{FunctionSpec, NestedMode, Node, NodeSpec};
pub use procs::WorkerInfo;

/// The directory of this build's binaries: the present executable's, or the
/// one above it for a test (`target/<profile>/deps/…`).
pub fn bin_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let dir = exe.parent().context("an executable in no directory")?;
    let above = matches!(
        dir.file_name().and_then(|n| n.to_str()),
        Some("deps" | "examples")
    );
    Ok(if above {
        dir.parent().unwrap_or(dir)
    } else {
        dir
    }
    .to_owned())
}

/// One of the testbed's binaries, which must have been built (tests of this
/// crate do that by themselves, others by `cargo build -p nightgraft-testbed`).
/// `NIGHTGRAFT_BIN` names another directory.
pub fn bin(name: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("NIGHTGRAFT_BIN") {
        Some(dir) => dir.into(),
        None => bin_dir()?,
    };
    let path = dir.join(name);
    ensure!(
        path.is_file(),
        "{} is not there: build nightgraft-testbed first",
        path.display()
    );
    Ok(path)
}

/// Waits until something is so.
///
/// # Panics
/// If it is not within 10 seconds.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
