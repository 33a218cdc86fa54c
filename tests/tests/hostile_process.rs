//! Workers that may not do what others may, or have no room: what they forbid
//! themselves, their limits, their containers.
//!
//! Each caller's `probe` tells that its state is what it is meant to be.

mod code;
mod hostile;

use std::fs;

use anyhow::{Context, Result, ensure};
use hostile::{Stage, foo_with};
use nightgraft_testbed::container::Oddities;
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};

/// What must come of a patch.
enum Expected {
    Works,
    /// The refusal's code, and words of it.
    Refused(&'static str, &'static [&'static str]),
}
use Expected::{Refused, Works};

struct Case {
    name: &'static str,
    /// Defines `set_up` and `probe`, which answers "yes".
    lines: &'static str,
    expected: Expected,
}

/// Answers "probe" by the case's function of that name.
const PROBE: &str = r#"
static int on_probe(const struct context *ctx, const char *input, size_t length) {
    if (length != 5 || memcmp(input, "probe", 5) != 0) {
        return 0;
    }
    say(ctx, probe() ? "yes" : "no");
    return 1;
}
#define COMMAND on_probe
"#;

fn bar(id: u16) -> Result<FunctionSpec> {
    let bar = fixtures::compile("bar.c", Compiler::Gcc, &["-O2"])?;
    Ok(FunctionSpec::new("Bar", id, bar))
}

fn node(cases: &[Case]) -> Result<Node> {
    let mut functions = vec![bar(1)?];
    for (case, id) in cases.iter().zip(2..) {
        let caller = foo_with(&[case.lines, PROBE].concat()).context(case.name)?;
        functions.push(FunctionSpec::new(case.name, id, caller));
    }
    Node::start(NodeSpec::new(functions))
}

fn run(node: &Node, agent: &Agent, case: &Case) -> Result<()> {
    let stage = Stage::new(node, agent, case.name)?;
    let probed = stage.ask("probe")?;
    ensure!(probed == "yes", "it is not as it should be: {probed}");
    match case.expected {
        Works => stage.works().map(drop)?,
        Refused(code, words) => stage.is_refused(code, words)?,
    }
    let probed = stage.ask("probe")?;
    ensure!(probed == "yes", "it is no longer as it should be: {probed}");
    Ok(())
}

fn run_all(agent: &Agent, cases: &[Case]) -> Result<()> {
    let node = node(cases)?;
    for case in cases {
        run(&node, agent, case).context(case.name)?;
    }
    node.stop()
}

#[test]
fn what_a_worker_forbids_itself() -> Result<()> {
    let cases = [
        Case {
            name: "Mdwe",
            // Linux 6.3. Nothing becomes executable that was not mapped so.
            lines: r"
static void set_up(void) { MUST(prctl(65, 1, 0, 0, 0) == 0 || errno == EINVAL); }
static int probe(void) {
    void *both = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return both == MAP_FAILED || prctl(66, 0, 0, 0, 0) == -1;
}",
            expected: Works,
        },
        Case {
            name: "NotDumpable",
            lines: r"
static void set_up(void) { MUST(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0); }
static int probe(void) { return prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0; }",
            expected: Works,
        },
        Case {
            name: "NoNewPrivileges",
            lines: r"
static void set_up(void) { MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0); }
static int probe(void) { return prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1; }",
            expected: Works,
        },
        Case {
            name: "NoCapabilities",
            lines: r"
static void set_up(void) {
    uint32_t header[2] = {0x20080522, 0}, none[6] = {0};
    for (int i = 0; i < 64; i++) {
        prctl(PR_CAPBSET_DROP, i, 0, 0, 0);
    }
    MUST(syscall(SYS_capset, header, none) == 0);
}
static int probe(void) {
    uint32_t header[2] = {0x20080522, 0}, all[6] = {1, 1, 1, 1, 1, 1};
    syscall(SYS_capget, header, all);
    return (all[0] | all[1] | all[3] | all[4]) == 0 && prctl(PR_CAPBSET_READ, 0, 0, 0, 0) == 0;
}",
            expected: Works,
        },
        Case {
            name: "OtherUser",
            // At the first request: everything is open by then.
            lines: r"
static void set_up(void) {}
static int probe(void) {
    return (geteuid() == 65534 || setresuid(65534, 65534, 65534) == 0) && geteuid() == 65534;
}",
            expected: Works,
        },
        Case {
            name: "Dispatched",
            lines: r#"
static char selector; // 0: the kernel's
static void set_up(void) { MUST(prctl(59, 1, 0, 0, &selector) == 0); }
static int probe(void) { return 1; }"#,
            expected: Refused("call-denied", &["mmap", "syscall user dispatch"]),
        },
    ];
    run_all(&Agent::start()?, &cases)
}

/// Installs filters that look at a call's number first.
const FILTER: &str = r"
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define ON(nr, action) \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), BPF_STMT(BPF_RET | BPF_K, action)
#define NUMBER BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))
static void install(struct sock_filter *filter, unsigned short length) {
    struct sock_fprog program = {length, filter};
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}
#define INSTALL(...) do { \
        struct sock_filter filter[] = {NUMBER, __VA_ARGS__, ALLOW}; \
        install(filter, sizeof filter / sizeof filter[0]); \
    } while (0)
static int probe(void) { return prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 2; }
";

const FILTERS: [(&str, &str, Expected); 8] = [
    (
        "FailsExecutable",
        // Only what is executable: the third argument's low half.
        "INSTALL(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 3),
                 BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 32),
                 BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 0, 1),
                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM));",
        Refused("call-denied", &["mmap", "EPERM"]),
    ),
    (
        "KillsMemfd",
        "INSTALL(ON(SYS_memfd_create, SECCOMP_RET_KILL_PROCESS));",
        Refused("call-denied", &["memfd_create", "kills"]),
    ),
    (
        "KillsThread",
        "INSTALL(ON(SYS_munmap, SECCOMP_RET_KILL_THREAD));",
        Refused("call-denied", &["munmap", "kills"]),
    ),
    (
        "KillsBridge",
        // Nothing that we do: what the bridge does when an answer grows.
        "INSTALL(ON(SYS_mremap, SECCOMP_RET_KILL_PROCESS));",
        Refused("call-denied", &["mremap", "kills"]),
    ),
    (
        "Traps",
        "INSTALL(ON(SYS_ftruncate, SECCOMP_RET_TRAP));",
        Refused("call-denied", &["ftruncate", "SIGSYS"]),
    ),
    (
        "NoThreads",
        "INSTALL(ON(SYS_clone, SECCOMP_RET_ERRNO | EAGAIN));",
        Refused("call-denied", &["clone", "EAGAIN"]),
    ),
    (
        "TwoFilters",
        "INSTALL(ON(SYS_close, SECCOMP_RET_LOG));
         INSTALL(ON(SYS_close, SECCOMP_RET_ERRNO | EBADF));",
        Refused("call-denied", &["close", "EBADF"]),
    ),
    (
        "Harmless",
        "INSTALL(ON(SYS_reboot, SECCOMP_RET_KILL_PROCESS), ON(SYS_personality, SECCOMP_RET_TRAP));",
        Works,
    ),
];

#[test]
fn filters_are_read_and_never_tried() -> Result<()> {
    let mut functions = vec![bar(1)?];
    for ((name, set_up, _), id) in FILTERS.iter().zip(2..) {
        let set_up = format!("static void set_up(void) {{ {set_up} }}");
        let foo = foo_with(&[FILTER, &set_up, PROBE].concat()).context(*name)?;
        functions.push(FunctionSpec::new(name, id, foo));
    }
    functions.push(FunctionSpec::new(
        "Plain",
        99,
        fixtures::compile("foo.c", Compiler::Gcc, &["-O2"])?,
    ));
    let node = Node::start(NodeSpec::new(functions))?;

    // Without the right to read them, those that a worker has added are not
    // risked, whatever they do; those of its container are.
    let without = Agent::start_through(&["setpriv", "--bounding-set", "-sys_admin"])?;
    for (name, ..) in &FILTERS {
        let stage = Stage::new(&node, &without, name)?;
        let words = ["may kill", "CAP_SYS_ADMIN"];
        stage.is_refused("filter-unknown", &words).context(*name)?;
        let explained = without.edge(&node, "explain", name, "Bar")?;
        ensure!(explained.error_code() == "filter-unknown", "{explained:?}");
    }
    Stage::new(&node, &without, "Plain")?.works()?;
    drop(without);

    let agent = Agent::start()?;
    for (name, lines, expected) in FILTERS {
        let case = Case {
            name,
            lines,
            expected,
        };
        run(&node, &agent, &case).context(name)?;
    }
    Stage::new(&node, &agent, "Plain")?.works()?;
    node.stop()
}

#[test]
fn workers_without_room() -> Result<()> {
    let cases = [
        Case {
            name: "AddressSpace",
            lines: r#"
static unsigned long now(void) {
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    MUST(file != NULL && fscanf(file, "%lu", &pages) == 1);
    fclose(file);
    return pages * 4096;
}
static void set_up(void) {
    struct rlimit limit = {now() + (4 << 20), RLIM_INFINITY};
    MUST(setrlimit(RLIMIT_AS, &limit) == 0);
}
static int probe(void) { return mmap(NULL, 32 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED; }"#,
            expected: Refused("address-space-limit", &["RLIMIT_AS"]),
        },
        Case {
            name: "Data",
            lines: r#"
static void set_up(void) {
    unsigned long ignored, data = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    MUST(file != NULL);
    MUST(fscanf(file, "%lu %lu %lu %lu %lu %lu", &ignored, &ignored, &ignored, &ignored, &ignored, &data) == 6);
    fclose(file);
    struct rlimit limit = {data * 4096 + (4 << 20), RLIM_INFINITY};
    MUST(setrlimit(RLIMIT_DATA, &limit) == 0);
}
static int probe(void) {
    return mmap(NULL, 32 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED;
}"#,
            expected: Refused("address-space-limit", &["RLIMIT_DATA"]),
        },
        Case {
            name: "EnoughSpace",
            lines: r"
static void set_up(void) {
    struct rlimit limit = {2ul << 30, RLIM_INFINITY};
    MUST(setrlimit(RLIMIT_AS, &limit) == 0);
}
static int probe(void) {
    return mmap(NULL, 3ul << 30, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED;
}",
            expected: Works,
        },
        Case {
            name: "NoNeighbourhood",
            // Everything that a near branch reaches is taken.
            lines: r"
static void set_up(void) {}
static int probe(void) {
    static int done;
    const uintptr_t step = 1 << 20, page = 4096, here = (uintptr_t)&probe & -step;
    if (!done) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
        for (uintptr_t at = here - (2049ul << 20); at < here + (2049ul << 20); at += step) {
            if (mmap((void *)at, step, PROT_NONE, flags, -1, 0) != MAP_FAILED) {
                continue;
            }
            for (uintptr_t one = at; one < at + step; one += page) {
                mmap((void *)one, page, PROT_NONE, flags, -1, 0);
            }
        }
        done = 1;
    }
    return mmap((void *)here, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED;
}",
            expected: Refused("no-room-near", &["2 GiB"]),
        },
        Case {
            name: "NoMappings",
            // As many mappings as there may be (vm.max_map_count), but for
            // three: that is found out on the way, and taken back.
            lines: r"
static char *area;
static void set_up(void) {}
static int probe(void) {
    const size_t pages = 140000, page = 4096;
    if (area == NULL) {
        area = mmap(NULL, pages * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        MUST(area != MAP_FAILED);
        size_t i = 1;
        while (i < pages && mprotect(area + i * page, page, PROT_READ) == 0) {
            i += 2;
        }
        MUST(i < pages);
        MUST(mprotect(area + (i - 2) * page, page, PROT_NONE) == 0);
        MUST(mprotect(area + (i - 4) * page, page, PROT_NONE) == 0);
    }
    return 1;
}",
            expected: Refused("no-memory", &["mmap", "max_map_count"]),
        },
    ];
    run_all(&Agent::start()?, &cases)
}

/// Bytes that a container's memory group has left.
fn room(container: &str) -> Result<u64> {
    let group = format!("/sys/fs/cgroup/memory/docker/{container}");
    let number = |file: &str| -> Result<u64> {
        let text = fs::read_to_string(format!("{group}/{file}")).context(file.to_owned())?;
        Ok(text.trim().parse()?)
    };
    Ok(number("memory.limit_in_bytes")?.saturating_sub(number("memory.usage_in_bytes")?))
}

#[test]
fn a_memory_group_without_room() -> Result<()> {
    if !std::path::Path::new("/sys/fs/cgroup/memory/memory.usage_in_bytes").exists() {
        eprintln!("skipped: no memory controller of cgroup v1 to read the room from");
        return Ok(());
    }
    let eater = foo_with(
        r#"
static void set_up(void) {}
static int eat(const struct context *ctx, const char *input, size_t length) {
    char number[24] = {0};
    if (length < 5 || length > 20 || memcmp(input, "eat ", 4) != 0) {
        return 0;
    }
    memcpy(number, input + 4, length - 4);
    size_t bytes = strtoul(number, NULL, 10);
    char *all = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(all != MAP_FAILED);
    for (size_t i = 0; i < bytes; i += 4096) {
        all[i] = 1;
    }
    say(ctx, "eaten");
    return 1;
}
#define COMMAND eat
"#,
    )?;
    let node = Node::start(NodeSpec::new([
        bar(1)?,
        FunctionSpec::new("Foo", 2, eater).memory_limit(256 << 20),
    ]))?;
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    // Half of what is wanted beside the pages themselves (1 MiB) is left.
    let container = stage.worker()?.container;
    loop {
        let left = room(&container)?;
        if left <= 768 << 10 {
            break;
        }
        let bytes = left - (512 << 10);
        ensure!(stage.ask(&format!("eat {bytes}"))? == "eaten");
    }
    stage.is_refused("memory-limit", &["raise the container's memory limit"])?;
    node.stop()
}

#[test]
fn containers_of_other_kinds() -> Result<()> {
    let foo = fixtures::compile("foo.c", Compiler::Gcc, &["-O2"])?;
    let odd = |name: &str, id, oddities| FunctionSpec::new(name, id, &foo).oddities(oddities);
    let node = Node::start(NodeSpec::new([
        bar(1)?,
        odd(
            "UserNamespace",
            2,
            Oddities {
                user_namespace: true,
                ..Oddities::default()
            },
        ),
        odd(
            "NoProc",
            3,
            Oddities {
                no_proc: true,
                ..Oddities::default()
            },
        ),
    ]))?;
    for agent in [
        Agent::start()?,
        // As in a container: CAP_SYS_PTRACE alone must do.
        Agent::start_through(&[
            "setpriv",
            "--bounding-set",
            "-sys_admin,-checkpoint_restore",
        ])?,
    ] {
        let stage = Stage::new(&node, &agent, "UserNamespace")?;
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user"));
        ensure!(namespace(&stage.pid.to_string())? != namespace("self")?);
        stage.works().context("user namespace")?;

        let stage = Stage::new(&node, &agent, "NoProc")?;
        ensure!(!fs::exists(format!("/proc/{}/root/proc/self", stage.pid))?);
        stage.works().context("no /proc")?;
        // Read-only, as every container of the testbed.
        let denied = fs::write(format!("/proc/{}/root/new", stage.pid), "x");
        ensure!(denied.is_err(), "the root can be written");
    }
    node.stop()
}
