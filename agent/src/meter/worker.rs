//! What is known of one living worker: its counters as they were last read,
//! and what each of them counts for.

use nightgraft_patcher::observed::Reading;

use super::WorkerKey;
use super::counts::Last;
use super::registry::Id;

/// Series that are followed of one worker, RPCs and fused ones each. Its tables
/// have room for far fewer; this is for one that makes up others all the time.
pub const MAX_SERIES: usize = 1_024;

/// Where a series counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) edge: Id,
    /// Which of the edge's sites; `None` for those that had no room.
    pub(super) site: Option<usize>,
}

/// One series.
#[derive(Debug, Default)]
pub(super) struct Slot {
    name: [String; 3],
    pub(super) last: Last,
    pub(super) place: Option<Place>,
    /// The fused callee's gate is open, and those on the way to it.
    pub(super) fused: bool,
    /// The last reading that had it.
    round: u64,
}

/// The series of one kind, in the order of the last reading.
#[derive(Debug, Default)]
pub(super) struct Slots(Vec<Slot>);

impl Slots {
    /// The series that this reading has in this place; the places before were
    /// asked for already. `None` where there are too many.
    ///
    /// Readings keep to their order but for what is new, so it is nearly always
    /// where it was. Two may have one name: a table that is filled from several
    /// threads can have a row twice.
    pub(super) fn at(&mut self, place: usize, round: u64, name: [&str; 3]) -> Option<&mut Slot> {
        let slots = &mut self.0;
        // Those before are of this round.
        let found = (place..slots.len()).find(|&at| slots[at].name == name);
        let at = match found {
            Some(at) => at,
            None if slots.len() == MAX_SERIES => return None,
            None => {
                slots.push(Slot {
                    name: name.map(str::to_owned),
                    ..Slot::default()
                });
                slots.len() - 1
            }
        };
        // The rest keeps its order, for rows of one name too.
        slots[place..=at].rotate_right(1);
        let slot = &mut slots[place];
        slot.round = round;
        Some(slot)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.0.iter_mut()
    }
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) key: WorkerKey,
    /// Where its own calls count.
    pub(super) node: Option<Id>,
    /// Number of the last reading.
    pub(super) round: u64,
    pub(super) observing: bool,
    /// The last reading had the function's own calls.
    pub(super) own_known: bool,
    pub(super) own: Last,
    pub(super) rpcs: Slots,
    pub(super) fused: Slots,
    pub(super) unattributed: u64,
}

impl Worker {
    pub(super) fn new(key: WorkerKey) -> Worker {
        Worker {
            key,
            node: None,
            round: 0,
            observing: false,
            own_known: false,
            own: Last::default(),
            rpcs: Slots::default(),
            fused: Slots::default(),
            unattributed: 0,
        }
    }

    /// Series of RPCs that the last reading had, if they are counted now: what
    /// seems to be under way in others may have ended since.
    pub(super) fn present_rpcs(&self) -> impl Iterator<Item = &Slot> {
        let slots = self.rpcs.iter();
        slots.filter(|slot| self.observing && slot.round == self.round)
    }

    /// Fused series that the last reading had.
    pub(super) fn present_fused(&self) -> impl Iterator<Item = &Slot> {
        self.fused.iter().filter(|slot| slot.round == self.round)
    }

    /// The edges that it counts for; with them it forgets what they were.
    pub(super) fn take_edges(&mut self) -> Vec<Id> {
        let slots = self.rpcs.iter_mut().chain(self.fused.iter_mut());
        slots
            .filter_map(|slot| slot.place.take())
            .map(|place| place.edge)
            .collect()
    }
}

impl Slot {
    /// The fused callee is called by the worker's own function.
    pub(super) fn is_direct(&self) -> bool {
        !self.name[0].contains('/')
    }
}

/// Whether calls get to this fused series: its gate is open, and so are those
/// on the way to it.
pub(super) fn reached(reading: &Reading, path: &str, fused: bool) -> bool {
    let closed_above = |above: &str| {
        let below = path.strip_prefix(above);
        below.is_some_and(|below| below.starts_with('/'))
    };
    let mut others = reading.fused.iter();
    fused && !others.any(|other| !other.fused && closed_above(&other.callee))
}

/// The last component of the way to a fused callee, and the one before it.
pub(super) fn ends<'a>(function: &'a str, path: &'a str) -> (&'a str, &'a str) {
    match path.rsplit_once('/') {
        Some((before, last)) => (before.rsplit('/').next().unwrap_or(before), last),
        None => (function, path),
    }
}
