//! Points at which a test may end the agent; see [`ptrace_shim::faults`].
//!
//! The program `agent-faults` (feature `fault-points`) has them. It is told by
//! its environment what is to happen:
//!
//! - `NIGHTGRAFT_FAULT=POINT@N`: at the `N`th time that it passes `POINT` it
//!   kills itself with SIGKILL. No destructor runs and nothing is written.
//! - `NIGHTGRAFT_FAULT_KILL=PID`: not itself but this process, with a line to
//!   stderr (`fault: ends PID`) before.
//! - `NIGHTGRAFT_FAULT_REFUSE=N`: the `N`th write to the journal fails.
//! - `NIGHTGRAFT_FAULT_TRACE=FILE`: the name of each point that it passes is
//!   appended to this file.

pub use ptrace_shim::faults::hit;

ptrace_shim::fault_points! {
    /// The directory is ours, the journal not opened.
    STATE_LOCKED = "start::locked";
    /// Before the journal's file is opened.
    JOURNAL_OPEN = "journal::open";
    /// A damaged journal has another name, a new one is not there yet.
    JOURNAL_SET_ASIDE = "journal::set-aside";
    /// Entries of the dead are dropped.
    JOURNAL_PRUNED = "journal::pruned";
    /// Before an entry is written.
    JOURNAL_BEGIN = "journal::begin";
    /// An entry is in the transaction, which is not committed.
    JOURNAL_INSERTED = "journal::inserted";
    /// An entry is on the disk.
    JOURNAL_COMMITTED = "journal::committed";
    /// Before the journal's file gets another length.
    FILE_LENGTH_BEFORE = "journal-file::length#before";
    /// Behind it.
    FILE_LENGTH_AFTER = "journal-file::length#after";
    /// Before the journal's file is written to.
    FILE_WRITE_BEFORE = "journal-file::write#before";
    /// Behind it.
    FILE_WRITE_AFTER = "journal-file::write#after";
    /// Before the journal's file is brought to the disk.
    FILE_SYNC_BEFORE = "journal-file::sync#before";
    /// Behind it.
    FILE_SYNC_AFTER = "journal-file::sync#after";
    /// A worker is looked at in the recovery at the start.
    RECOVERY_WORKER = "recovery::worker";
    /// The recovery at the start is done.
    RECOVERY_DONE = "recovery::done";
}

/// Every point that this program has, by name.
#[cfg(feature = "fault-points")]
#[must_use]
pub fn all() -> Vec<&'static str> {
    [
        ALL,
        nightgraft_patcher::faults::ALL,
        ptrace_shim::faults::ALL,
    ]
    .concat()
}

#[cfg(feature = "fault-points")]
mod armed {
    use std::io::Write as _;
    use std::sync::atomic::{AtomicU64, Ordering};

    use nightgraft_patcher::journal::JournalError;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    /// Which write to the journal fails; 0 for none.
    static REFUSE: AtomicU64 = AtomicU64::new(0);
    static WRITES: AtomicU64 = AtomicU64::new(0);

    /// Arms what the environment asks for.
    ///
    /// # Errors
    /// The environment does not make sense.
    pub fn arm() -> anyhow::Result<()> {
        use anyhow::Context as _;

        if let Ok(number) = std::env::var("NIGHTGRAFT_FAULT_REFUSE") {
            REFUSE.store(number.parse().context("a number")?, Ordering::SeqCst);
        }
        if let Ok(path) = std::env::var("NIGHTGRAFT_FAULT_TRACE") {
            let file = std::fs::File::options()
                .append(true)
                .create(true)
                .open(&path)
                .with_context(|| path.clone())?;
            let file = std::sync::Arc::new(file);
            for point in super::all() {
                let file = std::sync::Arc::clone(&file);
                configure(point, move || {
                    let _ = (&*file).write_all(format!("{point}\n").as_bytes());
                })?;
            }
        }
        let Ok(fault) = std::env::var("NIGHTGRAFT_FAULT") else {
            return Ok(());
        };
        let (point, number) = fault.split_once('@').context("NIGHTGRAFT_FAULT=POINT@N")?;
        let number: u64 = number.parse().context("NIGHTGRAFT_FAULT=POINT@N")?;
        let known = super::all().into_iter().find(|known| *known == point);
        let point = known.with_context(|| format!("there is no fault point {point}"))?;
        let victim = match std::env::var("NIGHTGRAFT_FAULT_KILL") {
            Ok(pid) => Pid::from_raw(pid.parse().context("a pid")?),
            Err(_) => Pid::this(),
        };
        let passed = AtomicU64::new(0);
        configure(point, move || {
            if passed.fetch_add(1, Ordering::SeqCst) + 1 == number {
                if victim != Pid::this() {
                    eprintln!("fault: ends {victim}");
                }
                // Whether it is still there is not our question.
                let _ = kill(victim, Signal::SIGKILL);
            }
        })
    }

    fn configure(
        point: &'static str,
        act: impl Fn() + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        fail::cfg_callback(point, act).map_err(anyhow::Error::msg)
    }

    /// Fails the write that was asked for.
    pub(crate) fn refuse_write() -> Result<(), JournalError> {
        let number = WRITES.fetch_add(1, Ordering::SeqCst) + 1;
        if REFUSE.load(Ordering::SeqCst) == number {
            return Err(JournalError("this write was to fail".to_owned()));
        }
        Ok(())
    }
}

#[cfg(feature = "fault-points")]
pub use armed::arm;
#[cfg(feature = "fault-points")]
pub(crate) use armed::refuse_write;

#[cfg(test)]
mod tests {
    #[test]
    fn no_two_points_have_one_name() {
        let all = [
            super::ALL,
            nightgraft_patcher::faults::ALL,
            ptrace_shim::faults::ALL,
        ]
        .concat();
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert!(all.iter().all(|name| !name.contains('@')));
    }
}
