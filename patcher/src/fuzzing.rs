//! What comes from files, workers and disks, read: entry points for fuzzing
//! alone. Each of them may refuse whatever it likes, and must end.

use std::mem::offset_of;
use std::sync::{Arc, LazyLock};

use nightgraft_bridge::abi::{BRIDGE_VERSION, Control, MAGIC};

use crate::analyses::Analyses;
use crate::code::{self, Executable, Live};
use crate::effects::{self, Allowance, Library};
use crate::elf::Image;
use crate::journal::Entry;
use crate::load;
use crate::manifest::{self, Manifest, Present};
use crate::plan::{self, Input, Wanted};
use crate::recover::{self, Evidence, Found, Side};
use crate::refused::Refused;
use crate::room::AddressRoom;
use crate::session;
use crate::snapshot::{self, Map, Memory, SnapshotError, Worker};
use crate::status::status;

/// Reads a file as a library: its tables, what it does, its code.
pub fn library(file: &[u8]) {
    if let Ok(image) = Image::parse(file.into()) {
        let (low, high) = (image.low(), image.high());
        assert!(low <= high, "{low:#x} > {high:#x}");
        assert!(image.alignment().is_power_of_two());
        let _ = (image.build_id_hex(), image.at(low, 16));
        let _ = load::check("a library", &image);
        let _ = load::check_exports("a library", &image);
        for symbol in &image.symbols {
            let _ = load::export(&image, &symbol.name);
        }
        let library = Library {
            path: "a library",
            image: &image,
        };
        let all = effects::effects(&[library], |_| false, Allowance::all());
        let _ = effects::report("Bar", &all);
    }
    code(file);
}

/// Reads a file's code, as a caller's library and as a worker's program.
pub fn code(file: &[u8]) {
    if let Ok(map) = code::analyse(file) {
        let _ = map.entry_window("faas_func_call");
        map.try_all_windows();
    }
    if let Ok(program) = Executable::parse(file) {
        for at in program.passed_to_create() {
            let _ = program.window(at);
        }
    }
}

struct Silent;

impl Live for Silent {
    fn word(&self, _: u64) -> Option<u64> {
        None
    }
    fn is_code(&self, _: u64) -> bool {
        false
    }
    fn is_stack(&self, _: u64) -> bool {
        false
    }
}

/// Plans a patch of a worker that calls `Bar`, which is in `file`; by another
/// worker of the same libraries. Writes the plan out where there is one.
pub fn plan(caller: &Worker, file: &[u8]) -> Result<(), Refused> {
    // The caller's is always the same.
    static ANALYSES: LazyLock<Analyses> = LazyLock::new(Analyses::default);
    let library = &caller.function().image.bytes;
    let code = ANALYSES.library(library).expect("a caller of our own");
    let image = Image::parse(file.into()).map_err(|e| Refused::BrokenImage {
        library: "libbar.so".into(),
        reason: e.to_string(),
    })?;
    let mut callee = caller.clone();
    let function = &mut callee.modules[caller.library];
    function.path = "/functions/libbar.so".into();
    function.image = Arc::new(image);
    let bridge = &*session::bridge().expect("our own");
    let invoke = Ok(caller.executable().bias + caller.executable().image.entry);
    let input = Input {
        caller,
        code: &code,
        callee: &callee,
        name: "Bar",
        present: None,
        bridge,
        memory_room: None,
        address_room: AddressRoom::default(),
        longest_window: 4096,
        invoke: &invoke,
        live: &Silent,
        wanted: Wanted {
            allowed: Allowance::all(),
            guard: file.len() % 2 == 1,
        },
        analyses: &ANALYSES,
    };
    let plan = plan::plan(&input)?;
    for mapping in plan.mappings() {
        let end = mapping.reservation.start + mapping.reservation.len;
        let free = |m: &Map| m.end <= mapping.reservation.start || end <= m.start;
        assert!(caller.maps.iter().all(free), "what is mapped");
        for part in &mapping.parts {
            assert!(part.start >= mapping.reservation.start);
            assert!(part.bytes.len() as u64 <= part.len && part.start + part.len <= end);
        }
    }
    assert!(!plan.render().is_empty());
    Ok(())
}

/// Memory that a worker has filled as it likes: runs of bytes at addresses.
#[derive(Default)]
struct Bytes(Vec<(u64, Vec<u8>)>);

impl Memory for Bytes {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), SnapshotError> {
        let run = self.0.iter().rev().find_map(|(start, bytes)| {
            let at = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(at..at.checked_add(into.len())?)
        });
        let run = run.ok_or_else(|| SnapshotError::Read {
            pid: 7,
            what: format!("{address:#x}"),
            source: std::io::Error::other("not mapped"),
        })?;
        into.copy_from_slice(run);
        Ok(())
    }
}

/// Follows a chain of loaded libraries through `bytes`, which lie at 0x10000.
pub fn link_map(bytes: &[u8]) {
    let memory = Bytes(vec![(0x1_0000, bytes.to_vec())]);
    if let Ok(most) = snapshot::link_map_names(&memory, 0x1_0000) {
        assert!(most <= 256 << 10, "names without end");
    }
}

/// Reads `text` as the record in a worker, whose control area lies at 0x100000,
/// with everything in `memory` at 0x200000; then acts on it as far as that
/// touches nothing.
pub fn record(text: &[u8], memory: &[u8]) {
    const CONTROL: u64 = 0x10_0000;
    let map = |start, len, executable, name: &str| Map {
        start,
        end: start + len,
        writable: false,
        executable,
        name: name.into(),
    };
    let control = size_of::<Control>() as u64;
    let maps = [
        map(CONTROL, control, false, manifest::CONTROL_PATH),
        map(0x20_0000, 0x1_0000, true, ""),
        map(0x40_0000, 0x1000, true, "/functions/libfoo.so"),
    ];
    let mut area = vec![0; control as usize];
    area[..8].copy_from_slice(&MAGIC);
    area[8..12].copy_from_slice(&BRIDGE_VERSION.to_le_bytes());
    area[12] = 1;
    let at = (manifest::slot_address(CONTROL, 1) - CONTROL) as usize;
    let Some(slot) = area.get_mut(at..at + 8 + text.len()) else {
        return;
    };
    slot[..4].copy_from_slice(&(text.len() as u32).to_le_bytes());
    slot[4..8].copy_from_slice(&crc32fast::hash(text).to_le_bytes());
    slot[8..].copy_from_slice(text);
    // What it has counted is whatever it likes as well.
    let counted = offset_of!(Control, observing)..at;
    for (to, from) in area[counted].iter_mut().skip(4).zip(memory.iter().cycle()) {
        *to = *from;
    }
    let mut ours = memory.to_vec();
    ours.resize(0x1_0000, 0);
    let memory = Bytes(vec![
        (CONTROL, area.clone()),
        (0x20_0000, ours),
        (0x40_0000, vec![0x90; 0x1000]),
    ]);
    let alone = Bytes(vec![(0, area)]);
    let _ = manifest::in_flight(7, 99, &alone);
    let _ = manifest::crashed(7, 99, &alone);
    crate::observed::read_area(7, 99, &alone);
    if let Ok(Some(present)) = manifest::find(7, 99, &maps, &memory) {
        let _ = status(&present, &memory);
        for graft in &present.manifest.grafts {
            let _ = present.unresolved(graft).count();
        }
        decide(
            Found::Record(Box::new(present.manifest.clone())),
            Some(&present),
            None,
        );
        assert!(manifest::fits(&present.manifest, &maps).is_ok());
        let written = present.manifest.encode().expect("it came from a slot");
        let again: Manifest = serde_json::from_slice(&written[8..]).expect("our own");
        assert_eq!(again, present.manifest);
    }
}

/// Reads an entry of the journal, as it is and with its checksum made good, and
/// decides what to do about it.
pub fn journal(bytes: &[u8]) {
    let _ = Entry::decode(bytes);
    if let Some(entry) = Entry::of_text(bytes) {
        let written = entry.encode().expect("an entry");
        assert_eq!(Entry::decode(&written).as_ref(), Ok(&entry));
        decide(Found::Nothing, None, Some(&entry));
        decide(Found::Damaged("it is".into()), None, Some(&entry));
        if let Some(record) = &entry.record {
            decide(Found::Record(Box::new(record.clone())), None, Some(&entry));
        }
    }
}

fn decide(found: Found, present: Option<&Present>, entry: Option<&Entry>) {
    let live = |record: &Manifest, side: Side, gate: bool| recover::Live {
        windows: vec![side; record.windows.len()],
        gates: vec![gate; record.grafts.len()],
        observing: gate,
    };
    let record = match &found {
        Found::Record(record) => Some(record.clone()),
        _ => None,
    };
    let kept = entry.and_then(|e| e.record.as_ref());
    for side in [Side::Before, Side::After, Side::Other, Side::Gone] {
        let evidence = Evidence {
            found: found.clone(),
            found_live: record.as_ref().map(|record| recover::Live {
                gates: present.map_or_else(
                    || vec![true; record.grafts.len()],
                    |present| present.gates.clone(),
                ),
                ..live(record, side, true)
            }),
            entry: entry.cloned(),
            entry_live: kept.map(|record| Ok(live(record, side, true))),
            held: Vec::new(),
            mapped: kept.map_or_else(Vec::new, |record| vec![true; record.regions.len()]),
            descriptors: vec![3],
        };
        let decision = recover::decide(7, 99, &evidence);
        assert_eq!(decision, recover::decide(7, 99, &evidence));
    }
}

/// Reads a text as those of `/proc` and of control groups.
pub fn proc_text(text: &str) {
    crate::room::read_text(text);
    recover::read_smaps(text);
}
