//! What is done when the agent starts: every worker of the node, and every one
//! that the journal knows, is put in order before the first request is served.
//!
//! What follows from what was found is decided in
//! [`nightgraft_patcher::recover`]; here it is done worker by worker, each
//! claimed first where there is something to be done, and remembered for
//! `agentctl health` and `status`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::api::{JournalHealth, RecoveredWorker};
use crate::discover::Node;
use crate::faults::{self, hit};
use crate::grafter::{GraftError, Grafter, Target, Verdict};

/// How long a worker is waited for that another agent works in.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the journal and the recovery have to say; shared by those who ask.
#[derive(Debug, Clone, Default)]
pub struct Recovery(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    running: bool,
    notes: Vec<String>,
    workers: BTreeMap<i32, RecoveredWorker>,
}

impl Recovery {
    /// A recovery that is about to run; `notes` is what there is to say already.
    #[must_use]
    pub fn due(notes: Vec<String>) -> Self {
        Self(Arc::new(Mutex::new(State {
            running: true,
            notes,
            workers: BTreeMap::new(),
        })))
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether it still runs.
    #[must_use]
    pub fn running(&self) -> bool {
        self.with(|state| state.running)
    }

    /// What was found of workers in which there was something to be done.
    #[must_use]
    pub fn workers(&self) -> Vec<RecoveredWorker> {
        self.with(|state| state.workers.values().cloned().collect())
    }

    /// What there is to say of the journal.
    #[must_use]
    pub fn journal(&self, grafter: &dyn Grafter) -> JournalHealth {
        let (path, away) = grafter.journal();
        JournalHealth {
            path,
            away,
            notes: self.with(|state| state.notes.clone()),
        }
    }

    /// What `status` should say: workers that were left as they are.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let left = |worker: RecoveredWorker| {
            (worker.verdict == Verdict::Left).then(|| {
                format!(
                    "worker {} was left as it is: {}",
                    worker.pid,
                    worker.notes.join("; ")
                )
            })
        };
        self.workers().into_iter().filter_map(left).collect()
    }

    /// Puts everything in order. `known` are further workers, from the journal.
    pub fn run(&self, grafter: &dyn Grafter, node: &Node, known: Vec<Target>) {
        let mut targets: Vec<Target> = node
            .functions
            .iter()
            .flat_map(|function| &function.workers)
            .filter_map(crate::discover::Worker::target)
            .collect();
        for target in known {
            if targets.iter().all(|t| t.pid != target.pid) {
                targets.push(target);
            }
        }
        for target in &targets {
            hit(faults::RECOVERY_WORKER);
            self.one(grafter, target);
        }
        hit(faults::RECOVERY_DONE);
        self.with(|state| state.running = false);
    }

    /// Says that it cannot be done, and why.
    pub fn failed(&self, why: &str) {
        tracing::error!(why, "the workers are not recovered");
        self.with(|state| {
            state
                .notes
                .push(format!("the workers were not looked at: {why}"));
            state.running = false;
        });
    }

    fn one(&self, grafter: &dyn Grafter, target: &Target) {
        let pid = target.pid;
        let result = grafter.recover(target, PATIENCE);
        let (verdict, notes) = match result {
            Ok(None) | Err(GraftError::WorkerGone { .. }) => return,
            Ok(Some(recovered)) => (recovered.verdict, recovered.notes),
            Err(error) => (Verdict::Left, vec![error.to_string()]),
        };
        let said = notes.join("; ");
        match verdict {
            Verdict::Left => tracing::warn!(pid, said, "a worker is left as it is"),
            _ => tracing::info!(pid, ?verdict, said, "recovered a worker"),
        }
        // What is merely adopted is no news to who asks how the agent is.
        if !notes.is_empty() {
            let worker = RecoveredWorker {
                pid,
                verdict,
                notes,
            };
            self.with(|state| state.workers.insert(pid, worker));
        }
    }
}
