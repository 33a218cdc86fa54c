//! Whether an edge can be fused, and what memory that takes: asked of the patcher
//! once for each pair of builds.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::api::GraphEdge;
use crate::discover::{Function, Node};
use crate::grafter::{Allowance, Explained, GraftError, Target, Wanted};
use crate::ops::Context;
use crate::select;

/// Answers and builds that are kept; when there are more, all are forgotten.
const MOST: usize = 16_384;

/// Bytes that the callee adds to a worker, and why it can't be fused if it can't.
pub(super) type Examined = (u64, Option<String>);

/// The answers so far.
#[derive(Debug, Default)]
pub struct Examiner {
    answers: Mutex<HashMap<Key, Examined>>,
    /// Builds of workers, by pid and start time.
    builds: Mutex<HashMap<(i32, u64), String>>,
}

/// What an answer depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    caller: String,
    callee: String,
    name: String,
    allowed: Allowance,
    guard: bool,
}

impl Examiner {
    /// The answer for an edge; `None` where nobody has asked yet and `ask` says
    /// not to, or where that came to nothing this time.
    pub(super) fn examine(
        &self,
        context: &Context<'_>,
        node: &Node,
        edge: &GraphEdge,
        ask: bool,
    ) -> Option<Examined> {
        let find = |name: &str| {
            let mut all = node.functions.iter();
            all.find(|f| f.engine == edge.engine && f.name.as_deref() == Some(name))
        };
        let Some(callee) = find(&edge.callee) else {
            return Some((0, Some("no such function".to_owned())));
        };
        let caller = find(&edge.caller)?;
        let (caller_target, callee_target) = match (newest(caller), newest(callee)) {
            (Ok(caller), Ok(callee)) => (caller, callee),
            (Err(why), _) | (_, Err(why)) => return Some((0, Some(why))),
        };
        let wanted = Wanted {
            allowed: context.policy.allowed(&edge.caller, &edge.callee),
            guard: context.policy.guards(&edge.caller, &edge.callee),
        };
        let key = Key {
            caller: self.build(context, &caller_target)?,
            callee: self.build(context, &callee_target)?,
            name: edge.callee.clone(),
            allowed: wanted.allowed,
            guard: wanted.guard,
        };
        if let Some(known) = self.answers().get(&key) {
            return Some(known.clone());
        }
        if !ask {
            return None;
        }
        let grafter = context.grafter;
        let answer = match grafter.explain(&caller_target, &callee_target, &edge.callee, wanted) {
            Ok(Explained { refused, bytes, .. }) => (bytes, refused.map(|r| r.to_string())),
            Err(GraftError::Refused(refused)) => (0, Some(refused.to_string())),
            // It may be otherwise the next time.
            Err(error) => {
                tracing::debug!(caller = edge.caller, callee = edge.callee, %error, "not examined");
                return None;
            }
        };
        let mut answers = self.answers();
        if answers.len() >= MOST {
            answers.clear();
        }
        answers.insert(key, answer.clone());
        Some(answer)
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Key, Examined>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What tells a worker's build: the same for all that run the same library.
    fn build(&self, context: &Context<'_>, target: &Target) -> Option<String> {
        let of = (target.pid, target.start_time);
        let builds = || self.builds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = builds().get(&of) {
            return Some(known.clone());
        }
        let build = match context.grafter.build_id(target).ok()? {
            Some(build) => format!("{build} {}", target.library.display()),
            // Linked without one: only itself.
            None => format!("{} {}", target.pid, target.start_time),
        };
        let mut builds = builds();
        if builds.len() >= MOST {
            builds.clear();
        }
        builds.insert(of, build.clone());
        Some(build)
    }
}

/// The function's worker that started last: it runs what is meant to run.
fn newest(function: &Function) -> Result<Target, String> {
    let workers = select::native_workers(function).map_err(|error| error.to_string())?;
    let newest = workers
        .into_iter()
        .max_by_key(|(worker, _)| worker.start_time);
    newest
        .map(|(_, target)| target)
        .ok_or_else(|| "no worker runs".to_owned())
}
