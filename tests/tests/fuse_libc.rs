//! Containers from different base images: what caller and callee share of the
//! C library is bound by name and version.

use std::path::Path;

use anyhow::{Result, ensure};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec};

/// Debian's glibc for cross compilers: the same release, built by others.
const OTHER: &str = "/usr/x86_64-linux-gnu/lib";

/// Files of that build, and where a worker looks for them.
const FILES: [(&str, &str); 3] = [
    ("ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2"),
    ("libc.so.6", "/lib/x86_64-linux-gnu/libc.so.6"),
    ("libm.so.6", "/lib/x86_64-linux-gnu/libm.so.6"),
];

const BAR: &str = r#"
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "lifecycle.h"
static int compare(const void *a, const void *b) { return *(const char *)a - *(const char *)b; }
int faas_func_call(void *worker_handle, const char *in, size_t n) {
    const struct context *ctx = worker_handle;
    char *text = malloc(n + 200);
    memcpy(text, in, n);
    qsort(text, n, 1, compare);
    for (size_t i = 0; i < n; i++) text[i] = (char)toupper(text[i]);
    errno = 0;
    double root = sqrt((double)n) + pow(2, (double)n);
    long none = strtol("99999999999999999999", NULL, 10);
    int length = (int)n + snprintf(text + n, 200, " %.3f %d %s %s", root, none > 0,
                                   strerror(errno), getenv("COLOUR"));
    ctx->append(ctx->caller_context, text, (size_t)length);
    free(text);
    return 0;
}
"#;

fn ask(node: &Node, input: &[u8]) -> Result<Vec<u8>> {
    node.call("Foo", input).map_err(|e| anyhow::anyhow!("{e}"))
}

#[test]
fn containers_of_different_builds_of_the_c_library_are_fused() -> Result<()> {
    let flags = ["-O2", "-lm", "-I", "tests/fixtures"];
    let bar = fixtures::compile_text("bar-other-libc", BAR, Compiler::Gcc, &flags)?;
    let foo = fixtures::compile("shared/caller.c", Compiler::Gcc, &["-O2"])?;
    // Either may be the one with the other build.
    for other in ["Bar", "Foo"] {
        let functions = [("Foo", 1, &foo), ("Bar", 2, &bar)].map(|(name, id, library)| {
            let mut function = FunctionSpec::new(name, id, library).workers(1, 1);
            function.env = vec![("COLOUR".into(), format!("{name}'s"))];
            if name == other {
                let files = FILES.iter();
                function.files = { files }
                    .map(|(file, to)| (Path::new(OTHER).join(file), (*to).into()))
                    .collect();
            }
            function
        });
        let node = Node::start(NodeSpec::new(functions))?;
        let agent = Agent::start()?;
        let inputs: [&[u8]; 3] = [b"hello", b"a", b"the quick brown fox"];
        let before = { inputs.iter() }
            .map(|i| ask(&node, i))
            .collect::<Result<Vec<_>>>()?;
        ensure!(
            String::from_utf8_lossy(&before[0])
                .contains("EHLLO 34.236 1 Numerical result out of range Bar's"),
            "{:?}",
            String::from_utf8_lossy(&before[0])
        );
        agent.patch(&node, "Foo", "Bar")?;
        agent.warm_up_with(&node, "Foo", "Bar", b"hello")?;
        let calls = agent.fused_calls(&node, "Foo", "Bar")?;
        for (input, before) in inputs.iter().zip(&before) {
            let fused = ask(&node, input)?;
            ensure!(
                fused == *before,
                "{other}: {:?}",
                String::from_utf8_lossy(&fused)
            );
        }
        let ran = agent.fused_calls(&node, "Foo", "Bar")? - calls;
        ensure!(ran == inputs.len() as u64, "{ran} ran fused");
        agent.revert(&node, "Foo", "Bar")?;
        node.stop()?;
    }
    Ok(())
}
