//! Who is left alone for a while, and who for good: functions whose workers could
//! not be observed, and those one of whose workers ended of it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::{Key, Missing, Wanted};
use crate::grafter::{Held, Target};

/// How long a function is left alone whose worker could not be observed, at first;
/// twice as long each time.
const BACK_OFF: Duration = Duration::from_secs(5);
/// And at most.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(600);
/// How long after observing has begun a worker's end is laid to that.
const STRIKE: Duration = Duration::from_secs(10);

/// A function, by its engine.
type Of = (Option<i32>, String);

#[derive(Debug, Default)]
pub(super) struct Due {
    waits: HashMap<Of, Wait>,
    began: HashMap<Key, Began>,
    /// Functions one of whose workers has ended, and how.
    suspended: HashMap<Of, String>,
}

#[derive(Debug)]
struct Wait {
    until: Instant,
    next: Duration,
    why: String,
}

/// A worker that is observed since not long ago.
#[derive(Debug)]
pub(super) struct Began {
    at: Instant,
    pid: i32,
    held: Option<Held>,
    pub(super) function: String,
    pub(super) engine: Option<i32>,
}

impl Began {
    /// How it has ended, unless it was ended from outside. Waits for a moment.
    pub(super) fn of_itself(&self) -> Option<String> {
        let pid = self.pid;
        match self.held.as_ref().map(Held::ended) {
            Some(ended) if ended.from_outside => None,
            Some(ended) => Some(format!(
                "worker {pid} {} soon after observing began",
                ended.end
            )),
            None => Some(format!("worker {pid} ended soon after observing began")),
        }
    }
}

impl Due {
    pub(super) fn began(
        &mut self,
        target: &Target,
        function: &str,
        engine: Option<i32>,
        held: Option<Held>,
    ) {
        self.waits.remove(&(engine, function.to_owned()));
        let began = Began {
            at: Instant::now(),
            pid: target.pid,
            held,
            function: function.to_owned(),
            engine,
        };
        self.began.insert((target.pid, target.start_time), began);
    }

    pub(super) fn failed(&mut self, function: &str, engine: Option<i32>, why: &str) {
        let of = (engine, function.to_owned());
        let wait = self.waits.get(&of).map_or(BACK_OFF, |wait| wait.next);
        let wait = Wait {
            until: Instant::now() + wait,
            next: (2 * wait).min(LONGEST_BACK_OFF),
            why: why.to_owned(),
        };
        self.waits.insert(of, wait);
    }

    pub(super) fn suspended(&mut self, function: &str, engine: Option<i32>, why: &str) {
        let of = (engine, function.to_owned());
        self.suspended.insert(of, why.to_owned());
    }

    pub(super) fn forget(&mut self, function: &str, engine: Option<i32>) {
        let of = (engine, function.to_owned());
        self.waits.remove(&of);
        self.suspended.remove(&of);
    }

    /// Workers that have ended while that may be due to us.
    pub(super) fn ended(&mut self, living: &HashSet<Key>) -> Vec<Began> {
        let gone = |key: &Key, _: &mut Began| !living.contains(key);
        let ended: Vec<Began> = self
            .began
            .extract_if(gone)
            .map(|(_, began)| began)
            .collect();
        self.began.retain(|_, began| began.at.elapsed() < STRIKE);
        let soon = |began: &Began| began.at.elapsed() < STRIKE + super::TICK;
        ended.into_iter().filter(soon).collect()
    }

    /// Of these, the ones that may be tried now.
    pub(super) fn of(&self, missing: Vec<Missing>, now: Instant) -> Vec<Key> {
        let due = |one: &Missing| {
            let of = (one.engine, one.function.clone());
            self.waits.get(&of).is_none_or(|wait| now >= wait.until)
        };
        missing.into_iter().filter(due).map(|one| one.key).collect()
    }

    /// What should be known, in sentences.
    pub(super) fn notes(&self, wanted: &Wanted) -> Vec<String> {
        let waits = self.waits.iter();
        let waits = waits.filter(|((engine, function), _)| wanted.wants(function, *engine));
        let waits = waits.map(|((_, function), wait)| {
            format!(
                "not all workers of {function} can be observed: {}",
                wait.why
            )
        });
        let suspended = self.suspended.iter().map(|((_, function), why)| {
            format!(
                "{function} is not observed any more: {why}; to try again: agentctl observe on {function}"
            )
        });
        let mut all: Vec<String> = waits.chain(suspended).collect();
        all.sort();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(function: &str) -> Missing {
        Missing {
            key: (1, 10),
            function: function.to_owned(),
            engine: None,
        }
    }

    #[test]
    fn a_function_that_fails_is_left_alone_for_longer_each_time() {
        let mut due = Due::default();
        let now = Instant::now();
        let waits = |due: &Due, after: u64| {
            due.of(vec![missing("Foo")], now + Duration::from_secs(after))
                .is_empty()
        };
        assert!(!waits(&due, 0));
        due.failed("Foo", None, "no room");
        assert!(waits(&due, 4) && !waits(&due, 6));
        assert!(!due.of(vec![missing("Bar")], now).is_empty());
        due.failed("Foo", None, "no room");
        assert!(waits(&due, 9) && !waits(&due, 11));
        for _ in 0..20 {
            due.failed("Foo", None, "no room");
        }
        assert!(waits(&due, 599) && !waits(&due, 601));
        let wanted = Wanted::default();
        assert!(due.notes(&wanted).is_empty(), "nobody wants it");
        due.forget("Foo", None);
        assert!(!waits(&due, 0));
    }

    #[test]
    fn a_worker_s_end_is_ours_only_for_a_while() {
        let mut due = Due::default();
        let target = Target {
            pid: 1,
            start_time: 10,
            library: "/functions/libfoo.so".into(),
        };
        due.began(&target, "Foo", None, None);
        let living = HashSet::from([(1, 10)]);
        assert!(due.ended(&living).is_empty());
        let ended = due.ended(&HashSet::new());
        assert_eq!(ended.len(), 1);
        let why = ended[0].of_itself().expect("nobody knows who ended it");
        assert!(why.contains("worker 1 ended"), "{why}");
        assert!(due.ended(&HashSet::new()).is_empty(), "told once");
    }
}
