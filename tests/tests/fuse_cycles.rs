//! Patched and reverted over and over at full load: no request fails or gets a
//! wrong answer, and nothing of it adds up in the worker or in the agent.

mod common;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::{ask, foo_bar_baz};
use nightgraft_testbed::load::{Load, LoadSpec, random_input};
use nightgraft_testbed::{Agent, NestedMode, Node, WorkerInfo, until};
use serde_json::Value;

/// Resident memory may waver by so much: the C library's own caches, and pages
/// of the arena that were not touched before.
const WAVERING_KIB: u64 = 2_048;

/// How often the node's own limit of 100 ms may end a nested call, where it
/// has one: a machine that others use as well can be away for that long.
const MOST_TIMEOUTS: u64 = 3;

/// What must not grow. Taken while the worker is idle.
#[derive(Debug, PartialEq, Eq)]
struct Size {
    mappings: usize,
    descriptors: usize,
    threads: usize,
    mapped_bytes: u64,
}

fn entries(path: &str) -> Result<usize> {
    Ok(fs::read_dir(path).with_context(|| path.to_owned())?.count())
}

fn resident_kib(worker: &WorkerInfo) -> Result<u64> {
    let text = worker.status("VmRSS").context("VmRSS")?;
    Ok(text.split_whitespace().next().context("KiB")?.parse()?)
}

fn size(agent: &Agent, node: &Node, worker: &WorkerInfo) -> Result<Size> {
    until("the worker is idle", || worker.waits_for_request());
    let pid = worker.host_pid;
    let status = agent.edge_status(node, "Foo", "Bar")?;
    let of_us = status["workers"].as_array().into_iter().flatten();
    let of_us = of_us.into_iter().find(|w| w["pid"] == pid);
    Ok(Size {
        mappings: fs::read_to_string(format!("/proc/{pid}/maps"))?
            .lines()
            .count(),
        descriptors: entries(&format!("/proc/{pid}/fd"))?,
        threads: entries(&format!("/proc/{pid}/task"))?,
        mapped_bytes: of_us.and_then(|w| w["mapped_bytes"].as_u64()).unwrap_or(0),
    })
}

/// That an operation did the same to both workers.
fn both(report: &Value, outcome: &str) -> Result<()> {
    let workers = report["workers"].as_array().context("workers")?;
    ensure!(
        workers.len() == 2 && workers.iter().all(|w| w["outcome"]["outcome"] == outcome),
        "not all are {outcome}: {report}"
    );
    Ok(())
}

fn patch(agent: &Agent, node: &Node) -> Result<Value> {
    let (code, report) = agent.patch_unwatched(node, "Foo", "Bar")?;
    ensure!(code == 200, "{code}: {report}");
    both(&report, "fused")?;
    Ok(report)
}

fn revert(agent: &Agent, node: &Node) -> Result<()> {
    let (code, report) = agent.try_revert(node, "Foo", "Bar")?;
    ensure!(code == 200, "{code}: {report}");
    both(&report, "restored")
}

/// How a run is loaded, and for how many cycles.
struct Run {
    mode: NestedMode,
    cycles: usize,
    /// Connections with inputs that are answered at once, and such that keep
    /// Bar at work for 3 ms.
    quick: usize,
    slow: usize,
}

impl Run {
    /// Nested calls that the node itself has given up, which Foo tells as an
    /// answer; none where they may take as long as they like.
    fn timeouts(&self, node: &Node) -> u64 {
        match self.mode {
            NestedMode::Read => 0,
            NestedMode::Fifo => node.all_logs().matches("no answer within 100 ms").count() as u64,
        }
    }
}

fn cycle(run: &Run) -> Result<()> {
    let node = Node::start(foo_bar_baz(2).nested_mode(run.mode))?;
    let agent = Agent::start()?;
    let workers = node.workers("Foo")?;
    let quick = LoadSpec::foo(node.http_port(), run.quick);
    let slow = LoadSpec {
        connections: run.slow,
        seed: 2,
        input: Arc::new(|random| [b"slow 3 ", random_input(random, 20).as_slice()].concat()),
        ..quick.clone()
    };
    // Of all kinds once, so that what they allocate is there: by RPC, and fused.
    let every_kind = || -> Result<()> {
        for spec in [&quick, &slow] {
            let load = Load::start(spec)?;
            std::thread::sleep(Duration::from_millis(300));
            load.stop().all_correct()?;
        }
        Ok(())
    };
    // The first cycle brings the image, the callee's initialisation, and memory
    // for the outputs of fused calls.
    patch(&agent, &node)?;
    agent.warm_up(&node, "Foo", "Bar")?;
    every_kind()?;
    revert(&agent, &node)?;
    every_kind()?;
    let sizes = |what: &str| -> Result<Vec<Size>> {
        let all = workers.iter().map(|w| size(&agent, &node, w));
        all.collect::<Result<_>>().with_context(|| what.to_owned())
    };
    let first = sizes("after the first cycle")?;
    ensure!(first.iter().all(|s| s.mapped_bytes > 0), "{first:?}");
    let resident = workers
        .iter()
        .map(resident_kib)
        .collect::<Result<Vec<_>>>()?;
    let of_agent = format!("/proc/{}/fd", agent.pid());
    let descriptors = entries(&of_agent)?;
    let fused_before = agent.fused_calls(&node, "Foo", "Bar")?;

    let loads = [Load::start(&quick)?, Load::start(&slow)?];
    let begun = Instant::now();
    for number in 0..run.cycles {
        (|| -> Result<()> {
            let report = patch(&agent, &node)?;
            for worker in report["workers"].as_array().into_iter().flatten() {
                ensure!(worker["receipt"]["image_reused"] == true, "{report}");
            }
            // Sometimes at once, sometimes when fused calls have run.
            std::thread::sleep(Duration::from_millis(number as u64 % 4));
            revert(&agent, &node)
        })()
        .with_context(|| format!("cycle {number}\n{}", tail(&agent.log())))?;
        if number % 50 == 0 {
            for load in &loads {
                let report = load.snapshot();
                ensure!(
                    report.failed == 0 && report.wrong <= run.timeouts(&node),
                    "by cycle {number}: {report:?}"
                );
            }
        }
    }
    let took = begun.elapsed();
    let mut wrong = 0;
    for load in loads {
        let report = load.stop();
        println!("{:?}: {report:?}", run.mode);
        ensure!(report.failed == 0 && report.correct > 0, "{report:?}");
        ensure!(report.wrong <= run.timeouts(&node), "{report:?}");
        wrong += report.wrong;
    }
    ensure!(wrong == run.timeouts(&node), "{wrong} answers are wrong");
    ensure!(wrong <= MOST_TIMEOUTS, "{wrong} calls timed out");
    println!("{:?}: {} cycles in {took:.1?}", run.mode, run.cycles);
    let fused = agent.fused_calls(&node, "Foo", "Bar")? - fused_before;
    ensure!(
        fused as usize > run.cycles,
        "{fused} calls only ran fused in {} cycles",
        run.cycles
    );

    assert_eq!(sizes("after the last cycle")?, first);
    for (worker, before) in workers.iter().zip(resident) {
        ensure!(worker.is_alive(), "worker {} has died", worker.host_pid);
        assert_eq!(worker.status("TracerPid").as_deref(), Some("0"));
        let after = resident_kib(worker)?;
        ensure!(
            after <= before + WAVERING_KIB,
            "resident memory grew from {before} to {after} KiB"
        );
    }
    until("the agent has closed what it opened", || {
        entries(&of_agent).is_ok_and(|now| now <= descriptors)
    });
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    assert_eq!(node.workers("Foo")?, workers, "the workers are other ones");
    node.stop()
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().rev().take(20).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

#[test]
fn five_hundred_cycles_at_full_load_lose_nothing_and_leave_nothing() -> Result<()> {
    cycle(&Run {
        mode: NestedMode::Read,
        cycles: 450,
        quick: 4,
        slow: 2,
    })?;
    // A nested call through FIFOs fails by itself after 100 ms, so that here
    // nobody waits long for a processor.
    cycle(&Run {
        mode: NestedMode::Fifo,
        cycles: 50,
        quick: 1,
        slow: 1,
    })
}
