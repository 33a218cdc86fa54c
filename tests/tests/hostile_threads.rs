//! Workers whose threads, signals and children never rest: they are fused and
//! reverted under way, and nothing of theirs is lost.

mod code;
mod hostile;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hostile::{Stage, check, foo_with};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A node with Bar and callers of these names, each with its lines.
fn node(callers: &[(&str, &str)]) -> Result<Node> {
    let bar = fixtures::compile("bar.c", Compiler::Gcc, &["-O2"])?;
    let mut functions = vec![FunctionSpec::new("Bar", 1, bar)];
    for ((name, lines), id) in callers.iter().zip(2..) {
        let caller = foo_with(lines).context((*name).to_owned())?;
        functions.push(FunctionSpec::new(name, id, caller));
    }
    Node::start(NodeSpec::new(functions))
}

/// Patched and reverted so often, with requests all the time.
fn cycles(stage: &Stage<'_>, times: usize) -> Result<()> {
    let stop = AtomicBool::new(false);
    let (node, caller) = (stage.node, stage.caller);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<u64> {
            let mut client = node.client()?;
            let mut answered = 0;
            while !stop.load(Ordering::Relaxed) {
                check("hello", &client.call(caller, b"hello")?)?;
                answered += 1;
            }
            Ok(answered)
        });
        let result = (0..times).try_for_each(|_| -> Result<()> {
            stage.patch()?;
            stage.agent.warm_up(node, caller, "Bar")?;
            stage.serves()?;
            stage.revert()?;
            stage.serves()
        });
        stop.store(true, Ordering::Relaxed);
        let answered = load.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        result?;
        let answered = answered.with_context(|| node.all_logs())?;
        ensure!(answered > 0, "no request was answered");
        Ok(())
    })?;
    stage.serves_by_rpc()
}

/// The numbers of an answer such as "born 12 joined 12".
fn numbers(answer: &str) -> BTreeMap<String, u64> {
    let words: Vec<&str> = answer.split_whitespace().collect();
    let pairs = words.chunks_exact(2);
    pairs
        .filter_map(|pair| Some((pair[0].to_owned(), pair[1].parse().ok()?)))
        .collect()
}

const BIRTHS: &str = r#"
static atomic_ulong born;
static void *child(void *argument) {
    atomic_fetch_add(&born, 1);
    return argument;
}
static void *mother(void *argument) {
    for (;;) {
        pthread_t all[8];
        int made = 0;
        while (made < 8 && pthread_create(&all[made], NULL, child, NULL) == 0) {
            made++;
        }
        for (int i = 0; i < made; i++) {
            pthread_join(all[i], NULL);
        }
    }
    return argument;
}
static void set_up(void) {
    pthread_t thread;
    for (int i = 0; i < 2; i++) {
        MUST(pthread_create(&thread, NULL, mother, NULL) == 0);
    }
}
static int tell(const struct context *ctx, const char *input, size_t length) {
    char text[64];
    if (length != 4 || memcmp(input, "tell", 4) != 0) {
        return 0;
    }
    snprintf(text, sizeof text, "born %lu", atomic_load(&born));
    say(ctx, text);
    return 1;
}
#define COMMAND tell
"#;

/// Forks, vforks, executes and clones without a pause; every child must end as
/// it is meant to.
const CHILDREN: &str = r#"
static atomic_ulong forked, vforked, executed, wrong;
static atomic_int last_wrong;
static void ends_with(pid_t pid, int code, atomic_ulong *count) {
    int status;
    while (waitpid(pid, &status, 0) == -1 && errno == EINTR) {
    }
    atomic_fetch_add(WIFEXITED(status) && WEXITSTATUS(status) == code ? count : &wrong, 1);
}
static void *forks(void *argument) {
    for (;;) {
        pid_t pid = fork();
        if (pid == 0) {
            _exit(7);
        }
        ends_with(pid, 7, &forked);
    }
    return argument;
}
static void *vforks(void *argument) {
    for (;;) {
        pid_t pid = vfork();
        if (pid == 0) {
            _exit(9);
        }
        ends_with(pid, 9, &vforked);
    }
    return argument;
}
static void *executes(void *argument) {
    char *const arguments[] = {(char *)"func_worker_v1", NULL}, *const none[] = {NULL};
    for (;;) {
        pid_t pid = vfork();
        if (pid == 0) {
            dup2(open("/dev/null", O_WRONLY), 2); // it complains about its arguments
            execve("/nightcore/func_worker_v1", arguments, none);
            _exit(99);
        }
        int status;
        while (waitpid(pid, &status, 0) == -1 && errno == EINTR) {
        }
        // It ran, and ended for want of arguments, one way or the other.
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 99) {
            atomic_fetch_add(&executed, 1);
        } else {
            atomic_store(&last_wrong, status);
            atomic_fetch_add(&wrong, 1);
        }
        usleep(2000);
    }
    return argument;
}
static void set_up(void) {
    pthread_t thread;
    MUST(pthread_create(&thread, NULL, forks, NULL) == 0);
    MUST(pthread_create(&thread, NULL, vforks, NULL) == 0);
    MUST(pthread_create(&thread, NULL, executes, NULL) == 0);
}
static int tell(const struct context *ctx, const char *input, size_t length) {
    char text[128];
    if (length != 4 || memcmp(input, "tell", 4) != 0) {
        return 0;
    }
    snprintf(text, sizeof text, "forked %lu vforked %lu executed %lu wrong %lu last %d",
             atomic_load(&forked), atomic_load(&vforked), atomic_load(&executed),
             atomic_load(&wrong), atomic_load(&last_wrong));
    say(ctx, text);
    return 1;
}
#define COMMAND tell
"#;

/// Signals to the thread that serves: queued ones, which must not get lost, and
/// a timer's; their handlers run on an alternate stack.
const SIGNALS: &str = r#"
static atomic_ulong sent, handled, ticks;
static atomic_int storming;
static pthread_t main_thread;
static void on_queued(int number, siginfo_t *info, void *context) {
    (void)number, (void)info, (void)context;
    atomic_fetch_add(&handled, 1);
}
static void on_tick(int number, siginfo_t *info, void *context) {
    char here = 0;
    (void)number, (void)info, (void)context;
    atomic_fetch_add(&ticks, (volatile char *)&here != NULL);
}
static void *storms(void *argument) {
    union sigval none = {0};
    for (;;) {
        // Few at a time: the queue has its limit.
        if (atomic_load(&storming) && atomic_load(&sent) - atomic_load(&handled) < 16 &&
            pthread_sigqueue(main_thread, SIGRTMIN + 3, none) == 0) {
            atomic_fetch_add(&sent, 1);
        }
        usleep(150);
    }
    return argument;
}
static void set_up(void) {
    static char stack[65536];
    stack_t other = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK};
    pthread_t thread;
    MUST(sigaltstack(&other, NULL) == 0);
    action.sa_sigaction = on_queued;
    MUST(sigaction(SIGRTMIN + 3, &action, NULL) == 0);
    action.sa_sigaction = on_tick;
    MUST(sigaction(SIGALRM, &action, NULL) == 0);
    main_thread = pthread_self();
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    MUST(pthread_create(&thread, NULL, storms, NULL) == 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
static int tell(const struct context *ctx, const char *input, size_t length) {
    char text[128];
    struct itimerval timer = {{0, 400}, {0, 400}}, off = {{0, 0}, {0, 0}};
    if (length == 5 && memcmp(input, "storm", 5) == 0) {
        atomic_store(&storming, 1);
        setitimer(ITIMER_REAL, &timer, NULL);
        say(ctx, "storming");
        return 1;
    }
    if (length != 4 || memcmp(input, "tell", 4) != 0) {
        return 0;
    }
    atomic_store(&storming, 0);
    setitimer(ITIMER_REAL, &off, NULL);
    for (int i = 0; i < 1000 && atomic_load(&sent) != atomic_load(&handled); i++) {
        usleep(1000);
    }
    snprintf(text, sizeof text, "sent %lu handled %lu ticks %lu", atomic_load(&sent),
             atomic_load(&handled), atomic_load(&ticks));
    say(ctx, text);
    return 1;
}
#define COMMAND tell
"#;

const HEADERS: &str = "#include <stdatomic.h>\n#include <sys/time.h>\n";

#[test]
fn threads_children_and_signals_without_a_pause() -> Result<()> {
    let with_headers = |lines: &str| format!("{HEADERS}{lines}");
    let (births, children, signals) = (
        with_headers(BIRTHS),
        with_headers(CHILDREN),
        with_headers(SIGNALS),
    );
    let node = node(&[
        ("Births", &births),
        ("Children", &children),
        ("Signals", &signals),
    ])?;
    let agent = Agent::start()?;

    let stage = Stage::new(&node, &agent, "Births")?;
    let mut born = 0;
    while born < 3_000 {
        cycles(&stage, 2).context("Births")?;
        born = *numbers(&stage.ask("tell")?).get("born").context("born")?;
    }

    let stage = Stage::new(&node, &agent, "Children")?;
    cycles(&stage, 4).context("Children")?;
    let told = numbers(&stage.ask("tell")?);
    ensure!(told["wrong"] == 0, "{told:?}");
    for kind in ["forked", "vforked", "executed"] {
        ensure!(told[kind] > 3, "{told:?}");
    }

    let stage = Stage::new(&node, &agent, "Signals")?;
    ensure!(stage.ask("storm")? == "storming");
    cycles(&stage, 4).context("Signals")?;
    let told = numbers(&stage.ask("tell")?);
    ensure!(
        told["sent"] == told["handled"],
        "a signal was lost: {told:?}"
    );
    ensure!(told["sent"] > 50 && told["ticks"] > 50, "{told:?}");
    node.stop()
}

#[test]
fn a_worker_that_is_stopped_and_continued_all_the_time() -> Result<()> {
    let node = node(&[("Foo", "static void set_up(void) {}\n")])?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    let stop = AtomicBool::new(false);
    let pid = Pid::from_raw(stage.pid);
    std::thread::scope(|scope| {
        let storm = scope.spawn(|| -> Result<u64> {
            let mut times = 0;
            while !stop.load(Ordering::Relaxed) {
                kill(pid, Signal::SIGSTOP)?;
                std::thread::sleep(Duration::from_millis(2));
                kill(pid, Signal::SIGCONT)?;
                std::thread::sleep(Duration::from_millis(3));
                times += 1;
            }
            Ok(times)
        });
        let result = cycles(&stage, 5);
        stop.store(true, Ordering::Relaxed);
        let times = storm
            .join()
            .unwrap_or_else(|p| std::panic::resume_unwind(p))?;
        result?;
        ensure!(times > 10, "stopped {times} times only");
        Ok(())
    })?;
    stage.works()?;
    node.stop()
}

/// One thread in each call. Each counts how often its call came back without
/// what it waited for: interrupted, or with less than all.
const BLOCKED: &str = r#"
#include <poll.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <linux/futex.h>
struct call {
    const char *name;
    long (*wait)(void);
    atomic_ulong seen;
    atomic_int begun;
};
static int nothing[2], full[2], sockets[2], full_socket[2], epoll, event, timer, set;
static char large[1 << 20];
static sigset_t some;
static const struct timespec hour = {3600, 0};
static int word;

static long do_epoll(void) {
    struct epoll_event one;
    return syscall(SYS_epoll_wait, epoll, &one, 1, -1);
}
static long do_epoll_pwait(void) {
    struct epoll_event one;
    return syscall(SYS_epoll_pwait, epoll, &one, 1, -1, NULL, 8);
}
static long do_recvfrom(void) {
    char byte;
    return syscall(SYS_recvfrom, sockets[0], &byte, 1, 0, NULL, NULL);
}
static long do_sendto(void) {
    return syscall(SYS_sendto, full_socket[0], large, sizeof large, 0, NULL, 0);
}
static long do_write(void) { return syscall(SYS_write, full[1], large, sizeof large); }
static long do_sigtimedwait(void) {
    siginfo_t info;
    return syscall(SYS_rt_sigtimedwait, &some, &info, &hour, 8);
}
static long do_read(void) {
    char byte;
    return syscall(SYS_read, nothing[0], &byte, 1);
}
static long do_eventfd(void) {
    uint64_t number;
    return syscall(SYS_read, event, &number, 8);
}
static long do_timerfd(void) {
    uint64_t number;
    return syscall(SYS_read, timer, &number, 8);
}
static long do_poll(void) {
    struct pollfd one = {nothing[0], POLLIN, 0};
    return syscall(SYS_poll, &one, 1, 3600000);
}
static long do_ppoll(void) {
    struct pollfd one = {nothing[0], POLLIN, 0};
    struct timespec left = hour;
    return syscall(SYS_ppoll, &one, 1, &left, NULL, 8);
}
static long do_select(void) {
    struct timeval left = {3600, 0};
    return syscall(SYS_select, 0, NULL, NULL, NULL, &left);
}
static long do_futex(void) { return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &hour); }
static long do_nanosleep(void) { return syscall(SYS_nanosleep, &hour, NULL); }
static long do_clock(void) { return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &hour, NULL); }
static long do_pause(void) { return syscall(SYS_pause); }
static long do_semtimedop(void) {
    struct sembuf take = {0, -1, 0};
    return syscall(SYS_semtimedop, set, &take, 1, &hour);
}
static long do_wait(void) { return syscall(SYS_wait4, -1, NULL, __WNOTHREAD, NULL); }

static struct call calls[] = {
    {"epoll_wait", do_epoll, 0, 0},       {"epoll_pwait", do_epoll_pwait, 0, 0},
    {"recvfrom", do_recvfrom, 0, 0},      {"sendto", do_sendto, 0, 0},
    {"write", do_write, 0, 0},            {"rt_sigtimedwait", do_sigtimedwait, 0, 0},
    {"read", do_read, 0, 0},              {"read", do_eventfd, 0, 0},
    {"read", do_timerfd, 0, 0},           {"poll", do_poll, 0, 0},
    {"ppoll", do_ppoll, 0, 0},            {"select", do_select, 0, 0},
    {"futex", do_futex, 0, 0},            {"nanosleep", do_nanosleep, 0, 0},
    {"clock_nanosleep", do_clock, 0, 0},  {"pause", do_pause, 0, 0},
    {"semtimedop", do_semtimedop, 0, 0},
};
#define CALLS (sizeof calls / sizeof calls[0])

static void *blocks(void *argument) {
    struct call *call = argument;
    for (;;) {
        atomic_store(&call->begun, 1);
        call->wait();
        atomic_fetch_add(&call->seen, 1);
    }
    return NULL;
}
static void set_up(void) {}
// Not before the worker has its own descriptors.
static void start(void) {
    pthread_t thread;
    struct timeval wait = {3600, 0};
    struct itimerspec never = {{0, 0}, {36000, 0}};
    MUST(pipe(nothing) == 0 && pipe(full) == 0);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    MUST(setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) == 0);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, full_socket) == 0);
    MUST((epoll = epoll_create1(0)) >= 0 && (event = eventfd(0, 0)) >= 0);
    MUST((timer = timerfd_create(CLOCK_MONOTONIC, 0)) >= 0);
    MUST(timerfd_settime(timer, 0, &never, NULL) == 0);
    MUST((set = semget(IPC_PRIVATE, 1, 0600)) >= 0);
    sigemptyset(&some);
    sigaddset(&some, SIGUSR2);
    (void)do_wait;
    for (size_t i = 0; i < CALLS; i++) {
        MUST(pthread_create(&thread, NULL, blocks, &calls[i]) == 0);
    }
}
static int tell(const struct context *ctx, const char *input, size_t length) {
    char text[64];
    static int started;
    if (length != 4 || memcmp(input, "tell", 4) != 0) {
        return 0;
    }
    if (!started) {
        started = 1;
        start();
    }
    for (size_t i = 0; i < CALLS; i++) {
        snprintf(text, sizeof text, "%s %lu ", calls[i].name,
                 atomic_load(&calls[i].begun) ? atomic_load(&calls[i].seen) : 999999);
        say(ctx, text);
    }
    return 1;
}
#define COMMAND tell
"#;

/// What a report says that threads may have seen of its stops.
fn disturbed(report: &Value) -> Vec<String> {
    let all = report["workers"][0]["receipt"]["disturbed"].as_array();
    let all = all.into_iter().flatten();
    all.filter_map(|d| Some(d["syscall"].as_str()?.to_owned()))
        .collect()
}

#[test]
fn what_blocked_threads_see_of_a_stop_is_said() -> Result<()> {
    let node = node(&[("Foo", BLOCKED)])?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    // Several of a name come one after the other: only whether any saw it.
    let seen = || -> Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        let told = stage.ask("tell")?;
        let words: Vec<&str> = told.split_whitespace().collect();
        for pair in words.chunks_exact(2) {
            *all.entry(pair[0].to_owned()).or_insert(0) += pair[1].parse::<u64>()?;
        }
        Ok(all)
    };
    while seen()?.values().any(|count| *count >= 999_999) {
        std::thread::sleep(Duration::from_millis(5));
    }
    // They have begun, and a moment later they wait.
    std::thread::sleep(Duration::from_millis(50));
    let mut saw = BTreeMap::<String, u64>::new();
    for _ in 0..4 {
        for step in ["patch", "revert"] {
            let before = seen()?;
            let report = if step == "patch" {
                stage.patch()?
            } else {
                stage.revert()?
            };
            let said = disturbed(&report);
            for (name, count) in seen()? {
                let more = count - before[&name];
                *saw.entry(name.clone()).or_default() += more;
                ensure!(
                    more == 0 || said.contains(&name),
                    "{name} came back, and the {step} says {said:?}"
                );
            }
        }
        stage.serves_by_rpc()?;
    }
    println!("came back early: {saw:?}");
    // So that the test is one, and so that the others are not disturbed at all.
    ensure!(
        saw["epoll_wait"] > 0 && saw["rt_sigtimedwait"] > 0,
        "{saw:?}"
    );
    for name in [
        "read",
        "poll",
        "ppoll",
        "select",
        "futex",
        "nanosleep",
        "clock_nanosleep",
        "pause",
    ] {
        ensure!(saw[name] == 0, "{name}: {saw:?}");
    }
    node.stop()
}

/// Ends the process, or makes it another, so many microseconds after a request.
const ENDS: &str = r#"
static long delay;
static void *ends(void *how) {
    usleep((useconds_t)delay);
    if (how != NULL) {
        syscall(SYS_exit_group, 0);
    }
    char *const arguments[] = {(char *)"func_worker_v1", NULL}, *const none[] = {NULL};
    execve("/proc/self/exe", arguments, none);
    abort();
}
static void set_up(void) {}
static int end(const struct context *ctx, const char *input, size_t length) {
    pthread_t thread;
    char number[16] = {0};
    if (length < 6 || length > 15 || (memcmp(input, "exit ", 5) != 0 && memcmp(input, "exec ", 5) != 0)) {
        return 0;
    }
    memcpy(number, input + 5, length - 5);
    delay = atol(number);
    MUST(pthread_create(&thread, NULL, ends, input[2] == 'i' ? (void *)1 : NULL) == 0);
    say(ctx, "soon");
    return 1;
}
#define COMMAND end
"#;

#[test]
fn a_worker_that_ends_or_executes_in_the_middle_of_a_patch() -> Result<()> {
    const DELAYS: [u32; 8] = [0, 1_000, 5_000, 10_000, 20_000, 40_000, 80_000, 160_000];
    let bar = fixtures::compile("bar.c", Compiler::Gcc, &["-O2"])?;
    let foo = foo_with(ENDS)?;
    let mut functions = vec![FunctionSpec::new("Bar", 1, bar)];
    let names: Vec<(String, String)> = ["exit", "exec"]
        .into_iter()
        .flat_map(|how| DELAYS.map(|us| (format!("F{how}{us}"), format!("{how} {us}"))))
        .collect();
    for ((name, _), id) in names.iter().zip(2..) {
        functions.push(FunctionSpec::new(name, id, &foo));
    }
    functions.push(FunctionSpec::new("Stays", 99, &foo));
    let node = Node::start(NodeSpec::new(functions))?;
    let agent = Agent::start()?;
    let mut came = BTreeMap::<String, u32>::new();
    for (name, command) in &names {
        let stage = Stage::new(&node, &agent, name)?;
        ensure!(stage.ask(command)? == "soon");
        let (status, report) = stage.try_patch()?;
        let code = match report["error"]["code"].as_str() {
            None => "fused",
            Some(code) => code,
        };
        // Fused, and gone before it was first looked at.
        let text = report["error"]["message"].to_string();
        let vanished = code == "canary-failed"
            && (text.contains("it exited while it was watched")
                || command.starts_with("exec") && text.contains("nothing of the patch is there"));
        ensure!(
            vanished
                || ["fused", "worker-gone", "no-workers"].contains(&code)
                // A program that has not come to loading its libraries yet.
                || command.starts_with("exec") && ["not-native", "graft-failed"].contains(&code),
            "{command}: {status} {report}\n{}",
            agent.log()
        );
        *came.entry(code.to_owned()).or_default() += 1;
    }
    println!("{came:?}");
    // So that some did end in the middle.
    ensure!(came.contains_key("worker-gone"), "{came:?}");
    Stage::new(&node, &agent, "Stays")?.works()?;
    node.stop()
}
