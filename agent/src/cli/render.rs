//! Answers for people: tables, units, sentences. Pure.

use std::fmt::Write;

use comfy_table::{Table, presets};

use super::format::{bytes, clean, clean_lines, count, hex_pairs, nanos, nanos_f64};
use crate::api::{
    Edge, ErrorInfo, Explanation, FusedEdge, Health, PatchOutcome, PatchReport, PatchedWorker,
    Proof, ProofVerdict, Ps, Quarantined, RevertOutcome, RevertReport, RevertedWorker, Status,
    UnquarantineReport, Worker, WorkerKind,
};
use crate::discover::short_id;
use crate::grafter::{CalleeState, Disturbed, GuardState, SignalsBack, SiteProof, Verdict};

/// How many digits of a build-id are shown.
const BUILD_ID_DIGITS: usize = 12;
pub(super) const NOTHING: &str = "-";

pub(super) fn table<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
        .lines()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect()
}

pub(super) fn notes(text: &mut String, notes: &[String]) {
    for note in notes {
        let _ = writeln!(text, "note: {}", clean(note));
    }
}

pub(super) fn or_nothing(value: Option<impl ToString>) -> String {
    value.map_or_else(|| NOTHING.to_owned(), |value| clean(&value.to_string()))
}

pub(super) fn plural(number: usize, what: &str) -> String {
    if number == 1 {
        format!("1 {what}")
    } else {
        format!("{number} {what}s")
    }
}

fn state(state: CalleeState) -> &'static str {
    match state {
        CalleeState::Armed => "armed",
        CalleeState::Initialising => "initialising",
        CalleeState::Ready => "ready",
        CalleeState::Failed => "failed",
        CalleeState::Crashed => "crashed",
    }
}

/// `agentctl ps`.
pub(super) fn ps(ps: &Ps) -> String {
    let mut text = String::new();
    if ps.functions.is_empty() {
        text.push_str("no functions: neither an engine nor a worker is visible\n");
        notes(&mut text, &ps.notes);
        return text;
    }
    let engines: std::collections::BTreeSet<_> = ps.functions.iter().map(|f| f.engine).collect();
    let mut rows = Vec::new();
    let mut problems = Vec::new();
    for function in &ps.functions {
        let mut name = clean(
            &function
                .name
                .clone()
                .unwrap_or_else(|| format!("#{}", function.id)),
        );
        if engines.len() > 1 {
            let engine = function
                .engine
                .map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            let _ = write!(name, " (engine {engine})");
        }
        if function.workers.is_empty() {
            let mut row = [(); 8].map(|()| NOTHING.to_owned());
            row[0] = name;
            row[7] = "no workers".to_owned();
            rows.push(row);
            continue;
        }
        for worker in &function.workers {
            if let Some(problem) = &worker.problem {
                problems.push(format!("worker {}: {}", worker.pid, problem.message));
            }
            rows.push(worker_row(name.clone(), worker));
        }
    }
    let header = [
        "FUNCTION",
        "PID",
        "INSIDE",
        "CONTAINER",
        "LIBRARY",
        "BUILD-ID",
        "THREADS",
        "FUSED",
    ];
    text.push_str(&table(header, rows));
    notes(&mut text, &ps.notes);
    notes(&mut text, &problems);
    text
}

fn worker_row(function: String, worker: &Worker) -> [String; 8] {
    let container = worker.container.as_ref().map(|container| {
        let id = short_id(&container.id);
        container
            .name
            .as_ref()
            .map_or(id.clone(), |name| format!("{name} ({id})"))
    });
    let build_id = worker
        .build_id
        .as_ref()
        .map(|id| id.chars().take(BUILD_ID_DIGITS).collect::<String>());
    let mut last = match &worker.kind {
        WorkerKind::NotNative { language } => {
            format!("not native ({}): can't be fused", clean(language))
        }
        WorkerKind::Native if worker.fused.is_empty() => NOTHING.to_owned(),
        WorkerKind::Native => {
            let edges: Vec<String> = worker.fused.iter().map(fused).collect();
            edges.join(", ")
        }
    };
    if let Some(tracer) = &worker.traced_by {
        let _ = write!(
            last,
            " [traced by {}, pid {}]",
            clean(&tracer.name),
            tracer.pid
        );
    }
    [
        function,
        worker.pid.to_string(),
        or_nothing(worker.pid_inside),
        or_nothing(container),
        or_nothing(worker.library.as_ref()),
        or_nothing(build_id),
        worker.threads.to_string(),
        last,
    ]
}

fn fused(edge: &FusedEdge) -> String {
    let callee = clean(&edge.callee);
    match (edge.windows_in_place, edge.gate_on) {
        (true, true) => format!("{callee} ({})", state(edge.state)),
        (true, false) => format!("{callee} (gate off)"),
        (false, _) => format!("{callee} (reverted, kept)"),
    }
}

/// `agentctl status`.
pub(super) fn status(status: &Status) -> String {
    let mut text = String::new();
    if status.edges.is_empty() {
        text.push_str("nothing is fused\n");
        quarantined(&mut text, &status.quarantined);
        notes(&mut text, &status.notes);
        return text;
    }
    let mut rows = Vec::new();
    for edge in &status.edges {
        rows.extend(edge_rows(edge));
    }
    let header = [
        "EDGE",
        "WORKER",
        "CONTAINER",
        "STATE",
        "FUSED CALLS",
        "ERRORS",
        "RPC CALLS",
        "FUSED MEAN",
        "MAPPED",
    ];
    text.push_str(&table(header, rows));
    quarantined(&mut text, &status.quarantined);
    for edge in &status.edges {
        for worker in &edge.workers {
            if worker.graft.routine && worker.graft.windows_in_place {
                let _ = writeln!(
                    text,
                    "worker {}: {}: {} in place; other calls go through the entry of its own \
                     invoke_func ({} seen)",
                    worker.pid,
                    clean(&edge.callee),
                    plural(worker.graft.sites.len(), "site"),
                    plural(worker.graft.seen.len(), "call site")
                );
            }
            let guard = guard(worker.graft.guard);
            if let Some(guard) = guard.filter(|_| worker.graft.windows_in_place) {
                let _ = writeln!(
                    text,
                    "worker {}: {}: {guard}",
                    worker.pid,
                    clean(&edge.callee)
                );
            }
            if let Some(failure) = &worker.graft.failure {
                let _ = writeln!(
                    text,
                    "worker {}: {}: {}",
                    worker.pid,
                    edge.callee,
                    clean(failure)
                );
            }
        }
    }
    notes(&mut text, &status.notes);
    text
}

fn guard(state: GuardState) -> Option<&'static str> {
    Some(match state {
        GuardState::None => return None,
        GuardState::Waiting => "guarded against its crashes from the next call on",
        GuardState::On => "guarded against its crashes",
        GuardState::Taken => {
            "the guard is off: the worker has taken one of the signals for itself since"
        }
        GuardState::Denied => "the guard is off: the kernel gave it no memory or no signal",
    })
}

fn edge_rows(edge: &Edge) -> Vec<[String; 9]> {
    let name = clean(&format!("{} → {}", edge.caller, edge.callee));
    let mean = |ns: Option<f64>| ns.map_or_else(|| NOTHING.to_owned(), nanos_f64);
    let mut rows: Vec<[String; 9]> = edge
        .workers
        .iter()
        .map(|worker| {
            let graft = &worker.graft;
            let counters = &graft.counters;
            [
                name.clone(),
                worker.pid.to_string(),
                or_nothing(worker.container.as_ref()),
                match (graft.windows_in_place, graft.gate_on) {
                    (true, true) => state(graft.state).to_owned(),
                    (true, false) if graft.state == CalleeState::Crashed => "crashed".to_owned(),
                    (true, false) => "gate off".to_owned(),
                    (false, _) => "reverted, kept".to_owned(),
                },
                count(counters.fused_calls),
                count(counters.fused_errors),
                count(crate::canary::rpc_calls(counters)),
                mean(counters.fused_ns_mean),
                bytes(worker.mapped_bytes),
            ]
        })
        .collect();
    if edge.workers.len() > 1 {
        let totals = &edge.totals;
        rows.push([
            name,
            "all".to_owned(),
            String::new(),
            String::new(),
            count(totals.fused_calls),
            count(totals.fused_errors),
            count(totals.rpc_calls),
            mean(totals.fused_ns_mean),
            bytes(edge.workers.iter().map(|worker| worker.mapped_bytes).sum()),
        ]);
    }
    rows
}

/// `agentctl explain`.
pub(super) fn explanation(plan: &Explanation) -> String {
    let mut text = format!(
        "{} → {}: plan for worker {}, callee as in worker {} (nothing was touched)\n\n",
        clean(&plan.caller),
        clean(&plan.callee),
        plan.caller_pid,
        plan.callee_pid
    );
    text.push_str(&clean_lines(&plan.text));
    notes(&mut text, &plan.notes);
    text
}

/// `agentctl patch`.
pub(super) fn patched(report: &PatchReport) -> String {
    let edge = clean(&format!("{} → {}", report.caller, report.callee));
    let in_place =
        |w: &&PatchedWorker| matches!(w.outcome, PatchOutcome::Fused | PatchOutcome::Already);
    let fused = report.workers.iter().filter(in_place).count();
    let all = plural(report.workers.len(), "worker");
    let mut text = if report.already {
        format!("{edge}: already fused in {all}; nothing was done\n")
    } else {
        format!("{edge}: fused in {fused} of {all}\n")
    };
    let header = [
        "WORKER",
        "INSIDE",
        "CONTAINER",
        "OUTCOME",
        "SITES",
        "COMMIT STOP",
        "ALL STOPS",
        "PROOF",
    ];
    text.push_str(&table(
        header,
        report.workers.iter().map(patched_row).collect(),
    ));
    for worker in &report.workers {
        if let Some(receipt) = worker.receipt.as_ref().filter(|_| in_place(&worker)) {
            sites(&mut text, worker.pid, &receipt.sites);
            routine(&mut text, worker.pid, receipt.through_routine);
            disturbed(&mut text, worker.pid, &receipt.disturbed);
        }
        match &worker.outcome {
            PatchOutcome::Reverted { why } => {
                let _ = writeln!(text, "worker {}: {}", worker.pid, clean(why));
            }
            PatchOutcome::Failed { error } => {
                let _ = writeln!(text, "worker {}: {}", worker.pid, clean(&error.message));
            }
            _ => {}
        }
    }
    // The same in each worker: it is one callee.
    let mut receipts = report.workers.iter().filter_map(|w| w.receipt.as_ref());
    if let Some(receipt) = receipts.next().filter(|r| !r.effects.is_empty()) {
        let effects = nightgraft_patcher::effects::report(&report.callee, &receipt.effects);
        text.push_str(&clean_lines(&effects));
    }
    notes(&mut text, &report.notes);
    text
}

fn patched_row(worker: &PatchedWorker) -> [String; 8] {
    let outcome = match &worker.outcome {
        PatchOutcome::Fused => "fused",
        PatchOutcome::Already => "already fused",
        PatchOutcome::Reverted { .. } => "reverted",
        PatchOutcome::Failed { .. } => "failed",
        PatchOutcome::Gone => "exited",
        PatchOutcome::NotTried => "left alone",
    };
    let first = if worker.canary { " first" } else { "" };
    let receipt = worker.receipt.as_ref().filter(|receipt| !receipt.already);
    [
        worker.pid.to_string(),
        or_nothing(worker.pid_inside),
        or_nothing(worker.container.as_ref()),
        format!("{outcome}{first}"),
        or_nothing(receipt.map(|receipt| receipt.sites.len())),
        or_nothing(receipt.map(|receipt| nanos(receipt.commit_stop_ns))),
        or_nothing(receipt.map(|receipt| stops(&receipt.stops_ns))),
        or_nothing(worker.proof.as_ref().map(proof)),
    ]
}

fn proof(proof: &Proof) -> String {
    let waited = match proof.waited_ms {
        0 => "under 1 ms".to_owned(),
        ms => nanos(ms.saturating_mul(1_000_000)),
    };
    match proof.verdict {
        ProofVerdict::Proven => {
            let errors = match proof.fused_errors {
                0 => String::new(),
                errors => format!(" ({} returned -1)", count(errors)),
            };
            format!(
                "ready, {} fused calls{errors} in {waited}",
                count(proof.fused_calls)
            )
        }
        ProofVerdict::Idle if proof.waited_ms == 0 => "in place; not watched".to_owned(),
        ProofVerdict::Idle => format!("in place; nobody called in {waited}"),
        ProofVerdict::Failed => format!(
            "{}, {} fused and {} RPC calls in {waited}",
            proof.state.map_or("unknown", state),
            count(proof.fused_calls),
            count(proof.rpc_calls)
        ),
    }
}

pub(super) fn stops(stops: &[u64]) -> String {
    let sum = stops.iter().fold(0_u64, |sum, ns| sum.saturating_add(*ns));
    format!("{} in {}", nanos(sum), stops.len())
}

/// Whether calls also reach the callee without a site of their own.
fn routine(text: &mut String, pid: i32, calls: Option<usize>) {
    let known = match calls {
        None => return,
        Some(0) => "none is known yet that needs it".to_owned(),
        Some(calls) => format!("{} known to need it", plural(calls, "call")),
    };
    let _ = writeln!(
        text,
        "worker {pid}: other calls go through the entry of its own invoke_func ({known})"
    );
}

fn sites(text: &mut String, pid: i32, sites: &[SiteProof]) {
    for site in sites {
        let _ = writeln!(
            text,
            "worker {pid}: site {:#x}: {} is now {}",
            site.address,
            hex_pairs(&site.before),
            hex_pairs(&site.live)
        );
    }
}

fn disturbed(text: &mut String, pid: i32, threads: &[Disturbed]) {
    for thread in threads {
        let _ = writeln!(
            text,
            "worker {pid}: thread {} may have seen the stop in its {}",
            thread.tid,
            clean(&thread.syscall)
        );
    }
}

/// `agentctl revert`.
pub(super) fn reverted(report: &RevertReport) -> String {
    let edge = clean(&format!("{} → {}", report.caller, report.callee));
    let mut text = if report.nothing {
        format!("{edge}: is not fused; there was nothing to revert\n")
    } else {
        let done = |w: &&RevertedWorker| {
            matches!(w.outcome, RevertOutcome::Restored | RevertOutcome::GateOff)
        };
        let concerned = |w: &&RevertedWorker| !matches!(w.outcome, RevertOutcome::Nothing);
        format!(
            "{edge}: RPC again in {} of {}\n",
            report.workers.iter().filter(done).count(),
            plural(report.workers.iter().filter(concerned).count(), "worker")
        )
    };
    if !report.workers.is_empty() {
        let header = [
            "WORKER",
            "INSIDE",
            "CONTAINER",
            "OUTCOME",
            "STOPS",
            "FUSED CALLS",
        ];
        text.push_str(&table(
            header,
            report.workers.iter().map(reverted_row).collect(),
        ));
    }
    for worker in &report.workers {
        if let Some(receipt) = &worker.receipt {
            sites(&mut text, worker.pid, &receipt.sites);
            disturbed(&mut text, worker.pid, &receipt.disturbed);
            if let Some(reason) = receipt.reason.as_ref().filter(|_| !receipt.restored) {
                let _ = writeln!(
                    text,
                    "worker {}: calls take the RPC, the bytes stay for now: {}",
                    worker.pid,
                    clean(reason)
                );
            }
        }
        let signals = worker.receipt.as_ref().and_then(|receipt| receipt.signals);
        if let Some(signals) = signals {
            let _ = writeln!(text, "worker {}: {}", worker.pid, signals_back(signals));
        }
        if let RevertOutcome::Failed { error } = &worker.outcome {
            let _ = writeln!(text, "worker {}: {}", worker.pid, clean(&error.message));
        }
    }
    notes(&mut text, &report.notes);
    text
}

fn signals_back(signals: SignalsBack) -> &'static str {
    match signals {
        SignalsBack::GivenBack => "the guard's signals have the actions that they had before",
        SignalsBack::CallUnderWay => {
            "a call is under way: the guard stays, passing on what is not the callee's; revert              again to take it out"
        }
        SignalsBack::NotReached => {
            "its thread could not be borrowed: the guard stays, passing on what is not the              callee's; revert again to take it out"
        }
    }
}

fn reverted_row(worker: &RevertedWorker) -> [String; 6] {
    let outcome = match &worker.outcome {
        RevertOutcome::Restored => "restored",
        RevertOutcome::GateOff => "gate off",
        RevertOutcome::Nothing => "was not fused",
        RevertOutcome::Failed { .. } => "failed",
        RevertOutcome::Gone => "exited",
    };
    let receipt = worker.receipt.as_ref().filter(|receipt| !receipt.nothing);
    [
        worker.pid.to_string(),
        or_nothing(worker.pid_inside),
        or_nothing(worker.container.as_ref()),
        outcome.to_owned(),
        or_nothing(receipt.map(|receipt| stops(&receipt.stops_ns))),
        or_nothing(worker.fused_calls.map(count)),
    ]
}

/// `agentctl health`.
pub(super) fn health(health: &Health) -> String {
    let mut text = format!(
        "agent {} (pid {}), up {} s, {} queued\n",
        clean(&health.version),
        health.pid,
        health.uptime_s,
        plural(health.queued, "request")
    );
    for missing in &health.missing {
        let _ = writeln!(
            text,
            "lacks {}, needed to {}: start it with {}",
            clean(&missing.capability),
            clean(&missing.purpose),
            clean(&missing.flag)
        );
    }
    let journal = &health.journal;
    match &journal.away {
        None => {
            let _ = writeln!(text, "journal {}", clean(&journal.path));
        }
        Some(why) => {
            let _ = writeln!(
                text,
                "the journal is away, nothing is patched until it is back: {}",
                clean(why)
            );
        }
    }
    notes(&mut text, &journal.notes);
    if health.recovering {
        text.push_str("workers are being put in order, requests wait for it\n");
    }
    for worker in &health.recovered {
        let _ = writeln!(
            text,
            "at the start, worker {}: {}: {}",
            worker.pid,
            verdict(worker.verdict),
            clean(&worker.notes.join("; "))
        );
    }
    quarantined(&mut text, &health.quarantined);
    text
}

fn quarantined(text: &mut String, edges: &[Quarantined]) {
    for edge in edges {
        let (caller, callee) = (clean(&edge.caller), clean(&edge.callee));
        let _ = writeln!(
            text,
            "quarantined: {caller} → {callee}: worker {} {} (agentctl unquarantine {caller} {callee})",
            edge.pid,
            clean(&edge.how),
        );
    }
}

/// What lifting a quarantine did.
pub(super) fn unquarantined(report: &UnquarantineReport) -> String {
    let (caller, callee) = (clean(&report.caller), clean(&report.callee));
    match &report.was {
        Some(was) => format!(
            "{caller} → {callee} may be fused again (worker {} {})\n",
            was.pid,
            clean(&was.how)
        ),
        None => format!("{caller} → {callee} was not quarantined\n"),
    }
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Clean => "nothing of ours",
        Verdict::Adopted => "adopted",
        Verdict::Completed => "completed",
        Verdict::Undone => "undone",
        Verdict::Left => "left as it is",
    }
}

/// What is wrong, with its code and what to do.
pub(super) fn error(error: &ErrorInfo) -> String {
    let mut text = format!(
        "agentctl: {} [{}]\n",
        clean(&error.message),
        clean(&error.code)
    );
    if let Some(hint) = &error.hint {
        let _ = writeln!(text, "  {}", clean(hint));
    }
    text
}
