//! The journal on a real disk, its file damaged in many ways.

use std::os::unix::fs::PermissionsExt as _;

use nightgraft_patcher::journal::{FORMAT as ENTRY_FORMAT, Planned, Stage};
use nightgraft_patcher::manifest::Region;

use super::*;

fn epoch() -> Epoch {
    Epoch {
        boot: "5bd0e7a4-this-boot".into(),
        pids: "4026531836".into(),
    }
}

/// An entry of a process that lives: ours.
fn entry() -> Entry {
    let pid = std::process::id().cast_signed();
    let region = Region {
        start: 0x7f00_0000_0000,
        len: 0x9000,
    };
    Entry {
        stage: Stage::Mapping {
            callee: "Bar".into(),
            mappings: vec![Planned {
                reservation: region,
                parts: Vec::new(),
                control: Some(region),
            }],
        },
        ..Entry::settled(pid, crate::live::started(pid).unwrap(), None)
    }
}

fn open(dir: &Path) -> (Disk, Opening) {
    Disk::open(dir, epoch())
}

fn opened(dir: &Path) -> Disk {
    let (disk, opening) = open(dir);
    assert_eq!((disk.away(), opening.notes.as_slice()), (None, &[][..]));
    disk
}

fn read(disk: &Disk) -> Result<Option<Entry>, JournalError> {
    disk.entry(entry().pid, entry().start_time)
}

/// Stores bytes as the entry.
fn plant(disk: &Disk, key: &str, bytes: &[u8]) {
    let store = |database: &Database| {
        let transaction = database.begin_write()?;
        transaction.open_table(WORKERS)?.insert(key, bytes)?;
        transaction.commit()?;
        Ok(())
    };
    disk.with(store).unwrap();
}

fn key() -> String {
    epoch().key(entry().pid, entry().start_time)
}

#[test]
fn an_entry_is_there_for_the_next_agent_until_it_is_settled_without_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let disk = opened(dir.path());
    assert_eq!(read(&disk), Ok(None));
    disk.write(&entry()).unwrap();
    let mode = fs::metadata(disk.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(disk);
    let (disk, opening) = open(dir.path());
    assert_eq!(opening.living, [(entry().pid, entry().start_time)]);
    assert_eq!(read(&disk), Ok(Some(entry())));
    let settled = Entry::settled(entry().pid, entry().start_time, None);
    disk.write(&settled).unwrap();
    disk.write(&settled).unwrap();
    drop(disk);
    assert_eq!(read(&opened(dir.path())), Ok(None));
}

#[test]
fn entries_of_other_boots_and_of_the_dead_are_dropped_and_those_of_elsewhere_kept() {
    let dir = tempfile::tempdir().unwrap();
    let disk = opened(dir.path());
    let bytes = entry().encode().unwrap();
    let (pid, start_time) = (entry().pid, entry().start_time);
    let elsewhere = format!("{}/4026532000/{pid}/{start_time}", epoch().boot);
    for key in [
        key(),
        elsewhere.clone(),
        format!("another-boot/{}/{pid}/{start_time}", epoch().pids),
        epoch().key(pid, start_time + 1),
        epoch().key(i32::MAX, 1),
        "what is this".to_owned(),
    ] {
        plant(&disk, &key, &bytes);
    }
    drop(disk);
    let (disk, opening) = open(dir.path());
    assert_eq!(opening.dropped, 4);
    assert_eq!(opening.living, [(pid, start_time)]);
    let mut left = disk.with(keys).unwrap();
    left.sort();
    let mut expected = [key(), elsewhere];
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn an_entry_of_another_format_is_told_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let disk = opened(dir.path());
    let mut bytes = entry().encode().unwrap();
    bytes[4..8].copy_from_slice(&(ENTRY_FORMAT + 1).to_le_bytes());
    plant(&disk, &key(), &bytes);
    drop(disk);
    let (disk, opening) = open(dir.path());
    assert_eq!(disk.away(), None);
    assert!(
        opening.notes[0].contains("an entry of format 2"),
        "{opening:?}"
    );
    for error in [read(&disk).unwrap_err(), disk.write(&entry()).unwrap_err()] {
        let expected = format!(
            "{}: for worker {} it holds an entry of format 2, and this agent knows format 1: use \
             the agent that wrote it",
            disk.path().display(),
            entry().pid
        );
        assert_eq!(error.0, expected);
    }
    assert_eq!(disk.bytes(&key()), Ok(Some(bytes)));
}

#[test]
fn a_damaged_entry_is_dropped_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let disk = opened(dir.path());
    let mut bytes = entry().encode().unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    plant(&disk, &key(), &bytes);
    drop(disk);
    let (disk, opening) = open(dir.path());
    assert_eq!(opening.dropped, 1);
    let [note] = opening.notes.as_slice() else {
        panic!("{:?}", opening.notes)
    };
    assert!(
        note.contains("a damaged entry (its checksum is wrong)"),
        "{note}"
    );
    assert_eq!(read(&disk), Ok(None));
    disk.write(&entry()).unwrap();
}

#[test]
fn tables_of_another_format_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let disk = opened(dir.path());
    disk.write(&entry()).unwrap();
    let newer = |database: &Database| {
        let transaction = database.begin_write()?;
        transaction.open_table(META)?.insert("format", FORMAT + 1)?;
        transaction.commit()?;
        Ok(())
    };
    disk.with(newer).unwrap();
    drop(disk);
    let (disk, opening) = open(dir.path());
    assert_eq!(opening, Opening::default());
    let away = disk.away().unwrap();
    assert!(
        away.ends_with(
            "it is of format 2, and this agent knows format 1: use the agent that wrote it, or \
             move it away"
        ),
        "{away}"
    );
    assert_eq!(disk.write(&entry()).unwrap_err().0, away);
    drop(disk);
    let database = Database::open(dir.path().join(NAME)).unwrap();
    assert_eq!(format_of(&database).unwrap(), FORMAT + 1);
    assert_eq!(keys(&database).unwrap(), [key()]);
}

#[test]
fn one_that_is_away_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    // A directory in the file's place: as little to be opened as a file on a
    // read-only disk.
    let place = dir.path().join(NAME);
    fs::create_dir(&place).unwrap();
    let (disk, _) = open(dir.path());
    let away = disk.away().unwrap();
    assert!(away.contains("it cannot be opened"), "{away}");
    assert_eq!(disk.write(&entry()).unwrap_err().0, away);
    assert!(read(&disk).is_err());
    fs::remove_dir(&place).unwrap();
    disk.write(&entry()).unwrap();
    assert_eq!((disk.away(), read(&disk)), (None, Ok(Some(entry()))));
}

/// Files beside the journal's.
fn set_aside(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != NAME)
        .collect()
}

#[test]
fn a_file_that_is_no_journal_is_set_aside() {
    for content in [&b"precious"[..], &[0; 4096], &[0xff; 70_000]] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(NAME), content).unwrap();
        let (disk, opening) = open(dir.path());
        assert_eq!(disk.away(), None);
        assert_eq!(opening.notes.len(), 1, "{opening:?}");
        disk.write(&entry()).unwrap();
        let [aside] = &set_aside(dir.path())[..] else {
            panic!("not one file beside it")
        };
        assert!(aside.starts_with("journal.redb.damaged-"), "{aside}");
        assert_eq!(fs::read(dir.path().join(aside)).unwrap(), content);
        assert!(opening.notes[0].contains(aside), "{opening:?}");
    }
}

/// Whatever becomes of its bytes, the journal opens: with what was in it, or
/// set aside.
#[test]
fn a_journal_is_never_wrong_whatever_becomes_of_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = opened(dir.path());
    disk.write(&entry()).unwrap();
    drop(disk);
    let good = fs::read(dir.path().join(NAME)).unwrap();
    // Where it holds something, and a little beyond.
    let used = good.iter().rposition(|byte| *byte != 0).unwrap() + 64;
    let (mut whole, mut aside) = (0, 0);
    let mut at = 0;
    while at < used.min(good.len()) {
        let trial = tempfile::tempdir().unwrap();
        let mut bytes = good.clone();
        bytes[at] ^= 0x55;
        fs::write(trial.path().join(NAME), &bytes).unwrap();
        let (disk, opening) = open(trial.path());
        assert_eq!(disk.away(), None, "byte {at}");
        match read(&disk).unwrap() {
            Some(found) => {
                assert_eq!(found, entry(), "byte {at}");
                whole += 1;
            }
            None => {
                assert!(!opening.notes.is_empty(), "byte {at}: lost and not told");
                aside += 1;
            }
        }
        // Densely where the header is, then here and there.
        at += if at < 512 { 1 } else { 191 };
    }
    for length in [1, 100, 511, 512, 4096, good.len() / 2, good.len() - 1] {
        let trial = tempfile::tempdir().unwrap();
        fs::write(trial.path().join(NAME), &good[..length]).unwrap();
        let (disk, _) = open(trial.path());
        assert_eq!(disk.away(), None, "{length} bytes");
        assert!(matches!(read(&disk), Ok(None)), "{length} bytes");
    }
    assert!(whole > 0 && aside > 0, "{whole} whole, {aside} set aside");
}
