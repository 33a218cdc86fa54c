//! No bound is passed, and what is within them is all there.

use super::*;

const HOUR: u64 = 3_600_000;

fn calls(steps: &[HistoryStep]) -> u64 {
    let edges = steps.iter().flat_map(|step| &step.edges);
    edges.map(|edge| edge.rpc_calls).sum()
}

fn sizes(history: &History) -> (usize, usize, usize) {
    let state = history.0.lock().unwrap();
    let bytes: usize = state.index.values().map(|kept| kept.len).sum();
    assert_eq!(bytes, state.bytes);
    let unwritten = state.index.values().filter(|kept| kept.unwritten.is_some());
    let unwritten: usize = unwritten.map(|kept| kept.len).sum();
    assert_eq!(unwritten, state.unwritten_bytes);
    (state.index.len(), bytes, unwritten)
}

#[test]
fn a_day_is_kept_as_it_was_and_what_is_older_in_parts_of_five_minutes() {
    let history = History::open(None);
    let steps = 26 * HOUR / 10_000;
    for n in 1..=steps {
        history.add(step(n * 10_000, n));
    }
    let all = history.since(0, usize::MAX).0;
    assert_eq!(calls(&all), (1..=steps).sum::<u64>());
    let newest = steps * 10_000;
    let day = newest - FULL_MS;
    let (old, young): (Vec<_>, Vec<_>) = all.into_iter().partition(|s| s.at_ms < day);
    assert!(young.iter().all(|step| step.seconds == 10.0));
    assert_eq!(young.len(), 24 * 360 + 1);
    assert_eq!(old.len(), 2 * 12);
    // The first part has no step at its very beginning.
    assert_eq!((old[0].seconds, old[0].at_ms), (290.0, 290_000));
    assert!(old[1..].iter().all(|step| step.seconds == 300.0));
    assert_eq!(
        (old[1].at_ms, calls(&old[1..2])),
        (590_000, (30..60).sum::<u64>())
    );
}

#[test]
fn nothing_is_kept_for_longer_than_thirty_days() {
    let history = History::open(None);
    let hours = 33 * 24;
    for n in 1..=hours {
        history.add(step(n * HOUR, n));
    }
    let all = history.since(0, usize::MAX).0;
    assert_eq!(all[0].at_ms, (hours - 30 * 24) * HOUR);
    assert_eq!(all.len(), 30 * 24 + 1);
}

#[test]
fn what_others_have_left_is_merged_bit_by_bit_and_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<(u64, Vec<u8>)> = (1..=1_200)
        .map(|n| (n * 10_000, value(&step(n * 10_000, n))))
        .collect();
    let borrowed: Vec<(u64, &[u8])> = values.iter().map(|(k, v)| (*k, &**v)).collect();
    disk::plant(&dir.path().join(disk::NAME), 1, &borrowed);
    let history = opened(dir.path());
    let sum: u64 = (1..=1_200).sum();
    let later = 3 * FULL_MS;
    for n in 0..11 {
        history.add(step(later + n, 0));
        let all = history.since(0, usize::MAX).0;
        assert_eq!(calls(&all), sum, "{n}");
    }
    drop(history);
    let all = opened(dir.path()).since(0, usize::MAX).0;
    assert_eq!((calls(&all), all.len()), (sum, 41 + 11));
}

#[test]
fn the_oldest_go_when_all_together_are_too_large() {
    let dir = tempfile::tempdir().unwrap();
    let large = |n: u64| HistoryStep {
        edges: vec![HistoryEdge {
            caller: "x".repeat(1 << 20),
            ..HistoryEdge::default()
        }],
        ..step(n * 10_000, 0)
    };
    let one = value(&large(1));
    let values: Vec<(u64, &[u8])> = (1..=70).map(|n| (n * 10_000, &*one)).collect();
    disk::plant(&dir.path().join(disk::NAME), 1, &values);
    let history = opened(dir.path());
    history.add(large(71));
    let (steps, bytes, _) = sizes(&history);
    assert!(
        bytes <= MAX_BYTES && bytes > MAX_BYTES - 2 * one.len(),
        "{bytes}"
    );
    drop(history);
    let history = opened(dir.path());
    assert_eq!(sizes(&history).0, steps);
    let (newest, _) = history.since(700_000, 5);
    assert_eq!(newest[0].at_ms, 710_000);
    let (oldest, _) = history.since(0, 1);
    assert_eq!(oldest[0].at_ms, (71 - steps as u64 + 1) * 10_000);
}

#[test]
fn a_clock_that_stands_still_fills_nothing() {
    let history = History::open(None);
    for n in 0..MAX_STEPS as u64 + 500 {
        history.add(step(7, n));
    }
    assert_eq!(sizes(&history).0, MAX_STEPS);
    let (first, _) = history.since(0, 1);
    assert_eq!((first[0].at_ms, calls(&first)), (507, 500));
}

#[test]
fn memory_alone_holds_less() {
    let history = History::open(None);
    for n in 0..12 {
        history.add(HistoryStep {
            edges: vec![HistoryEdge {
                caller: "x".repeat(1 << 20),
                ..HistoryEdge::default()
            }],
            ..step(n * 10_000, 0)
        });
    }
    let (steps, bytes, unwritten) = sizes(&history);
    assert_eq!((steps, bytes), (7, unwritten));
    assert!(unwritten <= MEMORY_BYTES);
    let told = "5 steps were dropped: while they are not on the disk, memory holds 8 MiB of them";
    assert_eq!(history.notes()[1], told);
}
