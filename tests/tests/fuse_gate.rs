//! The gate: one byte, and nobody is stopped for it.

mod common;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use common::{ask, foo_bar_baz};
use nightgraft_patcher::session::{self, Function};
use nightgraft_testbed::{Agent, Node, fixtures};
use nix::sys::ptrace;
use nix::unistd::Pid;

#[test]
fn a_gate_is_turned_in_a_worker_that_nobody_else_could_stop() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    let pid = node.workers("Foo")?[0].host_pid;
    std::thread::scope(
        |scope| match scope.spawn(|| held(&node, &agent, pid)).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        },
    )?;
    node.stop()
}

fn held(node: &Node, agent: &Agent, pid: i32) -> Result<()> {
    // A thread has one tracer: who holds the worker, running, keeps everyone
    // from stopping it. It is let go of when
    // the thread that holds it ends.
    ptrace::seize(Pid::from_raw(pid), ptrace::Options::empty())?;
    let refused = agent.edge(node, "revert", "Foo", "Bar")?;
    ensure!(refused.code == 1, "{refused:?}");

    let worker = Function {
        pid,
        start_time: start_time(pid)?,
        library: Path::new("/functions/libfoo.so"),
    };
    for on in [true, false, true, false] {
        let set = session::set_gate(worker, "Bar", on)?;
        ensure!(set, "there is no such edge");
        let before = agent.fused_calls(node, "Foo", "Bar")?;
        assert_eq!(
            ask(node, "Foo", "hello").into_bytes(),
            fixtures::foo(b"hello")
        );
        let fused = agent.fused_calls(node, "Foo", "Bar")? - before;
        assert_eq!(fused, u64::from(on), "with the gate {on}");
    }
    ensure!(
        !session::set_gate(worker, "Baz", false)?,
        "an edge that is not fused has no gate"
    );
    let stranger = Function {
        start_time: worker.start_time + 1,
        ..worker
    };
    ensure!(
        session::set_gate(stranger, "Bar", true).is_err(),
        "another process with this pid is not the worker"
    );
    Ok(())
}

fn start_time(pid: i32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    Ok(fields
        .split_whitespace()
        .nth(19)
        .context("no start time in stat")?
        .parse()?)
}
