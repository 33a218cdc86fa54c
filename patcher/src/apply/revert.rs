//! The way back: the gate at once, the bytes when no thread is in them. The
//! image stays for the next patch. To count a worker's calls no longer is the
//! same, with its own gate.

use std::cell::Cell;

use ptrace_shim::{Address, Memory, Process};

use super::commit::{Direction, at_a_safe_moment};
use super::{ApplyError, Limits, disturbance, guard, nanoseconds, on_tracer_thread, open, prove};
use crate::elf::hex;
use crate::faults::{self, hit};
use crate::journal::{Entry, Journal, Stage};
use crate::manifest::{OBSERVING, Present, WindowRecord};
use crate::refused::Refused;
use crate::report::RevertReceipt;

/// Reverts `callee` in the worker that `present` was read from. It is written
/// down first; where that cannot be it is done all the same, as the worker's
/// record is enough to do it again, and the receipt says so.
///
/// # Errors
/// The worker is gone or cannot be written. That the bytes could not be
/// restored in time is no error: the gate is off, and the receipt says why.
pub fn revert(
    present: &Present,
    callee: &str,
    limits: &Limits,
    journal: &dyn Journal,
) -> Result<RevertReceipt, ApplyError> {
    let manifest = &present.manifest;
    let mut receipt = RevertReceipt {
        pid: manifest.pid,
        nothing: false,
        restored: true,
        reason: None,
        sites: Vec::new(),
        stops_ns: Vec::new(),
        disturbed: Vec::new(),
        signals: None,
        journal: None,
    };
    let windows = windows(present, callee);
    let foreign = foreign(present, callee);
    let open_gate = match callee {
        OBSERVING => present.observing,
        _ => (manifest.grafts.iter().zip(&present.gates)).any(|(g, on)| *on && g.callee == callee),
    };
    let signals = present.armed && !others_are_guarded(present, callee);
    if windows.is_empty() && !open_gate && !signals {
        receipt.nothing = foreign.is_none();
        return Ok(told(receipt, foreign.as_ref()));
    }
    let write = |stage: Stage| {
        journal.write(&Entry {
            pid: manifest.pid,
            start_time: manifest.start_time,
            stage,
            record: Some(manifest.clone()),
        })
    };
    on_tracer_thread(|| {
        let process = open(manifest.pid, manifest.start_time)?;
        let callee_now = callee.to_owned();
        let written = write(Stage::Reverting { callee: callee_now });
        receipt.journal = written.err().map(|e| e.0);
        hit(faults::REVERTING);
        let memory = Memory::open(&process)?;
        if callee == OBSERVING {
            memory.write(Address(manifest.observing()), &[0])?;
            hit(faults::REVERT_GATE);
        }
        // Those of older images too: an agent that died while it replaced one
        // left it open.
        for graft in manifest.grafts.iter().filter(|g| g.callee == callee) {
            memory.write(Address(manifest.gate(graft)), &[0])?;
            hit(faults::REVERT_GATE);
        }
        let settle = |receipt: &mut RevertReceipt| {
            if signals {
                // The last: a guard that stays passes on what is not its own.
                receipt.signals = Some(guard::give_back(&process, manifest, limits, receipt));
            }
            if let Err(error) = write(Stage::Settled) {
                receipt.journal = Some(error.0);
            }
            hit(faults::REVERTED);
        };
        if windows.is_empty() {
            settle(&mut receipt);
            return Ok(told(receipt, foreign.as_ref()));
        }
        match restore(&process, &windows, limits) {
            Ok(stop) => {
                receipt.stops_ns.push(nanoseconds(stop.duration));
                receipt
                    .disturbed
                    .extend(stop.disturbed.iter().map(disturbance));
                receipt.sites = windows
                    .iter()
                    .filter(|w| w.is_site())
                    .map(|w| prove(&process, w, &w.before))
                    .collect::<Result<_, _>>()?;
            }
            Err(error @ (ApplyError::NoMoment { .. } | ApplyError::Refused(_))) => {
                receipt.restored = false;
                receipt.reason = Some(error.to_string());
            }
            Err(other) => return Err(other),
        }
        settle(&mut receipt);
        Ok(told(receipt, foreign.as_ref()))
    })
}

/// Windows that somebody else has written to stay as they are; with the gate
/// off they lead to the RPC, if what is left of them is ours.
fn told(mut receipt: RevertReceipt, foreign: Option<&Refused>) -> RevertReceipt {
    if let (true, Some(foreign)) = (receipt.restored, foreign) {
        receipt.restored = false;
        receipt.reason = Some(foreign.to_string());
    }
    receipt
}

/// The first window that should be restored and holds neither the library's
/// bytes nor ours.
fn foreign(present: &Present, callee: &str) -> Option<Refused> {
    let manifest = &present.manifest;
    let others = open_edges(present, callee);
    let observed = stays_observed(present, callee);
    let mine = |w: &WindowRecord| match w.entry {
        true => others.is_empty() && !observed,
        false => {
            w.passed_by(callee)
                && !others.iter().any(|other| w.passed_by(other))
                && !(observed && w.routine)
        }
    };
    let windows = &manifest.windows;
    let index = (0..windows.len()).find(|&i| {
        let live = &present.live[i];
        let known = [&windows[i].before, &windows[i].after].contains(&live);
        mine(&windows[i]) && !present.is_gone(i) && !known
    })?;
    let window = &windows[index];
    Some(Refused::ForeignBytes {
        at: window.address,
        expected: hex(&window.after),
        found: hex(&present.live[index]),
    })
}

/// Whether the window at this address holds bytes of somebody else's, which
/// may give way to ours again, as a breakpoint does: a jump to filler that
/// has to lead on then.
fn may_jump_back(present: &Present, window: u64) -> bool {
    let windows = &present.manifest.windows;
    (0..windows.len()).any(|i| {
        windows[i].address == window
            && !present.in_place(i)
            && !present.is_gone(i)
            && present.live[i] != windows[i].before
    })
}

/// Whether the worker's calls go on to be counted.
fn stays_observed(present: &Present, callee: &str) -> bool {
    present.observing && callee != OBSERVING
}

/// The edges that run fused beside this one.
fn open_edges<'a>(present: &'a Present, callee: &str) -> Vec<&'a str> {
    let grafts = present.manifest.grafts.iter().zip(&present.gates);
    grafts
        .filter(|(g, on)| **on && !g.replaced && g.callee != callee)
        .map(|(g, _)| g.callee.as_str())
        .collect()
}

/// Whether calls of another edge run guarded.
fn others_are_guarded(present: &Present, callee: &str) -> bool {
    let open = open_edges(present, callee);
    let grafts = present.manifest.grafts.iter().zip(&present.guards);
    grafts
        .filter(|(g, guarded)| **guarded && !g.replaced)
        .any(|(g, _)| open.contains(&g.callee.as_str()))
}

fn restore(
    process: &Process,
    windows: &[WindowRecord],
    limits: &Limits,
) -> Result<ptrace_shim::Stop, ApplyError> {
    at_a_safe_moment(
        process,
        windows,
        Direction::Out,
        limits,
        &Cell::new(false),
        |stopped| {
            for window in windows {
                stopped.write_code(Address(window.address), &window.before)?;
                hit(faults::REVERT_WINDOW);
            }
            Ok(())
        },
    )
    .inspect(|_| hit(faults::REVERT_RESUMED))
}

/// The windows in place that no other open edge needs: sites first, then the
/// filler that some jumped to, the entry last, so that outputs are reclaimed
/// for as long as there are any.
fn windows(present: &Present, callee: &str) -> Vec<WindowRecord> {
    let manifest = &present.manifest;
    let in_place = |index: &usize| present.in_place(*index);
    let open = open_edges(present, callee);
    let observed = stays_observed(present, callee);
    let needed =
        |w: &WindowRecord| open.iter().any(|other| w.passed_by(other)) || (observed && w.routine);
    let all: Vec<usize> = (0..manifest.windows.len()).filter(in_place).collect();
    let mut out: Vec<WindowRecord> = all
        .iter()
        .map(|i| &manifest.windows[*i])
        .filter(|w| !w.entry && w.passed_by(callee) && !needed(w))
        .filter(|w| w.hop_of == 0 || !may_jump_back(present, w.hop_of))
        .cloned()
        .collect();
    out.sort_by_key(|w| w.hop_of != 0);
    let some_site_stays = all
        .iter()
        .map(|i| &manifest.windows[*i])
        .any(|w| !w.entry && !out.contains(w));
    if !some_site_stays && !observed {
        out.extend(
            all.iter()
                .map(|i| &manifest.windows[*i])
                .filter(|w| w.entry)
                .cloned(),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::manifest::{BridgeAddresses, GraftRecord, Manifest, Region};

    const BEFORE: [u8; 2] = [0xff, 0xd0];
    const AFTER: [u8; 2] = [0xeb, 0x3e];
    const FILLER: [u8; 5] = [0x90; 5];
    const HOP: [u8; 5] = [0xe9, 1, 2, 3, 4];

    /// A call that jumps to filler, with these bytes in the one and the other.
    fn present(call: &[u8], filler: &[u8]) -> Present {
        let window = WindowRecord {
            address: 0x1000,
            before: BEFORE.to_vec(),
            after: AFTER.to_vec(),
            jumped: true,
            names: vec!["Bar".into()],
            ..WindowRecord::default()
        };
        let hop = WindowRecord {
            address: 0x1040,
            before: FILLER.to_vec(),
            after: HOP.to_vec(),
            jumped: false,
            hop_of: window.address,
            ..window.clone()
        };
        let region = Region { start: 0, len: 0 };
        Present {
            manifest: Manifest {
                version: 0,
                format: 0,
                generation: 0,
                pid: 0,
                start_time: 0,
                library: String::new(),
                control: 0,
                worker: 0,
                bridge: BridgeAddresses {
                    enter: 0,
                    called: 0,
                    routine: 0,
                    exports: BTreeMap::new(),
                },
                regions: Vec::new(),
                windows: vec![hop, window],
                grafts: vec![GraftRecord {
                    callee: "Bar".into(),
                    parent: 0,
                    build_id: String::new(),
                    dependencies: String::new(),
                    library: String::new(),
                    graft: 0,
                    call: 0,
                    index: 0,
                    slot: 0,
                    image: region,
                    replaced: false,
                }],
            },
            slot: 1,
            live: vec![filler.to_vec(), call.to_vec()],
            states: vec![0],
            gates: vec![true],
            guards: vec![false],
            armed: false,
            observing: false,
            seen: Vec::new(),
        }
    }

    fn restored(call: &[u8], filler: &[u8]) -> Vec<u64> {
        let windows = windows(&present(call, filler), "Bar");
        windows.iter().map(|w| w.address).collect()
    }

    #[test]
    fn filler_goes_after_the_window_that_jumps_there() {
        assert_eq!(restored(&AFTER, &HOP), [0x1000, 0x1040]);
        // An agent died between the two.
        assert_eq!(restored(&BEFORE, &HOP), [0x1040]);
        assert!(restored(&BEFORE, &FILLER).is_empty());
    }

    #[test]
    fn filler_stays_behind_a_breakpoint_that_may_give_way_to_a_jump_there() {
        let breakpoint = [0xcc, AFTER[1]];
        assert!(restored(&breakpoint, &HOP).is_empty());
        assert!(foreign(&present(&breakpoint, &HOP), "Bar").is_some());
        // Nothing jumps to one in the filler when the window is gone.
        let in_filler = [0xcc, 1, 2, 3, 4];
        assert_eq!(restored(&AFTER, &in_filler), [0x1000]);
        // A library that was closed jumps nowhere.
        assert_eq!(restored(&[], &HOP), [0x1040]);
    }

    /// A worker whose calls are counted, with Bar fused at a site: its entry, the
    /// routine's, the site; which of them are in place.
    fn observed(gates: [bool; 2], in_place: [bool; 3]) -> Present {
        let mut present = present(&AFTER, &HOP);
        let of = |address: u64| WindowRecord {
            address,
            before: vec![1; 5],
            after: vec![2; 5],
            ..WindowRecord::default()
        };
        present.manifest.windows = vec![
            WindowRecord {
                entry: true,
                ..of(0x1000)
            },
            WindowRecord {
                routine: true,
                ..of(0x2000)
            },
            WindowRecord {
                names: vec!["Bar".into()],
                ..of(0x3000)
            },
        ];
        present.live = in_place
            .map(|ours| vec![if ours { 2 } else { 1 }; 5])
            .to_vec();
        [present.gates[0], present.observing] = gates;
        present
    }

    #[test]
    fn counting_and_fused_edges_leave_each_other_what_they_need() {
        let addresses = |present: &Present, callee: &str| -> Vec<u64> {
            windows(present, callee).iter().map(|w| w.address).collect()
        };
        let both = observed([true, true], [true; 3]);
        assert_eq!(addresses(&both, "Bar"), [0x3000]);
        assert!(addresses(&both, OBSERVING).is_empty());
        let counting = observed([false, true], [true, true, false]);
        assert!(addresses(&counting, "Bar").is_empty());
        assert_eq!(addresses(&counting, OBSERVING), [0x2000, 0x1000]);
        let fused = observed([true, false], [true; 3]);
        assert_eq!(addresses(&fused, "Bar"), [0x2000, 0x3000, 0x1000]);
    }

    #[test]
    fn a_window_for_counting_alone_goes_with_that() {
        let addresses = |present: &Present, callee: &str| -> Vec<u64> {
            windows(present, callee).iter().map(|w| w.address).collect()
        };
        let mut both = observed([true, true], [true; 3]);
        both.manifest.windows[1].for_observing = true;
        assert_eq!(addresses(&both, OBSERVING), [0x2000]);
        assert_eq!(addresses(&both, "Bar"), [0x3000]);
        // It was left there when counting ended.
        both.observing = false;
        assert_eq!(addresses(&both, "Bar"), [0x3000]);
        both.gates[0] = false;
        assert_eq!(addresses(&both, OBSERVING), [0x2000]);
    }

    #[test]
    fn bytes_of_others_matter_to_whom_the_window_is() {
        let mut both = observed([true, true], [true; 3]);
        both.live[1] = vec![0xcc, 2, 2, 2, 2];
        assert_eq!(foreign(&both, "Bar"), None);
        both.gates[0] = false;
        assert!(foreign(&both, OBSERVING).is_some());
    }
}
