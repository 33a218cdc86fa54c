use super::*;
use crate::snapshot::testing::FakeMemory;

#[test]
fn the_control_area_s_path_is_its_name() {
    let name = abi::CONTROL_NAME;
    assert_eq!(CONTROL_PATH, format!("/memfd:{name}"));
}

#[test]
fn a_record_of_a_newer_format_is_refused_and_one_without_is_the_first() {
    let mut newer = manifest();
    newer.format = RECORD_FORMAT + 1;
    let error = find(7, 99, &maps(), &memory(&newer)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the worker holds a record of format {} (this agent knows those up to {RECORD_FORMAT})",
            RECORD_FORMAT + 1
        )
    );
    let mut text = serde_json::to_value(manifest()).unwrap();
    for field in ["format", "generation"] {
        text.as_object_mut().unwrap().remove(field).unwrap();
    }
    let old: Manifest = serde_json::from_value(text).unwrap();
    assert_eq!((old.format, old.generation), (1, 0));
}

#[test]
fn a_record_from_elsewhere_fits_only_where_it_was_made() {
    let kept = manifest();
    assert_eq!(fits(&kept, &maps()), Ok(()));
    let mut without = maps();
    without.remove(0);
    assert_eq!(
        fits(&kept, &without),
        Err("there is no control area at 0x100000".into())
    );
    let mut unmapped = maps();
    unmapped.remove(1);
    assert!(
        fits(&kept, &unmapped)
            .unwrap_err()
            .contains("no code of ours")
    );
}

fn manifest() -> Manifest {
    Manifest {
        version: BRIDGE_VERSION,
        format: RECORD_FORMAT,
        generation: 1,
        pid: 7,
        start_time: 99,
        library: "/functions/libfoo.so".into(),
        control: 0x10_0000,
        worker: 0x20_0000,
        bridge: BridgeAddresses {
            enter: 0x20_8000,
            called: 0x20_8100,
            routine: 0x20_8180,
            exports: BTreeMap::from([("ng_getenv".into(), 0x20_8200), (GUARDED.into(), 0x20_8300)]),
        },
        regions: vec![Region {
            start: 0x20_0000,
            len: 0x1_0000,
        }],
        windows: vec![WindowRecord {
            address: 0x40_0010,
            before: vec![0x49, 0x89, 0xe0, 0xff, 0x55, 0x08],
            after: vec![0x90, 0xe8, 0, 0, 0, 0],
            call: true,
            site: 0x20_4000,
            copies: vec![(0, 0x20_9000), (3, 0x20_9005)],
            names: vec!["Bar".into()],
            cached: Some("Bar".into()),
            ..WindowRecord::default()
        }],
        grafts: vec![GraftRecord {
            callee: "Bar".into(),
            build_id: "ab".into(),
            dependencies: String::new(),
            parent: 0,
            library: "/functions/libbar.so".into(),
            graft: 0x20_5000,
            call: 0x20_a010,
            index: 0,
            slot: 0,
            image: Region {
                start: 0x20_a000,
                len: 0x1000,
            },
            replaced: false,
        }],
    }
}

fn maps() -> Vec<Map> {
    let map = |start, end, executable, name: &str| Map {
        start,
        end,
        writable: false,
        executable,
        name: name.into(),
    };
    vec![
        map(
            0x10_0000,
            0x10_0000 + size_of::<Control>() as u64,
            false,
            "/memfd:nightgraft (deleted)",
        ),
        map(0x20_0000, 0x21_0000, true, ""),
        map(0x40_0000, 0x40_1000, true, "/functions/libfoo.so"),
    ]
}

fn memory(manifest: &Manifest) -> FakeMemory {
    let mut m = FakeMemory::default();
    m.put(0x10_0000, &MAGIC);
    m.put(0x10_0008, &BRIDGE_VERSION.to_le_bytes());
    m.put(0x10_000c, &[2, 0, 0, 0]);
    m.put(slot_address(0x10_0000, 2), &manifest.encode().unwrap());
    m.put(0x40_0010, &manifest.windows[0].after);
    m.put(0x20_0000, &[0; size_of::<abi::Worker>()]);
    m.put(0x20_5000, &[0; 256]);
    m.put(manifest.gate(&manifest.grafts[0]), &[1]);
    m
}

#[test]
fn a_record_is_found_as_it_was_written() {
    let written = manifest();
    let found = find(7, 99, &maps(), &memory(&written)).unwrap().unwrap();
    assert_eq!(found.manifest, written);
    assert!(found.in_place(0));
    assert_eq!((found.slot, found.gates), (2, vec![true]));
}

#[test]
fn whether_calls_are_guarded_is_told_by_what_they_call() {
    let written = manifest();
    let mut m = memory(&written);
    let found = find(7, 99, &maps(), &m).unwrap().unwrap();
    assert_eq!((found.guards, found.armed), (vec![false], false));
    m.put_u64(0x20_5000 + offset_of!(Graft, call) as u64, 0x20_8300);
    let ours = offset_of!(abi::Worker, guard) + offset_of!(abi::Guard, ours);
    m.put(0x20_0000 + ours as u64 + 3, &[abi::ACTION_OURS]);
    let found = find(7, 99, &maps(), &m).unwrap().unwrap();
    assert_eq!((found.guards, found.armed), (vec![true], true));
}

#[test]
fn a_forked_child_a_damaged_record_and_a_strange_address_are_refused() {
    let written = manifest();
    let text = |r: Result<Option<Present>, FindError>| r.unwrap_err().to_string();
    assert!(text(find(8, 99, &maps(), &memory(&written))).contains("whose child"));
    let mut damaged = memory(&written);
    damaged.put(slot_address(0x10_0000, 2) + 20, b"!");
    assert!(text(find(7, 99, &maps(), &damaged)).contains("checksum"));
    let mut strange = manifest();
    strange.windows[0].address = 0x20_0010;
    assert!(text(find(7, 99, &maps(), &memory(&strange))).contains("no code"));
    let mut newer = memory(&written);
    newer.put(0x10_0008, &9_u32.to_le_bytes());
    assert!(text(find(7, 99, &maps(), &newer)).contains("version 9"));
}

#[test]
fn a_window_leads_its_own_call_away() {
    let window = manifest().windows.remove(0);
    assert!(window.leads_away(window.address + 3), "the call");
    assert!(!window.leads_away(window.address), "what is displaced");
    for (entry, routine, hop_of) in [(true, false, 0), (false, true, 0), (false, false, 9)] {
        let other = WindowRecord {
            entry,
            routine,
            hop_of,
            ..window.clone()
        };
        assert!(!other.leads_away(other.address + 3));
    }
    let tail = WindowRecord {
        call: false,
        returns: vec![0x40_0100],
        ..window.clone()
    };
    assert!(window.returns_to(window.end()) && !tail.returns_to(window.end()));
    assert!(tail.returns_to(0x40_0100) && !window.returns_to(0x40_0100));
}

#[test]
fn a_short_window_has_filler_that_leads_on() {
    let mut record = manifest();
    let window = WindowRecord {
        before: vec![0xff, 0xd0],
        after: vec![0xeb, 0x40],
        call: false,
        jumped: true,
        ..record.windows[0].clone()
    };
    let hop = WindowRecord {
        address: window.address + 0x42,
        before: vec![0x90; 5],
        after: vec![0xe9, 0, 0, 0, 0],
        jumped: false,
        hop_of: window.address,
        site: 0,
        copies: Vec::new(),
        ..window.clone()
    };
    let mut no_code = |windows: &[&WindowRecord]| {
        record.windows = windows.iter().map(|w| (*w).clone()).collect();
        fits(&record, &maps()).is_err_and(|why| why.contains("no code"))
    };
    assert!(!no_code(&[&hop, &window]));
    assert!(no_code(&[&window]), "it leads nowhere");
    assert!(no_code(&[&hop]), "nothing leads there");
    let entry = WindowRecord {
        entry: true,
        ..window.clone()
    };
    assert!(no_code(&[&hop, &entry]), "entries have five bytes");
    let two = WindowRecord {
        before: vec![0x90; 2],
        after: vec![0xeb; 2],
        ..hop.clone()
    };
    assert!(no_code(&[&two, &window]), "filler has five bytes");
}

#[test]
fn a_dead_area_beside_the_living_one_is_passed_over() {
    let written = manifest();
    let mut m = memory(&written);
    let mut all = maps();
    for (at, magic) in [(0x8_0000_u64, &MAGIC[..]), (0x80_0000, &[0; 8])] {
        let end = at + size_of::<Control>() as u64;
        let name = "/memfd:nightgraft (deleted)".into();
        all.push(Map {
            start: at,
            end,
            writable: true,
            executable: false,
            name,
        });
        m.put(at, &[0; 16]);
        m.put(at + 8, &BRIDGE_VERSION.to_le_bytes());
        m.put(at, magic);
    }
    all.sort_by_key(|map| map.start);
    assert_eq!(find(7, 99, &all, &m).unwrap().unwrap().manifest, written);
}

#[test]
fn a_patch_that_died_before_its_record_is_as_if_it_never_was() {
    let mut m = FakeMemory::default();
    m.put(0x10_0000, &[0; 16]);
    assert_eq!(find(7, 99, &maps(), &m).unwrap(), None);
}

#[test]
fn a_window_of_a_library_that_was_closed_is_gone() {
    let written = manifest();
    let without: Vec<Map> = maps()
        .into_iter()
        .filter(|m| m.start != 0x40_0000)
        .collect();
    let found = find(7, 99, &without, &memory(&written)).unwrap().unwrap();
    assert!(found.is_gone(0) && !found.in_place(0));
    let found = find(7, 99, &maps(), &memory(&written)).unwrap().unwrap();
    assert!(!found.is_gone(0));
}

#[test]
fn what_runs_is_told_by_the_area_alone_the_innermost_last() {
    let mut written = manifest();
    let graft = |callee: &str, index| GraftRecord {
        callee: callee.into(),
        index,
        ..manifest().grafts.remove(0)
    };
    written.grafts = vec![graft("Bar/Baz", 0), graft("Bar", 1), graft("Qux", 2)];
    let mut area = FakeMemory::default();
    area.put(0, &MAGIC);
    area.put(8, &BRIDGE_VERSION.to_le_bytes());
    area.put(12, &[1, 0, 0, 0]);
    area.put(slot_address(0, 1), &written.encode().unwrap());
    let edges = offset_of!(Control, edges) as u64;
    let size = size_of::<abi::SharedEdge>() as u64;
    for index in 0..3 {
        area.put(edges + index * size, &vec![0; size as usize]);
    }
    let count = |area: &mut FakeMemory, index: u64, at: usize, n: u64| {
        area.put(edges + index * size + at as u64, &n.to_le_bytes());
    };
    let (entered, returned) = (
        offset_of!(abi::SharedEdge, entered),
        offset_of!(abi::SharedEdge, returned),
    );
    assert_eq!(in_flight(7, 99, &area).unwrap(), []);
    for index in 0..2 {
        count(&mut area, index, entered, 5);
        count(&mut area, index, returned, 4);
    }
    let initialising = offset_of!(abi::SharedEdge, initialising) as u64;
    area.put(edges + 2 * size + initialising, &[1]);
    let one = |callee: &str, initialising| InFlight {
        callee: callee.into(),
        initialising,
    };
    assert_eq!(
        in_flight(7, 99, &area).unwrap(),
        [one("Bar", false), one("Qux", true), one("Bar/Baz", false)]
    );
    // Another process's: a child's, or nonsense.
    assert_eq!(in_flight(8, 99, &area).unwrap(), []);
}
