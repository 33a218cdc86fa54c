//! What the agent does with a node and a patcher: one function per request.
//!
//! * [`ps`], [`status`], [`explain`] only read and run on any thread.
//! * [`patch()`] and [`revert()`] change workers and run on the driver's thread
//!   ([`crate::driver`]), one at a time.
//!
//! They take a [`Node`] that was scanned for this request alone. No HTTP here,
//! and no queue.

mod observe;
mod patch;
mod read;
mod revert;
mod seen;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use observe::{catch_up, observe};
pub use patch::patch;
pub use read::{explain, ps, status, unquarantine};
pub use revert::revert;

use crate::api::MissingCapability;
use crate::canary::Clock;
use crate::discover::{ProcRoot, own_capabilities, sees_the_node};
use crate::grafter::{GraftError, Grafter};
use crate::observer::Observer;
use crate::policy::Policy;
use crate::watch::Watch;

/// `CAP_SYS_PTRACE` in `include/uapi/linux/capability.h`.
const CAP_SYS_PTRACE: u32 = 19;

/// What the operations work with.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The patcher.
    pub grafter: &'a dyn Grafter,
    /// Time.
    pub clock: &'a dyn Clock,
    /// The proc file system that the node was scanned from.
    pub proc_root: &'a ProcRoot,
    /// What edges are allowed besides what a request allows.
    pub policy: &'a Policy,
    /// Who watches patched workers, and what is quarantined.
    pub watch: &'a Watch,
    /// Who reads counters, and what is to be observed.
    pub observer: &'a Observer,
}

impl Context<'_> {
    /// What to say of an error in the names. Without the capabilities that it
    /// needs the agent sees next to nothing of the node: then that is what is
    /// wrong, and not the names.
    fn explained(&self, error: crate::error::AgentError) -> crate::error::AgentError {
        match self.require_capabilities() {
            Ok(()) => error,
            Err(missing) => missing.into(),
        }
    }

    /// Fails where the agent is known to lack what it needs to change workers.
    fn require_capabilities(&self) -> Result<(), GraftError> {
        match missing_capabilities(self.proc_root)
            .into_iter()
            .find(MissingCapability::required)
        {
            None => Ok(()),
            Some(MissingCapability {
                capability,
                purpose,
                flag,
            }) => Err(GraftError::MissingCapability {
                capability,
                purpose,
                flag,
            }),
        }
    }
}

impl MissingCapability {
    /// Whether nothing can be patched without it.
    fn required(&self) -> bool {
        self.capability == "CAP_SYS_PTRACE"
    }
}

/// What the agent lacks, by its own entry in the proc file system. Nothing
/// where that can't be read: the attempt will tell.
#[must_use]
pub fn missing_capabilities(proc_root: &ProcRoot) -> Vec<MissingCapability> {
    let mut missing = Vec::new();
    let Ok(effective) = own_capabilities(proc_root) else {
        return missing;
    };
    if effective & (1 << CAP_SYS_PTRACE) == 0 {
        missing.push(MissingCapability {
            capability: "CAP_SYS_PTRACE".to_owned(),
            purpose: "read and patch workers of other containers".to_owned(),
            flag: "--cap-add SYS_PTRACE".to_owned(),
        });
    }
    if !sees_the_node(proc_root) {
        missing.push(MissingCapability {
            capability: "the node's pid namespace".to_owned(),
            purpose: "see the workers of other containers".to_owned(),
            flag: "--pid=host".to_owned(),
        });
    }
    missing
}

/// How long a patched worker is watched, within the API's limits.
#[must_use]
pub fn canary_wait(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds.min(crate::api::MAX_CANARY_WAIT_MS))
}
