//! What can't be fused, and what is asked for in error: each is refused with
//! its reason, and the workers are byte for byte as before and serve on.

mod code;
mod common;

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use code::Code;
use common::{ask, foo_bar_baz, library};
use nightgraft_testbed::agent::{Answer, ctl};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, WorkerInfo, bin, until};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};
use serde_json::Value;

/// The workers of some functions, idle and as they are.
fn taken(node: &Node, functions: &[&str]) -> Result<Vec<Code>> {
    let mut all = Vec::new();
    for function in functions {
        for worker in node.workers(function)? {
            idle(&worker);
            all.push(Code::of(worker.host_pid)?);
        }
    }
    Ok(all)
}

fn idle(worker: &WorkerInfo) {
    until("the worker is idle", || worker.waits_for_request());
}

/// Refused with this code and a message that has all these words, nothing
/// changed; and it says the same to people, who get a hint as well.
fn refused(
    node: &Node,
    agent: &Agent,
    (caller, callee): (&str, &str),
    code: &str,
    words: &[&str],
    untouched: &[&str],
) -> Result<()> {
    let before = taken(node, untouched)?;
    let answer = agent.edge(node, "patch", caller, callee)?;
    is_refusal(&answer, code, words)?;
    before.iter().try_for_each(Code::unchanged)?;

    let engine = node.engine_pid().to_string();
    let told = agent.ctl(&["patch", caller, callee, "--engine", &engine])?;
    ensure!(told.code == 1 && told.stdout.is_empty(), "{told:?}");
    for word in words {
        ensure!(told.stderr.contains(word), "no {word:?} in {told:?}");
    }
    before.iter().try_for_each(Code::unchanged)
}

fn is_refusal(answer: &Answer, code: &str, words: &[&str]) -> Result<()> {
    ensure!(
        answer.code == 1 && answer.error_code() == code,
        "not {code}: {answer:?}"
    );
    let error = answer.json()?["error"].clone();
    let text = format!("{} {}", error["message"], error["hint"]);
    for word in words {
        ensure!(text.contains(word), "no {word:?} in {error}");
    }
    Ok(())
}

#[test]
fn names_that_mean_nothing_are_told_with_those_that_are_near() -> Result<()> {
    let node = Node::start(foo_bar_baz(2))?;
    let agent = Agent::start()?;
    ask(&node, "Foo", "hello");
    let all = ["Foo", "Bar", "Baz"];
    let unknown = "unknown-function";
    refused(
        &node,
        &agent,
        ("Fooo", "Bar"),
        unknown,
        &["Fooo", "near: Foo"],
        &all,
    )?;
    refused(
        &node,
        &agent,
        ("Foo", "Bart"),
        unknown,
        &["Bart", "Bar", "Baz"],
        &all,
    )?;
    refused(
        &node,
        &agent,
        ("Foo", "Zzzzzz"),
        unknown,
        &["Zzzzzz", "agentctl ps"],
        &all,
    )?;

    let before = taken(&node, &all)?;
    for command in ["explain", "revert"] {
        let answer = agent.edge(&node, command, "Fooo", "Bar")?;
        is_refusal(&answer, unknown, &["Fooo", "Foo"])?;
    }
    ensure!(agent.ctl(&["patch", "Foo"])?.code == 2, "no callee");
    ensure!(agent.ctl(&["fuse", "Foo", "Bar"])?.code == 2, "no command");
    before.iter().try_for_each(Code::unchanged)?;

    // A function that Foo does not call.
    refused(
        &node,
        &agent,
        ("Foo", "Baz"),
        "no-site",
        &["libfoo.so", "Baz"],
        &all,
    )?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");

    // Case does not matter.
    agent.patch(&node, "foo", "BAR")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    agent.revert(&node, "FOO", "bar")?;
    node.stop()
}

#[test]
fn functions_without_workers_are_told() -> Result<()> {
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")),
        FunctionSpec::new("Bar", 2, library("bar.c")).workers(2, 2),
        FunctionSpec::new("Idle", 3, library("foo.c")).workers(0, 1),
    ]))?;
    let agent = Agent::start()?;
    ask(&node, "Foo", "hello");
    let none = "no-workers";
    refused(
        &node,
        &agent,
        ("Idle", "Bar"),
        none,
        &["Idle", "minWorkers"],
        &["Bar"],
    )?;
    refused(
        &node,
        &agent,
        ("Foo", "Idle"),
        none,
        &["Idle"],
        &["Foo", "Bar"],
    )?;

    for worker in node.workers("Bar")? {
        kill(Pid::from_raw(worker.host_pid), Signal::SIGKILL)?;
    }
    until("Bar's workers are gone", || {
        node.workers("Bar").is_ok_and(|left| left.is_empty())
    });
    refused(&node, &agent, ("Foo", "Bar"), none, &["Bar"], &["Foo"])?;

    let foo = node.workers("Foo")?[0].host_pid;
    kill(Pid::from_raw(foo), Signal::SIGKILL)?;
    until("Foo's worker is gone", || {
        node.workers("Foo").is_ok_and(|left| left.is_empty())
    });
    refused(&node, &agent, ("Foo", "Bar"), none, &["Foo"], &[])?;
    let reverted = agent.revert(&node, "Foo", "Bar")?;
    ensure!(reverted["nothing"] == true, "{reverted}");
    node.stop()
}

/// A process that looks like a worker but runs something else, and dies with
/// this.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_worker_that_is_not_native_is_told() -> Result<()> {
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")),
        FunctionSpec::new("Bar", 2, library("bar.c")),
        FunctionSpec::new("Script", 3, library("bar.c")).workers(0, 1),
    ]))?;
    let agent = Agent::start()?;
    let other = Command::new("sleep")
        .arg("600")
        .env("FAAS_FUNC_ID", "3")
        .env("FAAS_FPROCESS_ID", "0")
        .env("FAAS_CLIENT_ID", "77")
        .env("FAAS_MSG_PIPE_FD", "3")
        .env("FAAS_ROOT_PATH_FOR_IPC", node.ipc_root())
        .stdin(Stdio::null())
        .spawn()?;
    let other = Other(other);
    let pid = other.0.id().to_string();
    ask(&node, "Foo", "hello");
    let words = ["Script", pid.as_str(), "not native"];
    for edge in [("Script", "Bar"), ("Foo", "Script")] {
        refused(&node, &agent, edge, "not-native", &words, &["Foo", "Bar"])?;
    }
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    drop(other);
    node.stop()
}

#[test]
fn what_is_done_already_is_said_and_not_done_again() -> Result<()> {
    let node = Node::start(foo_bar_baz(2))?;
    let agent = Agent::start()?;
    ask(&node, "Foo", "hello");
    let engine = node.engine_pid().to_string();
    let told = |command: &str| agent.ctl(&[command, "Foo", "Bar", "--engine", &engine]);

    let before = taken(&node, &["Foo", "Bar"])?;
    let nothing = agent.revert(&node, "Foo", "Bar")?;
    ensure!(nothing["nothing"] == true, "{nothing}");
    let text = told("revert")?;
    ensure!(
        text.code == 0 && text.stdout.to_lowercase().contains("not fused")
            || text.stdout.to_lowercase().contains("nothing"),
        "{text:?}"
    );
    before.iter().try_for_each(Code::unchanged)?;

    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    let before = taken(&node, &["Foo", "Bar"])?;
    let already = agent.patch(&node, "Foo", "Bar")?;
    ensure!(already["already"] == true, "{already}");
    let text = told("patch")?;
    ensure!(
        text.code == 0 && text.stdout.contains("already"),
        "{text:?}"
    );
    before.iter().try_for_each(Code::unchanged)?;

    agent.revert(&node, "Foo", "Bar")?;
    let before = taken(&node, &["Foo", "Bar"])?;
    let nothing = agent.revert(&node, "Foo", "Bar")?;
    ensure!(nothing["nothing"] == true, "{nothing}");
    before.iter().try_for_each(Code::unchanged)?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    node.stop()
}

#[test]
fn a_worker_that_somebody_traces_is_left_alone_and_the_tracer_named() -> Result<()> {
    let node = Node::start(foo_bar_baz(2))?;
    let agent = Agent::start()?;
    ask(&node, "Foo", "hello");
    let traced = Pid::from_raw(node.workers("Foo")?[1].host_pid);
    let before = taken(&node, &["Foo", "Bar"])?;
    ptrace::seize(traced, ptrace::Options::empty())?;
    let tracer = gettid().to_string();
    let result = (|| -> Result<()> {
        let words = [tracer.as_str(), &traced.to_string()];
        refused(
            &node,
            &agent,
            ("Foo", "Bar"),
            "worker-traced",
            &words,
            &["Foo", "Bar"],
        )?;
        let ps = agent.ctl(&["ps", "--json"])?.json()?;
        let text = ps.to_string();
        let at = text.find("\"traced_by\":{").context("ps names no tracer")?;
        ensure!(text[at..].contains(&tracer), "{text}");
        Ok(())
    })();
    // Only a stopped thread can be let go of.
    ptrace::interrupt(traced)?;
    nix::sys::wait::waitpid(traced, Some(nix::sys::wait::WaitPidFlag::__WALL))?;
    ptrace::detach(traced, None)?;
    result?;
    before.iter().try_for_each(Code::unchanged)?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;

    // At a revert its gate at least is switched off, which needs no stop.
    ptrace::seize(traced, ptrace::Options::empty())?;
    let answer = agent.edge(&node, "revert", "Foo", "Bar");
    ptrace::interrupt(traced)?;
    nix::sys::wait::waitpid(traced, Some(nix::sys::wait::WaitPidFlag::__WALL))?;
    ptrace::detach(traced, None)?;
    let answer = answer?;
    is_refusal(&answer, "worker-traced", &[&tracer, "gate is off"])?;
    let calls = agent.fused_calls(&node, "Foo", "Bar")?;
    for _ in 0..20 {
        assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    }
    assert_eq!(agent.fused_calls(&node, "Foo", "Bar")?, calls);
    agent.revert(&node, "Foo", "Bar")?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    node.stop()
}

#[test]
fn an_agent_without_the_capability_names_it_and_the_flag() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let lacking = Agent::start_through(&["setpriv", "--bounding-set", "-sys_ptrace"])?;
    ask(&node, "Foo", "hello");
    let words = ["CAP_SYS_PTRACE", "--cap-add SYS_PTRACE"];
    refused(
        &node,
        &lacking,
        ("Foo", "Bar"),
        "missing-capability",
        &words,
        &["Foo", "Bar"],
    )?;
    let health = lacking.ctl(&["health", "--json"])?.json()?;
    let missing = health["missing"].as_array().context("missing")?;
    ensure!(
        missing
            .iter()
            .any(|m| m["capability"] == words[0] && m["flag"] == words[1]),
        "{health}"
    );
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    drop(lacking);
    let whole = Agent::start()?;
    whole.patch(&node, "Foo", "Bar")?;
    whole.revert(&node, "Foo", "Bar")?;
    node.stop()
}

#[test]
fn no_agent_and_two_agents() -> Result<()> {
    let nowhere = tempfile::tempdir()?;
    let socket = nowhere.path().join("agent.sock");
    for arguments in [
        &["ps"][..],
        &["patch", "Foo", "Bar"],
        &["revert", "Foo", "Bar"],
    ] {
        let answer = ctl(&socket, arguments)?;
        ensure!(answer.code == 3 && answer.stdout.is_empty(), "{answer:?}");
        ensure!(answer.stderr.contains("agent --socket"), "{answer:?}");
    }

    let node = Node::start(foo_bar_baz(1))?;
    let first = Agent::start()?;
    first.patch(&node, "Foo", "Bar")?;
    let mut second = Command::new(bin("agent")?)
        .arg("--socket")
        .arg(first.socket())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while second.try_wait()?.is_none() {
        if Instant::now() > deadline {
            second.kill()?;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = second.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{}: {text}", output.status);
    ensure!(
        text.contains(&format!("pid {}", first.pid())),
        "the first is not named: {text}"
    );
    first.warm_up(&node, "Foo", "Bar")?;
    first.revert(&node, "Foo", "Bar")?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    node.stop()
}

/// A callee that can't be loaded right.
struct Bad {
    name: &'static str,
    /// What stands before its `faas_func_call`, and in it.
    before: &'static str,
    within: &'static str,
    flags: &'static [&'static str],
    code: &'static str,
    words: &'static [&'static str],
}

const BAD: [Bad; 5] = [
    Bad {
        name: "Tls",
        before: "static __thread unsigned long calls; unsigned long *where(void) { return &calls; }",
        within: "++*where();",
        flags: &["-O1", "-ftls-model=initial-exec"],
        code: "tls",
        words: &["libtls.so", "initial-exec"],
    },
    Bad {
        name: "Stack",
        before: "",
        within: "",
        flags: &["-O1", "-Wl,-z,execstack"],
        code: "executable-stack",
        words: &["libstack.so", "noexecstack"],
    },
    Bad {
        name: "Opener",
        before: "#include <dlfcn.h>",
        within: "if (n == (size_t)-1) dlmopen(LM_ID_NEWLM, in, RTLD_LAZY);",
        flags: &["-O1", "-D_GNU_SOURCE"],
        code: "unsupported-import",
        words: &["libopener.so", "dlmopen"],
    },
    Bad {
        name: "Text",
        before: "__asm__(\".text\\n.quad faas_init\\n\");",
        within: "",
        flags: &["-O1", "-Wl,-z,notext"],
        code: "text-relocations",
        words: &["libtext.so", "-fPIC"],
    },
    Bad {
        name: "Missing",
        before: "#define faas_destroy_func_worker unused_destroy",
        within: "",
        // And the library that exports it instead.
        flags: &["-O1", "-Wl,--no-as-needed"],
        code: "missing-export",
        words: &["libmissing.so", "faas_destroy_func_worker"],
    },
];

impl Bad {
    fn build(&self) -> Result<PathBuf> {
        let text = format!(
            r#"
{}
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *in, size_t n) {{
    const struct context *ctx = worker_handle;
    {}
    ctx->append(ctx->caller_context, "{}<", {});
    ctx->append(ctx->caller_context, in, n);
    ctx->append(ctx->caller_context, ">", 1);
    return 0;
}}
"#,
            self.before,
            self.within,
            self.name,
            self.name.len() + 1
        );
        let stem = self.name.to_lowercase();
        let mut flags = self.flags.to_vec();
        let helper;
        if self.name == "Missing" {
            let text = "int faas_destroy_func_worker(void *h); \
                        int faas_destroy_func_worker(void *h) { return h == 0; }";
            helper = fixtures::compile_text("destroyer", text, Compiler::Gcc, &["-O1"])?;
            flags.push(helper.to_str().context("a path")?);
        }
        fixtures::compile_text(&stem, &text, Compiler::Gcc, &flags)
    }
}

/// Calls the function that its input names first, with the rest.
fn caller_of(names: &[&str]) -> Result<PathBuf> {
    let mut calls = String::new();
    for name in names {
        calls.push_str(&format!(
            "    if (is(in, n, \"{name}\")) code = ctx->invoke(ctx->caller_context, \"{name}\", \
             in + {skip}, n - {skip}, &out, &length);\n",
            skip = name.len()
        ));
    }
    let text = format!(
        r#"
#include <string.h>
#include "lifecycle.h"
static int is(const char *in, size_t n, const char *name) {{
    return n >= strlen(name) && memcmp(in, name, strlen(name)) == 0;
}}
int faas_func_call(void *worker_handle, const char *in, size_t n) {{
    const struct context *ctx = worker_handle;
    const char *out = NULL;
    size_t length = 0;
    int code = -1;
{calls}
    if (code == 0) ctx->append(ctx->caller_context, out, length);
    return code;
}}
"#
    );
    // Stripped of its symbols: that is no obstacle.
    fixtures::compile_text("caller", &text, Compiler::Gcc, &["-O2", "-s"])
}

#[test]
fn libraries_that_cannot_be_loaded_right_are_refused_each_with_its_reason() -> Result<()> {
    let names: Vec<&str> = BAD.iter().map(|bad| bad.name).chain(["Good"]).collect();
    let good = Bad {
        name: "Good",
        before: "",
        within: "",
        flags: &["-O1", "-s"],
        code: "",
        words: &[],
    };
    let mut functions = vec![
        FunctionSpec::new("Caller", 1, caller_of(&names)?),
        FunctionSpec::new("Good", 2, good.build()?),
    ];
    for (bad, id) in BAD.iter().zip(3..) {
        let library = bad.build().context(bad.name)?;
        functions.push(FunctionSpec::new(bad.name, id, library));
    }
    let node = Node::start(NodeSpec::new(functions))?;
    let agent = Agent::start()?;
    let serve = |what: &str| {
        for name in &names {
            let answer = ask(&node, "Caller", &format!("{name}x"));
            assert_eq!(answer, format!("{name}<x>"), "{what}");
        }
    };
    serve("before");
    let each = |what: &str| -> Result<()> {
        for bad in &BAD {
            let edge = ("Caller", bad.name);
            let untouched = ["Caller", bad.name];
            refused(&node, &agent, edge, bad.code, bad.words, &untouched)
                .with_context(|| format!("{} {what}", bad.name))?;
            let explained = agent.edge(&node, "explain", "Caller", bad.name)?;
            is_refusal(&explained, bad.code, bad.words)
                .with_context(|| format!("explain {} {what}", bad.name))?;
        }
        serve(what);
        Ok(())
    };
    each("in a worker that nothing is fused into")?;
    agent.patch(&node, "Caller", "Good")?;
    agent.warm_up_with(&node, "Caller", "Good", b"Goodx")?;
    each("in a worker that another is fused into")?;
    let calls = agent.fused_calls(&node, "Caller", "Good")?;
    ask(&node, "Caller", "Goodx");
    assert_eq!(agent.fused_calls(&node, "Caller", "Good")?, calls + 1);
    agent.revert(&node, "Caller", "Good")?;
    serve("after the revert");
    node.stop()
}

/// The file on the host that a worker has mapped its function's library from.
fn library_of(node: &Node, function: &str) -> Result<PathBuf> {
    let pid = node.workers(function)?[0].host_pid;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let inside = maps
        .split_whitespace()
        .find(|word| word.starts_with("/functions/"))
        .context("no library in maps")?;
    let root = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let root = root
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|words| words[4] == "/")
        .context("no root")?[3]
        .to_owned();
    // The mount's path is that on its file system: of the whole name only the
    // part from the node's directory on is sure to be the host's.
    let node_dir = node.dir().file_name().context("a name")?.to_string_lossy();
    let at = root.find(&*node_dir).context("a root elsewhere")?;
    let root = node
        .dir()
        .join(root[at + node_dir.len()..].trim_start_matches('/'));
    let file = root.join(inside.trim_start_matches('/'));
    ensure!(file.is_file(), "{} is not there", file.display());
    Ok(file)
}

/// Puts another file in the place of one, as a deployment would.
fn replace(file: &Path, by: &Path) -> Result<()> {
    let new = file.with_extension("new");
    fs::copy(by, &new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(&new, file)?;
    Ok(())
}

#[test]
fn a_library_that_was_replaced_on_disk_is_not_taken_for_the_one_that_runs() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    ask(&node, "Foo", "hello");
    let other = fixtures::compile("baz.c", Compiler::Gcc, &["-O1"])?;
    let all = ["Foo", "Bar"];

    let bar = library_of(&node, "Bar")?;
    let original = tempfile::NamedTempFile::new()?;
    fs::copy(&bar, original.path())?;
    replace(&bar, &other)?;
    let worker = node.workers("Bar")?[0].host_pid.to_string();
    let words = ["libbar.so", &worker, "restart that worker"];
    refused(&node, &agent, ("Foo", "Bar"), "replaced", &words, &all)?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");

    // Gone altogether.
    fs::remove_file(&bar)?;
    let before = taken(&node, &all)?;
    let answer = agent.edge(&node, "patch", "Foo", "Bar")?;
    ensure!(answer.code == 1, "{answer:?}");
    before.iter().try_for_each(Code::unchanged)?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");

    // The same bytes in another file are the same library.
    replace(&bar, original.path())?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    agent.revert(&node, "Foo", "Bar")?;

    // The caller's.
    node.redeploy("Foo", None)?;
    let foo = library_of(&node, "Foo")?;
    replace(&foo, &other)?;
    let worker = node.workers("Foo")?[0].host_pid.to_string();
    ask(&node, "Foo", "hello");
    let words = ["libfoo.so", &worker];
    refused(&node, &agent, ("Foo", "Bar"), "replaced", &words, &all)?;
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    node.stop()
}

#[test]
fn a_site_that_somebody_else_has_changed_is_left_to_them() -> Result<()> {
    let node = Node::start(foo_bar_baz(1))?;
    let agent = Agent::start()?;
    ask(&node, "Foo", "hello");
    let worker = node.workers("Foo")?[0].clone();
    idle(&worker);
    let plan = agent.edge(&node, "explain", "Foo", "Bar")?.json()?["plan"].clone();
    let windows = plan["windows"].as_array().context("windows")?;
    let memory = fs::File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/mem", worker.host_pid))?;
    for window in windows {
        let at = window["address"].as_u64().context("an address")?;
        let mut original = [0];
        memory.read_exact_at(&mut original, at)?;
        // What a debugger puts there.
        memory.write_all_at(&[0xcc], at)?;
        let result = changed_site(&node, &agent, window);
        memory.write_all_at(&original, at)?;
        result.with_context(|| window.to_string())?;
        assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    }
    agent.patch(&node, "Foo", "Bar")?;
    agent.warm_up(&node, "Foo", "Bar")?;
    agent.revert(&node, "Foo", "Bar")?;
    node.stop()
}

fn changed_site(node: &Node, agent: &Agent, window: &Value) -> Result<()> {
    let before = window["before"].as_str().context("bytes")?;
    let found = format!("cc{}", &before[2..]);
    let words = [found.as_str(), "another tool"];
    refused(
        node,
        agent,
        ("Foo", "Bar"),
        "foreign-bytes",
        &words,
        &["Foo", "Bar"],
    )
}
