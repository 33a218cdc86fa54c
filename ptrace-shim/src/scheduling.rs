//! How the tracing OS thread is scheduled while it makes and holds a stop.
//!
//! Most of a stop is waiting for threads to be scheduled:
//! - A tracer that is itself descheduled makes the longest stops, so it runs
//!   above those it stops: real-time priority (lowest, or one above that of a
//!   real-time worker), else the best nice value, where permitted.
//! - On an idle node, waking a thread on another, sleeping CPU is what costs;
//!   a tracer on the CPU where the thread last ran is handed over to and back
//!   directly. On a busy node it would only wait behind others there.
//!
//! What can't be had is silently done without. All of it is put back when the
//! stop is over.

use crate::sys::sched::{self, Policy};
use crate::{Process, Tid};
use serde::{Deserialize, Serialize};

/// Hints for the scheduling of the tracing OS thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// Raise the priority.
    pub raise_priority: bool,
    /// Run where the stopped thread last ran.
    pub same_cpu: SameCpu,
}

/// Whether to run on the CPU of the thread that is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SameCpu {
    /// Leave it to the scheduler.
    Never,
    /// If no more threads want to run on this machine than it has CPUs.
    #[default]
    WhenIdle,
    /// In any case.
    Always,
}

impl Default for Scheduling {
    fn default() -> Scheduling {
        Scheduling {
            raise_priority: true,
            same_cpu: SameCpu::WhenIdle,
        }
    }
}

impl Scheduling {
    /// Leaves everything as it is.
    #[must_use]
    pub fn untouched() -> Scheduling {
        Scheduling {
            raise_priority: false,
            same_cpu: SameCpu::Never,
        }
    }

    /// Puts the calling OS thread into place to stop `threads`, until the
    /// result is dropped (by the same OS thread).
    pub(crate) fn apply(self, process: &Process, threads: &[Tid]) -> Placed {
        let mut placed = Placed::default();
        if self.same_cpu == SameCpu::Always || self.same_cpu == SameCpu::WhenIdle && is_idle() {
            placed.move_to_cpu_of(process, threads);
        }
        if self.raise_priority {
            placed.raise_above(threads);
        }
        placed
    }
}

/// What to put back.
#[derive(Default)]
pub(crate) struct Placed {
    policy: Option<Policy>,
    nice: Option<i32>,
    affinity: Option<libc::cpu_set_t>,
}

impl std::fmt::Debug for Placed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Placed")
            .field("policy", &self.policy)
            .field("nice", &self.nice)
            .field("pinned", &self.affinity.is_some())
            .finish()
    }
}

impl Placed {
    fn move_to_cpu_of(&mut self, process: &Process, threads: &[Tid]) {
        let Some(cpu) = usual_cpu(process, threads) else {
            return;
        };
        let (Ok(before), Some(only)) = (sched::affinity(), sched::only(cpu)) else {
            return;
        };
        if sched::holds(&before, cpu) && sched::set_affinity(&only).is_ok() {
            self.affinity = Some(before);
        }
    }

    fn raise_above(&mut self, threads: &[Tid]) {
        let Ok(before) = sched::policy_of(0) else {
            return;
        };
        let highest = threads
            .iter()
            .filter_map(|tid| sched::policy_of(tid.as_raw()).ok())
            .map(|policy| policy.priority)
            .max()
            .unwrap_or(0);
        if before.priority > highest {
            return;
        }
        let above = Policy {
            policy: libc::SCHED_RR | libc::SCHED_RESET_ON_FORK,
            priority: (highest + 1).min(99),
        };
        if sched::set_policy(above).is_ok() {
            self.policy = Some(before);
        } else if let Ok(nice) = sched::nice()
            && sched::set_nice(-20).is_ok()
        {
            self.nice = Some(nice);
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        // Lowering is always permitted, so these only fail for CPUs that went
        // away meanwhile, and then the kernel has seen to it.
        if let Some(policy) = self.policy.take()
            && let Err(error) = sched::set_policy(policy)
        {
            tracing::warn!(%error, "the tracing thread's priority could not be put back");
        }
        if let Some(nice) = self.nice.take()
            && let Err(error) = sched::set_nice(nice)
        {
            tracing::warn!(%error, "the tracing thread's nice value could not be put back");
        }
        if let Some(affinity) = self.affinity.take()
            && let Err(error) = sched::set_affinity(&affinity)
        {
            tracing::warn!(%error, "the tracing thread's CPUs could not be put back");
        }
    }
}

/// The CPU that most of the threads last ran on (of the first few of them).
fn usual_cpu(process: &Process, threads: &[Tid]) -> Option<usize> {
    const ENOUGH: usize = 8;
    let cpus: Vec<usize> = threads
        .iter()
        .take(ENOUGH)
        .filter_map(|&tid| process.stat(tid).ok())
        .map(|stat| stat.cpu)
        .collect();
    cpus.iter()
        .copied()
        .max_by_key(|cpu| cpus.iter().filter(|other| *other == cpu).count())
}

/// Whether no more threads want to run right now (us included) than there are
/// CPUs.
fn is_idle() -> bool {
    let Ok(text) = std::fs::read_to_string("/proc/loadavg") else {
        return false;
    };
    let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
    let cpus = cpus.ok().flatten().map_or(1, i64::cast_unsigned);
    runnable(&text).is_some_and(|runnable| runnable as u64 <= cpus)
}

/// The number before the slash in `0.12 0.08 0.05 2/345 6789`.
fn runnable(loadavg: &str) -> Option<usize> {
    let (runnable, _) = loadavg.split_ascii_whitespace().nth(3)?.split_once('/')?;
    runnable.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runnable_threads_are_read_from_loadavg() {
        assert_eq!(runnable("0.12 0.08 0.05 2/345 6789\n"), Some(2));
        assert_eq!(runnable("0.12"), None);
    }

    #[test]
    fn everything_is_put_back() {
        let pid = std::process::id().cast_signed();
        let process = Process::open(pid).unwrap();
        let tid = Tid::from_raw(nix::unistd::gettid().as_raw());
        let policy = sched::policy_of(0).unwrap();
        let cpus = sched::affinity().unwrap();
        let scheduling = Scheduling {
            raise_priority: true,
            same_cpu: SameCpu::Always,
        };
        let placed = scheduling.apply(&process, &[tid]);
        let pinned = sched::affinity().unwrap();
        assert_eq!(
            (0..1024).filter(|&cpu| sched::holds(&pinned, cpu)).count(),
            1
        );
        drop(placed);
        assert_eq!(sched::policy_of(0).unwrap(), policy);
        let after = sched::affinity().unwrap();
        assert!((0..1024).all(|cpu| sched::holds(&cpus, cpu) == sched::holds(&after, cpu)));
    }
}
