//! The node that a keeper keeps: its processes and containers, in the order in
//! which they are started, and ended in the reverse.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{ContainerState, KeeperFunction, KeeperSpec, NodeState};
use crate::container::docker::Docker;
use crate::container::embedded::Embedded;
use crate::container::rootfs::Entry;
use crate::container::{
    BIN_INSIDE, Container, ContainerSpec, FUNCTIONS_INSIDE, IPC_INSIDE, OUTPUTS_INSIDE, Runtime,
    RuntimeKind,
};
use crate::gateway::ports_in;
use crate::sys::process;

/// How long a process may take to say that it is ready.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// A process that is killed when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Deployed {
    function: KeeperFunction,
    container: Box<dyn Container>,
    dir: PathBuf,
}

/// Fields are dropped in their order: containers, engine, gateway, runtime,
/// and then the directories.
pub(super) struct Node {
    deployed: Vec<Deployed>,
    engine: Process,
    gateway: Process,
    http_port: u16,
    runtime: Box<dyn Runtime>,
    _dirs: Dirs,
    spec: KeeperSpec,
    containers_made: usize,
}

/// The node's directories, removed when this is dropped.
struct Dirs(Vec<PathBuf>);

impl Drop for Dirs {
    fn drop(&mut self) {
        for dir in &self.0 {
            if let Err(e) = fs::remove_dir_all(dir)
                && e.kind() != std::io::ErrorKind::NotFound
            {
                eprintln!("{} stays: {e}", dir.display());
            }
        }
    }
}

impl Node {
    pub(super) fn start(spec: KeeperSpec) -> Result<Self> {
        let dirs = Dirs(vec![spec.ipc.clone(), spec.dir.clone()]);
        // Inherited by all that is started from here on.
        process::confine_to(&spec.cpus).context("processors")?;
        let logs = spec.dir.join("logs");
        fs::create_dir_all(&logs)?;
        let config = spec.dir.join("func_config.json");
        fs::write(&config, config_json(&spec.functions)?)?;
        let config_flag = format!("--func_config_file={}", config.display());

        let gateway_log = logs.join("gateway.log");
        let mut gateway = spawn(
            &spec.bins.join("gateway"),
            &[&config_flag, "--http_port=0", "--engine_conn_port=0"],
            &gateway_log,
        )?;
        let (http_port, engine_port) = ready(&mut gateway, &gateway_log, ports_in)?;

        let engine_log = logs.join("engine.log");
        let mut args = vec![
            config_flag,
            format!("--gateway_port={engine_port}"),
            format!("--root_path_for_ipc={}", spec.ipc.display()),
        ];
        if spec.fifo_for_nested_call {
            args.push("--use_fifo_for_nested_call".into());
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut engine = spawn(&spec.bins.join("engine"), &args, &engine_log)?;
        ready(&mut engine, &engine_log, |log| {
            log.contains("engine: ready").then_some(())
        })?;

        let runtime: Box<dyn Runtime> = match spec.runtime {
            RuntimeKind::Embedded => Box::new(Embedded),
            RuntimeKind::Docker => Box::new(Docker::connect(&spec.dir)?),
        };
        let functions = spec.functions.clone();
        let mut node = Self {
            deployed: Vec::new(),
            engine,
            gateway,
            http_port,
            runtime,
            _dirs: dirs,
            spec,
            containers_made: 0,
        };
        for function in functions {
            let deployed = node.deploy(function)?;
            node.deployed.push(deployed);
        }
        Ok(node)
    }

    fn deploy(&mut self, function: KeeperFunction) -> Result<Deployed> {
        let name = &function.name;
        self.containers_made += 1;
        let dir = self
            .spec
            .dir
            .join(format!("container-{}-{name}", self.containers_made));
        fs::create_dir(&dir)?;
        let library = format!("{FUNCTIONS_INSIDE}/lib{}.so", name.to_lowercase());
        let worker = format!("{BIN_INSIDE}/func_worker_v1");
        let launcher = format!("{BIN_INSIDE}/launcher");
        let mut files = vec![
            Entry::new(self.spec.bins.join("launcher"), &launcher),
            Entry::new(
                self.spec
                    .worker
                    .clone()
                    .unwrap_or_else(|| self.spec.bins.join("func_worker_v1")),
                &worker,
            ),
            Entry::new(&function.library, &library),
        ];
        files.extend(function.files.iter().map(|(from, to)| Entry::new(from, to)));
        let mut env = vec![("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned())];
        if self.spec.strict_lifetime {
            env.push(("FAAS_STRICT_LIFETIME".into(), "1".into()));
        }
        env.extend(function.env.iter().cloned());
        let container = self.runtime.start(&ContainerSpec {
            id: random_id()?,
            name: name.clone(),
            dir: dir.clone(),
            files,
            ipc: self.spec.ipc.clone(),
            logs: self.spec.dir.join("logs"),
            command: vec![
                launcher,
                format!("--root_path_for_ipc={IPC_INSIDE}"),
                format!("--func_id={}", function.id),
                "--fprocess_mode=cpp".into(),
                format!("--fprocess_output_dir={OUTPUTS_INSIDE}"),
                format!("--fprocess={worker} {library}"),
            ],
            env,
            memory_limit: function.memory_limit,
            oddities: function.oddities,
            cpus: self.spec.cpus.clone(),
            overlay_root: self.spec.overlay_roots,
        })?;
        Ok(Deployed {
            function,
            container,
            dir,
        })
    }

    pub(super) fn redeploy(&mut self, name: &str, library: Option<PathBuf>) -> Result<()> {
        let at = self
            .deployed
            .iter()
            .position(|d| d.function.name == name)
            .with_context(|| format!("there is no function {name}"))?;
        let mut old = self.deployed.remove(at);
        old.container.stop()?;
        let _ = fs::remove_dir_all(&old.dir);
        let mut function = old.function;
        if let Some(library) = library {
            function.library = library;
        }
        let new = self.deploy(function)?;
        self.deployed.insert(at, new);
        Ok(())
    }

    pub(super) fn state(&self) -> NodeState {
        NodeState {
            gateway: self.gateway.0.id() as i32,
            engine: self.engine.0.id() as i32,
            http_port: self.http_port,
            containers: self
                .deployed
                .iter()
                .map(|d| ContainerState {
                    function: d.function.name.clone(),
                    id: d.container.id().to_owned(),
                    init: d.container.init().as_raw(),
                })
                .collect(),
        }
    }
}

fn config_json(functions: &[KeeperFunction]) -> Result<String> {
    let entries: Vec<_> = functions
        .iter()
        .map(|f| {
            serde_json::json!({
                "funcName": f.name,
                "funcId": f.id,
                "minWorkers": f.min_workers,
                "maxWorkers": f.max_workers,
            })
        })
        .collect();
    Ok(serde_json::to_string_pretty(&entries)?)
}

/// 64 hexadecimal digits that no other container has.
fn random_id() -> Result<String> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn spawn(program: &Path, args: &[&str], log: &Path) -> Result<Process> {
    let out = File::create(log)?;
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    process::kill_with_parent(&mut command);
    command
        .spawn()
        .map(Process)
        .with_context(|| format!("cannot start {} (is it built?)", program.display()))
}

/// Waits until a process's log says what `find` looks for.
fn ready<T>(process: &mut Process, log: &Path, find: impl Fn(&str) -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        let ended = process.0.try_wait()?;
        let text = fs::read_to_string(log)?;
        if let Some(found) = find(&text) {
            return Ok(found);
        }
        if let Some(status) = ended {
            bail!("{} ended with {status}: {}", log.display(), text.trim());
        }
        if Instant::now() > deadline {
            bail!(
                "{} says nothing within {READY_WITHIN:?}: {}",
                log.display(),
                text.trim()
            );
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}
