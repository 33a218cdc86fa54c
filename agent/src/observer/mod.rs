//! Watching what the node's functions call.
//!
//! ```text
//!  every second: scan ─► open counters of new workers ─► read all ─► Meter ─► Graph
//!                 │                                                    └─► History
//!                 └─► workers that are to be observed and are not ─► driver
//! ```
//!
//! One thread reads; it stops nobody. Where nothing is observed and nothing fused
//! it looks for that now and then only.

mod wanted;

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use wanted::{Rule, Wanted};

use crate::api;
use crate::discover::{Node, ProcRoot, Worker, scan_within};
use crate::driver::WeakDriver;
use crate::grafter::{Counting, GraftError, Grafter, Target};
use crate::history::History;
use crate::meter::{Meter, WorkerKey};
use crate::planning::Planning;

/// How often counters are read.
const TICK: Duration = Duration::from_secs(1);
/// How often it is looked for something to read where there is nothing.
const IDLE: Duration = Duration::from_secs(10);
/// How long a worker without anything of ours is taken for one, unless somebody
/// says that there was a change.
const NOTHING: Duration = Duration::from_secs(10);
/// How long a step of the history is.
const STEP: Duration = Duration::from_secs(10);
/// How long the search for workers may take; it takes milliseconds.
const SCAN_LIMIT: Duration = Duration::from_secs(20);
/// How long a worker that could not be observed is left alone, at first; twice as
/// long each time.
const BACK_OFF: Duration = Duration::from_secs(5);
/// And at most.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(600);

/// A worker's pid and start time.
type Key = (i32, u64);

/// The observer, as requests see it.
#[derive(Debug)]
pub struct Observer {
    /// What is to be observed.
    pub wanted: Wanted,
    /// What plans are made of besides the graph.
    pub planning: Planning,
    history: History,
    inner: Mutex<Inner>,
    /// Whether the thread is to look at once, or to end.
    call: (Mutex<Call>, Condvar),
    driver: OnceLock<WeakDriver>,
}

#[derive(Debug, Default)]
struct Inner {
    meter: Meter,
    open: HashMap<Key, Open>,
    /// Start times of the workers that were there last.
    started: HashMap<i32, u64>,
    /// Workers with nothing of ours, and until when that is believed.
    nothing: HashMap<Key, Instant>,
    /// Workers that could not be observed: until when they are left alone, and for
    /// how long the next time.
    failed: HashMap<Key, (Instant, Duration)>,
    stepped: Option<Instant>,
    /// What could not be read, by worker.
    problems: HashMap<Key, String>,
}

#[derive(Debug)]
struct Open {
    counting: Box<dyn Counting>,
    worker: WorkerKey,
    observed: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Call {
    #[default]
    None,
    Look,
    End,
}

impl Default for Observer {
    fn default() -> Self {
        Self::with(None)
    }
}

impl Observer {
    fn with(directory: Option<&Path>) -> Self {
        Self {
            wanted: Wanted::open(directory),
            planning: Planning::default(),
            history: History::open(directory),
            inner: Mutex::default(),
            call: Default::default(),
            driver: OnceLock::new(),
        }
    }

    /// One that goes on with what is kept in the agent's directory.
    #[must_use]
    pub fn open(directory: Option<&Path>) -> Arc<Self> {
        Arc::new(Self::with(directory))
    }

    /// Starts the thread. Workers that are to be observed and are not are asked
    /// for at the driver.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        self: &Arc<Self>,
        grafter: Arc<dyn Grafter>,
        proc_root: ProcRoot,
        driver: WeakDriver,
    ) -> std::io::Result<()> {
        let _ = self.driver.set(driver);
        let own = Arc::clone(self);
        std::thread::Builder::new()
            .name("observer".to_owned())
            .spawn(move || own.run(&*grafter, &proc_root))
            .map(drop)
    }

    /// Has the thread look at once: something was fused, observed or reverted.
    pub fn nudge(&self) {
        self.inner().nothing.clear();
        self.call(Call::Look);
    }

    /// Has the thread end, and what was counted so far put into the history.
    pub fn stop(&self) {
        self.call(Call::End);
        self.step(&mut self.inner(), Instant::now(), true);
    }

    fn call(&self, call: Call) {
        let mut called = self.call.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *called != Call::End {
            *called = call;
        }
        self.call.1.notify_all();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The graph, as of now: the counters are read for it.
    #[must_use]
    pub fn graph(&self, grafter: &dyn Grafter, node: &Node) -> api::Graph {
        let mut inner = self.inner();
        inner.look(grafter, node);
        let mut graph = inner.meter.graph(node, now_ms());
        graph.notes.extend(inner.problems.values().cloned());
        graph
    }

    /// What was recorded since a time, in milliseconds since 1970.
    #[must_use]
    pub fn history(&self, since_ms: u64, limit: usize) -> api::History {
        let (steps, notes) = self.history.since(since_ms, limit);
        api::History { steps, notes }
    }

    fn run(&self, grafter: &dyn Grafter, proc_root: &ProcRoot) {
        loop {
            let busy = match scan_within(proc_root, SCAN_LIMIT) {
                Ok(node) => self.tick(grafter, &node),
                Err(error) => {
                    tracing::warn!(%error, "the node can't be observed for the moment");
                    false
                }
            };
            if self.wait(if busy { TICK } else { IDLE }) == Call::End {
                return;
            }
        }
    }

    /// Reads everything once; whether there is anything to read.
    fn tick(&self, grafter: &dyn Grafter, node: &Node) -> bool {
        let missing = {
            let mut inner = self.inner();
            inner.look(grafter, node);
            self.step(&mut inner, Instant::now(), false);
            inner.missing(&self.wanted, node)
        };
        if missing && let Some(driver) = self.driver.get() {
            let report = driver.catch_up();
            self.note(report.as_ref());
        }
        !self.inner().open.is_empty() || self.wanted.any()
    }

    /// Who could not be observed is left alone for a while.
    fn note(&self, report: Option<&api::ObserveReport>) {
        let mut inner = self.inner();
        let Some(report) = report else {
            return;
        };
        let now = Instant::now();
        for worker in &report.workers {
            let api::ObserveOutcome::Failed { error } = &worker.outcome else {
                continue;
            };
            let Some(&start_time) = inner.started.get(&worker.pid) else {
                continue;
            };
            let key = (worker.pid, start_time);
            let wait = inner.failed.get(&key).map_or(BACK_OFF, |(_, next)| *next);
            let next = (2 * wait).min(LONGEST_BACK_OFF);
            inner.failed.insert(key, (now + wait, next));
            let why = format!(
                "worker {} of {} can't be observed: {}",
                worker.pid, worker.function, error.message
            );
            inner.problems.insert(key, why);
        }
    }

    fn step(&self, inner: &mut Inner, now: Instant, last: bool) {
        let due = inner.stepped.is_none_or(|stepped| now - stepped >= STEP);
        if due || last {
            inner.stepped = Some(now);
            if let Some(step) = inner.meter.step() {
                self.history.add(step);
            }
        }
    }

    fn wait(&self, most: Duration) -> Call {
        let (call, woken) = &self.call;
        let called = call.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut called, _) = woken
            .wait_timeout_while(called, most, |call| *call == Call::None)
            .unwrap_or_else(PoisonError::into_inner);
        match *called {
            Call::End => Call::End,
            _ => std::mem::take(&mut *called),
        }
    }
}

impl Inner {
    /// Opens what is new, reads everything, and lets go of what has ended.
    fn look(&mut self, grafter: &dyn Grafter, node: &Node) {
        let now = Instant::now();
        let mut living = HashSet::new();
        for function in &node.functions {
            for target in function.workers.iter().filter_map(Worker::target) {
                let key = (target.pid, target.start_time);
                living.insert(key);
                let known = self.nothing.get(&key).is_some_and(|until| now < *until);
                if !known && !self.open.contains_key(&key) {
                    let worker = WorkerKey {
                        engine: function.engine,
                        function: function.label(),
                        pid: target.pid,
                        start_time: target.start_time,
                    };
                    self.meet(grafter, &target, worker, now);
                }
            }
        }
        self.started = living.iter().copied().collect();
        self.nothing.retain(|key, _| living.contains(key));
        self.failed.retain(|key, _| living.contains(key));
        self.problems.retain(|key, _| living.contains(key));
        let Inner {
            meter,
            open,
            problems,
            failed,
            ..
        } = self;
        open.retain(|key, one| {
            let lives = living.contains(key);
            match one.counting.read() {
                Ok(reading) => {
                    one.observed = reading.observing;
                    meter.read(one.worker.clone(), &reading);
                    if one.observed {
                        problems.remove(key);
                        failed.remove(key);
                    }
                }
                Err(error) if lives && !matches!(error, GraftError::WorkerGone { .. }) => {
                    let why = format!("worker {}: its counters can't be read: {error}", key.0);
                    problems.insert(*key, why);
                }
                // What it counted last is lost with it.
                Err(_) => {}
            }
            if !lives {
                meter.gone(key.0, key.1);
            }
            lives
        });
        self.meter.tick(
            now_ms(),
            nightgraft_patcher::status::cycles_per_nanosecond(),
        );
    }

    fn meet(&mut self, grafter: &dyn Grafter, target: &Target, worker: WorkerKey, now: Instant) {
        let key = (target.pid, target.start_time);
        match grafter.counters(target) {
            Ok(Some(counting)) => {
                self.nothing.remove(&key);
                let open = Open {
                    counting,
                    worker,
                    observed: false,
                };
                self.open.insert(key, open);
            }
            Ok(None) | Err(GraftError::WorkerGone { .. }) => {
                self.nothing.insert(key, now + NOTHING);
            }
            Err(error) => {
                self.nothing.insert(key, now + NOTHING);
                let why = format!("worker {} can't be read: {error}", target.pid);
                self.problems.insert(key, why);
            }
        }
    }

    /// Whether a worker is to be observed, is not, and may be tried.
    fn missing(&self, wanted: &Wanted, node: &Node) -> bool {
        let now = Instant::now();
        let functions = node
            .functions
            .iter()
            .filter(|f| wanted.wants(&f.label(), f.engine));
        let mut targets = functions.flat_map(|f| f.workers.iter().filter_map(Worker::target));
        targets.any(|target| {
            let key = (target.pid, target.start_time);
            let observed = self.open.get(&key).is_some_and(|open| open.observed);
            let waits = self.failed.get(&key).is_some_and(|(until, _)| now < *until);
            !observed && !waits
        })
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
