//! Observing workers: the graph is what was called, to the call, whatever is
//! fused, reverted, started again or ended meanwhile.

mod code;
mod common;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use code::Code;
use common::{ask, foo_bar_baz};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use serde_json::{Value, json};

/// How long something may take that happens within a second or two.
const SOON: Duration = Duration::from_secs(20);

fn observe(agent: &Agent, node: &Node, on: bool, functions: &[&str]) -> Result<Value> {
    let engine = node.engine_pid();
    let request = json!({"on": on, "functions": functions, "engine": engine});
    let (code, report) = agent.post("/v1/observe", &request)?;
    ensure!(code == 200, "{code}: {report}");
    Ok(report)
}

fn outcomes(report: &Value) -> Vec<&str> {
    let workers = report["workers"].as_array();
    let outcome = |w: &'static str| move |worker| Value::as_str(&Value::get(worker, w)?["outcome"]);
    workers.map_or_else(Vec::new, |all| {
        all.iter().filter_map(outcome("outcome")).collect()
    })
}

/// The node's part of the graph.
fn graph(agent: &Agent, node: &Node) -> Result<Value> {
    let mut graph = agent.get("/v1/graph")?;
    for what in ["nodes", "edges"] {
        let all = graph[what].as_array_mut().context("a list")?;
        all.retain(|one| one["engine"] == node.engine_pid());
    }
    Ok(graph)
}

/// One edge's numbers: calls by RPC, fused calls, errors, bytes in and out.
fn edge(graph: &Value, caller: &str, callee: &str) -> [u64; 5] {
    let edges = graph["edges"].as_array();
    let found = edges.and_then(|all| {
        all.iter()
            .find(|e| e["caller"] == caller && e["callee"] == callee)
    });
    [
        "rpc_calls",
        "fused_calls",
        "errors",
        "bytes_in",
        "bytes_out",
    ]
    .map(|field| found.map_or(0, |edge| edge[field].as_u64().unwrap_or(0)))
}

fn of_node<'a>(graph: &'a Value, function: &str) -> Option<&'a Value> {
    let nodes = graph["nodes"].as_array()?;
    nodes.iter().find(|node| node["function"] == function)
}

fn calls(graph: &Value, function: &str) -> u64 {
    of_node(graph, function).map_or(0, |node| node["calls"].as_u64().unwrap_or(0))
}

fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !done()? {
        ensure!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// What a round of questions adds to Foo → Bar, and to Bar → Baz.
fn round(node: &Node) -> ([u64; 3], u64) {
    let mut bytes = 0;
    for number in 0..200 {
        let input = format!("{number} times");
        bytes += input.len() as u64;
        ask(node, "Foo", &input);
    }
    let three = "three a bb ccc";
    ask(node, "Foo", three);
    ask(node, "Foo", "fail");
    ask(node, "Foo", "zero");
    ask(node, "Foo", "unknown name");
    ask(node, "Foo", "nested call");
    // 200, three, one that fails, one without input, and the nested one.
    ([206, 1, bytes + 6 + 4 + 11], 1)
}

#[test]
fn the_graph_counts_every_call_by_rpc_and_fused() -> Result<()> {
    let node = Node::start(foo_bar_baz(2))?;
    let agent = Agent::start()?;
    let workers = ["Foo", "Bar", "Baz"].map(|name| node.workers(name));
    let mut code = Vec::new();
    for worker in workers.into_iter().collect::<Result<Vec<_>, _>>()?.concat() {
        code.push(Code::of(worker.host_pid)?);
    }
    // Under load, half of the way.
    let load = Load::start(&LoadSpec::foo(node.http_port(), 2))?;
    std::thread::sleep(Duration::from_millis(300));
    let report = observe(&agent, &node, true, &[])?;
    ensure!(outcomes(&report) == ["observed"; 5], "{report}");
    std::thread::sleep(Duration::from_millis(300));
    let loaded = load.stop();
    ensure!(loaded.failed + loaded.wrong == 0, "{loaded:?}");

    let before = graph(&agent, &node)?;
    ensure!(edge(&before, "Foo", "Bar")[0] > 0, "{before}");
    let ([expected, errors, bytes], nested) = round(&node);
    let by_rpc = graph(&agent, &node)?;
    let more = |now: &Value, before: &Value, caller: &str, callee: &str| -> [u64; 5] {
        let (now, before) = (edge(now, caller, callee), edge(before, caller, callee));
        std::array::from_fn(|i| now[i] - before[i])
    };
    let found = more(&by_rpc, &before, "Foo", "Bar");
    ensure!(
        found[..4] == [expected, 0, errors, bytes],
        "{found:?} {by_rpc}"
    );
    ensure!(found[4] > 0, "no output: {by_rpc}");
    ensure!(
        more(&by_rpc, &before, "Bar", "Baz")[0] == nested,
        "{by_rpc}"
    );
    ensure!(
        more(&by_rpc, &before, "Foo", "NoSuchFunction")[..3] == [1, 0, 1],
        "{by_rpc}"
    );
    ensure!(
        calls(&by_rpc, "Foo") - calls(&before, "Foo") == 205,
        "{by_rpc}"
    );
    ensure!(
        calls(&by_rpc, "Bar") - calls(&before, "Bar") == expected,
        "{by_rpc}"
    );
    let missing = of_node(&by_rpc, "NoSuchFunction").context("its node")?;
    ensure!(missing["kind"].is_null(), "{missing}");
    let foo = of_node(&by_rpc, "Foo").context("its node")?;
    ensure!(
        foo["observed"] == 2 && foo["own"]["samples"].as_u64() > Some(0),
        "{foo}"
    );

    // Fused, the same edge goes on; what Bar calls is Bar's still.
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    let before = graph(&agent, &node)?;
    let ([expected, errors, bytes], nested) = round(&node);
    let fused = graph(&agent, &node)?;
    let found = more(&fused, &before, "Foo", "Bar");
    ensure!(
        found[..4] == [0, expected, errors, bytes],
        "{found:?} {fused}"
    );
    ensure!(more(&fused, &before, "Bar", "Baz")[0] == nested, "{fused}");
    ensure!(calls(&fused, "Bar") == calls(&before, "Bar"), "{fused}");
    ensure!(
        more(&fused, &before, "Foo", "NoSuchFunction")[0] == 1,
        "{fused}"
    );

    // Reverted, it stays observed; then left alone, the bytes are the library's.
    agent.revert(&node, "Foo", "Bar")?;
    let before = graph(&agent, &node)?;
    let ([expected, ..], _) = round(&node);
    let reverted = graph(&agent, &node)?;
    ensure!(
        more(&reverted, &before, "Foo", "Bar")[0] == expected,
        "{reverted}"
    );
    let report = observe(&agent, &node, false, &[])?;
    ensure!(outcomes(&report) == ["restored"; 5], "{report}");
    code.iter().try_for_each(Code::runs_the_same)?;
    let before = graph(&agent, &node)?;
    round(&node);
    let now = graph(&agent, &node)?;
    for (caller, callee) in [("Foo", "Bar"), ("Bar", "Baz"), ("Foo", "NoSuchFunction")] {
        ensure!(more(&now, &before, caller, callee) == [0; 5], "{now}");
    }
    ensure!(calls(&now, "Foo") == calls(&before, "Foo"), "{now}");
    node.stop()
}

#[test]
fn a_fused_edge_stays_when_observing_begins_and_ends() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    let fused = Code::of(node.workers("Foo")?[0].host_pid)?;
    let load = Load::start(&LoadSpec::foo(node.http_port(), 2))?;
    for _ in 0..5 {
        let on = observe(&agent, &node, true, &["foo"])?;
        ensure!(outcomes(&on) == ["observed"], "{on}");
        let again = observe(&agent, &node, true, &["Foo"])?;
        ensure!(outcomes(&again) == ["already"], "{again}");
        let off = observe(&agent, &node, false, &["Foo"])?;
        ensure!(outcomes(&off) == ["restored"], "{off}");
        let again = observe(&agent, &node, false, &["Foo"])?;
        ensure!(outcomes(&again) == ["already"], "{again}");
    }
    let report = load.stop();
    ensure!(report.failed + report.wrong == 0, "{report:?}");
    fused.runs_the_same()?;
    let before = agent.fused_calls(&node, "Foo", "Bar")?;
    ask(&node, "Foo", "hello");
    ensure!(agent.fused_calls(&node, "Foo", "Bar")? == before + 1);
    // Nor does the one take away what the other needs, whichever ends first.
    observe(&agent, &node, true, &["Foo"])?;
    agent.revert(&node, "Foo", "Bar")?;
    let before = edge(&graph(&agent, &node)?, "Foo", "Bar")[0];
    ask(&node, "Foo", "hello");
    ensure!(edge(&graph(&agent, &node)?, "Foo", "Bar")[0] == before + 1);
    node.stop()
}

/// Says whether a backtrace gets from here to where the program begins, and calls
/// Bar, which does not matter.
const TRACES: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <string.h>
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    struct context *ctx = worker_handle;
    void *frames[64];
    const char *output = NULL;
    size_t output_length = 0;
    const char *answer = "cut off";
    Dl_info info;
    ctx->invoke(ctx->caller_context, "Bar", input, length, &output, &output_length);
    int count = backtrace(frames, 64);
    for (int i = 0; i < count; i++) {
        if (dladdr(frames[i], &info) != 0 && info.dli_sname != NULL &&
            strstr(info.dli_sname, "libc_start_main") != NULL) {
            answer = "whole";
        }
    }
    ctx->append(ctx->caller_context, answer, strlen(answer));
    return 0;
}
"#;

#[test]
fn a_backtrace_passes_a_call_that_is_counted() -> Result<()> {
    let traces = fixtures::compile_text("traces", TRACES, Compiler::Gcc, &["-O2"])?;
    let bar = common::library("bar.c");
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Traces", 1, traces),
        FunctionSpec::new("Bar", 2, bar),
    ]))?;
    let agent = Agent::start()?;
    ensure!(ask(&node, "Traces", "x") == "whole");
    observe(&agent, &node, true, &["Traces"])?;
    for _ in 0..3 {
        let answer = ask(&node, "Traces", "x");
        ensure!(answer == "whole", "{answer}");
    }
    ensure!(calls(&graph(&agent, &node)?, "Traces") == 3);
    node.stop()
}

#[test]
fn an_agent_that_dies_and_a_redeployed_function_are_caught_up_with() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let state = tempfile::tempdir()?;
    let mut agent = Agent::start_in(state.path())?;
    observe(&agent, &node, true, &["Foo", "Bar"])?;
    round(&node);
    let before = graph(&agent, &node)?;
    agent.kill()?;
    // Counting goes on without an agent.
    let ([expected, ..], _) = round(&node);
    drop(agent);
    let agent = Agent::start_in(state.path())?;
    let now = graph(&agent, &node)?;
    let found = edge(&now, "Foo", "Bar")[0] - edge(&before, "Foo", "Bar")[0];
    ensure!(found == expected, "{found} of {expected}: {now}");

    // New workers are observed without being asked for; the old ones' calls count.
    let before = edge(&graph(&agent, &node)?, "Foo", "Bar")[0];
    node.redeploy("Foo", None)?;
    let observed = || -> Result<bool> {
        let now = graph(&agent, &node)?;
        let foo = of_node(&now, "Foo").context("its node")?;
        Ok(foo["workers"] == 1 && foo["observed"] == 1)
    };
    until("the new worker is observed", observed)?;
    let ([expected, ..], _) = round(&node);
    let now = graph(&agent, &node)?;
    let found = edge(&now, "Foo", "Bar")[0] - before;
    ensure!(found == expected, "{found} of {expected}: {now}");
    let baz = of_node(&now, "Baz").context("its node")?;
    ensure!(baz["observed"] == 0, "{baz}");
    node.stop()
}

#[test]
fn what_cannot_be_observed_is_told() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    let before = Code::of(node.workers("Foo")?[0].host_pid)?;
    let engine = node.engine_pid();
    let request = json!({"on": true, "functions": ["Fooo"], "engine": engine});
    let (code, body) = agent.post("/v1/observe", &request)?;
    ensure!(
        code == 404 && body["error"]["code"] == "unknown-function",
        "{body}"
    );
    let request = json!({"on": true, "function": ["Foo"]});
    let (code, body) = agent.post("/v1/observe", &request)?;
    ensure!(code == 400, "{body}");
    // Nothing was begun.
    let now = graph(&agent, &node)?;
    let observed = |name: &str| of_node(&now, name).map(|node| node["observed"].clone());
    ensure!(observed("Foo") == Some(json!(0)), "{now}");
    before.unchanged()?;
    node.stop()
}

#[test]
fn a_worker_without_room_is_refused_as_it_is_and_observed_once_there_is_some() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    let pid = node.workers("Foo")?[0].host_pid;
    let limit = |bytes: u64| -> Result<()> {
        let limit = libc::rlimit {
            rlim_cur: bytes,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: the structure is valid for reading.
        let set = unsafe { libc::prlimit(pid, libc::RLIMIT_AS, &limit, std::ptr::null_mut()) };
        ensure!(set == 0, "{}", std::io::Error::last_os_error());
        Ok(())
    };
    // Less than it has already.
    limit(1 << 20)?;
    let before = Code::of(pid)?;
    let report = observe(&agent, &node, true, &["Foo"])?;
    let outcome = &report["workers"][0]["outcome"];
    ensure!(
        outcome["error"]["code"] == "address-space-limit",
        "{report}"
    );
    ensure!(outcome["error"]["hint"].is_string(), "{report}");
    before.unchanged()?;
    let notes = graph(&agent, &node)?["notes"].to_string();
    ensure!(notes.contains("RLIMIT_AS"), "{notes}");
    // It is tried again without being asked for.
    limit(libc::RLIM_INFINITY)?;
    let observed = || -> Result<bool> {
        let now = graph(&agent, &node)?;
        Ok(of_node(&now, "Foo").context("its node")?["observed"] == 1)
    };
    until("it is observed", observed)?;
    ensure!(ask(&node, "Foo", "hello") == "Foo:olleh|4f9f2cab|6c");
    node.stop()
}

/// The engine's plan: its decisions by path.
fn plan(agent: &Agent, node: &Node) -> Result<Vec<Value>> {
    let report = agent.ctl(&["plan", "--json"])?.json()?;
    let plans = report["plans"].as_array().context("plans")?;
    let mut plans = plans
        .iter()
        .filter(|plan| plan["engine"] == node.engine_pid());
    let plan = plans.next().with_context(|| format!("no plan: {report}"))?;
    Ok(plan["decisions"].as_array().context("decisions")?.clone())
}

fn decision(decisions: &[Value], path: &[&str]) -> Result<Value> {
    let found = decisions.iter().find(|d| d["path"] == json!(path));
    found
        .cloned()
        .with_context(|| format!("{path:?} is not decided: {decisions:?}"))
}

#[test]
fn a_plan_has_the_figures_and_what_is_forbidden() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let config = tempfile::tempdir()?;
    let file = config.path().join("agent.toml");
    std::fs::write(
        &file,
        "[[edge]]\ncaller = \"Bar\"\ncallee = \"Baz\"\nfuse = \"never\"\n",
    )?;
    let agent = Agent::start_with(|command| {
        command.arg("--config").arg(&file);
    })?;
    observe(&agent, &node, true, &[])?;
    let load = Load::start(&LoadSpec::foo(node.http_port(), 2))?;
    ask(&node, "Foo", "nested call");
    std::thread::sleep(Duration::from_secs(2));
    let decided = plan(&agent, &node)?;
    let foo_bar = decision(&decided, &["Foo", "Bar"])?;
    ensure!(
        foo_bar["verdict"] == "fuse" && foo_bar["fused"] == false,
        "{foo_bar}"
    );
    let number = |field: &str| foo_bar[field].as_f64().unwrap_or(0.0);
    // One call for each request of the load, of which there are some hundreds.
    ensure!(number("calls_per_s") > 20.0, "{foo_bar}");
    let overhead = number("saved_per_s") / number("calls_per_s");
    ensure!(
        (1e-6..10e-3).contains(&overhead),
        "{overhead} s a call: {foo_bar}"
    );
    ensure!(number("memory") > 10_000.0, "{foo_bar}");
    let never = decision(&decided, &["Bar", "Baz"])?;
    ensure!(never["verdict"] == "not-possible", "{never}");
    ensure!(
        never["reason"].as_str().unwrap_or("").contains("never"),
        "{never}"
    );

    // Fused, it is worth keeping; what it costs here has been measured.
    agent.patch(&node, "Foo", "Bar")?;
    std::thread::sleep(Duration::from_secs(2));
    let kept = decision(&plan(&agent, &node)?, &["Foo", "Bar"])?;
    ensure!(kept["verdict"] == "keep" && kept["fused"] == true, "{kept}");
    let costs = agent.get("/v1/plan")?["costs"].clone();
    ensure!(
        costs["patches"] == 1 && costs["stop_s"].as_f64() > Some(0.0),
        "{costs}"
    );
    let report = load.stop();
    ensure!(report.failed + report.wrong == 0, "{report:?}");
    node.stop()
}

#[test]
fn agentctl_shows_the_graph_and_begins_and_ends_observing() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    let engine = node.engine_pid().to_string();
    let on = agent.ctl(&["observe", "on", "Foo", "Bar", "--engine", &engine])?;
    ensure!(on.code == 0 && on.stdout.contains("observed"), "{on:?}");
    ask(&node, "Foo", "hello");
    let shown = agent.ctl(&["graph", "--sites"])?;
    ensure!(shown.stdout.contains("Foo → Bar"), "{shown:?}");
    ensure!(shown.stdout.contains(".so+0x"), "{shown:?}");
    let dot = agent.ctl(&["graph", "--dot"])?;
    ensure!(dot.stdout.contains("digraph nightgraft {"), "{dot:?}");
    let dir = tempfile::tempdir()?;
    let page = dir.path().join("graph.html");
    let html = agent.ctl(&["graph", "--html", page.to_str().context("UTF-8")?])?;
    ensure!(html.code == 0, "{html:?}");
    ensure!(
        std::fs::read_to_string(&page)?.contains("libfoo"),
        "no data in the page"
    );
    let wrong = agent.ctl(&["graph", "--dot", "--json"])?;
    ensure!(wrong.code == 2, "{wrong:?}");
    let off = agent.ctl(&["observe", "off", "--engine", &engine])?;
    ensure!(off.code == 0 && off.stdout.contains("restored"), "{off:?}");
    let status = agent.ctl(&["ps"])?;
    ensure!(status.code == 0, "{status:?}");
    node.stop()
}
