//! Hidden state of the C library: caller and callee each have their own, fused
//! as by RPC.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};

const BOTH: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "lifecycle.h"
extern char **environ;
static void reply(struct context *ctx, const char *text) {
    ctx->append(ctx->caller_context, text, strlen(text));
}
"#;

/// Goes through words by `strtok`, and asks Bar about each in between; ends
/// with numbers of its own sequences and what its environment has.
fn foo() -> Result<PathBuf> {
    let text = r#"
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    struct context *ctx = worker_handle;
    char words[256] = "", text[4096] = "";
    memcpy(words, input, length < sizeof words ? length : sizeof words - 1);
    srand(7); srandom(7); srand48(7);
    setenv("NG_WHO", "foo", 1);
    struct in_addr mine = {0x04030201};
    const char *address = inet_ntoa(mine);
    time_t start = 0;
    struct tm *began = gmtime(&start);
    for (char *word = strtok(words, ","); word != NULL; word = strtok(NULL, ",")) {
        const char *out = NULL;
        size_t n = 0;
        if (ctx->invoke(ctx->caller_context, "Bar", word, strlen(word), &out, &n) != 0) return -1;
        sprintf(text + strlen(text), "%s=%.*s %d %ld %.17g; ", word, (int)n, out, rand(), random(),
                drand48());
    }
    sprintf(text + strlen(text), "%s %s %d %s", getenv("NG_WHO"), getenv("NG_BAR") ? "bar's" : "-",
            began->tm_year, address);
    reply(ctx, text);
    return 0;
}
"#;
    fixtures::compile_text(
        "statefoo",
        &format!("{BOTH}{text}"),
        Compiler::Gcc,
        &["-O2"],
    )
}

/// Uses all of that itself.
fn bar() -> Result<PathBuf> {
    let text = r#"
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    struct context *ctx = worker_handle;
    char words[256] = "", text[1024] = "";
    memcpy(words, input, length < sizeof words ? length : sizeof words - 1);
    srand((unsigned)length);
    srand48((long)length);
    setenv("NG_WHO", "bar", 1);
    putenv("NG_BAR=1");
    struct in_addr mine = {0x7f7f7f7f};
    inet_ntoa(mine);
    time_t later = 1000000000;
    if (gmtime(&later)->tm_year != 101 || localtime(&later)->tm_year != 101) return -1;
    for (char *word = strtok(words, "-"); word != NULL; word = strtok(NULL, "-")) {
        sprintf(text + strlen(text), "<%s>", word);
    }
    int here = 0;
    for (char **entry = environ; *entry != NULL; entry++) here += strcmp(*entry, "NG_WHO=bar") == 0;
    sprintf(text + strlen(text), "%d,%ld,%s,%d", rand(), lrand48(), getenv("NG_WHO"), here);
    unsetenv("NG_WHO");
    if (getenv("NG_WHO") != NULL) return -1;
    reply(ctx, text);
    return 0;
}
"#;
    fixtures::compile_text(
        "statebar",
        &format!("{BOTH}{text}"),
        Compiler::Gcc,
        &["-O2"],
    )
}

#[test]
fn caller_and_callee_do_not_share_what_the_c_library_hides() -> Result<()> {
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, foo()?),
        FunctionSpec::new("Bar", 2, bar()?),
    ]))?;
    let agent = Agent::start()?;
    let questions = ["a-b,cc-dd-ee,f", "x", "1-2-3-4,5"];
    let by_rpc: Vec<String> = questions.iter().map(|q| ask(&node, "Foo", q)).collect();
    ensure!(by_rpc[0].ends_with("foo - 70 1.2.3.4"), "{by_rpc:?}");
    ensure!(by_rpc[0].starts_with("a-b=<a><b>"), "{by_rpc:?}");
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up_with(&node, "Foo", "Bar", b"x")?;
    let calls = agent.fused_calls(&node, "Foo", "Bar")?;
    for (question, by_rpc) in questions.iter().zip(&by_rpc) {
        assert_eq!(&ask(&node, "Foo", question), by_rpc);
    }
    assert_eq!(agent.fused_calls(&node, "Foo", "Bar")?, calls + 6);
    agent.revert(&node, "Foo", "Bar")?;
    for (question, by_rpc) in questions.iter().zip(&by_rpc) {
        assert_eq!(&ask(&node, "Foo", question), by_rpc);
    }
    node.stop()
}

/// An answer as text, for a readable failure; the node's logs if there is none.
fn ask(node: &Node, function: &str, input: &str) -> String {
    match node.call(function, input.as_bytes()) {
        Ok(answer) => String::from_utf8_lossy(&answer).into_owned(),
        Err(e) => panic!("{function} {input:?}: {e}\n{}", node.all_logs()),
    }
}
