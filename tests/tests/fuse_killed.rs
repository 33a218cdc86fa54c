//! The agent is killed while it patches and reverts, under load: no request
//! notices, and the next agent finds its way.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::{ask, foo_bar_baz};
use nightgraft_testbed::load::{Load, LoadSpec, Random};
use nightgraft_testbed::{Agent, Node, bin, fixtures};

/// Agents that die.
const DEATHS: usize = 24;

#[test]
fn an_agent_that_is_killed_at_any_moment_leaves_nothing_that_hurts() -> Result<()> {
    let node = Node::start(foo_bar_baz(2))?;
    let load = Load::start(&LoadSpec::foo(node.http_port(), 3))?;
    let mut random = Random::new(7);
    let mut took = Duration::from_millis(100);
    let mut unfinished = 0;
    // All but some agents inherit the journal of the one before.
    let states = tempfile::tempdir()?;
    for death in 0..DEATHS {
        let command = if death % 3 == 2 { "revert" } else { "patch" };
        let state = states.path().join((death / 5).to_string());
        let mut agent = Agent::start_in(&state)?;
        let mut child = Command::new(bin("agentctl")?)
            .args([command, "Foo", "Bar", "--canary-wait", "0ms"])
            .args(["--engine", &node.engine_pid().to_string()])
            .env("NIGHTGRAFT_SOCKET", agent.socket())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        // Most of the time is planning; what touches workers comes late.
        let until = took.mul_f64(random.below(120) as f64 / 100.0);
        std::thread::sleep(until);
        agent.kill()?;
        unfinished += usize::from(!child.wait()?.success());

        let heir = Agent::start_in(&state)?;
        untraced(&node)?;
        let since = Instant::now();
        heir.patch(&node, "Foo", "Bar")
            .with_context(|| format!("death {death}, {command}, after {until:?}"))?;
        took = since.elapsed().min(Duration::from_secs(2));
        if death % 2 == 0 {
            heir.revert(&node, "Foo", "Bar")?;
        }
        ensure!(
            load.snapshot().failed == 0,
            "death {death}, {command}, after {until:?}: {:?}",
            load.snapshot().complaints
        );
    }
    ensure!(
        unfinished > DEATHS / 4,
        "only {unfinished} of {DEATHS} agents died before they were done"
    );
    let heir = Agent::start()?;
    heir.patch(&node, "Foo", "Bar")?;
    heir.warm_up(&node, "Foo", "Bar")?;
    let calls = heir.fused_calls(&node, "Foo", "Bar")?;
    std::thread::sleep(Duration::from_millis(200));
    ensure!(
        heir.fused_calls(&node, "Foo", "Bar")? > calls,
        "nothing runs fused in the end"
    );
    heir.revert(&node, "Foo", "Bar")?;
    assert_eq!(
        ask(&node, "Foo", "hello").into_bytes(),
        fixtures::foo(b"hello")
    );
    load.stop().all_correct()?;
    node.stop()
}

/// No worker is left stopped or traced.
fn untraced(node: &Node) -> Result<()> {
    for worker in node.workers("Foo")? {
        let tracer = worker.status("TracerPid").context("the worker is gone")?;
        ensure!(
            tracer == "0",
            "worker {} is traced by {tracer}",
            worker.host_pid
        );
        let state = worker.status("State").context("the worker is gone")?;
        ensure!(
            !state.starts_with(['t', 'T']),
            "worker {} is stopped: {state}",
            worker.host_pid
        );
    }
    Ok(())
}
