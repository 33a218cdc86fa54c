//! `agentctl patch --guard`: a callee whose own code crashes costs its caller one
//! call, and what cannot be left soundly costs it the worker, as without.

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
const BAR: &str = r#"#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include "bar_logic.h"
#include "lifecycle.h"
static int is(const char *input, size_t length, const char *word) {
    return length == strlen(word) && memcmp(input, word, length) == 0;
}
static volatile int zero;
static char *volatile nowhere;
static void (*volatile target)(void);
static __attribute__((noinline)) int deep(const volatile char *above) {
    volatile char frame[1000];
    frame[0] = above[0];
    return zero ? frame[0] : deep(frame) + frame[0];
}
static int compare(const void *a, const void *b) {
    (void)a;
    (void)b;
    return *nowhere;
}
static void *in_a_thread(void *argument) {
    (void)argument;
    *nowhere = 1;
    return NULL;
}
static int misbehave(const char *how, size_t length) {
    if (is(how, length, "null")) {
        *nowhere = 1;
    } else if (is(how, length, "bus")) {
        volatile char *at = mmap(NULL, 4096, PROT_READ, MAP_SHARED, memfd_create("b", 0), 0);
        return at[0];
    } else if (is(how, length, "divide")) {
        return 5 / zero;
    } else if (is(how, length, "illegal")) {
        __builtin_trap();
    } else if (is(how, length, "stack")) {
        return deep(how);
    } else if (is(how, length, "call")) {
        target();
    } else if (is(how, length, "library")) {
        return (int)strlen(nowhere);
    } else if (is(how, length, "between")) {
        int all[2] = {1, 2};
        qsort(all, 2, sizeof all[0], compare);
    } else if (is(how, length, "thread")) {
        pthread_t thread;
        pthread_create(&thread, NULL, in_a_thread, NULL);
        pthread_join(thread, NULL);
    } else if (is(how, length, "abort")) {
        abort();
    }
    return 0;
}
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    if (input_length > 0 && input[0] == '!') {
        return misbehave(input + 1, input_length - 1);
    }
    return bar_handle(worker_handle, input, input_length);
}
"#;

/// Foo, with a page that nobody may touch, a handler of its own that lets it be
/// touched, and a mistake of its own.
const FOO: &str = r#"#define _GNU_SOURCE
#include <signal.h>
#include <sys/mman.h>
#include "foo_logic.h"
#include "lifecycle.h"
static char *page;
static volatile int handled;
static void lets_through(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)context;
    if ((char *)info->si_addr != page) {
        abort();
    }
    handled++;
    mprotect(page, 4096, PROT_READ | PROT_WRITE);
}
static void own(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = lets_through;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, NULL);
}
__attribute__((constructor)) static void start(void) {
    page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    own();
}
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    struct context *ctx = worker_handle;
    if (foo_starts(input, input_length, "touch")) {
        char text[32];
        mprotect(page, 4096, PROT_NONE);
        page[0]++;
        snprintf(text, sizeof text, "touched %d", handled);
        foo_say(ctx, text);
        return 0;
    }
    if (foo_starts(input, input_length, "own")) {
        own();
        foo_say(ctx, "own");
        return 0;
    }
    if (foo_starts(input, input_length, "trap")) {
        __builtin_trap();
    }
    return foo_handle(worker_handle, input, input_length);
}
"#;

/// What Foo says of a call that failed.
const FAILED: &[u8] = b"Foo:rc=-1 out=null len=0";

/// Each agent watches all fused workers of the machine, those of other tests as
/// well: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text(stem: &str, text: &str) -> Result<PathBuf> {
    fixtures::compile_text(stem, text, Compiler::Gcc, &["-O1", "-pthread"])
}

fn library(name: &str) -> Result<PathBuf> {
    fixtures::compile(name, Compiler::Gcc, &["-O2"])
}

fn node(caller: PathBuf, workers: u16) -> Result<Node> {
    Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, caller).workers(workers, workers),
        FunctionSpec::new("Bar", 2, text("crashbar", BAR)?),
    ]))
}

/// `agentctl patch Foo CALLEE --guard`, whatever comes of it.
fn try_guard(agent: &Agent, node: &Node, callee: &str) -> Result<(i32, Value)> {
    let engine = node.engine_pid().to_string();
    let answer = agent.ctl(&[
        "patch",
        "Foo",
        callee,
        "--guard",
        "--engine",
        &engine,
        "--json",
        "--canary-wait",
        "100ms",
        "--allow-effects",
        "all",
    ])?;
    Ok((answer.code, answer.json()?))
}

/// The same, which must succeed, with every worker's callee ready.
fn guard(agent: &Agent, node: &Node, callee: &str, warm_up: &[u8]) -> Result<Value> {
    let (code, report) = try_guard(agent, node, callee)?;
    ensure!(code == 0, "{report}\n{}", agent.log());
    agent.warm_up_with(node, "Foo", callee, warm_up)?;
    until_on(agent, node, callee, warm_up)?;
    Ok(report)
}

/// Calls until each worker has made a guarded call.
fn until_on(agent: &Agent, node: &Node, callee: &str, input: &[u8]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !all(agent, node, callee, "guard", &"on".into())? {
        ensure!(
            Instant::now() < deadline,
            "{:?}",
            grafts(agent, node, callee)?
        );
        // At once, so that each worker gets one.
        std::thread::scope(|scope| {
            let calls = [(); 2].map(|()| scope.spawn(|| node.call("Foo", input)));
            calls.into_iter().try_for_each(|call| match call.join() {
                Ok(answer) => answer.map(|_| ()).context("a call"),
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
    }
    Ok(())
}

const SLOW: &[u8] = b"slow 30 ms";

fn serves(node: &Node) -> Result<()> {
    for question in QUESTIONS {
        let answer = node.call("Foo", question.as_bytes());
        check(question, &answer.with_context(|| node.all_logs())?)?;
    }
    Ok(())
}

fn ask_in_vain(node: &Node, question: &str) -> Result<()> {
    let mut client = node.client()?;
    client.set_timeout(Duration::from_millis(300))?;
    match client.call("Foo", question.as_bytes()) {
        Err(_) => Ok(()),
        Ok(answer) => bail!("{question:?}: {:?}", String::from_utf8_lossy(&answer)),
    }
}

fn quarantined(agent: &Agent, node: &Node) -> Result<Vec<Value>> {
    let answer = agent.ctl(&["health", "--json"])?.json()?;
    let all = answer["quarantined"].as_array().context("quarantined")?;
    let engine = node.engine_pid();
    Ok(all
        .iter()
        .filter(|e| e["engine"] == engine)
        .cloned()
        .collect())
}

fn until_quarantined(agent: &Agent, node: &Node, callee: &str) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let all = quarantined(agent, node)?;
        if let Some(edge) = all.iter().find(|e| e["callee"] == callee) {
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

/// What each worker has of an edge.
fn grafts(agent: &Agent, node: &Node, callee: &str) -> Result<Vec<Value>> {
    let status = agent.edge_status(node, "Foo", callee)?;
    let workers = status["workers"].as_array().cloned().unwrap_or_default();
    Ok(workers.iter().map(|w| w["graft"].clone()).collect())
}

fn all(agent: &Agent, node: &Node, callee: &str, field: &str, value: &Value) -> Result<bool> {
    let grafts = grafts(agent, node, callee)?;
    Ok(!grafts.is_empty() && grafts.iter().all(|g| g[field] == *value))
}

fn pids(node: &Node) -> Result<Vec<i32>> {
    let mut pids: Vec<i32> = node.workers("Foo")?.iter().map(|w| w.host_pid).collect();
    pids.sort_unstable();
    Ok(pids)
}

/// Which of the four signals each worker of Foo catches, as the kernel has it.
/// (Others come with the first thread.)
fn caught(node: &Node) -> Result<Vec<u64>> {
    let of = |pid: i32| -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let mask = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
        Ok(u64::from_str_radix(mask.context("SigCgt")?.trim(), 16)? & FOUR)
    };
    pids(node)?.into_iter().map(of).collect()
}

/// The four, in a mask of the kernel's.
const FOUR: u64 = 1 << 3 | 1 << 6 | 1 << 7 | 1 << 10;

/// What the last revert of a guarded edge said of the signals, by worker.
fn signals(report: &Value) -> Vec<String> {
    let workers = report["workers"].as_array().cloned().unwrap_or_default();
    let said = |w: &Value| w["receipt"]["signals"].as_str().map(str::to_owned);
    workers.iter().filter_map(said).collect()
}

/// The worker that has died, of those that there were.
fn dead(node: &Node, before: &[WorkerInfo]) -> Result<i32> {
    let left = || node.workers("Foo").unwrap_or_default();
    until("one of the workers is gone", || {
        left().len() + 1 == before.len()
    });
    let left = left();
    let mut gone = before.iter().map(|w| w.host_pid);
    gone.find(|pid| left.iter().all(|w| w.host_pid != *pid))
        .context("nobody has died")
}

#[test]
fn what_a_callee_s_own_code_raises_is_one_failed_call() -> Result<()> {
    let _alone = alone();
    let node = node(library("foo.c")?, 2)?;
    let agent = Agent::start()?;
    let (workers, before) = (pids(&node)?, caught(&node)?);
    let kinds = [
        ("null", "SIGSEGV"),
        ("bus", "SIGBUS"),
        ("divide", "SIGFPE"),
        ("illegal", "SIGILL"),
        ("stack", "SIGSEGV"),
        ("call", "SIGSEGV"),
    ];
    for (kind, signal) in kinds {
        (|| -> Result<()> {
            guard(&agent, &node, "Bar", SLOW)?;
            serves(&node)?;
            ensure!(all(&agent, &node, "Bar", "guard", &"on".into())?);
            ensure!(caught(&node)?.iter().all(|mask| *mask == FOUR));
            let told = agent.ctl(&["status"])?.stdout;
            ensure!(told.contains("guarded against its crashes"), "{told}");

            let answer = node.call("Foo", format!("!{kind}").as_bytes());
            let answer = answer.with_context(|| node.all_logs())?;
            ensure!(answer == FAILED, "{:?}", String::from_utf8_lossy(&answer));
            for _ in 0..3 {
                serves(&node)?;
            }
            let edge = until_quarantined(&agent, &node, "Bar")?;
            ensure!(workers.iter().any(|pid| edge["pid"] == *pid), "{edge}");
            let how = edge["how"].to_string();
            ensure!(
                how.contains("outlived a crash") && how.contains(signal) && how.contains(".so+0x"),
                "{how}"
            );
            until("all gates are off", || {
                all(&agent, &node, "Bar", "gate_on", &false.into()).unwrap_or(false)
            });
            let states = grafts(&agent, &node, "Bar")?;
            let crashed = states.iter().filter(|g| g["state"] == "crashed").count();
            ensure!(crashed == 1, "{states:?}");
            let told = agent.ctl(&["status"])?.stdout;
            ensure!(told.contains("crashed") && told.contains(signal), "{told}");
            ensure!(pids(&node)? == workers, "a worker died");

            let (code, refused) = try_guard(&agent, &node, "Bar")?;
            ensure!(
                code == 1 && refused["error"]["code"] == "quarantined",
                "{refused}"
            );
            let calls = agent.fused_calls(&node, "Foo", "Bar")?;
            serves(&node)?;
            ensure!(agent.fused_calls(&node, "Foo", "Bar")? == calls);
            let lifted = agent.edge(&node, "unquarantine", "Foo", "Bar")?;
            ensure!(
                lifted.code == 0 && lifted.json()?["was"].is_object(),
                "{lifted:?}"
            );
            // Longer than the agent looks.
            std::thread::sleep(Duration::from_millis(500));
            ensure!(quarantined(&agent, &node)?.is_empty());
            Ok(())
        })()
        .with_context(|| kind)?;
    }
    guard(&agent, &node, "Bar", SLOW)?;
    serves(&node)?;
    let report = agent.revert(&node, "Foo", "Bar")?;
    ensure!(signals(&report) == ["given-back", "given-back"], "{report}");
    ensure!(caught(&node)? == before, "{before:x?}");
    ensure!(pids(&node)? == workers, "a worker died");
    serves(&node)?;
    node.stop()
}

/// A library of the callee's own, of which the caller gets a copy.
const PRIVATE: &str = r#"
__attribute__((visibility("default"))) int private_crash(volatile int *where);
int private_crash(volatile int *where) {
    return *where = 1;
}
"#;

#[test]
fn a_crash_in_a_library_that_was_copied_for_the_callee_is_one_failed_call() -> Result<()> {
    let _alone = alone();
    let private = text("crashprivate", PRIVATE)?;
    let bar = BAR
        .replacen(
            "static int misbehave(",
            "int private_crash(volatile int *where);\nstatic int misbehave(",
            1,
        )
        .replacen(
            "    } else if (is(how, length, \"abort\")) {",
            "    } else if (is(how, length, \"private\")) {\n        \
             return private_crash((volatile int *)nowhere);\n    \
             } else if (is(how, length, \"abort\")) {",
            1,
        );
    let flags = [
        "-O1",
        "-pthread",
        &format!("-Wl,--no-as-needed,{}", private.display()),
    ];
    let bar = fixtures::compile_text("privatebar", &bar, Compiler::Gcc, &flags)?;
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")?),
        FunctionSpec::new("Bar", 2, bar),
    ]))?;
    let agent = Agent::start()?;
    let workers = pids(&node)?;
    guard(&agent, &node, "Bar", SLOW)?;
    serves(&node)?;
    let answer = node.call("Foo", b"!private");
    let answer = answer.with_context(|| node.all_logs())?;
    ensure!(answer == FAILED, "{:?}", String::from_utf8_lossy(&answer));
    serves(&node)?;
    let edge = until_quarantined(&agent, &node, "Bar")?;
    let how = edge["how"].to_string();
    let name = private.file_name().context("a name")?.to_string_lossy();
    ensure!(how.contains("SIGSEGV") && how.contains(&*name), "{how}");
    ensure!(pids(&node)? == workers, "a worker died");
    serves(&node)?;
    node.stop()
}

#[test]
fn what_cannot_be_left_soundly_takes_its_worker_along_as_before() -> Result<()> {
    let _alone = alone();
    let kinds = [
        ("library", "SIGSEGV"),
        ("between", "SIGSEGV"),
        ("thread", "SIGSEGV"),
        ("abort", "SIGABRT"),
    ];
    for (kind, signal) in kinds {
        (|| -> Result<()> {
            let node = node(library("foo.c")?, 2)?;
            let agent = Agent::start()?;
            guard(&agent, &node, "Bar", SLOW)?;
            let before = node.workers("Foo")?;
            ask_in_vain(&node, &format!("!{kind}"))?;
            let dead = dead(&node, &before)?;
            let edge = until_quarantined(&agent, &node, "Bar")?;
            ensure!(edge["pid"] == dead, "{edge}, not {dead}");
            let how = edge["how"].to_string();
            ensure!(how.contains(&format!("died of {signal}")), "{how}");
            serves(&node)?;
            node.stop()
        })()
        .with_context(|| kind)?;
    }
    Ok(())
}

#[test]
fn of_two_levels_the_one_that_is_guarded_and_crashes_fails() -> Result<()> {
    let _alone = alone();
    let baz = r#"
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
"#;
    for inner in [true, false] {
        let node = Node::start(NodeSpec::new([
            FunctionSpec::new("Foo", 1, library("foo.c")?).workers(2, 2),
            FunctionSpec::new("Bar", 2, library("bar.c")?),
            FunctionSpec::new("Baz", 3, text("boombaz", baz)?),
        ]))?;
        let agent = Agent::start()?;
        let nested = b"nested x";
        if inner {
            agent.patch(&node, "Foo", "Bar")?;
            agent.warm_up(&node, "Foo", "Bar")?;
            guard(&agent, &node, "Bar/Baz", nested)?;
        } else {
            guard(&agent, &node, "Bar", SLOW)?;
            agent.patch(&node, "Foo", "Bar/Baz")?;
            agent.warm_up_with(&node, "Foo", "Bar/Baz", nested)?;
        }
        ensure!(node.call("Foo", nested)? == b"Foo:Bar:Baz");
        let before = node.workers("Foo")?;
        if inner {
            let answer = node.call("Foo", b"nested boom")?;
            ensure!(answer == FAILED, "{:?}", String::from_utf8_lossy(&answer));
        } else {
            // The guard is Bar's, and it is not Bar's code.
            ask_in_vain(&node, "nested boom")?;
            dead(&node, &before)?;
        }
        until_quarantined(&agent, &node, "Bar/Baz")?;
        ensure!(quarantined(&agent, &node)?.len() == 1);
        until("Baz is off", || {
            all(&agent, &node, "Bar/Baz", "gate_on", &false.into()).unwrap_or(false)
        });
        ensure!(all(&agent, &node, "Bar", "gate_on", &true.into())?);
        ensure!(node.workers("Foo")?.len() == if inner { 2 } else { 1 });
        // Baz by RPC, from Bar as it is fused.
        let calls = agent.fused_calls(&node, "Foo", "Bar")?;
        ensure!(node.call("Foo", nested)? == b"Foo:Bar:Baz");
        ensure!(agent.fused_calls(&node, "Foo", "Bar")? > calls);
        serves(&node)?;
        node.stop()?;
    }
    Ok(())
}

#[test]
fn the_caller_keeps_its_signals() -> Result<()> {
    let _alone = alone();
    let node = node(text("ownfoo", FOO)?, 1)?;
    let agent = Agent::start()?;
    let before = caught(&node)?;
    let touch = |times: i32| -> Result<()> {
        let answer = node.call("Foo", b"touch")?;
        let right = format!("touched {times}");
        ensure!(answer == right.as_bytes(), "{answer:?}");
        Ok(())
    };
    touch(1)?;
    guard(&agent, &node, "Bar", SLOW)?;
    // Its handler has them before and behind guarded calls, each time.
    for times in 2..5 {
        serves(&node)?;
        touch(times)?;
    }
    serves(&node)?;
    let guarded = |state: &str| all(&agent, &node, "Bar", "guard", &state.into());
    ensure!(guarded("on")?);
    ensure!(node.call("Foo", b"!null")? == FAILED);
    touch(5)?;
    until_quarantined(&agent, &node, "Bar")?;
    agent.edge(&node, "unquarantine", "Foo", "Bar")?;

    // It takes one for itself: that is seen, and left to it.
    guard(&agent, &node, "Bar", SLOW)?;
    serves(&node)?;
    ensure!(node.call("Foo", b"own")? == b"own");
    node.call("Foo", b"time 3000 x")?;
    ensure!(guarded("taken")?);
    let told = agent.ctl(&["status"])?.stdout;
    ensure!(told.contains("the guard is off"), "{told}");
    touch(6)?;
    serves(&node)?;
    let report = agent.revert(&node, "Foo", "Bar")?;
    ensure!(signals(&report) == ["given-back"], "{report}");
    ensure!(caught(&node)? == before, "{before:x?}");
    touch(7)?;

    // A crash of its own is its own.
    guard(&agent, &node, "Bar", SLOW)?;
    serves(&node)?;
    ensure!(guarded("on")?);
    let all = node.workers("Foo")?;
    ask_in_vain(&node, "trap")?;
    dead(&node, &all)?;
    until("it is seen", || agent.log().contains("no callee ran in it"));
    let log = agent.log();
    ensure!(log.contains("SIGILL"), "{log}");
    ensure!(quarantined(&agent, &node)?.is_empty());
    Ok(())
}

#[test]
fn what_no_guard_could_leave_soundly_is_refused() -> Result<()> {
    let _alone = alone();
    for (name, line, flag) in [
        ("sigaction", "sigaction(SIGUSR1, NULL, NULL);", "-pthread"),
        (
            "pthread_sigmask",
            "pthread_sigmask(SIG_BLOCK, NULL, NULL);",
            "-pthread",
        ),
        (".eh_frame", "", "-Wl,--no-eh-frame-hdr"),
    ] {
        let bar = fixtures::compile_text(
            &format!("signals-{}", name.trim_start_matches('.')),
            &format!("{BAR}\n#include <signal.h>\nvoid change(void) {{ {line} }}\n"),
            Compiler::Gcc,
            &["-O1", "-pthread", flag],
        )?;
        let node = Node::start(NodeSpec::new([
            FunctionSpec::new("Foo", 1, library("foo.c")?),
            FunctionSpec::new("Bar", 2, bar),
        ]))?;
        let agent = Agent::start()?;
        let maps = || {
            std::fs::read_to_string(format!("/proc/{}/maps", pids(&node)?[0]))
                .map_err(anyhow::Error::from)
        };
        let before = maps()?;
        let explain = |guard: &[&str]| {
            let engine = node.engine_pid().to_string();
            let words = ["explain", "Foo", "Bar", "--json", "--engine", &engine];
            agent.ctl(&[&words, guard].concat())
        };
        let told = explain(&["--guard"])?;
        ensure!(
            told.code == 1 && told.error_code() == "no-guard",
            "{told:?}"
        );
        ensure!(explain(&[])?.code == 0, "{told:?}");
        let (code, refused) = try_guard(&agent, &node, "Bar")?;
        let error = &refused["error"];
        ensure!(code == 1 && error["code"] == "no-guard", "{refused}");
        ensure!(error["message"].to_string().contains(name), "{refused}");
        ensure!(
            error["hint"].to_string().contains("without --guard"),
            "{refused}"
        );
        ensure!(maps()? == before, "something was mapped");
        agent.patch_allowing(&node, "Foo", "Bar", "all")?;
        agent.warm_up(&node, "Foo", "Bar")?;
        ensure!(all(&agent, &node, "Bar", "guard", &"none".into())?);
        // Nor does it become guarded when it is fused already.
        let (code, refused) = try_guard(&agent, &node, "Bar")?;
        ensure!(
            code == 1 && refused["error"]["code"] == "no-guard",
            "{refused}"
        );
        serves(&node)?;
        node.stop()?;
    }
    Ok(())
}

/// Foo, with a filter of its own that kills it for the call by which the guard passes a
/// signal on.
const FILTER: &str = r#"#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "foo_logic.h"
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    return foo_handle(worker_handle, input, input_length);
}
__attribute__((constructor)) static void start(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_tgsigqueueinfo, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        _exit(1);
    }
}
"#;

#[test]
fn what_a_filter_denies_the_guard_is_refused_by_its_name() -> Result<()> {
    let _alone = alone();
    let node = node(text("filterfoo", FILTER)?, 1)?;
    let agent = Agent::start()?;
    let refused = || -> Result<()> {
        let (code, refused) = try_guard(&agent, &node, "Bar")?;
        let error = &refused["error"];
        ensure!(code == 1 && error["code"] == "call-denied", "{refused}");
        let message = error["message"].to_string();
        ensure!(message.contains("rt_tgsigqueueinfo"), "{refused}");
        Ok(())
    };
    refused()?;
    // Without a guard nothing calls it; and then it does not get one either.
    agent.patch_allowing(&node, "Foo", "Bar", "all")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    refused()?;
    ensure!(all(&agent, &node, "Bar", "guard", &"none".into())?);
    let calls = agent.fused_calls(&node, "Foo", "Bar")?;
    serves(&node)?;
    ensure!(agent.fused_calls(&node, "Foo", "Bar")? > calls);
    node.stop()
}

#[test]
fn a_guard_comes_and_goes_with_the_patch_that_asks_for_it() -> Result<()> {
    let _alone = alone();
    let node = node(library("foo.c")?, 2)?;
    let agent = Agent::start()?;
    let before = caught(&node)?;
    let guarded = |state: &str| all(&agent, &node, "Bar", "guard", &state.into());
    agent.patch_allowing(&node, "Foo", "Bar", "all")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    ensure!(guarded("none")? && caught(&node)? == before);
    let (code, report) = try_guard(&agent, &node, "Bar")?;
    ensure!(code == 0 && report["already"] == false, "{report}");
    ensure!(
        report["workers"][0]["receipt"]["image_reused"] == true,
        "{report}"
    );
    ensure!(guarded("waiting")? && caught(&node)? == before);
    agent.warm_up(&node, "Foo", "Bar")?;
    until_on(&agent, &node, "Bar", SLOW)?;
    let (code, report) = try_guard(&agent, &node, "Bar")?;
    ensure!(code == 0 && report["already"] == true, "{report}");

    // A call under way keeps the guard where it is.
    std::thread::scope(|scope| -> Result<()> {
        let slow = scope.spawn(|| node.call("Foo", b"slow 1500 ms"));
        until("the call is under way", || {
            let grafts = grafts(&agent, &node, "Bar").unwrap_or_default();
            grafts.iter().any(|g| g["counters"]["in_flight"] == 1)
        });
        let report = agent.revert(&node, "Foo", "Bar")?;
        let mut said = signals(&report);
        said.sort_unstable();
        ensure!(said == ["call-under-way", "given-back"], "{report}");
        slow.join().expect("no panic")?;
        Ok(())
    })?;
    ensure!(caught(&node)? != before);
    let report = agent.revert(&node, "Foo", "Bar")?;
    ensure!(signals(&report) == ["given-back"], "{report}");
    ensure!(caught(&node)? == before);
    let report = agent.revert(&node, "Foo", "Bar")?;
    ensure!(
        signals(&report).is_empty() && report["nothing"] == true,
        "{report}"
    );

    // Without the flag it is guarded no more.
    guard(&agent, &node, "Bar", SLOW)?;
    agent.patch_allowing(&node, "Foo", "Bar", "all")?;
    ensure!(guarded("none")?);
    let workers = node.workers("Foo")?;
    ask_in_vain(&node, "!illegal")?;
    dead(&node, &workers)?;
    until_quarantined(&agent, &node, "Bar")?;
    serves(&node)?;
    Ok(())
}

#[test]
fn another_agent_sees_the_crash_and_a_lifted_quarantine_stays_lifted() -> Result<()> {
    let _alone = alone();
    let node = node(library("foo.c")?, 2)?;
    let mut agent = Agent::start()?;
    guard(&agent, &node, "Bar", SLOW)?;
    // This one sees no more of it.
    kill(Pid::from_raw(agent.pid()), Signal::SIGSTOP)?;
    ensure!(node.call("Foo", b"!divide")? == FAILED);
    for _ in 0..4 {
        serves(&node)?;
    }
    agent.restart()?;
    let edge = until_quarantined(&agent, &node, "Bar")?;
    ensure!(edge["how"].to_string().contains("SIGFPE"), "{edge}");
    until("all gates are off", || {
        all(&agent, &node, "Bar", "gate_on", &false.into()).unwrap_or(false)
    });
    agent.edge(&node, "unquarantine", "Foo", "Bar")?;
    agent.restart()?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(quarantined(&agent, &node)?.is_empty());
    guard(&agent, &node, "Bar", SLOW)?;
    serves(&node)?;
    node.stop()
}
