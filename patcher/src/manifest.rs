//! The record, inside the worker, of everything that we put there.
//!
//! It lies in the control area (a memfd that `/proc/PID/maps` names), in one
//! of two slots; one byte says which. A slot is written whole before the byte
//! is, so a reader finds the old record or the new one. A new agent needs
//! nothing else to know what a worker holds.
//!
//! The worker can write to it, so it is input like any other: length,
//! checksum, version and identity are checked, and every address that it
//! gives is compared with `/proc/PID/maps` before it is used.

use std::collections::BTreeMap;
use std::mem::offset_of;

use nightgraft_bridge::abi::{
    self, BRIDGE_VERSION, Control, Graft, MAGIC, MANIFEST_SLOT, STATE_FAILED,
};
use serde::{Deserialize, Serialize};

use crate::code::Seen;
use crate::plan::GUARDED;
use crate::refused::Refused;
use crate::snapshot::{Map, Memory, SnapshotError};

/// What stands for a callee where it is the counting of a worker's calls that
/// begins or ends: no function has an empty name.
pub const OBSERVING: &str = "";

/// Format of the record itself. What is added to it within a format may be
/// missed by older agents without harm; anything else makes another format,
/// which they refuse. In format 1 no window jumps to filler.
pub const RECORD_FORMAT: u32 = 2;

/// A range of live addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Where the bridge's routines are in the worker; live addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeAddresses {
    /// `ng_enter`.
    pub enter: u64,
    /// `ng_called`; in records of bridges before version 5 `ng_hook`.
    #[serde(alias = "hook")]
    pub called: u64,
    /// `ng_routine`.
    pub routine: u64,
    /// What images are bound to, by the bridge's names.
    pub exports: BTreeMap<String, u64>,
}

/// One window, or the filler that one jumps to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowRecord {
    /// First byte, live.
    pub address: u64,
    /// The library's bytes.
    #[serde(with = "hex_bytes")]
    pub before: Vec<u8>,
    /// Our bytes.
    #[serde(with = "hex_bytes")]
    pub after: Vec<u8>,
    /// It is the entry of `faas_func_call`; else a site, or `routine`.
    pub entry: bool,
    /// It is the entry of the worker's own `invoke_func`, in its executable.
    #[serde(default)]
    pub routine: bool,
    /// The routine's entry, for the counting of calls alone: no edge asked for it.
    #[serde(default)]
    pub for_observing: bool,
    /// A site that was seen at run time: any name can pass it.
    #[serde(default)]
    pub dynamic: bool,
    /// It is written as a call, whose return address is the window's end.
    pub call: bool,
    /// A call written as a jump: its stub pushes the window's end.
    #[serde(default)]
    pub jumped: bool,
    /// A tail jump that was seen at run time: where the calls that led to it
    /// return, live.
    #[serde(default)]
    pub returns: Vec<u64>,
    /// Filler that the window at this address jumps to, where it leads on; 0
    /// for a window. It has no site and no copies of its own.
    #[serde(default)]
    pub hop_of: u64,
    /// The site's (or routine's) record in the worker's memory; 0 for the entry.
    pub site: u64,
    /// Where the original instructions went: offset in the window, live
    /// address in the stub.
    pub copies: Vec<(u8, u64)>,
    /// Names that the site can pass.
    pub names: Vec<String>,
    /// The callee in the site's inline cache.
    pub cached: Option<String>,
}

impl WindowRecord {
    /// Whether it is where calls are led away from.
    #[must_use]
    pub fn is_site(&self) -> bool {
        !self.entry && !self.routine && self.hop_of == 0
    }

    /// Whether it is a call, in whatever way it was written.
    #[must_use]
    pub fn is_call(&self) -> bool {
        self.call || self.jumped
    }

    /// Whether a call that returns to this live address is led away here.
    #[must_use]
    pub fn returns_to(&self, address: u64) -> bool {
        self.is_call() && self.end() == address || self.returns.contains(&address)
    }

    /// Whether the call or jump at this live address is the one that is led
    /// away here.
    #[must_use]
    pub fn leads_away(&self, address: u64) -> bool {
        let branch = self.copies.last().map(|(offset, _)| u64::from(*offset));
        self.is_site() && branch.is_some_and(|offset| self.address + offset == address)
    }

    /// Whether it serves calls of every callee: it goes with the last one.
    #[must_use]
    pub fn serves_all(&self) -> bool {
        self.entry || self.routine && !self.for_observing || self.dynamic
    }

    /// Whether calls of `callee` need it, or the counting of calls if that is
    /// [`OBSERVING`].
    #[must_use]
    pub fn passed_by(&self, callee: &str) -> bool {
        let routine = self.routine && (!self.for_observing || callee == OBSERVING);
        routine || self.dynamic || self.names.iter().any(|n| n == callee)
    }

    /// First address behind the window.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address + self.before.len() as u64
    }
}

/// One callee's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraftRecord {
    /// The callee's name; below another graft the way there: `Bar/Baz` is what
    /// runs when Bar, fused, calls Baz.
    pub callee: String,
    /// The graft whose calls come here, live; 0 for the worker's function.
    #[serde(default)]
    pub parent: u64,
    /// The image's build-id, or a digest of the file where it has none.
    pub build_id: String,
    /// Digest of the build-ids of the libraries that it has copies of; empty
    /// for none.
    #[serde(default)]
    pub dependencies: String,
    /// The callee's library, as its container names it.
    pub library: String,
    /// The graft's structure, live.
    pub graft: u64,
    /// Its image's `faas_func_call`, live.
    #[serde(default)]
    pub call: u64,
    /// Index of its gate and counters.
    pub index: usize,
    /// Its place in the bridge's table of grafts.
    pub slot: usize,
    /// Its images, live, with what lies between.
    pub image: Region,
    /// A newer image of the same callee has its place.
    pub replaced: bool,
}

/// Everything of ours in one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the bridge.
    pub version: u32,
    /// [`RECORD_FORMAT`] of who wrote it.
    #[serde(default = "first_format")]
    pub format: u32,
    /// How many records came before it in this worker, it included: of two,
    /// the one with the higher number is the newer.
    #[serde(default)]
    pub generation: u64,
    /// The worker; a forked child inherits the record but not this number.
    pub pid: i32,
    /// Its start time in clock ticks since boot.
    pub start_time: u64,
    /// The caller's library, as its container names it.
    pub library: String,
    /// The control area, live.
    pub control: u64,
    /// The bridge's `Worker` structure, live.
    pub worker: u64,
    /// The bridge's routines.
    pub bridge: BridgeAddresses,
    /// Mapped by us.
    pub regions: Vec<Region>,
    /// Windows that were ever written; whether they are in place is told by
    /// the live bytes.
    pub windows: Vec<WindowRecord>,
    /// Images.
    pub grafts: Vec<GraftRecord>,
}

fn first_format() -> u32 {
    1
}

impl GraftRecord {
    /// The callee that the worker's function itself calls on the way here.
    #[must_use]
    pub fn outermost(&self) -> &str {
        self.callee.split('/').next().unwrap_or_default()
    }
}

impl Manifest {
    /// The graft that calls by this name run, if any.
    #[must_use]
    pub fn graft(&self, callee: &str) -> Option<&GraftRecord> {
        self.grafts
            .iter()
            .find(|g| !g.replaced && g.callee == callee)
    }

    /// Live address of a graft's gate byte.
    #[must_use]
    pub fn gate(&self, graft: &GraftRecord) -> u64 {
        self.edge(graft) + offset_of!(abi::SharedEdge, gate) as u64
    }

    /// Live address of the byte that says whether the worker's calls are counted.
    #[must_use]
    pub fn observing(&self) -> u64 {
        self.control + offset_of!(Control, observing) as u64
    }

    /// Live address of a graft's gate and counters.
    #[must_use]
    pub fn edge(&self, graft: &GraftRecord) -> u64 {
        let size = size_of::<abi::SharedEdge>() as u64;
        self.control + offset_of!(Control, edges) as u64 + graft.index as u64 * size
    }

    /// The slot's bytes for this record.
    ///
    /// # Errors
    /// It is too large for the slot.
    pub fn encode(&self) -> Result<Vec<u8>, Refused> {
        let text = serde_json::to_vec(self).unwrap_or_default();
        let most = MANIFEST_SLOT - 8;
        if text.is_empty() || text.len() > most {
            return Err(Refused::OtherBridge {
                found: format!("so much that its record has over {most} bytes"),
            });
        }
        let mut slot = Vec::with_capacity(text.len() + 8);
        slot.extend((text.len() as u32).to_le_bytes());
        slot.extend(crc32fast::hash(&text).to_le_bytes());
        slot.extend(text);
        Ok(slot)
    }
}

/// A call of a known callee that came through the routine's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenCall {
    /// The call, as the bridge noted it.
    pub seen: Seen,
    /// Which grafts it meant: bit `i` is the one with `index` `i`.
    pub grafts: u64,
    /// How often it came by.
    pub count: u64,
}

/// What a worker holds, as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// The record.
    pub manifest: Manifest,
    /// Which slot holds it: 1 or 2.
    pub slot: u8,
    /// Per window of the record: the live bytes.
    pub live: Vec<Vec<u8>>,
    /// Per graft of the record: its state (`STATE_…`).
    pub states: Vec<u8>,
    /// Per graft of the record: its gate.
    pub gates: Vec<bool>,
    /// Per graft of the record: whether its calls are guarded.
    pub guards: Vec<bool>,
    /// Whether the guard has taken over actions of signals.
    pub armed: bool,
    /// Whether the worker's calls are counted.
    pub observing: bool,
    /// Calls that came through the entry of the worker's own routine.
    pub seen: Vec<SeenCall>,
}

impl Present {
    /// Whether window `index` holds our bytes.
    #[must_use]
    pub fn in_place(&self, index: usize) -> bool {
        self.live[index] == self.manifest.windows[index].after
    }

    /// Whether window `index` has gone with the library that it was in.
    #[must_use]
    pub fn is_gone(&self, index: usize) -> bool {
        self.live[index].is_empty()
    }

    /// Calls of a graft that came through the routine's entry from where no
    /// window is in place.
    pub fn unresolved(&self, graft: &GraftRecord) -> impl Iterator<Item = &SeenCall> {
        let bit = 1_u64 << (graft.index % 64);
        self.seen.iter().filter(move |call| {
            let window = (0..self.manifest.windows.len()).any(|i| {
                let w = &self.manifest.windows[i];
                w.returns_to(call.seen.return_address) && self.in_place(i)
            });
            call.grafts & bit != 0 && !window
        })
    }

    /// Whether graft `index` failed to initialise.
    #[must_use]
    pub fn failed(&self, index: usize) -> bool {
        self.states[index] == STATE_FAILED
    }
}

/// Finds what the worker `pid` holds; `None` where we never were.
///
/// # Errors
/// The memory cannot be read, or there is something that is not a record of
/// this version and worker.
pub fn find(
    pid: i32,
    start_time: u64,
    maps: &[Map],
    memory: &dyn Memory,
) -> Result<Option<Present>, FindError> {
    let other = |found: &str| {
        FindError::Refused(Refused::OtherBridge {
            found: found.to_owned(),
        })
    };
    let mut strange = None;
    for area in maps.iter().filter(|m| is_control(m)) {
        match read_record(pid, start_time, area, memory)? {
            Area::Record(manifest, slot) => {
                return present(*manifest, slot, area.start, maps, memory).map(Some);
            }
            Area::Strange(what) => strange = Some(what),
            // A patch that ended before its first record: nothing leads there.
            Area::Empty => {}
        }
    }
    strange.map_or(Ok(None), |what| Err(other(&what)))
}

/// What `/proc/PID/maps` calls the control area.
pub(crate) const CONTROL_PATH: &str = "/memfd:nightgraft";

/// What of a worker's is running code of a callee.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// The callee, with the way to it (`Bar/Baz`).
    pub callee: String,
    /// Its initialisers run, not a call.
    pub initialising: bool,
}

/// What runs in the worker, or ran when it died: told by its control area alone
/// (which lies at 0 in `area`). Outermost first; a call that was left by a jump
/// counts until the next outermost entry.
///
/// # Errors
/// The area cannot be read.
pub fn in_flight(
    pid: i32,
    start_time: u64,
    area: &dyn Memory,
) -> Result<Vec<InFlight>, SnapshotError> {
    let Area::Record(manifest, _) = read_record(pid, start_time, &whole(), area)? else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for graft in manifest.grafts.iter().filter(|g| g.index < abi::MAX_GRAFTS) {
        let edge = offset_of!(Control, edges) + graft.index * size_of::<abi::SharedEdge>();
        let field = |offset: usize| area.u64((edge + offset) as u64);
        let entered = field(offset_of!(abi::SharedEdge, entered))?;
        let returned = field(offset_of!(abi::SharedEdge, returned))?;
        let mut byte = [0];
        let initialising = offset_of!(abi::SharedEdge, initialising);
        area.read((edge + initialising) as u64, &mut byte)?;
        if byte[0] != 0 || entered != returned {
            found.push(InFlight {
                callee: graft.callee.clone(),
                initialising: entered == returned,
            });
        }
    }
    found.sort_by_key(|one| one.callee.matches('/').count());
    Ok(found)
}

/// Callees that crashed in a guarded call and whose edges nobody has looked at
/// since; as for [`in_flight`].
///
/// # Errors
/// The area cannot be read.
pub fn crashed(pid: i32, start_time: u64, area: &dyn Memory) -> Result<Vec<String>, SnapshotError> {
    const EDGE: usize = size_of::<abi::SharedEdge>();
    let mut edges = vec![0; EDGE * abi::MAX_GRAFTS];
    area.read(offset_of!(Control, edges) as u64, &mut edges)?;
    let crashed = |index: usize| {
        let at = index * EDGE + offset_of!(abi::SharedEdge, crashed);
        edges.get(at).is_some_and(|byte| *byte != 0)
    };
    // Looked at some times a second: the record is read only where it matters.
    if !(0..abi::MAX_GRAFTS).any(crashed) {
        return Ok(Vec::new());
    }
    let Area::Record(manifest, _) = read_record(pid, start_time, &whole(), area)? else {
        return Ok(Vec::new());
    };
    let grafts = manifest.grafts.into_iter();
    let found = grafts.filter(|g| !g.replaced && crashed(g.index));
    Ok(found.map(|g| g.callee).collect())
}

/// The record in a control area that lies at 0, if there is one of this worker.
pub(crate) fn in_area(
    pid: i32,
    start_time: u64,
    area: &dyn Memory,
) -> Result<Option<Manifest>, SnapshotError> {
    match read_record(pid, start_time, &whole(), area)? {
        Area::Record(manifest, _) => Ok(Some(*manifest)),
        Area::Empty | Area::Strange(_) => Ok(None),
    }
}

/// A control area at 0.
fn whole() -> Map {
    Map {
        end: size_of::<Control>().next_multiple_of(4096) as u64,
        ..Map::default()
    }
}

/// What one control area holds.
enum Area {
    /// The mark is missing (it is written last), or no slot holds.
    Empty,
    /// A record of this worker, and its slot.
    Record(Box<Manifest>, u8),
    /// Something that is not for us.
    Strange(String),
}

fn read_record(
    pid: i32,
    start_time: u64,
    area: &Map,
    memory: &dyn Memory,
) -> Result<Area, SnapshotError> {
    let strange = |what: &str| Ok(Area::Strange(what.to_owned()));
    let control = area.start;
    let mut head = [0_u8; 16];
    memory.read(control, &mut head)?;
    if head[..8] != MAGIC {
        return Ok(Area::Empty);
    }
    let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    if version != BRIDGE_VERSION {
        return strange(&format!(
            "a bridge of version {version} (this agent's is {BRIDGE_VERSION})"
        ));
    }
    if area.end.saturating_sub(area.start) < size_of::<Control>() as u64 {
        return strange("a control area of another size");
    }
    let slot = head[offset_of!(Control, manifest)];
    match slot {
        0 => return Ok(Area::Empty),
        1 | 2 => {}
        _ => return strange("a record in no slot"),
    }
    let at = slot_address(control, slot);
    let mut sizes = [0_u8; 8];
    memory.read(at, &mut sizes)?;
    let len = u32::from_le_bytes([sizes[0], sizes[1], sizes[2], sizes[3]]) as usize;
    if len > MANIFEST_SLOT - 8 {
        return strange("a record longer than its slot");
    }
    let mut text = vec![0; len];
    memory.read(at + 8, &mut text)?;
    if crc32fast::hash(&text).to_le_bytes() != sizes[4..] {
        return strange("a record whose checksum is wrong");
    }
    let manifest: Manifest = match serde_json::from_slice(&text) {
        Ok(manifest) => manifest,
        Err(error) => return strange(&format!("a record that makes no sense ({error})")),
    };
    if manifest.format > RECORD_FORMAT {
        return strange(&format!(
            "a record of format {} (this agent knows those up to {RECORD_FORMAT})",
            manifest.format
        ));
    }
    if manifest.pid != pid || manifest.start_time != start_time {
        return strange(&format!(
            "the record of worker {}, whose child it is",
            manifest.pid
        ));
    }
    Ok(Area::Record(Box::new(manifest), slot))
}

fn present(
    manifest: Manifest,
    slot: u8,
    control: u64,
    maps: &[Map],
    memory: &dyn Memory,
) -> Result<Present, FindError> {
    let other = |found: &str| {
        FindError::Refused(Refused::OtherBridge {
            found: found.to_owned(),
        })
    };
    check(&manifest, control, maps).map_err(|what| other(&what))?;
    let mut live = Vec::new();
    for window in &manifest.windows {
        let (start, end) = (window.address, window.end());
        let is_code = |m: &Map| m.executable && m.start <= start && end <= m.end;
        let mut bytes = Vec::new();
        if maps.iter().any(is_code) {
            bytes.resize(window.before.len(), 0);
            memory.read(start, &mut bytes)?;
        }
        live.push(bytes);
    }
    let (mut states, mut gates, mut guards) = (Vec::new(), Vec::new(), Vec::new());
    let guarded = manifest.bridge.exports.get(GUARDED);
    for graft in &manifest.grafts {
        let mut byte = [0];
        memory.read(graft.graft + offset_of!(Graft, state) as u64, &mut byte)?;
        states.push(byte[0]);
        memory.read(manifest.gate(graft), &mut byte)?;
        gates.push(byte[0] != 0);
        let call = memory.u64(graft.graft + offset_of!(Graft, call) as u64)?;
        guards.push(guarded == Some(&call));
    }
    let seen = if manifest.windows.iter().any(|w| w.routine) {
        seen_calls(control, memory)?
    } else {
        Vec::new()
    };
    let mut observing = [0];
    memory.read(manifest.observing(), &mut observing)?;
    Ok(Present {
        observing: observing[0] != 0,
        states,
        gates,
        armed: armed(&manifest, memory)?,
        guards,
        seen,
        manifest,
        slot,
        live,
    })
}

/// Whether the guard has taken over actions of signals.
fn armed(manifest: &Manifest, memory: &dyn Memory) -> Result<bool, SnapshotError> {
    let mut ours = [0; abi::GUARDED_SIGNALS.len()];
    let guard = manifest.worker + offset_of!(abi::Worker, guard) as u64;
    memory.read(guard + offset_of!(abi::Guard, ours) as u64, &mut ours)?;
    Ok(ours.contains(&abi::ACTION_OURS))
}

/// The table of calls that the bridge keeps.
fn seen_calls(control: u64, memory: &dyn Memory) -> Result<Vec<SeenCall>, SnapshotError> {
    const ENTRY: usize = size_of::<abi::Seen>();
    let mut bytes = vec![0; ENTRY * abi::SEEN];
    memory.read(control + offset_of!(Control, seen) as u64, &mut bytes)?;
    let calls = bytes.chunks_exact(ENTRY).filter_map(|entry| {
        let word = |at: usize| {
            let bytes = entry.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let return_address = word(offset_of!(abi::Seen, address))?;
        let mut registers = [0; abi::SEEN_REGISTERS];
        for (number, register) in registers.iter_mut().enumerate() {
            *register = word(offset_of!(abi::Seen, registers) + 8 * number)?;
        }
        (return_address != 0).then_some(SeenCall {
            seen: Seen {
                return_address,
                registers,
            },
            grafts: word(offset_of!(abi::Seen, grafts))?,
            count: word(offset_of!(abi::Seen, count))?,
        })
    });
    Ok(calls.collect())
}

/// Address of slot 1 or 2.
#[must_use]
pub fn slot_address(control: u64, slot: u8) -> u64 {
    control + offset_of!(Control, slots) as u64 + (u64::from(slot) - 1) * MANIFEST_SLOT as u64
}

/// Whether `record`, which another place than the worker's memory has kept, can
/// be the record of what is in the worker: every address lies where it must,
/// and a control area lies where it says.
///
/// # Errors
/// What does not fit.
pub fn fits(record: &Manifest, maps: &[Map]) -> Result<(), String> {
    let control = maps
        .iter()
        .filter(|m| is_control(m))
        .find(|m| m.start == record.control);
    match control {
        Some(area) if area.end - area.start >= size_of::<Control>() as u64 => {}
        _ => return Err(format!("there is no control area at {:#x}", record.control)),
    }
    check(record, record.control, maps)
}

fn is_control(map: &Map) -> bool {
    map.name.strip_suffix(" (deleted)").unwrap_or(&map.name) == CONTROL_PATH
}

/// Every address lies where it must.
fn check(manifest: &Manifest, control: u64, maps: &[Map]) -> Result<(), String> {
    if manifest.version != BRIDGE_VERSION {
        return Err(format!(
            "a record of a bridge of version {}",
            manifest.version
        ));
    }
    let ours = |start: u64, len: u64| {
        manifest.regions.iter().any(|r| {
            start >= r.start
                && start
                    .checked_add(len)
                    .is_some_and(|end| end <= r.start.saturating_add(r.len))
        })
    };
    let mapped = |start: u64, len: u64, code: bool| {
        maps.iter()
            .any(|m| start >= m.start && start + len <= m.end && (!code || m.executable))
    };
    if manifest.control != control || !ours(manifest.worker, size_of::<abi::Worker>() as u64) {
        return Err("a record that does not fit its place".into());
    }
    let bridge = &manifest.bridge;
    let routines = [bridge.enter, bridge.called, bridge.routine];
    for routine in routines.iter().chain(bridge.exports.values()) {
        if !ours(*routine, 1) || !mapped(*routine, 1, true) {
            return Err(format!(
                "a record of a bridge's routine at {routine:#x}, which is no code of ours"
            ));
        }
    }
    for w in &manifest.windows {
        let len = w.before.len() as u64;
        let roles = [w.entry, w.routine, w.dynamic];
        // A short jump suffices where filler leads on.
        let hops = |other: &WindowRecord| other.hop_of == w.address;
        let least = if manifest.windows.iter().any(hops) {
            2
        } else {
            5
        };
        let led = |other: &WindowRecord| {
            other.address == w.hop_of && other.hop_of == 0 && !other.entry && !other.routine
        };
        let sane = w.before.len() == w.after.len()
            && (least..=64).contains(&len)
            && (w.hop_of == 0 || manifest.windows.iter().any(led))
            && roles.iter().filter(|is| **is).count() <= 1;
        // A library may have been closed since: then nothing is there, or what
        // was mapped afterwards.
        if !sane || w.address > u64::MAX - 64 || ours(w.address, len) {
            return Err(format!(
                "a record of a window at {:#x}, which is no code",
                w.address
            ));
        }
        if w.copies.iter().any(|(_, to)| !ours(*to, 1)) {
            return Err(format!(
                "a record of a stub outside of ours for {:#x}",
                w.address
            ));
        }
    }
    for g in &manifest.grafts {
        let sane = g.index.max(g.slot) < abi::MAX_GRAFTS && ours(g.call, 1);
        if !sane || !ours(g.graft, size_of::<Graft>() as u64) {
            return Err(format!(
                "a record of {} at {:#x}, which is not ours",
                g.callee, g.graft
            ));
        }
    }
    Ok(())
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The worker could not be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What is there is not for this agent.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Bytes as a hex string.
pub(crate) mod hex_bytes {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&crate::elf::hex(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        if text.len() % 2 != 0 || !text.is_ascii() {
            return Err(D::Error::custom("an odd number of hex digits"));
        }
        (0..text.len() / 2)
            .map(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).map_err(D::Error::custom))
            .collect()
    }
}

#[cfg(test)]
mod tests;
