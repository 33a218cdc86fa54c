//! Watching fused workers to their end.
//!
//! ```text
//!  patched ──► held: pidfd, counters ──(it ends)──► what ran? ──┬─ nothing: forgotten
//!                                                               ├─ ended from outside: logged
//!                                                               └─ a callee: quarantined,
//!              (it lives, and a guarded call crashed) ───────────────┘  gates off in all workers
//! ```
//!
//! A crash that a guard kept from the worker shows in its counters alone: workers
//! with a guarded edge are looked at some times a second.
//!
//! One thread waits for all pidfds. It turns gates off itself, which stops
//! nobody and takes microseconds: the driver may be watching a canary for a
//! minute. A patch under way looks at the quarantine again when it is through.
//!
//! The innermost callee that ran is the one, as what it was called from waited;
//! and all whose initialisers ran, which they do on threads of their own.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nightgraft_patcher::held::{Ended, Held};
use nightgraft_patcher::manifest::InFlight;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::api::Quarantined;
use crate::discover::{Node, ProcRoot, Worker, scan_within};
use crate::grafter::{GraftError, Grafter, GuardState, Target};
use crate::quarantine::Quarantine;

/// How long the search for workers may take; it takes milliseconds.
const SCAN_LIMIT: Duration = Duration::from_secs(20);

/// How often workers with guarded edges are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Crashes of one worker that are believed: as many as it can hold callees.
const MOST_CRASHES: usize = 64;

/// The watch, as requests see it.
#[derive(Debug, Default)]
pub struct Watch {
    /// What was found.
    pub quarantine: Quarantine,
    queue: Option<(Mutex<Sender<Watched>>, EventFd)>,
    known: Mutex<HashSet<(i32, u64)>>,
}

/// One worker.
#[derive(Debug)]
struct Watched {
    held: Held,
    target: Target,
    caller: String,
    engine: Option<i32>,
    /// Some of its edges are guarded.
    guarded: bool,
    /// Crashes that it said it outlived.
    crashes: usize,
}

impl Watched {
    /// Looks again whether some edge is guarded: that changes with patches.
    fn refresh(&mut self, grafter: &dyn Grafter) {
        if let Ok(status) = grafter.status(&self.target) {
            let mut grafts = status.iter().flat_map(|status| &status.grafts);
            self.guarded = grafts.any(|graft| graft.guard != GuardState::None);
        }
    }
}

impl Watch {
    /// Takes over what another agent has left, and starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread or descriptor.
    pub fn start(
        quarantine: Quarantine,
        grafter: Arc<dyn Grafter>,
        proc_root: ProcRoot,
    ) -> std::io::Result<Arc<Self>> {
        let (queue, arrivals) = channel();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let watch = Arc::new(Self {
            quarantine,
            queue: Some((Mutex::new(queue), EventFd::from_value_and_flags(0, flags)?)),
            known: Mutex::default(),
        });
        match scan_within(&proc_root, SCAN_LIMIT) {
            Ok(node) => watch.adopt(&*grafter, &node),
            Err(error) => tracing::warn!(%error, "what is fused already is not watched"),
        }
        let own = Arc::clone(&watch);
        std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || run(&own, &arrivals, &*grafter, &proc_root))?;
        Ok(watch)
    }

    /// Watches a worker from here on, if anything is fused in it.
    pub fn track(&self, grafter: &dyn Grafter, target: &Target, caller: &str, engine: Option<i32>) {
        let Some((queue, wake)) = &self.queue else {
            return;
        };
        let key = (target.pid, target.start_time);
        if !self.known().insert(key) {
            let _ = wake.write(1);
            return;
        }
        match grafter.hold(target) {
            Ok(Some(held)) => {
                if !held.sees_calls() {
                    tracing::warn!(
                        pid = target.pid,
                        "its counters can't be held (that takes CAP_CHECKPOINT_RESTORE where \
                         another agent patched it): if it dies it can't be told of what"
                    );
                }
                let watched = Watched {
                    held,
                    target: target.clone(),
                    caller: caller.to_owned(),
                    engine,
                    guarded: false,
                    crashes: 0,
                };
                let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                if queue.send(watched).is_ok() {
                    let _ = wake.write(1);
                    return;
                }
            }
            Ok(None) | Err(GraftError::WorkerGone { .. }) => {}
            Err(error) => tracing::warn!(pid = target.pid, %error, "can't be watched"),
        }
        self.known().remove(&key);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashSet<(i32, u64)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What another agent has left: workers to be watched, and gates that it may
    /// not have come to.
    fn adopt(&self, grafter: &dyn Grafter, node: &Node) {
        for function in &node.functions {
            for target in function.workers.iter().filter_map(Worker::target) {
                self.track(grafter, &target, &function.label(), function.engine);
            }
        }
        for edge in self.quarantine.all() {
            close(grafter, node, &edge);
        }
    }
}

fn run(watch: &Watch, arrivals: &Receiver<Watched>, grafter: &dyn Grafter, proc_root: &ProcRoot) {
    let Some((_, wake)) = &watch.queue else {
        return;
    };
    let mut all: Vec<Watched> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        let pidfds: Vec<_> = all.iter().map(|watched| watched.held.pidfd()).collect();
        let of = |fd| PollFd::new(fd, PollFlags::POLLIN);
        fds.extend(pidfds.iter().map(|fd| of(fd.as_fd())));
        let timeout = match all.iter().any(|one| one.guarded) {
            true => PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX),
            false => PollTimeout::NONE,
        };
        if let Err(error) = poll(&mut fds, timeout)
            && error != nix::errno::Errno::EINTR
        {
            tracing::error!(%error, "workers are watched no more");
            return;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        drop(pidfds);
        let mut ended = ready[1..].iter();
        let (dead, alive) = all
            .into_iter()
            .partition(|_| ended.next().copied().unwrap_or(false));
        all = alive;
        if ready[0] {
            let _ = wake.read();
            all.extend(arrivals.try_iter());
            all.iter_mut().for_each(|one| one.refresh(grafter));
        }
        for one in all.iter_mut().filter(|one| one.guarded) {
            outlived(watch, one, grafter, proc_root);
        }
        let dead: Vec<Watched> = dead;
        for one in dead {
            watch
                .known()
                .remove(&(one.held.pid(), one.held.start_time()));
            bury(watch, &one, grafter, proc_root);
        }
    }
}

/// What is to be done about a worker that has ended.
fn bury(watch: &Watch, one: &Watched, grafter: &dyn Grafter, proc_root: &ProcRoot) {
    let (pid, caller) = (one.held.pid(), &one.caller);
    let Ended {
        end,
        in_flight,
        from_outside,
    } = one.held.ended();
    let Some(in_flight) = in_flight else {
        tracing::warn!(pid, caller, %end, "a fused worker has ended; what ran in it is not known");
        return;
    };
    let all: Vec<String> = in_flight.iter().map(|one| one.callee.clone()).collect();
    let suspects = suspects(in_flight);
    if suspects.is_empty() {
        tracing::info!(pid, caller, %end, "a fused worker has ended, and no callee ran in it");
    }
    for (callee, what) in suspects {
        if from_outside {
            tracing::warn!(
                pid, caller, callee, %end,
                "a fused worker was ended from outside while {what}: not quarantined"
            );
            continue;
        }
        let how = format!("{end} while {what}");
        quarantine(watch, one, callee, how, all.clone(), grafter, proc_root);
    }
}

/// What is to be done about a worker in which a guarded call crashed.
fn outlived(watch: &Watch, one: &mut Watched, grafter: &dyn Grafter, proc_root: &ProcRoot) {
    // What it says it says itself: it may not fill the list.
    if one.crashes == MOST_CRASHES {
        return;
    }
    let crashed = match one.held.crashed() {
        Ok(crashed) => crashed,
        // It has ended, which is seen elsewhere.
        Err(_) => return,
    };
    for callee in crashed {
        let known = watch.quarantine.find(one.engine, &one.caller, &callee);
        if known.is_some() {
            continue;
        }
        let status = grafter.status(&one.target).ok().flatten();
        let graft = status.and_then(|s| s.grafts.into_iter().find(|g| g.callee == callee));
        let why = graft.and_then(|graft| graft.failure);
        let how = format!(
            "outlived a crash: {}",
            why.unwrap_or_else(|| "a guarded call of it raised a signal".to_owned())
        );
        // Somebody may be lifting the quarantine of this very crash.
        if !matches!(one.held.crashed(), Ok(still) if still.contains(&callee)) {
            continue;
        }
        one.crashes += 1;
        let all = vec![callee.clone()];
        quarantine(watch, one, callee, how, all, grafter, proc_root);
    }
}

/// Quarantines an edge and turns its gates off.
fn quarantine(
    watch: &Watch,
    one: &Watched,
    callee: String,
    how: String,
    in_flight: Vec<String>,
    grafter: &dyn Grafter,
    proc_root: &ProcRoot,
) {
    let edge = Quarantined {
        caller: one.caller.clone(),
        callee,
        engine: one.engine,
        pid: one.held.pid(),
        how,
        in_flight,
        since: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
    };
    tracing::error!(
        pid = edge.pid,
        caller = edge.caller,
        callee = edge.callee,
        how = edge.how,
        "quarantined: it is not fused again until `agentctl unquarantine`"
    );
    watch.quarantine.add(edge.clone());
    match scan_within(proc_root, SCAN_LIMIT) {
        Ok(node) => close(grafter, &node, &edge),
        Err(error) => tracing::error!(%error, "its gates in other workers are still on"),
    }
}

/// Whose code a death may be due to: the innermost call's, as those around it
/// waited; and all that were being initialised, on threads of their own.
fn suspects(in_flight: Vec<InFlight>) -> Vec<(String, &'static str)> {
    let (starting, mut calls): (Vec<_>, Vec<_>) =
        in_flight.into_iter().partition(|one| one.initialising);
    let call = calls.pop().map(|one| (one.callee, "a call of it ran"));
    let starting = starting
        .into_iter()
        .map(|one| (one.callee, "its initialisers ran"));
    call.into_iter().chain(starting).collect()
}

/// Turns an edge's gates off in all workers of its caller.
fn close(grafter: &dyn Grafter, node: &Node, edge: &Quarantined) {
    for function in &node.functions {
        if function.label() != edge.caller || function.engine != edge.engine {
            continue;
        }
        for target in function.workers.iter().filter_map(Worker::target) {
            match grafter.status(&target) {
                Ok(Some(status)) if status.grafts.iter().any(|g| g.callee == edge.callee) => {}
                _ => continue,
            }
            match grafter.set_gate(&target, &edge.callee, false) {
                Ok(()) => tracing::warn!(pid = target.pid, callee = edge.callee, "gate off"),
                Err(GraftError::WorkerGone { .. }) => {}
                Err(error) => {
                    tracing::error!(pid = target.pid, callee = edge.callee, %error, "its gate is still on");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_call_and_whoever_starts_are_suspected() {
        let one = |callee: &str, initialising| InFlight {
            callee: callee.to_owned(),
            initialising,
        };
        let all = vec![one("Bar", false), one("Qux", true), one("Bar/Baz", false)];
        assert_eq!(
            suspects(all),
            [
                ("Bar/Baz".to_owned(), "a call of it ran"),
                ("Qux".to_owned(), "its initialisers ran")
            ]
        );
        assert_eq!(suspects(Vec::new()), []);
    }
}
