//! Fusing Foo → Bar in running containers: the answers are those of the RPC,
//! whatever compiled the caller.

mod common;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use common::{ask, foo_bar_baz, library};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use serde_json::Value;

/// How Foo is compiled: a name for it, the compiler, the flags.
const CALLERS: &[(&str, Compiler, &[&str])] = &[
    ("GccO0", Compiler::Gcc, &["-O0"]),
    ("GccO1", Compiler::Gcc, &["-O1"]),
    ("GccO2", Compiler::Gcc, &["-O2"]),
    ("GccO3", Compiler::Gcc, &["-O3"]),
    ("GccOs", Compiler::Gcc, &["-Os"]),
    ("GccCet", Compiler::Gcc, &["-O2", "-fcf-protection=full"]),
    ("GccCetO0", Compiler::Gcc, &["-O0", "-fcf-protection=full"]),
    ("GccNoPlt", Compiler::Gcc, &["-O2", "-fno-plt"]),
    (
        "GccThunk",
        Compiler::Gcc,
        &["-O2", "-mindirect-branch=thunk"],
    ),
    (
        "GccThunkO0",
        Compiler::Gcc,
        &["-O0", "-mindirect-branch=thunk"],
    ),
    ("GccTail", Compiler::Gcc, &["-O2", "-DTAIL"]),
    ("GccTailOs", Compiler::Gcc, &["-Os", "-DTAIL"]),
    (
        "GccTailCet",
        Compiler::Gcc,
        &["-O2", "-DTAIL", "-fcf-protection=full"],
    ),
    (
        "GccTailThunk",
        Compiler::Gcc,
        &["-O2", "-DTAIL", "-mindirect-branch=thunk"],
    ),
    ("ClangO0", Compiler::Clang, &["-O0"]),
    ("ClangO1", Compiler::Clang, &["-O1"]),
    ("ClangO2", Compiler::Clang, &["-O2"]),
    ("ClangO3", Compiler::Clang, &["-O3"]),
    ("ClangOs", Compiler::Clang, &["-Os"]),
    (
        "ClangCet",
        Compiler::Clang,
        &["-O2", "-fcf-protection=full"],
    ),
    ("ClangNoPlt", Compiler::Clang, &["-O2", "-fno-plt"]),
    ("ClangTail", Compiler::Clang, &["-O2", "-DTAIL"]),
    ("GccStripped", Compiler::Gcc, &["-O2", "-s"]),
];

/// What Foo is asked, and how many of those calls reach Bar.
const QUESTIONS: &[&str] = &[
    "hello",
    "zero",
    "big 0",
    "big 1",
    "big 959",
    "big 960",
    "big 961",
    "big 5000",
    "big 8388608",
    "three a bb ccc",
    "fail",
    "fail again",
    "empty",
    "unknown name through the same site",
    "nested call",
    "slow 1 and",
];

fn answers(node: &Node, function: &str) -> Result<Vec<Vec<u8>>> {
    QUESTIONS
        .iter()
        .map(|q| {
            node.call(function, q.as_bytes())
                .with_context(|| format!("{function} {q:?}"))
        })
        .collect()
}

fn compare(name: &str, what: &str, expected: &[Vec<u8>], found: &[Vec<u8>]) -> Result<()> {
    for ((question, expected), found) in QUESTIONS.iter().zip(expected).zip(found) {
        let show =
            |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        ensure!(
            expected == found,
            "{name}, {what}, {question:?}: {} instead of {}",
            show(found),
            show(expected)
        );
    }
    Ok(())
}

#[test]
fn every_caller_answers_fused_as_by_rpc() -> Result<()> {
    let mut functions = vec![
        FunctionSpec::new("Bar", 1, library("bar.c")),
        FunctionSpec::new("Baz", 2, library("baz.c")),
    ];
    for ((name, compiler, flags), id) in CALLERS.iter().zip(3..) {
        functions.push(FunctionSpec::new(
            name,
            id,
            fixtures::compile("foo.c", *compiler, flags)?,
        ));
    }
    let node = Node::start(NodeSpec::new(functions))?;
    let agent = Agent::start()?;
    let mut failures = Vec::new();
    for (name, ..) in CALLERS {
        if let Err(error) = one_caller(&node, &agent, name) {
            failures.push(format!("{name}: {error:#}"));
        }
    }
    ensure!(
        failures.is_empty(),
        "{} of {}:\n{}\n{}",
        failures.len(),
        CALLERS.len(),
        failures.join("\n"),
        agent.log()
    );
    node.stop()
}

fn one_caller(node: &Node, agent: &Agent, name: &str) -> Result<()> {
    let by_rpc = answers(node, name)?;
    let pid = node.workers(name)?[0].host_pid;

    let plan = agent.edge(node, "explain", name, "Bar")?.json()?["plan"].clone();
    ensure!(
        plan["unfused"] == Value::Array(Vec::new()),
        "sites left as RPC: {}",
        plan["unfused"]
    );
    let sites = plan["windows"]
        .as_array()
        .map_or(0, |w| w.iter().filter(|w| w["entry"] == false).count());
    // relay's, timed's and three's calls, or the tail jump that all share.
    ensure!(
        sites == if name.contains("Tail") { 1 } else { 5 },
        "{sites} sites"
    );

    let patched = agent.patch(node, name, "Bar")?;
    let proven = patched["workers"][0]["receipt"]["sites"]
        .as_array()
        .map_or(0, Vec::len);
    ensure!(proven == sites, "{proven} sites were read back of {sites}");
    agent.warm_up(node, name, "Bar")?;
    let before = agent.fused_calls(node, name, "Bar")?;
    compare(name, "fused", &by_rpc, &answers(node, name)?)?;
    let fused = agent.fused_calls(node, name, "Bar")? - before;
    // All but the unknown name; `three` calls three times.
    let expected = QUESTIONS.len() as u64 + 1;
    ensure!(
        fused == expected,
        "{fused} calls ran fused instead of {expected}"
    );
    let where_bar_runs = ask(node, name, "host");

    let reverted = agent.revert(node, name, "Bar")?;
    ensure!(
        reverted["workers"][0]["receipt"]["restored"] == true,
        "{reverted}"
    );
    compare(name, "reverted", &by_rpc, &answers(node, name)?)?;
    ensure!(
        ask(node, name, "host") != where_bar_runs,
        "after the revert Bar still runs in the caller"
    );

    let again = agent.patch(node, name, "Bar")?;
    ensure!(
        again["workers"][0]["receipt"]["image_reused"] == true,
        "{again}"
    );
    compare(name, "fused again", &by_rpc, &answers(node, name)?)?;
    ensure!(
        node.workers(name)?[0].host_pid == pid,
        "the worker is another one"
    );
    Ok(())
}

#[test]
fn a_callee_sees_its_own_environment_and_keeps_its_state() -> Result<()> {
    let [foo, bar, baz] =
        <[FunctionSpec; 3]>::try_from(foo_bar_baz(1).functions).unwrap_or_else(|_| unreachable!());
    let node = Node::start(NodeSpec::new([
        foo.env("WHO", "caller"),
        bar.env("WHO", "callee").env("ONLY_BAR", "1"),
        baz,
    ]))?;
    let agent = Agent::start()?;
    assert_eq!(ask(&node, "Foo", "env WHO"), "Foo:callee");
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    assert_eq!(ask(&node, "Foo", "env WHO"), "Foo:callee");
    assert_eq!(ask(&node, "Foo", "env ONLY_BAR"), "Foo:1");
    assert_eq!(ask(&node, "Foo", "env NOWHERE"), "Foo:(unset)");
    let count = |text: String| text.trim_start_matches("Foo:").parse::<u64>();
    let first = count(ask(&node, "Foo", "count"))?;
    agent.revert(&node, "Foo", "Bar")?;
    agent.patch(&node, "Foo", "Bar")?;
    assert_eq!(
        count(ask(&node, "Foo", "count"))?,
        first + 1,
        "the image is the same one after a revert"
    );
    node.stop()
}

#[test]
fn outputs_live_to_the_end_of_the_outermost_call_and_no_longer() -> Result<()> {
    let node = Node::start(foo_bar_baz(1).strict_lifetime())?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    let expected = |a: &str| String::from_utf8(fixtures::bar(a.as_bytes())).unwrap_or_default();
    let three = format!(
        "Foo:{};{};{}",
        expected("one"),
        expected("two"),
        expected("three")
    );
    for _ in 0..200 {
        assert_eq!(ask(&node, "Foo", "three one two three"), three);
    }
    // Many outputs in one outermost call, then none left over: memory stays.
    let pid = node.workers("Foo")?[0].host_pid;
    let resident = |pid: i32| -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find(|l| l.starts_with("VmRSS"))
            .context("VmRSS")?;
        Ok(line.split_whitespace().nth(1).context("VmRSS")?.parse()?)
    };
    for _ in 0..5 {
        ask(&node, "Foo", "time 20000 0123456789abcdef");
    }
    let early = resident(pid)?;
    for _ in 0..40 {
        ask(&node, "Foo", "time 20000 0123456789abcdef");
    }
    let late = resident(pid)?;
    ensure!(
        late < early + 4096,
        "resident memory grew from {early} to {late} KiB"
    );
    node.stop()
}

#[test]
fn a_new_agent_finds_what_a_killed_one_left_and_reverts_it() -> Result<()> {
    let node = Node::start(foo_bar_baz(2))?;
    let mut agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    agent.kill()?;
    assert_eq!(
        ask(&node, "Foo", "hello").into_bytes(),
        fixtures::foo(b"hello")
    );
    let heir = Agent::start()?;
    let already = heir.patch(&node, "Foo", "Bar")?;
    ensure!(already["already"] == true, "{already}");
    let calls = heir.fused_calls(&node, "Foo", "Bar")?;
    ask(&node, "Foo", "hello");
    ensure!(
        heir.fused_calls(&node, "Foo", "Bar")? == calls + 1,
        "the counters go on"
    );
    heir.revert(&node, "Foo", "Bar")?;
    ask(&node, "Foo", "hello");
    ensure!(
        heir.fused_calls(&node, "Foo", "Bar")? == calls + 1,
        "after the revert nothing runs fused"
    );
    node.stop()
}

#[test]
fn a_redeployed_callee_is_fused_anew_and_the_old_image_is_left() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    let other = changed_bar()?;
    node.redeploy("Bar", Some(&other))?;
    let again = agent.patch(&node, "Foo", "Bar")?;
    ensure!(
        again["already"] == false && again["workers"][0]["receipt"]["image_reused"] == false,
        "{again}"
    );
    agent.warm_up(&node, "Foo", "Bar")?;
    let calls = agent.fused_calls(&node, "Foo", "Bar")?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:v2:hello");
    ensure!(
        agent.fused_calls(&node, "Foo", "Bar")? == calls + 1,
        "the new image runs fused"
    );
    agent.revert(&node, "Foo", "Bar")?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:v2:hello");
    node.stop()
}

fn changed_bar() -> Result<PathBuf> {
    let text = r#"
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    struct context *ctx = worker_handle;
    ctx->append(ctx->caller_context, "v2:", 3);
    ctx->append(ctx->caller_context, input, input_length);
    return 0;
}
"#;
    fixtures::compile_text("barv2", text, Compiler::Gcc, &["-O2"])
}

#[test]
fn a_callee_that_cannot_initialise_stays_an_rpc_and_is_reported() -> Result<()> {
    // It fails anywhere but in its own worker.
    let text = r#"
#include <stdio.h>
#include <string.h>
static const char *worker_of(char *text, size_t size) {
    FILE *f = fopen("/proc/self/cmdline", "r");
    size_t n = f == NULL ? 0 : fread(text, 1, size - 1, f);
    if (f != NULL) fclose(f);
    for (size_t i = 0; i < n; i++) if (text[i] == 0) text[i] = ' ';
    text[n] = 0;
    return text;
}
#include "worker_v1.h"
#include <stdlib.h>
int faas_init(void) { char t[512]; return strstr(worker_of(t, sizeof t), "libbar.so") ? 0 : 7; }
int faas_create_func_worker(void *c, invoke_func_fn i, append_output_fn a, void **h) {
    struct context *ctx = malloc(sizeof *ctx);
    if (ctx == NULL) return -1;
    ctx->caller_context = c; ctx->invoke = i; ctx->append = a; *h = ctx; return 0;
}
int faas_destroy_func_worker(void *h) { free(h); return 0; }
int faas_func_call(void *h, const char *in, size_t n) {
    struct context *ctx = h;
    ctx->append(ctx->caller_context, in, n);
    return 0;
}
"#;
    let picky = fixtures::compile_text("picky", text, Compiler::Gcc, &["-O2"])?;
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")),
        FunctionSpec::new("Bar", 2, picky),
    ]))?;
    let agent = Agent::start()?;
    agent.patch_allowing(&node, "Foo", "Bar", "files")?;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let graft = loop {
        assert_eq!(ask(&node, "Foo", "hello"), "Foo:hello");
        let graft = agent.edge_status(&node, "Foo", "Bar")?["workers"][0]["graft"].clone();
        if graft["state"] == "failed" {
            break graft;
        }
        ensure!(std::time::Instant::now() < deadline, "{graft}");
    };
    assert_eq!(graft["failure"], "faas_init returned 7");
    assert_eq!(graft["gate_on"], false);
    assert_eq!(graft["counters"]["fused_calls"], 0);
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:hello");
    node.stop()
}

/// A function that answers with what `body` writes into `text`.
fn tiny(stem: &str, flags: &[&str], body: &str) -> Result<PathBuf> {
    let text = format!(
        r#"
#include <fenv.h>
#include <stdio.h>
#include <string.h>
#include "lifecycle.h"
static volatile double tiny = 1e-300, small = 1e-15, one = 1.0, three = 3.0;
int faas_func_call(void *worker_handle, const char *input, size_t length) {{
    struct context *ctx = worker_handle;
    char text[512] = "";
    (void)input; (void)length;
    {body}
    ctx->append(ctx->caller_context, text, strlen(text));
    return 0;
}}
"#
    );
    fixtures::compile_text(stem, &text, Compiler::Gcc, &[&["-O2"], flags].concat())
}

#[test]
fn floating_point_modes_of_either_do_not_reach_the_other() -> Result<()> {
    // Linked with -ffast-math a library sets flush-to-zero for its process.
    let caller = r#"
    const char *out = NULL;
    size_t n = 0;
    snprintf(text, sizeof text, "%a %.20f", tiny * small, one / three);
    if (ctx->invoke(ctx->caller_context, "Bar", "", 0, &out, &n) != 0) return -1;
    snprintf(text + strlen(text), sizeof text - strlen(text), " [%.*s] %a %.20f", (int)n, out,
             tiny * small, one / three);
"#;
    let calm = r#"snprintf(text, sizeof text, "%a %.20f", tiny * small, one / three);"#;
    let wild = r#"
    snprintf(text, sizeof text, "%a %.20f", tiny * small, one / three);
    unsigned mode = (__builtin_ia32_stmxcsr() & ~0x6000u) | 0x4000u; /* round up */
    __builtin_ia32_ldmxcsr(mode);
"#;
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Fast", 1, tiny("fast", &["-ffast-math"], caller)?),
        FunctionSpec::new("Plain", 2, tiny("plain", &[], caller)?),
        FunctionSpec::new("Bar", 3, tiny("calm", &[], calm)?),
    ]))?;
    let wild_node = Node::start(NodeSpec::new([
        FunctionSpec::new("Plain", 1, tiny("plain", &[], caller)?),
        FunctionSpec::new("Bar", 2, tiny("wild", &[], wild)?),
    ]))?;
    let agent = Agent::start()?;
    for (node, caller) in [(&node, "Fast"), (&node, "Plain"), (&wild_node, "Plain")] {
        // Bar changes its own modes for good with its first call.
        ask(node, caller, "warm");
        let by_rpc = ask(node, caller, "ask");
        agent.patch(node, caller, "Bar")?;
        agent.warm_up(node, caller, "Bar")?;
        let calls = agent.fused_calls(node, caller, "Bar")?;
        ask(node, caller, "warm");
        assert_eq!(ask(node, caller, "ask"), by_rpc, "{caller}");
        assert_eq!(agent.fused_calls(node, caller, "Bar")?, calls + 2);
        agent.revert(node, caller, "Bar")?;
        assert_eq!(ask(node, caller, "ask"), by_rpc, "{caller}");
    }
    // The two callers do differ, or nothing was tested.
    assert!(ask(&node, "Fast", "ask").starts_with("0x0p+0 "));
    assert!(ask(&node, "Plain", "ask").starts_with("0x0.000"));
    node.stop()?;
    wild_node.stop()
}
