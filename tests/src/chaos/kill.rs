//! One thing is ended at one point, and all is looked at.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Chaos;
use super::check::{self, Size};
use super::farm::Farm;
use super::scenario::{Act, Death, Journal, Scenario, State};
use crate::load::Load;
use crate::{Agent, WorkerInfo};

/// How long the pressure of a load is kept up after the last thing was done.
const AFTERWARDS: Duration = Duration::from_millis(30);

/// How long a process may take to be dead that was killed.
const DYING: Duration = Duration::from_secs(20);

/// A function that something is about to be done to.
struct Stage {
    function: String,
    workers: Vec<WorkerInfo>,
    sizes: Vec<Size>,
    state: std::path::PathBuf,
    load: Load,
}

/// What was ended.
enum Victim {
    Agent,
    /// A worker, or its container.
    Worker,
}

impl Chaos<'_> {
    /// Which points a scenario passes, and how often.
    pub(super) fn trace(&mut self, scenario: &Scenario) -> Result<BTreeMap<String, u64>> {
        let stage = self.set(scenario)?;
        let trace = tempfile::NamedTempFile::new()?;
        let arm = |command: &mut Command| {
            command.env("NIGHTGRAFT_FAULT_TRACE", trace.path());
            refuse(command, scenario);
        };
        let answer = self
            .farm
            .dies(&stage.state, scenario.act, &stage.function, arm)?;
        ensure!(answer.is_some(), "an agent died that should not have");
        let text = std::fs::read_to_string(trace.path())?;
        let mut counts = BTreeMap::new();
        for line in text.lines() {
            *counts.entry(line.to_owned()).or_default() += 1;
        }
        if scenario.name == Scenario::all()[0].name {
            self.calls = counts.get("prepare::call#after").copied().unwrap_or(0);
        }
        self.look(stage, scenario, &Victim::Agent)?;
        Ok(counts)
    }

    /// Ends the agent at a point.
    pub(super) fn kill_agent(&mut self, scenario: &Scenario, point: &str, hit: u64) {
        let result = self.try_kill_agent(scenario, point, hit);
        self.conclude(
            result,
            &format!("{}, agent ended at {point}@{hit}", scenario.name),
        );
    }

    fn try_kill_agent(&mut self, scenario: &Scenario, point: &str, hit: u64) -> Result<()> {
        let stage = self.set(scenario)?;
        let arm = |command: &mut Command| {
            command.env("NIGHTGRAFT_FAULT", format!("{point}@{hit}"));
            refuse(command, scenario);
        };
        let answer = self
            .farm
            .dies(&stage.state, scenario.act, &stage.function, arm)?;
        let died = answer.is_none();
        // Later hits depend on what else goes on in the worker, and a journal
        // that others have written to need not grow.
        let certain =
            hit == 1 && (!point.starts_with("journal-file::") || scenario.journal == Journal::New);
        ensure!(died || !certain, "the point was not passed: {answer:?}");
        if died {
            self.report.kills += 1;
            self.points.insert(point.to_owned());
        }
        self.look(stage, scenario, &Victim::Agent)
    }

    /// Ends the worker at a point.
    pub(super) fn kill_worker(&mut self, scenario: &Scenario, point: &str, hit: u64) {
        let result = self.try_kill_process(scenario, point, hit, false);
        self.conclude(
            result,
            &format!("{}, worker ended at {point}@{hit}", scenario.name),
        );
    }

    /// Ends the container at a point.
    pub(super) fn kill_container(&mut self, scenario: &Scenario, point: &str) {
        let result = self.try_kill_process(scenario, point, 1, true);
        self.conclude(result, &format!("container ended at {point}"));
    }

    fn try_kill_process(
        &mut self,
        scenario: &Scenario,
        point: &str,
        hit: u64,
        container: bool,
    ) -> Result<()> {
        // Always one that is then not needed any more.
        let function = self.farm.fresh()?;
        let stage = self.set_for(scenario, &function, &Farm::worn())?;
        let [worker] = &stage.workers[..] else {
            bail!("{function} has not one worker")
        };
        let victim = if container {
            self.farm.node().container(&function)?.init
        } else {
            worker.host_pid
        };
        let mut agent = Agent::start_program("agent-faults", &stage.state, |command| {
            command
                .env("NIGHTGRAFT_FAULT", format!("{point}@{hit}"))
                .env("NIGHTGRAFT_FAULT_KILL", victim.to_string());
        })?;
        let (code, body) = self.farm.try_ask(&agent, scenario.act, &function)?;
        // It may have been ended at the last thing that the request did, and take
        // its time to die. A container's other processes die after its first.
        let told = agent.log().contains(&format!("fault: ends {victim}"));
        let deadline = Instant::now() + DYING;
        while worker.is_alive() && told && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let ended = !worker.is_alive();
        if ended {
            self.report.kills += 1;
            self.points.insert(point.to_owned());
            said_gone(code, &body)?;
        } else {
            ensure!(
                !told && hit > 1,
                "the point was not passed, or its process lives: {code} {body}"
            );
        }
        ensure!(
            agent.ended(Duration::ZERO)?.is_none(),
            "the agent ended as well: {}",
            agent.log()
        );
        agent.health()?;
        drop(agent);
        // Nobody was ended where the point was passed less often.
        let victim = if ended { Victim::Worker } else { Victim::Agent };
        self.look(stage, scenario, &victim)
    }

    pub(super) fn conclude(&mut self, result: Result<()>, what: &str) {
        if let Err(error) = result {
            self.report.unrecovered += 1;
            self.report.complain(format!("{what}: {error:#}"));
            (self.say)(&format!("{what}: {error:#}"));
        }
    }

    /// Brings a function to where the scenario begins, and a load on it.
    fn set(&mut self, scenario: &Scenario) -> Result<Stage> {
        let function = match scenario.state {
            State::Fresh | State::Observed => self.farm.fresh()?,
            State::Reverted | State::Fused => Farm::worn(),
        };
        self.set_for(scenario, &function, &function)
    }

    fn set_for(&mut self, scenario: &Scenario, function: &str, loaded: &str) -> Result<Stage> {
        let state = self.farm.state(scenario.journal)?;
        let before: &[Act] = match scenario.state {
            State::Fresh => &[],
            State::Reverted => &[Act::Patch, Act::Revert],
            State::Fused => &[Act::Patch],
            State::Observed => &[Act::Observe],
        };
        if !before.is_empty() {
            let agent = Agent::start_in(&state)?;
            for act in before {
                self.farm.ask(&agent, *act, function)?;
            }
        }
        let workers = self.farm.workers(function)?;
        let sizes: Vec<Size> = workers.iter().map(check::size).collect::<Result<_>>()?;
        let load = self.farm.load(loaded)?;
        if let Some((act, death)) = scenario.died {
            let fault = match death {
                Death::At(point) => format!("{point}@1"),
                // The last calls are memfd_create, ftruncate, mmap, close.
                Death::WithDescriptor => format!("prepare::call#after@{}", self.calls - 3),
            };
            let arm = |command: &mut Command| {
                command.env("NIGHTGRAFT_FAULT", &fault);
            };
            let mut refused = Vec::new();
            while let Some((code, body)) = self.farm.dies(&state, act, function, arm)? {
                // A worker that does not get to a stop in time, on a machine
                // that is busy with something else: it was left as it was.
                let why = body["error"]["code"].as_str().unwrap_or_default();
                let known = ["not-stopping", "no-moment"].contains(&why);
                refused.push(format!("{code} {body}"));
                ensure!(
                    known && refused.len() < 5,
                    "the agent before did not die at {fault}: {}",
                    refused.join("; ")
                );
            }
            if death == Death::WithDescriptor {
                let open = check::size(&workers[0])?;
                ensure!(open != sizes[0], "no descriptor was left open");
            }
        }
        Ok(Stage {
            function: function.to_owned(),
            workers,
            sizes,
            state,
            load,
        })
    }

    /// Starts an heir, has it do the same again, and looks at everything.
    fn look(&mut self, stage: Stage, scenario: &Scenario, victim: &Victim) -> Result<()> {
        let Stage {
            function,
            workers,
            sizes,
            state,
            load,
        } = stage;
        let result = self.look_at(&function, &workers, &sizes, &state, scenario, victim);
        std::thread::sleep(AFTERWARDS);
        let report = load.stop();
        self.report.requests += report.requests();
        self.report.failed += report.failed;
        self.report.wrong += report.wrong;
        if report.failed + report.wrong > 0 {
            self.report
                .complain(format!("{}: {report:?}", scenario.name));
        }
        result
    }

    fn look_at(
        &mut self,
        function: &str,
        workers: &[WorkerInfo],
        sizes: &[Size],
        state: &std::path::Path,
        scenario: &Scenario,
        victim: &Victim,
    ) -> Result<()> {
        let heir = Agent::start_in(state)?;
        let health = heir.health()?;
        if let Victim::Worker = victim {
            ensure!(
                workers.iter().all(|worker| !worker.is_alive()),
                "the worker lives"
            );
            // Nothing to be done to, and no reason to fail.
            let (code, body) = self.farm.try_ask(&heir, scenario.act, function)?;
            ensure!(code == 200 || code == 409, "{code}: {body}");
            return Ok(());
        }
        ensure!(
            self.farm.workers(function)? == workers,
            "the workers are not those of before"
        );
        if scenario.act == Act::Observe {
            // It was asked for before the agent died: the heir sees to it at once.
            let deadline = Instant::now() + DYING;
            while !observed(&heir, workers)? {
                ensure!(Instant::now() < deadline, "the worker is not observed");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        for worker in workers {
            let held = check::held_threads(worker)?;
            if !held.is_empty() {
                self.report.leaked += 1;
                bail!("worker {}: {}", worker.host_pid, held.join(", "));
            }
            if let Some(left) = left(&health, worker.host_pid) {
                bail!("worker {} was left: {left}", worker.host_pid);
            }
        }
        for (worker, before) in workers.iter().zip(sizes) {
            self.grown(worker, before, &heir)?;
        }
        let act = match (scenario.act, scenario.died) {
            (Act::Start, Some((act, _))) => act,
            (Act::Start, None) => Act::Patch,
            (act, _) => act,
        };
        self.farm.ask(&heir, act, function)?;
        as_asked_for(&heir, self.farm.node(), function, act, workers)?;
        if scenario.act == Act::Observe {
            // Else every heir to come would see to it.
            self.farm.ask(&heir, Act::Leave, function)?;
            as_asked_for(&heir, self.farm.node(), function, Act::Leave, workers)?;
        }
        for (worker, before) in workers.iter().zip(sizes) {
            self.grown(worker, before, &heir)?;
        }
        Ok(())
    }

    fn grown(&mut self, worker: &WorkerInfo, before: &Size, heir: &Agent) -> Result<()> {
        let now = check::size(worker)?;
        if now != *before {
            self.report.leaked += 1;
            bail!(
                "worker {} has leaked: {before:?} before, {now:?} now\n{}",
                worker.host_pid,
                heir.log()
            );
        }
        Ok(())
    }

    /// Patches and reverts, over and over.
    pub(super) fn cycles(&mut self, cycles: u64) {
        let result = self.try_cycles(cycles);
        self.conclude(result, "cycles");
    }

    fn try_cycles(&mut self, cycles: u64) -> Result<()> {
        let scenario = Scenario {
            state: State::Reverted,
            ..Scenario::all().remove(0)
        };
        let stage = self.set(&scenario)?;
        let agent = Agent::start_in(&stage.state)?;
        for number in 0..cycles {
            let patched = self.farm.ask(&agent, Act::Patch, &stage.function);
            patched.with_context(|| format!("cycle {number}"))?;
            let reverted = self.farm.ask(&agent, Act::Revert, &stage.function);
            reverted.with_context(|| format!("cycle {number}"))?;
            self.report.cycles += 1;
        }
        drop(agent);
        self.look(stage, &scenario, &Victim::Agent)
    }
}

fn refuse(command: &mut Command, scenario: &Scenario) {
    if let Some(number) = scenario.refuse {
        command.env("NIGHTGRAFT_FAULT_REFUSE", number.to_string());
    }
}

/// Whether the answer says that the worker is gone, and nothing worse; one
/// that was done just before is as good.
fn said_gone(code: u16, body: &Value) -> Result<()> {
    let outcomes = body["workers"]
        .as_array()
        .or_else(|| body["report"]["workers"].as_array());
    let gone = outcomes.is_some_and(|all| {
        all.iter().all(|worker| {
            [
                "gone", "fused", "restored", "gate-off", "nothing", "observed", "already", "off",
            ]
            .iter()
            .any(|outcome| worker["outcome"]["outcome"] == *outcome)
        })
    });
    let refused = ["worker-gone", "no-workers", "canary-failed", "quarantined"]
        .iter()
        .any(|known| body["error"]["code"] == *known);
    ensure!(gone || refused, "{code}: {body}");
    Ok(())
}

/// Why an heir has left a worker as it is, if it has.
fn left(health: &Value, pid: i32) -> Option<String> {
    let workers = health["recovered"].as_array()?;
    let worker = workers.iter().find(|worker| worker["pid"] == pid)?;
    (worker["verdict"] == "left").then(|| worker["notes"].to_string())
}

/// Whether the calls of all these workers are counted.
fn observed(heir: &Agent, workers: &[WorkerInfo]) -> Result<bool> {
    let ps = heir.get("/v1/ps")?;
    let functions = ps["functions"].as_array().map_or(&[][..], Vec::as_slice);
    let all = functions
        .iter()
        .flat_map(|f| f["workers"].as_array().into_iter().flatten());
    let pids: Vec<i64> = workers.iter().map(|w| i64::from(w.host_pid)).collect();
    let mut ours = all.filter(|w| w["pid"].as_i64().is_some_and(|pid| pids.contains(&pid)));
    Ok(ours.all(|w| w["observed"] == true))
}

fn as_asked_for(
    heir: &Agent,
    node: &crate::Node,
    function: &str,
    act: Act,
    workers: &[WorkerInfo],
) -> Result<()> {
    if let Act::Observe | Act::Leave = act {
        let on = act == Act::Observe;
        ensure!(observed(heir, workers)? == on, "observed is not {on}");
        return Ok(());
    }
    let status = heir.edge_status(node, function, "Bar")?;
    let all = status["workers"].as_array().cloned().unwrap_or_default();
    let fused = act == Act::Patch;
    let good = |worker: &Value| {
        let graft = &worker["graft"];
        graft["gate_on"] == fused && graft["windows_in_place"] == fused
    };
    ensure!(
        all.len() == workers.len() && all.iter().all(good),
        "after {act:?} it is not as asked for: {status}"
    );
    Ok(())
}
