//! The awkward moments of fusing and reverting, forced and not hoped for: a
//! worker that stands in the middle of what is rewritten, in a signal handler
//! that interrupted it there, inside the RPC, idle, stopped, or dying.

mod code;
mod common;
mod hold;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use code::Code;
use common::{ask, foo_bar_baz, library};
use hold::{Breakpoint, Request, instruction_pointer, is_stopped};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, NestedMode, Node, NodeSpec, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// What brings a Foo through all of its windows.
const QUESTIONS: [&str; 3] = ["three a bb ccc", "time 1 hello", "hello"];

/// That an answer to one of them is right, however it came about.
fn check(question: &str, answer: &[u8]) -> Result<()> {
    let bar = |input: &str| fixtures::bar(input.as_bytes());
    let right = match question.split_once(' ') {
        Some(("three", words)) => {
            let all: Vec<_> = words.split(' ').map(bar).collect();
            answer == [b"Foo:", all.join(&b';').as_slice()].concat()
        }
        // "<nanoseconds> <answer>"
        Some(("time", rest)) => {
            let input = rest.split_once(' ').map_or("", |(_, input)| input);
            answer.splitn(2, |b| *b == b' ').nth(1) == Some(&bar(input))
        }
        _ => answer == fixtures::foo(question.as_bytes()),
    };
    ensure!(right, "{question:?}: {:?}", String::from_utf8_lossy(answer));
    Ok(())
}

/// One worker of a caller, and the agent that fuses Bar into it.
struct Stage<'a> {
    node: &'a Node,
    agent: &'a Agent,
    caller: &'a str,
    pid: i32,
}

/// A window, as the plan has it.
struct Window {
    address: u64,
    before: Vec<u8>,
    after: Vec<u8>,
    entry: bool,
    call: bool,
    /// Where instructions begin in `before`.
    starts: Vec<u64>,
}

fn hex(value: &Value) -> Result<Vec<u8>> {
    let text = value.as_str().context("bytes as text")?;
    (0..text.len())
        .step_by(2)
        .map(|i| Ok(u8::from_str_radix(&text[i..i + 2], 16)?))
        .collect()
}

impl Window {
    fn read(window: &Value) -> Result<Self> {
        let copies = window["copies"].as_array().context("copies")?;
        Ok(Self {
            address: window["address"].as_u64().context("an address")?,
            before: hex(&window["before"])?,
            after: hex(&window["after"])?,
            entry: window["entry"] == true,
            call: window["call"] == true,
            starts: copies.iter().filter_map(|copy| copy[0].as_u64()).collect(),
        })
    }

    fn contains(&self, address: u64) -> bool {
        (self.address..self.address + self.before.len() as u64).contains(&address)
    }

    /// Instructions of the original code after the first.
    fn middle_before(&self) -> Vec<u64> {
        let inner = self.starts.iter().filter(|at| **at > 0);
        inner.map(|at| self.address + at).collect()
    }

    /// Our branch, where no-operations lead to it.
    fn middle_after(&self) -> Option<u64> {
        let nops = self.after.len() as u64 - 5;
        (self.call && nops > 0).then_some(self.address + nops)
    }
}

impl<'a> Stage<'a> {
    fn new(node: &'a Node, agent: &'a Agent, caller: &'a str) -> Result<Self> {
        let workers = node.workers(caller)?;
        ensure!(workers.len() == 1, "{workers:?}");
        Ok(Self {
            node,
            agent,
            caller,
            pid: workers[0].host_pid,
        })
    }

    fn windows(&self) -> Result<Vec<Window>> {
        let answer = self.agent.edge(self.node, "explain", self.caller, "Bar")?;
        let windows = answer.json()?["plan"]["windows"].clone();
        let windows = windows.as_array().context("windows")?;
        windows.iter().map(Window::read).collect()
    }

    fn ask(&self, question: &str) -> Result<()> {
        let answer = self.node.call(self.caller, question.as_bytes());
        let answer = answer.with_context(|| self.node.all_logs())?;
        check(question, &answer)
    }

    /// Patches, which must succeed.
    fn patch(&self) -> Result<Value> {
        let (code, report) = self.agent.patch_unwatched(self.node, self.caller, "Bar")?;
        ensure!(
            code == 200 && report["workers"][0]["outcome"]["outcome"] == "fused",
            "{}: {report}\n{}",
            self.caller,
            self.agent.log()
        );
        Ok(report)
    }

    /// Reverts to the original bytes, which must succeed.
    fn revert(&self) -> Result<()> {
        let (code, report) = self.agent.try_revert(self.node, self.caller, "Bar")?;
        ensure!(
            code == 200 && report["workers"][0]["outcome"]["outcome"] == "restored",
            "{}: {report}\n{}",
            self.caller,
            self.agent.log()
        );
        Ok(())
    }

    fn fused_calls(&self) -> Result<u64> {
        self.agent.fused_calls(self.node, self.caller, "Bar")
    }

    fn serves_fused(&self) -> Result<()> {
        self.agent.warm_up(self.node, self.caller, "Bar")?;
        let before = self.fused_calls()?;
        for question in QUESTIONS {
            self.ask(question)?;
        }
        let fused = self.fused_calls()? - before;
        ensure!(fused == 5, "{fused} calls ran fused of 5");
        self.is_alone()
    }

    fn serves_by_rpc(&self) -> Result<()> {
        let before = self.fused_calls()?;
        for question in QUESTIONS {
            self.ask(question)?;
        }
        ensure!(self.fused_calls()? == before, "a call ran fused");
        self.is_alone()
    }

    /// The worker is the same one and nobody traces it.
    fn is_alone(&self) -> Result<()> {
        let workers = self.node.workers(self.caller)?;
        ensure!(
            workers.len() == 1 && workers[0].host_pid == self.pid,
            "worker {} became {workers:?}",
            self.pid
        );
        let tracer = workers[0].status("TracerPid");
        ensure!(tracer.as_deref() == Some("0"), "traced by {tracer:?}");
        Ok(())
    }

    /// Asks until the worker stands at `address`, and leaves it there with a
    /// signal: SIGSTOP stops it right there.
    fn hold(&self, address: u64, signal: Signal) -> Result<(Request, &'static str)> {
        let mut breakpoint = Breakpoint::set(self.pid, address)?;
        for question in QUESTIONS {
            let request = Request::send(self.node, self.caller, question)?;
            if breakpoint.reached(|| request.is_answered())? {
                breakpoint.leave(signal)?;
                return Ok((request, question));
            }
            check(question, &request.answer()?)?;
        }
        breakpoint.leave(Signal::SIGCONT)?;
        anyhow::bail!("no request comes by {address:#x}")
    }

    /// Let go of by a tracer, a stopped thread runs to its next stop, within
    /// the kernel.
    fn stays_stopped(&self) {
        until("it is stopped again", || is_stopped(self.pid));
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid), signal)?;
        Ok(())
    }
}

/// Stopped at each instruction inside of each window, at patch and at revert.
fn stopped_inside(stage: &Stage<'_>) -> Result<(usize, usize)> {
    let (mut at_patch, mut at_revert) = (0, 0);
    let windows = stage.windows()?;
    let mut ready = false;
    for (index, window) in windows.iter().enumerate() {
        let what = |address: u64| format!("window {index}+{}", address - window.address);
        for address in window.middle_before() {
            (|| -> Result<()> {
                let calls = if ready { stage.fused_calls()? } else { 0 };
                let (request, question) = stage.hold(address, Signal::SIGSTOP)?;
                ensure!(instruction_pointer(stage.pid)? == address);
                stage.patch()?;
                stage.stays_stopped();
                let now = instruction_pointer(stage.pid)?;
                ensure!(
                    !windows.iter().any(|w| w.contains(now)),
                    "it still stands inside a window, at {now:#x}"
                );
                stage.signal(Signal::SIGCONT)?;
                check(question, &request.answer()?)?;
                if ready {
                    // The call that was moved to the stub ran fused itself.
                    ensure!(stage.fused_calls()? > calls, "it did not run fused");
                }
                stage.serves_fused()?;
                ready = true;
                stage.revert()?;
                stage.serves_by_rpc()
            })()
            .with_context(|| format!("patch at {}", what(address)))?;
            at_patch += 1;
        }
        if let Some(address) = window.middle_after() {
            (|| -> Result<()> {
                stage.patch()?;
                stage.serves_fused()?;
                let (request, question) = stage.hold(address, Signal::SIGSTOP)?;
                stage.revert()?;
                stage.stays_stopped();
                assert_eq!(instruction_pointer(stage.pid)?, window.address);
                stage.signal(Signal::SIGCONT)?;
                check(question, &request.answer()?)?;
                stage.serves_by_rpc()
            })()
            .with_context(|| format!("revert at {}", what(address)))?;
            at_revert += 1;
        }
    }
    ensure!(
        windows.iter().any(|w| w.entry),
        "no window at faas_func_call"
    );
    Ok((at_patch, at_revert))
}

#[test]
fn a_worker_stopped_inside_a_window_goes_on_at_the_copy_and_back() -> Result<()> {
    const CALLERS: [(&str, Compiler, &[&str]); 6] = [
        ("Gcc", Compiler::Gcc, &["-O2"]),
        ("GccO0", Compiler::Gcc, &["-O0"]),
        ("GccTail", Compiler::Gcc, &["-O2", "-DTAIL"]),
        ("GccCet", Compiler::Gcc, &["-Os", "-fcf-protection=full"]),
        ("Clang", Compiler::Clang, &["-O2"]),
        ("ClangTail", Compiler::Clang, &["-O2", "-DTAIL"]),
    ];
    let mut functions = vec![FunctionSpec::new("Bar", 1, library("bar.c"))];
    for ((name, compiler, flags), id) in CALLERS.into_iter().zip(2..) {
        let foo = fixtures::compile("foo.c", compiler, flags)?;
        functions.push(FunctionSpec::new(name, id, foo));
    }
    // Each answer is unmapped when its lifetime is over, so that one that is
    // read too late is noticed.
    let node = Node::start(NodeSpec::new(functions).strict_lifetime())?;
    let agent = Agent::start()?;
    for (name, ..) in CALLERS {
        let (at_patch, at_revert) =
            stopped_inside(&Stage::new(&node, &agent, name)?).context(name)?;
        // What the compiler made of it says how many places there are.
        ensure!(at_patch >= 2, "{name}: {at_patch} places");
        ensure!(
            at_revert >= 1 || name.ends_with("Tail"),
            "{name}: {at_revert} places on the way back"
        );
        println!("{name}: {at_patch} places at patch, {at_revert} at revert");
    }
    node.stop()
}

/// A Foo whose SIGUSR1 handler waits until SIGUSR2 comes.
fn foo_with_handler(flags: &[&str]) -> Result<PathBuf> {
    let text = r#"
#define _GNU_SOURCE
#include <signal.h>
#include <unistd.h>
#include "foo_logic.h"
#include "lifecycle.h"

static volatile sig_atomic_t go;

static void on_go(int number) { go = number; }

static void on_wait(int number) {
    (void)number;
    go = 0;
#ifdef SLEEPS
    while (!go) {
        struct timespec some = {0, 50000000};
        nanosleep(&some, NULL);
    }
#else
    while (!go) {
    }
#endif
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_RESTART;
#ifdef ALTERNATE
    static char stack[65536];
    stack_t other;
    memset(&other, 0, sizeof other);
    other.ss_sp = stack;
    other.ss_size = sizeof stack;
    sigaltstack(&other, NULL);
    action.sa_flags |= SA_ONSTACK;
#endif
    action.sa_handler = on_wait;
    sigaction(SIGUSR1, &action, NULL);
    action.sa_handler = on_go;
    sigaction(SIGUSR2, &action, NULL);
}

int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    return foo_handle(worker_handle, input, input_length);
}
"#;
    let flags = [&["-O2"], flags].concat();
    fixtures::compile_text("foo_handler", text, Compiler::Gcc, &flags)
}

/// Waits until somebody has stopped the worker so many times.
fn traced(pid: i32, times: usize, is_over: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut seen = 0;
    let mut was = false;
    while seen < times && !is_over() {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let is = !status.contains("TracerPid:\t0");
        seen += usize::from(is && !was);
        was = is;
        ensure!(Instant::now() < deadline, "stopped {seen} times only");
    }
    Ok(())
}

/// A request to the agent on a thread of its own.
fn background<T: Send + 'static>(
    agent: &Arc<Agent>,
    node: &Arc<Node>,
    work: impl FnOnce(&Agent, &Node) -> T + Send + 'static,
) -> JoinHandle<T> {
    let (agent, node) = (Arc::clone(agent), Arc::clone(node));
    std::thread::spawn(move || work(&agent, &node))
}

fn joined<T>(thread: JoinHandle<T>) -> T {
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

const HANDLERS: [(&str, &[&str]); 4] = [
    ("Spins", &[]),
    ("SpinsAside", &["-DALTERNATE"]),
    ("Sleeps", &["-DSLEEPS"]),
    ("SleepsAside", &["-DSLEEPS", "-DALTERNATE"]),
];

fn node_with_handlers() -> Result<Arc<Node>> {
    let mut functions = vec![FunctionSpec::new("Bar", 1, library("bar.c"))];
    for ((name, flags), id) in HANDLERS.into_iter().zip(2..) {
        functions.push(FunctionSpec::new(name, id, foo_with_handler(flags)?));
    }
    Ok(Arc::new(Node::start(
        NodeSpec::new(functions).strict_lifetime(),
    )?))
}

/// The original instruction inside of a site, and our branch in one.
fn places(stage: &Stage<'_>) -> Result<(u64, u64)> {
    let windows = stage.windows()?;
    let site = windows.iter().find(|w| w.middle_after().is_some());
    let site = site.context("a site with no-operations")?;
    let before = site.middle_before();
    Ok((
        *before.first().context("an instruction inside of a site")?,
        site.middle_after().context("our branch")?,
    ))
}

#[test]
fn a_signal_handler_that_interrupted_a_site_is_waited_for() -> Result<()> {
    let node = node_with_handlers()?;
    let agent = Arc::new(Agent::start()?);
    for (name, _) in HANDLERS {
        (|| -> Result<()> {
            let stage = Stage::new(&node, &agent, name)?;
            let (original, branch) = places(&stage)?;
            stage.ask("hello")?;

            let (request, question) = stage.hold(original, Signal::SIGUSR1)?;
            let patch = background(&agent, &node, |agent, node| {
                agent.patch_unwatched(node, name, "Bar")
            });
            traced(stage.pid, 20, || patch.is_finished())?;
            let in_time = !patch.is_finished();
            ensure!(!request.is_answered(), "the handler did not wait");
            stage.signal(Signal::SIGUSR2)?;
            let (code, report) = joined(patch)?;
            ensure!(code == 200 || !in_time, "{report}");
            check(question, &request.answer()?)?;
            if code != 200 {
                stage.patch()?;
            }
            stage.serves_fused()?;

            let (request, question) = stage.hold(branch, Signal::SIGUSR1)?;
            let revert = background(&agent, &node, |agent, node| {
                agent.try_revert(node, name, "Bar")
            });
            traced(stage.pid, 20, || revert.is_finished())?;
            let in_time = !revert.is_finished();
            stage.signal(Signal::SIGUSR2)?;
            let (code, report) = joined(revert)?;
            let outcome = report["workers"][0]["outcome"]["outcome"].clone();
            ensure!(
                code == 200 && (outcome == "restored" || !in_time),
                "{report}"
            );
            check(question, &request.answer()?)?;
            if outcome != "restored" {
                stage.revert()?;
            }
            stage.serves_by_rpc()
        })()
        .with_context(|| format!("{name}\n{}", agent.log()))?;
    }
    Ok(())
}

#[test]
fn a_signal_handler_that_stays_inside_a_site_is_reported_and_nothing_is_changed() -> Result<()> {
    let node = node_with_handlers()?;
    let agent = Agent::start()?;
    std::thread::scope(|scope| {
        let all: Vec<_> = HANDLERS
            .into_iter()
            .map(|(name, _)| {
                let (node, agent) = (&node, &agent);
                scope.spawn(move || stays_inside(node, agent, name).context(name))
            })
            .collect();
        all.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|p| std::panic::resume_unwind(p))
        })
    })
    .with_context(|| agent.log())
}

fn stays_inside(node: &Node, agent: &Agent, name: &str) -> Result<()> {
    let stage = Stage::new(node, agent, name)?;
    let (original, branch) = places(&stage)?;
    stage.ask("hello")?;

    let (request, question) = stage.hold(original, Signal::SIGUSR1)?;
    let code = Code::of(stage.pid)?;
    let (status, refused) = agent.patch_unwatched(node, name, "Bar")?;
    ensure!(status != 200, "{refused}");
    ensure!(refused["error"]["code"] == "no-moment", "{refused}");
    let message = refused["error"]["message"].to_string();
    ensure!(message.contains(&stage.pid.to_string()), "{message}");
    code.unchanged()?;
    ensure!(!request.is_answered(), "the handler did not wait");
    stage.signal(Signal::SIGUSR2)?;
    check(question, &request.answer()?)?;
    for question in QUESTIONS {
        stage.ask(question)?;
    }
    stage.patch()?;
    stage.serves_fused()?;

    let (request, question) = stage.hold(branch, Signal::SIGUSR1)?;
    let (status, report) = agent.try_revert(node, name, "Bar")?;
    let worker = &report["workers"][0];
    ensure!(status == 200, "{report}");
    ensure!(worker["outcome"]["outcome"] == "gate-off", "{report}");
    ensure!(worker["receipt"]["reason"].is_string(), "{report}");
    stage.signal(Signal::SIGUSR2)?;
    check(question, &request.answer()?)?;
    // The bytes are still there, and lead to the RPC.
    stage.serves_by_rpc()?;
    stage.revert()?;
    stage.serves_by_rpc()
}

#[test]
fn a_worker_blocked_inside_the_rpc_gets_its_answer() -> Result<()> {
    for mode in NestedMode::BOTH {
        let node = Node::start(foo_bar_baz(1).nested_mode(mode).strict_lifetime())?;
        let agent = Agent::start()?;
        let stage = Stage::new(&node, &agent, "Foo")?;
        // With FIFOs a nested call must be over within 100 ms.
        let fifo = mode == NestedMode::Fifo;
        let (shortest, longest) = if fifo { (60, 60) } else { (500, 8_000) };
        for with_revert in [false, true, false, true] {
            let mut slow = shortest;
            loop {
                let in_time = blocked(&stage, slow, with_revert)
                    .with_context(|| format!("{mode:?}, {slow} ms, {with_revert}"))?;
                if in_time || fifo {
                    break;
                }
                slow *= 2;
                ensure!(slow <= longest, "the agent is too slow for this test");
            }
        }
        node.stop()?;
    }
    Ok(())
}

/// Patches a worker that is inside the RPC, and reverts it there if wished.
/// Gives whether the RPC took long enough for that.
fn blocked(stage: &Stage<'_>, slow: u32, with_revert: bool) -> Result<bool> {
    let question = format!("slow {slow} ms");
    let calls = stage.fused_calls()?;
    let request = Request::send(stage.node, stage.caller, &question)?;
    let bar = stage.node.workers("Bar")?[0].clone();
    until("Bar is at work", || {
        !bar.waits_for_request() || request.is_answered()
    });
    stage.patch()?;
    if with_revert {
        stage.revert()?;
    }
    let in_time = !request.is_answered();
    let answer = request.answer()?;
    ensure!(
        answer == fixtures::foo(question.as_bytes()),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    ensure!(
        stage.fused_calls()? == calls,
        "the call that was in the RPC counts as fused"
    );
    if !with_revert {
        stage.serves_fused()?;
        stage.revert()?;
    }
    stage.serves_by_rpc()?;
    Ok(in_time)
}

#[test]
fn a_worker_inside_the_fused_callee_is_patched_and_reverted_around_it() -> Result<()> {
    let node = Node::start(foo_bar_baz(1).strict_lifetime())?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.patch()?;
    stage.serves_fused()?;
    let foo = node.workers("Foo")?[0].clone();
    let mut slow = 500;
    loop {
        let question = format!("slow {slow} ms");
        let calls = stage.fused_calls()?;
        let request = Request::send(&node, "Foo", &question)?;
        until("Bar sleeps in Foo", || {
            !foo.waits_for_request() || request.is_answered()
        });
        stage.revert()?;
        stage.patch()?;
        stage.revert()?;
        let in_time = !request.is_answered();
        ensure!(request.answer()? == fixtures::foo(question.as_bytes()));
        ensure!(stage.fused_calls()? == calls + 1, "it ran fused");
        stage.serves_by_rpc()?;
        if in_time {
            break;
        }
        slow *= 2;
        ensure!(slow < 16_000, "the agent is too slow for this test");
        stage.patch()?;
        stage.serves_fused()?;
    }
    node.stop()
}

#[test]
fn an_idle_worker_is_reverted_and_patched_again_with_the_same_image() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    let foo = node.workers("Foo")?[0].clone();
    let original: Vec<_> = stage
        .windows()?
        .into_iter()
        .map(|w| (w.address, w.before))
        .collect();

    // Reverted before anything came by.
    let first = stage.patch()?;
    ensure!(first["workers"][0]["receipt"]["image_reused"] == false);
    until("it is idle", || foo.waits_for_request());
    stage.revert()?;
    let bytes = |address: u64, length: usize| -> Result<Vec<u8>> {
        use std::os::unix::fs::FileExt as _;
        let mut bytes = vec![0; length];
        fs::File::open(format!("/proc/{}/mem", stage.pid))?.read_exact_at(&mut bytes, address)?;
        Ok(bytes)
    };
    for (address, before) in &original {
        assert_eq!(&bytes(*address, before.len())?, before);
    }
    stage.serves_by_rpc()?;

    stage.patch()?;
    stage.serves_fused()?;
    until("it is idle", || foo.waits_for_request());
    stage.revert()?;
    for (address, before) in &original {
        assert_eq!(&bytes(*address, before.len())?, before);
    }
    stage.serves_by_rpc()?;

    let again = stage.patch()?;
    ensure!(
        again["workers"][0]["receipt"]["image_reused"] == true,
        "{again}"
    );
    stage.serves_fused()?;
    stage.revert()?;
    stage.serves_by_rpc()?;
    node.stop()
}

#[test]
fn a_stopped_worker_is_patched_and_reverted_and_stays_stopped() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    let stopped = |what: &dyn Fn() -> Result<()>| -> Result<()> {
        stage.signal(Signal::SIGSTOP)?;
        stage.stays_stopped();
        what()?;
        stage.stays_stopped();
        stage.signal(Signal::SIGCONT)?;
        Ok(())
    };
    for _ in 0..3 {
        stopped(&|| stage.patch().map(|_| ()))?;
        stage.serves_fused()?;
        stopped(&|| stage.revert())?;
        stage.serves_by_rpc()?;
    }
    node.stop()
}

/// When a worker is to be killed.
#[derive(Debug, Clone, Copy)]
enum When {
    /// So long after the patch was asked for.
    After(Duration),
    /// When it is stopped for this time: first to prepare, then to commit.
    Stopped(usize),
}

#[test]
fn a_worker_that_dies_during_the_patch_is_reported_and_the_others_go_on() -> Result<()> {
    let node = Arc::new(Node::start(foo_bar_baz(2))?);
    let agent = Arc::new(Agent::start()?);
    let mut times = vec![When::Stopped(1), When::Stopped(2)];
    times.extend([0, 30, 100, 200, 400].map(|ms| When::After(Duration::from_millis(ms))));
    for when in times {
        for victim in 0..2 {
            dies(&node, &agent, when, victim)
                .with_context(|| format!("{when:?}, worker {victim}\n{}", agent.log()))?;
            node.redeploy("Foo", None)?;
        }
    }
    Ok(())
}

fn dies(node: &Arc<Node>, agent: &Arc<Agent>, when: When, victim: usize) -> Result<()> {
    let workers = node.workers("Foo")?;
    ensure!(workers.len() == 2, "{workers:?}");
    let (dead, alive) = (workers[victim].host_pid, workers[1 - victim].host_pid);
    let patch = background(agent, node, |agent, node| {
        agent.patch_unwatched(node, "Foo", "Bar")
    });
    match when {
        When::After(time) => std::thread::sleep(time),
        When::Stopped(times) => traced(dead, times, || patch.is_finished())?,
    }
    kill(Pid::from_raw(dead), Signal::SIGKILL)?;
    let (status, report) = joined(patch)?;
    let workers = match status {
        200 => &report["workers"],
        _ => &report["report"]["workers"],
    };
    let outcome = |pid: i32| {
        let all = workers.as_array().into_iter().flatten();
        let found = all.into_iter().find(|w| w["pid"] == pid);
        found.map_or("absent".to_owned(), |w| {
            w["outcome"]["outcome"].as_str().unwrap_or("?").to_owned()
        })
    };
    let (of_dead, of_alive) = (outcome(dead), outcome(alive));
    println!("{when:?}, worker {victim}: {status}, {of_dead} and {of_alive}");
    if status == 200 {
        // Killed before it was looked for, meanwhile, or afterwards.
        ensure!(
            ["absent", "gone", "fused"].contains(&of_dead.as_str()) && of_alive == "fused",
            "{report}"
        );
    } else {
        // It died while it was watched, as if of the fused code.
        ensure!(report["error"]["code"] == "canary-failed", "{report}");
        ensure!(of_dead == "gone" && of_alive == "not-tried", "{report}");
        let (status, report) = agent.patch_unwatched(node, "Foo", "Bar")?;
        ensure!(status == 200, "{report}");
    }
    until("it is gone", || {
        node.workers("Foo")
            .is_ok_and(|left| left.len() == 1 && left[0].host_pid == alive)
    });
    let stage = Stage::new(node, agent, "Foo")?;
    stage.serves_fused()?;
    stage.revert()?;
    assert_eq!(ask(node, "Foo", "zero"), "Foo:|811c9dc5|00");
    stage.serves_by_rpc()
}

#[test]
fn load_goes_on_while_the_only_other_worker_is_held_inside_a_window() -> Result<()> {
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")),
        FunctionSpec::new("Bar", 2, library("bar.c")),
        FunctionSpec::new("Other", 3, library("foo.c")),
    ]))?;
    let agent = Agent::start()?;
    let held = Stage::new(&node, &agent, "Foo")?;
    let other = Stage::new(&node, &agent, "Other")?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<u64> {
            let mut client = node.client()?;
            let mut answered = 0;
            while !stop.load(Ordering::Relaxed) {
                check("hello", &client.call("Other", b"hello")?)?;
                answered += 1;
            }
            Ok(answered)
        });
        let result = (|| -> Result<()> {
            for _ in 0..3 {
                let (original, _) = places(&held)?;
                let (request, question) = held.hold(original, Signal::SIGSTOP)?;
                held.patch()?;
                other.patch()?;
                other.revert()?;
                held.signal(Signal::SIGCONT)?;
                check(question, &request.answer()?)?;
                held.revert()?;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let answered = load
            .join()
            .unwrap_or_else(|p| std::panic::resume_unwind(p))?;
        result?;
        ensure!(answered > 10, "{answered} answers");
        Ok(())
    })?;
    node.stop()
}

/// Answers "vfork" after its main thread has waited 400 ms in a vfork, where
/// nothing stops it.
const UNSTOPPABLE: &str = r#"
    #define _GNU_SOURCE
    #include <unistd.h>
    #include "foo_logic.h"
    #include "lifecycle.h"
    int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
        if (input_length == 5 && memcmp(input, "vfork", 5) == 0) {
            if (vfork() == 0) {
                usleep(400 * 1000);
                _exit(0);
            }
        }
        return foo_handle(worker_handle, input, input_length);
    }"#;

#[test]
fn a_thread_that_does_not_stop_in_time_is_tried_again() -> Result<()> {
    let caller = fixtures::compile_text("unstoppable", UNSTOPPABLE, Compiler::Gcc, &["-O2"])?;
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, caller),
        FunctionSpec::new("Bar", 2, library("bar.c")),
    ]))?;
    let agent = Agent::start()?;
    let worker = node.workers("Foo")?.pop().context("no worker")?;
    let answer = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| node.call("Foo", b"vfork"));
        until("it waits for its child", || {
            worker
                .status("State")
                .is_some_and(|state| state.starts_with('D'))
        });
        // The first mapping for this worker: the thread is stopped alone.
        let patched = agent.patch(&node, "Foo", "Bar");
        let answer = waiting
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        patched.and(answer.context("the call that waited"))
    })?;
    assert_eq!(answer, fixtures::foo(b"vfork"));
    agent.revert(&node, "Foo", "Bar")?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    node.stop()
}
