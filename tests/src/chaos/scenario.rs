//! The ways by which points are reached.

/// What is asked of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `patch`.
    Patch,
    /// `revert`.
    Revert,
    /// `observe on`.
    Observe,
    /// `observe off`.
    Leave,
    /// To start, and nothing else.
    Start,
}

/// Which function it is done to, and how that is before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// One that was never touched.
    Fresh,
    /// One that was fused and reverted.
    Reverted,
    /// One that is fused.
    Fused,
    /// One that is observed.
    Observed,
}

/// What the journal's directory is like before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Journal {
    /// The one that all share.
    Shared,
    /// A new one.
    New,
    /// One with a file that is no journal.
    Damaged,
    /// One that knows a worker that is dead.
    OfTheDead,
}

/// A way by which points are reached.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// For people.
    pub name: &'static str,
    /// How the function is before.
    pub state: State,
    /// An agent that died before: what it was asked, where it died.
    pub died: Option<(Act, Death)>,
    /// What the agent is asked that dies now.
    pub act: Act,
    /// Which of its writes to the journal fails.
    pub refuse: Option<u64>,
    /// Which journal it has.
    pub journal: Journal,
}

/// Where an agent died before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// At a point's first hit.
    At(&'static str),
    /// While the worker had a descriptor of ours open.
    WithDescriptor,
}

const PATCH: Scenario = Scenario {
    name: "a first patch",
    state: State::Fresh,
    died: None,
    act: Act::Patch,
    refuse: None,
    journal: Journal::Shared,
};

const RECOVERY: Scenario = Scenario {
    act: Act::Start,
    ..PATCH
};

impl Scenario {
    /// All of them.
    #[must_use]
    pub fn all() -> Vec<Scenario> {
        let after = |name, act, death| Scenario {
            name,
            died: Some((act, death)),
            ..RECOVERY
        };
        vec![
            PATCH,
            Scenario {
                name: "a patch that finds its image",
                state: State::Reverted,
                ..PATCH
            },
            Scenario {
                name: "a revert",
                state: State::Fused,
                act: Act::Revert,
                ..PATCH
            },
            Scenario {
                name: "a patch that is taken back",
                refuse: Some(2),
                ..PATCH
            },
            after(
                "recovery of memory that was mapped",
                Act::Patch,
                Death::At("prepare::filled"),
            ),
            after(
                "recovery of an open descriptor",
                Act::Patch,
                Death::WithDescriptor,
            ),
            after(
                "recovery of a record that was not written",
                Act::Patch,
                Death::At("record::slot"),
            ),
            after(
                "recovery of windows that were written in part",
                Act::Patch,
                Death::At("commit::window"),
            ),
            Scenario {
                state: State::Fused,
                ..after(
                    "recovery of a revert",
                    Act::Revert,
                    Death::At("revert::gate"),
                )
            },
            Scenario {
                name: "a first observing",
                act: Act::Observe,
                ..PATCH
            },
            Scenario {
                name: "an end of observing",
                state: State::Observed,
                act: Act::Leave,
                ..PATCH
            },
            Scenario {
                name: "observing a function that is fused",
                state: State::Fused,
                act: Act::Observe,
                ..PATCH
            },
            Scenario {
                name: "a first start",
                journal: Journal::New,
                ..RECOVERY
            },
            Scenario {
                name: "a start with a damaged journal",
                journal: Journal::Damaged,
                ..RECOVERY
            },
            Scenario {
                name: "a start with a journal of the dead",
                journal: Journal::OfTheDead,
                ..RECOVERY
            },
        ]
    }

    /// Whether an agent is ended at each point that it passes, although others
    /// pass them as well: what is done there is another thing.
    #[must_use]
    pub fn is_looked_at_whole(&self) -> bool {
        // Where it is fused the windows are in place already, mostly.
        matches!(self.act, Act::Observe | Act::Leave) && self.state != State::Fused
    }

    /// Whether one agent does one thing to one worker, so that the worker may
    /// be ended in its place.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.died.is_none() && self.refuse.is_none() && self.act != Act::Start
    }
}

/// Whether a point is passed while a worker is worked in.
#[must_use]
pub(super) fn concerns_a_worker(point: &str) -> bool {
    !["start::", "journal", "recover"]
        .iter()
        .any(|prefix| point.starts_with(prefix))
}
