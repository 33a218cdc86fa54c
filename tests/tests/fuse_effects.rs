//! What a callee may touch that is the caller's: refused until it is allowed,
//! by the request or by the agent's configuration, and told in any case.

mod code;
mod common;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use code::Code;
use common::{ask, foo_bar_baz, library};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, until};

/// Bar, which says whether it can open a file.
fn reader() -> Result<PathBuf> {
    let text = r#"
#include <stdio.h>
#include <string.h>
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    struct context *ctx = worker_handle;
    (void)input; (void)length;
    FILE *f = fopen("/etc/bar.conf", "r");
    const char *text = f == NULL ? "no file" : "a file";
    if (f != NULL) fclose(f);
    ctx->append(ctx->caller_context, text, strlen(text));
    return 0;
}
"#;
    fixtures::compile_text("reader", text, Compiler::Gcc, &["-O2"])
}

fn node() -> Result<Node> {
    Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")).workers(2, 2),
        FunctionSpec::new("Bar", 2, reader()?),
    ]))
}

fn taken(node: &Node) -> Result<Vec<Code>> {
    let workers = node.workers("Foo")?;
    let taken = workers.iter().map(|worker| {
        until("the worker is idle", || worker.waits_for_request());
        Code::of(worker.host_pid)
    });
    taken.collect()
}

#[test]
fn a_callee_that_opens_files_needs_leave() -> Result<()> {
    let node = node()?;
    let agent = Agent::start()?;
    ensure!(ask(&node, "Foo", "hello") == "Foo:no file");
    let before = taken(&node)?;

    let refused = agent.edge(&node, "patch", "Foo", "Bar")?;
    ensure!(
        refused.code == 1 && refused.error_code() == "effects",
        "{refused:?}"
    );
    let error = refused.json()?["error"].clone();
    let message = error["message"].as_str().unwrap_or_default();
    ensure!(message.contains("files (libbar.so: fopen)"), "{message}");
    let hint = error["hint"].as_str().unwrap_or_default();
    ensure!(hint.contains("--allow-effects files,"), "{hint}");
    // Leave for something else is none.
    let refused = agent.try_patch_allowing(&node, "Foo", "Bar", "network,credentials")?;
    ensure!(
        refused.code == 1 && refused.error_code() == "effects",
        "{refused:?}"
    );

    let engine = node.engine_pid().to_string();
    let told = agent.ctl(&["explain", "Foo", "Bar", "--engine", &engine])?;
    ensure!(told.code == 0, "{told:?}");
    for text in [
        "files [not allowed]: ",
        "libbar.so: fopen",
        "\"/etc/bar.conf\"",
        "to be fused it needs --allow-effects files, ",
    ] {
        ensure!(told.stdout.contains(text), "no {text:?} in {}", told.stdout);
    }
    let plan = agent.edge(&node, "explain", "Foo", "Bar")?.json()?;
    ensure!(plan["refused"]["code"] == "effects", "{plan}");
    before.iter().try_for_each(Code::unchanged)?;

    let done = agent.patch_allowing(&node, "Foo", "Bar", "network,files")?;
    let effects = &done["workers"][0]["receipt"]["effects"];
    ensure!(
        effects[0]["kind"] == "files" && effects[0]["allowed"] == true,
        "{done}"
    );
    let warm = |agent: &Agent| agent.warm_up_with(&node, "Foo", "Bar", b"hello");
    warm(&agent)?;
    let calls = agent.fused_calls(&node, "Foo", "Bar")?;
    ensure!(ask(&node, "Foo", "hello") == "Foo:no file");
    ensure!(agent.fused_calls(&node, "Foo", "Bar")? == calls + 1);

    // What is fused already is judged alike, and left as it is.
    let before = taken(&node)?;
    let again = agent.edge(&node, "patch", "Foo", "Bar")?;
    ensure!(
        again.code == 1 && again.error_code() == "effects",
        "{again:?}"
    );
    let again = agent.patch_allowing(&node, "Foo", "Bar", "all")?;
    ensure!(again["already"] == true, "{again}");
    before.iter().try_for_each(Code::unchanged)?;

    // So is an image that is used again.
    agent.revert(&node, "Foo", "Bar")?;
    let again = agent.edge(&node, "patch", "Foo", "Bar")?;
    ensure!(
        again.code == 1 && again.error_code() == "effects",
        "{again:?}"
    );
    agent.patch_allowing(&node, "Foo", "Bar", "files")?;
    agent.revert(&node, "Foo", "Bar")?;
    ensure!(ask(&node, "Foo", "hello") == "Foo:no file");
    node.stop()
}

#[test]
fn the_configuration_gives_leave_to_an_edge() -> Result<()> {
    let node = node()?;
    let dir = tempfile::tempdir()?;
    let start = |caller: &str| {
        let path = dir.path().join("agent.toml");
        let text = format!(
            "[[edge]]\ncaller = \"{caller}\"\ncallee = \"*\"\nallow-effects = [\"files\"]\n"
        );
        std::fs::write(&path, text)?;
        Agent::start_with(|command| {
            command.arg("--config").arg(&path);
        })
    };
    let other = start("Baz")?;
    let refused = other.edge(&node, "patch", "Foo", "Bar")?;
    ensure!(
        refused.code == 1 && refused.error_code() == "effects",
        "{refused:?}"
    );
    drop(other);

    let agent = start("Foo")?;
    let engine = node.engine_pid().to_string();
    let told = agent.ctl(&["explain", "Foo", "Bar", "--engine", &engine])?;
    ensure!(told.stdout.contains("files [allowed]: "), "{told:?}");
    ensure!(!told.stdout.contains("to be fused it needs"), "{told:?}");
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up_with(&node, "Foo", "Bar", b"hello")?;
    ensure!(ask(&node, "Foo", "hello") == "Foo:no file");
    agent.revert(&node, "Foo", "Bar")?;
    node.stop()
}

#[test]
fn what_is_no_effect_is_told() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    let answer = agent.try_patch_allowing(&node, "Foo", "Bar", "files,tea")?;
    ensure!(answer.code == 2, "{answer:?}");
    ensure!(
        answer
            .stderr
            .contains("known are files, network, credentials and all"),
        "{answer:?}"
    );
    let request = serde_json::json!({
        "caller": "Foo", "callee": "Bar", "engine": node.engine_pid(), "allow_effects": ["tea"]
    });
    let (code, body) = agent.post("/v1/patch", &request)?;
    ensure!(
        code == 400 && body["error"]["code"] == "bad-request",
        "{code} {body}"
    );

    // A callee that touches nothing needs no leave, and leave does no harm.
    agent.patch(&node, "Foo", "Bar")?;
    agent.patch_allowing(&node, "Foo", "Bar", "all")?;
    node.stop()
}

#[test]
fn a_configuration_that_is_wrong_keeps_the_agent_from_starting() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("agent.toml");
    std::fs::write(&path, "[[edge]]\ncaller = \"Foo\"\ncalee = \"Bar\"\n")?;
    let Err(error) = Agent::start_with(|command| {
        command.arg("--config").arg(&path);
    }) else {
        anyhow::bail!("the agent has started");
    };
    let text = format!("{error:#}");
    ensure!(text.contains("line 3") && text.contains("calee"), "{text}");
    Ok(())
}
