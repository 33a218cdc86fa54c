//! A node with many functions that call Bar, so that there is always one that
//! nobody has touched, and the agents that work on it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use super::scenario::{Act, Journal};
use crate::fixtures::{self, Compiler};
use crate::load::{Load, LoadSpec};
use crate::{Agent, FunctionSpec, Node, NodeSpec, WorkerInfo, bin};

/// Functions of a node that are there to be touched once.
const FRESH: usize = 20;
/// How long an agent may take to die that is to die.
const DEATH: Duration = Duration::from_secs(60);

pub(super) struct Farm {
    node: Node,
    used: usize,
    states: TempDir,
    made: usize,
}

/// All fault points of the agent, as it lists them.
pub(super) fn fault_points() -> Result<Vec<String>> {
    let output = Command::new(bin("agent-faults")?)
        .arg("--list-fault-points")
        .output()
        .context("agent-faults does not start")?;
    ensure!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn node() -> Result<Node> {
    let caller = fixtures::compile("foo.c", Compiler::Gcc, &["-O2"])?;
    let callee = fixtures::compile("bar.c", Compiler::Gcc, &["-O2"])?;
    let mut functions = vec![
        FunctionSpec::new("Foo", 1, caller.clone()).workers(2, 2),
        FunctionSpec::new("Bar", 2, callee).workers(2, 2),
    ];
    for number in 0..FRESH {
        let id = u16::try_from(3 + number)?;
        functions.push(FunctionSpec::new(&fresh(number), id, caller.clone()));
    }
    Node::start(NodeSpec::new(functions))
}

fn fresh(number: usize) -> String {
    format!("Fresh{number}")
}

impl Farm {
    pub(super) fn start() -> Result<Self> {
        Ok(Self {
            node: node()?,
            used: 0,
            states: tempfile::Builder::new().prefix("nightchaos-").tempdir()?,
            made: 0,
        })
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// A function that nobody has touched, on a node that has one more: a journal
    /// of the dead needs one, and must not come with another node.
    pub(super) fn fresh(&mut self) -> Result<String> {
        if self.used + 2 > FRESH {
            std::mem::replace(&mut self.node, node()?).stop()?;
            self.used = 0;
        }
        self.one_more()
    }

    fn one_more(&mut self) -> Result<String> {
        ensure!(self.used < FRESH, "no function is left that is fresh");
        self.used += 1;
        Ok(fresh(self.used - 1))
    }

    /// A function that was touched often.
    pub(super) fn worn() -> String {
        "Foo".to_owned()
    }

    pub(super) fn workers(&self, function: &str) -> Result<Vec<WorkerInfo>> {
        self.node.workers(function)
    }

    pub(super) fn load(&self, function: &str) -> Result<Load> {
        let mut spec = LoadSpec::foo(self.node.http_port(), 2);
        spec.function = function.to_owned();
        // A machine that others use as well can be away for long.
        spec.timeout = Duration::from_secs(30);
        Load::start(&spec)
    }

    /// A directory for a journal.
    pub(super) fn state(&mut self, journal: Journal) -> Result<PathBuf> {
        if journal == Journal::Shared {
            return Ok(self.states.path().join("shared"));
        }
        self.made += 1;
        let dir = self.states.path().join(format!("own-{}", self.made));
        match journal {
            Journal::Shared | Journal::New => {}
            Journal::Damaged => {
                std::fs::create_dir(&dir)?;
                std::fs::write(dir.join("journal.redb"), [0x5a; 9000])?;
            }
            Journal::OfTheDead => {
                let function = self.one_more()?;
                let heir = Agent::start_in(&dir)?;
                self.ask(&heir, Act::Patch, &function)?;
                let [worker] = &self.workers(&function)?[..] else {
                    anyhow::bail!("{function} has not one worker")
                };
                end(worker.host_pid)?;
                crate::until("the worker is dead", || !worker.is_alive());
            }
        }
        Ok(dir)
    }

    /// Asks an agent for what must succeed.
    pub(super) fn ask(&self, agent: &Agent, act: Act, function: &str) -> Result<()> {
        let (code, body) = self.try_ask(agent, act, function)?;
        ensure!(
            code == 200,
            "{act:?} {function}: {code}: {body}\n{}",
            agent.log()
        );
        Ok(())
    }

    /// Asks an agent, whatever comes of it.
    pub(super) fn try_ask(
        &self,
        agent: &Agent,
        act: Act,
        function: &str,
    ) -> Result<(u16, serde_json::Value)> {
        match act {
            Act::Patch => agent.patch_unwatched(&self.node, function, "Bar"),
            Act::Revert => agent.try_revert(&self.node, function, "Bar"),
            Act::Observe => self.observe(agent, function, true),
            Act::Leave => self.observe(agent, function, false),
            Act::Start => Ok((200, serde_json::Value::Null)),
        }
    }

    /// What fails in a worker is no failure of the request: here it is.
    fn observe(&self, agent: &Agent, function: &str, on: bool) -> Result<(u16, serde_json::Value)> {
        let engine = self.node.engine_pid();
        let request = serde_json::json!({"on": on, "functions": [function], "engine": engine});
        let (code, body) = agent.post("/v1/observe", &request)?;
        let workers = body["workers"].as_array().map_or(&[][..], Vec::as_slice);
        let failed = workers.iter().find(|w| w["outcome"]["outcome"] == "failed");
        Ok(match failed {
            // As an error of the request's own.
            Some(worker) => (
                409,
                serde_json::json!({"error": worker["outcome"]["error"]}),
            ),
            None => (code, body),
        })
    }

    /// Has an agent with a point armed do something. Gives what it answered, if
    /// it did not die of it.
    pub(super) fn dies(
        &self,
        state: &Path,
        act: Act,
        function: &str,
        arm: impl FnOnce(&mut Command),
    ) -> Result<Option<(u16, serde_json::Value)>> {
        let mut agent = Agent::spawn_program("agent-faults", state, arm)?;
        if let Some(status) = agent.wait_until_ready()? {
            return died(status, &agent).map(|()| None);
        }
        // One that dies gives no answer.
        let answer = self.try_ask(&agent, act, function).ok();
        let patience = match answer {
            Some(_) => Duration::ZERO,
            None => DEATH,
        };
        match agent.ended(patience)? {
            Some(status) => died(status, &agent).map(|()| None),
            None => {
                ensure!(
                    answer.is_some(),
                    "an agent neither answers nor dies: {}",
                    agent.log()
                );
                // Whatever it is at in the background ends with it.
                agent.kill()?;
                Ok(answer)
            }
        }
    }

    pub(super) fn stop(self) -> Result<()> {
        self.node.stop()
    }
}

fn died(status: std::process::ExitStatus, agent: &Agent) -> Result<()> {
    use std::os::unix::process::ExitStatusExt as _;
    ensure!(
        status.signal() == Some(9),
        "the agent ended by itself ({status}): {}",
        agent.log()
    );
    Ok(())
}

/// Ends a process at once.
fn end(pid: i32) -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).context("kill")
}
