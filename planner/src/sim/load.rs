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
/// A path that changes, changes back and changes again within this many seconds
/// has flapped.
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
    /// Paths that changed back within an hour while the load was the same but for
    /// noise: first choices that were put right.
    pub reversals: usize,
    /// Those that changed, changed back and changed again within an hour.
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
        all.reversals += noise.reversals;
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
    reversals: usize,
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
    // Settings of our own, which make sense.
    let Ok(mut governor) = Governor::new(settings.clone()) else {
        unreachable!("settings that make no sense")
    };
    let mut fused: HashSet<Path> = HashSet::new();
    let mut made: HashMap<Path, Vec<f64>> = HashMap::new();
    let (mut changes, mut reversals, mut flaps, mut fused_before) = (0, 0, 0, 0);
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
        // An edge now and then is not measured at all.
        measured.edges.retain(|_| random.f64() > 0.02);
        let Ok(average) = governor.average(now, measured) else {
            continue;
        };
        let apart = governor.apart(now, &average);
        // Of made-up numbers within their ranges.
        let Ok(plan) = plan(&average, &fused, &apart, settings) else {
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
            let times = made.entry(path).or_default();
            let since = |back: usize| {
                let at = times.len().checked_sub(back).map(|i| times[i]);
                at.is_some_and(|at| now - at < FLAP)
            };
            reversals += usize::from(since(1));
            flaps += usize::from(since(2));
            times.push(now);
        }
    }
    Simulated {
        changes,
        reversals,
        flaps,
        fused_before,
        fused_after: fused.len(),
    }
}
