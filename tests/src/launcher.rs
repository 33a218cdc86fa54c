//! A launcher: PID 1 of a function's container, parent of its workers.
//!
//! It introduces itself to the engine, gets the function config, starts one
//! worker per `CreateWorker` message, and reaps. A worker that dies is *not*
//! started again. When the engine goes, it goes, and with it (being PID 1) all
//! that runs in the container.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::func_config::FuncConfig;
use crate::ipc::{self, Ipc};
use crate::sys::process;
use crate::wire::{Kind, Message};

/// Digits of a container's id.
pub const CONTAINER_ID_LEN: usize = 64;

/// A launcher's command line.
#[derive(Clone, Debug)]
pub struct LauncherOptions {
    /// `--func_id`.
    pub func: u16,
    /// `--fprocess`: the worker's command line.
    pub fprocess: String,
    /// `--fprocess_working_dir`.
    pub working_dir: Option<PathBuf>,
    /// `--fprocess_output_dir`.
    pub output_dir: Option<PathBuf>,
    /// `--root_path_for_ipc`.
    pub ipc_root: PathBuf,
}

/// The id of the container that this process is in: what follows `/docker/`
/// in its cgroup, or zeros.
pub fn own_container_id(cgroups: &str) -> String {
    cgroups
        .split_once("/docker/")
        .and_then(|(_, rest)| rest.get(..CONTAINER_ID_LEN))
        .filter(|id| id.bytes().all(|b| b.is_ascii_hexdigit()))
        .map_or_else(|| "0".repeat(CONTAINER_ID_LEN), str::to_owned)
}

/// Runs until the engine is gone.
pub fn run(options: &LauncherOptions) -> Result<()> {
    // Before the first child, so that no death is missed.
    let mut deaths = SigSet::empty();
    deaths.add(Signal::SIGCHLD);
    deaths.thread_block()?;
    let signals = SignalFd::with_flags(&deaths, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;

    let ipc = Ipc::open(&options.ipc_root)?;
    let engine: OwnedFd = UnixStream::connect(ipc.socket())
        .with_context(|| format!("cannot connect to {}", ipc.socket().display()))?
        .into();
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let id = own_container_id(&cgroups);
    ipc::write_full(
        &engine,
        &Message::launcher_handshake(options.func, id.as_bytes()).0,
    )?;
    let mut welcome = Message::zeroed();
    ipc::read_full(&engine, &mut welcome.0).context("no welcome from the engine")?;
    ensure!(
        welcome.kind() == Some(Kind::HandshakeResponse),
        "the engine's welcome is none"
    );
    let mut json = vec![0; usize::try_from(welcome.payload_size())?];
    ipc::read_full(&engine, &mut json)?;
    let config = FuncConfig::parse(String::from_utf8(json)?)?;
    let name = match config.by_id(options.func) {
        Some(f) => f.func_name.clone(),
        None => bail!("there is no function of id {}", options.func),
    };
    println!("launcher of {name} in container {id}");

    let mut launcher = Launcher {
        options,
        ipc,
        config,
        name,
        started: Vec::new(),
    };
    loop {
        let mut ready = [
            PollFd::new(engine.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(e).context("poll"),
        }
        let [from_engine, died] = ready.map(|r| r.any().unwrap_or(true));
        if died {
            while signals.read_signal()?.is_some() {}
            launcher.reap();
        }
        if from_engine {
            let mut message = Message::zeroed();
            if ipc::read_full(&engine, &mut message.0).is_err() {
                println!("the engine is gone");
                return Ok(());
            }
            ensure!(
                message.kind() == Some(Kind::CreateWorker),
                "an unexpected message"
            );
            launcher.start_worker(message.client())?;
        }
    }
}

struct Launcher<'o> {
    options: &'o LauncherOptions,
    ipc: Ipc,
    config: FuncConfig,
    name: String,
    /// Pids of the workers, by their number here.
    started: Vec<u32>,
}

impl Launcher<'_> {
    fn start_worker(&mut self, client: u16) -> Result<()> {
        let number = self.started.len();
        let mut words = self.options.fprocess.split_whitespace();
        let program = words.next().context("--fprocess is empty")?;
        let mut command = Command::new(program);
        command
            .args(words)
            .env("FAAS_FUNC_ID", self.options.func.to_string())
            .env("FAAS_FPROCESS_ID", number.to_string())
            .env("FAAS_CLIENT_ID", client.to_string())
            .env("FAAS_MSG_PIPE_FD", "3")
            .env("FAAS_ROOT_PATH_FOR_IPC", self.ipc.root())
            .stdin(Stdio::null());
        if let Some(dir) = &self.options.working_dir {
            command.current_dir(dir);
        }
        if let Some(dir) = &self.options.output_dir {
            let file = |suffix| {
                let path = dir.join(format!("{}_worker_{number}.{suffix}", self.name));
                File::create(&path).with_context(|| path.display().to_string())
            };
            command.stdout(file("stdout")?).stderr(file("stderr")?);
        }
        let (mut ours, theirs) = UnixStream::pair()?;
        process::give_as_third(&mut command, theirs.into());
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        println!(
            "worker {number} of {} is process {}, client {client}",
            self.name,
            child.id()
        );
        self.started.push(child.id());
        let json = self.config.json().as_bytes();
        ours.write_all(&u32::try_from(json.len())?.to_le_bytes())?;
        ours.write_all(json)?;
        Ok(())
    }

    fn reap(&self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(status) => {
                    let pid = status.pid().map(|p| p.as_raw().unsigned_abs());
                    let number = self.started.iter().position(|&w| Some(w) == pid);
                    match number {
                        Some(n) => println!("worker {n} of {} has ended: {status:?}", self.name),
                        None => println!("an orphan has ended: {status:?}"),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_container_in_its_cgroup() {
        let id = "0123456789abcdef".repeat(4);
        let v1 = format!("5:memory:/docker/{id}\n0::/\n");
        assert_eq!(own_container_id(&v1), id);
        assert_eq!(own_container_id("0::/user.slice\n"), "0".repeat(64));
        assert_eq!(own_container_id("0::/docker/short\n"), "0".repeat(64));
    }
}
