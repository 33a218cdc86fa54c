//! A caller whose calls pass the callee's name as a constant at one site and
//! compute it at others, with room for the one and not for the other: the entry of
//! the worker's routine would be rewritten for the others, which takes an island of
//! its own.

use anyhow::{Context, Result, ensure};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use serde_json::Value;

/// What the patcher allows for the bridge's thread.
const THREAD: u64 = 9 << 20;
const PAGE: u64 = 4096;

/// Calls Bar by its name, and Ba with the input's first byte behind it.
const FOO: &str = r#"
#include <stdio.h>
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    struct context *ctx = worker_handle;
    char name[8];
    const char *output = NULL;
    size_t output_length = 0;
    if (ctx->invoke(ctx->caller_context, "Bar", input, length, &output, &output_length) != 0) {
        return -1;
    }
    ctx->append(ctx->caller_context, output, output_length);
    snprintf(name, sizeof name, "Ba%c", length > 0 ? input[0] : 'r');
    if (ctx->invoke(ctx->caller_context, name, input, length, &output, &output_length) != 0) {
        return -1;
    }
    ctx->append(ctx->caller_context, output, output_length);
    return 0;
}
"#;

/// Bytes of a plan's mapping, and of its islands.
fn bytes(plan: &Value) -> Result<(u64, u64)> {
    let of = |mapping: &Value| mapping["reservation"]["len"].as_u64();
    let mapping = of(&plan["mapping"]).with_context(|| format!("no mapping: {plan}"))?;
    let islands = plan["islands"].as_array().context("islands")?;
    Ok((mapping, islands.iter().filter_map(of).sum()))
}

fn address_space(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    Ok(1024 * kilobytes.context("VmSize")?.parse::<u64>()?)
}

/// Lets a process have so much address space.
fn limit(pid: i32, bytes: u64) -> Result<()> {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the structure is valid for reading.
    let result =
        unsafe { libc::prlimit(pid, libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
    ensure!(result == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}

fn ask(node: &Node, question: &str) -> Result<String> {
    let answer = node.call("Foo", question.as_bytes());
    let answer = answer.with_context(|| format!("{question}\n{}", node.all_logs()))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn without_room_for_the_routines_window_the_sites_alone_are_rewritten() -> Result<()> {
    let foo = fixtures::compile_text("both", FOO, Compiler::Gcc, &["-O2"])?;
    let bar = fixtures::compile("bar.c", Compiler::Gcc, &["-O2"])?;
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, foo),
        FunctionSpec::new("Bar", 2, bar),
    ]))?;
    let agent = Agent::start()?;
    // Bar by its name, and once more by a name that ends in the input's first byte.
    let right = ask(&node, "rxyz")?;
    let plan = || -> Result<Value> {
        let answer = agent.edge(&node, "explain", "Foo", "Bar")?;
        ensure!(answer.code == 0, "{answer:?}");
        Ok(answer.json()?["plan"].clone())
    };
    let (mapping, island) = bytes(&plan()?)?;
    ensure!(
        island >= 2 * PAGE,
        "the routine's entry was not to be rewritten"
    );

    // Enough for what is mapped near the caller and one page more.
    let pid = node.workers("Foo")?[0].host_pid;
    limit(pid, address_space(pid)? + mapping + THREAD + PAGE)?;
    let tight = plan()?;
    ensure!(bytes(&tight)? == (mapping, 0), "{:?}", bytes(&tight));
    let report = agent.patch(&node, "Foo", "Bar")?;
    let receipt = &report["workers"][0]["receipt"];
    ensure!(receipt["through_routine"].is_null(), "{receipt}");
    agent.warm_up_with(&node, "Foo", "Bar", b"rxyz")?;
    let fused = || -> Result<u64> {
        let before = agent.fused_calls(&node, "Foo", "Bar")?;
        let answer = ask(&node, "rxyz")?;
        ensure!(answer == right, "{answer} instead of {right}");
        Ok(agent.fused_calls(&node, "Foo", "Bar")? - before)
    };
    ensure!(fused()? == 1, "the site alone is rewritten");
    agent.revert(&node, "Foo", "Bar")?;
    ensure!(fused()? == 0);

    // With room for it, the other calls come as well.
    limit(pid, libc::RLIM_INFINITY)?;
    let report = agent.patch(&node, "Foo", "Bar")?;
    ensure!(
        report["workers"][0]["receipt"]["image_reused"] == true,
        "{report}"
    );
    agent.warm_up_with(&node, "Foo", "Bar", b"rxyz")?;
    ensure!(fused()? == 2, "all calls are fused");
    node.stop()
}
