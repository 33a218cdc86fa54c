//! Workers whose code is not what it seems: closed libraries, debuggers'
//! breakpoints, other tools' patches, text on huge pages; and threads with next
//! to no stack.

mod code;
mod hostile;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{PoisonError, RwLock};

use anyhow::{Context, Result, ensure};
use hostile::{Stage, foo_with};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};
use serde_json::Value;

/// An agent that starts puts all workers in order that it sees, the other
/// tests' as well; and to one that did not patch it, a worker whose library was
/// closed and opened again is fused in part.
static STARTING: RwLock<()> = RwLock::new(());

fn agent() -> Result<Agent> {
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    Agent::start()
}

fn library(name: &str) -> Result<PathBuf> {
    fixtures::compile(name, Compiler::Gcc, &["-O2"])
}

fn memory(pid: i32) -> Result<fs::File> {
    Ok(fs::File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))?)
}

fn hex(value: &Value) -> Result<Vec<u8>> {
    let text = value.as_str().context("bytes as text")?;
    (0..text.len())
        .step_by(2)
        .map(|i| Ok(u8::from_str_radix(&text[i..i + 2], 16)?))
        .collect()
}

/// The plan's windows: address, and the library's bytes.
fn windows(stage: &Stage<'_>) -> Result<Vec<(u64, Vec<u8>)>> {
    let explained = stage
        .agent
        .edge(stage.node, "explain", stage.caller, "Bar")?
        .json()?;
    let windows = explained["plan"]["windows"].as_array().context("windows")?;
    windows
        .iter()
        .map(|w| {
            let address = w["address"].as_u64().context("an address")?;
            Ok((address, hex(&w["before"])?))
        })
        .collect()
}

/// Foo, all of whose calls are one that is a branch target: it hops through
/// filler.
const HOPS: &str = r#"
#define FOO_INVOKE(ctx, ...) meet((ctx)->invoke, (ctx)->caller_context, __VA_ARGS__)
#include "worker_v1.h"
int meet(invoke_func_fn invoke, void *context, const char *name, const char *input, size_t length,
         const char **output, size_t *output_length);
__asm__(".text\n"
        ".p2align 4\n"
        ".type meet, @function\n"
        "meet:\n"
        "    .cfi_startproc\n"
        "    push %rbx\n"
        "    .cfi_def_cfa_offset 16\n"
        "    mov %rdi, %rax\n"
        "    mov %rsi, %rdi\n"
        "    mov %rdx, %rsi\n"
        "    mov %rcx, %rdx\n"
        "    mov %r8, %rcx\n"
        "    mov %r9, %r8\n"
        "    mov 16(%rsp), %r9\n"
        "    test %rcx, %rcx\n"
        "    je 1f\n"
        "    mov %rcx, %rbx\n"
        "1:  call *%rax\n"
        "    pop %rbx\n"
        "    .cfi_def_cfa_offset 8\n"
        "    ret\n"
        "    .cfi_endproc\n"
        ".size meet, . - meet\n"
        ".p2align 4\n");
#include "foo_logic.h"
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    return foo_handle(worker_handle, input, input_length);
}
"#;

#[test]
fn what_other_tools_have_written_is_left_to_them() -> Result<()> {
    others_write(library("foo.c")?, 10)
}

/// One that has a breakpoint where it jumps to filler jumps there again when
/// the breakpoint is gone: the filler leads on as long.
#[test]
fn what_other_tools_have_written_before_filler_is_left_to_them() -> Result<()> {
    let caller = fixtures::compile_text("hops", HOPS, Compiler::Gcc, &["-O2", "-I."])?;
    others_write(caller, 12)
}

fn others_write(caller: PathBuf, least: usize) -> Result<()> {
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Bar", 1, library("bar.c")?),
        FunctionSpec::new("Foo", 2, caller),
    ]))?;
    let agent = agent()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    let windows = windows(&stage)?;
    let memory = memory(stage.pid)?;
    let with_bytes = |at: u64, bytes: &[u8], act: &dyn Fn() -> Result<()>| -> Result<()> {
        let mut original = vec![0; bytes.len()];
        memory.read_exact_at(&mut original, at)?;
        let _ = stage.code()?;
        memory.write_all_at(bytes, at)?;
        let result = act();
        let mut found = vec![0; bytes.len()];
        memory.read_exact_at(&mut found, at)?;
        memory.write_all_at(&original, at)?;
        result?;
        ensure!(found == bytes, "{found:02x?} instead of {bytes:02x?}");
        Ok(())
    };
    let refused = || {
        let before = stage.code()?;
        stage.refuses("foreign-bytes", &["another tool"])?;
        before.unchanged()
    };
    let mut places = 0;
    for (address, before) in &windows {
        // A breakpoint at each byte of it, and a jump of another patcher's.
        for offset in 0..before.len() as u64 {
            with_bytes(address + offset, &[0xcc], &refused)
                .with_context(|| format!("{address:#x}+{offset}"))?;
            places += 1;
        }
        with_bytes(*address, &[0xe9, 0x11, 0x22, 0x33, 0x44], &refused)?;
    }
    ensure!(places >= least, "{places} places");
    stage.serves()?;

    // The same with our bytes there: the gate goes off, theirs stay.
    stage.patch()?;
    stage.serves_fused()?;
    for (address, _) in &windows {
        with_bytes(*address, &[0xcc], &|| {
            let (status, report) = agent.try_revert(&node, "Foo", "Bar")?;
            let worker = &report["workers"][0];
            ensure!(
                status == 200
                    && worker["outcome"]["outcome"] == "gate-off"
                    && worker["receipt"]["reason"]
                        .to_string()
                        .contains("another tool"),
                "{report}"
            );
            Ok(())
        })?;
        stage.serves_by_rpc()?;
        stage.patch()?;
        stage.serves_fused()?;
    }
    stage.revert()?;
    stage.serves_by_rpc()?;
    node.stop()
}

const CLIENT: &str = r#"
#include <string.h>
#include "worker_v1.h"
EXPORT int client_call(const struct context *ctx, const char *input, size_t length,
                       const char **output, size_t *output_length);
int client_call(const struct context *ctx, const char *input, size_t length,
                const char **output, size_t *output_length) {
    // A name that is not a constant.
    char name[4] = {'B', 'a', (char)(length == 0 ? 'z' : 'r'), 0};
    int code = ctx->invoke(ctx->caller_context, name, input, length, output, output_length);
    return code == 0 ? 0 : code * 2 + name[3];
}
"#;

/// Calls Bar through a library that it opens and closes as it is told, and
/// itself while it is closed. No name is a constant.
const OPENS: &str = r#"
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include "lifecycle.h"
typedef int (*call_fn)(const struct context *, const char *, size_t, const char **, size_t *);
static void *client;
static void say(const struct context *ctx, const char *text) {
    ctx->append(ctx->caller_context, text, strlen(text));
}
static __attribute__((noinline)) int own_call(const struct context *ctx, const char *input,
                                              size_t length, const char **output,
                                              size_t *output_length) {
    char name[4] = {'B', 'a', (char)(length == 0 ? 'z' : 'r'), 0};
    int code = ctx->invoke(ctx->caller_context, name, input, length, output, output_length);
    return code == 0 ? 0 : code * 2 + name[3];
}
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    struct context *ctx = worker_handle;
    const char *output = NULL;
    size_t output_length = 0;
    if (length == 4 && memcmp(input, "open", 4) == 0) {
        client = dlopen("/functions/libclient.so", RTLD_NOW);
        say(ctx, client != NULL ? "open" : dlerror());
        return 0;
    }
    if (length == 5 && memcmp(input, "close", 5) == 0) {
        say(ctx, dlclose(client) == 0 ? "closed" : dlerror());
        client = NULL;
        return 0;
    }
    call_fn call = client == NULL ? own_call : (call_fn)dlsym(client, "client_call");
    if (call == NULL || call(ctx, input, length, &output, &output_length) != 0) {
        return 1;
    }
    say(ctx, "Foo:");
    ctx->append(ctx->caller_context, output, output_length);
    return 0;
}
"#;

#[test]
fn a_library_that_is_closed_after_it_was_patched() -> Result<()> {
    let client = fixtures::compile_text("client", CLIENT, Compiler::Gcc, &["-O2"])?;
    let foo = fixtures::compile_text("opens", OPENS, Compiler::Gcc, &["-O2"])?;
    let mut foo = FunctionSpec::new("Foo", 2, foo);
    foo.files = vec![(client, "/functions/libclient.so".into())];
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Bar", 1, library("bar.c")?),
        foo,
    ]))?;
    let _nobody = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    let agent = Agent::start()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    let hello = "Foo:olleh|4f9f2cab|6c";
    let calls = || agent.fused_calls(&node, "Foo", "Bar");
    let is_fused = |fused: bool| -> Result<()> {
        let before = calls()?;
        ensure!(stage.ask("hello")? == hello);
        ensure!(calls()? - before == u64::from(fused), "fused: {}", !fused);
        stage.is_alone()
    };
    ensure!(stage.ask("open")? == "open");
    for round in 0..3 {
        (|| -> Result<()> {
            // Through the routine first, then at the site that was seen.
            stage.patch_anew()?;
            agent.warm_up(&node, "Foo", "Bar")?;
            is_fused(true)?;
            stage.patch_anew()?;
            is_fused(true)?;
            let status = agent.edge_status(&node, "Foo", "Bar")?;
            let sites = |status: &Value| {
                status["workers"][0]["graft"]["sites"]
                    .as_array()
                    .map_or(0, Vec::len)
            };
            let with_client = sites(&status);
            ensure!(with_client > 0, "{status}");

            ensure!(stage.ask("close")? == "closed");
            is_fused(true)?;
            let status = agent.edge_status(&node, "Foo", "Bar")?;
            ensure!(
                status["workers"][0]["graft"]["windows_in_place"] == true
                    && sites(&status) == with_client - 1,
                "{status}"
            );
            // Its windows are no reason against another patch.
            stage.patch_anew()?;
            is_fused(true)?;
            ensure!(stage.ask("open")? == "open");
            is_fused(true)?;
            if round == 1 {
                ensure!(stage.ask("close")? == "closed");
            }
            stage.revert()?;
            is_fused(false)?;
            if round == 1 {
                ensure!(stage.ask("open")? == "open");
            }
            is_fused(false)
        })()
        .with_context(|| format!("round {round}"))?;
    }
    node.stop()
}

/// The function's own code is moved to anonymous memory that huge pages may
/// back, as programs do that want them for their text.
const HUGE: &str = r#"
#define HUGE_PAGE (2ul << 20)
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
static const char *moved = "not moved";
static void set_up(void) {}
// The segment of code that `at` is in, out of /proc/self/maps.
static int segment(uintptr_t at, uintptr_t *start, uintptr_t *end) {
    char line[512];
    FILE *maps = fopen("/proc/self/maps", "r");
    int found = 0;
    while (!found && maps != NULL && fgets(line, sizeof line, maps) != NULL) {
        found = sscanf(line, "%lx-%lx r-xp", start, end) == 2 && *start <= at && at < *end;
    }
    if (maps != NULL) {
        fclose(maps);
    }
    return found;
}
static void move(void) {
    uintptr_t start, end;
    MUST(segment((uintptr_t)&move, &start, &end));
    const size_t length = end - start;
    char *area = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(area != MAP_FAILED && length <= HUGE_PAGE);
    char *aligned = (char *)(((uintptr_t)area + HUGE_PAGE - 1) & -HUGE_PAGE);
    madvise(aligned, HUGE_PAGE, MADV_HUGEPAGE);
    memcpy(aligned, (const void *)start, length);
    MUST(mprotect(aligned, length, PROT_READ | PROT_EXEC) == 0);
    MUST(mremap(aligned, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)start) == (void *)start);
    moved = "moved";
}
static int tell(const struct context *ctx, const char *input, size_t length) {
    if (length != 4 || memcmp(input, "move", 4) != 0) {
        return 0;
    }
    move();
    say(ctx, moved);
    return 1;
}
#define COMMAND tell
"#;

#[test]
fn text_that_was_moved_to_huge_pages() -> Result<()> {
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Bar", 1, library("bar.c")?),
        FunctionSpec::new("Foo", 2, foo_with(HUGE)?),
    ]))?;
    let agent = agent()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    stage.serves()?;
    ensure!(stage.ask("move")? == "moved");
    stage.works()?;
    node.stop()
}

/// Bar, which has its work done by threads with the least stack that there is.
const SMALL: &str = r#"
#include <limits.h>
#include <pthread.h>
#include <unistd.h>
#include "bar_logic.h"
#include "lifecycle.h"
static __thread unsigned long mine;
struct work {
    const char *input;
    size_t length;
    uint32_t hash;
};
static void *hash(void *argument) {
    struct work *work = argument;
    char text[16];
    mine = 2166136261u;
    for (size_t i = 0; i < work->length; i++) {
        mine = ((uint32_t)mine ^ (unsigned char)work->input[i]) * 16777619u;
    }
    snprintf(text, sizeof text, "%08x", (uint32_t)mine);
    work->hash = (uint32_t)strtoul(text, NULL, 16);
    return NULL;
}
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    struct work work = {input, input_length, 0};
    pthread_attr_t small;
    pthread_t thread;
    uint32_t expected = 2166136261u;
    for (size_t i = 0; i < input_length; i++) {
        expected = (expected ^ (unsigned char)input[i]) * 16777619u;
    }
    pthread_attr_init(&small);
    if (pthread_attr_setstacksize(&small, (size_t)sysconf(_SC_THREAD_STACK_MIN)) != 0 ||
        pthread_create(&thread, &small, hash, &work) != 0) {
        return 1;
    }
    pthread_join(thread, NULL);
    pthread_attr_destroy(&small);
    if (work.hash != expected || mine != 0) {
        return 2;
    }
    return bar_handle(worker_handle, input, input_length);
}
"#;

/// Foo beside threads of as little stack, which wait.
const BESIDE: &str = r#"
#include <limits.h>
static void *waits(void *argument) {
    for (;;) {
        pause();
    }
    return argument;
}
static void set_up(void) {
    pthread_attr_t small;
    pthread_t thread;
    pthread_attr_init(&small);
    MUST(pthread_attr_setstacksize(&small, (size_t)sysconf(_SC_THREAD_STACK_MIN)) == 0);
    for (int i = 0; i < 4; i++) {
        MUST(pthread_create(&thread, &small, waits, NULL) == 0);
    }
}
"#;

#[test]
fn threads_of_the_callee_with_the_least_stack_that_there_is() -> Result<()> {
    let bar = fixtures::compile_text("smallbar", SMALL, Compiler::Gcc, &["-O2"])?;
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Bar", 1, bar),
        FunctionSpec::new("Foo", 2, foo_with(BESIDE)?),
    ]))?;
    let agent = agent()?;
    let stage = Stage::new(&node, &agent, "Foo")?;
    for _ in 0..3 {
        stage.works()?;
    }
    node.stop()
}
