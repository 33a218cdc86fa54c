//! The one thread that changes workers.
//!
//! ```text
//!  request ─► queue (bounded) ─► driver thread: scan, patch or revert ─► answer
//! ```
//!
//! A traced process belongs to the OS thread that seized it, so everything that
//! the patcher does to workers happens on this thread, and two requests never
//! meet in a worker. A request whose client has given up before its turn is
//! dropped; one that has begun is brought to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::api::{
    EdgeRequest, ObserveReport, ObserveRequest, PatchReport, PatchRequest, RevertReport,
};
use crate::canary::SystemClock;
use crate::discover::{ProcRoot, scan_within};
use crate::error::AgentError;
use crate::grafter::{Grafter, Target};
use crate::observer::Observer;
use crate::ops::{self, Context};
use crate::policy::Policy;
use crate::recovery::Recovery;
use crate::watch::Watch;

/// How many requests may wait.
const QUEUE: usize = 64;

/// How long the search for workers may take; it takes milliseconds.
const SCAN_LIMIT: Duration = Duration::from_secs(20);

type Reply<T> = oneshot::Sender<Result<T, AgentError>>;

enum Job {
    Patch(PatchRequest, Reply<PatchReport>),
    Revert(EdgeRequest, Reply<RevertReport>),
    Observe(ObserveRequest, Reply<ObserveReport>),
    /// Observes workers that are to be observed and are not; nobody waits for it.
    CatchUp(Vec<(i32, u64)>),
}

impl Job {
    fn abandoned(&self) -> bool {
        match self {
            Job::Patch(_, reply) => reply.is_closed(),
            Job::Revert(_, reply) => reply.is_closed(),
            Job::Observe(_, reply) => reply.is_closed(),
            Job::CatchUp(_) => false,
        }
    }
}

/// Where requests are handed in. When the last clone is dropped, the driver
/// ends after what it has begun.
#[derive(Clone)]
pub struct DriverHandle {
    queue: mpsc::Sender<Job>,
    waiting: Arc<AtomicUsize>,
}

/// Starts the driver's thread. With a `recovery` the workers of the node are
/// put in order before its first request, and those that are given besides.
///
/// # Errors
/// When the system gives no thread.
pub fn start(
    grafter: Arc<dyn Grafter>,
    proc_root: ProcRoot,
    policy: Arc<Policy>,
    watch: Arc<Watch>,
    observer: Arc<Observer>,
    recovery: Option<(Recovery, Vec<Target>)>,
) -> std::io::Result<(DriverHandle, JoinHandle<()>)> {
    let (queue, jobs) = mpsc::channel(QUEUE);
    let waiting = Arc::new(AtomicUsize::new(0));
    let handle = DriverHandle {
        queue,
        waiting: Arc::clone(&waiting),
    };
    let thread = std::thread::Builder::new()
        .name("driver".to_owned())
        .spawn(move || {
            if let Some((recovery, known)) = recovery {
                recover(&*grafter, &proc_root, &recovery, known);
            }
            let kept = (&*policy, &*watch, &*observer);
            run(jobs, &*grafter, &proc_root, kept, &waiting);
        })?;
    Ok((handle, thread))
}

/// Puts all workers in order: the first thing that is done to any.
fn recover(grafter: &dyn Grafter, proc_root: &ProcRoot, recovery: &Recovery, known: Vec<Target>) {
    let done = scan_within(proc_root, SCAN_LIMIT).and_then(|node| {
        guarded(|| {
            recovery.run(grafter, &node, known);
            Ok(())
        })
    });
    if let Err(error) = done {
        recovery.failed(&error.to_string());
    }
}

fn run(
    mut jobs: mpsc::Receiver<Job>,
    grafter: &dyn Grafter,
    proc_root: &ProcRoot,
    (policy, watch, observer): (&Policy, &Watch, &Observer),
    waiting: &AtomicUsize,
) {
    let context = Context {
        grafter,
        clock: &SystemClock,
        proc_root,
        policy,
        watch,
        observer,
    };
    while let Some(job) = jobs.blocking_recv() {
        if job.abandoned() {
            tracing::info!("a request was dropped: its client has gone");
        } else {
            // Who has gone meanwhile gets no answer; the log has what was done.
            match job {
                Job::Patch(request, reply) => {
                    let answer = scan_within(proc_root, SCAN_LIMIT)
                        .and_then(|node| guarded(|| ops::patch(&context, &node, &request)));
                    observer.nudge();
                    let _ = reply.send(answer);
                }
                Job::Observe(request, reply) => {
                    let answer = scan_within(proc_root, SCAN_LIMIT)
                        .and_then(|node| guarded(|| ops::observe(&context, &node, &request)));
                    observer.nudge();
                    let _ = reply.send(answer);
                }
                Job::CatchUp(missing) => {
                    let done = scan_within(proc_root, SCAN_LIMIT)
                        .and_then(|node| guarded(|| Ok(ops::catch_up(&context, &node, &missing))));
                    if let Err(error) = done {
                        tracing::warn!(%error, "new workers are not observed for the moment");
                    }
                    observer.caught_up();
                }
                Job::Revert(request, reply) => {
                    let answer = scan_within(proc_root, SCAN_LIMIT)
                        .and_then(|node| guarded(|| ops::revert(&context, &node, &request)));
                    observer.nudge();
                    let _ = reply.send(answer);
                }
            }
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A panic fails one request and leaves the driver to the others.
fn guarded<T>(act: impl FnOnce() -> Result<T, AgentError>) -> Result<T, AgentError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        let detail = text.unwrap_or("a panic without a message").to_owned();
        tracing::error!(detail, "the driver panicked");
        Err(AgentError::Internal { detail })
    })
}

impl DriverHandle {
    /// Requests that wait or run.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Queues a patch and waits for its end.
    ///
    /// # Errors
    /// [`AgentError::Busy`], [`AgentError::Stopping`], or as [`ops::patch()`].
    pub async fn patch(&self, request: PatchRequest) -> Result<PatchReport, AgentError> {
        let (reply, answer) = oneshot::channel();
        self.submit(Job::Patch(request, reply))?;
        answer.await.unwrap_or(Err(AgentError::Stopping))
    }

    /// Queues a revert and waits for its end.
    ///
    /// # Errors
    /// [`AgentError::Busy`], [`AgentError::Stopping`], or as [`ops::revert()`].
    pub async fn revert(&self, request: EdgeRequest) -> Result<RevertReport, AgentError> {
        let (reply, answer) = oneshot::channel();
        self.submit(Job::Revert(request, reply))?;
        answer.await.unwrap_or(Err(AgentError::Stopping))
    }

    /// Queues what begins or ends observing, and waits for its end.
    ///
    /// # Errors
    /// [`AgentError::Busy`], [`AgentError::Stopping`], or as [`ops::observe()`].
    pub async fn observe(&self, request: ObserveRequest) -> Result<ObserveReport, AgentError> {
        let (reply, answer) = oneshot::channel();
        self.submit(Job::Observe(request, reply))?;
        answer.await.unwrap_or(Err(AgentError::Stopping))
    }

    /// A handle that does not keep the driver from ending.
    #[must_use]
    pub fn weak(&self) -> WeakDriver {
        WeakDriver {
            queue: self.queue.downgrade(),
            waiting: Arc::clone(&self.waiting),
        }
    }

    fn submit(&self, job: Job) -> Result<(), AgentError> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.queue.try_send(job).map_err(|error| {
            let waiting = self.waiting.fetch_sub(1, Ordering::Relaxed) - 1;
            match error {
                mpsc::error::TrySendError::Full(_) => AgentError::Busy { waiting },
                mpsc::error::TrySendError::Closed(_) => AgentError::Stopping,
            }
        })
    }
}

/// As [`DriverHandle`]; the driver ends while such are left.
#[derive(Debug, Clone)]
pub struct WeakDriver {
    queue: mpsc::WeakSender<Job>,
    waiting: Arc<AtomicUsize>,
}

impl WeakDriver {
    /// Asks for workers to be observed that are to be and are not; whether that could
    /// be asked for. Waits for nothing.
    #[must_use]
    pub fn catch_up(&self, missing: Vec<(i32, u64)>) -> bool {
        let Some(queue) = self.queue.upgrade() else {
            return false;
        };
        let waiting = Arc::clone(&self.waiting);
        DriverHandle { queue, waiting }
            .submit(Job::CatchUp(missing))
            .is_ok()
    }
}
