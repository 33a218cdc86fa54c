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

use crate::forest::Path;
use crate::graph::{Edge, Graph, GraphError};
use crate::plan::{Decision, Plan, Verdict, violations};
use crate::settings::{Settings, WrongSetting};

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

/// Calls per second that are none.
const NOTHING: f64 = 1e-6;
/// A path that does badly is left alone for no longer than a day.
const LONGEST_BACK_OFF: f64 = 86_400.0;

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
    /// With the edge as it was last.
    rates: HashMap<(String, String), (Average, Edge)>,
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
    ///
    /// # Errors
    /// A setting makes no sense.
    pub fn new(settings: Settings) -> Result<Governor, WrongSetting> {
        settings.check()?;
        Ok(Governor {
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
        })
    }

    /// Takes what was measured since the last time, and gives the graph with its
    /// rates averaged, to plan with. An edge that is not in it was not called: it
    /// stays in the graph, as long as its functions do, until its average is
    /// nothing.
    ///
    /// # Errors
    /// The graph makes no sense; it is as if it had not been measured.
    pub fn average(&mut self, now: f64, mut graph: Graph) -> Result<Graph, GraphError> {
        graph.check()?;
        let passed = self.measured.map_or(self.settings.average_s, |t| now - t);
        self.measured = Some(now);
        let keep = (-passed.max(0.0) / self.settings.average_s).exp();
        let place: HashMap<String, usize> = (graph.functions.iter().enumerate())
            .map(|(index, function)| (function.name.clone(), index))
            .collect();
        let mut measured: HashSet<(String, String)> = HashSet::new();
        for edge in &mut graph.edges {
            let name = |function: usize| graph.functions[function].name.clone();
            let key = (name(edge.caller), name(edge.callee));
            let entry = self.rates.entry(key.clone());
            let (average, known) = entry.or_insert_with(|| (Average::default(), edge.clone()));
            known.clone_from(edge);
            let mean = average.add(edge.rate, keep);
            if edge.rate < mean * LULL {
                self.lulls.insert(key.clone());
            } else {
                self.lulls.remove(&key);
            }
            edge.rate = mean;
            measured.insert(key);
        }
        let mut silent = Vec::new();
        self.rates.retain(|key, (average, edge)| {
            if measured.contains(key) {
                return true;
            }
            let rate = average.add(0.0, keep);
            let (caller, callee) = (place.get(&key.0), place.get(&key.1));
            if let (Some(&caller), Some(&callee)) = (caller, callee) {
                silent.push(Edge {
                    caller,
                    callee,
                    rate,
                    ..edge.clone()
                });
            }
            rate > NOTHING
        });
        // In one order, whatever the map's is.
        silent.sort_by_key(|edge| (edge.caller, edge.callee));
        graph.edges.extend(silent);
        let rates = &self.rates;
        self.lulls.retain(|key| rates.contains_key(key));
        for function in &mut graph.functions {
            let average = self.arrivals.entry(function.name.clone()).or_default();
            function.arrivals = average.add(function.arrivals, keep);
        }
        self.arrivals
            .retain(|name, average| place.contains_key(name) || average.add(0.0, keep) > NOTHING);
        Ok(graph)
    }

    /// Paths that are not to be fused now, whatever they would save: to be planned
    /// without.
    #[must_use]
    pub fn apart(&self, now: f64, graph: &Graph) -> HashSet<Path> {
        let index = |name: &String| graph.functions.iter().position(|f| f.name == *name);
        (self.back_off.iter())
            .filter(|(_, back_off)| now < back_off.until)
            .filter_map(|(path, _)| path.iter().map(index).collect())
            .collect()
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
        back_off.next = (back_off.next * 2.0).min(LONGEST_BACK_OFF);
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
        self.forget(now);
        self.note_wanted(now, plan);
        let mut changes = Vec::new();
        let mut held: BTreeMap<Names, Held> = BTreeMap::new();
        let mut stage = Stage {
            graph,
            settings: self.settings.clone(),
            fused: (plan.decisions.iter())
                .filter(|d| d.fused)
                .map(|d| d.path.clone())
                .collect(),
        };
        let mut fuse: Vec<&Decision> = (plan.decisions.iter())
            .filter(|d| d.verdict == Verdict::Fuse)
            .collect();
        fuse.sort_by(|a, b| {
            (a.path.len().cmp(&b.path.len()))
                .then(b.saved_per_s.total_cmp(&a.saved_per_s))
                .then_with(|| a.path.cmp(&b.path))
        });
        // Roots in which something may be fused now.
        let coming: HashSet<&str> = (fuse.iter())
            .filter(|d| self.waits(now, d, Kind::Fuse).is_none())
            .map(|d| d.path[0].as_str())
            .collect();
        self.unfuse(now, plan, &coming, &mut stage, &mut changes, &mut held);
        for decision in fuse {
            let path = &decision.path;
            let parent = &path[..path.len() - 1];
            let others = parent.len() > 1 && !stage.fused.contains(parent);
            let wait = match self.waits(now, decision, Kind::Fuse) {
                Some(why) => Some(why),
                None if others || !stage.may(path, Kind::Fuse) => Some(Held::Others),
                None if !self.pay(workers(graph, &path[0])) => Some(Held::Budget),
                None => None,
            };
            if let Some(why) = wait {
                held.insert(path.clone(), why);
                continue;
            }
            stage.fused.insert(path.clone());
            self.change(now, decision, Kind::Fuse, &mut changes);
        }
        (changes, held.into_iter().collect())
    }

    /// Drops what no wait depends on any more.
    fn forget(&mut self, now: f64) {
        let settings = &self.settings;
        self.changed.retain(|_, at| now - *at < settings.dwell_s);
        self.deployed.retain(|_, at| now - *at < settings.quiet_s);
        // Who has done well for as long as it would have been left alone.
        self.back_off.retain(|_, b| now - b.until < b.next);
    }

    /// What is to go: the deepest first.
    fn unfuse(
        &mut self,
        now: f64,
        plan: &Plan,
        coming: &HashSet<&str>,
        stage: &mut Stage<'_>,
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
            .filter(|d| d.forced)
            .map(|d| d.path.as_slice())
            .collect();
        let forced = |path: &[String]| (2..=path.len()).any(|n| must.contains(&path[..n]));
        for decision in all {
            let path = &decision.path;
            if !forced(path) {
                let below = |other: &Names| other.len() > path.len() && other.starts_with(path);
                // Nothing gives up its place for what does not come yet.
                let early = decision.displaced && !coming.contains(path[0].as_str());
                let others = early || stage.fused.iter().any(below);
                let wait = match self.waits(now, decision, Kind::Unfuse) {
                    Some(why) => Some(why),
                    None if others || !stage.may(path, Kind::Unfuse) => Some(Held::Others),
                    None if !self.pay(workers(stage.graph, &path[0])) => Some(Held::Budget),
                    None => None,
                };
                if let Some(why) = wait {
                    held.insert(path.clone(), why);
                    continue;
                }
            }
            stage.fused.remove(path);
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
        if young && kind == Kind::Fuse {
            Some(Held::Quiet)
        } else if kind == Kind::Fuse && self.back_off.get(path).is_some_and(|b| now < b.until) {
            Some(Held::BackOff)
        } else if ago(self.changed.get(path)) < settings.dwell_s {
            Some(Held::Dwell)
        } else if now - since < confirm || kind == Kind::Fuse && self.is_quiet(path) {
            Some(Held::Unconfirmed)
        } else {
            None
        }
    }

    fn fill(&mut self, now: f64) {
        let minutes = self.filled.map_or(0.0, |at| (now - at).max(0.0) / 60.0);
        self.filled = Some(now);
        let settings = &self.settings;
        // Less than one a minute is one now and then.
        let most = settings.changes_per_minute.max(1.0);
        self.changes_left = (self.changes_left + minutes * settings.changes_per_minute).min(most);
        let most = settings.stop_s_per_minute;
        self.stops_left = (self.stops_left + minutes * most).min(most);
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

/// What is fused while changes are made.
struct Stage<'a> {
    graph: &'a Graph,
    settings: Settings,
    fused: HashSet<Names>,
}

impl Stage<'_> {
    /// Whether a change by itself breaks no limit that holds now: what it relies
    /// on elsewhere may not be done yet.
    fn may(&self, path: &[String], kind: Kind) -> bool {
        let limited = |f: &crate::Function| f.memory_room.is_some() || f.cores.is_some();
        if !self.graph.functions.iter().any(limited) {
            return true;
        }
        let place: HashMap<&str, usize> = (self.graph.functions.iter().enumerate())
            .map(|(index, function)| (function.name.as_str(), index))
            .collect();
        let index = |path: &[String]| -> Option<Path> {
            path.iter()
                .map(|name| place.get(name.as_str()).copied())
                .collect()
        };
        let before: HashSet<Path> = self.fused.iter().filter_map(|p| index(p)).collect();
        let Some(path) = index(path) else {
            return true;
        };
        let mut after = before.clone();
        match kind {
            Kind::Fuse => after.insert(path),
            Kind::Unfuse => after.remove(&path),
        };
        let count = |set| violations(self.graph, set, &self.settings);
        count(&after) <= count(&before)
    }
}

fn workers(graph: &Graph, function: &str) -> u32 {
    let found = graph.functions.iter().find(|f| f.name == function);
    found.map_or(0, |f| f.workers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan;
    use crate::testing::{chain, edge, function};

    /// A node whose changes are made as they are told.
    struct Trial {
        settings: Settings,
        governor: Governor,
        fused: HashSet<Path>,
        changes: Vec<(f64, Kind, String)>,
        held: Vec<(Names, Held)>,
    }

    impl Trial {
        fn new(settings: Settings) -> Trial {
            Trial {
                governor: Governor::new(settings.clone()).unwrap(),
                settings,
                fused: HashSet::new(),
                changes: Vec::new(),
                held: Vec::new(),
            }
        }

        fn at(&mut self, now: f64, graph: &Graph) {
            let graph = self.governor.average(now, graph.clone()).unwrap();
            let apart = self.governor.apart(now, &graph);
            let plan = plan(&graph, &self.fused, &apart, &self.settings).unwrap();
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
        let mut stage = Trial::new(Settings::default());
        stage.run(0..1000, burst);
        assert_eq!(stage.changes, []);
        // Without the waits it would have.
        let mut hasty = Trial::new(Settings {
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
        let mut stage = Trial::new(Settings::default());
        stage.run(0..7200, waves);
        let all: Vec<Kind> = stage.changes.iter().map(|c| c.1).collect();
        assert_eq!(all, [Kind::Fuse], "{:?}", stage.changes);
        // Dwell, averages and the wide border, each off: it flaps.
        let mut flapping = Trial::new(Settings {
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
        let mut stage = Trial::new(Settings {
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
        let mut stage = Trial::new(Settings::default());
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
        let mut stage = Trial::new(Settings::default());
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
        let mut stage = Trial::new(Settings::default());
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
        let mut stage = Trial::new(Settings::default());
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
        let mut stage = Trial::new(Settings::default());
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

    #[test]
    fn an_edge_that_is_missing_once_is_not_gone() {
        let graph = chain(&["A", "B"], 5000.0);
        let mut without = graph.clone();
        without.edges.clear();
        let mut stage = Trial::new(Settings::default());
        for round in 0..400_u32 {
            let measured = if round % 40 == 39 { &without } else { &graph };
            stage.at(f64::from(round) * 10.0, measured);
        }
        assert_eq!(stage.changes.len(), 1, "{:?}", stage.changes);
        // For good it goes like one that nobody calls.
        for round in 400..1000_u32 {
            stage.at(f64::from(round) * 10.0, &without);
        }
        assert_eq!(stage.changes.len(), 2, "{:?}", stage.changes);
        assert!(stage.governor.rates.is_empty());
    }

    #[test]
    fn nothing_gives_up_its_place_for_what_is_left_alone() {
        let mut graph = chain(&["A", "B"], 9000.0);
        graph.functions.push(function("C", 0.0));
        graph.edges.push(edge(0, 2, 5000.0));
        graph.functions[0].memory_room = Some(150 << 10);
        let mut stage = Trial::new(Settings::default());
        let path = ["A".to_owned(), "B".to_owned()];
        stage.governor.failed(0.0, &path);
        stage.run(0..600, |_| graph.clone());
        assert_eq!(stage.fused, HashSet::from([vec![0, 2]]));
        // Then it gets it, as it is so much better.
        stage.run(600..3000, |_| graph.clone());
        assert_eq!(stage.fused, HashSet::from([vec![0, 1]]));
        assert_eq!(stage.changes.len(), 3, "{:?}", stage.changes);
    }

    #[test]
    fn limits_hold_while_others_wait() {
        // B fits into A only once A itself has gone into R.
        let mut graph = chain(&["R", "A", "B"], 5000.0);
        graph.functions[1].arrivals = 500.0;
        graph.edges[1].rate = 5500.0;
        graph.functions[1].cores = Some(0.07 / 0.8);
        let mut stage = Trial::new(Settings {
            depth: 2,
            ..Settings::default()
        });
        stage.governor.deployed(0.0, "R");
        stage.run(0..60, |_| graph.clone());
        assert_eq!(stage.changes, []);
        stage.run(60..200, |_| graph.clone());
        let order: Vec<&str> = stage.changes.iter().map(|c| c.2.as_str()).collect();
        assert_eq!(order, ["R/A", "A/B"]);
    }

    #[test]
    fn what_holds_more_than_it_may_goes_at_once() {
        let mut graph = chain(&["A", "B"], 5000.0);
        let mut stage = Trial::new(Settings::default());
        stage.run(0..50, |_| graph.clone());
        graph.functions[0].memory_room = Some(10);
        stage.at(50.0, &graph);
        assert_eq!(stage.changes.len(), 2, "{:?}", stage.changes);
    }

    #[test]
    fn a_measurement_that_makes_no_sense_is_passed_over() {
        let graph = chain(&["A", "B"], 5000.0);
        let mut wrong = graph.clone();
        wrong.edges[0].rate = f64::NAN;
        let mut stage = Trial::new(Settings::default());
        assert!(stage.governor.average(0.0, wrong).is_err());
        stage.run(0..100, |_| graph.clone());
        assert_eq!(stage.changes.len(), 1);
    }

    #[test]
    fn names_that_are_gone_are_forgotten() {
        let mut stage = Trial::new(Settings::default());
        for number in 0..200_u32 {
            let names = [format!("A{number}"), format!("B{number}")];
            let graph = chain(&[names[0].as_str(), names[1].as_str()], 5000.0);
            let now = f64::from(number) * 1000.0;
            stage.governor.deployed(now, &names[0]);
            stage.fused.clear();
            stage.at(now, &graph);
            stage.at(now + 100.0, &graph);
        }
        let governor = &stage.governor;
        for left in [
            governor.rates.len(),
            governor.arrivals.len(),
            governor.changed.len(),
            governor.deployed.len(),
        ] {
            assert!(left < 12, "{governor:?}");
        }
    }
}
