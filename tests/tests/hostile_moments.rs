//! Workers that cannot be stopped or touched just now: frozen, waiting for what
//! cannot be interrupted, in a call that must not be moved out of, traced by
//! somebody; and processes that have the number of one that is gone.

mod code;
mod hostile;
#[path = "hold/request.rs"]
mod request;

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use code::Code;
use hostile::{Stage, foo_with};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, until};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use request::Request;

/// Commands that keep the serving thread in a call: "vfork MS", "nanosleep MS",
/// "poll MS", "futex MS", "rseq MS".
const WAITS: &str = r#"
#include <poll.h>
#include <time.h>
#include <linux/futex.h>
#include <sys/rseq.h>
static int word;
static void set_up(void) {}
static long now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000 + at.tv_nsec / 1000000;
}
// Once around in a critical section takes a while; an abort begins it anew.
static void in_section(void) {
    struct rseq *own = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    __asm__ volatile(
        ".pushsection __rseq_cs, \"aw\"\n\t.balign 32\n"
        "3:\t.long 0, 0\n\t.quad 1f, 2f - 1f, 4f\n\t.popsection\n\t"
        "lea 3b(%%rip), %%rax\n\tmov %%rax, %0\n"
        "1:\tmov $2000000, %%rcx\n"
        "5:\tdec %%rcx\n\tjnz 5b\n"
        "2:\tjmp 6f\n\t"
        ".byte 0x0f, 0xb9, 0x3d\n\t.long 0x53053053\n"
        "4:\tnop\n"
        "6:\tmovq $0, %0\n"
        : "+m"(own->rseq_cs)
        :
        : "rax", "rcx", "memory", "cc");
}
static int wait_for(const struct context *ctx, const char *input, size_t length) {
    char text[32] = {0}, how[16] = {0};
    long ms = 0;
    if (length > 31) {
        return 0;
    }
    memcpy(text, input, length);
    if (sscanf(text, "%15s %ld", how, &ms) != 2) {
        return 0;
    }
    const long until = now() + ms;
    if (strcmp(how, "vfork") == 0) {
        pid_t pid = vfork();
        if (pid == 0) {
            struct timespec left = {ms / 1000, ms % 1000 * 1000000};
            nanosleep(&left, NULL);
            _exit(0);
        }
        waitpid(pid, NULL, 0);
    } else if (strcmp(how, "nanosleep") == 0) {
        struct timespec left = {ms / 1000, ms % 1000 * 1000000};
        MUST(syscall(SYS_nanosleep, &left, &left) == 0);
    } else if (strcmp(how, "poll") == 0) {
        MUST(poll(NULL, 0, (int)ms) == 0);
    } else if (strcmp(how, "futex") == 0) {
        struct timespec left = {ms / 1000, ms % 1000 * 1000000};
        MUST(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &left) == -1 && errno == ETIMEDOUT);
    } else if (strcmp(how, "rseq") == 0) {
        while (__rseq_size != 0 && now() < until) {
            in_section();
        }
    } else {
        return 0;
    }
    snprintf(text, sizeof text, "%s", now() >= until - 1 ? "in time" : "too early");
    say(ctx, text);
    return 1;
}
#define COMMAND wait_for
"#;

fn library(name: &str) -> Result<std::path::PathBuf> {
    fixtures::compile(name, Compiler::Gcc, &["-O2"])
}

/// Foo with so many workers, and Bar.
fn plain_node(workers: u16) -> Result<Node> {
    Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")?).workers(workers, workers),
        FunctionSpec::new("Bar", 2, library("bar.c")?),
    ]))
}

fn waiting_node() -> Result<Node> {
    Node::start(NodeSpec::new([
        FunctionSpec::new("Bar", 1, library("bar.c")?),
        FunctionSpec::new("Foo", 2, foo_with(WAITS)?),
    ]))
}

/// The state letter of the leader, and the call that it is in.
fn whereabouts(pid: i32) -> (char, String) {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    let call = read("syscall");
    let call = call.split_whitespace().next().unwrap_or_default();
    (state.unwrap_or('?'), call.to_owned())
}

#[test]
fn a_thread_that_cannot_be_interrupted_is_waited_for_and_then_told() -> Result<()> {
    let node = waiting_node()?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    let _ = stage.code()?;
    // Its child has the processor: an uninterruptible wait, state D.
    let asleep = |ms: u64| -> Result<Request> {
        let request = Request::send(&node, "Foo", &format!("vfork {ms}"))?;
        until("it waits for its child", || whereabouts(stage.pid).0 == 'D');
        Ok(request)
    };
    let request = asleep(10_000)?;
    let before = Code::of(stage.pid)?;
    stage.refuses("not-stopping", &["state D", "vfork"])?;
    ensure!(!request.is_answered(), "it was over too soon");
    before.unchanged()?;
    ensure!(request.answer()? == b"in time");
    stage.is_alone()?;

    stage.patch()?;
    stage.serves_fused()?;
    let request = asleep(10_000)?;
    let (status, report) = agent.try_revert(&node, "Foo", "Bar")?;
    let worker = &report["workers"][0];
    ensure!(
        status == 200 && worker["outcome"]["outcome"] == "gate-off",
        "{report}"
    );
    ensure!(!request.is_answered(), "it was over too soon");
    ensure!(request.answer()? == b"in time");
    stage.serves_by_rpc()?;
    stage.revert()?;
    stage.serves_by_rpc()?;
    node.stop()
}

#[test]
fn calls_that_go_on_from_a_restart_block_are_waited_for() -> Result<()> {
    let node = waiting_node()?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    let _ = stage.code()?;
    for (call, number) in [("nanosleep", "35"), ("poll", "7"), ("futex", "202")] {
        (|| -> Result<()> {
            // As long as it may: found in the call, it is tried again.
            let request = Request::send(&node, "Foo", &format!("{call} 1200"))?;
            until("it is in the call", || whereabouts(stage.pid).1 == number);
            stage.patch()?;
            ensure!(request.answer()? == b"in time");
            stage.serves_fused()?;
            let request = Request::send(&node, "Foo", &format!("{call} 1200"))?;
            until("it is in the call", || whereabouts(stage.pid).1 == number);
            // That needs no call of ours: it is stopped where it is.
            stage.revert()?;
            ensure!(request.answer()? == b"in time");
            stage.serves_by_rpc()
        })()
        .context(call)?;
    }
    node.stop()
}

#[test]
fn a_call_that_goes_on_from_a_restart_block_for_too_long_is_refused() -> Result<()> {
    // A worker that nothing is mapped into yet.
    let node = waiting_node()?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    let _ = stage.code()?;
    let request = Request::send(&node, "Foo", "nanosleep 10000")?;
    until("it is in the call", || whereabouts(stage.pid).1 == "35");
    let before = Code::of(stage.pid)?;
    // Stopped once, the call goes by another name.
    stage.refuses("no-moment", &["restart block"])?;
    ensure!(!request.is_answered(), "it was over too soon");
    before.unchanged()?;
    ensure!(request.answer()? == b"in time");
    stage.works()?;
    node.stop()
}

#[test]
fn a_thread_in_rseq_critical_sections_is_patched_between_them() -> Result<()> {
    let node = waiting_node()?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    for _ in 0..3 {
        let request = Request::send(&node, "Foo", "rseq 500")?;
        stage.patch()?;
        ensure!(request.answer()? == b"in time");
        stage.serves_fused()?;
        let request = Request::send(&node, "Foo", "rseq 300")?;
        stage.revert()?;
        ensure!(request.answer()? == b"in time");
        stage.serves_by_rpc()?;
    }
    node.stop()
}

/// A container's group of the freezer, thawed again when this is dropped.
struct Freezer(String);

impl Freezer {
    fn set(&self, state: &str) -> Result<()> {
        fs::write(&self.0, state).with_context(|| self.0.clone())?;
        until("the group is frozen or thawed", || {
            fs::read_to_string(&self.0).is_ok_and(|now| now.trim() == state)
        });
        Ok(())
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = fs::write(&self.0, "THAWED");
    }
}

#[test]
fn a_frozen_worker_is_left_alone() -> Result<()> {
    if !fs::exists("/sys/fs/cgroup/freezer/tasks")? {
        eprintln!("skipped: no freezer of cgroup v1 here");
        return Ok(());
    }
    let node = plain_node(1)?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    let container = stage.worker()?.container;
    let freezer = Freezer(format!(
        "/sys/fs/cgroup/freezer/docker/{container}/freezer.state"
    ));
    let before = stage.code()?;
    freezer.set("FROZEN")?;
    stage.refuses("frozen", &["thaw"])?;
    let explained = agent.edge(&node, "explain", "Foo", "Bar")?;
    ensure!(explained.error_code() == "frozen", "{explained:?}");
    before.unchanged()?;
    freezer.set("THAWED")?;
    stage.serves()?;
    stage.patch()?;
    stage.serves_fused()?;

    // The gate is a byte of memory: no thread needs to run for it.
    freezer.set("FROZEN")?;
    let (status, report) = agent.try_revert(&node, "Foo", "Bar")?;
    freezer.set("THAWED")?;
    let worker = &report["workers"][0];
    ensure!(
        status == 200 && worker["outcome"]["outcome"] == "gate-off",
        "{report}"
    );
    stage.serves_by_rpc()?;
    stage.revert()?;
    stage.serves_by_rpc()?;
    node.stop()
}

/// Traces the worker's leader again and again, for moments, until told to stop.
fn trace_at_times(pid: Pid, stop: &AtomicBool) -> Result<u64> {
    let mut times = 0;
    while !stop.load(Ordering::Relaxed) {
        // EPERM: the agent has it.
        if ptrace::seize(pid, ptrace::Options::empty()).is_ok() {
            std::thread::sleep(Duration::from_micros(300));
            ptrace::interrupt(pid)?;
            waitpid(pid, Some(WaitPidFlag::__WALL))?;
            ptrace::detach(pid, None)?;
            times += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(times)
}

#[test]
fn a_worker_that_is_traced_by_another_in_mid_patch() -> Result<()> {
    let node = plain_node(1)?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    let original = stage.code()?;
    let stop = AtomicBool::new(false);
    let pid = Pid::from_raw(stage.pid);
    std::thread::scope(|scope| {
        let tracer = scope.spawn(|| trace_at_times(pid, &stop));
        let result = (|| -> Result<()> {
            let (mut fused, mut refused) = (0, 0);
            let deadline = Instant::now() + Duration::from_secs(40);
            while fused < 3 || refused < 3 {
                ensure!(
                    Instant::now() < deadline,
                    "{fused} fused and {refused} refused"
                );
                let (status, report) = stage.try_patch()?;
                if status == 200 {
                    fused += 1;
                    stage.answers()?;
                    // Whatever comes of it, in the end it is reverted.
                    while agent.try_revert(&node, "Foo", "Bar")?.0 != 200 {
                        stage.answers()?;
                    }
                } else {
                    ensure!(
                        report["error"]["code"] == "worker-traced",
                        "{status} {report}"
                    );
                    refused += 1;
                    stage.answers()?;
                }
                original.runs_the_same()?;
            }
            println!("{fused} fused, {refused} refused");
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let traced = tracer
            .join()
            .unwrap_or_else(|p| std::panic::resume_unwind(p));
        result?;
        ensure!(traced? > 0, "never traced");
        Ok(())
    })?;
    stage.works()?;
    node.stop()
}

/// Starts processes until one has this number, which must be free.
fn with_number(pid: i32) -> Result<std::process::Child> {
    for _ in 0..200 {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())?;
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()?;
        if child.id().cast_signed() == pid {
            // Before it sleeps it maps what it needs.
            let sleeping = format!("{} ", libc::SYS_clock_nanosleep);
            until("it sleeps", || {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "sleep\n")
                    && fs::read_to_string(format!("/proc/{pid}/syscall"))
                        .is_ok_and(|call| call.starts_with(&sleeping))
            });
            return Ok(child);
        }
        child.kill()?;
        child.wait()?;
    }
    anyhow::bail!("no process gets the number {pid}")
}

#[test]
fn a_process_with_the_number_of_a_dead_worker_is_not_taken_for_it() -> Result<()> {
    let node = plain_node(2)?;
    let agent = Agent::start()?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    let workers = node.workers("Foo")?;
    let dead = workers[0].host_pid;
    kill(Pid::from_raw(dead), Signal::SIGKILL)?;
    until("it is gone", || {
        !fs::exists(format!("/proc/{dead}")).unwrap_or(true)
    });
    let mut other = with_number(dead)?;
    let result = (|| -> Result<()> {
        let before = Code::of(dead)?;
        let status = agent.edge_status(&node, "Foo", "Bar")?;
        ensure!(
            !status.to_string().contains(&format!("\"pid\":{dead},")),
            "{status}"
        );
        let patched = agent.patch(&node, "Foo", "Bar")?;
        ensure!(patched["already"] == true, "{patched}");
        agent.revert(&node, "Foo", "Bar")?;
        agent.patch(&node, "Foo", "Bar")?;
        before.unchanged()?;
        let health = agent.ctl(&["health", "--json"])?.json()?;
        let accused = format!("\"engine\":{}", node.engine_pid());
        ensure!(
            !health["quarantined"].to_string().contains(&accused),
            "{health}"
        );
        Ok(())
    })();
    other.kill()?;
    other.wait()?;
    result?;
    let left = node.workers("Foo")?;
    ensure!(left.len() == 1 && left[0].host_pid == workers[1].host_pid);
    agent.revert(&node, "Foo", "Bar")?;
    node.stop()
}
