//! One row, tried: in a node of its own, so that what one row breaks is no
//! other row's trouble.
//!
//! ```text
//! reference    every input twice, each function plainly loaded
//! RPC          the first pass's answers
//! patch        or a refusal, after which the second pass's answers by RPC
//! fused        the first pass's answers: the image in the caller is a new one
//! revert       the second pass's answers, by the callee's worker
//! patch again  the second pass's answers, by the image that was kept
//! ```
//!
//! So callees with state are compared exactly. In fused passes the edge's
//! counter must move by as many calls as were made, and the caller's workers
//! must be the same processes throughout.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::compile::Built;
use super::directives::{Dependency, Directives, Pair, Role};
use super::fixture::Fixture;
use super::matrix::Variant;
use super::reference::{Answer, Reference, ReferenceFunction, ReferenceSpec};
use crate::container::FUNCTIONS_INSIDE;
use crate::{Agent, FunctionSpec, Node, NodeSpec};

/// How long a callee's initialisers may take.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// Sites of one caller for one callee.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sites {
    /// Rewritten in place.
    pub in_place: usize,
    /// Reached through the entry of the worker's own routine.
    pub entry: usize,
    /// Left as RPCs.
    pub refused: usize,
}

impl fmt::Display for Sites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (self.in_place, "in place"),
            (self.entry, "through the entry"),
            (self.refused, "refused"),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, how)| format!("{count} {how}"))
            .collect();
        f.write_str(&parts.join(", "))
    }
}

/// What became of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All answers were right in every phase.
    Supported,
    /// The patch was refused with this code, and nothing changed.
    Refused {
        /// The stable code.
        code: String,
        /// The refusal's text.
        why: String,
    },
    /// Anything else.
    Broken(String),
    /// It was not run.
    Skipped(String),
}

/// Tries one row. An error is a row that is broken.
pub fn run(
    fixture: &Fixture,
    variant: &Variant,
    built: &Built,
    agent: &Agent,
    sites: &mut Sites,
) -> Result<Outcome> {
    let d = &fixture.directives;
    let dir = tempfile::Builder::new().prefix("coverage-").tempdir()?;
    let (first, second) = reference(d, built, dir.path())?;
    let node = Node::start(node(d, variant, built, dir.path())?).context("the node")?;
    let trial = Trial {
        directives: d,
        caller_library: &built.functions["Foo"],
        functions: built.functions.keys().map(String::as_str).collect(),
        node: &node,
        agent,
    };
    let outcome = trial.run(&first, &second, sites);
    let result = outcome.with_context(|| trial.circumstances());
    match node.stop() {
        Ok(()) => result,
        Err(e) => result.and(Err(e.context("the node's end"))),
    }
}

/// Each input's answer, in a first and a second pass.
fn reference(d: &Directives, built: &Built, dir: &Path) -> Result<(Vec<Answer>, Vec<Answer>)> {
    let mut spec = ReferenceSpec::new();
    for (name, library) in &built.functions {
        let (env, files) = surroundings(d, name);
        let dir = dir.join(name);
        fs::create_dir(&dir)?;
        for (name, text) in files {
            fs::write(dir.join(name), text)?;
        }
        spec.insert(
            name.clone(),
            ReferenceFunction {
                library: library.clone(),
                env,
                dir,
            },
        );
    }
    let mut reference = Reference::start(dir, &spec, "Foo")?;
    let mut pass = || -> Result<Vec<Answer>> {
        d.inputs
            .iter()
            .map(|input| {
                reference
                    .ask(input)
                    .with_context(|| format!("{:?}", shown(input)))
            })
            .collect()
    };
    Ok((pass()?, pass()?))
}

/// A function's environment and the files in its working directory.
fn surroundings(d: &Directives, function: &str) -> (Vec<Pair>, Vec<Pair>) {
    let mut files = d.files.clone();
    if function == "Foo" {
        (d.caller_env.clone(), files)
    } else {
        files.extend(d.callee_files.iter().cloned());
        (d.env.clone(), files)
    }
}

fn node(d: &Directives, variant: &Variant, built: &Built, dir: &Path) -> Result<NodeSpec> {
    let mut functions = Vec::new();
    for ((name, library), id) in built.functions.iter().zip(1..) {
        let mut function = FunctionSpec::new(name, id, library).workers(d.workers, d.workers);
        let (env, files) = surroundings(d, name);
        function.env = env;
        for (file, _) in files {
            function
                .files
                .push((dir.join(name).join(&file), Path::new("/").join(&file)));
        }
        // Where the other half loads them too, they lie beside it as well.
        let links = (name != "Foo") != (d.role == Role::Caller);
        if links || variant.dependency == Some(Dependency::InCallerToo) {
            for own in &built.own {
                let file = own.file_name().context("a library without a name")?;
                function
                    .files
                    .push((own.clone(), Path::new(FUNCTIONS_INSIDE).join(file)));
            }
        }
        functions.push(function);
    }
    let mut spec = NodeSpec::new(functions);
    if d.stripped_worker {
        let stripped = dir.join("func_worker_v1");
        let status = Command::new("strip")
            .arg("-o")
            .arg(&stripped)
            .arg(crate::bin("func_worker_v1")?)
            .status()
            .context("strip")?;
        ensure!(status.success(), "strip ended with {status}");
        spec.worker = Some(stripped);
    }
    Ok(spec)
}

/// The counter has not moved by the calls that were made.
#[derive(Debug)]
struct NotAllFused {
    fused: u64,
    wanted: u64,
    /// The edge as its workers tell it.
    status: String,
}

impl fmt::Display for NotAllFused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} calls ran fused instead of {}: {}",
            self.fused, self.wanted, self.status
        )
    }
}

impl std::error::Error for NotAllFused {}

struct Trial<'t> {
    directives: &'t Directives,
    caller_library: &'t Path,
    functions: Vec<&'t str>,
    node: &'t Node,
    agent: &'t Agent,
}

impl Trial<'_> {
    fn run(&self, first: &[Answer], second: &[Answer], sites: &mut Sites) -> Result<Outcome> {
        let d = self.directives;
        let workers = self.pids()?;
        self.compare(first).context("by RPC")?;
        if d.replace_callee {
            self.replace_callee()?;
        }
        if let Some(refused) = self.patch(Some(sites))? {
            self.compare(second).context("refused, by RPC")?;
            self.same_workers(&workers)?;
            return Ok(refused);
        }
        self.warm_up()?;
        if let Err(e) = self.fused_pass(first).context("fused") {
            // Right answers, but not all of them fused, where the plan said so.
            if sites.refused > 0 && e.downcast_ref::<NotAllFused>().is_some() {
                return Ok(Outcome::Refused {
                    code: "sites-left".to_owned(),
                    why: format!("{} sites stay RPCs: {e:#}", sites.refused),
                });
            }
            return Err(e);
        }
        self.revert()?;
        self.compare(second).context("reverted")?;
        match self.patch(None)? {
            None => {}
            // Its initialisers still run from the first time, so it is not
            // taken for fused again.
            Some(Outcome::Refused { code, .. }) if d.never_ready && code == "canary-failed" => {
                self.compare(second).context("not fused again")?;
                self.same_workers(&workers)?;
                return Ok(Outcome::Supported);
            }
            Some(refused) => bail!("fused again: {refused:?}"),
        }
        self.warm_up()?;
        self.fused_pass(second).context("fused again")?;
        self.same_workers(&workers)?;
        self.count_sites(sites)?;
        Ok(Outcome::Supported)
    }

    /// The caller's sites, as its first worker holds them once they have all
    /// been seen. A site that serves several callees is one.
    fn count_sites(&self, sites: &mut Sites) -> Result<()> {
        let (mut in_place, mut entry) = (BTreeSet::new(), BTreeSet::new());
        for (caller, callee) in self.directives.edges.iter().filter(|e| e.0 == "Foo") {
            if callee.contains('/') {
                continue;
            }
            let status = self.agent.edge_status(self.node, caller, callee)?;
            let graft = &status["workers"][0]["graft"];
            let addresses = |key: &str| -> Vec<u64> {
                let all = graft[key].as_array().into_iter().flatten();
                all.filter_map(Value::as_u64).collect()
            };
            in_place.extend(addresses("sites"));
            entry.extend(addresses("seen"));
        }
        sites.in_place = in_place.len();
        sites.entry = entry.len();
        Ok(())
    }

    fn compare(&self, expected: &[Answer]) -> Result<()> {
        for (input, expected) in self.directives.inputs.iter().zip(expected) {
            let found = match self.node.call("Foo", input) {
                Ok(output) => Answer { code: 0, output },
                // The gateway's word for a function that returned non-zero.
                Err(crate::CallError::Status(_)) if expected.code != 0 => continue,
                Err(e) => bail!("{:?}: {e}", shown(input)),
            };
            ensure!(
                expected.code == 0 && found.output == expected.output,
                "{:?}: {:?} instead of {} {:?}",
                shown(input),
                shown(&found.output),
                expected.code,
                shown(&expected.output)
            );
        }
        Ok(())
    }

    fn fused_pass(&self, expected: &[Answer]) -> Result<()> {
        let d = self.directives;
        let (caller, callee) = &d.edges[0];
        let before = self.agent.fused_calls(self.node, caller, callee)?;
        let idle = self.switches()?;
        self.compare(expected)?;
        for (input, answer) in &d.fused_inputs {
            let found = self
                .node
                .call("Foo", input)
                .map_err(|e| anyhow::anyhow!("{:?}: {e}", shown(input)))?;
            ensure!(
                found == *answer,
                "{:?}: {:?} instead of {:?}",
                shown(input),
                shown(&found),
                shown(answer)
            );
        }
        let fused = self.agent.fused_calls(self.node, caller, callee)? - before;
        let wanted = d.fused_calls_per_pass();
        if fused != wanted {
            let status = self.agent.edge_status(self.node, caller, callee)?;
            return Err(NotAllFused {
                fused,
                wanted,
                status: status.to_string(),
            }
            .into());
        }
        let after = self.switches()?;
        for (name, count) in &idle {
            ensure!(
                after.get(name) == Some(count),
                "the worker of {name} has run while its calls should have been fused"
            );
        }
        Ok(())
    }

    /// How often the workers that are to be idle have waited.
    fn switches(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let mut all = BTreeMap::new();
        for name in &self.directives.idle {
            let of_worker = |pid: i32| -> Result<String> {
                let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
                let line = status
                    .lines()
                    .find(|l| l.starts_with("voluntary_ctxt_switches"));
                Ok(line.context("no count of switches")?.to_owned())
            };
            let counts = self
                .node
                .workers(name)?
                .iter()
                .map(|w| of_worker(w.host_pid))
                .collect::<Result<_>>()?;
            all.insert(name.clone(), counts);
        }
        Ok(all)
    }

    /// Fuses all edges; a refusal is handed on.
    fn patch(&self, mut sites: Option<&mut Sites>) -> Result<Option<Outcome>> {
        for (caller, callee) in &self.directives.edges {
            if let Some(sites) = sites.as_deref_mut() {
                let plan = self.agent.edge(self.node, "explain", caller, callee)?;
                sites.refused += left(&plan.json()?["plan"]);
            }
            let answer = self.patch_edge(caller, callee)?;
            if answer.code == 0 {
                continue;
            }
            let error = answer.json().unwrap_or_default()["error"].clone();
            let code = error["code"].as_str().unwrap_or_default();
            ensure!(!code.is_empty(), "patch {caller} {callee}: {answer:?}");
            let why = error["message"].as_str().unwrap_or_default();
            return Ok(Some(Outcome::Refused {
                code: code.to_owned(),
                why: why.to_owned(),
            }));
        }
        Ok(None)
    }

    fn patch_edge(&self, caller: &str, callee: &str) -> Result<crate::agent::Answer> {
        let engine = self.node.engine_pid().to_string();
        let mut arguments = vec![
            "patch",
            caller,
            callee,
            "--engine",
            &engine,
            "--json",
            "--canary-wait",
            "50ms",
        ];
        if let Some(effects) = &self.directives.allow_effects {
            arguments.extend(["--allow-effects", effects]);
        }
        self.agent.ctl(&arguments)
    }

    fn revert(&self) -> Result<()> {
        for (caller, callee) in self.directives.edges.iter().rev() {
            let answer = self.agent.revert(self.node, caller, callee)?;
            ensure!(
                answer["workers"]
                    .as_array()
                    .is_some_and(|w| w.iter().all(|w| w["receipt"]["restored"] == true)),
                "revert {caller} {callee}: {answer}"
            );
        }
        Ok(())
    }

    /// Calls until every callee of Foo's runs fused in each of its workers.
    /// (What other functions call is reached through these, or not at all.)
    fn warm_up(&self) -> Result<()> {
        for (caller, callee) in self.directives.edges.iter().filter(|e| e.0 == "Foo") {
            self.warm_up_edge(caller, callee)?;
        }
        Ok(())
    }

    fn warm_up_edge(&self, caller: &str, callee: &str) -> Result<()> {
        let d = self.directives;
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let status = self.agent.edge_status(self.node, caller, callee)?;
            let states = states(&status);
            if d.never_ready && states.iter().any(|s| s != "armed") {
                return Ok(());
            }
            if !states.is_empty() && states.iter().all(|s| s == "ready") {
                return Ok(());
            }
            ensure!(
                !states.iter().any(|s| s == "failed"),
                "{callee} fails in {caller}: {status}"
            );
            ensure!(
                Instant::now() < deadline,
                "{callee} does not get ready in {caller}: {status}"
            );
            // At once and often, so that each worker gets some.
            std::thread::scope(|scope| {
                let threads: Vec<_> = states
                    .iter()
                    .map(|_| scope.spawn(|| self.call_some(states.len())))
                    .collect();
                threads.into_iter().try_for_each(|t| match t.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })
            .with_context(|| format!("a call while {callee} gets ready"))?;
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// One call, or many where there are several workers to reach.
    fn call_some(&self, workers: usize) -> Result<()> {
        for _ in 0..if workers > 1 { 50 } else { 1 } {
            for input in &self.directives.warm {
                match self.node.call("Foo", input) {
                    Ok(_) | Err(crate::CallError::Status(_)) => {}
                    Err(e) => bail!("{:?}: {e}", shown(input)),
                }
            }
        }
        Ok(())
    }

    /// Another file under the callee's name, as a deployment in place leaves.
    fn replace_callee(&self) -> Result<()> {
        let container = fs::read_dir(self.node.dir())?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.to_string_lossy().ends_with("-Bar"))
            .context("no container of Bar")?;
        let library = container.join("root/functions/libbar.so");
        let other = container.join("root/functions/libfoo-as-bar.so");
        fs::copy(self.caller_library, &other)?;
        fs::rename(other, library)?;
        Ok(())
    }

    fn pids(&self) -> Result<Vec<i32>> {
        let workers = self.node.workers("Foo")?;
        Ok(workers.iter().map(|w| w.host_pid).collect())
    }

    fn same_workers(&self, before: &[i32]) -> Result<()> {
        ensure!(self.pids()? == before, "a worker of Foo is another one");
        Ok(())
    }

    /// For the message of a row that is broken.
    fn circumstances(&self) -> String {
        let dead: Vec<_> = self
            .functions
            .iter()
            .copied()
            .filter(|name| {
                self.node
                    .workers(name)
                    .is_ok_and(|w| w.len() < usize::from(self.directives.workers))
            })
            .collect();
        let logs: Vec<_> = self
            .node
            .all_logs()
            .lines()
            .filter(|l| l.contains("FATAL") || l.contains("terminate") || l.contains("Signaled"))
            .map(str::to_owned)
            .collect();
        let mut text = String::from("broken");
        if !dead.is_empty() {
            text = format!("{text}; a worker died: {}", dead.join(", "));
        }
        if !logs.is_empty() {
            text = format!("{text}; logs: {}", logs.join(" / "));
        }
        text
    }
}

fn states(status: &Value) -> Vec<String> {
    status["workers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|w| w["graft"]["state"].as_str().map(str::to_owned))
        .collect()
}

/// Sites that a plan leaves as RPCs.
fn left(plan: &Value) -> usize {
    plan["unfused"].as_array().map_or(0, Vec::len)
}

/// Bytes for people, not too many.
fn shown(bytes: &[u8]) -> String {
    let mut text: String = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
    if bytes.len() > 120 {
        text.push_str(&format!("… ({} bytes)", bytes.len()));
    }
    text
}
