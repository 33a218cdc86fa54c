//! An agent that starts finds its way with the journal alone, with the
//! workers' records alone, and with neither does no harm.

mod common;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use common::{ask, foo_bar_baz};
use nightgraft_patcher::manifest::{self, Present};
use nightgraft_patcher::snapshot::{Map, ProcMemory};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{Agent, FunctionSpec, Node, NodeSpec, WorkerInfo};
use ptrace_shim::{Address, Memory, Process};

fn present(worker: &WorkerInfo) -> Result<Present> {
    let (start_time, maps) = Map::all(worker.host_pid)?;
    let memory = ProcMemory::open(worker.host_pid)?;
    manifest::find(worker.host_pid, start_time, &maps, &memory)?.context("no record")
}

fn write(worker: &WorkerInfo, at: u64, bytes: &[u8]) -> Result<()> {
    let process = Process::open(worker.host_pid)?;
    Memory::open(&process)?.write(Address(at), bytes)?;
    Ok(())
}

/// What the agent says of a worker that it found when it started.
fn recovered(agent: &Agent, worker: &WorkerInfo) -> Result<(String, String)> {
    let health = agent.health()?;
    let all = health["recovered"].as_array().context("recovered")?;
    let of_worker = all.iter().find(|w| w["pid"] == worker.host_pid);
    let found = of_worker.with_context(|| format!("nothing of the worker in {health}"))?;
    Ok((
        found["verdict"].as_str().unwrap_or_default().to_owned(),
        found["notes"].to_string(),
    ))
}

/// Reverts, and everything is as before.
fn comes_back(agent: &Agent, node: &Node, worker: &WorkerInfo) -> Result<()> {
    agent.revert(node, "Foo", "Bar")?;
    let now = present(worker)?;
    ensure!((0..now.live.len()).all(|window| !now.in_place(window)));
    assert_eq!(ask(node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    Ok(())
}

/// A caller whose call something branches to: it becomes a short jump to filler.
const HOPS: &str = r#"
#include "lifecycle.h"

__asm__(".text\n"
        ".p2align 4\n"
        ".type meet, @function\n"
        "meet:\n"
        "    .cfi_startproc\n"
        "    push %rbx\n"
        "    .cfi_def_cfa_offset 16\n"
        "    mov %rdi, %rax\n"
        "    mov %rsi, %rdi\n"
        "    lea bars_name(%rip), %rsi\n"
        "    cmpb $'1', (%rdx)\n"
        "    je 1f\n"
        "    mov $5, %ecx\n"
        "1:  call *%rax\n"
        "    pop %rbx\n"
        "    .cfi_def_cfa_offset 8\n"
        "    ret\n"
        "    .cfi_endproc\n"
        "    .p2align 4\n"
        "    .p2align 5\n"
        ".size meet, . - meet\n"
        ".section .rodata.name, \"a\"\n"
        "bars_name: .asciz \"Bar\"\n"
        ".text\n");

int meet(invoke_func_fn invoke, void *context, const char *input, size_t length,
         const char **output, size_t *output_length);

int faas_func_call(void *worker, const char *input, size_t length) {
    struct context *ctx = worker;
    const char *output;
    size_t output_length;
    if (length == 0 ||
        meet(ctx->invoke, ctx->caller_context, input, length, &output, &output_length) != 0) {
        return -1;
    }
    ctx->append(ctx->caller_context, output, output_length);
    return 0;
}
"#;

#[test]
fn a_jump_to_filler_that_nothing_takes_yet_is_undone() -> Result<()> {
    let caller = fixtures::compile_text("hops", HOPS, Compiler::Gcc, &["-O2"])?;
    let bar = fixtures::compile("bar.c", Compiler::Gcc, &["-O2"])?;
    let node = Node::start(NodeSpec::new(vec![
        FunctionSpec::new("Bar", 1, bar),
        FunctionSpec::new("Foo", 2, caller),
    ]))?;
    let answers = || assert_eq!(ask(&node, "Foo", "hello"), "olleh|4f9f2cab|6c");
    answers();
    let first = tempfile::tempdir()?;
    let mut agent = Agent::start_in(first.path())?;
    agent.patch(&node, "Foo", "Bar")?;
    answers();
    agent.kill()?;
    let worker = node.workers("Foo")?.pop().context("no worker")?;
    let before = present(&worker)?;
    let windows = &before.manifest.windows;
    let hop = windows
        .iter()
        .find(|w| w.hop_of != 0)
        .context("no filler")?;
    let window = windows.iter().find(|w| w.address == hop.hop_of);
    let window = window.context("no window")?;
    // As it is between the two writes of a commit, and of a revert.
    write(&worker, window.address, &window.before)?;
    answers();
    // Another directory: nothing tells what was under way. (Another test's agent
    // may have been there first.)
    let second = tempfile::tempdir()?;
    let heir = Agent::start_in(second.path())?;
    let now = present(&worker)?;
    ensure!((0..now.live.len()).all(|i| now.live[i] == now.manifest.windows[i].before));
    answers();
    heir.patch(&node, "Foo", "Bar")?;
    let fused = heir.fused_calls(&node, "Foo", "Bar")?;
    answers();
    ensure!(heir.fused_calls(&node, "Foo", "Bar")? == fused + 1);
    heir.revert(&node, "Foo", "Bar")?;
    let now = present(&worker)?;
    ensure!((0..now.live.len()).all(|i| now.live[i] == now.manifest.windows[i].before));
    answers();
    node.stop()
}

/// A worker that is fused by an agent that is gone.
fn fused(state: &Path) -> Result<(Node, WorkerInfo, Present)> {
    let node = Node::start(foo_bar_baz(1))?;
    let mut agent = Agent::start_in(state)?;
    agent.patch(&node, "Foo", "Bar")?;
    agent.kill()?;
    let worker = node.workers("Foo")?.pop().context("no worker")?;
    let present = present(&worker)?;
    Ok((node, worker, present))
}

#[test]
fn a_lost_journal_is_no_loss() -> Result<()> {
    let state = tempfile::tempdir()?;
    let (node, worker, before) = fused(state.path())?;
    fs::remove_file(state.path().join("journal.redb"))?;
    let load = Load::start(&LoadSpec::foo(node.http_port(), 2))?;
    let heir = Agent::start_in(state.path())?;
    assert_eq!(present(&worker)?.manifest, before.manifest);
    let again = heir.patch(&node, "Foo", "Bar")?;
    ensure!(again["already"] == true, "{again}");
    comes_back(&heir, &node, &worker)?;
    load.stop().all_correct()?;
    node.stop()
}

#[test]
fn a_damaged_journal_is_set_aside_and_told() -> Result<()> {
    let state = tempfile::tempdir()?;
    let (node, worker, _) = fused(state.path())?;
    let file = state.path().join("journal.redb");
    let length = fs::metadata(&file)?.len();
    fs::write(&file, vec![0x5a; usize::try_from(length)?])?;
    let heir = Agent::start_in(state.path())?;
    let health = heir.health()?;
    ensure!(
        health["journal"]["notes"]
            .to_string()
            .contains("was damaged"),
        "{health}"
    );
    ensure!(health["journal"]["away"].is_null(), "{health}");
    let text = heir.ctl(&["health"])?.stdout;
    ensure!(text.contains("note: the journal"), "{text}");
    comes_back(&heir, &node, &worker)?;
    node.stop()
}

/// The record in the worker is destroyed in every way that it can be.
#[test]
fn a_lost_or_damaged_record_is_written_from_the_journal() -> Result<()> {
    let state = tempfile::tempdir()?;
    let (node, worker, before) = fused(state.path())?;
    let control = before.manifest.control;
    let load = Load::start(&LoadSpec::foo(node.http_port(), 2))?;
    let slot = manifest::slot_address(control, before.slot);
    for (name, at, bytes) in [
        ("the mark", control, vec![0; 8]),
        ("the version", control + 8, vec![0xff; 4]),
        ("which slot holds", control + 12, vec![9]),
        ("no slot holds", control + 12, vec![0]),
        ("its length", slot, vec![0xff; 4]),
        ("its text", slot + 100, b"nonsense".to_vec()),
        ("all of it", control, vec![0; 64]),
    ] {
        // The slot changes with each record that is written.
        let now = present(&worker)?;
        let moved = manifest::slot_address(control, now.slot).wrapping_sub(slot);
        let at = if at >= slot {
            at.wrapping_add(moved)
        } else {
            at
        };
        write(&worker, at, &bytes)?;
        ensure!(present(&worker).is_err(), "{name}: it is not damaged");
        let mut heir = Agent::start_in(state.path())?;
        let (verdict, notes) = recovered(&heir, &worker)?;
        ensure!(verdict == "completed", "{name}: {verdict}: {notes}");
        ensure!(
            notes.contains("written from the journal"),
            "{name}: {notes}"
        );
        assert_eq!(present(&worker)?.manifest, before.manifest, "{name}");
        heir.kill()?;
    }
    let heir = Agent::start_in(state.path())?;
    // An agent that is up already finds it as well, before it does anything.
    write(&worker, control, &[0; 8])?;
    comes_back(&heir, &node, &worker)?;
    heir.patch(&node, "Foo", "Bar")?;
    comes_back(&heir, &node, &worker)?;
    load.stop().all_correct()?;
    node.stop()
}

#[test]
fn without_record_and_journal_the_worker_is_left_running() -> Result<()> {
    let state = tempfile::tempdir()?;
    let (node, worker, before) = fused(state.path())?;
    let slot = manifest::slot_address(before.manifest.control, before.slot);
    write(&worker, slot + 100, b"nonsense")?;
    let other = tempfile::tempdir()?;
    let heir = Agent::start_in(other.path())?;
    let (verdict, notes) = recovered(&heir, &worker)?;
    ensure!(
        verdict == "left" && notes.contains("checksum"),
        "{verdict}: {notes}"
    );
    let status = heir.ctl(&["status"])?.stdout;
    ensure!(status.contains("was left as it is"), "{status}");
    let answer = heir.edge(&node, "patch", "Foo", "Bar")?;
    ensure!(answer.error_code() == "other-bridge", "{answer:?}");
    // What is fused runs on, and all windows are as they were.
    let process = Process::open(worker.host_pid)?;
    let memory = Memory::open(&process)?;
    for (window, live) in before.manifest.windows.iter().zip(&before.live) {
        assert_eq!(&memory.read_vec(Address(window.address), live.len())?, live);
    }
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    drop(heir);
    // With the journal it is all there again.
    let heir = Agent::start_in(state.path())?;
    comes_back(&heir, &node, &worker)?;
    node.stop()
}

#[test]
fn bytes_of_another_tool_are_reported_and_left() -> Result<()> {
    let state = tempfile::tempdir()?;
    let (node, worker, before) = fused(state.path())?;
    let site = before
        .manifest
        .windows
        .iter()
        .find(|window| !window.entry)
        .context("no site")?;
    // Only while nobody is there: an illegal instruction would end the worker.
    let strange = vec![0x0f; site.before.len()];
    write(&worker, site.address, &strange)?;
    let heir = Agent::start_in(state.path())?;
    let (verdict, notes) = recovered(&heir, &worker)?;
    ensure!(
        verdict == "left" && notes.contains("another tool"),
        "{verdict}: {notes}"
    );
    let answer = heir.edge(&node, "revert", "Foo", "Bar")?;
    ensure!(answer.code == 0, "{answer:?}");
    let now = heir.edge_status(&node, "Foo", "Bar")?;
    ensure!(now["workers"][0]["graft"]["gate_on"] == false, "{now}");
    let memory = Memory::open(&Process::open(worker.host_pid)?)?;
    assert_eq!(
        memory.read_vec(Address(site.address), strange.len())?,
        strange
    );
    write(&worker, site.address, &site.after)?;
    drop(heir);
    let heir = Agent::start_in(state.path())?;
    comes_back(&heir, &node, &worker)?;
    node.stop()
}
