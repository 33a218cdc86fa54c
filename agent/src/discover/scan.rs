//! One pass over `/proc`.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::config::{self, FuncEntry, Role};
use super::matching::{Clues, Engine, find_engine, name_in_log};
use super::proc::{ProcRoot, Process, Stat, vanished};
use super::{Function, Node, Worker, cgroup};
use crate::api::{Tracer, WorkerKind};
use crate::error::AgentError;

/// How far up a worker's launcher is looked for: a shell may stand between.
const MAX_ANCESTORS: usize = 4;

/// nightcore's variables.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FaasEnv {
    func_id: u32,
    fprocess_id: u32,
    client_id: Option<u32>,
    ipc_path: PathBuf,
    tcp_port: Option<u16>,
}

/// A process as far as every process is looked at.
struct Seen {
    process: Process,
    stat: Stat,
    argv: Vec<OsString>,
    env: Option<FaasEnv>,
}

/// Looks at every process once and puts together what belongs to nightcore.
///
/// # Errors
/// [`AgentError::Discovery`] when the proc file system can't be listed at all.
/// What goes wrong with single processes is in [`Node::notes`].
pub fn scan(proc_root: &ProcRoot) -> Result<Node, AgentError> {
    let pids = proc_root.pids().map_err(|cause| AgentError::Discovery {
        path: proc_root.path().display().to_string(),
        cause,
    })?;
    let mut notes = Vec::new();
    let mut seen = BTreeMap::new();
    let mut unreadable = Vec::new();
    for pid in pids {
        match look_at(proc_root, pid) {
            Ok(Some(found)) => {
                seen.insert(pid, found);
            }
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => unreadable.push(pid),
            Err(error) if vanished(&error) => {}
            Err(error) => notes.push(format!("process {pid} was left out: {error}")),
        }
    }
    if !unreadable.is_empty() {
        notes.push(format!(
            "{} that may be workers can't be read (first: pid {}): the agent needs root and \
             CAP_SYS_PTRACE (--cap-add SYS_PTRACE)",
            if unreadable.len() == 1 {
                "1 process".to_owned()
            } else {
                format!("{} processes", unreadable.len())
            },
            unreadable[0],
        ));
    }
    let engines = engines(&seen, &mut notes);
    let mut functions = configured(&engines);
    for pid in worker_pids(&seen) {
        match worker(proc_root, &seen, pid) {
            Ok(Some((worker, clues))) => {
                place(&mut functions, worker, &clues, &engines, &mut notes);
            }
            Ok(None) => {}
            Err(error) if vanished(&error) => {}
            Err(error) => notes.push(format!("worker {pid} was left out: {error}")),
        }
    }
    let key = |f: &Function| (f.engine.is_none(), f.engine, f.id, f.name.clone());
    functions.sort_by_key(key);
    Ok(Node { functions, notes })
}

/// Reads what says whether a process is nightcore's. `None` for kernel threads
/// and the dead.
fn look_at(proc_root: &ProcRoot, pid: i32) -> io::Result<Option<Seen>> {
    let process = proc_root.process(pid)?;
    let argv = process.argv()?;
    if argv.is_empty() {
        return Ok(None);
    }
    let stat = process.stat()?;
    if matches!(stat.state, 'Z' | 'X') {
        return Ok(None);
    }
    let env = match process.environ() {
        Ok(environ) => faas_env(&environ),
        // Others' environments are none of ours, as long as it is no worker.
        Err(error) if vanished(&error) || config::library(&argv).is_some() => return Err(error),
        Err(_) => None,
    };
    Ok(Some(Seen {
        process,
        stat,
        argv,
        env,
    }))
}

fn faas_env(environ: &[OsString]) -> Option<FaasEnv> {
    // Like getenv: the first of a name counts.
    let get = |name: &str| {
        environ.iter().find_map(|entry| {
            entry
                .as_bytes()
                .strip_prefix(name.as_bytes())?
                .strip_prefix(b"=")
        })
    };
    let number = |name: &str| std::str::from_utf8(get(name)?).ok()?.parse::<u32>().ok();
    let ipc_path = get("FAAS_ROOT_PATH_FOR_IPC").map_or_else(
        || PathBuf::from(config::DEFAULT_IPC_PATH),
        |path| PathBuf::from(std::ffi::OsStr::from_bytes(path)),
    );
    Some(FaasEnv {
        func_id: number("FAAS_FUNC_ID")?,
        fprocess_id: number("FAAS_FPROCESS_ID")?,
        client_id: number("FAAS_CLIENT_ID"),
        ipc_path,
        tcp_port: number("FAAS_ENGINE_TCP_PORT").and_then(|port| u16::try_from(port).ok()),
    })
}

/// The engines; where there is none, or none whose configuration can be read,
/// the gateways stand in for their names.
fn engines(seen: &BTreeMap<i32, Seen>, notes: &mut Vec<String>) -> Vec<Engine> {
    let mut engines = Vec::new();
    let mut gateways = Vec::new();
    for (pid, found) in seen {
        let list = match config::role(&found.argv) {
            Some(Role::Engine) => &mut engines,
            Some(Role::Gateway) => &mut gateways,
            _ => continue,
        };
        let functions = match config::read(&found.process, &found.argv) {
            Ok(functions) => Some(functions),
            Err(note) => {
                notes.push(note);
                None
            }
        };
        let ipc_path = config::flag(&found.argv, "root_path_for_ipc")
            .map_or_else(|| PathBuf::from(config::DEFAULT_IPC_PATH), PathBuf::from);
        list.push(Engine {
            pid: *pid,
            ipc_identity: found.process.identity_in_root(&ipc_path).ok(),
            ipc_path,
            tcp_port: config::number_flag(&found.argv, "engine_tcp_port")
                .and_then(|port| u16::try_from(port).ok()),
            functions,
        });
    }
    if let [engine] = engines.as_mut_slice()
        && engine.functions.is_none()
        && let [gateway] = gateways.as_mut_slice()
    {
        engine.functions = gateway.functions.take();
    }
    if engines.is_empty() {
        // A gateway meets no workers: its directory and port say nothing.
        for gateway in &mut gateways {
            gateway.ipc_path = PathBuf::new();
            gateway.ipc_identity = None;
            gateway.tcp_port = None;
        }
        return gateways;
    }
    engines
}

fn configured(engines: &[Engine]) -> Vec<Function> {
    let of_engine = |engine: &Engine| {
        let pid = engine.pid;
        engine
            .functions
            .clone()
            .unwrap_or_default()
            .into_iter()
            .map(move |entry| {
                let FuncEntry {
                    name,
                    id,
                    min_workers,
                    max_workers,
                } = entry;
                Function {
                    name: Some(name),
                    id,
                    engine: Some(pid),
                    min_workers,
                    max_workers,
                    workers: Vec::new(),
                }
            })
    };
    engines.iter().flat_map(of_engine).collect()
}

/// Which processes are workers, and not what they started or were started by.
fn worker_pids(seen: &BTreeMap<i32, Seen>) -> Vec<i32> {
    let identity = |found: &Seen| {
        found
            .env
            .as_ref()
            .map(|env| (env.func_id, env.fprocess_id, env.client_id))
    };
    let native = |found: &Seen| config::library(&found.argv).is_some();
    let mut dropped = Vec::new();
    for (pid, found) in seen {
        let Some(own) = identity(found) else { continue };
        let parent = found.stat.ppid;
        let Some(above) = seen
            .get(&parent)
            .filter(|above| identity(above) == Some(own))
        else {
            continue;
        };
        // Same variables as the parent: one of the two is the worker.
        let parent_wraps = match (native(above), native(found)) {
            (false, true) => true,
            (true, _) => false,
            (false, false) => is_shell(&above.argv),
        };
        dropped.push(if parent_wraps { parent } else { *pid });
    }
    // A worker's child that outlived its parent is its launcher's child now;
    // the worker is the older one.
    let mut oldest: HashMap<_, (u64, i32)> = HashMap::new();
    for (pid, found) in seen {
        let Some(own) = identity(found).filter(|_| !dropped.contains(pid)) else {
            continue;
        };
        let age = (found.stat.start_time, *pid);
        let entry = oldest.entry((found.stat.ppid, own)).or_insert(age);
        *entry = age.min(*entry);
    }
    let mut pids: Vec<i32> = oldest.into_values().map(|(_, pid)| pid).collect();
    pids.sort_unstable();
    pids
}

fn is_shell(argv: &[OsString]) -> bool {
    let name = argv
        .first()
        .map(|arg| super::proc::basename(arg).to_string_lossy().into_owned());
    name.is_some_and(|name| {
        matches!(
            name.trim_start_matches('-'),
            "sh" | "bash" | "dash" | "ash" | "busybox" | "zsh"
        )
    })
}

fn worker(
    proc_root: &ProcRoot,
    seen: &BTreeMap<i32, Seen>,
    pid: i32,
) -> io::Result<Option<(Worker, Clues)>> {
    let Some((found, env)) = seen.get(&pid).and_then(|f| Some((f, f.env.as_ref()?))) else {
        return Ok(None);
    };
    let process = &found.process;
    let status = process.status()?;
    let groups = process.cgroup().unwrap_or_default();
    let in_namespace = status.ns_pids.len() > 1;
    let container = cgroup::container_id(&groups)
        .or_else(|| cgroup::group_name(&groups).filter(|_| in_namespace))
        .map(str::to_owned);
    let library = config::library(&found.argv);
    let kind = kind(
        launcher_mode(seen, found.stat.ppid).as_deref(),
        library.is_some(),
    );
    let library = match (&kind, library) {
        // A bare name is looked up along the library path; no directory of the
        // worker's says where it was found.
        (WorkerKind::Native, Some(name)) if name.as_os_str().as_bytes().contains(&b'/') => {
            Some(process.absolute(&name)?)
        }
        (_, name) => name,
    };
    let log_name = process
        .link("fd/1")
        .ok()
        .and_then(|path| name_in_log(&path, env.fprocess_id));
    let clues = Clues {
        func_id: env.func_id,
        ipc_identity: process.identity_in_root(&env.ipc_path).ok(),
        ipc_path: env.ipc_path.clone(),
        tcp_port: env.tcp_port,
        log_name,
    };
    // Read again, last: it says that all of the above was one living process.
    let stat = process.stat()?;
    let worker = Worker {
        pid,
        pid_inside: status.ns_pids.last().copied(),
        start_time: stat.start_time,
        fprocess_id: env.fprocess_id,
        client_id: env.client_id,
        container,
        kind,
        library,
        threads: stat.threads,
        cpu_ticks: stat.cpu_ticks,
        tracer: (status.tracer_pid != 0).then(|| tracer(proc_root, status.tracer_pid)),
    };
    Ok(Some((worker, clues)))
}

fn launcher_mode(seen: &BTreeMap<i32, Seen>, parent: i32) -> Option<String> {
    let mut pid = parent;
    for _ in 0..MAX_ANCESTORS {
        let found = seen.get(&pid)?;
        if config::role(&found.argv) == Some(Role::Launcher) {
            let mode = config::flag(&found.argv, "fprocess_mode")?;
            return Some(mode.to_string_lossy().into_owned());
        }
        pid = found.stat.ppid;
    }
    None
}

fn kind(mode: Option<&str>, runs_func_worker: bool) -> WorkerKind {
    let language = match mode {
        Some("go") => "Go",
        Some("nodejs") => "Node.js",
        Some("python") => "Python",
        _ if runs_func_worker => return WorkerKind::Native,
        _ => "no func_worker_v1",
    };
    WorkerKind::NotNative {
        language: language.to_owned(),
    }
}

/// The tracer by pid and name.
fn tracer(proc_root: &ProcRoot, pid: i32) -> Tracer {
    let name = proc_root
        .process(pid)
        .and_then(|process| process.stat())
        .map(|stat| stat.comm);
    Tracer {
        pid,
        name: name.unwrap_or_else(|_| "?".to_owned()),
    }
}

/// Puts a worker with its function.
fn place(
    functions: &mut Vec<Function>,
    worker: Worker,
    clues: &Clues,
    engines: &[Engine],
    notes: &mut Vec<String>,
) {
    let found = find_engine(clues, engines);
    if let Some(note) = found.note {
        notes.push(format!("worker {}: {note}", worker.pid));
    }
    let same = |f: &&mut Function| {
        f.id == clues.func_id
            && f.engine == found.engine
            && (found.engine.is_some() || f.name == found.name)
    };
    if let Some(function) = functions.iter_mut().find(same) {
        // Where the configuration was edited, the name that the workers were
        // started under is the one that is dispatched by.
        if found.name.is_some() {
            function.name = found.name;
        }
        function.workers.push(worker);
        return;
    }
    functions.push(Function {
        name: found.name,
        id: clues.func_id,
        engine: found.engine,
        min_workers: None,
        max_workers: None,
        workers: vec![worker],
    });
}

/// The tracer of a worker at this moment; `None` where there is none, or the
/// worker has exited.
#[must_use]
pub fn tracer_of(proc_root: &ProcRoot, pid: i32) -> Option<Tracer> {
    let status = proc_root
        .process(pid)
        .and_then(|process| process.status())
        .ok()?;
    (status.tracer_pid != 0).then(|| tracer(proc_root, status.tracer_pid))
}

/// What the agent itself may do, from its own entry in the proc file system.
///
/// # Errors
/// When the entry can't be read.
pub fn own_capabilities(proc_root: &ProcRoot) -> io::Result<u64> {
    let link = std::fs::read_link(proc_root.path().join("self"))?;
    let pid = link.to_str().and_then(|pid| pid.parse().ok());
    let pid = pid.ok_or_else(|| io::Error::other("/proc/self names no process"))?;
    Ok(proc_root.process(pid)?.status()?.cap_effective)
}

/// Inode of the first pid namespace (`PROC_PID_INIT_INO` in the kernel's
/// `include/linux/proc_ns.h`).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Whether the agent sees the node's processes, and not just its container's.
#[must_use]
pub fn sees_the_node(proc_root: &ProcRoot) -> bool {
    let namespace = std::fs::read_link(proc_root.path().join("self/ns/pid"));
    namespace.is_ok_and(|path| path == Path::new(INITIAL_PID_NAMESPACE))
}
