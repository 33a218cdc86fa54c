//! Callers whose callees' names are only known at run time, and calls whose
//! bytes can't be rewritten: all of them run fused, through the entry of the
//! worker's own routine or at sites that were seen there.

#[expect(dead_code, reason = "other tests use the rest")]
mod code;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use code::Code;
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, until};
use serde_json::Value;

/// Ways of calling, how many calls each makes, and whether its site can be
/// rewritten once it was seen.
const MODES: [(&str, u64); 10] = [
    ("computed", 1),
    ("passed", 1),
    ("switched", 1),
    ("looped", 3),
    ("cold", 1),
    ("alloca", 1),
    ("tail", 1),
    ("pointer", 1),
    ("branch", 1),
    ("push", 1),
];
const CPP_MODES: [(&str, u64); 2] = [("client", 1), ("catching", 1)];
/// What each is called with; a switch lies around some.
const INPUTS: [&str; 5] = ["", "apple", "dog", "fig", "fail"];
/// Callees; nothing is ever fused for the last.
const NAMES: [&str; 4] = ["Ann", "Bob", "Cid", "Dee"];
const FUSED: [&str; 3] = ["Ann", "Bob", "Cid"];

fn callees() -> Result<Vec<FunctionSpec>> {
    let spec = |(name, id): (&&str, u16)| {
        let define = format!("-DNAME=\"{name}\"");
        let library = fixtures::compile("named.c", Compiler::Gcc, &["-O2", &define])?;
        Ok(FunctionSpec::new(name, id, library))
    };
    NAMES.iter().zip(1..).map(spec).collect()
}

fn caller(compiler: Compiler, flags: &[&str]) -> Result<PathBuf> {
    fixtures::compile("dynamic.c", compiler, flags)
}

/// A caller, and what it can do.
struct Stage<'a> {
    node: &'a Node,
    agent: &'a Agent,
    caller: &'a str,
    modes: Vec<(&'static str, u64)>,
}

impl Stage<'_> {
    fn ask(&self, mode: &str, name: &str, input: &str) -> Result<String> {
        let question = format!("{mode} {name} {input}");
        let answer = self.node.call(self.caller, question.as_bytes());
        let answer = answer.with_context(|| format!("{}: {question:?}", self.caller))?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Asks everything: the answers, in order.
    fn answers(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for (mode, _) in &self.modes {
            for input in INPUTS {
                for name in NAMES {
                    all.push(self.ask(mode, name, input)?);
                }
            }
        }
        for input in INPUTS {
            all.push(self.ask("fixed", "Nobody", input)?);
        }
        Ok(all)
    }

    fn calls(&self) -> Result<BTreeMap<&'static str, u64>> {
        let calls = |name| Ok((name, self.agent.fused_calls(self.node, self.caller, name)?));
        FUSED.into_iter().map(calls).collect()
    }

    /// Everything is answered as `by_rpc`, with all calls of `fused` fused and
    /// no others.
    fn check(&self, what: &str, by_rpc: &[String], fused: &[&str]) -> Result<()> {
        let before = self.calls()?;
        let found = self.answers()?;
        for (index, (found, right)) in found.iter().zip(by_rpc).enumerate() {
            ensure!(
                found == right,
                "{}, {what}: answer {index} is {found:?} instead of {right:?}",
                self.caller
            );
        }
        let after = self.calls()?;
        let each = self.modes.iter().map(|(_, calls)| calls).sum::<u64>() * INPUTS.len() as u64;
        for name in FUSED {
            let fixed = if name == "Ann" {
                INPUTS.len() as u64
            } else {
                0
            };
            let expected = if fused.contains(&name) {
                each + fixed
            } else {
                0
            };
            let ran = after[name] - before[name];
            ensure!(
                ran == expected,
                "{}, {what}: {ran} calls of {name} ran fused instead of {expected}: {}",
                self.caller,
                self.agent.edge_status(self.node, self.caller, name)?
            );
        }
        Ok(())
    }

    fn patch(&self, name: &str) -> Result<Value> {
        let report = self.agent.patch(self.node, self.caller, name)?;
        self.agent.warm_up_with(
            self.node,
            self.caller,
            name,
            format!("computed {name} slow").as_bytes(),
        )?;
        Ok(report["workers"][0]["receipt"].clone())
    }

    fn revert(&self, name: &str) -> Result<()> {
        let report = self.agent.revert(self.node, self.caller, name)?;
        ensure!(
            report["workers"][0]["receipt"]["restored"] == true,
            "{report}"
        );
        Ok(())
    }

    fn graft(&self, name: &str) -> Result<Value> {
        let status = self.agent.edge_status(self.node, self.caller, name)?;
        Ok(status["workers"][0]["graft"].clone())
    }

    fn code(&self) -> Result<Code> {
        let workers = self.node.workers(self.caller)?;
        until("the worker is idle", || workers[0].waits_for_request());
        Code::of(workers[0].host_pid)
    }

    fn all(&self) -> Result<()> {
        let by_rpc = self.answers()?;
        let original = self.code()?;
        for name in FUSED {
            let receipt = self.patch(name)?;
            ensure!(receipt["through_routine"].is_u64(), "{receipt}");
        }
        self.check("fused", &by_rpc, &FUSED)?;

        // Once more: the sites that were seen are rewritten now.
        let seen = self.graft("Ann")?;
        let before = seen["sites"].as_array().map_or(0, Vec::len);
        let receipt = self.patch("Ann")?;
        let graft = self.graft("Ann")?;
        let sites = graft["sites"].as_array().map_or(0, Vec::len);
        // Without optimisation a tail call is a call like others.
        ensure!(
            sites >= before + 5,
            "{}: {before} sites, then {sites}: {receipt} {graft}",
            self.caller
        );
        let left = graft["seen"].as_array().map_or(0, Vec::len);
        ensure!(
            (1..=2).contains(&left) && graft["routine"] == true,
            "{}: {left} places left: {graft}",
            self.caller
        );
        self.check("at the sites", &by_rpc, &FUSED)?;
        let again = self.agent.patch(self.node, self.caller, "Ann")?;
        ensure!(again["already"] == true, "there is no end to it: {again}");

        // What they share stays for the others.
        self.revert("Bob")?;
        let gate_off = |graft: &Value| graft["counters"]["rpc"]["gate_off"].as_u64();
        let before = gate_off(&self.graft("Bob")?).context("a counter")?;
        self.check("without Bob", &by_rpc, &["Ann", "Cid"])?;
        let counted = gate_off(&self.graft("Bob")?).context("a counter")? - before;
        let each = self.modes.iter().map(|(_, calls)| calls).sum::<u64>() * INPUTS.len() as u64;
        ensure!(
            counted == each,
            "{}: {counted} calls were counted of {each}: once each, at the site or at the \
             routine's entry",
            self.caller
        );
        self.revert("Ann")?;
        self.revert("Cid")?;
        self.check("reverted", &by_rpc, &[])?;
        until("idle", || {
            self.node
                .workers(self.caller)
                .is_ok_and(|w| w[0].waits_for_request())
        });
        original.runs_the_same()?;

        for name in FUSED {
            let receipt = self.patch(name)?;
            ensure!(receipt["image_reused"] == true, "{receipt}");
        }
        self.check("fused again", &by_rpc, &FUSED)
    }
}

const LEVELS: [&str; 5] = ["-O0", "-O1", "-O2", "-O3", "-Os"];

fn every_level(compilers: [(&str, Compiler); 2], modes: &[(&'static str, u64)]) -> Result<()> {
    let mut functions = callees()?;
    let mut names = Vec::new();
    for (short, compiler) in compilers {
        for level in LEVELS {
            let name = format!("{short}{}", &level[1..]);
            let id = 10 + names.len() as u16;
            let library = caller(compiler, &[level])?;
            functions.push(FunctionSpec::new(&name, id, library));
            names.push(name);
        }
        let name = format!("{short}Stripped");
        let library = caller(compiler, &["-O2", "-s"])?;
        functions.push(FunctionSpec::new(&name, 10 + names.len() as u16, library));
        names.push(name);
    }
    let node = Node::start(NodeSpec::new(functions))?;
    let agent = Agent::start()?;
    let mut failures = Vec::new();
    for name in &names {
        let stage = Stage {
            node: &node,
            agent: &agent,
            caller: name,
            modes: modes.to_vec(),
        };
        if let Err(error) = stage.all() {
            failures.push(format!("{name}: {error:#}"));
        }
    }
    ensure!(
        failures.is_empty(),
        "{} of {}:\n{}\n{}",
        failures.len(),
        names.len(),
        failures.join("\n"),
        agent.log()
    );
    node.stop()
}

#[test]
fn callers_in_c_run_fused_whatever_their_calls_look_like() -> Result<()> {
    every_level([("Gcc", Compiler::Gcc), ("Clang", Compiler::Clang)], &MODES)
}

#[test]
fn callers_in_cpp_run_fused_whatever_their_calls_look_like() -> Result<()> {
    let modes = [&MODES[..], &CPP_MODES[..]].concat();
    every_level(
        [("Gxx", Compiler::Gxx), ("Clangxx", Compiler::Clangxx)],
        &modes,
    )
}

/// A copy of the testbed's worker without symbols.
fn stripped_worker(dir: &std::path::Path) -> Result<PathBuf> {
    let stripped = dir.join("func_worker_v1");
    let status = Command::new("strip")
        .arg("--strip-all")
        .arg("-o")
        .arg(&stripped)
        .arg(nightgraft_testbed::bin("func_worker_v1")?)
        .status()?;
    ensure!(status.success(), "strip: {status}");
    Ok(stripped)
}

#[test]
fn a_stripped_worker_tells_its_routine_itself() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let worker = stripped_worker(dir.path())?;
    let mut functions = callees()?;
    functions.push(FunctionSpec::new(
        "Dyn",
        10,
        caller(Compiler::Clang, &["-O2"])?,
    ));
    let constant = r#"
#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    struct context *ctx = worker_handle;
    const char *output = NULL;
    size_t length = 0;
    int code = ctx->invoke(ctx->caller_context, "Ann", input, input_length, &output, &length);
    ctx->append(ctx->caller_context, output, length);
    return code;
}
"#;
    let constant = fixtures::compile_text("constant", constant, Compiler::Gcc, &["-O2"])?;
    functions.push(FunctionSpec::new("Constant", 11, constant));
    for function in &mut functions {
        let inside = PathBuf::from("/nightcore/func_worker_v1");
        function.files.push((worker.clone(), inside));
    }
    let node = Node::start(NodeSpec::new(functions))?;
    let agent = Agent::start()?;
    let modes = MODES.to_vec();
    let (node, agent) = (&node, &agent);
    let caller = "Dyn";
    let stage = Stage {
        node,
        agent,
        caller,
        modes,
    };
    stage.all()?;

    let report = agent.patch(node, "Constant", "Ann")?;
    let receipt = &report["workers"][0]["receipt"];
    // Its one site is enough: the routine is left alone.
    ensure!(
        receipt["through_routine"].is_null()
            && receipt["sites"].as_array().map(Vec::len) == Some(1),
        "{report}"
    );
    agent.warm_up_with(node, "Constant", "Ann", b"slow")?;
    let before = agent.fused_calls(node, "Constant", "Ann")?;
    ensure!(node.call("Constant", b"x")? == b"Ann(x)");
    ensure!(agent.fused_calls(node, "Constant", "Ann")? == before + 1);
    Ok(())
}

fn one_dynamic_caller() -> Result<Node> {
    let mut functions = callees()?;
    functions.push(FunctionSpec::new(
        "Dyn",
        10,
        caller(Compiler::Gcc, &["-O2"])?,
    ));
    Node::start(NodeSpec::new(functions))
}

#[test]
fn a_thread_inside_the_rpc_at_patch_and_revert_comes_back_with_its_answer() -> Result<()> {
    let (node, agent) = (one_dynamic_caller()?, Agent::start()?);
    let stage = Stage {
        node: &node,
        agent: &agent,
        caller: "Dyn",
        modes: MODES.to_vec(),
    };
    let by_rpc = stage.answers()?;
    // Dee is never fused: its calls are RPCs at every time.
    let patch = || {
        let (code, report) = agent.patch_unwatched(&node, "Dyn", "Ann")?;
        ensure!(code == 200, "{report}");
        Ok(())
    };
    for mode in [
        "computed", "alloca", "tail", "pointer", "branch", "push", "looped",
    ] {
        let blocked = |act: &dyn Fn() -> Result<()>| -> Result<()> {
            std::thread::scope(|scope| {
                let call = scope.spawn(|| stage.ask(mode, "Dee", "slower"));
                std::thread::sleep(Duration::from_millis(100));
                let done = act();
                ensure!(!call.is_finished(), "{mode}: it was over before");
                done?;
                let answer = call.join().map_err(|_| anyhow::anyhow!("panicked"))??;
                let right = if mode == "looped" { 3 } else { 1 };
                ensure!(
                    answer == "0|Dee(slower)".repeat(right),
                    "{mode}: {answer:?}"
                );
                Ok(())
            })
        };
        blocked(&patch)?;
        agent.warm_up_with(&node, "Dyn", "Ann", b"computed Ann slow")?;
        stage.check("patched while blocked", &by_rpc, &["Ann"])?;
        // The sites that were seen by now, while one of them is in the RPC.
        blocked(&patch)?;
        stage.check("sites while blocked", &by_rpc, &["Ann"])?;
        blocked(&|| stage.revert("Ann"))?;
        stage.check("reverted while blocked", &by_rpc, &[])?;
    }
    node.stop()
}

#[test]
fn sites_that_calls_come_from_are_rewritten_by_the_same_patch() -> Result<()> {
    let (node, agent) = (one_dynamic_caller()?, Agent::start()?);
    let over = AtomicBool::new(false);
    let receipt = std::thread::scope(|scope| -> Result<Value> {
        let calls = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                for mode in ["computed", "looped"] {
                    let question = format!("{mode} Ann x");
                    node.call("Dyn", question.as_bytes())?;
                }
            }
            Ok(())
        });
        let engine = node.engine_pid().to_string();
        let patched = agent.ctl(&[
            "patch",
            "Dyn",
            "Ann",
            "--engine",
            &engine,
            "--json",
            "--canary-wait",
            "10s",
        ]);
        over.store(true, Ordering::Relaxed);
        calls.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        let report = patched?.json()?;
        ensure!(
            report["workers"][0]["proof"]["verdict"] == "proven",
            "{report}"
        );
        Ok(report["workers"][0]["receipt"].clone())
    })?;
    let sites = receipt["sites"].as_array().map_or(0, Vec::len);
    ensure!((1..=2).contains(&sites), "{receipt}");
    let status = agent.edge_status(&node, "Dyn", "Ann")?;
    let graft = &status["workers"][0]["graft"];
    ensure!(
        graft["routine"] == true && graft["windows_in_place"] == true,
        "{status}"
    );
    // People are told as well.
    let engine = node.engine_pid().to_string();
    let told = agent.ctl(&["explain", "Dyn", "Bob", "--engine", &engine])?;
    ensure!(told.code == 0, "{told:?}");
    ensure!(
        told.stdout.contains("2 sites of Bob") && told.stdout.contains("invoke_func"),
        "{}",
        told.stdout
    );
    node.stop()
}

#[test]
fn a_client_library_of_the_callers_is_rewritten_as_well() -> Result<()> {
    let client = r#"
#include <string.h>
#include "worker_v1.h"
EXPORT int client_call(const struct context *ctx, const char *input, size_t length,
                       const char **output, size_t *output_length);
int client_call(const struct context *ctx, const char *input, size_t length,
                const char **output, size_t *output_length) {
    char name[4] = {0};
    if (length < 3) {
        return -2;
    }
    memcpy(name, input, 3);
    int code = ctx->invoke(ctx->caller_context, name, input, length, output, output_length);
    return code == 0 ? 0 : code * 2 + name[3];
}
"#;
    let client = fixtures::compile_text("client", client, Compiler::Gcc, &["-O2"])?;
    let text = r#"
#include "lifecycle.h"
int client_call(const struct context *ctx, const char *input, size_t length,
                const char **output, size_t *output_length);
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {
    struct context *ctx = worker_handle;
    const char *output = NULL;
    size_t length = 0;
    int code = client_call(ctx, input, input_length, &output, &length);
    ctx->append(ctx->caller_context, output, length);
    return code;
}
"#;
    // Behind the source, as a library has to be.
    let flag = format!("-Wl,--no-as-needed,{}", client.display());
    let library = fixtures::compile_text("byclient", text, Compiler::Gcc, &["-O2", &flag])?;
    let mut functions = callees()?;
    functions.push(FunctionSpec::new("Byclient", 10, library));
    let node = Node::start(NodeSpec::new(functions))?;
    let agent = Agent::start()?;
    let asks = ["Ann", "Ann slow", "Bob", "Cid and more"];
    let answers = || -> Result<Vec<Vec<u8>>> {
        let ask = |q: &&str| {
            node.call("Byclient", q.as_bytes())
                .with_context(|| (*q).to_owned())
        };
        asks.iter().map(ask).collect()
    };
    let by_rpc = answers()?;
    let calls = || agent.fused_calls(&node, "Byclient", "Ann");
    agent.patch(&node, "Byclient", "Ann")?;
    agent.warm_up_with(&node, "Byclient", "Ann", b"Ann slow")?;
    let first = calls()?;
    ensure!(
        answers()? == by_rpc && calls()? == first + 2,
        "through the routine"
    );
    let report = agent.patch(&node, "Byclient", "Ann")?;
    let receipt = &report["workers"][0]["receipt"];
    ensure!(
        receipt["sites"].as_array().map(Vec::len) == Some(1) && receipt["through_routine"] == 0,
        "{report}"
    );
    ensure!(answers()? == by_rpc && calls()? == first + 4, "at its site");
    agent.revert(&node, "Byclient", "Ann")?;
    ensure!(answers()? == by_rpc && calls()? == first + 4, "reverted");
    agent.patch(&node, "Byclient", "Ann")?;
    ensure!(answers()? == by_rpc && calls()? == first + 6, "fused again");
    node.stop()
}
