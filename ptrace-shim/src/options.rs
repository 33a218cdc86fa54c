//! How long, and how, a stop is made.

use crate::Scheduling;
use std::time::Duration;

/// How a thread or a process is stopped. A bare [`Duration`] will do where an
/// `impl Into<StopOptions>` is wanted: it is the deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopOptions {
    /// How long it may take until everyone who is to stop has stopped; then
    /// all are resumed and [`crate::Error::Timeout`] is returned. Looked at
    /// every 3 ms.
    pub deadline: Duration,
    /// How long one remote system call may take (default 1 s).
    pub call_deadline: Duration,
    /// Hints for the scheduling of the tracing OS thread.
    pub scheduling: Scheduling,
}

impl Default for StopOptions {
    fn default() -> StopOptions {
        StopOptions {
            deadline: Duration::from_millis(100),
            call_deadline: Duration::from_secs(1),
            scheduling: Scheduling::default(),
        }
    }
}

impl From<Duration> for StopOptions {
    fn from(deadline: Duration) -> StopOptions {
        StopOptions {
            deadline,
            ..StopOptions::default()
        }
    }
}
