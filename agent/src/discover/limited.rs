//! A scan that can be given up.
//!
//! A hostile process can make reads of its entry in `/proc` hang: its command
//! line lies in its own memory, which may be backed by a file system of its
//! own. So the scan has a thread to itself, and a limit. A thread that hangs
//! stays behind; there may be so many of them and no more.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::{Node, ProcRoot, scan};
use crate::error::AgentError;

/// How many scans may run at the same time, those that hang among them.
const MOST: usize = 16;

static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// As [`scan`], within `limit`.
///
/// # Errors
/// [`AgentError::Timeout`], or as [`scan`].
pub fn scan_within(proc_root: &ProcRoot, limit: Duration) -> Result<Node, AgentError> {
    let root = proc_root.clone();
    within(&RUNNING, limit, move || scan(&root))
}

fn within<T: Send + 'static>(
    running: &'static AtomicUsize,
    limit: Duration,
    act: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<T, AgentError> {
    let timeout = || AgentError::Timeout {
        operation: "the search for workers".to_owned(),
        seconds: limit.as_secs(),
    };
    let Some(slot) = Slot::take(running) else {
        return Err(timeout());
    };
    let (send, receive) = mpsc::channel();
    let spawned = std::thread::Builder::new()
        .name("scan".to_owned())
        .spawn(move || {
            let _ = send.send(act());
            drop(slot);
        });
    spawned.map_err(|error| AgentError::Internal {
        detail: format!("can't start a thread for the search: {error}"),
    })?;
    match receive.recv_timeout(limit) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(timeout()),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(AgentError::Internal {
            detail: "the search for workers panicked".to_owned(),
        }),
    }
}

/// One of the scans that run.
struct Slot(&'static AtomicUsize);

impl Slot {
    fn take(running: &'static AtomicUsize) -> Option<Self> {
        let before = running.fetch_add(1, Ordering::Relaxed);
        // Counted down again at once where it is too many.
        let slot = Self(running);
        (before < MOST).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(1);
    const LATE: Duration = Duration::from_secs(60);

    #[test]
    fn what_hangs_is_given_up_and_only_so_many_may() {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        let mut holds = Vec::new();
        for _ in 0..MOST {
            let (hold, held) = mpsc::channel::<()>();
            holds.push(hold);
            let error = within(&RUNNING, SOON, move || {
                let _ = held.recv();
                Ok(())
            });
            assert_eq!(error.unwrap_err().code(), "timeout");
        }
        let refused = within(&RUNNING, LATE, || -> Result<(), AgentError> {
            panic!("this is one too many")
        });
        assert_eq!(
            refused.unwrap_err().to_string(),
            "the search for workers took longer than 60 s"
        );
        drop(holds);
        while RUNNING.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        within(&RUNNING, LATE, || Ok(())).unwrap();
    }

    #[test]
    fn a_panic_is_an_error_of_this_request_alone() {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        let failed = within(&RUNNING, LATE, || -> Result<(), AgentError> {
            panic!("oops")
        });
        assert_eq!(failed.unwrap_err().code(), "internal");
        while RUNNING.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
    }
}
