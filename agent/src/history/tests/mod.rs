//! The history on a real disk: kept, damaged, full.

mod bounds;
pub(super) mod full;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::api::HistoryEdge;

fn step(at_ms: u64, calls: u64) -> HistoryStep {
    HistoryStep {
        at_ms,
        seconds: 10.0,
        nodes: Vec::new(),
        edges: vec![HistoryEdge {
            caller: "Foo".into(),
            callee: "Bar".into(),
            engine: Some(100),
            rpc_calls: calls,
            ..HistoryEdge::default()
        }],
    }
}

fn value(step: &HistoryStep) -> Vec<u8> {
    let mut value = vec![VERSION];
    serde_json::to_writer(&mut value, step).unwrap();
    value
}

/// One that has nothing to say about itself.
fn opened(dir: &Path) -> History {
    let history = History::open(Some(dir));
    assert_eq!(history.notes(), Vec::<String>::new());
    history
}

fn all(history: &History) -> Vec<HistoryStep> {
    history.since(0, usize::MAX).0
}

fn times(history: &History) -> Vec<u64> {
    all(history).iter().map(|step| step.at_ms).collect()
}

#[test]
fn steps_are_there_for_the_next_agent() {
    let dir = tempfile::tempdir().unwrap();
    let history = opened(dir.path());
    let steps: Vec<_> = (1..5).map(|n| step(n * 10_000, n)).collect();
    for step in &steps {
        history.add(step.clone());
    }
    let mode = fs::metadata(dir.path().join(disk::NAME))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(all(&history), steps);
    drop(history);
    let history = opened(dir.path());
    assert_eq!(all(&history), steps);
    let (some, notes) = history.since(10_000, 2);
    assert_eq!(some, steps[1..3]);
    assert_eq!(notes, ["1 later steps are not shown"]);
    assert_eq!(history.since(40_000, 9), (Vec::new(), Vec::new()));
}

#[test]
fn no_step_that_was_added_is_lost_with_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let history = opened(dir.path());
    for n in 1..=5 {
        history.add(step(n, n));
        // The file as a process that is killed now would leave it.
        let left = tempfile::tempdir().unwrap();
        let file = left.path().join(disk::NAME);
        fs::copy(dir.path().join(disk::NAME), file).unwrap();
        assert_eq!(all(&opened(left.path())), all(&history));
    }
}

#[test]
fn a_clock_that_is_set_back_loses_nothing_and_keeps_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let history = opened(dir.path());
    for (n, at_ms) in (1..).zip([0, 0, 1_000, 500, 600, 1_000, 2_000]) {
        history.add(step(at_ms, n));
    }
    drop(history);
    let history = opened(dir.path());
    history.add(step(5, 8));
    let found: Vec<_> = history.since(0, 99).0;
    let found: Vec<_> = found
        .iter()
        .map(|s| (s.at_ms, s.edges[0].rpc_calls))
        .collect();
    // The one at 0 did not end after 0.
    assert_eq!(
        found,
        [
            (1, 2),
            (1_000, 3),
            (1_001, 4),
            (1_002, 5),
            (1_003, 6),
            (2_000, 7),
            (2_001, 8)
        ]
    );
}

#[test]
fn without_a_directory_it_is_in_memory_and_says_so() {
    let history = History::open(None);
    history.add(step(1, 1));
    let (steps, notes) = history.since(0, 9);
    assert_eq!(steps, [step(1, 1)]);
    assert_eq!(
        notes,
        ["the history is in memory alone, as the agent has no directory of its own"]
    );
}

#[test]
fn what_cannot_be_opened_is_told_and_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(disk::NAME);
    // Somebody else's, perhaps.
    std::os::unix::fs::symlink("/dev/null", &file).unwrap();
    let history = History::open(Some(dir.path()));
    let notes = history.notes();
    assert!(notes[0].contains("it cannot be opened"), "{notes:?}");
    history.add(step(1, 1));
    fs::remove_file(&file).unwrap();
    for n in 2..=u64::from(RETRY_STEPS) {
        history.add(step(n, n));
    }
    assert_eq!(history.notes(), Vec::<String>::new());
    drop(history);
    assert_eq!(times(&opened(dir.path())), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_second_agent_keeps_its_own_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let first = opened(dir.path());
    let second = History::open(Some(dir.path()));
    first.add(step(1, 1));
    second.add(step(2, 2));
    assert_eq!((times(&first), times(&second)), (vec![1], vec![2]));
    assert!(second.notes()[0].starts_with("the history is not written to the disk"));
}

#[test]
fn a_full_disk_costs_no_step_and_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let history = opened(dir.path());
    history.add(step(1, 1));
    full::set(true);
    for n in 2..=20 {
        history.add(step(n, n));
    }
    let (steps, notes) = history.since(1, 99);
    assert_eq!(steps.len(), 19);
    assert!(notes[0].contains("not written to the disk"), "{notes:?}");
    // What is on the disk can't be read meanwhile.
    let (_, notes) = history.since(0, 99);
    assert_eq!(notes.last().unwrap(), "1 steps of this time cannot be read");
    full::set(false);
    for n in 21..=20 + u64::from(RETRY_STEPS) {
        history.add(step(n, n));
    }
    let expected: Vec<u64> = (1..=20 + u64::from(RETRY_STEPS)).collect();
    assert_eq!(times(&history), expected);
    assert_eq!(history.notes(), Vec::<String>::new());
    drop(history);
    assert_eq!(times(&opened(dir.path())), expected);
}

/// What is merged while a commit fails is neither lost nor there twice.
#[test]
fn a_merge_that_a_full_disk_refuses_is_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    let history = opened(dir.path());
    for n in 1..=4 {
        history.add(step(n * 1_000, n));
    }
    full::set(true);
    history.add(step(2 * FULL_MS, 0));
    assert_eq!(history.since(0, 99).0.len(), 2, "merged, in memory");
    full::set(false);
    for n in 1..=u64::from(RETRY_STEPS) {
        history.add(step(2 * FULL_MS + n, 0));
    }
    drop(history);
    let steps = all(&opened(dir.path()));
    assert_eq!((steps[0].at_ms, steps[0].edges[0].rpc_calls), (4_000, 10));
    assert_eq!(steps.len(), 2 + RETRY_STEPS as usize);
}

#[test]
fn a_damaged_file_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(disk::NAME);
    let history = opened(dir.path());
    for n in 1..=20 {
        history.add(step(n, n));
    }
    drop(history);
    let good = fs::read(&file).unwrap();
    let mut damages = vec![
        b"no database at all".to_vec(),
        vec![0; 8_192],
        good[..5_000].to_vec(),
    ];
    let mut random = 1u64;
    for _ in 0..20 {
        let mut bad = good.clone();
        for _ in 0..200 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (random >> 33) as usize % bad.len();
            bad[at] ^= 0x55;
        }
        damages.push(bad);
    }
    for (n, damage) in damages.iter().enumerate() {
        fs::write(&file, damage).unwrap();
        let history = History::open(Some(dir.path()));
        let notes = history.notes();
        // What lies in pages that are not in use does no harm.
        if !notes.is_empty() {
            assert!(notes[0].contains("was damaged"), "{n}: {notes:?}");
            assert!(
                notes[0].contains("history.redb.damaged, and a new one begun"),
                "{notes:?}"
            );
            assert_eq!(
                fs::read(dir.path().join("history.redb.damaged")).unwrap(),
                *damage
            );
        } else {
            assert!(n >= 3, "{n}");
        }
        history.add(step(99, 99));
        assert_eq!(times(&history).last(), Some(&99));
    }
    let names = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names, 2, "one is set aside, the last");
}

#[test]
fn a_file_of_another_format_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(disk::NAME);
    disk::plant(&file, 2, &[(5, b"who knows")]);
    let history = History::open(Some(dir.path()));
    assert_eq!(
        history.notes(),
        [format!(
            "the history {0} is of format 2, and this agent knows format 1: it is set aside as \
             {0}.format-2, and a new one begun",
            file.display()
        )]
    );
    history.add(step(1, 1));
    drop(history);
    assert_eq!(times(&opened(dir.path())), [1]);
    assert!(dir.path().join("history.redb.format-2").exists());
}

#[test]
fn a_value_that_says_nothing_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let good = value(&step(10, 4));
    let other = [&[VERSION + 1], &good[1..]].concat();
    let values: [(u64, &[u8]); 4] = [(10, &good), (20, b"\x01{"), (30, b""), (40, &other)];
    disk::plant(&dir.path().join(disk::NAME), 1, &values);
    let history = opened(dir.path());
    let (steps, notes) = history.since(0, 99);
    assert_eq!(steps, [step(10, 4)]);
    assert_eq!(notes, ["3 steps of this time cannot be read"]);
    // They go when they would be merged.
    history.add(step(2 * FULL_MS, 1));
    let (steps, notes) = history.since(0, 99);
    assert_eq!(steps.len(), 2);
    assert_eq!(notes, ["3 steps could not be read and were dropped"]);
}
