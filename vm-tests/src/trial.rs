//! What is tried: the whole way of a patch, under load, with agents that die
//! in the middle of it; the same natively and in a guest.
//!
//! ```text
//! node with two workers each of Foo and Bar, load
//!   patch: all calls fused ─ revert: none ─ patch again
//!   agents killed while they patch and revert; the next one finds its way
//! no request failed, no answer wrong, every worker still the same process
//! ```
//!
//! Where nobody may trace (Yama's scope 3) the agent must say just that, and
//! the workers must be as they were.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::load::{Load, LoadSpec, Random};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, bin};
use serde_json::{Value, json};

use crate::probes::Probes;
use crate::verdict::Verdict;

/// Of the node, on an emulated processor.
const START_WITHIN: Duration = Duration::from_secs(120);
/// For what takes an instant where it works.
const SOON: Duration = Duration::from_secs(60);
/// Connections of the load: as many as Foo has workers, and one to wait.
const CONNECTIONS: usize = 3;
/// Between two requests of a connection: an emulated processor that does
/// nothing but serve leaves none for the agent.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a patch may watch a worker; it ends as soon as the worker proves
/// well.
const CANARY_WAIT: &str = "30s";
/// What the agent says where nobody may trace.
const TRACING_FORBIDDEN: &str = "tracing-forbidden";

/// How the trial runs.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the functions' libraries are; else they are compiled.
    pub functions: Option<PathBuf>,
    /// Containers with overlay roots.
    pub overlay: bool,
    /// Forbid tracing for good once the node serves (Yama's scope 3; where
    /// there is no Yama it cannot be done, and is not).
    pub forbid_tracing: bool,
    /// The same seed, the same moments at which agents die.
    pub seed: u64,
    /// ptrace-shim's tests, to be run instead.
    pub stops: Option<PathBuf>,
}

/// Runs it, and says what came of it.
pub fn run(options: &Options) -> Verdict {
    let since = Instant::now();
    let probes = Probes::read();
    println!("found: {probes:?}");
    let result = if let Some(program) = &options.stops {
        stops(program, probes.cpus).map(|()| json!({"outcome": "stops"}))
    } else if options.forbid_tracing && probes.yama.is_some() {
        refused(options).map(|()| json!({"outcome": TRACING_FORBIDDEN}))
    } else {
        patched(options)
    };
    let (error, seen) = match result {
        Ok(seen) => (None, seen),
        Err(error) => (Some(format!("{error:#}")), Value::Null),
    };
    Verdict {
        kernel: probes.kernel.clone(),
        passed: error.is_none(),
        error,
        seen: json!({"found": probes, "trial": seen}),
        seconds: since.elapsed().as_secs(),
    }
}

/// Says how far the trial is; on a console that is all there is to see.
fn step(what: &str, since: Instant) {
    println!("{:6.1} s: {what}", since.elapsed().as_secs_f64());
}

fn library(options: &Options, stem: &str) -> Result<PathBuf> {
    match &options.functions {
        Some(folder) => Ok(folder.join(format!("lib{stem}.so"))),
        None => fixtures::compile(&format!("{stem}.c"), Compiler::Gcc, &["-O2"]),
    }
}

fn node(options: &Options) -> Result<Node> {
    let mut spec = NodeSpec::new([
        FunctionSpec::new("Foo", 1, library(options, "foo")?).workers(2, 2),
        FunctionSpec::new("Bar", 2, library(options, "bar")?).workers(2, 2),
    ]);
    spec.start_within = START_WITHIN;
    spec.overlay_roots = options.overlay;
    Node::start(spec)
}

/// All workers' processes.
fn workers(node: &Node) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for function in ["Foo", "Bar"] {
        pids.extend(node.workers(function)?.iter().map(|w| w.host_pid));
    }
    pids.sort_unstable();
    ensure!(pids.len() == 4, "workers: {pids:?}");
    Ok(pids)
}

/// No worker is left stopped or traced.
fn untouched(node: &Node) -> Result<()> {
    for worker in node.workers("Foo")? {
        let status = |name: &str| {
            let found = worker.status(name);
            found.with_context(|| format!("worker {} is gone", worker.host_pid))
        };
        let (tracer, state) = (status("TracerPid")?, status("State")?);
        ensure!(
            tracer == "0" && !state.starts_with(['t', 'T']),
            "worker {} is traced by {tracer}, state {state}",
            worker.host_pid
        );
    }
    Ok(())
}

fn load(node: &Node) -> Result<Load> {
    let mut spec = LoadSpec::foo(node.http_port(), CONNECTIONS);
    spec.timeout = SOON;
    let make = spec.input;
    spec.input = Arc::new(move |random| {
        std::thread::sleep(PAUSE);
        make(random)
    });
    Load::start(&spec)
}

/// Waits until the load has got `more` answers, which is to say that requests
/// are served.
fn served(load: &Load, more: u64) -> Result<()> {
    let deadline = Instant::now() + SOON;
    let before = load.snapshot().requests();
    while load.snapshot().requests() < before + more {
        ensure!(
            Instant::now() < deadline,
            "requests are not served: {:?}",
            load.snapshot()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Fuses Foo → Bar in both workers, each of which proves well.
fn patch(agent: &Agent, node: &Node, canary_wait: &str) -> Result<Value> {
    let engine = node.engine_pid().to_string();
    let answer = agent.ctl(&[
        "patch",
        "Foo",
        "Bar",
        "--engine",
        &engine,
        "--json",
        "--canary-wait",
        canary_wait,
    ])?;
    ensure!(answer.code == 0, "patch: {answer:?}");
    answer.json()
}

/// What the counters say of Foo → Bar: calls fused, calls by RPC.
fn counted(agent: &Agent, node: &Node) -> Result<(u64, u64)> {
    let status = agent.edge_status(node, "Foo", "Bar")?;
    let number = |name: &str| {
        let value = status["totals"][name].as_u64();
        value.with_context(|| format!("no {name} in {status}"))
    };
    Ok((number("fused_calls")?, number("rpc_calls")?))
}

/// Whether, under load, all calls of `more` requests run fused. Calls that were
/// in flight when the gate was turned may have gone the other way: they are
/// over when that many requests are.
fn all_fused(agent: &Agent, node: &Node, load: &Load) -> Result<u64> {
    agent.warm_up(node, "Foo", "Bar")?;
    served(load, 2 * CONNECTIONS as u64)?;
    let (fused, rpc) = counted(agent, node)?;
    served(load, 20)?;
    let (fused_now, rpc_now) = counted(agent, node)?;
    ensure!(
        fused_now >= fused + 10,
        "{} calls ran fused in 20 requests",
        fused_now - fused
    );
    ensure!(
        rpc_now == rpc,
        "{} calls took the RPC while the edge was fused",
        rpc_now - rpc
    );
    Ok(fused_now - fused)
}

fn none_fused(agent: &Agent, node: &Node, load: &Load) -> Result<()> {
    served(load, 2 * CONNECTIONS as u64)?;
    let before = agent.fused_calls(node, "Foo", "Bar")?;
    served(load, 20)?;
    let after = agent.fused_calls(node, "Foo", "Bar")?;
    ensure!(
        before == after,
        "{} calls ran fused after the revert",
        after - before
    );
    Ok(())
}

fn patched(options: &Options) -> Result<Value> {
    let since = Instant::now();
    let node = node(options)?;
    let pids = workers(&node)?;
    step("the node serves", since);
    let load = load(&node)?;
    served(&load, 20)?;

    let mut agent = Agent::start()?;
    step("the agent answers", since);
    let result = cycle(options, &node, &load, &mut agent)
        .with_context(|| format!("{:?}; the agent: {}", load.snapshot(), agent.log()));
    let seen = match result {
        Ok(seen) => seen,
        Err(error) => return Err(error.context(node.all_logs())),
    };
    let report = load.stop();
    report.all_correct()?;
    ensure!(workers(&node)? == pids, "not the same workers any more");
    untouched(&node)?;
    node.stop()?;
    step("done", since);
    Ok(json!({
        "outcome": "patched",
        "requests": report.requests(),
        "failed": report.failed,
        "wrong": report.wrong,
        "agents": seen,
    }))
}

/// The whole way, twice, and in between agents that are killed: the first one
/// in its very first patch, which maps and fills; the others where all that is
/// left to do is to turn it on or off.
fn cycle(options: &Options, node: &Node, load: &Load, agent: &mut Agent) -> Result<Value> {
    let since = Instant::now();
    let mut random = Random::new(options.seed);
    let mut killed = |least: f64, most: f64, scale: Duration| {
        scale.mul_f64(least + (most - least) * random.below(1000) as f64 / 1000.0)
    };
    // Most of a patch is its plan, one for each of the two workers.
    let explained = Instant::now();
    let answer = agent.edge(node, "explain", "Foo", "Bar")?;
    ensure!(answer.code == 0, "explain: {answer:?}");
    let moment = killed(0.5, 2.5, explained.elapsed());
    let mut unfinished = usize::from(death(node, load, agent, "patch", moment)?);
    step("an agent was killed in the first patch", since);

    let mut seen = Vec::new();
    let mut took = [Duration::ZERO; 2];
    for round in ["patched", "patched again"] {
        let patch = patch(agent, node, CANARY_WAIT)?;
        step(round, since);
        let calls = all_fused(agent, node, load)?;
        step("all calls are fused", since);
        let receipt = &patch["workers"][0]["receipt"];
        seen.push(json!({
            "stops_ns": receipt["stops_ns"],
            "commit_stop_ns": receipt["commit_stop_ns"],
            "fused_calls": calls,
        }));
        let began = Instant::now();
        agent.revert(node, "Foo", "Bar")?;
        took[1] = began.elapsed();
        none_fused(agent, node, load)?;
        untouched(node)?;
        step("reverted", since);
    }

    let began = Instant::now();
    patch(agent, node, "0ms")?;
    took[0] = began.elapsed();
    agent.revert(node, "Foo", "Bar")?;
    for command in ["patch", "revert"] {
        let moment = killed(0.2, 1.0, took[usize::from(command == "revert")]);
        unfinished += usize::from(death(node, load, agent, command, moment)?);
        patch(agent, node, CANARY_WAIT)
            .with_context(|| format!("after the death of a {command}"))?;
        all_fused(agent, node, load)?;
        step(&format!("an agent was killed in a {command}"), since);
    }
    agent.revert(node, "Foo", "Bar")?;
    none_fused(agent, node, load)?;
    step("reverted", since);
    Ok(json!({"patches": seen, "agents_killed_before_they_were_done": unfinished}))
}

/// Kills the agent so long after it was asked for something, and starts
/// another. Gives whether it died before it was done.
fn death(
    node: &Node,
    load: &Load,
    agent: &mut Agent,
    command: &str,
    moment: Duration,
) -> Result<bool> {
    let mut child = Command::new(bin("agentctl")?)
        .args([command, "Foo", "Bar", "--canary-wait", "0ms"])
        .args(["--engine", &node.engine_pid().to_string()])
        .env("NIGHTGRAFT_SOCKET", agent.socket())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    std::thread::sleep(moment);
    agent.kill()?;
    let unfinished = !child.wait()?.success();
    // What a dead agent leaves, before another one can have put it right.
    untouched(node)?;
    served(load, 2 * CONNECTIONS as u64)?;
    *agent = Agent::start()?;
    Ok(unfinished)
}

/// Where a worker's code is mapped. (What it maps for large messages comes and
/// goes.)
fn code(pid: &i32) -> Result<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let is_code = |line: &&str| {
        let access = line.split(' ').nth(1);
        access.is_some_and(|access| access.contains('x'))
    };
    Ok(maps.lines().filter(is_code).collect::<Vec<_>>().join("\n"))
}

/// Nobody may trace: the agent says so and leaves everyone alone.
fn refused(options: &Options) -> Result<()> {
    let since = Instant::now();
    let node = node(options)?;
    let pids = workers(&node)?;
    let load = load(&node)?;
    served(&load, 20)?;
    let before: Vec<String> = pids.iter().map(code).collect::<Result<_>>()?;
    // Not before: that workers are idle is told from what only who may trace
    // them can read.
    std::fs::write("/proc/sys/kernel/yama/ptrace_scope", "3").context("forbidding to trace")?;
    let agent = Agent::start()?;
    for command in ["explain", "patch"] {
        let answer = agent.edge(&node, command, "Foo", "Bar")?;
        let code = answer.error_code();
        ensure!(
            answer.code == 1 && code == TRACING_FORBIDDEN,
            "{command} where nobody may trace: {answer:?}"
        );
        step(
            &format!("{command} is refused: {}", answer.stdout.trim()),
            since,
        );
    }
    untouched(&node)?;
    served(&load, 20)?;
    load.stop().all_correct()?;
    let after: Vec<String> = pids.iter().map(code).collect::<Result<_>>()?;
    ensure!(
        before == after,
        "the workers' code is mapped otherwise: {before:?}, then {after:?}"
    );
    ensure!(workers(&node)? == pids, "not the same workers any more");
    node.stop()
}

/// ptrace-shim's own tests of stops: threads in every kind of call, signals,
/// ends, and tracers that are killed at each of their steps.
fn stops(program: &Path, threads: usize) -> Result<()> {
    let mut child = Command::new(program)
        .args(["--test-threads", &threads.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} cannot be started", program.display()))?;
    let mut failures = String::new();
    let stdout = child.stdout.take().context("its output is not piped")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        // What failed and why stands behind this line; a console is not what
        // people have who read of it somewhere else.
        if line == "failures:" || !failures.is_empty() {
            failures.push_str(&line);
            failures.push('\n');
        }
    }
    let status = child.wait()?;
    ensure!(
        status.success(),
        "ptrace-shim's tests: {status}: {failures}"
    );
    Ok(())
}
