//! The main job in Docker's containers: fused and reverted under load.
//!
//! Needs Docker's daemon, running or installed. Where there is neither, the
//! test says so and passes, unless `NIGHTGRAFT_REQUIRE_DOCKER` is set: then it
//! fails.

mod common;

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use common::{ask, foo_bar_baz};
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{Agent, Node, RuntimeKind};

fn docker_is_here() -> bool {
    let installed = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|d| d.join("dockerd").exists()));
    let here = installed || Path::new("/var/run/docker.sock").exists();
    let required = std::env::var_os("NIGHTGRAFT_REQUIRE_DOCKER").is_some();
    assert!(
        here || !required,
        "docker is required, and neither running nor installed"
    );
    if !here {
        println!("SKIP: docker is neither running nor installed (package docker.io)");
    }
    here
}

#[test]
fn workers_in_docker_are_fused_and_reverted_under_load() -> Result<()> {
    if !docker_is_here() {
        return Ok(());
    }
    let node = Node::start(foo_bar_baz(2).runtime(RuntimeKind::Docker))?;
    let agent = Agent::start()?;
    let pids =
        || -> Result<Vec<i32>> { Ok(node.workers("Foo")?.iter().map(|w| w.host_pid).collect()) };
    let before = pids()?;
    let by_rpc = ask(&node, "Foo", "host");
    let load = Load::start(&LoadSpec::foo(node.http_port(), 4))?;
    std::thread::sleep(Duration::from_millis(300));

    for round in 0..3 {
        let patched = agent.patch(&node, "Foo", "Bar")?;
        let workers = patched["workers"].as_array().cloned().unwrap_or_default();
        ensure!(workers.len() == 2, "{patched}");
        let container = node.container("Foo")?.id;
        for worker in &workers {
            ensure!(worker["outcome"]["outcome"] == "fused", "{patched}");
            ensure!(
                worker["receipt"]["image_reused"] == (round > 0),
                "round {round}: {patched}"
            );
            let short = worker["container"].as_str().unwrap_or_default();
            ensure!(
                !short.is_empty() && container.starts_with(short),
                "{short:?} is not {container}"
            );
        }
        agent.warm_up(&node, "Foo", "Bar")?;
        let calls = agent.fused_calls(&node, "Foo", "Bar")?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(
            agent.fused_calls(&node, "Foo", "Bar")? > calls,
            "no call runs fused"
        );
        ensure!(
            ask(&node, "Foo", "host") != by_rpc,
            "Bar does not run in Foo's container"
        );

        let reverted = agent.revert(&node, "Foo", "Bar")?;
        for worker in reverted["workers"].as_array().into_iter().flatten() {
            ensure!(worker["outcome"]["outcome"] == "restored", "{reverted}");
        }
        assert_eq!(ask(&node, "Foo", "host"), by_rpc);
        let calls = agent.fused_calls(&node, "Foo", "Bar")?;
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(
            agent.fused_calls(&node, "Foo", "Bar")?,
            calls,
            "after the revert calls still run fused"
        );
    }
    load.stop().all_correct()?;
    assert_eq!(pids()?, before, "the workers are the same ones");
    node.stop()
}
