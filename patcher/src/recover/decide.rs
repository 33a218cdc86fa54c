//! The decision: a pure function of the evidence.

use super::{Decision, Evidence, Found, Held, Live, Side, Step, Verdict};
use crate::journal::{Entry, Stage};
use crate::manifest::{Manifest, OBSERVING, Region};

/// Decides what is to be done about a worker.
#[must_use]
pub fn decide(pid: i32, start_time: u64, evidence: &Evidence) -> Decision {
    let mut case = Case {
        verdict: Verdict::Clean,
        notes: Vec::new(),
        steps: Vec::new(),
    };
    if !evidence.descriptors.is_empty() {
        case.undone("a descriptor that a patch had open is closed".into());
        case.steps.push(Step::Close(evidence.descriptors.clone()));
    }
    let counts = which_counts(evidence, &mut case);
    case.unmap(evidence, counts.map(|(record, _)| record));
    if let Some((record, live)) = counts
        && case.verdict != Verdict::Left
    {
        case.edges(evidence, record, live);
    }
    let left = case.verdict == Verdict::Left;
    let record = counts.map(|(record, _)| record.clone());
    Decision {
        entry: (!left).then(|| Entry::settled(pid, start_time, record)),
        verdict: case.verdict,
        notes: case.notes,
        steps: case.steps,
    }
}

struct Case {
    verdict: Verdict,
    notes: Vec<String>,
    steps: Vec<Step>,
}

impl Case {
    fn come_to(&mut self, verdict: Verdict, note: String) {
        self.verdict = self.verdict.max(verdict);
        self.notes.push(note);
    }

    fn undone(&mut self, note: String) {
        self.come_to(Verdict::Undone, note);
    }

    fn left(&mut self, note: String) {
        self.come_to(Verdict::Left, note);
    }

    /// Memory that was being mapped when the agent died.
    fn unmap(&mut self, evidence: &Evidence, record: Option<&Manifest>) {
        let Some(Entry {
            stage: Stage::Mapping { callee, mappings },
            ..
        }) = &evidence.entry
        else {
            return;
        };
        let recorded = |region: &Region| {
            record.is_some_and(|record| record.regions.iter().any(|r| overlap(r, region)))
        };
        let mut regions = Vec::new();
        for (planned, held) in mappings.iter().zip(&evidence.held) {
            let region = planned.reservation;
            match held {
                // An agent of another journal has patched since.
                _ if recorded(&region) => {}
                Held::Nothing => {}
                Held::Ours => regions.push(region),
                Held::Other => self.notes.push(format!(
                    "at {:#x}, where {} was about to be mapped, there is something of the worker's own",
                    region.start,
                    called(callee)
                )),
            }
        }
        if !regions.is_empty() {
            self.undone(format!(
                "{} was being mapped: its memory is unmapped, nothing led there",
                called(callee)
            ));
            self.steps.push(Step::Unmap(regions));
        }
    }

    /// Edges that are half fused or half reverted.
    fn edges(&mut self, evidence: &Evidence, record: &Manifest, live: &Live) {
        self.verdict = self.verdict.max(Verdict::Adopted);
        let strange: Vec<u64> = record
            .windows
            .iter()
            .zip(&live.windows)
            .filter(|(_, side)| **side == Side::Other)
            .map(|(window, _)| window.address)
            .collect();
        if let Some(first) = strange.first() {
            self.left(format!(
                "the bytes at {first:#x}{} are neither the library's nor ours: another tool was here",
                if strange.len() > 1 { " and elsewhere" } else { "" }
            ));
            return;
        }
        let stage = evidence
            .entry
            .as_ref()
            .filter(|entry| {
                let generation = entry.record.as_ref().map(|r| r.generation);
                generation == Some(record.generation)
            })
            .map(|entry| &entry.stage);
        let mut names: Vec<&str> = Vec::new();
        for graft in record.grafts.iter().filter(|g| !g.replaced) {
            if !names.contains(&graft.callee.as_str()) {
                names.push(&graft.callee);
            }
        }
        names.push(OBSERVING);
        for name in names {
            let edge = Edge::of(record, live, name);
            let shown = called(name);
            match stage {
                Some(Stage::Reverting { callee }) if callee == name && (edge.open || edge.some) => {
                    self.come_to(
                        Verdict::Completed,
                        format!("{shown} was being reverted: done"),
                    );
                    self.steps.push(Step::Revert(name.to_owned()));
                }
                Some(Stage::Committing { callee }) if callee == name => {
                    if edge.open && edge.whole {
                        self.come_to(
                            Verdict::Completed,
                            match name {
                                OBSERVING => "counting its calls had begun, and goes on".to_owned(),
                                _ => format!("{name} was being fused, and is"),
                            },
                        );
                    } else if edge.open || edge.some {
                        self.undone(match name {
                            OBSERVING => "counting its calls was about to begin: it does not, and the bridge is kept".to_owned(),
                            _ => format!("{name} was being fused: its calls take the RPC again, its image is kept"),
                        });
                        self.steps.push(Step::Revert(name.to_owned()));
                    } else {
                        self.undone(match name {
                            OBSERVING => "counting its calls was about to begin: it does not, and the bridge is kept".to_owned(),
                            _ => format!("{name} was about to be fused: its image is kept for the next patch"),
                        });
                    }
                }
                // With an entry it is known that no agent died in this edge: a
                // library was closed and opened again, say.
                None if edge.open && !edge.whole => {
                    self.undone(match name {
                        OBSERVING => "its calls are counted in part: they are not any more".to_owned(),
                        _ => format!("{name} is fused in part: its calls take the RPC again, its image is kept"),
                    });
                    self.steps.push(Step::Revert(name.to_owned()));
                }
                _ => {}
            }
        }
    }
}

/// What lives of one edge.
struct Edge {
    /// Its gate is open.
    open: bool,
    /// Every window that its calls need is in place.
    whole: bool,
    /// Some window is in place that its calls pass.
    some: bool,
}

impl Edge {
    fn of(record: &Manifest, live: &Live, name: &str) -> Edge {
        let outermost = name.split('/').next().unwrap_or_default();
        // Nothing passes a window that has gone with its library.
        let windows = || {
            let all = record.windows.iter().zip(&live.windows);
            all.filter(|(_, side)| **side != Side::Gone)
        };
        if name == OBSERVING {
            let own = || windows().filter(|(w, _)| w.entry || w.routine);
            return Edge {
                open: live.observing,
                whole: own().all(|(_, side)| *side == Side::After),
                // What fused edges need is no sign of it.
                some: !live.gates.contains(&true) && own().any(|(_, side)| *side == Side::After),
            };
        }
        let open = record
            .grafts
            .iter()
            .zip(&live.gates)
            .any(|(g, on)| *on && g.callee == name);
        Edge {
            open,
            whole: windows()
                .filter(|(w, _)| w.entry || w.passed_by(outermost))
                .all(|(_, side)| *side == Side::After),
            some: windows()
                .filter(|(w, _)| !w.entry && w.passed_by(outermost))
                .any(|(_, side)| *side == Side::After),
        }
    }
}

/// A callee's name, or what stands for it.
pub(super) fn called(callee: &str) -> &str {
    match callee {
        OBSERVING => "the counting of calls",
        name => name,
    }
}

fn overlap(a: &Region, b: &Region) -> bool {
    a.start < b.start.saturating_add(b.len) && b.start < a.start.saturating_add(a.len)
}

/// Which record counts, and what lives by it. A record that must be written
/// first becomes a step.
fn which_counts<'e>(evidence: &'e Evidence, case: &mut Case) -> Option<(&'e Manifest, &'e Live)> {
    let found = match (&evidence.found, &evidence.found_live) {
        (Found::Record(record), Some(live)) => Some((&**record, live)),
        _ => None,
    };
    let entry = evidence.entry.as_ref();
    let kept = entry.and_then(|entry| entry.record.as_ref());
    let fitting = match (kept, &evidence.entry_live) {
        (Some(record), Some(Ok(live))) if evidence.mapped.iter().all(|m| *m) => {
            Some((record, live))
        }
        _ => None,
    };
    let misfit = match &evidence.entry_live {
        Some(Err(why)) => why.as_str(),
        _ => "not all of its memory is mapped",
    };
    match (found, kept) {
        (Some((record, live)), None) => Some((record, live)),
        (Some((record, live)), Some(kept)) if record.generation > kept.generation => {
            // Another agent's, or the journal was away for a while.
            Some((record, live))
        }
        (Some((record, live)), Some(kept)) if record.generation == kept.generation => {
            if record != kept {
                case.left(
                    "the record in the worker and the journal's differ, and neither is newer"
                        .into(),
                );
            }
            Some((record, live))
        }
        (Some((record, live)), Some(kept)) => {
            if let Some((kept, kept_live)) = fitting {
                case.come_to(
                    Verdict::Completed,
                    "the record in the worker was not the last one: it is written from the journal"
                        .into(),
                );
                case.steps.push(Step::Record(Box::new(kept.clone())));
                return Some((kept, kept_live));
            }
            let new = kept
                .regions
                .iter()
                .zip(&evidence.mapped)
                .filter(|(region, _)| !record.regions.contains(region));
            let committing = matches!(
                entry.map(|entry| &entry.stage),
                Some(Stage::Committing { .. })
            );
            if committing && new.clone().count() > 0 && new.clone().all(|(_, mapped)| !mapped) {
                // Taken back, down to the last mapping.
                return Some((record, live));
            }
            case.left(format!(
                "the journal has a newer record than the worker, which does not fit it: {misfit}"
            ));
            Some((record, live))
        }
        (None, None) => {
            if let Found::Damaged(why) = &evidence.found {
                case.left(format!("{why}, and the journal has nothing of it"));
            }
            None
        }
        (None, Some(_)) => {
            if let Some((kept, live)) = fitting {
                let why = match &evidence.found {
                    Found::Damaged(why) => why.clone(),
                    _ => "there is no record in the worker".to_owned(),
                };
                case.come_to(
                    Verdict::Completed,
                    format!("{why}: it is written from the journal"),
                );
                case.steps.push(Step::Record(Box::new(kept.clone())));
                return Some((kept, live));
            }
            match &evidence.found {
                Found::Damaged(why) => {
                    case.left(format!(
                        "{why}, and the journal's record does not fit: {misfit}"
                    ));
                }
                // Taken back, or the worker has executed another program.
                _ if evidence.mapped.iter().all(|mapped| !mapped) => {}
                _ => case.left(format!(
                    "there is no record in the worker, and the journal's does not fit: {misfit}"
                )),
            }
            None
        }
    }
}

#[cfg(test)]
mod tests;
