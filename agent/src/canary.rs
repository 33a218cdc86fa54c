//! Watching a freshly patched worker, and judging it.
//!
//! ```text
//!             calls pass the site?
//!             no ──► Idle (at the bound)
//!  patched ──► yes ─► callee initialises ─► Ready ─► fused calls counted ──► Proven
//!                            │                │
//!                            ▼                ▼ none runs fused by the bound
//!                     Failed state ───────► Failed ◄── windows or gate not in place
//! ```
//!
//! The callee's initialisers start at the first call that passes a site, so an
//! idle worker proves nothing and is no failure either. The judgement is a
//! pure function of two readings and the time; [`watch`] only reads, waits and
//! asks it again.

use std::time::{Duration, Instant};

use crate::api::{Proof, ProofVerdict};
use crate::grafter::{
    CalleeState, EdgeCounters, GraftError, GraftStatus, Grafter, RpcReasons, Target, WorkerStatus,
};

/// How often a watched worker is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Time, so that tests need not wait for it.
pub trait Clock {
    /// A moment.
    fn now(&self) -> Instant;
    /// Waits.
    fn sleep(&self, duration: Duration);
}

/// The system's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// What is to be done about a watched worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// Look again later.
    Wait,
    /// Fused calls were counted.
    Proven,
    /// Nobody called until the bound.
    Idle,
    /// It does not do what it should; the text completes "did not prove well: ".
    Failed(String),
}

/// Judges one reading of a worker against the counters as they were before the
/// patch. `at_bound` says that this is the last look.
#[must_use]
pub fn judge(before: &EdgeCounters, now: Option<&GraftStatus>, at_bound: bool) -> Judgement {
    let Some(now) = now else {
        return Judgement::Failed("nothing of the patch is there when read back".to_owned());
    };
    if let CalleeState::Failed | CalleeState::Crashed = now.state {
        let why = now
            .failure
            .as_deref()
            .unwrap_or("for a reason that it did not give");
        let what = match now.state {
            CalleeState::Crashed => "crashed",
            _ => "failed to initialise",
        };
        return Judgement::Failed(format!("{} {what}: {why}", now.callee));
    }
    if !now.windows_in_place {
        return Judgement::Failed("the windows are not in place when read back".to_owned());
    }
    if !now.gate_on {
        return Judgement::Failed("the gate went off".to_owned());
    }
    let moved = Movement::between(before, &now.counters);
    if now.state == CalleeState::Ready && moved.fused > 0 {
        return Judgement::Proven;
    }
    if !at_bound {
        return Judgement::Wait;
    }
    if moved.fused == 0
        && moved.rpc == 0
        && moved.elsewhere == 0
        && now.state != CalleeState::Initialising
    {
        return Judgement::Idle;
    }
    Judgement::Failed(match now.state {
        CalleeState::Initialising => {
            format!(
                "{} was still initialising when the wait was over",
                now.callee
            )
        }
        state => format!(
            "{} calls passed the site and none ran fused ({})",
            moved.rpc.saturating_add(moved.elsewhere),
            if state == CalleeState::Armed {
                "the initialisers have not started".to_owned()
            } else {
                reasons(before, &now.counters)
            }
        ),
    })
}

/// Calls of one edge between two readings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Movement {
    fused: u64,
    errors: u64,
    rpc: u64,
    /// Calls at any site of the worker that went to something else than the
    /// RPC. With none of the edge's own they say that its site is none.
    elsewhere: u64,
}

impl Movement {
    fn between(before: &EdgeCounters, now: &EdgeCounters) -> Self {
        Self {
            fused: now.fused_calls.saturating_sub(before.fused_calls),
            errors: now.fused_errors.saturating_sub(before.fused_errors),
            rpc: rpc_calls(now).saturating_sub(rpc_calls(before)),
            elsewhere: now.rpc.other_target.saturating_sub(before.rpc.other_target),
        }
    }
}

/// Calls of this edge that took the RPC. Calls of other callees through the
/// same site are not its own, and what goes elsewhere is nobody's.
#[must_use]
pub fn rpc_calls(counters: &EdgeCounters) -> u64 {
    let rpc = &counters.rpc;
    [
        rpc.gate_off,
        rpc.not_ready,
        rpc.busy,
        rpc.other_thread,
        rpc.stack,
        rpc.memory,
    ]
    .iter()
    .fold(0, |sum, n| sum.saturating_add(*n))
}

/// Why calls took the RPC between two readings, most frequent first.
fn reasons(before: &EdgeCounters, now: &EdgeCounters) -> String {
    let (b, n) = (&before.rpc, &now.rpc);
    let mut counts = [
        ("gate off", n.gate_off.saturating_sub(b.gate_off)),
        (
            "unexpected target",
            n.other_target.saturating_sub(b.other_target),
        ),
        ("not ready", n.not_ready.saturating_sub(b.not_ready)),
        ("busy", n.busy.saturating_sub(b.busy)),
        (
            "other thread",
            n.other_thread.saturating_sub(b.other_thread),
        ),
        ("too little stack", n.stack.saturating_sub(b.stack)),
        ("output over budget", n.memory.saturating_sub(b.memory)),
    ];
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let texts: Vec<String> = counts
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| format!("{reason}: {count}"))
        .collect();
    if texts.is_empty() {
        "no reason was counted".to_owned()
    } else {
        texts.join(", ")
    }
}

/// The edge to `callee` in what was read from a worker.
#[must_use]
pub fn edge<'a>(status: Option<&'a WorkerStatus>, callee: &str) -> Option<&'a GraftStatus> {
    status?.grafts.iter().find(|graft| graft.callee == callee)
}

/// The counters of the edge to `callee` as they are before a patch: zero where
/// there is no such edge yet, but for what is counted for the whole worker.
#[must_use]
pub fn baseline(status: Option<&WorkerStatus>, callee: &str) -> EdgeCounters {
    if let Some(graft) = edge(status, callee) {
        return graft.counters.clone();
    }
    let any = status.and_then(|status| status.grafts.first());
    let common = any.map(|graft| graft.counters.rpc.clone());
    let common = common.unwrap_or_default();
    EdgeCounters {
        rpc: RpcReasons {
            other_name: common.other_name,
            other_target: common.other_target,
            ..RpcReasons::default()
        },
        ..EdgeCounters::default()
    }
}

/// A worker that was patched.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The worker.
    pub target: Target,
    /// Its counters of the edge before the patch; zero where there were none.
    pub before: EdgeCounters,
}

/// How a watch ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Watch {
    /// It proved, or nobody called.
    Good(Proof),
    /// It did not prove well.
    Bad(Proof, String),
    /// It exited.
    Gone,
}

/// Watches workers until each is judged, at most for `bound`, from one moment
/// on for all of them. With a bound of zero a worker need only be in place. The
/// results are in the order of `workers`.
pub fn watch(
    grafter: &dyn Grafter,
    clock: &dyn Clock,
    workers: &[Watched],
    callee: &str,
    bound: Duration,
) -> Vec<Watch> {
    let start = clock.now();
    let mut results: Vec<Option<Watch>> = vec![None; workers.len()];
    loop {
        let elapsed = clock.now().saturating_duration_since(start);
        let at_bound = elapsed >= bound;
        for (worker, result) in workers.iter().zip(&mut results) {
            if result.is_none() {
                *result = look(grafter, worker, callee, elapsed, at_bound, bound.is_zero());
            }
        }
        if results.iter().all(Option::is_some) {
            return results.into_iter().flatten().collect();
        }
        clock.sleep(POLL.min(bound.saturating_sub(elapsed)));
    }
}

fn look(
    grafter: &dyn Grafter,
    worker: &Watched,
    callee: &str,
    elapsed: Duration,
    at_bound: bool,
    unwatched: bool,
) -> Option<Watch> {
    let status = match grafter.status(&worker.target) {
        Ok(status) => status,
        Err(GraftError::WorkerGone { .. }) => return Some(Watch::Gone),
        // Everything in the worker is as it should be for all we know, but
        // unproven is not good enough to go on to the next.
        Err(error) => {
            let why = format!("its state can't be read back: {error}");
            return at_bound.then(|| Watch::Bad(proof(worker, None, elapsed), why));
        }
    };
    let now = edge(status.as_ref(), callee);
    let proof = |verdict| Proof {
        verdict,
        ..proof(worker, now, elapsed)
    };
    let mut judgement = judge(&worker.before, now, at_bound && !unwatched);
    if unwatched && judgement == Judgement::Wait {
        judgement = Judgement::Idle;
    }
    match judgement {
        Judgement::Wait => None,
        Judgement::Proven => Some(Watch::Good(proof(ProofVerdict::Proven))),
        Judgement::Idle => Some(Watch::Good(proof(ProofVerdict::Idle))),
        Judgement::Failed(why) => Some(Watch::Bad(proof(ProofVerdict::Failed), why)),
    }
}

fn proof(worker: &Watched, now: Option<&GraftStatus>, elapsed: Duration) -> Proof {
    let moved = now.map_or_else(Movement::default, |now| {
        Movement::between(&worker.before, &now.counters)
    });
    Proof {
        verdict: ProofVerdict::Failed,
        state: now.map(|now| now.state),
        fused_calls: moved.fused,
        fused_errors: moved.errors,
        rpc_calls: moved.rpc,
        waited_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grafter::{GuardState, RpcReasons};

    fn reading(state: CalleeState, fused: u64, not_ready: u64) -> GraftStatus {
        GraftStatus {
            callee: "Bar".to_owned(),
            build_id: "ab".to_owned(),
            gate_on: true,
            windows_in_place: true,
            state,
            failure: None,
            guard: GuardState::None,
            sites: vec![0x1000],
            routine: false,
            seen: Vec::new(),
            counters: EdgeCounters {
                fused_calls: fused,
                rpc: RpcReasons {
                    not_ready,
                    ..RpcReasons::default()
                },
                ..EdgeCounters::default()
            },
        }
    }

    fn judged(now: &GraftStatus, at_bound: bool) -> Judgement {
        judge(&EdgeCounters::default(), Some(now), at_bound)
    }

    fn failure(judgement: Judgement) -> String {
        match judgement {
            Judgement::Failed(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ready_and_counting_is_proven_at_once() {
        assert_eq!(
            judged(&reading(CalleeState::Ready, 1, 5), false),
            Judgement::Proven
        );
    }

    #[test]
    fn counters_from_before_the_patch_prove_nothing() {
        let now = reading(CalleeState::Ready, 100, 0);
        assert_eq!(judge(&now.counters, Some(&now), false), Judgement::Wait);
        assert_eq!(judge(&now.counters, Some(&now), true), Judgement::Idle);
    }

    #[test]
    fn a_worker_that_nobody_calls_is_idle_at_the_bound() {
        let now = reading(CalleeState::Armed, 0, 0);
        assert_eq!(judged(&now, false), Judgement::Wait);
        assert_eq!(judged(&now, true), Judgement::Idle);
    }

    #[test]
    fn calls_of_other_callees_through_the_site_are_no_traffic() {
        let mut now = reading(CalleeState::Armed, 0, 0);
        now.counters.rpc.other_name = 1_000;
        assert_eq!(judged(&now, true), Judgement::Idle);
    }

    #[test]
    fn what_went_elsewhere_before_the_patch_is_no_traffic_of_a_new_edge() {
        let mut other = reading(CalleeState::Ready, 5, 2);
        other.counters.rpc.other_target = 30;
        other.counters.rpc.other_thread = 40;
        other.callee = "Qux".to_owned();
        let status = WorkerStatus {
            pid: 1,
            bridge_version: 1,
            observing: false,
            mapped_bytes: 0,
            grafts: vec![other],
        };
        let before = baseline(Some(&status), "Bar");
        let mut now = reading(CalleeState::Armed, 0, 0);
        now.counters.rpc.other_target = 30;
        assert_eq!(judge(&before, Some(&now), true), Judgement::Idle);
        // More of it, and none of its own: its site is no RPC.
        now.counters.rpc.other_target = 31;
        assert!(matches!(
            judge(&before, Some(&now), true),
            Judgement::Failed(why) if why.starts_with("1 calls passed the site")
        ));
        assert_eq!(rpc_calls(&now.counters), 0);
    }

    #[test]
    fn traffic_that_never_runs_fused_fails_at_the_bound_only() {
        let mut now = reading(CalleeState::Ready, 0, 3);
        now.counters.rpc.other_thread = 7;
        assert_eq!(judged(&now, false), Judgement::Wait);
        assert_eq!(
            failure(judged(&now, true)),
            "10 calls passed the site and none ran fused (other thread: 7, not ready: 3)"
        );
    }

    #[test]
    fn initialisers_that_overrun_the_wait_fail_even_without_more_traffic() {
        let now = reading(CalleeState::Initialising, 0, 0);
        assert_eq!(judged(&now, false), Judgement::Wait);
        assert_eq!(
            failure(judged(&now, true)),
            "Bar was still initialising when the wait was over"
        );
    }

    #[test]
    fn a_failed_callee_fails_at_once_with_its_reason() {
        let mut now = reading(CalleeState::Failed, 0, 0);
        now.failure = Some("faas_init returned 3".to_owned());
        assert_eq!(
            failure(judged(&now, false)),
            "Bar failed to initialise: faas_init returned 3"
        );
    }

    #[test]
    fn what_is_not_in_place_fails_at_once() {
        assert!(matches!(
            judge(&EdgeCounters::default(), None, false),
            Judgement::Failed(_)
        ));
        let ready = reading(CalleeState::Ready, 1, 0);
        let lost = GraftStatus {
            windows_in_place: false,
            ..ready.clone()
        };
        assert_eq!(
            failure(judged(&lost, false)),
            "the windows are not in place when read back"
        );
        let off = GraftStatus {
            gate_on: false,
            ..ready
        };
        assert_eq!(failure(judged(&off, false)), "the gate went off");
    }

    #[test]
    fn a_counter_that_runs_backwards_is_no_call() {
        let before = EdgeCounters {
            fused_calls: 9,
            ..EdgeCounters::default()
        };
        let now = reading(CalleeState::Ready, 3, 0);
        assert_eq!(judge(&before, Some(&now), true), Judgement::Idle);
    }
}
