//! The agent under test: the real daemon on a socket of its own, and the real
//! `agentctl` to talk to it.
//!
//! Each test has an agent of its own; it sees the workers of every node on the
//! machine, so commands name the engine that they mean.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::Node;

/// How long the agent may take until it answers.
const START: Duration = Duration::from_secs(60);
/// How long it may take for a request.
const REQUEST: Duration = Duration::from_secs(60);

/// Says where the agent keeps its journal.
pub const STATE_DIR: &str = "NIGHTGRAFT_STATE_DIR";

/// What a run of `agentctl` gave.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Answer {
    /// The JSON that `--json` printed.
    pub fn json(&self) -> Result<Value> {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("no JSON: {self:?}"))
    }

    /// The stable code of the error in the JSON, `""` if it has none.
    pub fn error_code(&self) -> String {
        let json = self.json().unwrap_or_default();
        json["error"]["code"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

/// A running agent. Dropping it ends it.
pub struct Agent {
    process: Child,
    dir: TempDir,
}

impl Agent {
    /// Starts an agent and waits until it answers.
    pub fn start() -> Result<Self> {
        Self::start_with(|_| {})
    }

    /// Starts an agent whose command is changed first.
    pub fn start_with(change: impl FnOnce(&mut Command)) -> Result<Self> {
        Self::start_by("agent", &[], change)
    }

    /// Starts an agent that keeps its journal in `state`: the heir of the one
    /// that did so before.
    pub fn start_in(state: &Path) -> Result<Self> {
        Self::start_program("agent", state, |_| {})
    }

    /// The same with another of the programs that were built, and a command
    /// that is changed first.
    pub fn start_program(
        program: &str,
        state: &Path,
        change: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        Self::start_by(program, &[], |command| {
            command.env(STATE_DIR, state);
            change(command);
        })
    }

    /// Starts an agent through another program that becomes it, such as
    /// `setpriv` with its options.
    pub fn start_through(wrapper: &[&str]) -> Result<Self> {
        Self::start_by("agent", wrapper, |_| {})
    }

    fn start_by(
        program: &str,
        wrapper: &[&str],
        change: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        let mut agent = Self::spawn(program, wrapper, change)?;
        if let Some(status) = agent.wait_until_ready()? {
            bail!("the agent ended ({status}): {}", agent.log());
        }
        Ok(agent)
    }

    /// Starts one of the programs that were built and does not wait for it.
    pub fn spawn_program(
        program: &str,
        state: &Path,
        change: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        Self::spawn(program, &[], |command| {
            command.env(STATE_DIR, state);
            change(command);
        })
    }

    /// Waits until it has put in order what it found; how it ended, if it did.
    pub fn wait_until_ready(&mut self) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + START;
        while !self.is_ready() {
            if let Some(status) = self.process.try_wait()? {
                return Ok(Some(status));
            }
            ensure!(
                Instant::now() < deadline,
                "the agent does not answer: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(None)
    }

    /// How it ended, if it does within `patience`.
    pub fn ended(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.process.try_wait()?;
            if status.is_some() || Instant::now() > deadline {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn spawn(program: &str, wrapper: &[&str], change: impl FnOnce(&mut Command)) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("nightagent-").tempdir()?;
        let process = launch(program, dir.path(), wrapper, change)?;
        Ok(Self { process, dir })
    }

    /// Kills it, and starts another one in its place, with the same directory.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.process = launch("agent", self.dir.path(), &[], |_| {})?;
        if let Some(status) = self.wait_until_ready()? {
            bail!("the agent ended ({status}): {}", self.log());
        }
        Ok(())
    }

    /// Whether it answers, and has put in order what it found.
    fn is_ready(&self) -> bool {
        self.health()
            .is_ok_and(|health| health["recovering"] == false)
    }

    /// How it is.
    pub fn health(&self) -> Result<Value> {
        self.get("/v1/health")
    }

    /// Asks its API.
    pub fn get(&self, path: &str) -> Result<Value> {
        let (code, body) = self.request("GET", path, "")?;
        ensure!(code == 200, "{path}: {code}: {body}");
        Ok(body)
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default()
    }

    /// Runs `agentctl`.
    pub fn ctl(&self, arguments: &[&str]) -> Result<Answer> {
        ctl(&self.socket(), arguments)
    }

    /// Posts JSON to the agent's API and gives the status code and the body:
    /// what `agentctl` does, without a process for each request.
    pub fn post(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        self.request("POST", path, &body.to_string())
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Result<(u16, Value)> {
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(REQUEST))?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: agent\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("no answer to {path} {body}: {answer}"))?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .with_context(|| format!("no HTTP: {answer}"))?;
        let code = head.split(' ').nth(1).context("a status code")?.parse()?;
        Ok((code, serde_json::from_str(body).context("no JSON")?))
    }

    /// Fuses an edge at once, without watching the workers afterwards.
    pub fn patch_unwatched(&self, node: &Node, caller: &str, callee: &str) -> Result<(u16, Value)> {
        let engine = node.engine_pid();
        let request = serde_json::json!({
            "caller": caller, "callee": callee, "engine": engine, "canary_wait_ms": 0
        });
        self.post("/v1/patch", &request)
    }

    /// Reverts an edge, whatever comes of it.
    pub fn try_revert(&self, node: &Node, caller: &str, callee: &str) -> Result<(u16, Value)> {
        let engine = node.engine_pid();
        let request = serde_json::json!({"caller": caller, "callee": callee, "engine": engine});
        self.post("/v1/revert", &request)
    }

    /// Runs `agentctl --json` on an edge of a node.
    pub fn edge(&self, node: &Node, command: &str, caller: &str, callee: &str) -> Result<Answer> {
        let engine = node.engine_pid().to_string();
        let mut arguments = vec![command, caller, callee, "--engine", &engine, "--json"];
        if command == "patch" {
            // On an idle node nothing comes by to be watched.
            arguments.extend(["--canary-wait", "100ms"]);
        }
        self.ctl(&arguments)
    }

    /// Fuses an edge in all workers, which must succeed.
    pub fn patch(&self, node: &Node, caller: &str, callee: &str) -> Result<Value> {
        self.done(node, "patch", caller, callee)
    }

    /// The same with `--allow-effects`.
    pub fn patch_allowing(
        &self,
        node: &Node,
        caller: &str,
        callee: &str,
        effects: &str,
    ) -> Result<Value> {
        let answer = self.try_patch_allowing(node, caller, callee, effects)?;
        ensure!(
            answer.code == 0,
            "patch {caller} {callee}: {answer:?}\n{}",
            self.log()
        );
        answer.json()
    }

    /// The same, whatever comes of it.
    pub fn try_patch_allowing(
        &self,
        node: &Node,
        caller: &str,
        callee: &str,
        effects: &str,
    ) -> Result<Answer> {
        let engine = node.engine_pid().to_string();
        let edge = ["patch", caller, callee, "--engine", &engine, "--json"];
        let how = ["--canary-wait", "100ms", "--allow-effects", effects];
        self.ctl(&[&edge[..], &how[..]].concat())
    }

    /// Reverts an edge in all workers, which must succeed.
    pub fn revert(&self, node: &Node, caller: &str, callee: &str) -> Result<Value> {
        self.done(node, "revert", caller, callee)
    }

    fn done(&self, node: &Node, command: &str, caller: &str, callee: &str) -> Result<Value> {
        let answer = self.edge(node, command, caller, callee)?;
        ensure!(
            answer.code == 0,
            "{command} {caller} {callee}: {answer:?}\n{}",
            self.log()
        );
        answer.json()
    }

    /// The status of one edge of a node; `null` while nothing of it is there.
    pub fn edge_status(&self, node: &Node, caller: &str, callee: &str) -> Result<Value> {
        let answer = self.ctl(&["status", "--json"])?;
        ensure!(answer.code == 0, "status: {answer:?}");
        let edges = answer.json()?["edges"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let engine = node.engine_pid();
        let found = edges
            .into_iter()
            .find(|e| e["engine"] == engine && e["caller"] == caller && e["callee"] == callee);
        Ok(found.unwrap_or_default())
    }

    /// Fused calls of an edge, in all workers.
    pub fn fused_calls(&self, node: &Node, caller: &str, callee: &str) -> Result<u64> {
        let status = self.edge_status(node, caller, callee)?;
        Ok(status["totals"]["fused_calls"].as_u64().unwrap_or(0))
    }

    /// Calls the caller until the callee is ready in all of its workers.
    pub fn warm_up(&self, node: &Node, caller: &str, callee: &str) -> Result<()> {
        self.warm_up_with(node, caller, callee, b"slow 30 ms")
    }

    /// The same with a request of one's own, which must bring the caller to
    /// call the callee, and best takes a while.
    pub fn warm_up_with(
        &self,
        node: &Node,
        caller: &str,
        callee: &str,
        input: &[u8],
    ) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let status = self.edge_status(node, caller, callee)?;
            let workers = status["workers"].as_array().cloned().unwrap_or_default();
            if !workers.is_empty() && workers.iter().all(|w| w["graft"]["state"] == "ready") {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{callee} does not get ready in {caller}: {status}"
            );
            // At once, so that each worker gets one.
            std::thread::scope(|scope| {
                let calls: Vec<_> = workers
                    .iter()
                    .map(|_| scope.spawn(|| node.call(caller, input)))
                    .collect();
                calls.into_iter().try_for_each(|call| match call.join() {
                    Ok(answer) => answer
                        .map(|_| ())
                        .context("a call while the callee gets ready"),
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })?;
        }
    }

    /// Kills it at once, as the kernel would.
    pub fn kill(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL)?;
        self.process.wait()?;
        Ok(())
    }
}

/// Starts an agent with its socket and log in a folder.
fn launch(
    program: &str,
    dir: &Path,
    wrapper: &[&str],
    change: impl FnOnce(&mut Command),
) -> Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join("agent.log"))?;
    let agent = crate::bin(program)?;
    let mut command = match wrapper {
        [] => Command::new(agent),
        [program, options @ ..] => {
            let mut command = Command::new(program);
            command.args(options).arg(agent);
            command
        }
    };
    command
        .arg("--socket")
        .arg(dir.join("agent.sock"))
        .env(STATE_DIR, dir.join("state"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    crate::sys::process::kill_with_parent(&mut command);
    change(&mut command);
    command
        .process_group(0)
        .spawn()
        .context("the agent does not start")
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs `agentctl` on a socket.
pub fn ctl(socket: &Path, arguments: &[&str]) -> Result<Answer> {
    let output = Command::new(crate::bin("agentctl")?)
        .args(arguments)
        .env("NIGHTGRAFT_SOCKET", socket)
        .stdin(Stdio::null())
        .output()
        .context("agentctl does not start")?;
    Ok(Answer {
        code: output.status.code().context("agentctl was killed")?,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
