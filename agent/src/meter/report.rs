//! The graph, of what is counted and of the node as a scan saw it.
//!
//! How an edge runs, in this order:
//! - `Fused` where every native worker of the caller has the callee's gate open;
//!   `Mixed` where some have.
//! - Where none has, the caller may still run fused into others, and the callee
//!   below it: `Mixed` if there were RPCs of the edge in the window, `Fused` if
//!   there were none. The caller's own workers, which could call by RPC, have
//!   not done so.
//! - `Rpc` else.
//!
//! A function's arrivals are what its own workers were called, less the RPCs
//! that observed functions made to it. That is told only where every worker of
//! it is observed: the RPCs went to all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::registry::Id;
use super::window::Track;
use super::{ELSEWHERE, Edge, EdgeKey, MAX_EDGES, MAX_SITES, Meter};
use crate::api::{EdgeState, Graph, GraphEdge, GraphNode, GraphSite, Latency, WorkerKind};
use crate::discover::Node;

/// Names that a note lists before it says how many more there are.
const NAMES: usize = 5;

/// What the node says of a function.
#[derive(Debug, Default)]
struct Known<'a> {
    workers: usize,
    native: usize,
    observed: usize,
    /// Of the observed ones, those whose own calls are counted.
    own_known: usize,
    language: Option<&'a str>,
}

/// What the present readings say of an edge.
#[derive(Debug, Default)]
struct Present {
    in_flight: u64,
    /// Native workers of the caller that have the callee's gate open.
    direct: usize,
    /// Some worker has it open, wherever the caller's code runs.
    anywhere: bool,
}

type Functions<'a> = BTreeMap<(Option<i32>, String), Known<'a>>;

impl Meter {
    /// The graph as of the last tick; counts as of the last readings. `node` is
    /// how the workers are, `now_ms` milliseconds since 1970.
    #[must_use]
    pub fn graph(&self, node: &Node, now_ms: u64) -> Graph {
        let mut functions = self.functions(node);
        let present = self.present(node);
        let mut left_out = BTreeSet::new();
        let engines: HashSet<Option<i32>> = functions
            .keys()
            .map(|(engine, _)| *engine)
            .chain(self.workers.values().map(|worker| worker.key.engine))
            .chain([None])
            .collect();
        // An engine that was started anew has another pid: what was counted
        // under the old one is not shown beside it for ever.
        let mut ended = |engine: Option<i32>, idle: bool| {
            let ended = idle && !engines.contains(&engine);
            left_out.extend(engine.filter(|_| ended));
            ended
        };

        let mut edges = Vec::new();
        let mut rpcs_into: HashMap<(Option<i32>, String), f64> = HashMap::new();
        for (id, key, edge) in self.edges.iter() {
            let none = Present::default();
            let present = present.get(&id).unwrap_or(&none);
            let shown = self.edge(key, edge, present, &functions);
            let counted = shown.rpc_calls > 0 || shown.fused_calls > 0;
            if (counted || present.anywhere) && !ended(key.engine, shown.calls_per_s == 0.0) {
                let rpcs = rpcs_into.entry((key.engine, key.callee.clone()));
                *rpcs.or_default() += self.clock.per_second(edge.rpc.window().entered);
                edges.push(shown);
            }
        }
        edges.sort_by(|a, b| {
            (a.engine, &a.caller, &a.callee).cmp(&(b.engine, &b.caller, &b.callee))
        });

        let mut own = HashMap::new();
        for (_, key, track) in self.nodes.iter() {
            let idle = track.window().entered == 0;
            if track.total.entered > 0 && !ended(key.engine, idle) {
                let key = (key.engine, key.function.clone());
                functions.entry(key.clone()).or_default();
                own.insert(key, track);
            }
        }
        for edge in &edges {
            for name in [&edge.caller, &edge.callee] {
                functions.entry((edge.engine, name.clone())).or_default();
            }
        }
        let nodes = functions.iter().map(|(key, known)| {
            let rpcs = rpcs_into.get(key).copied().unwrap_or(0.0);
            self.node(key, known, own.get(key).copied(), rpcs)
        });
        Graph {
            at_ms: now_ms,
            window_s: self.clock.seconds(),
            nodes: nodes.collect(),
            edges,
            notes: self.notes(&functions, &left_out),
        }
    }

    fn functions<'a>(&self, node: &'a Node) -> Functions<'a> {
        let mut functions = Functions::new();
        for function in &node.functions {
            let key = (function.engine, function.label());
            let known = functions.entry(key).or_default();
            for worker in &function.workers {
                known.workers += 1;
                match &worker.kind {
                    WorkerKind::Native => known.native += 1,
                    WorkerKind::NotNative { language } => known.language = Some(language),
                }
                let metered = self.workers.get(&worker.pid);
                let metered = metered.filter(|m| m.key.start_time == worker.start_time);
                if let Some(metered) = metered.filter(|m| m.observing) {
                    known.observed += 1;
                    known.own_known += usize::from(metered.own_known);
                }
            }
        }
        functions
    }

    fn present(&self, node: &Node) -> HashMap<Id, Present> {
        let native: HashSet<(i32, u64)> = node
            .functions
            .iter()
            .flat_map(|function| &function.workers)
            .filter(|worker| worker.kind == WorkerKind::Native)
            .map(|worker| (worker.pid, worker.start_time))
            .collect();
        let mut edges: HashMap<Id, Present> = HashMap::new();
        for worker in self.workers.values() {
            let is_native = native.contains(&(worker.key.pid, worker.key.start_time));
            for slot in worker.present_rpcs() {
                if let Some(place) = slot.place {
                    let edge = edges.entry(place.edge).or_default();
                    edge.in_flight = edge.in_flight.saturating_add(slot.last.in_flight());
                }
            }
            for slot in worker.present_fused() {
                if let Some(place) = slot.place {
                    let edge = edges.entry(place.edge).or_default();
                    edge.in_flight = edge.in_flight.saturating_add(slot.last.in_flight());
                    edge.anywhere |= slot.fused;
                    edge.direct += usize::from(slot.fused && slot.is_direct() && is_native);
                }
            }
        }
        edges
    }

    fn edge(
        &self,
        key: &EdgeKey,
        edge: &Edge,
        present: &Present,
        functions: &Functions<'_>,
    ) -> GraphEdge {
        let (rpc, fused) = (edge.rpc.window(), edge.fused.window());
        let native = functions
            .get(&(key.engine, key.caller.clone()))
            .map_or(0, |known| known.native);
        let state = if present.direct > 0 && present.direct < native {
            EdgeState::Mixed
        } else if present.direct > 0 {
            EdgeState::Fused
        } else if present.anywhere && rpc.entered > 0 {
            EdgeState::Mixed
        } else if present.anywhere {
            EdgeState::Fused
        } else {
            EdgeState::Rpc
        };
        let rpc_latency = self.latency(&edge.rpc);
        let fused_latency = self.latency(&edge.fused);
        let under_way = |calls: u64, latency: Option<Latency>| {
            latency.map(|l| self.clock.per_second(calls) * l.mean_ns / 1e9)
        };
        let concurrency = [
            under_way(rpc.entered, rpc_latency),
            under_way(fused.entered, fused_latency),
        ];
        let both = |of: fn(&Track) -> u64| of(&edge.rpc).saturating_add(of(&edge.fused));
        GraphEdge {
            caller: key.caller.clone(),
            callee: key.callee.clone(),
            engine: key.engine,
            state,
            rpc_calls: edge.rpc.total.entered,
            fused_calls: edge.fused.total.entered,
            errors: both(|track| track.total.errors),
            bytes_in: both(|track| track.total.bytes_in),
            bytes_out: both(|track| track.total.bytes_out),
            calls_per_s: self
                .clock
                .per_second(rpc.entered.saturating_add(fused.entered)),
            errors_per_s: self
                .clock
                .per_second(rpc.errors.saturating_add(fused.errors)),
            in_flight: present.in_flight,
            concurrency: concurrency.into_iter().flatten().reduce(|a, b| a + b),
            rpc: rpc_latency,
            fused: fused_latency,
            sites: sites(edge),
        }
    }

    /// Within the window, or since the beginning where nothing was measured in
    /// the window.
    fn latency(&self, track: &Track) -> Option<Latency> {
        let latency = track.window().latency(self.cycles_per_ns);
        latency.or_else(|| track.total.latency(self.cycles_per_ns))
    }

    fn node(
        &self,
        (engine, function): &(Option<i32>, String),
        known: &Known<'_>,
        own: Option<&Track>,
        rpcs_per_s: f64,
    ) -> GraphNode {
        let window = own.map(Track::window).unwrap_or_default();
        let calls_per_s = self.clock.per_second(window.entered);
        let all_counted = known.workers > 0 && known.own_known == known.workers;
        let language = known.language.filter(|_| known.native == 0);
        GraphNode {
            function: function.clone(),
            engine: *engine,
            kind: match language {
                Some(language) => Some(WorkerKind::NotNative {
                    language: language.to_owned(),
                }),
                None => (known.native > 0).then_some(WorkerKind::Native),
            },
            workers: known.workers,
            observed: known.observed,
            calls: own.map_or(0, |track| track.total.entered),
            errors: own.map_or(0, |track| track.total.errors),
            calls_per_s,
            arrivals_per_s: all_counted.then(|| (calls_per_s - rpcs_per_s).max(0.0)),
            own: own.and_then(|track| self.latency(track)),
            unfusable: language.map(not_native),
        }
    }

    fn notes(&self, functions: &Functions<'_>, left_out: &BTreeSet<i32>) -> Vec<String> {
        let mut notes = Vec::new();
        let partly = functions.iter().filter(|(_, k)| k.observed < k.native);
        let names: Vec<&str> = partly.map(|((_, name), _)| &**name).collect();
        if !names.is_empty() {
            notes.push(format!(
                "not all workers of {} are observed: their calls are not counted, and seem to \
                 come from outside where they arrive",
                listed(&names)
            ));
        }
        let mut count = |count: u64, one: &str, many: &str| match count {
            0 => {}
            1 => notes.push(format!("1 {one}")),
            count => notes.push(format!("{count} {many}")),
        };
        count(
            self.lost.unattributed,
            "RPC is on no edge: its worker had no room for it, or it had no name",
            "RPCs are on no edge: their workers had no room for them, or they had no name",
        );
        count(
            self.lost.no_room,
            &format!("call is not shown: there are more than {MAX_EDGES} edges or functions"),
            &format!("calls are not shown: there are more than {MAX_EDGES} edges or functions"),
        );
        count(
            self.edges.forgotten() + self.nodes.forgotten(),
            "edge or function that no worker has any more was forgotten",
            "edges and functions that no worker has any more were forgotten",
        );
        count(
            self.gone,
            "worker that was counted has ended: its calls are in the counts",
            "workers that were counted have ended: their calls are in the counts",
        );
        if self.lost.series {
            notes.push(format!(
                "a worker has more than {} series: the calls of the others are not counted",
                super::MAX_SERIES
            ));
        }
        if !left_out.is_empty() {
            let pids: Vec<String> = left_out.iter().map(i32::to_string).collect();
            let pids: Vec<&str> = pids.iter().map(String::as_str).collect();
            notes.push(format!(
                "what was counted under engines that have ended (pid {}) is not shown",
                listed(&pids)
            ));
        }
        notes
    }
}

fn sites(edge: &Edge) -> Vec<GraphSite> {
    let mut sites: Vec<GraphSite> = edge
        .sites
        .iter()
        .filter(|(_, calls)| *calls > 0)
        .map(|(at, calls)| GraphSite {
            at: at.clone(),
            calls: *calls,
        })
        .collect();
    sites.sort_by(|a, b| b.calls.cmp(&a.calls).then_with(|| a.at.cmp(&b.at)));
    debug_assert!(sites.len() <= MAX_SITES);
    if edge.elsewhere > 0 {
        sites.push(GraphSite {
            at: ELSEWHERE.to_owned(),
            calls: edge.elsewhere,
        });
    }
    sites
}

/// Why a function that runs in such workers cannot be fused.
fn not_native(language: &str) -> String {
    let are = if language.starts_with("no ") {
        // That is how discovery names what it does not know.
        format!("run {language}")
    } else {
        format!("are in {language}")
    };
    format!("its workers {are}: only C and C++ functions in a func_worker_v1 can be fused")
}

/// `Foo`; `Foo and Bar`; `Foo, Bar and 3 more`.
fn listed(names: &[&str]) -> String {
    let more = names.len().saturating_sub(NAMES);
    let more = (more > 0).then(|| format!("{more} more"));
    let mut shown: Vec<&str> = names.iter().take(NAMES).copied().collect();
    shown.extend(more.as_deref());
    match shown.split_last() {
        None => String::new(),
        Some((last, [])) => (*last).to_owned(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}
