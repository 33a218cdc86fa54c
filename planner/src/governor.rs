//! When a plan is acted upon: what is changed now, and what waits for what.
//!
//! ```text
//!  measured graph ─► averages ─► plan ─► wanted for long enough? ─► dwell, quiet,
//!                                        back-off over? ─► budget left? ─► change
//! ```
//!
//! What may not be fused any more is undone at once, whatever else holds.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::graph::Graph;
use crate::plan::{Decision, Plan, Verdict};
use crate::settings::Settings;

/// A path by names: functions may come, go, and change their numbers.
type Names = Vec<String>;

/// Which way a path changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It is fused.
    Fuse,
    /// It becomes an RPC again.
    Unfuse,
}

/// A change to make now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// The functions, the root first.
    pub path: Vec<String>,
    /// Which way.
    pub kind: Kind,
    /// Why, in words.
    pub reason: String,
}

/// What a wanted change waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Held {
    /// It is not wanted for long enough yet.
    Unconfirmed,
    /// The path was changed not long ago.
    Dwell,
    /// A function on it was deployed not long ago.
    Quiet,
    /// It did worse than foretold when it was fused.
    BackOff,
    /// The changes or the stops of this minute are used up.
    Budget,
    /// What it takes is not fused yet; or what lies below it is still fused; or
    /// what it takes the place of.
    Others,
}

/// An edge that is called less than this share of its average has gone quiet.
const LULL: f64 = 0.1;

/// A sum whose older parts weigh less.
#[derive(Debug, Clone, Copy, Default)]
struct Average {
    sum: f64,
    weight: f64,
}

impl Average {
    fn add(&mut self, value: f64, keep: f64) -> f64 {
        self.sum = self.sum * keep + value * (1.0 - keep);
        self.weight = self.weight * keep + (1.0 - keep);
        self.value()
    }

    fn value(self) -> f64 {
        match self.weight > 0.0 {
            true => self.sum / self.weight,
            false => 0.0,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct BackOff {
    until: f64,
    next: f64,
}

/// Acts on plans over time. Times are seconds of any one clock that does not go
/// backwards.
#[derive(Debug)]
pub struct Governor {
    settings: Settings,
    measured: Option<f64>,
    rates: HashMap<(String, String), Average>,
    arrivals: HashMap<String, Average>,
    /// Edges whose last measurement was far below their average: a burst that is
    /// over, however high it was.
    lulls: HashSet<(String, String)>,
    wanted: HashMap<Names, (Kind, f64)>,
    changed: HashMap<Names, f64>,
    deployed: HashMap<String, f64>,
    back_off: HashMap<Names, BackOff>,
    changes_left: f64,
    stops_left: f64,
    filled: Option<f64>,
}

impl Governor {
    /// One that has seen nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Governor {
        Governor {
            changes_left: settings.changes_per_minute,
            stops_left: settings.stop_s_per_minute,
            settings,
            measured: None,
            rates: HashMap::new(),
            arrivals: HashMap::new(),
            lulls: HashSet::new(),
            wanted: HashMap::new(),
            changed: HashMap::new(),
            deployed: HashMap::new(),
            back_off: HashMap::new(),
            filled: None,
        }
    }

    /// Takes what was measured since the last time, and gives the graph with its
    /// rates averaged, to plan with. An edge that is not in it was not called.
    pub fn average(&mut self, now: f64, mut graph: Graph) -> Graph {
        let passed = self.measured.map_or(self.settings.average_s, |t| now - t);
        self.measured = Some(now);
        let keep = (-passed.max(0.0) / self.settings.average_s.max(1e-3)).exp();
        let name = |function: usize| graph.functions[function].name.clone();
        let mut known: HashSet<(String, String)> = HashSet::new();
        let mut averages = Vec::with_capacity(graph.edges.len());
        for edge in &graph.edges {
            let key = (name(edge.caller), name(edge.callee));
            let average = self.rates.entry(key.clone()).or_default();
            averages.push(average.add(edge.rate, keep));
            if edge.rate < average.value() * LULL {
                self.lulls.insert(key.clone());
            } else {
                self.lulls.remove(&key);
            }
            known.insert(key);
        }
        for (edge, average) in graph.edges.iter_mut().zip(averages) {
            edge.rate = average;
        }
        self.rates
            .retain(|key, average| known.contains(key) || average.add(0.0, keep) > 1e-6);
        for function in &mut graph.functions {
            let average = self.arrivals.entry(function.name.clone()).or_default();
            function.arrivals = average.add(function.arrivals, keep);
        }
        graph
    }

    /// A function was deployed: its code or its containers are new.
    pub fn deployed(&mut self, now: f64, function: &str) {
        self.deployed.insert(function.to_owned(), now);
    }

    /// A path that was fused did worse than foretold and was un-fused for it: it
    /// is left alone for a while, for longer each time.
    pub fn failed(&mut self, now: f64, path: &[String]) {
        let first = self.settings.back_off_s;
        let entry = self.back_off.entry(path.to_vec());
        let back_off = entry.or_insert(BackOff {
            until: now,
            next: first,
        });
        back_off.until = now + back_off.next;
        back_off.next *= 2.0;
        self.changed.insert(path.to_vec(), now);
        self.wanted.remove(path);
    }

    /// What is to be done now, in order, and what waits for what. The changes
    /// are counted as made.
    pub fn step(
        &mut self,
        now: f64,
        graph: &Graph,
        plan: &Plan,
    ) -> (Vec<Change>, Vec<(Vec<String>, Held)>) {
        self.fill(now);
        self.note_wanted(now, plan);
        let mut changes = Vec::new();
        let mut held: BTreeMap<Names, Held> = BTreeMap::new();
        let mut fused: HashSet<Names> = (plan.decisions.iter())
            .filter(|d| d.fused)
            .map(|d| d.path.clone())
            .collect();
        self.unfuse(now, graph, plan, &mut fused, &mut changes, &mut held);
        // Roots in which something stays that is to go: what is to come there may
        // have been meant for its place.
        let stuck: HashSet<String> = held.keys().map(|path| path[0].clone()).collect();
        let mut fuse: Vec<&Decision> = (plan.decisions.iter())
            .filter(|d| d.verdict == Verdict::Fuse)
            .collect();
        fuse.sort_by(|a, b| {
            (a.path.len().cmp(&b.path.len()))
                .then(b.saved_per_s.total_cmp(&a.saved_per_s))
                .then_with(|| a.path.cmp(&b.path))
        });
        for decision in fuse {
            let path = &decision.path;
            let parent = &path[..path.len() - 1];
            let limited = graph
                .functions
                .iter()
                .any(|f| f.name == path[0] && (f.memory_room.is_some() || f.cores.is_some()));
            let others =
                parent.len() > 1 && !fused.contains(parent) || limited && stuck.contains(&path[0]);
            let wait = match self.waits(now, decision, Kind::Fuse) {
                Some(why) => Some(why),
                None if others => Some(Held::Others),
                None if !self.pay(workers(graph, &path[0])) => Some(Held::Budget),
                None => None,
            };
            if let Some(why) = wait {
                held.insert(path.clone(), why);
                continue;
            }
            fused.insert(path.clone());
            self.change(now, decision, Kind::Fuse, &mut changes);
        }
        (changes, held.into_iter().collect())
    }

    /// What is to go: the deepest first.
    fn unfuse(
        &mut self,
        now: f64,
        graph: &Graph,
        plan: &Plan,
        fused: &mut HashSet<Names>,
        changes: &mut Vec<Change>,
        held: &mut BTreeMap<Names, Held>,
    ) {
        let mut all: Vec<&Decision> = (plan.decisions.iter())
            .filter(|d| d.verdict == Verdict::Unfuse)
            .collect();
        all.sort_by(|a, b| {
            (b.path.len().cmp(&a.path.len()))
                .then(a.saved_per_s.total_cmp(&b.saved_per_s))
                .then_with(|| a.path.cmp(&b.path))
        });
        // What may not be, with all that lies below it.
        let must: HashSet<&[String]> = (all.iter())
            .filter(|d| d.memory == 0)
            .map(|d| d.path.as_slice())
            .collect();
        let forced = |path: &[String]| (2..=path.len()).any(|n| must.contains(&path[..n]));
        for decision in all {
            let path = &decision.path;
            if !forced(path) {
                let below = |other: &Names| other.len() > path.len() && other.starts_with(path);
                let wait = match self.waits(now, decision, Kind::Unfuse) {
                    Some(why) => Some(why),
                    None if fused.iter().any(below) => Some(Held::Others),
                    None if !self.pay(workers(graph, &path[0])) => Some(Held::Budget),
                    None => None,
                };
                if let Some(why) = wait {
                    held.insert(path.clone(), why);
                    continue;
                }
            }
            fused.remove(path);
            self.change(now, decision, Kind::Unfuse, changes);
        }
    }

    fn change(&mut self, now: f64, decision: &Decision, kind: Kind, changes: &mut Vec<Change>) {
        self.changed.insert(decision.path.clone(), now);
        self.wanted.remove(&decision.path);
        changes.push(Change {
            path: decision.path.clone(),
            kind,
            reason: decision.reason.clone(),
        });
    }

    /// What is wanted now, and since when without a break.
    fn note_wanted(&mut self, now: f64, plan: &Plan) {
        let mut wanted = HashMap::new();
        for decision in &plan.decisions {
            let kind = match decision.verdict {
                Verdict::Fuse if self.is_quiet(&decision.path) => continue,
                Verdict::Fuse => Kind::Fuse,
                Verdict::Unfuse => Kind::Unfuse,
                Verdict::Keep | Verdict::NotPossible => continue,
            };
            let since = match self.wanted.get(&decision.path) {
                Some((before, since)) if *before == kind => *since,
                _ => now,
            };
            wanted.insert(decision.path.clone(), (kind, since));
        }
        self.wanted = wanted;
    }

    fn is_quiet(&self, path: &[String]) -> bool {
        let [.., caller, callee] = path else {
            return false;
        };
        self.lulls.contains(&(caller.clone(), callee.clone()))
    }

    fn waits(&self, now: f64, decision: &Decision, kind: Kind) -> Option<Held> {
        let settings = &self.settings;
        let path = decision.path.as_slice();
        let confirm = match decision.displaced {
            true => settings.displace_s,
            false => settings.confirm_s,
        };
        let since = self.wanted.get(path).map_or(now, |(_, since)| *since);
        let ago = |at: Option<&f64>| at.map_or(f64::INFINITY, |at| now - at);
        let young = path
            .iter()
            .any(|function| ago(self.deployed.get(function)) < settings.quiet_s);
        if young {
            Some(Held::Quiet)
        } else if kind == Kind::Fuse && self.back_off.get(path).is_some_and(|b| now < b.until) {
            Some(Held::BackOff)
        } else if ago(self.changed.get(path)) < settings.dwell_s {
            Some(Held::Dwell)
        } else if now - since < confirm {
            Some(Held::Unconfirmed)
        } else {
            None
        }
    }

    fn fill(&mut self, now: f64) {
        let minutes = self.filled.map_or(0.0, |at| (now - at).max(0.0) / 60.0);
        self.filled = Some(now);
        let more = |left: f64, most: f64| (left + minutes * most).min(most);
        self.changes_left = more(self.changes_left, self.settings.changes_per_minute);
        self.stops_left = more(self.stops_left, self.settings.stop_s_per_minute);
    }

    /// Takes one change out of the budget, if it is in there. One that stops more
    /// than a minute may, takes a full one.
    fn pay(&mut self, workers: u32) -> bool {
        let most = self.settings.stop_s_per_minute;
        let stops = (f64::from(workers) * self.settings.stop_s).min(most);
        if self.changes_left < 1.0 || self.stops_left < stops {
            return false;
        }
        self.changes_left -= 1.0;
        self.stops_left -= stops;
        true
    }
}

fn workers(graph: &Graph, function: &str) -> u32 {
    let found = graph.functions.iter().find(|f| f.name == function);
    found.map_or(0, |f| f.workers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forest::Path;
    use crate::plan::plan;
    use crate::testing::{chain, edge, function};

    /// A node whose changes are made as they are told.
    struct Stage {
        settings: Settings,
        governor: Governor,
        fused: HashSet<Path>,
        changes: Vec<(f64, Kind, String)>,
        held: Vec<(Names, Held)>,
    }

    impl Stage {
        fn new(settings: Settings) -> Stage {
            Stage {
                governor: Governor::new(settings.clone()),
                settings,
                fused: HashSet::new(),
                changes: Vec::new(),
                held: Vec::new(),
            }
        }

        fn at(&mut self, now: f64, graph: &Graph) {
            let graph = self.governor.average(now, graph.clone());
            let plan = plan(&graph, &self.fused, &self.settings).unwrap();
            let (changes, held) = self.governor.step(now, &graph, &plan);
            for change in changes {
                let index = |name: &String| {
                    graph
                        .functions
                        .iter()
                        .position(|f| f.name == *name)
                        .unwrap()
                };
                let path: Path = change.path.iter().map(index).collect();
                match change.kind {
                    Kind::Fuse => assert!(self.fused.insert(path)),
                    Kind::Unfuse => assert!(self.fused.remove(&path)),
                }
                self.changes.push((now, change.kind, change.path.join("/")));
            }
            self.held = held;
        }

        /// Every 10 s from here to there.
        fn run(&mut self, times: std::ops::Range<u32>, graph: impl Fn(f64) -> Graph) {
            for now in times.step_by(10) {
                let now = f64::from(now);
                self.at(now, &graph(now));
            }
        }
    }

    #[test]
    fn a_moment_s_load_changes_nothing() {
        let burst = |now: f64| {
            chain(
                &["A", "B"],
                if (100.0..120.0).contains(&now) {
                    5e4
                } else {
                    0.0
                },
            )
        };
        let mut stage = Stage::new(Settings::default());
        stage.run(0..1000, burst);
        assert_eq!(stage.changes, []);
        // Without the waits it would have.
        let mut hasty = Stage::new(Settings {
            confirm_s: 0.0,
            average_s: 1.0,
            ..Settings::default()
        });
        hasty.run(0..1000, burst);
        assert!(!hasty.changes.is_empty());
    }

    #[test]
    fn load_that_comes_and_goes_does_not_make_edges_flap() {
        // A minute on, a minute off.
        let waves = |now: f64| {
            chain(
                &["A", "B"],
                if ((now / 60.0) as u64).is_multiple_of(2) {
                    400.0
                } else {
                    0.0
                },
            )
        };
        let mut stage = Stage::new(Settings::default());
        stage.run(0..7200, waves);
        let all: Vec<Kind> = stage.changes.iter().map(|c| c.1).collect();
        assert_eq!(all, [Kind::Fuse], "{:?}", stage.changes);
        // Dwell, averages and the wide border, each off: it flaps.
        let mut flapping = Stage::new(Settings {
            dwell_s: 0.0,
            average_s: 1.0,
            confirm_s: 0.0,
            hysteresis: 1.0,
            ..Settings::default()
        });
        flapping.run(0..7200, waves);
        assert!(flapping.changes.len() > 20, "{:?}", flapping.changes);
    }

    #[test]
    fn what_was_just_changed_stays_for_a_while() {
        let mut stage = Stage::new(Settings {
            confirm_s: 0.0,
            average_s: 1.0,
            ..Settings::default()
        });
        stage.at(0.0, &chain(&["A", "B"], 5000.0));
        for now in [100.0, 299.0] {
            stage.at(now, &chain(&["A", "B"], 0.0));
            assert_eq!(stage.held[0].1, Held::Dwell);
        }
        stage.at(301.0, &chain(&["A", "B"], 0.0));
        let kinds: Vec<Kind> = stage.changes.iter().map(|c| c.1).collect();
        assert_eq!(kinds, [Kind::Fuse, Kind::Unfuse]);
    }

    #[test]
    fn a_deployment_is_waited_for() {
        let graph = chain(&["A", "B"], 5000.0);
        let mut stage = Stage::new(Settings::default());
        stage.governor.deployed(0.0, "B");
        stage.run(0..60, |_| graph.clone());
        assert_eq!(stage.changes, []);
        assert_eq!(stage.held, [(vec!["A".into(), "B".into()], Held::Quiet)]);
        stage.run(60..80, |_| graph.clone());
        assert_eq!(stage.changes.len(), 1);
    }

    #[test]
    fn changes_and_stops_are_spread_over_time() {
        let mut graph = Graph::default();
        for index in 0..40 {
            graph.functions.push(function(&format!("A{index}"), 5000.0));
            graph.functions.push(function(&format!("B{index}"), 0.0));
            graph.edges.push(edge(2 * index, 2 * index + 1, 5000.0));
        }
        let mut stage = Stage::new(Settings::default());
        stage.run(0..400, |_| graph.clone());
        assert_eq!(stage.fused.len(), 40);
        let within = |from: f64, to: f64| {
            let all = stage.changes.iter();
            all.filter(|(at, ..)| (from..to).contains(at)).count()
        };
        for minute in 0..6 {
            let from = f64::from(minute) * 60.0;
            assert!(within(from, from + 60.0) <= 24, "{:?}", stage.changes);
        }
        // Stops: 25 workers of each caller, 25 ms a change, two a minute.
        for function in &mut graph.functions {
            function.workers = 25;
        }
        let mut stage = Stage::new(Settings::default());
        stage.run(0..310, |_| graph.clone());
        assert!(
            (8..=13).contains(&stage.changes.len()),
            "{}",
            stage.changes.len()
        );
        assert!(stage.held.iter().any(|(_, why)| *why == Held::Budget));
    }

    #[test]
    fn who_did_badly_is_left_alone_for_longer_each_time() {
        let graph = chain(&["A", "B"], 5000.0);
        let path = ["A".to_owned(), "B".to_owned()];
        let mut stage = Stage::new(Settings::default());
        let mut times = Vec::new();
        for now in (0..8000).step_by(10) {
            let now = f64::from(now);
            stage.at(now, &graph);
            if stage.fused.remove(&vec![0, 1]) {
                times.push(now);
                stage.governor.failed(now, &path);
            }
        }
        let gaps: Vec<f64> = times.windows(2).map(|t| t[1] - t[0]).collect();
        assert!(gaps.len() >= 3, "{times:?}");
        for pair in gaps.windows(2) {
            assert!(pair[1] > 1.7 * pair[0], "{gaps:?}");
        }
    }

    #[test]
    fn what_may_not_be_goes_at_once_with_all_below_it() {
        let mut graph = chain(&["A", "B", "C"], 5000.0);
        let mut stage = Stage::new(Settings::default());
        stage.run(0..50, |_| graph.clone());
        let order: Vec<&str> = stage.changes.iter().map(|c| c.2.as_str()).collect();
        assert_eq!(order, ["A/B", "A/B/C"]);
        graph.edges[0].forbidden = Some("policy".to_owned());
        stage.governor.deployed(50.0, "A");
        stage.at(50.0, &graph);
        let order: Vec<&str> = stage.changes[2..].iter().map(|c| c.2.as_str()).collect();
        assert_eq!(order, ["A/B/C", "A/B"]);
        assert!(stage.fused.is_empty());
    }
}
