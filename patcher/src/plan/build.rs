//! Making a plan: what is there already decides between a short one and one
//! that maps (`fresh`).

use std::mem::offset_of;
use std::sync::Arc;

use nightgraft_bridge::abi;

use super::dynamic;
use super::fresh::{fresh, imports_found};
use super::{PatchPlan, Store, Unfused, Wanted, guard};
use crate::analyses::Analyses;
use crate::code::{CodeMap, Live, Site, Window};
use crate::effects::{self, Effect};
use crate::elf::{Image, hex};
use crate::load;
use crate::manifest::{GraftRecord, Manifest, Present, RECORD_FORMAT, WindowRecord};
use crate::refused::Refused;
use crate::room::AddressRoom;
use crate::snapshot::{Module, Worker};

/// What a plan is made of.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The caller's worker.
    pub caller: &'a Worker,
    /// The caller's library, analysed.
    pub code: &'a CodeMap,
    /// A worker of the callee's.
    pub callee: &'a Worker,
    /// The callee's name, as the caller's code passes it; `Bar/Baz` for what
    /// Bar calls where it is fused already.
    pub name: &'a str,
    /// What the caller's worker holds.
    pub present: Option<&'a Present>,
    /// The bridge.
    pub bridge: &'a Image,
    /// Bytes left below the worker's memory limit, where there is one.
    pub memory_room: Option<u64>,
    /// What the caller's limits of address space leave.
    pub address_room: AddressRoom,
    /// Most bytes of a window: what the kernel lets be written in one go.
    pub longest_window: usize,
    /// The caller's worker's own `invoke_func`, live, or why it is not known.
    pub invoke: &'a Result<u64, Refused>,
    /// The caller's worker, as it is now.
    pub live: &'a dyn Live,
    /// What is asked for. The plan is made whatever the callee touches, and
    /// says what would have to be allowed.
    pub wanted: Wanted,
    /// Analyses of code, which are the same whenever they are made.
    pub analyses: &'a Analyses,
}

/// Plans the patch.
///
/// # Errors
/// The first reason found why it cannot be done right.
pub fn plan(input: &Input<'_>) -> Result<PatchPlan, Refused> {
    let callee = input.callee.function();
    load::same_c_library(input.caller, input.callee)?;
    load::check(&callee.path, &callee.image)?;
    load::check_exports(&callee.path, &callee.image)?;
    if input.wanted.guard {
        guard::check(input.caller, input.callee)?;
    }
    let parent = parent(input)?;
    let sites = match parent {
        0 => usable_sites(input)?,
        _ => Sites::default(),
    };
    let entry = entry_window(input)?;
    refuse_reentry(input.caller.function())?;
    let build_id = identity(&callee.image);
    let dependencies = dependencies(input.callee)?;
    let reused = input.present.and_then(|present| {
        let index = present
            .manifest
            .grafts
            .iter()
            .position(|g| !g.replaced && g.callee == input.name)?;
        let graft = &present.manifest.grafts[index];
        let same = graft.build_id == build_id
            && graft.dependencies == dependencies
            && graft.parent == parent;
        (same && !present.failed(index)).then_some(index)
    });
    let mut plan = match (input.present, reused) {
        (Some(present), Some(index)) => again(input, present, index, &sites)?,
        _ => fresh(input, &sites, &entry, build_id)?,
    };
    dynamic::complete(input, &sites, &mut plan)?;
    if !plan.already {
        generation_after(input, &mut plan)?;
    }
    Ok(plan)
}

/// Numbers the record that the plan writes, and looks whether there is room for
/// it.
pub(super) fn generation_after(input: &Input<'_>, plan: &mut PatchPlan) -> Result<(), Refused> {
    let before = input.present.map_or(0, |p| p.manifest.generation);
    plan.manifest.generation = before.saturating_add(1);
    plan.manifest.format = RECORD_FORMAT;
    plan.manifest.encode().map(drop)
}

/// The window at the entry of the caller's `faas_func_call`.
pub(super) fn entry_window(input: &Input<'_>) -> Result<Window, Refused> {
    let no_entry = |reason: String| Refused::NoEntryWindow {
        library: input.caller.function().path.clone(),
        reason,
    };
    let entry = input.code.entry_window("faas_func_call");
    let entry = entry.map_err(|reason| no_entry(reason.to_string()))?;
    in_one_go(input.longest_window, &entry).map_err(no_entry)?;
    Ok(entry)
}

/// The graft whose calls are meant, live; 0 for the worker's own function.
pub(super) fn parent(input: &Input<'_>) -> Result<u64, Refused> {
    let Some((above, _)) = input.name.rsplit_once('/') else {
        return Ok(0);
    };
    let manifest = input.present.map(|present| &present.manifest);
    let graft = manifest.and_then(|manifest| manifest.graft(above));
    graft
        .map(|graft| graft.graft)
        .ok_or_else(|| Refused::NotFused {
            callee: above.to_owned(),
            pid: input.caller.pid,
        })
}

/// A library that reaches its own `faas_func_call` through a relocation (its
/// PLT, a pointer) may enter it by a tail call, which looks like the worker's
/// own entry: outputs would be dropped too early.
pub(super) fn refuse_reentry(library: &Module) -> Result<(), Refused> {
    let image = &library.image;
    let entry = load::export(image, "faas_func_call");
    let itself = image.dynamic.relocations.iter().any(|r| {
        let by_name = image
            .symbols
            .get(r.symbol as usize)
            .is_some_and(|s| r.symbol != 0 && s.name == "faas_func_call");
        let by_address = r.symbol == 0 && r.addend.is_some_and(|a| Some(a as u64) == entry);
        by_name || by_address
    });
    if itself {
        return Err(Refused::NoEntryWindow {
            library: library.path.clone(),
            reason: "the library refers to its own faas_func_call, so an entry may be a nested one"
                .into(),
        });
    }
    Ok(())
}

/// Whether this kernel lets the window be written in one go; why not.
pub(super) fn in_one_go(most: usize, window: &Window) -> Result<(), String> {
    if window.before.len() > most {
        return Err(format!(
            "the kernel forbids forced writes to /proc/PID/mem, and the window of {} bytes is longer than the {most} that ptrace writes in one go",
            window.before.len()
        ));
    }
    Ok(())
}

#[derive(Default)]
pub(super) struct Sites {
    pub(super) usable: Vec<(Site, Window)>,
    pub(super) unfused: Vec<Unfused>,
}

fn usable_sites(input: &Input<'_>) -> Result<Sites, Refused> {
    let library = input.caller.function();
    let mut sites = Sites {
        usable: Vec::new(),
        unfused: Vec::new(),
    };
    for site in input.code.sites(input.name) {
        let window = site.window.as_ref().map_err(ToString::to_string);
        match window.and_then(|window| in_one_go(input.longest_window, window).map(|()| window)) {
            Ok(window) => sites.usable.push((site.clone(), window.clone())),
            Err(reason) => {
                sites.unfused.push(Unfused {
                    at: site.at.0.wrapping_add(library.bias),
                    reason,
                });
            }
        }
    }
    // A worker that has the callee already has shown that it is called.
    let known = input
        .present
        .is_some_and(|p| p.manifest.graft(input.name).is_some());
    let none = sites.usable.is_empty() && sites.unfused.is_empty();
    if none && !known && !input.code.may_pass_other_names() {
        return Err(Refused::NoSite {
            library: library.path.clone(),
            callee: input.name.into(),
        });
    }
    Ok(sites)
}

/// The build-id, or where there is none a digest of the file.
fn identity(image: &Image) -> String {
    match &image.build_id {
        Some(id) => hex(id),
        None => format!(
            "crc32-{:08x}-{}",
            crc32fast::hash(&image.bytes),
            image.bytes.len()
        ),
    }
}

/// A digest of what the function has copies of besides its own library; empty
/// for none.
pub(super) fn dependencies(callee: &Worker) -> Result<String, Refused> {
    let private = load::private_libraries(callee)?;
    if private.is_empty() {
        return Ok(String::new());
    }
    let all: Vec<String> = private.iter().map(|m| identity(&m.image)).collect();
    Ok(format!("{:08x}", crc32fast::hash(all.join(" ").as_bytes())))
}

/// The image is there: open the gate and put back the windows. The stores are
/// made again: an agent that died between record and commit left them undone.
fn again(
    input: &Input<'_>,
    present: &Present,
    index: usize,
    sites: &Sites,
) -> Result<PatchPlan, Refused> {
    let manifest = present.manifest.clone();
    let graft = &manifest.grafts[index];
    let windows: Vec<WindowRecord> = manifest
        .windows
        .iter()
        .enumerate()
        .filter(|(i, _)| !present.in_place(*i) && !present.is_gone(*i))
        .filter(|(_, w)| w.serves_all() || w.passed_by(input.name))
        .map(|(_, w)| w.clone())
        .collect();
    // The gate is stored after everything else that is not a window.
    let guarded = present.guards[index];
    let already = windows.is_empty() && present.gates[index] && guarded == input.wanted.guard;
    Ok(PatchPlan {
        already,
        build_id: graft.build_id.clone(),
        stores: if already {
            Vec::new()
        } else {
            let found = imports_found(input.caller, manifest.worker);
            let call = guard::store(&manifest, graft, input.wanted.guard)?;
            [found, vec![call], stores(&manifest, graft)].concat()
        },
        windows: in_order(windows),
        gate: manifest.gate(graft),
        unfused: sites.unfused.clone(),
        slot: other_slot(Some(present)),
        ..base(input, manifest.clone())
    })
}

/// What the running bridge must learn about a graft. An older image of the
/// same callee gives up its place, in the table and in every site.
pub(super) fn stores(manifest: &Manifest, graft: &GraftRecord) -> Vec<Store> {
    let mut stores: Vec<Store> = manifest
        .grafts
        .iter()
        .filter(|g| g.replaced && g.callee == graft.callee)
        .map(|old| Store {
            address: manifest.gate(old),
            bytes: vec![0],
            what: "gate of an older image".into(),
        })
        .collect();
    let worker = manifest.worker;
    let count = manifest
        .grafts
        .iter()
        .map(|g| g.slot + 1)
        .max()
        .unwrap_or(0);
    stores.push(Store {
        address: worker + (offset_of!(abi::Worker, grafts) + graft.slot * 8) as u64,
        bytes: graft.graft.to_le_bytes().into(),
        what: format!("table of grafts: entry {}", graft.slot),
    });
    stores.push(Store {
        address: worker + offset_of!(abi::Worker, count) as u64,
        bytes: vec![count as u8],
        what: "table of grafts: its length".into(),
    });
    for window in manifest
        .windows
        .iter()
        .filter(|w| w.cached.as_deref() == Some(&graft.callee))
    {
        stores.push(Store {
            address: window
                .site
                .wrapping_add(offset_of!(abi::Site, graft) as u64),
            bytes: graft.graft.to_le_bytes().into(),
            what: format!("inline cache of the site {:#x}", window.address),
        });
    }
    stores
}

pub(super) fn base(input: &Input<'_>, manifest: Manifest) -> PatchPlan {
    let library = input.caller.function();
    PatchPlan {
        pid: input.caller.pid,
        start_time: input.caller.start_time,
        caller_library: library.path.clone(),
        caller_bias: library.bias,
        callee: input.name.to_owned(),
        callee_library: input.callee.function().path.clone(),
        build_id: String::new(),
        already: false,
        mapping: None,
        islands: Vec::new(),
        relocations: (0, 0),
        libraries: Vec::new(),
        initialisers: 0,
        stores: Vec::new(),
        windows: Vec::new(),
        unfused: Vec::new(),
        through_routine: Vec::new(),
        gate: 0,
        guarded: input.wanted.guard,
        effects: effects_of(input),
        manifest,
        slot: 1,
    }
}

/// What the function and its private libraries show.
fn effects_of(input: &Input<'_>) -> Vec<Effect> {
    // A list that is not consistent was refused before.
    let private = load::private_libraries(input.callee).unwrap_or_default();
    effects::of_function(input.callee, &private, input.wanted.allowed)
}

pub(super) fn other_slot(present: Option<&Present>) -> u8 {
    if present.is_some_and(|p| p.slot == 1) {
        2
    } else {
        1
    }
}

/// The entry first: outputs must be reclaimed from the first fused call on.
pub(super) fn in_order(mut windows: Vec<WindowRecord>) -> Vec<WindowRecord> {
    windows.sort_by_key(|w| !w.entry);
    windows
}

/// The analysis of a caller's library, as a refusal where it fails.
///
/// # Errors
/// The library is not well-formed.
pub fn analyse(library: &Module, analyses: &Analyses) -> Result<Arc<CodeMap>, Refused> {
    let code = analyses.library(&library.image.bytes);
    code.map_err(|e| Refused::Analysis {
        library: library.path.clone(),
        reason: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::{ImageAddress, Target, WindowKind};

    #[test]
    fn a_window_is_none_where_it_cannot_be_written_in_one_go() {
        let of = |length| Window {
            start: ImageAddress(0x1000),
            before: vec![0x90; length],
            kind: WindowKind::Call,
            target: Target::Memory,
            branch: 0,
            hop: None,
        };
        assert_eq!(in_one_go(8, &of(8)), Ok(()));
        let why = in_one_go(8, &of(9)).unwrap_err();
        assert!(
            why.contains("9 bytes") && why.contains("the 8 that"),
            "{why}"
        );
        assert_eq!(in_one_go(4096, &of(9)), Ok(()));
    }
}
