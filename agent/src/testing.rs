//! Stand-ins for tests: workers, a patcher that touches nothing, a clock that
//! does not wait, a proc file system on disk.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::api::WorkerKind;
use crate::canary::Clock;
use crate::discover::{Function, ProcRoot, Worker};
use crate::grafter::{
    CalleeState, EdgeCounters, Explained, GraftError, GraftStatus, Grafter, PatchReceipt, Refused,
    RevertReceipt, RpcReasons, SiteProof, Target, WorkerStatus,
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
    pub(crate) patch_error: Option<GraftError>,
    pub(crate) revert_error: Option<GraftError>,
    pub(crate) gate_error: Option<GraftError>,
    /// It exits when it is patched.
    pub(crate) dies_in_patch: bool,
    /// It exits when these moments are over.
    pub(crate) dies_after_moments: bool,
    /// What is read after a patch, in order; the last one stays.
    pub(crate) moments: VecDeque<Moment>,
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
        sites: vec![0x7f00_0000_1000],
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

impl Grafter for FakeGrafter {
    fn explain(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
    ) -> Result<Explained, GraftError> {
        self.with(callee.pid, |_| Ok(()))?;
        self.with(caller.pid, |worker| match worker.refuse_plan {
            true => Err(refusal().into()),
            false => Ok(Explained {
                text: format!("map {callee_name} of {} into {}", callee.pid, caller.pid),
                plan: serde_json::json!({ "windows": 1 }),
            }),
        })
    }

    fn patch(
        &self,
        caller: &Target,
        callee: &Target,
        callee_name: &str,
    ) -> Result<PatchReceipt, GraftError> {
        self.with(callee.pid, |_| Ok(()))?;
        self.note(format!("patch {} from {}", caller.pid, callee.pid));
        self.with(caller.pid, |worker| {
            if worker.dies_in_patch {
                worker.gone = true;
                return Err(GraftError::WorkerGone { pid: caller.pid });
            }
            if worker.refuse_plan {
                return Err(refusal().into());
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
                pid: caller.pid,
                already,
                image_reused: false,
                sites: sites("90e8fb0f0000"),
                commit_stop_ns: 88_000,
                stops_ns: vec![20_000, 88_000],
                disturbed: Vec::new(),
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
            Ok(RevertReceipt {
                pid: caller.pid,
                nothing,
                restored: !nothing,
                reason: None,
                sites: if nothing {
                    Vec::new()
                } else {
                    sites("4989e0ff5508")
                },
                stops_ns: if nothing { Vec::new() } else { vec![40_000] },
                disturbed: Vec::new(),
            })
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
            Ok((!grafts.is_empty()).then_some(WorkerStatus {
                pid: worker.pid,
                bridge_version: 1,
                mapped_bytes: 65_536,
                grafts,
            }))
        })
    }

    fn build_id(&self, worker: &Target) -> Result<Option<String>, GraftError> {
        self.with(worker.pid, |fake| Ok(Some(fake.build_id.clone())))
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

/// A directory that looks like `/proc`.
pub(crate) struct FakeProc {
    dir: tempfile::TempDir,
}

/// One process in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FakeProcess<'a> {
    pub(crate) pid: i32,
    pub(crate) ppid: i32,
    pub(crate) argv: &'a [&'a str],
    pub(crate) env: &'a [&'a str],
    pub(crate) cgroup: &'a str,
    pub(crate) tracer: i32,
    pub(crate) start_time: u64,
}

impl Default for FakeProcess<'_> {
    fn default() -> Self {
        Self {
            pid: 1,
            ppid: 0,
            argv: &[],
            env: &[],
            cgroup: "0::/\n",
            tracer: 0,
            start_time: 1_000,
        }
    }
}

impl FakeProc {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn root(&self) -> ProcRoot {
        ProcRoot::at(self.dir.path())
    }

    pub(crate) fn path(&self, pid: i32) -> PathBuf {
        self.dir.path().join(pid.to_string())
    }

    /// Lays out one process. Its root is the directory `root` in it.
    pub(crate) fn add(&self, process: &FakeProcess<'_>) -> PathBuf {
        let FakeProcess {
            pid,
            ppid,
            argv,
            env,
            cgroup,
            tracer,
            start_time,
        } = *process;
        let path = self.path(pid);
        fs::create_dir_all(path.join("root")).unwrap();
        fs::create_dir_all(path.join("fd")).unwrap();
        let nul = |parts: &[&str]| {
            parts
                .iter()
                .flat_map(|part| [part, "\0"])
                .collect::<String>()
        };
        fs::write(path.join("cmdline"), nul(argv)).unwrap();
        fs::write(path.join("environ"), nul(env)).unwrap();
        fs::write(path.join("cgroup"), cgroup).unwrap();
        let stat = format!(
            "{pid} (worker) S {ppid} {pid} {pid} 0 -1 0 0 0 0 0 0 0 0 0 20 0 2 0 {start_time} 0\n"
        );
        fs::write(path.join("stat"), stat).unwrap();
        let status = format!("Name:\tworker\nTracerPid:\t{tracer}\nNSpid:\t{pid}\t8\n");
        fs::write(path.join("status"), status).unwrap();
        path
    }

    /// Writes a file beneath a process's root.
    pub(crate) fn write(&self, pid: i32, path: &str, text: &str) {
        let path = self
            .path(pid)
            .join("root")
            .join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn link(&self, pid: i32, name: &str, target: &str) {
        let path = self.path(pid).join(name);
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink(Path::new(target), path).unwrap();
    }

    /// A node with one engine (100), Foo with workers 11 and 12, Bar with
    /// worker 21, Baz with none and Go's worker 31 of Gopher.
    pub(crate) fn example() -> Self {
        let fake = Self::new();
        fake.add(&FakeProcess {
            pid: 100,
            argv: &[
                "/nightcore/engine",
                "--func_config_file=/etc/func_config.json",
            ],
            ..FakeProcess::default()
        });
        fake.write(
            100,
            "/etc/func_config.json",
            r#"[{"funcName":"Foo","funcId":1,"minWorkers":2,"maxWorkers":4},
                {"funcName":"Bar","funcId":2},{"funcName":"Baz","funcId":3},
                {"funcName":"Gopher","funcId":4}]"#,
        );
        let group = format!("0::/docker/{}\n", "c".repeat(64));
        for (pid, func, fprocess, library) in [
            (11, 1, 0, "/functions/libfoo.so"),
            (12, 1, 1, "/functions/libfoo.so"),
            (21, 2, 0, "/functions/libbar.so"),
        ] {
            let id = format!("FAAS_FUNC_ID={func}");
            let number = format!("FAAS_FPROCESS_ID={fprocess}");
            let client = format!("FAAS_CLIENT_ID={pid}");
            fake.add(&FakeProcess {
                pid,
                argv: &["/nightcore/func_worker_v1", library],
                env: &["PATH=/bin", &id, &number, &client],
                cgroup: &group,
                ..FakeProcess::default()
            });
        }
        fake.add(&FakeProcess {
            pid: 30,
            argv: &["/nightcore/launcher", "--func_id=4", "--fprocess_mode=go"],
            ..FakeProcess::default()
        });
        fake.add(&FakeProcess {
            pid: 31,
            ppid: 30,
            argv: &["/functions/gopher"],
            env: &["FAAS_FUNC_ID=4", "FAAS_FPROCESS_ID=0", "FAAS_CLIENT_ID=9"],
            ..FakeProcess::default()
        });
        fake
    }
}

/// An agent on a real socket, with a patcher that touches nothing.
pub(crate) struct FakeServer {
    pub(crate) socket: PathBuf,
    pub(crate) grafter: std::sync::Arc<FakeGrafter>,
    _proc: FakeProc,
    _dir: tempfile::TempDir,
    _socket: crate::socket::AgentSocket,
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl FakeServer {
    pub(crate) fn start(proc: FakeProc, grafter: FakeGrafter) -> Self {
        Self::start_for(proc, grafter, vec![nix::unistd::geteuid().as_raw()])
    }

    pub(crate) fn start_for(proc: FakeProc, grafter: FakeGrafter, allowed: Vec<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let (socket, listener) = crate::socket::bind(&path).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        let grafter = std::sync::Arc::new(grafter);
        let (driver, _thread) = crate::driver::start(grafter.clone(), proc.root()).unwrap();
        let mut agent = crate::server::Agent::new(grafter.clone(), driver, proc.root(), None);
        agent.allowed_uids = allowed;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        tokio::spawn(crate::server::serve(listener, agent, async move {
            let _ = stopped.await;
        }));
        Self {
            socket: path,
            grafter,
            _proc: proc,
            _dir: dir,
            _socket: socket,
            _stop: stop,
        }
    }
}
