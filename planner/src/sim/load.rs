//! Hours of noisy load: does the governor leave alone what it should?

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::{Options, generate, topology};
use crate::forest::Path;
use crate::governor::{Governor, Kind};
use crate::graph::Graph;
use crate::plan::plan;
use crate::settings::Settings;

/// Seconds between two measurements.
const STEP: u32 = 15;
/// How much rates scatter, as the deviation of their logarithm.
const NOISE: f64 = 0.4;
/// A path that changes back within this many seconds has flapped.
const FLAP: f64 = 3600.0;

/// What noisy load did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Flaps {
    /// Graphs under load.
    pub graphs: usize,
    /// Hours of it on each.
    pub hours: u32,
    /// Changes made.
    pub changes: usize,
    /// Paths that changed and changed back within an hour while the load was
    /// the same but for noise.
    pub flaps: usize,
    /// The same without averages, waits and hysteresis: what they are for.
    pub flaps_without: usize,
    /// Edges whose load went away for good and that were un-fused for it.
    pub cold_unfused: usize,
    /// Edges whose load went away for good.
    pub cold: usize,
}

pub(super) fn run(options: &Options, settings: &Settings) -> Flaps {
    let mut all = Flaps {
        hours: options.hours,
        ..Flaps::default()
    };
    let mut graphs: Vec<Graph> = topology::all().into_iter().map(|(_, g)| g).collect();
    graphs.extend((0..10).map(|n| generate::small(options.seed + 1000 + n)));
    let hasty = Settings {
        hysteresis: 1.0,
        confirm_s: 0.0,
        dwell_s: 0.0,
        average_s: 1.0,
        ..settings.clone()
    };
    for (number, graph) in graphs.iter().enumerate() {
        let seed = options.seed + number as u64;
        all.graphs += 1;
        let noise = simulate(graph, settings, seed, options.hours, false);
        all.changes += noise.changes;
        all.flaps += noise.flaps;
        all.flaps_without += simulate(graph, &hasty, seed, options.hours, false).flaps;
        let gone = simulate(graph, settings, seed, options.hours, true);
        all.cold += gone.fused_before;
        all.cold_unfused += gone.fused_before - gone.fused_after;
    }
    all
}

struct Simulated {
    changes: usize,
    flaps: usize,
    fused_before: usize,
    fused_after: usize,
}

/// A factor whose logarithm scatters normally.
fn noise(random: &mut fastrand::Rng) -> f64 {
    // A sum of uniform ones is near enough to a normal one.
    let sum: f64 = (0..12).map(|_| random.f64()).sum::<f64>() - 6.0;
    (NOISE * sum).exp()
}

/// Runs it; with `stops`, there is no load in the second half.
fn simulate(graph: &Graph, settings: &Settings, seed: u64, hours: u32, stops: bool) -> Simulated {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut governor = Governor::new(settings.clone());
    let mut fused: HashSet<Path> = HashSet::new();
    let mut last: HashMap<Path, (f64, Kind)> = HashMap::new();
    let (mut changes, mut flaps, mut fused_before) = (0, 0, 0);
    let end = hours * 3600;
    for now in (0..end).step_by(STEP as usize) {
        let mut measured = graph.clone();
        let all = noise(&mut random);
        let silent = stops && now >= end / 2;
        if now < end / 2 {
            fused_before = fused.len();
        }
        for function in &mut measured.functions {
            function.arrivals *= if silent { 0.0 } else { all };
        }
        for edge in &mut measured.edges {
            edge.rate *= if silent {
                0.0
            } else {
                all * noise(&mut random)
            };
        }
        let now = f64::from(now);
        let average = governor.average(now, measured);
        // Of made-up numbers within their ranges.
        let Ok(plan) = plan(&average, &fused, settings) else {
            continue;
        };
        let (now_made, _) = governor.step(now, &average, &plan);
        for change in now_made {
            let index = |name: &String| graph.functions.iter().position(|f| f.name == *name);
            let path: Path = change.path.iter().filter_map(index).collect();
            match change.kind {
                Kind::Fuse => fused.insert(path.clone()),
                Kind::Unfuse => fused.remove(&path),
            };
            changes += 1;
            let before = last.insert(path, (now, change.kind));
            flaps += usize::from(before.is_some_and(|(at, _)| now - at < FLAP));
        }
    }
    Simulated {
        changes,
        flaps,
        fused_before,
        fused_after: fused.len(),
    }
}
