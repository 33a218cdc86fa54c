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

mod due;
mod wanted;

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use wanted::{Rule, Wanted};

use crate::api::{self, HistoryStep};
use crate::discover::{Node, ProcRoot, Worker, scan_within};
use crate::driver::WeakDriver;
use crate::grafter::{Counting, GraftError, Grafter, Target};
use crate::history::History;
use crate::meter::{Meter, WorkerKey};
use crate::planning::Planning;
use due::Due;

/// How often counters are read.
const TICK: Duration = Duration::from_secs(1);
/// How often it is looked for something to read where there is nothing.
const IDLE: Duration = Duration::from_secs(10);
/// How long a worker without anything of ours is taken for one, unless somebody
/// says that there was a change.
const NOTHING: Duration = Duration::from_secs(10);
/// How often counters are opened anew without a reason.
const REOPEN: Duration = Duration::from_secs(60);
/// How long a step of the history is.
const STEP: Duration = Duration::from_secs(10);
/// How long the search for workers may take; it takes milliseconds.
const SCAN_LIMIT: Duration = Duration::from_secs(20);
/// How long the agent's end waits for a reading that is under way.
const LAST: Duration = Duration::from_millis(500);

/// A worker's pid and start time.
pub(crate) type Key = (i32, u64);

/// The observer, as requests see it.
#[derive(Debug)]
pub struct Observer {
    /// What is to be observed.
    pub wanted: Wanted,
    /// What plans are made of besides the graph.
    pub planning: Planning,
    history: History,
    /// Held while workers are read, which a hostile one can make last: whoever
    /// changes workers, or ends the agent, does not wait for it.
    inner: Mutex<Inner>,
    /// Who is to be observed and when. Never held while anything is read.
    due: Mutex<Due>,
    signal: (Mutex<Signal>, Condvar),
    driver: OnceLock<WeakDriver>,
    /// The driver has been asked to observe what is missing.
    catching_up: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    meter: Meter,
    open: HashMap<Key, Open>,
    opened: Option<Instant>,
    /// Workers of which the meter has something, open or not.
    metered: HashSet<Key>,
    /// Workers with nothing of ours, and until when that is believed.
    nothing: HashMap<Key, Instant>,
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

#[derive(Debug, Default)]
struct Signal {
    call: Call,
    /// Workers were changed: what is known of them may not hold any more.
    changed: bool,
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
            due: Mutex::default(),
            signal: Default::default(),
            driver: OnceLock::new(),
            catching_up: AtomicBool::new(false),
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

    /// Has the thread look at once: something was fused, observed or reverted. Waits
    /// for nobody.
    pub fn nudge(&self) {
        self.call(Call::Look, true);
    }

    /// What the driver was asked to catch up with is done, or cannot be.
    pub(crate) fn caught_up(&self) {
        self.call(Call::None, true);
        self.catching_up.store(false, Ordering::SeqCst);
    }

    /// Has the thread end, and what was counted so far put into the history.
    pub fn stop(&self) {
        self.call(Call::End, false);
        let deadline = Instant::now() + LAST;
        let step = loop {
            match self.inner.try_lock() {
                Ok(mut inner) => break inner.step(true),
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(_) => break None,
            }
        };
        self.record(step);
    }

    fn call(&self, call: Call, changed: bool) {
        let mut signal = self.signal();
        if signal.call != Call::End && call != Call::None {
            signal.call = call;
        }
        signal.changed |= changed;
        drop(signal);
        self.signal.1.notify_all();
    }

    fn signal(&self) -> MutexGuard<'_, Signal> {
        self.signal.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, inner: &mut Inner, grafter: &dyn Grafter, node: &Node) {
        let changed = std::mem::take(&mut self.signal().changed);
        inner.look(grafter, node, changed);
    }

    fn record(&self, step: Option<HistoryStep>) {
        if let Some(step) = step {
            self.history.add(step);
        }
    }

    /// The graph, as of now: the counters are read for it.
    #[must_use]
    pub fn graph(&self, grafter: &dyn Grafter, node: &Node) -> api::Graph {
        let mut inner = self.inner();
        self.look(&mut inner, grafter, node);
        let mut graph = inner.meter.graph(node, now_ms());
        graph.notes.extend(inner.problems.values().cloned());
        drop(inner);
        graph.notes.extend(self.due().notes(&self.wanted));
        graph
    }

    /// What was recorded since a time, in milliseconds since 1970.
    #[must_use]
    pub fn history(&self, since_ms: u64, limit: usize) -> api::History {
        let (steps, notes) = self.history.since(since_ms, limit);
        api::History { steps, notes }
    }

    /// A worker is observed from now on.
    pub(crate) fn began(
        &self,
        grafter: &dyn Grafter,
        target: &Target,
        function: &str,
        engine: Option<i32>,
    ) {
        let held = grafter.hold(target).ok().flatten();
        self.due().began(target, function, engine, held);
    }

    /// A worker could not be observed, or not left.
    pub(crate) fn failed(&self, function: &str, engine: Option<i32>, why: &str) {
        self.due().failed(function, engine, why);
    }

    /// Somebody has asked for it: whatever went wrong before is forgotten.
    pub(crate) fn asked(&self, function: &str, engine: Option<i32>) {
        self.due().forget(function, engine);
    }

    /// A worker ended of being observed, by all that can be told: nobody else of its
    /// function is, until that is asked for again.
    pub(crate) fn suspend(&self, function: &str, engine: Option<i32>, why: &str) {
        tracing::error!(
            function,
            engine,
            why,
            "the function is not observed until `agentctl observe on` is given for it again"
        );
        let off = Rule {
            on: false,
            function: Some(function.to_owned()),
            engine,
        };
        if let Err(error) = self.wanted.change(&[off]) {
            tracing::error!(%error, "that can't be written down");
        }
        self.due().suspended(function, engine, why);
    }

    fn run(&self, grafter: &dyn Grafter, proc_root: &ProcRoot) {
        loop {
            let busy = match scan_within(proc_root, SCAN_LIMIT) {
                Ok(node) => {
                    let tick = AssertUnwindSafe(|| self.tick(grafter, &node));
                    catch_unwind(tick).unwrap_or_else(|_| {
                        tracing::error!("the observer panicked, and goes on");
                        true
                    })
                }
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
        let (step, missing, open) = {
            let mut inner = self.inner();
            self.look(&mut inner, grafter, node);
            let missing = inner.missing(&self.wanted, node);
            (inner.step(false), missing, !inner.open.is_empty())
        };
        self.record(step);
        let ended = self.due().ended(&started(node));
        for worker in ended {
            if let Some(why) = worker.of_itself() {
                self.suspend(&worker.function, worker.engine, &why);
            }
        }
        let missing = self.due().of(missing, Instant::now());
        if !missing.is_empty() && !self.catching_up.swap(true, Ordering::SeqCst) {
            let asked = self.driver.get().is_some_and(|d| d.catch_up(missing));
            if !asked {
                self.catching_up.store(false, Ordering::SeqCst);
            }
        }
        open || self.wanted.any()
    }

    fn wait(&self, most: Duration) -> Call {
        let (signal, woken) = &self.signal;
        let signal = signal.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut signal, _) = woken
            .wait_timeout_while(signal, most, |signal| signal.call == Call::None)
            .unwrap_or_else(PoisonError::into_inner);
        match signal.call {
            Call::End => Call::End,
            _ => std::mem::take(&mut signal.call),
        }
    }
}

/// The node's workers.
fn started(node: &Node) -> HashSet<Key> {
    let workers = node.functions.iter().flat_map(|f| &f.workers);
    workers.map(|w| (w.pid, w.start_time)).collect()
}

/// A worker that is to be observed and is not.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Missing {
    key: Key,
    function: String,
    engine: Option<i32>,
}

impl Inner {
    /// Opens what is new, reads everything, and lets go of what has ended.
    fn look(&mut self, grafter: &dyn Grafter, node: &Node, changed: bool) {
        let now = Instant::now();
        let living = started(node);
        // A patch that was taken back leaves counters that nobody counts in: they are
        // opened anew. Those of a worker that has just ended are read once more.
        let anew = changed || self.opened.is_none_or(|opened| now - opened >= REOPEN);
        if anew {
            self.opened = Some(now);
            self.nothing.clear();
        }
        for function in &node.functions {
            for target in function.workers.iter().filter_map(Worker::target) {
                let key = (target.pid, target.start_time);
                let known = self.nothing.get(&key).is_some_and(|until| now < *until);
                if !known && (anew || !self.open.contains_key(&key)) {
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
        self.nothing.retain(|key, _| living.contains(key));
        self.problems.retain(|key, _| living.contains(key));
        let Inner {
            meter,
            open,
            problems,
            nothing,
            metered,
            ..
        } = self;
        open.retain(|key, one| {
            let lives = living.contains(key);
            let mut keep = lives;
            match one.counting.read() {
                Ok(Some(reading)) => {
                    one.observed = reading.observing;
                    meter.read(one.worker.clone(), &reading);
                    metered.insert(*key);
                    problems.remove(key);
                }
                Ok(None) => {
                    nothing.insert(*key, now + NOTHING);
                    keep = false;
                }
                Err(error) if lives && !matches!(error, GraftError::WorkerGone { .. }) => {
                    let why = format!("worker {}: its counters can't be read: {error}", key.0);
                    problems.insert(*key, why);
                }
                // What it counted last is lost with it.
                Err(_) => {}
            }
            keep
        });
        metered.retain(|key| {
            let lives = living.contains(key);
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

    /// What was counted since the last step, if it is time for one.
    fn step(&mut self, last: bool) -> Option<HistoryStep> {
        let now = Instant::now();
        let due = self.stepped.is_none_or(|stepped| now - stepped >= STEP);
        if !due && !last {
            return None;
        }
        self.stepped = Some(now);
        self.meter.step()
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
            Ok(None) => {
                self.open.remove(&key);
                self.nothing.insert(key, now + NOTHING);
            }
            Err(GraftError::WorkerGone { .. }) => {
                self.nothing.insert(key, now + NOTHING);
            }
            Err(error) => {
                self.nothing.insert(key, now + NOTHING);
                let why = format!("worker {} can't be read: {error}", target.pid);
                self.problems.insert(key, why);
            }
        }
    }

    /// Workers that are to be observed and are not.
    fn missing(&self, wanted: &Wanted, node: &Node) -> Vec<Missing> {
        let functions = node.functions.iter();
        let functions = functions.filter(|f| wanted.wants(&f.label(), f.engine));
        let mut all = Vec::new();
        for function in functions {
            for target in function.workers.iter().filter_map(Worker::target) {
                let key = (target.pid, target.start_time);
                if !self.open.get(&key).is_some_and(|open| open.observed) {
                    all.push(Missing {
                        key,
                        function: function.label(),
                        engine: function.engine,
                    });
                }
            }
        }
        all
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
