//! Graphs made up at random.

use std::collections::HashSet;

use crate::forest::{Forest, Path};
use crate::graph::{Calls, Edge, Function, Graph};
use crate::settings::Settings;

/// Between the two, small ones as often as large ones.
fn spread(random: &mut fastrand::Rng, least: f64, most: f64) -> f64 {
    least * (most / least).powf(random.f64())
}

/// Some functions, each of which calls some that come after it, and now and then
/// one before.
fn shape(random: &mut fastrand::Rng, functions: usize, edges: usize) -> Graph {
    let mut graph = Graph::default();
    for index in 0..functions {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "bytes"
        )]
        let graft_bytes = spread(random, 70e3, 4e6) as u64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "bytes"
        )]
        let room = spread(random, 200e3, 16e6) as u64;
        graph.functions.push(Function {
            name: format!("F{index}"),
            arrivals: 0.0,
            own_s: spread(random, 1e-6, 2e-3),
            workers: random.u32(1..=8),
            memory_room: (random.f64() < 0.5).then_some(room),
            cores: None,
            graft_bytes,
            domain: match random.f64() < 0.05 {
                true => "other".to_owned(),
                false => String::new(),
            },
            unfusable: (random.f64() < 0.05).then(|| "runs in Go".to_owned()),
        });
    }
    let mut seen = HashSet::new();
    let mut left = edges * 4;
    while graph.edges.len() < edges && left > 0 {
        left -= 1;
        let (a, b) = (random.usize(..functions), random.usize(..functions));
        let back = random.f64() < 0.05;
        let (caller, callee) = if (a < b) == back { (b, a) } else { (a, b) };
        if caller != callee && seen.insert((caller, callee)) {
            graph.edges.push(Edge {
                caller,
                callee,
                rate: 0.0,
                overhead_s: spread(random, 8e-6, 80e-6),
                forbidden: (random.f64() < 0.05).then(|| "effects: network".to_owned()),
                required: false,
            });
        }
    }
    graph
}

/// Lets requests arrive and be passed on.
fn load(random: &mut fastrand::Rng, graph: &mut Graph) {
    let n = graph.functions.len();
    let called: HashSet<usize> = graph.edges.iter().map(|e| e.callee).collect();
    for index in 0..n {
        if !called.contains(&index) || random.f64() < 0.15 {
            graph.functions[index].arrivals = spread(random, 0.5, 20_000.0);
        }
    }
    // Calls per execution: backwards seldom, so that cycles end.
    let ratio: Vec<f64> = (graph.edges.iter())
        .map(|edge| match edge.caller < edge.callee {
            true => match random.u32(0..4) {
                0 | 1 => 1.0,
                2 => random.f64(),
                _ => spread(random, 0.01, 3.0),
            },
            false => 0.2 * random.f64(),
        })
        .collect();
    let arrivals: Vec<f64> = graph.functions.iter().map(|f| f.arrivals).collect();
    let mut executions = arrivals.clone();
    // A node has only so many processors.
    let most = 200_000.0;
    for _ in 0..200 {
        let mut next = arrivals.clone();
        for (edge, ratio) in graph.edges.iter().zip(&ratio) {
            next[edge.callee] += (executions[edge.caller] * ratio).min(most);
        }
        executions = next;
    }
    for (edge, ratio) in graph.edges.iter_mut().zip(&ratio) {
        edge.rate = (executions[edge.caller] * ratio).min(most);
    }
    for (index, function) in graph.functions.iter_mut().enumerate() {
        if random.f64() < 0.3 {
            let busy = executions[index] * function.own_s;
            function.cores = Some(busy * spread(random, 0.8, 8.0) + 0.01);
        }
    }
}

/// One of a few functions.
pub(super) fn small(seed: u64) -> Graph {
    let mut random = fastrand::Rng::with_seed(seed);
    let functions = random.usize(2..=8);
    let edges = random.usize(1..=functions + 3);
    let mut graph = shape(&mut random, functions, edges);
    load(&mut random, &mut graph);
    graph
}

/// One of so many functions and edges.
pub(super) fn of_size(seed: u64, functions: usize, edges: usize) -> Graph {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut graph = shape(&mut random, functions, edges);
    load(&mut random, &mut graph);
    graph
}

/// Paths that are fused already: nothing half of the time, else some that may be.
pub(super) fn fused(seed: u64, graph: &Graph, settings: &Settings) -> HashSet<Path> {
    let mut random = fastrand::Rng::with_seed(seed ^ 0x5eed);
    let mut fused = HashSet::new();
    if random.bool() {
        return fused;
    }
    let calls = Calls::of(graph);
    let forest = Forest::grow(&calls, &fused, &HashSet::new(), settings);
    for candidate in &forest.candidates {
        let parent = &candidate.path[..candidate.path.len() - 1];
        if (candidate.parent.is_none() || fused.contains(parent)) && random.f64() < 0.4 {
            fused.insert(candidate.path.clone());
        }
    }
    fused
}
