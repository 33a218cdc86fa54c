use std::collections::BTreeMap;

use super::*;
use crate::journal::Planned;
use crate::manifest::{BridgeAddresses, GraftRecord, RECORD_FORMAT, WindowRecord};
use Side::{After, Before, Other};

const REGION: Region = Region {
    start: 0x20_0000,
    len: 0x1_0000,
};
const MORE: Region = Region {
    start: 0x40_0000,
    len: 0x1_0000,
};

fn window(address: u64, names: &[&str], entry: bool) -> WindowRecord {
    WindowRecord {
        address,
        before: vec![1; 6],
        after: vec![2; 6],
        entry,
        call: !entry,
        names: names.iter().map(|n| (*n).to_owned()).collect(),
        ..WindowRecord::default()
    }
}

fn graft(callee: &str, index: usize) -> GraftRecord {
    GraftRecord {
        callee: callee.into(),
        parent: 0,
        build_id: "ab".into(),
        dependencies: String::new(),
        library: "/functions/libbar.so".into(),
        graft: 0x20_5000,
        call: 0x20_a010,
        index,
        slot: index,
        image: REGION,
        replaced: false,
    }
}

/// Bar with its entry and two sites, and if there is more, Baz with one.
fn record(generation: u64) -> Manifest {
    let mut record = Manifest {
        version: 2,
        format: RECORD_FORMAT,
        generation,
        pid: 7,
        start_time: 99,
        library: "/functions/libfoo.so".into(),
        control: 0x20_8000,
        worker: 0x20_0000,
        bridge: BridgeAddresses {
            enter: 0,
            called: 0,
            routine: 0,
            exports: BTreeMap::new(),
        },
        regions: vec![REGION],
        windows: vec![
            window(0x1000, &[], true),
            window(0x2000, &["Bar"], false),
            window(0x3000, &["Bar"], false),
        ],
        grafts: vec![graft("Bar", 0)],
    };
    if generation > 1 {
        record.regions.push(MORE);
        record.windows.push(window(0x4000, &["Baz"], false));
        record.grafts.push(graft("Baz", 1));
    }
    record
}

fn live(windows: &[Side], gates: &[bool]) -> Live {
    Live {
        windows: windows.to_vec(),
        gates: gates.to_vec(),
        observing: false,
    }
}

fn fused() -> Live {
    live(&[After; 3], &[true])
}

fn entry(stage: Stage, record: Option<Manifest>) -> Entry {
    Entry {
        stage,
        ..Entry::settled(7, 99, record)
    }
}

fn committing() -> Stage {
    Stage::Committing {
        callee: "Bar".into(),
    }
}

fn reverting() -> Stage {
    Stage::Reverting {
        callee: "Bar".into(),
    }
}

fn mapping() -> Stage {
    Stage::Mapping {
        callee: "Baz".into(),
        mappings: vec![Planned {
            reservation: MORE,
            parts: Vec::new(),
            control: None,
        }],
    }
}

/// A worker whose record and journal agree.
fn agreed(record: &Manifest, stage: Stage, lives: Live) -> Evidence {
    Evidence {
        found: Found::Record(Box::new(record.clone())),
        found_live: Some(lives.clone()),
        entry: Some(entry(stage, Some(record.clone()))),
        entry_live: Some(Ok(lives)),
        held: Vec::new(),
        mapped: vec![true; record.regions.len()],
        descriptors: Vec::new(),
    }
}

fn nothing() -> Evidence {
    Evidence {
        found: Found::Nothing,
        found_live: None,
        entry: None,
        entry_live: None,
        held: Vec::new(),
        mapped: Vec::new(),
        descriptors: Vec::new(),
    }
}

fn decided(evidence: &Evidence) -> (Verdict, Vec<Step>, Option<Entry>) {
    let decision = decide(7, 99, evidence);
    assert_eq!(
        decision.verdict > Verdict::Adopted,
        !decision.notes.is_empty(),
        "what is more than adopted is told: {decision:?}"
    );
    (decision.verdict, decision.steps, decision.entry)
}

fn settled(record: &Manifest) -> Option<Entry> {
    Some(Entry::settled(7, 99, Some(record.clone())))
}

fn revert(name: &str) -> Vec<Step> {
    vec![Step::Revert(name.into())]
}

#[test]
fn a_worker_without_anything_of_ours_is_clean() {
    let (verdict, steps, entry) = decided(&nothing());
    assert_eq!((verdict, steps), (Verdict::Clean, vec![]));
    assert_eq!(entry, Some(Entry::settled(7, 99, None)));
}

#[test]
fn what_is_as_both_say_is_adopted() {
    for lives in [
        fused(),
        live(&[Before; 3], &[false]),
        // Quarantined, or a revert that found no moment.
        live(&[After; 3], &[false]),
    ] {
        let evidence = agreed(&record(1), Stage::Settled, lives);
        let expected = (Verdict::Adopted, vec![], settled(&record(1)));
        assert_eq!(decided(&evidence), expected);
    }
}

#[test]
fn without_a_journal_the_record_is_enough() {
    let mut evidence = agreed(&record(1), Stage::Settled, fused());
    (evidence.entry, evidence.entry_live) = (None, None);
    evidence.mapped.clear();
    let expected = (Verdict::Adopted, vec![], settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
    evidence.found_live = Some(live(&[After, After, Before], &[true]));
    let expected = (Verdict::Undone, revert("Bar"), settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
}

#[test]
fn windows_that_are_gone_without_an_agent_s_doing_are_left_so() {
    for stage in [Stage::Settled, mapping()] {
        let lives = live(&[After, After, Before], &[true]);
        let mut evidence = agreed(&record(1), stage, lives);
        evidence.held = vec![Held::Nothing];
        let expected = (Verdict::Adopted, vec![], settled(&record(1)));
        assert_eq!(decided(&evidence), expected);
    }
}

#[test]
fn without_a_record_the_journal_is_enough() {
    for found in [
        Found::Nothing,
        Found::Damaged("a record whose checksum is wrong".into()),
    ] {
        let mut evidence = agreed(&record(1), Stage::Settled, fused());
        (evidence.found, evidence.found_live) = (found, None);
        let write = vec![Step::Record(Box::new(record(1)))];
        let expected = (Verdict::Completed, write, settled(&record(1)));
        assert_eq!(decided(&evidence), expected);
    }
}

#[test]
fn a_damaged_record_without_a_journal_or_with_one_that_does_not_fit_is_left() {
    let damaged = Found::Damaged("a record whose checksum is wrong".into());
    let mut evidence = Evidence {
        found: damaged.clone(),
        ..nothing()
    };
    assert_eq!(decided(&evidence), (Verdict::Left, vec![], None));
    evidence = agreed(&record(1), Stage::Settled, fused());
    (evidence.found, evidence.found_live) = (damaged, None);
    evidence.entry_live = Some(Err("there is no control area at 0x208000".into()));
    assert_eq!(decided(&evidence), (Verdict::Left, vec![], None));
    evidence.entry_live = Some(Ok(fused()));
    evidence.mapped = vec![false];
    assert_eq!(decided(&evidence), (Verdict::Left, vec![], None));
}

#[test]
fn a_patch_that_was_complete_is_adopted_and_any_other_undone() {
    let evidence = agreed(&record(1), committing(), fused());
    let expected = (Verdict::Completed, vec![], settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
    for lives in [
        live(&[Before; 3], &[true]),
        live(&[After, Before, Before], &[true]),
        live(&[After, After, Before], &[true]),
        live(&[After, After, After], &[false]),
    ] {
        let evidence = agreed(&record(1), committing(), lives);
        let expected = (Verdict::Undone, revert("Bar"), settled(&record(1)));
        assert_eq!(decided(&evidence), expected);
    }
    let evidence = agreed(&record(1), committing(), live(&[Before; 3], &[false]));
    let expected = (Verdict::Undone, vec![], settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
}

#[test]
fn a_record_that_was_about_to_be_written_is_written() {
    // The first of a worker.
    let untouched = live(&[Before; 3], &[false]);
    let mut evidence = agreed(&record(1), committing(), untouched);
    (evidence.found, evidence.found_live) = (Found::Nothing, None);
    let write = vec![Step::Record(Box::new(record(1)))];
    let expected = (Verdict::Undone, write, settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
    // A further one; Bar stays fused.
    let stage = Stage::Committing {
        callee: "Baz".into(),
    };
    let lives = live(&[After, After, After, Before], &[true, false]);
    let mut evidence = agreed(&record(2), stage, lives);
    evidence.found = Found::Record(Box::new(record(1)));
    evidence.found_live = Some(fused());
    let write = vec![Step::Record(Box::new(record(2)))];
    let expected = (Verdict::Undone, write, settled(&record(2)));
    assert_eq!(decided(&evidence), expected);
}

#[test]
fn a_revert_is_brought_to_its_end() {
    for lives in [
        fused(),
        live(&[After; 3], &[false]),
        live(&[After, Before, After], &[false]),
    ] {
        let evidence = agreed(&record(1), reverting(), lives);
        let expected = (Verdict::Completed, revert("Bar"), settled(&record(1)));
        assert_eq!(decided(&evidence), expected);
    }
    let evidence = agreed(&record(1), reverting(), live(&[Before; 3], &[false]));
    let expected = (Verdict::Adopted, vec![], settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
}

/// A worker whose calls are counted: its entry and the routine's, and if it
/// has a graft, Bar with a site.
fn observed(with_graft: bool) -> Manifest {
    let mut record = record(1);
    let routine = WindowRecord {
        routine: true,
        ..window(0x5000, &[], false)
    };
    record.windows = vec![record.windows.remove(0), routine];
    match with_graft {
        true => record.windows.push(window(0x2000, &["Bar"], false)),
        false => record.grafts.clear(),
    }
    record
}

fn counting(windows: &[Side], gates: &[bool], on: bool) -> Live {
    Live {
        observing: on,
        ..live(windows, gates)
    }
}

#[test]
fn counting_calls_begins_whole_or_not_at_all() {
    let record = observed(false);
    let committing = || Stage::Committing {
        callee: OBSERVING.into(),
    };
    let decided_in = |stage: Stage, lives: Live| decided(&agreed(&record, stage, lives)).1;
    let whole = counting(&[After; 2], &[], true);
    let evidence = agreed(&record, committing(), whole.clone());
    let expected = (Verdict::Completed, vec![], settled(&record));
    assert_eq!(decided(&evidence), expected);
    for lives in [
        counting(&[Before; 2], &[], true),
        counting(&[After, Before], &[], true),
    ] {
        assert_eq!(decided_in(committing(), lives), revert(OBSERVING));
    }
    let nothing_yet = counting(&[Before; 2], &[], false);
    assert!(decided_in(committing(), nothing_yet.clone()).is_empty());
    assert!(decided_in(Stage::Settled, whole.clone()).is_empty());
    // It was being ended.
    let ending = || Stage::Reverting {
        callee: OBSERVING.into(),
    };
    assert_eq!(decided_in(ending(), whole), revert(OBSERVING));
    let gate_off = counting(&[After; 2], &[], false);
    assert_eq!(decided_in(ending(), gate_off), revert(OBSERVING));
    assert!(decided_in(ending(), nothing_yet).is_empty());
    // The journal is lost.
    let mut evidence = agreed(
        &record,
        Stage::Settled,
        counting(&[After, Before], &[], true),
    );
    evidence.entry = None;
    evidence.entry_live = None;
    assert_eq!(decided(&evidence).1, revert(OBSERVING));
}

#[test]
fn windows_that_a_fused_edge_needs_are_no_sign_of_counting() {
    let record = observed(true);
    let ending = Stage::Reverting {
        callee: OBSERVING.into(),
    };
    let lives = counting(&[After; 3], &[true], false);
    let evidence = agreed(&record, ending, lives);
    let expected = (Verdict::Adopted, vec![], settled(&record));
    assert_eq!(decided(&evidence), expected);
}

#[test]
fn memory_that_was_being_mapped_is_unmapped_only_where_it_is_ours() {
    for (held, steps) in [
        (Held::Nothing, vec![]),
        (Held::Other, vec![]),
        (Held::Ours, vec![Step::Unmap(vec![MORE])]),
    ] {
        let mut evidence = agreed(&record(1), mapping(), fused());
        evidence.held = vec![held];
        let decision = decide(7, 99, &evidence);
        assert_eq!(decision.steps, steps, "{held:?}");
        assert_eq!(decision.entry, settled(&record(1)));
        // And where there was no record before.
        let evidence = Evidence {
            entry: Some(entry(mapping(), None)),
            held: vec![held],
            ..nothing()
        };
        let decision = decide(7, 99, &evidence);
        assert_eq!(decision.steps, steps, "{held:?}");
        assert_eq!(decision.entry, Some(Entry::settled(7, 99, None)));
    }
}

#[test]
fn memory_that_a_record_names_is_never_unmapped() {
    let mut evidence = agreed(&record(2), Stage::Settled, live(&[After; 4], &[true; 2]));
    // An agent with another journal has patched since ours died.
    evidence.entry = Some(entry(mapping(), Some(record(1))));
    evidence.entry_live = Some(Ok(fused()));
    evidence.held = vec![Held::Ours];
    let expected = (Verdict::Adopted, vec![], settled(&record(2)));
    assert_eq!(decided(&evidence), expected);
}

#[test]
fn a_patch_that_was_taken_back_leaves_the_record_of_before() {
    let mut evidence = agreed(&record(1), Stage::Settled, fused());
    evidence.entry = Some(entry(committing(), Some(record(2))));
    evidence.entry_live = Some(Err("not ours".into()));
    evidence.mapped = vec![true, false];
    let expected = (Verdict::Adopted, vec![], settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
    // But not while some of it is there.
    evidence.mapped = vec![true, true];
    assert_eq!(decided(&evidence), (Verdict::Left, vec![], None));
}

#[test]
fn a_worker_that_executed_another_program_is_clean() {
    let mut evidence = agreed(&record(1), Stage::Settled, fused());
    (evidence.found, evidence.found_live) = (Found::Nothing, None);
    evidence.entry_live = Some(Err("there is no control area".into()));
    evidence.mapped = vec![false];
    let (verdict, steps, entry) = decided(&evidence);
    assert_eq!((verdict, steps), (Verdict::Clean, vec![]));
    assert_eq!(entry, Some(Entry::settled(7, 99, None)));
}

#[test]
fn strange_bytes_and_contradictions_are_left_alone() {
    let evidence = agreed(
        &record(1),
        reverting(),
        live(&[After, Other, After], &[true]),
    );
    assert_eq!(decided(&evidence), (Verdict::Left, vec![], None));
    let mut evidence = agreed(&record(1), Stage::Settled, fused());
    let mut other = record(1);
    other.library = "/functions/other.so".into();
    evidence.entry = Some(entry(Stage::Settled, Some(other)));
    assert_eq!(decided(&evidence), (Verdict::Left, vec![], None));
}

#[test]
fn a_window_that_has_gone_with_its_library_is_no_matter() {
    use Side::Gone;
    let evidence = agreed(
        &record(1),
        Stage::Settled,
        live(&[After, Gone, After], &[true]),
    );
    let expected = (Verdict::Adopted, vec![], settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
    let evidence = agreed(&record(1), reverting(), live(&[After, Gone, Gone], &[true]));
    let expected = (Verdict::Completed, revert("Bar"), settled(&record(1)));
    assert_eq!(decided(&evidence), expected);
}

#[test]
fn an_open_descriptor_is_closed_whatever_else_is_there() {
    let evidence = Evidence {
        descriptors: vec![9],
        ..nothing()
    };
    let (verdict, steps, _) = decided(&evidence);
    assert_eq!(
        (verdict, steps),
        (Verdict::Undone, vec![Step::Close(vec![9])])
    );
}

#[test]
fn the_stage_of_an_older_entry_says_nothing_of_a_newer_record() {
    let mut evidence = agreed(&record(2), Stage::Settled, live(&[After; 4], &[true; 2]));
    evidence.entry = Some(entry(reverting(), Some(record(1))));
    evidence.entry_live = Some(Ok(fused()));
    let expected = (Verdict::Adopted, vec![], settled(&record(2)));
    assert_eq!(decided(&evidence), expected);
}
