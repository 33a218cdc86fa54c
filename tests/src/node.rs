//! A node, as tests and the demo use it.
//!
//! ```no_run
//! # use nightgraft_testbed::{FunctionSpec, Node, NodeSpec, fixtures};
//! # fn main() -> anyhow::Result<()> {
//! let foo = fixtures::compile("foo.c", fixtures::Compiler::Gcc, &["-O2"])?;
//! let bar = fixtures::compile("bar.c", fixtures::Compiler::Gcc, &["-O2"])?;
//! let node = Node::start(NodeSpec::new([
//!     FunctionSpec::new("Foo", 1, foo),
//!     FunctionSpec::new("Bar", 2, bar),
//! ]))?;
//! assert_eq!(node.call("Foo", b"hello")?, b"Foo:olleh|4f9f2cab|6c");
//! # Ok(())
//! # }
//! ```
//!
//! Everything that a node starts belongs to a keeper process (see
//! [`crate::keeper`]) and ends with it; the keeper ends when the [`Node`] is
//! dropped or its process dies, in whatever way.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::client::{CallError, HttpClient};
use crate::container::{Oddities, RuntimeKind, cgroup};
use crate::keeper::{Ask, ContainerState, KeeperFunction, KeeperSpec, NodeState, Say};
use crate::procs::{self, WorkerInfo};

/// How long a node may take to start, unless its spec says otherwise.
const START_WITHIN: Duration = Duration::from_secs(30);
/// How long it may take to end.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// How a worker waits for the answer of a function that it invoked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NestedMode {
    /// In `read` on its input FIFO, for as long as it takes.
    #[default]
    Read,
    /// On a FIFO of its own, for 100 ms (`--use_fifo_for_nested_call`).
    Fifo,
}

impl NestedMode {
    /// Every way, for tests that hold in each.
    pub const BOTH: [Self; 2] = [Self::Read, Self::Fifo];
}

/// One function of a node.
#[derive(Clone, Debug)]
pub struct FunctionSpec {
    /// Its name: letters and digits.
    pub name: String,
    /// Its number: 1 to 255.
    pub id: u16,
    /// Its library.
    pub library: PathBuf,
    /// Workers that are started at once.
    pub min_workers: u16,
    /// Workers that there may be; at least 1.
    pub max_workers: u16,
    /// Further files for its container: from, to.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Its container's environment, beside what the launcher adds.
    pub env: Vec<(String, String)>,
    /// Limit of its container's memory, in bytes.
    pub memory_limit: Option<u64>,
    /// In what its container differs from the usual.
    pub oddities: Oddities,
}

impl FunctionSpec {
    /// A function with one worker.
    pub fn new(name: &str, id: u16, library: impl Into<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            id,
            library: library.into(),
            min_workers: 1,
            max_workers: 1,
            files: Vec::new(),
            env: Vec::new(),
            memory_limit: None,
            oddities: Oddities::default(),
        }
    }

    /// The same with another number of workers.
    #[must_use]
    pub fn workers(mut self, min: u16, max: u16) -> Self {
        self.min_workers = min;
        self.max_workers = max;
        self
    }

    /// The same with a variable in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same in another container than the usual (with the embedded runtime).
    #[must_use]
    pub fn oddities(mut self, oddities: Oddities) -> Self {
        self.oddities = oddities;
        self
    }

    /// The same with a limit of memory.
    #[must_use]
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = Some(bytes);
        self
    }
}

/// What a node is to be.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Which runtime makes the containers.
    pub runtime: RuntimeKind,
    /// The functions.
    pub functions: Vec<FunctionSpec>,
    /// How nested calls wait.
    pub nested_mode: NestedMode,
    /// Whether workers unmap *every* answer when its lifetime is over. Without
    /// it those above 960 bytes are unmapped, and others overwritten.
    pub strict_lifetime: bool,
    /// Processors that the whole node is confined to; empty for all. On one
    /// processor an RPC costs no wake-up of another, and times are steady.
    pub cpus: Vec<usize>,
    /// Another worker program than the one that was built with us.
    pub worker: Option<PathBuf>,
    /// Whether containers have an overlay file system for a root, as Docker's
    /// have. Of the embedded runtime only.
    pub overlay_roots: bool,
    /// How long it may take until all workers are ready.
    pub start_within: Duration,
}

impl NodeSpec {
    /// A node with the embedded runtime and default nested calls.
    pub fn new(functions: impl IntoIterator<Item = FunctionSpec>) -> Self {
        Self {
            runtime: RuntimeKind::default(),
            functions: functions.into_iter().collect(),
            nested_mode: NestedMode::default(),
            strict_lifetime: false,
            cpus: Vec::new(),
            worker: None,
            overlay_roots: false,
            start_within: START_WITHIN,
        }
    }

    /// The same with another runtime.
    #[must_use]
    pub fn runtime(mut self, runtime: RuntimeKind) -> Self {
        self.runtime = runtime;
        self
    }

    /// The same with another way to wait for nested calls.
    #[must_use]
    pub fn nested_mode(mut self, mode: NestedMode) -> Self {
        self.nested_mode = mode;
        self
    }

    /// The same with every answer unmapped at the end of its lifetime.
    #[must_use]
    pub fn strict_lifetime(mut self) -> Self {
        self.strict_lifetime = true;
        self
    }
}

struct Keeper {
    process: Child,
    requests: Option<ChildStdin>,
    replies: Receiver<String>,
}

/// A running node. Dropping it ends everything that it started.
pub struct Node {
    keeper: Mutex<Keeper>,
    state: Mutex<NodeState>,
    spec: NodeSpec,
    dir: PathBuf,
    ipc: PathBuf,
}

impl Node {
    /// Starts a node and waits until every worker is idle, ready to serve.
    pub fn start(spec: NodeSpec) -> Result<Self> {
        ensure!(!spec.functions.is_empty(), "a node without functions");
        for f in &spec.functions {
            ensure!(f.max_workers > 0, "{} may have no worker", f.name);
            ensure!(
                f.library.is_file(),
                "{}: no library {}",
                f.name,
                f.library.display()
            );
        }
        let dir = tempfile::Builder::new()
            .prefix("nightnode-")
            .tempdir()?
            .keep();
        let ipc = tempfile::Builder::new()
            .prefix("nightnode-")
            .tempdir_in("/dev/shm")?
            .keep();
        let keeper = Keeper::start()?;
        let node = Self {
            keeper: Mutex::new(keeper),
            state: Mutex::default(),
            dir: dir.clone(),
            ipc: ipc.clone(),
            spec,
        };
        let functions = node
            .spec
            .functions
            .iter()
            .map(|f| KeeperFunction {
                name: f.name.clone(),
                id: f.id,
                library: f.library.clone(),
                files: f.files.clone(),
                env: f.env.clone(),
                min_workers: f.min_workers,
                max_workers: f.max_workers.max(f.min_workers),
                memory_limit: f.memory_limit,
                oddities: f.oddities,
            })
            .collect();
        let bins = crate::bin("node_keeper")?;
        let deadline = Instant::now() + node.spec.start_within;
        let ask = Ask::Start(Box::new(KeeperSpec {
            runtime: node.spec.runtime,
            dir,
            ipc,
            bins: bins.parent().unwrap_or(Path::new("/")).to_owned(),
            functions,
            fifo_for_nested_call: node.spec.nested_mode == NestedMode::Fifo,
            strict_lifetime: node.spec.strict_lifetime,
            cpus: node.spec.cpus.clone(),
            worker: node.spec.worker.clone(),
            overlay_roots: node.spec.overlay_roots,
        }));
        node.ask(&ask, deadline)
            .context("the node does not start")?;
        node.wait_until_idle(deadline)?;
        Ok(node)
    }

    fn ask(&self, ask: &Ask, deadline: Instant) -> Result<()> {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let state = keeper.ask(ask, deadline)?;
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        Ok(())
    }

    fn state(&self) -> NodeState {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until all functions have the workers that they start with, and
    /// each of those waits for a request.
    fn wait_until_idle(&self, deadline: Instant) -> Result<()> {
        for f in &self.spec.functions {
            loop {
                let workers = self.workers(&f.name)?;
                let idle = workers.iter().filter(|w| w.waits_for_request()).count();
                if idle >= usize::from(f.min_workers) {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{} has {idle} ready workers of {} within {:?}; workers: {workers:?}; logs:\n{}",
                    f.name,
                    f.min_workers,
                    self.spec.start_within,
                    self.all_logs()
                );
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// The gateway's port for HTTP requests, on 127.0.0.1.
    pub fn http_port(&self) -> u16 {
        self.state().http_port
    }

    /// The engine's process.
    pub fn engine_pid(&self) -> i32 {
        self.state().engine
    }

    /// The gateway's process.
    pub fn gateway_pid(&self) -> i32 {
        self.state().gateway
    }

    /// The process that owns all others of the node.
    pub fn keeper_pid(&self) -> i32 {
        self.keeper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .process
            .id() as i32
    }

    /// The node's shared directory, as the host sees it.
    pub fn ipc_root(&self) -> &Path {
        &self.ipc
    }

    /// The directory of the node's log files and `func_config.json`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The container of a function.
    pub fn container(&self, function: &str) -> Result<ContainerState> {
        self.state()
            .containers
            .into_iter()
            .find(|c| c.function == function)
            .with_context(|| format!("the node has no function {function}"))
    }

    /// The workers of a function that live, by their numbers.
    pub fn workers(&self, function: &str) -> Result<Vec<WorkerInfo>> {
        procs::workers_of(&self.container(function)?)
    }

    /// Calls a function through the gateway, on a connection of its own.
    pub fn call(&self, function: &str, input: &[u8]) -> Result<Vec<u8>, CallError> {
        self.client()?.call(function, input)
    }

    /// A connection to the gateway.
    pub fn client(&self) -> Result<HttpClient, CallError> {
        HttpClient::connect(self.http_port())
    }

    /// Replaces a function's container, as a deployment would: the old one is
    /// ended (a request in it is never answered), a new one started, with
    /// another library if one is given. Returns once its workers are idle.
    pub fn redeploy(&self, function: &str, library: Option<&Path>) -> Result<()> {
        let deadline = Instant::now() + self.spec.start_within;
        let ask = Ask::Redeploy {
            name: function.to_owned(),
            library: library.map(Path::to_owned),
        };
        self.ask(&ask, deadline)?;
        self.wait_until_idle(deadline)
    }

    /// A log file: `gateway.log`, `engine.log`, `launcher_Foo.log`,
    /// `Foo_worker_0.stderr`, …
    pub fn log(&self, name: &str) -> Result<String> {
        let path = self.dir.join("logs").join(name);
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// All log files that have something in them, for a failed test's message.
    pub fn all_logs(&self) -> String {
        let mut names: Vec<_> = fs::read_dir(self.dir.join("logs"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        names.sort();
        let mut all = String::new();
        for name in names {
            if let Ok(text) = self.log(&name)
                && !text.is_empty()
            {
                all.push_str(&format!("---- {name}\n{text}"));
            }
        }
        all
    }

    /// Ends the node and waits until nothing of it is left.
    pub fn stop(self) -> Result<()> {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        keeper.stop()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let keeper = self
            .keeper
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = keeper.stop() {
            eprintln!("node: {e:#}");
        }
        // The keeper has done all this already, unless it was killed, or never
        // got so far.
        if self.spec.runtime == RuntimeKind::Embedded {
            for container in self.state().containers {
                cgroup::remove_left_behind(&container.id);
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_dir_all(&self.ipc);
    }
}

impl Keeper {
    fn start() -> Result<Self> {
        let program = crate::bin("node_keeper")?;
        let mut process = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let requests = process.stdin.take();
        let stdout = process.stdout.take().context("no pipe from the keeper")?;
        let (sender, replies) = channel();
        // Ends with the keeper's output.
        std::thread::Builder::new()
            .name("keeper-replies".into())
            .spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            })?;
        Ok(Self {
            process,
            requests,
            replies,
        })
    }

    fn ask(&mut self, ask: &Ask, deadline: Instant) -> Result<NodeState> {
        let line = serde_json::to_string(ask)?;
        let requests = self
            .requests
            .as_mut()
            .context("the node has been stopped")?;
        writeln!(requests, "{line}").context("the keeper is gone")?;
        let left = deadline.saturating_duration_since(Instant::now());
        let reply = match self.replies.recv_timeout(left) {
            Ok(line) => serde_json::from_str(&line).context("the keeper's reply")?,
            Err(RecvTimeoutError::Timeout) => bail!("the keeper does not answer in time"),
            Err(RecvTimeoutError::Disconnected) => bail!("the keeper has died"),
        };
        match reply {
            Say::Done(state) => Ok(*state),
            Say::Failed(why) => bail!("{why}"),
        }
    }

    fn stop(&mut self) -> Result<()> {
        if self.requests.take().is_none() {
            return Ok(());
        }
        let deadline = Instant::now() + STOP_WITHIN;
        loop {
            if let Some(status) = self.process.try_wait()? {
                ensure!(status.success(), "the keeper ended with {status}");
                return Ok(());
            }
            if Instant::now() > deadline {
                // All that it started dies with it.
                self.process.kill()?;
                self.process.wait()?;
                bail!("the keeper did not end within {STOP_WITHIN:?} and was killed");
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }
}
