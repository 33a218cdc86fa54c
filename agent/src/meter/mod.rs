//! From readings of workers' counters to the RPC graph.
//!
//! ```text
//!  reading of a worker ─► what it adds to the last one ─► edge, node ─► totals
//!   (late, torn, wrapped)      (never less than nothing)       │
//!                                                     open ◄───┘
//!                                         tick ─►       │ closed
//!                                                 ┌─────┴─────┐
//!                                                 ▼           ▼
//!                                   window (rates, latencies)  step (history)
//! ```
//!
//! A value: it reads no worker and no clock, and is told everything.
//!
//! - What it counts are calls *begun*, so that one that never returns is there.
//!   Totals are the sums over all workers, those that have ended included.
//! - A worker is a pid with a start time. What it had counted when the first
//!   tick came, an earlier agent's time perhaps, is in the totals and in no rate
//!   and no step: when it was is not known.
//! - The code that calls is named, wherever it runs: what `Baz`, fused into `Bar`
//!   in a worker of `Foo`, calls is on `Baz`'s edges.
//! - How an edge runs ([`EdgeState`](crate::api::EdgeState)) is what the gates
//!   of the present readings say; see `report.rs` for callers that only run fused
//!   into others.
//!
//! It is bounded in everything that a worker can make up: [`MAX_EDGES`],
//! [`MAX_SITES`], [`MAX_SERIES`]. What finds no room is told in a note.

mod counts;
mod registry;
mod report;
#[cfg(test)]
mod tests;
mod window;
mod worker;

use std::collections::{HashMap, VecDeque};

use nightgraft_patcher::observed::Reading;

use crate::api::{HistoryEdge, HistoryNode, HistoryStep};
use registry::Registry;
use window::{Clock, Track};
use worker::{Place, Worker, ends, reached};

pub use window::{MIN_SAMPLE_MS, WINDOW_MS};
pub use worker::MAX_SERIES;

/// Edges that are counted for. With more, those are forgotten that no living
/// worker has; calls of others are counted together.
pub const MAX_EDGES: usize = 4_096;
/// Functions whose own calls are counted for, likewise.
pub const MAX_NODES: usize = 4_096;
/// Sites of an edge that are told apart; RPCs from others are summed as
/// [`ELSEWHERE`].
pub const MAX_SITES: usize = 64;
/// What the sites beyond [`MAX_SITES`] are called.
pub const ELSEWHERE: &str = "elsewhere";
/// Workers that have ended whose names are kept, so that a reading that comes
/// late does not count them anew.
const MAX_DEAD: usize = 1_024;

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerKey {
    /// Pid of the engine, where it is known.
    pub engine: Option<i32>,
    /// Its function, as [`crate::discover::Function::label`] names it.
    pub function: String,
    /// Its pid.
    pub pid: i32,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct EdgeKey {
    engine: Option<i32>,
    caller: String,
    callee: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct NodeKey {
    engine: Option<i32>,
    function: String,
}

/// What is counted of an edge.
#[derive(Debug, Default)]
struct Edge {
    rpc: Track,
    fused: Track,
    sites: Vec<(String, u64)>,
    elsewhere: u64,
}

impl Edge {
    /// Which of its sites this is; `None` where there is no room for it.
    fn site(&mut self, site: &str) -> Option<usize> {
        let known = self.sites.iter().position(|(at, _)| at == site);
        if known.is_none() && self.sites.len() < MAX_SITES {
            self.sites.push((site.to_owned(), 0));
            return Some(self.sites.len() - 1);
        }
        known
    }

    fn count_site(&mut self, site: Option<usize>, calls: u64) {
        let sum = match site.and_then(|at| self.sites.get_mut(at)) {
            Some((_, sum)) => sum,
            None => &mut self.elsewhere,
        };
        *sum = sum.saturating_add(calls);
    }
}

/// Calls that are not on any edge.
#[derive(Debug, Default)]
struct Lost {
    /// As the workers say: no room in their tables, or no name.
    unattributed: u64,
    /// No room for their edge here.
    no_room: u64,
    /// Some worker had more series than are followed.
    series: bool,
}

/// Counts what workers call.
#[derive(Debug)]
pub struct Meter {
    /// By pid: a pid has one process at a time.
    workers: HashMap<i32, Worker>,
    /// The last that have ended, oldest first.
    dead: VecDeque<(i32, u64)>,
    /// How many have ended.
    gone: u64,
    clock: Clock,
    /// Milliseconds of the samples since the last step.
    step_ms: u64,
    cycles_per_ns: f64,
    nodes: Registry<NodeKey, Track>,
    edges: Registry<EdgeKey, Edge>,
    lost: Lost,
}

impl Default for Meter {
    fn default() -> Meter {
        Meter::new()
    }
}

impl Meter {
    /// One that has counted nothing.
    #[must_use]
    pub fn new() -> Meter {
        Meter {
            workers: HashMap::new(),
            dead: VecDeque::new(),
            gone: 0,
            clock: Clock::default(),
            step_ms: 0,
            cycles_per_ns: 1.0,
            nodes: Registry::new(MAX_NODES),
            edges: Registry::new(MAX_EDGES),
            lost: Lost::default(),
        }
    }

    /// Takes a reading of a worker's counters, which may be late or torn.
    ///
    /// One of a worker that is [`gone`](Meter::gone), or that has another's pid
    /// by now, is not counted.
    pub fn read(&mut self, worker: WorkerKey, reading: &Reading) {
        let Some(mut worker) = self.taken(worker) else {
            return;
        };
        worker.round += 1;
        worker.observing = reading.observing;
        self.read_own(&mut worker, reading);
        self.read_rpcs(&mut worker, reading);
        self.read_fused(&mut worker, reading);
        self.workers.insert(worker.key.pid, worker);
    }

    /// What is known of a worker, to be put back; `None` for one that is gone.
    fn taken(&mut self, key: WorkerKey) -> Option<Worker> {
        match self.workers.remove(&key.pid) {
            Some(mut worker) if worker.key.start_time == key.start_time => {
                // Its function or its engine may be known better now. What it
                // counted so far stays where it is.
                if worker.key != key {
                    self.release(&mut worker);
                    worker.key = key;
                }
                Some(worker)
            }
            Some(worker) if worker.key.start_time > key.start_time => {
                self.workers.insert(key.pid, worker);
                None
            }
            other => {
                if let Some(before) = other {
                    self.end(before);
                }
                let dead = self.dead.contains(&(key.pid, key.start_time));
                (!dead).then(|| Worker::new(key))
            }
        }
    }

    fn read_own(&mut self, worker: &mut Worker, reading: &Reading) {
        worker.own_known = reading.own.is_some();
        let Some(own) = &reading.own else { return };
        if worker.node.is_none() {
            worker.node = self.nodes.acquire(&NodeKey {
                engine: worker.key.engine,
                function: worker.key.function.clone(),
            });
        }
        let more = worker.own.advance(own);
        match worker.node {
            Some(node) => self.nodes.value(node).add(&self.clock, &more),
            None => self.lost.no_room = self.lost.no_room.saturating_add(more.entered),
        }
    }

    fn read_rpcs(&mut self, worker: &mut Worker, reading: &Reading) {
        let more = reading.unattributed.saturating_sub(worker.unattributed);
        worker.unattributed = worker.unattributed.max(reading.unattributed);
        self.lost.unattributed = self.lost.unattributed.saturating_add(more);
        let mut place = 0;
        for series in &reading.rpcs {
            let name = [&*series.caller, &*series.callee, &*series.site];
            let Some(slot) = worker.rpcs.at(place, worker.round, name) else {
                self.lost.series = true;
                continue;
            };
            place += 1;
            let more = slot.last.advance(&series.calls);
            if slot.place.is_none() && !more.is_zero() {
                // The last component, or the worker's own function.
                let caller = match series.caller.rsplit('/').next() {
                    None | Some("") => &worker.key.function,
                    Some(caller) => caller,
                };
                slot.place = self.place(&worker.key, caller, &series.callee, Some(&series.site));
            }
            match slot.place {
                Some(place) => {
                    let edge = self.edges.value(place.edge);
                    edge.rpc.add(&self.clock, &more);
                    edge.count_site(place.site, more.entered);
                }
                None => self.lost.no_room = self.lost.no_room.saturating_add(more.entered),
            }
        }
    }

    fn read_fused(&mut self, worker: &mut Worker, reading: &Reading) {
        let mut place = 0;
        for series in &reading.fused {
            let path = &*series.callee;
            let Some(slot) = worker.fused.at(place, worker.round, [path, "", ""]) else {
                self.lost.series = true;
                continue;
            };
            place += 1;
            slot.fused = reached(reading, path, series.fused);
            let more = slot.last.advance(&series.calls);
            if slot.place.is_none() && (slot.fused || !more.is_zero()) {
                let (caller, callee) = ends(&worker.key.function, path);
                slot.place = self.place(&worker.key, caller, callee, None);
            }
            match slot.place {
                Some(place) => self.edges.value(place.edge).fused.add(&self.clock, &more),
                None => self.lost.no_room = self.lost.no_room.saturating_add(more.entered),
            }
        }
    }

    fn place(
        &mut self,
        worker: &WorkerKey,
        caller: &str,
        callee: &str,
        site: Option<&str>,
    ) -> Option<Place> {
        let edge = self.edges.acquire(&EdgeKey {
            engine: worker.engine,
            caller: caller.to_owned(),
            callee: callee.to_owned(),
        })?;
        let site = site.and_then(|site| self.edges.value(edge).site(site));
        Some(Place { edge, site })
    }

    /// A worker has ended. What it counted stays in the totals; a reading of it
    /// that comes later is not counted.
    pub fn gone(&mut self, pid: i32, start_time: u64) {
        match self.workers.remove(&pid) {
            Some(worker) if worker.key.start_time == start_time => self.end(worker),
            other => {
                if let Some(another) = other {
                    self.workers.insert(pid, another);
                }
                self.bury(pid, start_time);
            }
        }
    }

    fn end(&mut self, mut worker: Worker) {
        self.release(&mut worker);
        self.gone += 1;
        self.bury(worker.key.pid, worker.key.start_time);
    }

    fn bury(&mut self, pid: i32, start_time: u64) {
        if self.dead.contains(&(pid, start_time)) {
            return;
        }
        if self.dead.len() == MAX_DEAD {
            self.dead.pop_front();
        }
        self.dead.push_back((pid, start_time));
    }

    fn release(&mut self, worker: &mut Worker) {
        let sample = self.clock.number();
        if let Some(node) = worker.node.take() {
            self.nodes.release(node, sample);
        }
        for edge in worker.take_edges() {
            self.edges.release(edge, sample);
        }
    }

    /// Closes a sample, behind a round of readings: what they have added is in
    /// the rates from now on. The first one begins the first sample. One within
    /// [`MIN_SAMPLE_MS`] of the last leaves the sample open.
    ///
    /// `at_ms` is milliseconds since 1970, `cycles_per_ns` the rate of the
    /// time-stamp counter; one that makes no sense is not taken.
    pub fn tick(&mut self, at_ms: u64, cycles_per_ns: f64) {
        if cycles_per_ns.is_normal() && cycles_per_ns > 0.0 {
            self.cycles_per_ns = cycles_per_ns;
        }
        let Some(span) = self.clock.tick(at_ms) else {
            return;
        };
        self.step_ms = self.step_ms.saturating_add(span);
        for (_, own) in self.nodes.iter_mut() {
            own.close(&self.clock);
        }
        for (_, edge) in self.edges.iter_mut() {
            edge.rpc.close(&self.clock);
            edge.fused.close(&self.clock);
        }
    }

    /// What was counted since this was last asked for, up to the last tick.
    /// `None` where no sample was closed meanwhile, or no worker is known and
    /// nothing was counted.
    pub fn step(&mut self) -> Option<HistoryStep> {
        let at_ms = self.clock.at_ms()?;
        let span = std::mem::take(&mut self.step_ms);
        if span == 0 {
            return None;
        }
        let per_ns = self.cycles_per_ns;
        let mut nodes = Vec::new();
        for (key, own) in self.nodes.iter_mut() {
            let own = own.take_step();
            if !own.is_zero() {
                nodes.push(HistoryNode {
                    function: key.function.clone(),
                    engine: key.engine,
                    calls: own.entered,
                    errors: own.errors,
                    own: own.latency(per_ns),
                });
            }
        }
        let mut edges = Vec::new();
        for (key, edge) in self.edges.iter_mut() {
            let (rpc, fused) = (edge.rpc.take_step(), edge.fused.take_step());
            if !(rpc.is_zero() && fused.is_zero()) {
                edges.push(HistoryEdge {
                    caller: key.caller.clone(),
                    callee: key.callee.clone(),
                    engine: key.engine,
                    rpc_calls: rpc.entered,
                    fused_calls: fused.entered,
                    errors: rpc.errors.saturating_add(fused.errors),
                    rpc: rpc.latency(per_ns),
                    fused: fused.latency(per_ns),
                });
            }
        }
        if self.workers.is_empty() && nodes.is_empty() && edges.is_empty() {
            return None;
        }
        nodes.sort_by(|a, b| (a.engine, &a.function).cmp(&(b.engine, &b.function)));
        edges.sort_by(|a, b| {
            (a.engine, &a.caller, &a.callee).cmp(&(b.engine, &b.caller, &b.callee))
        });
        Some(HistoryStep {
            at_ms,
            seconds: span as f64 / 1e3,
            nodes,
            edges,
        })
    }
}
