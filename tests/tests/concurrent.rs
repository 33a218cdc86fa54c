//! Many at once: requests to one agent, and two agents. There is one order, and
//! no mixture.

mod common;

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use common::{ask, foo_bar_baz};
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{Agent, Node};
use serde_json::Value;

/// Requests that are sent to the socket at once.
const REQUESTS: usize = 100;
/// How often two agents meet.
const MEETINGS: usize = 12;

/// `Some(true)` if all workers are fused, `Some(false)` if none is.
fn fused(agent: &Agent, node: &Node) -> Result<Option<bool>> {
    let status = agent.edge_status(node, "Foo", "Bar")?;
    let workers = status["workers"].as_array().context("no edge")?;
    let states: BTreeSet<(bool, bool)> = workers
        .iter()
        .map(|worker| {
            let is = |field: &str| worker["graft"][field] == true;
            (is("gate_on"), is("windows_in_place"))
        })
        .collect();
    Ok(match states.into_iter().collect::<Vec<_>>()[..] {
        [(true, true)] => Some(true),
        [(false, false)] => Some(false),
        _ => None,
    })
}

/// Outcomes of all workers; they must be one.
fn outcome(answer: &(u16, Value)) -> Result<String> {
    let (code, body) = answer;
    ensure!(*code == 200, "{code}: {body}");
    let workers = body["workers"].as_array().context("workers")?;
    let outcomes: BTreeSet<String> = workers
        .iter()
        .map(|worker| worker["outcome"]["outcome"].to_string())
        .collect();
    ensure!(outcomes.len() == 1, "a mixture: {body}");
    Ok(outcomes.into_iter().next().unwrap_or_default())
}

fn both(agents: [&Agent; 2], node: &Node) -> Result<[(u16, Value); 2]> {
    std::thread::scope(|scope| {
        let patch = scope.spawn(|| agents[0].patch_unwatched(node, "Foo", "Bar"));
        let revert = scope.spawn(|| agents[1].try_revert(node, "Foo", "Bar"));
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<(u16, Value)>>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        Ok([join(patch)?, join(revert)?])
    })
}

fn meet(agents: [&Agent; 2]) -> Result<()> {
    let node = Node::start(foo_bar_baz(2))?;
    agents[0].patch(&node, "Foo", "Bar")?;
    let load = Load::start(&LoadSpec::foo(node.http_port(), 3))?;
    for meeting in 0..MEETINGS {
        let was = fused(agents[0], &node)?;
        let was = was.with_context(|| format!("meeting {meeting}: a mixture"))?;
        let [patch, revert] = both(agents, &node)?;
        let outcomes = (outcome(&patch)?, outcome(&revert)?);
        let is = fused(agents[1], &node)?;
        // The patch first, then the revert; or the other way round.
        let patched = if was { "\"already\"" } else { "\"fused\"" };
        let first = (patched.to_owned(), "\"restored\"".to_owned());
        let reverted = if was { "\"restored\"" } else { "\"nothing\"" };
        let second = ("\"fused\"".to_owned(), reverted.to_owned());
        ensure!(
            outcomes == first && is == Some(false) || outcomes == second && is == Some(true),
            "meeting {meeting}: fused {was}, then {outcomes:?}, then fused {is:?}"
        );
    }
    agents[0].revert(&node, "Foo", "Bar")?;
    load.stop().all_correct()?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    node.stop()
}

#[test]
fn a_patch_and_a_revert_at_once_follow_one_another() -> Result<()> {
    let agent = Agent::start()?;
    meet([&agent, &agent])
}

#[test]
fn two_agents_at_once_follow_one_another() -> Result<()> {
    let (one, other) = (Agent::start()?, Agent::start()?);
    meet([&one, &other])
}

#[test]
fn a_hundred_requests_at_once_are_all_answered_in_one_order() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    let load = Load::start(&LoadSpec::foo(node.http_port(), 2))?;
    let answers: Vec<(usize, Result<(u16, Value)>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..REQUESTS)
            .map(|number| {
                let (agent, node) = (&agent, &node);
                scope.spawn(move || {
                    let answer = match number % 4 {
                        0 => agent.patch_unwatched(node, "Foo", "Bar"),
                        1 => agent.try_revert(node, "Foo", "Bar"),
                        2 => agent.get("/v1/status").map(|body| (200, body)),
                        _ => agent.get("/v1/health").map(|body| (200, body)),
                    };
                    (number, answer)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    });
    let (mut patched, mut reverted) = (0_usize, 0_usize);
    for (number, answer) in answers {
        let answer = answer.with_context(|| format!("request {number}"))?;
        if number % 4 > 1 {
            continue;
        }
        match outcome(&answer)
            .with_context(|| format!("request {number}"))?
            .as_str()
        {
            "\"fused\"" => patched += 1,
            "\"restored\"" => reverted += 1,
            "\"already\"" | "\"nothing\"" => {}
            other => anyhow::bail!("request {number}: {other}"),
        }
    }
    // It was fused at first: in any order fusing and reverting alternate.
    let is = fused(&agent, &node)?.context("a mixture")?;
    assert_eq!(reverted, patched + usize::from(!is), "fused now: {is}");
    agent.revert(&node, "Foo", "Bar")?;
    load.stop().all_correct()?;
    node.stop()
}
