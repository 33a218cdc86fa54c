//! An OS thread to trace from, whose end undoes what could not be undone.
//!
//! ptrace ties a traced thread to the OS thread that attached. When that ends,
//! the kernel detaches all of its tracees at once and cleanly, running ones
//! too, which no request can do. So the safest place to stop others from is an
//! OS thread of its own, and it costs some 30 µs, before anyone is stopped.

use crate::Tid;
use crate::error::{Error, Result};
use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

thread_local! {
    static CURRENT: Cell<bool> = const { Cell::new(false) };
    /// Threads that are traced from here and that nobody holds: they did not
    /// stop in time, and are let go of when this OS thread ends.
    static LEFT_OVER: RefCell<Vec<Tid>> = const { RefCell::new(Vec::new()) };
}

/// Runs `work` in an OS thread of its own and returns what it returned.
///
/// A thread of the process that does not reach a stop in time (it sits in an
/// uninterruptible wait, as in `vfork`) is let go of when the OS thread ends:
/// so return soon after an [`Error::Timeout`]. Outside of such a thread the
/// failing operation itself waits up to 5 s more for it.
///
/// When this returns, the OS thread is gone for the kernel too: nobody is
/// traced by it any more.
///
/// A panic in `work` goes on in the caller.
///
/// # Errors
/// Those of `work`; [`Error::Setup`] if no thread can be started.
pub fn tracer_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("nightgraft-stop".to_owned())
            .spawn_scoped(scope, || {
                CURRENT.set(true);
                let result = work();
                (nix::unistd::gettid(), result)
            })
            .map_err(|error| Error::Setup {
                pid: crate::Pid::from_raw(0),
                operation: "starting a thread",
                cause: error
                    .raw_os_error()
                    .map_or(nix::errno::Errno::EAGAIN, nix::errno::Errno::from_raw),
            })?;
        let (tid, result) = match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        await_end(tid);
        result
    })
}

/// Waits until the kernel has taken an OS thread apart: it wakes who joins a
/// thread before it lets go of the thread's tracees.
fn await_end(tid: nix::unistd::Pid) {
    const LONGEST: Duration = Duration::from_secs(5);
    let entry = format!("/proc/self/task/{tid}");
    let since = Instant::now();
    let mut pause = Duration::from_micros(20);
    while std::path::Path::new(&entry).exists() {
        if since.elapsed() > LONGEST {
            tracing::warn!(%tid, "the tracing thread does not end");
            return;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

/// Notes a thread that is left to the end of this OS thread.
pub(crate) fn leave(tid: Tid) {
    LEFT_OVER.with_borrow_mut(|left| left.push(tid));
}

/// Takes a thread back that was left, to try again; false if it was not.
pub(crate) fn take_back(tid: Tid) -> bool {
    LEFT_OVER.with_borrow_mut(|left| {
        let before = left.len();
        left.retain(|other| *other != tid);
        left.len() != before
    })
}

/// Whether the calling OS thread is one of these.
pub(crate) fn is_current() -> bool {
    CURRENT.get()
}
