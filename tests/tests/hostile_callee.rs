//! What a fused callee does to its worker: it crashes, loops, overflows its
//! stack, corrupts the heap, takes all memory, or ends the process.
//!
//! Fused, that is the caller's worker's end, as nightcore starts none anew. The
//! agent sees which edge it was, turns it off in all other workers before they
//! follow, and does not fuse it again until somebody says so.

#[path = "hostile/answers.rs"]
mod answers;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use answers::{QUESTIONS, check};
use anyhow::{Context, Result, bail, ensure};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, WorkerInfo, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Bar, which does what an input says that begins with "!".
fn bar(lines: &str) -> Result<PathBuf> {
    let text = format!(
        r#"#define _GNU_SOURCE
#include <signal.h>
#include <sys/mman.h>
#include "bar_logic.h"
#include "lifecycle.h"
static int is(const char *input, size_t length, const char *word) {{
    return length == strlen(word) && memcmp(input, word, length) == 0;
}}
{lines}
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {{
    if (input_length > 0 && input[0] == '!') {{
        misbehave(input + 1, input_length - 1);
    }}
    return bar_handle(worker_handle, input, input_length);
}}
"#
    );
    fixtures::compile_text("badbar", &text, Compiler::Gcc, &["-O1"])
}

const KINDS: &str = r#"
static volatile int deeper = 1;
static void deep(volatile char *above) {
    volatile char frame[4096];
    frame[0] = above[0];
    if (deeper) {
        deep(frame);
    }
    frame[1] = 1;
}
static void misbehave(const char *how, size_t length) {
    if (is(how, length, "crash")) {
        *(volatile char *)NULL = 0;
    } else if (is(how, length, "illegal")) {
        __builtin_trap();
    } else if (is(how, length, "stack")) {
        char top = 0;
        deep(&top);
    } else if (is(how, length, "heap")) {
        char *volatile block = malloc(24);
        memset(block - 16, 0xff, 64);
        free(block);
        free(malloc(1 << 20));
        abort();
    } else if (is(how, length, "memory")) {
        for (;;) {
            char *all = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
            if (all == MAP_FAILED) {
                abort();
            }
        }
    } else if (is(how, length, "exit")) {
        exit(0);
    } else if (is(how, length, "loop")) {
        for (volatile int i = 0;; i++) {
        }
    }
}
"#;

/// Each agent watches all fused workers of the machine, those of other tests as
/// well: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request that is never answered: its worker dies. (nightcore tells nobody.)
fn ask_in_vain(node: &Node, question: &str) -> Result<()> {
    let mut client = node.client()?;
    client.set_timeout(Duration::from_millis(300))?;
    match client.call("Foo", question.as_bytes()) {
        Err(_) => Ok(()),
        Ok(answer) => bail!("{question:?}: {:?}", String::from_utf8_lossy(&answer)),
    }
}

fn serves(node: &Node) -> Result<()> {
    for question in QUESTIONS {
        let answer = node.call("Foo", question.as_bytes());
        check(question, &answer.with_context(|| node.all_logs())?)?;
    }
    Ok(())
}

fn quarantined(agent: &Agent, command: &str, node: &Node) -> Result<Vec<Value>> {
    let answer = agent.ctl(&[command, "--json"])?.json()?;
    let all = answer["quarantined"].as_array().context("quarantined")?;
    let engine = node.engine_pid();
    Ok(all
        .iter()
        .filter(|e| e["engine"] == engine)
        .cloned()
        .collect())
}

fn gates_off(agent: &Agent, node: &Node, callee: &str) -> Result<bool> {
    let status = agent.edge_status(node, "Foo", callee)?;
    let workers = status["workers"].as_array().cloned().unwrap_or_default();
    Ok(!workers.is_empty() && workers.iter().all(|w| w["graft"]["gate_on"] == false))
}

/// Waits for the quarantine of the edge; its entry.
fn until_quarantined(agent: &Agent, node: &Node, callee: &str) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let all = quarantined(agent, "health", node)?;
        if let Some(edge) = all.iter().find(|e| e["callee"] == callee) {
            ensure!(edge["caller"] == "Foo", "{edge}");
            ensure!(
                quarantined(agent, "status", node)?.contains(edge),
                "not in the status: {edge}"
            );
            return Ok(edge.clone());
        }
        ensure!(
            Instant::now() < deadline,
            "{callee} is not quarantined\n{}\n{}",
            agent.log(),
            node.all_logs()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Refused while it is quarantined; after that as any other.
fn stays_off_until_told(agent: &Agent, node: &Node) -> Result<()> {
    let (status, refused) = agent.patch_unwatched(node, "Foo", "Bar")?;
    ensure!(
        status == 409 && refused["error"]["code"] == "quarantined",
        "{refused}"
    );
    let hint = refused["error"]["hint"].to_string();
    ensure!(hint.contains("agentctl unquarantine Foo Bar"), "{refused}");
    ensure!(gates_off(agent, node, "Bar")?, "a gate is on");
    let calls = agent.fused_calls(node, "Foo", "Bar")?;
    serves(node)?;
    ensure!(agent.fused_calls(node, "Foo", "Bar")? == calls);

    let lifted = agent.edge(node, "unquarantine", "Foo", "Bar")?;
    ensure!(
        lifted.code == 0 && lifted.json()?["was"].is_object(),
        "{lifted:?}"
    );
    let again = agent.edge(node, "unquarantine", "Foo", "Bar")?;
    ensure!(
        again.code == 0 && again.json()?["was"].is_null(),
        "{again:?}"
    );
    ensure!(quarantined(agent, "health", node)?.is_empty());
    ensure!(gates_off(agent, node, "Bar")?, "nobody asked for a patch");
    agent.patch(node, "Foo", "Bar")?;
    agent.warm_up(node, "Foo", "Bar")?;
    serves(node)
}

fn node(bar: PathBuf, workers: u16, memory: Option<u64>) -> Result<Node> {
    let library = fixtures::compile("foo.c", Compiler::Gcc, &["-O2"])?;
    let mut caller = FunctionSpec::new("Foo", 1, library).workers(workers, workers);
    caller.memory_limit = memory;
    Node::start(NodeSpec::new([caller, FunctionSpec::new("Bar", 2, bar)]))
}

/// The worker that has died, of those that there were.
fn dead(node: &Node, before: &[WorkerInfo]) -> Result<i32> {
    let left = || node.workers("Foo").unwrap_or_default();
    until("one of the workers is gone", || {
        left().len() + 1 == before.len()
    });
    let left = left();
    let gone: Vec<i32> = before
        .iter()
        .map(|w| w.host_pid)
        .filter(|pid| left.iter().all(|w| w.host_pid != *pid))
        .collect();
    ensure!(gone.len() == 1, "{gone:?}");
    Ok(gone[0])
}

#[test]
fn a_callee_that_takes_its_worker_along_is_quarantined() -> Result<()> {
    let _alone = alone();
    let kinds = [
        ("crash", "SIGSEGV", None),
        ("illegal", "SIGILL", None),
        // The testbed's worker has a handler that tells a stack overflow, and aborts.
        ("stack", "died of SIG", None),
        ("heap", "SIGABRT", None),
        ("memory", "SIGKILL", Some(160 << 20)),
        ("exit", "code 0", None),
        // Nobody can tell it from one that takes long: until it is killed.
        ("loop", "SIGKILL", None),
    ];
    let bar = bar(KINDS)?;
    for (kind, end, memory) in kinds {
        (|| -> Result<()> {
            let node = node(bar.clone(), 2, memory)?;
            let agent = Agent::start()?;
            agent.patch(&node, "Foo", "Bar")?;
            agent.warm_up(&node, "Foo", "Bar")?;
            serves(&node)?;
            let before = node.workers("Foo")?;
            ask_in_vain(&node, &format!("!{kind}"))?;
            if kind == "loop" {
                let looping = looping(&agent, &node)?;
                ensure!(quarantined(&agent, "health", &node)?.is_empty());
                serves(&node)?;
                kill(Pid::from_raw(looping), Signal::SIGKILL)?;
            }
            let dead = dead(&node, &before)?;
            let edge = until_quarantined(&agent, &node, "Bar")?;
            ensure!(edge["pid"] == dead, "{edge}, not {dead}");
            ensure!(edge["in_flight"] == serde_json::json!(["Bar"]), "{edge}");
            let how = edge["how"].to_string();
            ensure!(
                how.contains(end) && how.contains("a call of it ran"),
                "{how}"
            );
            until("the gates of the others are off", || {
                gates_off(&agent, &node, "Bar").unwrap_or(false)
            });
            let log = agent.log();
            ensure!(log.contains("quarantined") && log.contains("Bar"), "{log}");
            let told = agent.ctl(&["status"])?.stdout;
            ensure!(told.contains("quarantined: Foo → Bar"), "{told}");
            let told = agent.ctl(&["health"])?.stdout;
            ensure!(told.contains("quarantined: Foo → Bar"), "{told}");
            ensure!(node.workers("Foo")?.len() == 1, "another one died");
            // The same request again is harmless to the caller now: Bar's own
            // worker takes the blow, as it would have without us.
            if kind == "crash" {
                ask_in_vain(&node, "!crash")?;
                until("Bar's worker is gone", || {
                    node.workers("Bar").is_ok_and(|left| left.is_empty())
                });
                ensure!(node.workers("Foo")?.len() == 1, "the caller died");
                return Ok(());
            }
            stays_off_until_told(&agent, &node)
        })()
        .with_context(|| kind)?;
    }
    Ok(())
}

/// The worker in whose callee a call has begun and does not return.
fn looping(agent: &Agent, node: &Node) -> Result<i32> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let status = agent.edge_status(node, "Foo", "Bar")?;
        let workers = status["workers"].as_array().context("workers")?;
        let stuck = |w: &&Value| w["graft"]["counters"]["in_flight"] == 1;
        if let Some(worker) = workers.iter().find(stuck) {
            return Ok(i32::try_from(worker["pid"].as_i64().context("a pid")?)?);
        }
        ensure!(Instant::now() < deadline, "nothing is in flight: {status}");
    }
}

#[test]
fn initialisers_that_crash_take_one_worker_and_no_more() -> Result<()> {
    let _alone = alone();
    // In its own worker Bar starts well: what it needs is there.
    let bar = bar(r#"
static void misbehave(const char *how, size_t length) { (void)is(how, length, ""); }
__attribute__((constructor)) static void start(void) {
    FILE *file = fopen("/proc/self/cmdline", "r");
    char line[256] = {0};
    size_t n = file == NULL ? 0 : fread(line, 1, sizeof line - 1, file);
    for (size_t i = 0; i < n; i++) {
        line[i] = line[i] == 0 ? ' ' : line[i];
    }
    if (strstr(line, "/libfoo") != NULL) {
        *(volatile char *)NULL = 0;
    }
    fclose(file);
}
"#)?;
    let node = node(bar, 3, None)?;
    let agent = Agent::start()?;
    let before = node.workers("Foo")?;
    // Nobody calls while it is patched: all three are.
    agent.patch_allowing(&node, "Foo", "Bar", "files")?;
    // By RPC meanwhile, so it may be answered or not.
    let mut client = node.client()?;
    client.set_timeout(Duration::from_millis(300))?;
    let _ = client.call("Foo", b"hello");
    let dead = dead(&node, &before)?;
    let edge = until_quarantined(&agent, &node, "Bar")?;
    ensure!(edge["pid"] == dead, "{edge}, not {dead}");
    ensure!(
        edge["how"].to_string().contains("its initialisers ran"),
        "{edge}"
    );
    until("the gates of the others are off", || {
        gates_off(&agent, &node, "Bar").unwrap_or(false)
    });
    for _ in 0..6 {
        serves(&node)?;
    }
    ensure!(node.workers("Foo")?.len() == 2, "another one died");
    node.stop()
}

#[test]
fn the_innermost_of_several_is_the_one() -> Result<()> {
    let _alone = alone();
    let library = |name: &str| fixtures::compile(name, Compiler::Gcc, &["-O2"]);
    let baz = fixtures::compile_text(
        "badbaz",
        r#"
#include <string.h>
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    struct context *ctx = worker_handle;
    if (input_length == 4 && memcmp(input, "boom", 4) == 0) {
        __builtin_trap();
    }
    ctx->append(ctx->caller_context, "Baz", 3);
    return 0;
}
"#,
        Compiler::Gcc,
        &["-O2"],
    )?;
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")?).workers(2, 2),
        FunctionSpec::new("Bar", 2, library("bar.c")?),
        FunctionSpec::new("Baz", 3, baz),
    ]))?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    agent.patch(&node, "Foo", "Bar/Baz")?;
    agent.warm_up_with(&node, "Foo", "Bar/Baz", b"nested x")?;
    let before = node.workers("Foo")?;
    ask_in_vain(&node, "nested boom")?;
    let dead = dead(&node, &before)?;
    let edge = until_quarantined(&agent, &node, "Bar/Baz")?;
    ensure!(edge["pid"] == dead, "{edge}, not {dead}");
    ensure!(
        edge["in_flight"] == serde_json::json!(["Bar", "Bar/Baz"]),
        "{edge}"
    );
    ensure!(quarantined(&agent, "health", &node)?.len() == 1);
    until("Baz is off", || {
        gates_off(&agent, &node, "Bar/Baz").unwrap_or(false)
    });
    ensure!(!gates_off(&agent, &node, "Bar")?, "Bar is off as well");
    serves(&node)?;
    node.stop()
}

#[test]
fn who_ends_a_worker_from_outside_accuses_nobody() -> Result<()> {
    let _alone = alone();
    let node = node(bar(KINDS)?, 3, None)?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    // Idle: nothing ran.
    let before = node.workers("Foo")?;
    kill(Pid::from_raw(before[0].host_pid), Signal::SIGKILL)?;
    dead(&node, &before)?;
    until("it is seen", || agent.log().contains("no callee ran in it"));
    // Told to end.
    let before = node.workers("Foo")?;
    ask_in_vain(&node, "!loop")?;
    let stuck = looping(&agent, &node)?;
    kill(Pid::from_raw(stuck), Signal::SIGTERM)?;
    dead(&node, &before)?;
    until("it is seen", || agent.log().contains("ended from outside"));
    // Its container is stopped.
    ask_in_vain(&node, "!loop")?;
    looping(&agent, &node)?;
    let launcher = node.container("Foo")?.init;
    kill(Pid::from_raw(launcher), Signal::SIGKILL)?;
    until("it is seen", || {
        agent.log().matches("ended from outside").count() == 2
    });
    ensure!(
        quarantined(&agent, "health", &node)?.is_empty(),
        "{}",
        agent.log()
    );
    Ok(())
}

#[test]
fn another_agent_knows_the_quarantine_and_sees_deaths_as_well() -> Result<()> {
    let _alone = alone();
    let node = node(bar(KINDS)?, 3, None)?;
    let mut agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    agent.restart()?;
    // The counters' memory was the other agent's to hold: it is found again.
    let before = node.workers("Foo")?;
    ask_in_vain(&node, "!illegal")?;
    let dead = dead(&node, &before)?;
    let edge = until_quarantined(&agent, &node, "Bar")?;
    ensure!(edge["pid"] == dead, "{edge}");
    until("the gates of the others are off", || {
        gates_off(&agent, &node, "Bar").unwrap_or(false)
    });
    agent.restart()?;
    ensure!(quarantined(&agent, "health", &node)? == [edge]);
    stays_off_until_told(&agent, &node)?;
    agent.restart()?;
    ensure!(quarantined(&agent, "health", &node)?.is_empty());
    node.stop()
}
