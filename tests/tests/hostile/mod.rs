//! What the tests of hostile workers share: callers that do things to
//! themselves, and what must come of a patch.
//!
//! A caller is Foo with a few lines more ([`foo_with`]). They define `set_up`,
//! which runs when the library is loaded, and may define `COMMAND`, a function
//! that answers requests of the test's before Foo sees them.

#![allow(dead_code, reason = "each of the tests uses a part of it")]

mod answers;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{Agent, Node, WorkerInfo, until};
use serde_json::Value;

use crate::code::Code;
use answers::QUESTIONS;
pub(crate) use answers::check;

/// How often the questions call Bar.
const CALLS: u64 = 5;

/// Foo, which does `lines` beside.
pub(crate) fn foo_with(lines: &str) -> Result<PathBuf> {
    foo_built_with(lines, &[])
}

/// The same with further flags.
pub(crate) fn foo_built_with(lines: &str, flags: &[&str]) -> Result<PathBuf> {
    let text = format!(
        r"#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <foo_logic.h>
#include <lifecycle.h>
#define MUST(condition) do {{ if (!(condition)) {{ perror(#condition); abort(); }} }} while (0)
static inline void say(const struct context *ctx, const char *text) {{
    ctx->append(ctx->caller_context, text, strlen(text));
}}
{lines}
__attribute__((constructor)) static void begin(void) {{ set_up(); }}
int faas_func_call(void *worker_handle, const char *input, size_t input_length) {{
#ifdef COMMAND
    if (COMMAND(worker_handle, input, input_length)) {{
        return 0;
    }}
#endif
    return foo_handle(worker_handle, input, input_length);
}}
"
    );
    let flags = [&["-O2", "-I."], flags].concat();
    fixtures::compile_text("hostile", &text, Compiler::Gcc, &flags)
}

/// One worker of a caller, and the agent that fuses Bar into it.
#[derive(Clone, Copy)]
pub(crate) struct Stage<'a> {
    pub(crate) node: &'a Node,
    pub(crate) agent: &'a Agent,
    pub(crate) caller: &'a str,
    pub(crate) pid: i32,
}

impl<'a> Stage<'a> {
    /// The caller's only worker.
    pub(crate) fn new(node: &'a Node, agent: &'a Agent, caller: &'a str) -> Result<Self> {
        let workers = node.workers(caller)?;
        ensure!(workers.len() == 1, "{workers:?}\n{}", node.all_logs());
        Ok(Self {
            node,
            agent,
            caller,
            pid: workers[0].host_pid,
        })
    }

    /// The answer to a request of any kind.
    pub(crate) fn ask(&self, question: &str) -> Result<String> {
        let answer = self.node.call(self.caller, question.as_bytes());
        let answer = answer.with_context(|| self.node.all_logs())?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// That the worker answers rightly, is still the same one, and nobody
    /// traces it.
    pub(crate) fn serves(&self) -> Result<()> {
        self.answers()?;
        self.is_alone()
    }

    /// That the worker answers rightly.
    pub(crate) fn answers(&self) -> Result<()> {
        for question in QUESTIONS {
            let answer = self.node.call(self.caller, question.as_bytes());
            check(question, &answer.with_context(|| self.node.all_logs())?)?;
        }
        self.worker().map(drop)
    }

    fn fused_calls(&self) -> Result<u64> {
        self.agent.fused_calls(self.node, self.caller, "Bar")
    }

    pub(crate) fn serves_fused(&self) -> Result<()> {
        self.agent.warm_up(self.node, self.caller, "Bar")?;
        let before = self.fused_calls()?;
        self.serves()?;
        let fused = self.fused_calls()? - before;
        ensure!(fused == CALLS, "{fused} calls ran fused of {CALLS}");
        Ok(())
    }

    pub(crate) fn serves_by_rpc(&self) -> Result<()> {
        let before = self.fused_calls()?;
        self.serves()?;
        ensure!(self.fused_calls()? == before, "a call ran fused");
        Ok(())
    }

    /// The worker is the same one and nobody traces it.
    pub(crate) fn is_alone(&self) -> Result<()> {
        let worker = self.worker()?;
        let tracer = worker.status("TracerPid");
        ensure!(tracer.as_deref() == Some("0"), "traced by {tracer:?}");
        Ok(())
    }

    pub(crate) fn worker(&self) -> Result<WorkerInfo> {
        let workers = self.node.workers(self.caller)?;
        ensure!(
            workers.len() == 1 && workers[0].host_pid == self.pid,
            "worker {} of {} became {workers:?}\n{}",
            self.pid,
            self.caller,
            self.node.all_logs()
        );
        Ok(workers[0].clone())
    }

    /// Its bytes, once it waits for a request.
    pub(crate) fn code(&self) -> Result<Code> {
        let worker = self.worker()?;
        until("the worker is idle", || worker.waits_for_request());
        Code::of(self.pid)
    }

    /// Patches, which must succeed.
    pub(crate) fn patch(&self) -> Result<Value> {
        let (code, report) = self.try_patch()?;
        ensure!(
            code == 200 && report["workers"][0]["outcome"]["outcome"] == "fused",
            "{report}\n{}",
            self.agent.log()
        );
        Ok(report)
    }

    /// Patches where some of it may be in place already.
    pub(crate) fn patch_anew(&self) -> Result<Value> {
        let (code, report) = self.try_patch()?;
        ensure!(code == 200, "{report}\n{}", self.agent.log());
        Ok(report)
    }

    pub(crate) fn try_patch(&self) -> Result<(u16, Value)> {
        self.agent.patch_unwatched(self.node, self.caller, "Bar")
    }

    /// Reverts to the original bytes, which must succeed.
    pub(crate) fn revert(&self) -> Result<Value> {
        let (code, report) = self.agent.try_revert(self.node, self.caller, "Bar")?;
        ensure!(
            code == 200 && report["workers"][0]["outcome"]["outcome"] == "restored",
            "{report}\n{}",
            self.agent.log()
        );
        Ok(report)
    }

    /// Fused and reverted, and right all the time; the patch's report.
    pub(crate) fn works(&self) -> Result<Value> {
        self.serves().context("before")?;
        let code = self.code()?;
        let report = self.patch()?;
        self.serves_fused().context("fused")?;
        self.revert()?;
        code.runs_the_same()?;
        self.serves_by_rpc().context("reverted")?;
        Ok(report)
    }

    /// Refused with this code and a message or hint that has all these words;
    /// byte for byte as before, and right all the time.
    pub(crate) fn is_refused(&self, code: &str, words: &[&str]) -> Result<()> {
        self.serves().context("before")?;
        let before = self.code()?;
        self.refuses(code, words)?;
        before.unchanged()?;
        self.serves_by_rpc().context("afterwards")
    }

    /// The refusal alone.
    pub(crate) fn refuses(&self, code: &str, words: &[&str]) -> Result<()> {
        let (status, report) = self.try_patch()?;
        let error = &report["error"];
        ensure!(
            status == 409 && error["code"] == code && error["hint"].is_string(),
            "not {code}: {status} {report}\n{}",
            self.agent.log()
        );
        let text = format!("{} {}", error["message"], error["hint"]);
        for word in words {
            ensure!(text.contains(word), "no {word:?} in {error}");
        }
        Ok(())
    }
}
