//! What a plan needs beyond the sites with a constant name.
//!
//! ```text
//!  a site without a window, no site known,   ─► the entry of the worker's own
//!  or a name that is computed elsewhere          routine, below its executable
//!  calls seen at that entry                  ─► their sites, each near its library
//!  names of all grafts                       ─► the bridge's table
//! ```
//!
//! These windows serve every callee: they are put in place with the first edge
//! that is fused and go with the last.

use std::collections::BTreeMap;
use std::mem::offset_of;

use nightgraft_bridge::{abi, names};

use super::build::{Input, Sites, in_one_go, in_order, stores};
use super::layout::{self, Area};
use super::led::Led;
use super::{Access, Mapping, Part, PatchPlan, Store, Unfused, placement};
use crate::code::{CodeMap, ImageAddress, Tail, Window};
use crate::elf::hex;
use crate::manifest::{Manifest, Present, Region, WindowRecord};
use crate::refused::Refused;
use crate::room;
use crate::snapshot::{Map, Module};

const PAGE: u64 = 4096;
/// Room for one stub.
const STUB: u64 = 512;
/// Modules whose code is the system's: nothing there is the caller's site.
const SYSTEM: [&str; 9] = [
    "libc.so.6",
    "libm.so.6",
    "ld-linux-x86-64.so.2",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libc++.so.1",
];

/// Completes a plan that is otherwise done.
pub(super) fn complete(
    input: &Input<'_>,
    sites: &Sites,
    plan: &mut PatchPlan,
) -> Result<(), Refused> {
    // A library may call the callee by a constant at one site and by a name
    // that only running tells at another, which a site of its own does not lead
    // anywhere. What it costs is a look at the name in every call that stays an
    // RPC, until its site has been seen.
    let needed =
        sites.usable.is_empty() || !sites.unfused.is_empty() || input.code.may_pass_other_names();
    if needed && !sites.usable.is_empty() && !plan.has_routine() {
        // Some sites are better than none: where there is no window, or no
        // memory for it, they do without.
        let mut whole = plan.clone();
        if complete_with(input, &mut whole, true).is_ok() {
            *plan = whole;
            return Ok(());
        }
        return complete_with(input, plan, false);
    }
    complete_with(input, plan, needed)
}

/// Completes a plan that cannot do without the routine's window.
pub(super) fn with_routine(input: &Input<'_>, plan: &mut PatchPlan) -> Result<(), Refused> {
    if !plan.manifest.windows.iter().any(|w| w.routine) {
        let mut island = routine(input, plan)?;
        for window in &mut island.windows {
            window.for_observing = true;
        }
        plan.already = false;
        add(plan, island);
        plan.windows = in_order(std::mem::take(&mut plan.windows));
    }
    complete_with(input, plan, false)
}

/// The same, with the routine's window or as it is.
fn complete_with(
    input: &Input<'_>,
    plan: &mut PatchPlan,
    with_routine: bool,
) -> Result<(), Refused> {
    let before = plan.manifest.windows.clone();
    if with_routine && !plan.has_routine() {
        match plan.manifest.windows.iter().position(|w| w.routine) {
            // It is there for the counting of calls.
            Some(index) => take_over(input, plan, index),
            None => {
                let island = routine(input, plan)?;
                add(plan, island);
            }
        }
    }
    if plan.has_routine() {
        plan.through_routine = std::mem::take(&mut plan.unfused);
        seen(input, plan);
    }
    if plan.manifest.windows != before {
        if plan.already {
            plan.already = false;
            if let Some(graft) = plan.manifest.graft(input.name) {
                plan.stores = stores(&plan.manifest, graft);
            }
        }
        plan.windows = in_order(std::mem::take(&mut plan.windows));
        plan.manifest.encode()?;
    }
    if !plan.already {
        plan.stores.extend(tables(&plan.manifest));
    }
    if plan.mapped_bytes() == 0 {
        return Ok(());
    }
    (input.address_room).is_enough(plan.mapped_bytes(), plan.writable_bytes())?;
    room::fits(plan.resident_bytes(), input.memory_room)
}

/// The routine's window, which was for the counting of calls, is an edge's as well.
fn take_over(input: &Input<'_>, plan: &mut PatchPlan, index: usize) {
    let window = &mut plan.manifest.windows[index];
    window.for_observing = false;
    let there = |p: &Present| p.in_place(index) || p.is_gone(index);
    if !input.present.is_some_and(there) {
        plan.windows.push(window.clone());
    }
}

/// The bridge's table of names, and where RPCs go on behind the routine's
/// window; made anew each time.
fn tables(manifest: &Manifest) -> Vec<Store> {
    // What only a fused callee calls is not called by a site.
    let grafts = (manifest.grafts.iter()).filter(|g| !g.replaced && g.parent == 0);
    let names = names::fill(grafts.map(|g| (g.callee.as_bytes(), g.slot)));
    let field = |offset: usize| manifest.worker + offset as u64;
    let mut all = vec![Store {
        address: field(offset_of!(abi::Worker, names)),
        bytes: names.into(),
        what: "table of names".into(),
    }];
    let routine = manifest.windows.iter().find(|w| w.routine);
    if let Some(&(_, resume)) = routine.and_then(|w| w.copies.first()) {
        all.push(Store {
            address: field(offset_of!(abi::Worker, resume)),
            bytes: resume.to_le_bytes().into(),
            what: "where the RPC goes on behind the routine's window".into(),
        });
    }
    all
}

/// A mapping of its own, and the windows that lead there.
struct Island {
    mapping: Mapping,
    windows: Vec<WindowRecord>,
}

fn add(plan: &mut PatchPlan, island: Island) {
    plan.manifest.regions.push(island.mapping.reservation);
    plan.manifest.windows.extend(island.windows.iter().cloned());
    plan.windows.extend(island.windows);
    plan.islands.push(island.mapping);
}

/// The mappings as they will be once what is planned so far is there.
fn maps(input: &Input<'_>, plan: &PatchPlan) -> Vec<Map> {
    let planned = plan.mappings().map(|m| Map {
        start: m.reservation.start,
        end: m.reservation.start + m.reservation.len,
        writable: false,
        executable: false,
        name: String::new(),
    });
    let mut all: Vec<Map> = input.caller.maps.iter().cloned().chain(planned).collect();
    all.sort_by_key(|m| m.start);
    all
}

fn range(module: &Module) -> (u64, u64) {
    (
        module.image.low().wrapping_add(module.bias),
        module.image.high().wrapping_add(module.bias),
    )
}

/// The window at the entry of the worker's own routine.
fn routine(input: &Input<'_>, plan: &PatchPlan) -> Result<Island, Refused> {
    let invoke = input.invoke.clone()?;
    let executable = input.caller.executable();
    let no_window = |reason: String| Refused::NoRoutineWindow {
        executable: executable.path.clone(),
        reason,
    };
    let code = input.analyses.executable(&executable.image.bytes);
    let code = code.map_err(|e| no_window(e.to_string()))?;
    let window = code
        .window(ImageAddress(invoke.wrapping_sub(executable.bias)))
        .map_err(|e| no_window(e.to_string()))?;
    in_one_go(input.longest_window, &window).map_err(no_window)?;
    let span = range(executable);
    let start = placement::below(&maps(input, plan), span, island_len(1)).ok_or_else(|| {
        Refused::NoRoomNear {
            library: executable.path.clone(),
            bytes: island_len(1),
        }
    })?;
    let found = Found {
        window,
        returns: Vec::new(),
    };
    island(plan, executable, start, &[found], true).map_err(no_window)
}

/// Rewrites the sites that calls were seen to come from, and notes those that
/// can't be. A library that holds none costs nothing.
fn seen(input: &Input<'_>, plan: &mut PatchPlan) {
    let (Some(present), Ok(invoke)) = (input.present, input.invoke) else {
        return;
    };
    let Some(graft) = present.manifest.graft(input.name) else {
        return;
    };
    let known = |plan: &PatchPlan, to: u64| {
        let mut windows = plan.manifest.windows.iter();
        windows.any(|w| w.returns_to(to))
    };
    let calls: Vec<_> = present
        .unresolved(graft)
        .map(|call| call.seen)
        .filter(|seen| !known(plan, seen.return_address))
        .collect();
    for (index, module) in input.caller.modules.iter().enumerate() {
        let (low, high) = range(module);
        let here: Vec<_> = calls
            .iter()
            .filter(|c| (low..high).contains(&c.return_address))
            .collect();
        if here.is_empty() {
            continue;
        }
        let own;
        let code: &CodeMap = if index == input.caller.library {
            input.code
        } else if index == 0 || SYSTEM.contains(&module.short_name()) {
            continue;
        } else if let Ok(code) = super::analyse(module, input.analyses) {
            own = code;
            &own
        } else {
            continue;
        };
        let mut found: Vec<Found> = Vec::new();
        let mut windows = BTreeMap::new();
        for call in here {
            let to = call.return_address;
            let site = match code.seen(call, module.bias, *invoke, input.live) {
                Ok(site) => site,
                Err(reason) => {
                    note(plan, to, &reason.to_string());
                    continue;
                }
            };
            // Several calls may lead to one jump, some of them seen before it
            // was rewritten for others.
            let at = site.at.0.wrapping_add(module.bias);
            let windows_known = &mut plan.manifest.windows;
            if let Some(window) = windows_known.iter_mut().find(|w| w.leads_away(at)) {
                window.returns.push(to);
                continue;
            }
            if let Some(&index) = windows.get(&site.at) {
                let other: &mut Found = &mut found[index];
                other.returns.push(to);
                continue;
            }
            let live = |(start, end): (u64, u64)| {
                let bias = module.bias;
                (start.wrapping_add(bias), end.wrapping_add(bias))
            };
            let taken: Vec<(u64, u64)> = plan
                .manifest
                .windows
                .iter()
                .map(|w| (w.address, w.end()))
                .chain(found.iter().flat_map(|f| f.window.ranges()).map(live))
                .collect();
            let window = code.seen_window(site, module.bias, &taken);
            let window = window.map_err(|e| e.to_string());
            match window.and_then(|w| in_one_go(input.longest_window, &w).map(|()| w)) {
                Ok(window) => {
                    windows.insert(site.at, found.len());
                    found.push(Found {
                        window,
                        returns: vec![to],
                    });
                }
                Err(reason) => note(plan, to, &reason),
            }
        }
        if found.is_empty() {
            continue;
        }
        let len = island_len(found.len());
        let start = placement::near(&maps(input, plan), (low, high), len);
        match start.map(|start| island(plan, module, start, &found, false)) {
            Some(Ok(island)) => add(plan, island),
            // They go on through the routine's entry.
            Some(Err(reason)) => note(plan, low, &reason),
            None => note(plan, low, "there is no room near the library"),
        }
    }
}

/// Where calls are to be led away from.
struct Found {
    window: Window,
    /// Return addresses of the calls that were seen to lead there, live.
    returns: Vec<u64>,
}

fn note(plan: &mut PatchPlan, at: u64, reason: &str) {
    plan.through_routine.push(Unfused {
        at,
        reason: reason.to_owned(),
    });
}

/// Bytes of an island of so many windows: stubs, then their records.
fn island_len(windows: usize) -> u64 {
    let record = size_of::<abi::Site>().max(size_of::<abi::Routine>()) as u64;
    stubs_len(windows) + (windows as u64 * record).next_multiple_of(PAGE)
}

fn stubs_len(windows: usize) -> u64 {
    (windows as u64 * STUB).next_multiple_of(PAGE)
}

fn island(
    plan: &PatchPlan,
    module: &Module,
    start: u64,
    found: &[Found],
    routine: bool,
) -> Result<Island, String> {
    let manifest = &plan.manifest;
    let stubs = Region {
        start,
        len: stubs_len(found.len()),
    };
    let mut area = Area::new(start + stubs.len);
    let mut code: Vec<u8> = Vec::new();
    let mut records = Vec::new();
    for Found { window, returns } in found {
        code.resize(code.len().next_multiple_of(16), 0xcc);
        let at = start + code.len() as u64;
        let record = if routine {
            area.reserve(size_of::<abi::Routine>(), align_of::<abi::Routine>())
        } else {
            area.reserve(size_of::<abi::Site>(), align_of::<abi::Site>())
        };
        let tail = if routine {
            Tail::Routine {
                record,
                bridge_entry: manifest.bridge.routine,
            }
        } else {
            Tail::Bridge {
                site_record: record,
                bridge_entry: manifest.bridge.enter,
            }
        };
        let stub = window
            .stub(module.bias, at, &tail)
            .map_err(|e| e.to_string())?;
        if stub.bytes.len() as u64 > STUB {
            return Err(format!(
                "the stub of {} has {} bytes",
                hex(&window.before),
                stub.bytes.len()
            ));
        }
        let copies: Vec<(u8, u64)> = stub
            .boundaries
            .iter()
            .map(|(from, to)| (*from, at + u64::from(*to)))
            .collect();
        if routine {
            let resume = copies.first().map_or(0, |(_, to)| *to);
            area.put_u64(
                record + offset_of!(abi::Routine, worker) as u64,
                manifest.worker,
            );
            area.put_u64(record + offset_of!(abi::Routine, resume) as u64, resume);
        } else {
            layout::site(&mut area, record, 0, 0, manifest.worker);
        }
        let led = Led {
            window,
            bias: module.bias,
            stub: at,
        };
        records.extend(
            led.records(WindowRecord {
                routine,
                dynamic: !routine,
                site: record,
                copies,
                returns: match window.kind.is_call() {
                    true => Vec::new(),
                    false => returns.clone(),
                },
                ..WindowRecord::default()
            })
            .map_err(|e| e.to_string())?,
        );
        code.extend(stub.bytes);
    }
    let part = |what: &str, region: Region, access, bytes| Part {
        what: what.to_owned(),
        start: region.start,
        len: region.len,
        access,
        bytes,
    };
    let data = Region {
        start: area.base,
        len: (area.bytes.len() as u64).next_multiple_of(PAGE),
    };
    let what = if routine {
        "stub of the worker's own routine"
    } else {
        "stubs of sites seen at run time"
    };
    Ok(Island {
        mapping: Mapping {
            reservation: Region {
                start,
                len: stubs.len + data.len,
            },
            parts: vec![
                part(what, stubs, Access::ReadExecute, code),
                part("records", data, Access::ReadWrite, area.bytes),
            ],
            control: None,
            thread_field: None,
        },
        windows: records,
    })
}
