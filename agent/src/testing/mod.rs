//! Stand-ins for tests: workers, a patcher that touches nothing, a clock that
//! does not wait, a proc file system on disk.

mod proc;
mod server;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

pub(crate) use proc::{FakeProc, FakeProcess};
pub(crate) use server::FakeServer;

use crate::api::WorkerKind;
use crate::canary::Clock;
use crate::discover::{Function, Worker};
use nightgraft_patcher::effects::{Guarded, Seen};

use crate::grafter::{
    Allowance, CalleeState, Counting, EdgeCounters, Effect, Explained, GraftError, GraftStatus,
    Grafter, GuardState, PatchReceipt, Reading, Refused, RevertReceipt, RpcReasons, SiteProof,
    Target, Wanted, WorkerStatus,
};

pub(crate) fn function(name: &str, id: u32, engine: Option<i32>) -> Function {
    Function {
        name: Some(name.to_owned()),
        id,
        engine,
        min_workers: None,
        max_workers: None,
        workers: Vec::new(),
    }
}

pub(crate) fn native_worker(pid: i32) -> Worker {
    Worker {
        pid,
        pid_inside: Some(8),
        start_time: u64::try_from(pid).unwrap() * 10,
        fprocess_id: 0,
        client_id: Some(1),
        container: Some("c".repeat(64)),
        kind: WorkerKind::Native,
        library: Some(PathBuf::from("/functions/lib.so")),
        threads: 1,
        cpu_ticks: 0,
        tracer: None,
    }
}

pub(crate) fn other_worker(pid: i32, language: &str) -> Worker {
    Worker {
        kind: WorkerKind::NotNative {
            language: language.to_owned(),
        },
        library: None,
        ..native_worker(pid)
    }
}

/// A moment in a fused worker's life, as [`Grafter::status`] reads it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) state: CalleeState,
    pub(crate) fused: u64,
    pub(crate) not_ready: u64,
}

pub(crate) const IDLE: Moment = Moment {
    state: CalleeState::Armed,
    fused: 0,
    not_ready: 0,
};
pub(crate) const STARTING: Moment = Moment {
    state: CalleeState::Initialising,
    fused: 0,
    not_ready: 4,
};
pub(crate) const PROVEN: Moment = Moment {
    state: CalleeState::Ready,
    fused: 12,
    not_ready: 4,
};
pub(crate) const BROKEN: Moment = Moment {
    state: CalleeState::Failed,
    fused: 0,
    not_ready: 4,
};

/// How one worker takes what is done to it.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeWorker {
    pub(crate) build_id: String,
    /// Edges that are in it.
    pub(crate) grafts: Vec<GraftStatus>,
    pub(crate) gone: bool,
    pub(crate) refuse_plan: bool,
    /// What must be allowed, as `--allow-effects` takes it.
    pub(crate) effects: Vec<Effect>,
    pub(crate) patch_error: Option<GraftError>,
    pub(crate) revert_error: Option<GraftError>,
    pub(crate) gate_error: Option<GraftError>,
    /// It exits when it is patched.
    pub(crate) dies_in_patch: bool,
    /// It exits when these moments are over.
    pub(crate) dies_after_moments: bool,
    /// What is read after a patch, in order; the last one stays.
    pub(crate) moments: VecDeque<Moment>,
    /// What its counters say.
    pub(crate) reading: Reading,
}

impl FakeWorker {
    /// As the patcher judges effects.
    fn not_allowed(&self, allowed: Allowance) -> Option<Refused> {
        let mut effects = self.effects.clone();
        for effect in &mut effects {
            effect.allowed = Guarded::named(&effect.kind).is_none_or(|kind| allowed.has(kind));
        }
        nightgraft_patcher::effects::refusal("/functions/lib.so", &effects)
    }
}

/// A callee that opens files.
pub(crate) fn opens_files() -> Effect {
    Effect {
        kind: "files".to_owned(),
        means: "opens files".to_owned(),
        guarded: true,
        allowed: false,
        seen: vec![Seen {
            library: "/functions/lib.so".to_owned(),
            imports: vec!["fopen".to_owned()],
            strings: vec!["/etc/bar.conf".to_owned()],
            more_strings: 0,
        }],
    }
}

pub(crate) fn living(moments: &[Moment]) -> FakeWorker {
    FakeWorker {
        build_id: "ab".repeat(20),
        moments: moments.iter().copied().collect(),
        ..FakeWorker::default()
    }
}

pub(crate) fn graft(callee: &str, moment: Moment) -> GraftStatus {
    GraftStatus {
        callee: callee.to_owned(),
        build_id: "ba".repeat(20),
        gate_on: true,
        windows_in_place: true,
        state: moment.state,
        failure: (moment.state == CalleeState::Failed).then(|| "faas_init returned 1".to_owned()),
        guard: GuardState::None,
        sites: vec![0x7f00_0000_1000],
        routine: false,
        seen: Vec::new(),
        counters: EdgeCounters {
            fused_calls: moment.fused,
            rpc: RpcReasons {
                not_ready: moment.not_ready,
                ..RpcReasons::default()
            },
            ..EdgeCounters::default()
        },
    }
}

pub(crate) fn refusal() -> Refused {
    Refused::NoSite {
        library: "/functions/lib.so".to_owned(),
        callee: "Bar".to_owned(),
    }
}

/// A patcher that keeps a log of what it is asked to change.
#[derive(Default)]
pub(crate) struct FakeGrafter {
    pub(crate) workers: Mutex<BTreeMap<i32, FakeWorker>>,
    pub(crate) log: Mutex<Vec<String>>,
}

impl FakeGrafter {
    pub(crate) fn new(workers: impl IntoIterator<Item = (i32, FakeWorker)>) -> Self {
        Self {
            workers: Mutex::new(workers.into_iter().collect()),
            log: Mutex::default(),
        }
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn with<T>(
        &self,
        pid: i32,
        act: impl FnOnce(&mut FakeWorker) -> Result<T, GraftError>,
    ) -> Result<T, GraftError> {
        let mut workers = self.workers.lock().unwrap();
        match workers.get_mut(&pid) {
            Some(worker) if !worker.gone => act(worker),
            _ => Err(GraftError::WorkerGone { pid }),
        }
    }

    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }
}

fn sites(live: &str) -> Vec<SiteProof> {
    vec![SiteProof {
        address: 0x7f00_0000_1000,
        before: "4989e0ff5508".to_owned(),
        live: live.to_owned(),
    }]
}

fn receipt(pid: i32) -> PatchReceipt {
    PatchReceipt {
        pid,
        already: false,
        image_reused: false,
        through_routine: None,
        effects: Vec::new(),
        sites: sites("90e8fb0f0000"),
        commit_stop_ns: 88_000,
        stops_ns: vec![20_000, 88_000],
        disturbed: Vec::new(),
        journal: None,
    }
}

fn reverted(pid: i32, nothing: bool) -> RevertReceipt {
    RevertReceipt {
        pid,
        nothing,
        restored: !nothing,
        reason: None,
        sites: match nothing {
            true => Vec::new(),
            false => sites("4989e0ff5508"),
        },
        stops_ns: match nothing {
            true => Vec::new(),
            false => vec![40_000],
        },
        disturbed: Vec::new(),
        signals: None,
        journal: None,
    }
}

/// Counters that stay as they are.
#[derive(Debug)]
struct FakeCounters(Reading);

impl Counting for FakeCounters {
    fn read(&mut self) -> Result<Option<Reading>, GraftError> {
        Ok(Some(self.0.clone()))
    }
}

/// What log and plan add of calls that are guarded.
fn guarded(wanted: Wanted) -> &'static str {
    if wanted.guard { ", guarded" } else { "" }
}

impl Grafter for FakeGrafter {
    fn explain(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
        wanted: Wanted,
    ) -> Result<Explained, GraftError> {
        self.with(callee.pid, |_| Ok(()))?;
        self.with(caller.pid, |worker| match worker.refuse_plan {
            true => Err(refusal().into()),
            false => Ok(Explained {
                text: format!(
                    "map {callee_name} of {} into {}{}",
                    callee.pid,
                    caller.pid,
                    guarded(wanted)
                ),
                plan: serde_json::json!({ "windows": 1 }),
                refused: worker.not_allowed(wanted.allowed),
                bytes: 300 << 10,
            }),
        })
    }

    fn patch(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
        wanted: Wanted,
    ) -> Result<PatchReceipt, GraftError> {
        self.with(callee.pid, |_| Ok(()))?;
        self.note(format!(
            "patch {} from {}{}",
            caller.pid,
            callee.pid,
            guarded(wanted)
        ));
        self.with(caller.pid, |worker| {
            if worker.dies_in_patch {
                worker.gone = true;
                return Err(GraftError::WorkerGone { pid: caller.pid });
            }
            if worker.refuse_plan {
                return Err(refusal().into());
            }
            if let Some(refused) = worker.not_allowed(wanted.allowed) {
                return Err(refused.into());
            }
            if let Some(error) = &worker.patch_error {
                return Err(error.clone());
            }
            let already = worker
                .grafts
                .iter()
                .any(|g| g.callee == callee_name && g.gate_on);
            if !already {
                worker.grafts.push(graft(callee_name, IDLE));
            }
            Ok(PatchReceipt {
                already,
                effects: worker.effects.clone(),
                ..receipt(caller.pid)
            })
        })
    }

    fn revert(&self, caller: &Target, callee_name: &str) -> Result<RevertReceipt, GraftError> {
        self.note(format!("revert {}", caller.pid));
        self.with(caller.pid, |worker| {
            if let Some(error) = &worker.revert_error {
                return Err(error.clone());
            }
            let before = worker.grafts.len();
            worker.grafts.retain(|graft| graft.callee != callee_name);
            let nothing = worker.grafts.len() == before;
            Ok(reverted(caller.pid, nothing))
        })
    }

    fn observe(&self, worker: &Target) -> Result<PatchReceipt, GraftError> {
        self.note(format!("observe {}", worker.pid));
        self.with(worker.pid, |fake| {
            if fake.dies_in_patch {
                fake.gone = true;
                return Err(GraftError::WorkerGone { pid: worker.pid });
            }
            if let Some(error) = &fake.patch_error {
                return Err(error.clone());
            }
            let already = fake.reading.observing;
            fake.reading.observing = true;
            Ok(PatchReceipt {
                already,
                sites: Vec::new(),
                ..receipt(worker.pid)
            })
        })
    }

    fn leave(&self, worker: &Target) -> Result<RevertReceipt, GraftError> {
        self.note(format!("leave {}", worker.pid));
        self.with(worker.pid, |fake| {
            if let Some(error) = &fake.revert_error {
                return Err(error.clone());
            }
            let nothing = !fake.reading.observing;
            fake.reading.observing = false;
            Ok(reverted(worker.pid, nothing))
        })
    }

    fn counters(&self, worker: &Target) -> Result<Option<Box<dyn Counting>>, GraftError> {
        self.with(worker.pid, |fake| {
            let fake = fake.reading.clone();
            let ours = fake.observing || fake != Reading::default();
            Ok(ours.then(|| Box::new(FakeCounters(fake)) as Box<dyn Counting>))
        })
    }

    fn status(&self, worker: &Target) -> Result<Option<WorkerStatus>, GraftError> {
        self.with(worker.pid, |fake| {
            if let Some(graft) = fake.grafts.last_mut().filter(|g| g.callee == "Bar") {
                let moment = match fake.moments.len() {
                    0 => None,
                    1 if fake.dies_after_moments => {
                        fake.gone = true;
                        return Err(GraftError::WorkerGone { pid: worker.pid });
                    }
                    1 => fake.moments.front().copied(),
                    _ => fake.moments.pop_front(),
                };
                if let Some(moment) = moment {
                    *graft = GraftStatus {
                        gate_on: graft.gate_on,
                        ..self::graft("Bar", moment)
                    };
                }
            }
            let grafts = fake.grafts.clone();
            let observing = fake.reading.observing;
            Ok((!grafts.is_empty() || observing).then_some(WorkerStatus {
                pid: worker.pid,
                bridge_version: 1,
                mapped_bytes: 65_536,
                grafts,
                observing,
            }))
        })
    }

    fn hold(&self, _worker: &Target) -> Result<Option<crate::grafter::Held>, GraftError> {
        Ok(None)
    }

    fn build_id(&self, worker: &Target) -> Result<Option<String>, GraftError> {
        self.with(worker.pid, |fake| Ok(Some(fake.build_id.clone())))
    }

    fn forget_crash(&self, caller: &Target, callee_name: &str) -> Result<(), GraftError> {
        self.note(format!("forget {callee_name} in {}", caller.pid));
        Ok(())
    }

    fn set_gate(&self, caller: &Target, callee_name: &str, on: bool) -> Result<(), GraftError> {
        self.note(format!("gate {} {on}", caller.pid));
        self.with(caller.pid, |worker| {
            if let Some(error) = &worker.gate_error {
                return Err(error.clone());
            }
            worker
                .grafts
                .iter_mut()
                .find(|graft| graft.callee == callee_name)
                .map(|graft| graft.gate_on = on)
                .ok_or_else(|| GraftError::Failed("no such edge".to_owned()))
        })
    }
}

/// A clock whose sleeps take no time.
pub(crate) struct FakeClock {
    start: Instant,
    slept: Mutex<Duration>,
}

impl FakeClock {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            slept: Mutex::default(),
        }
    }
    pub(crate) fn slept(&self) -> Duration {
        *self.slept.lock().unwrap()
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Instant {
        self.start + self.slept()
    }
    fn sleep(&self, duration: Duration) {
        *self.slept.lock().unwrap() += duration;
    }
}
