//! The plan that has a worker's calls counted: the bridge, where there is none
//! yet, and the windows at the entries of its own `invoke_func` and of
//! `faas_func_call`.
//!
//! No code of another function's comes into it. Where the function's entry has no
//! window, RPCs alone are counted.

use std::mem::offset_of;

use nightgraft_bridge::abi;

use super::build::{
    Input, base, entry_window, generation_after, in_order, other_slot, refuse_reentry,
};
use super::fresh::{bridge_alone, imports_found};
use super::{PatchPlan, Store, dynamic};
use crate::manifest::{OBSERVING, Present, WindowRecord};
use crate::refused::Refused;

/// Plans it. The input's callee is the caller itself, and its name
/// [`OBSERVING`].
///
/// # Errors
/// The first reason found why it cannot be done right.
pub fn observe(input: &Input<'_>) -> Result<PatchPlan, Refused> {
    debug_assert_eq!(input.name, OBSERVING);
    let mut plan = match input.present {
        Some(present) => again(input, present),
        None => {
            let entry = entry_window(input).ok();
            let may = refuse_reentry(input.caller.function()).is_ok();
            bridge_alone(input, entry.as_ref().filter(|_| may))?
        }
    };
    plan.effects = Vec::new();
    plan.callee_library = String::new();
    dynamic::with_routine(input, &mut plan)?;
    if !plan.already {
        plan.stores.push(Store {
            address: plan.manifest.worker + offset_of!(abi::Worker, dirty) as u64,
            bytes: vec![1],
            what: "every call of the function comes by".into(),
        });
        generation_after(input, &mut plan)?;
    }
    Ok(plan)
}

/// The bridge is there: put back what is missing.
fn again(input: &Input<'_>, present: &Present) -> PatchPlan {
    let manifest = present.manifest.clone();
    let windows: Vec<WindowRecord> = (manifest.windows.iter().enumerate())
        .filter(|(i, w)| (w.entry || w.routine) && !present.in_place(*i) && !present.is_gone(*i))
        .map(|(_, w)| w.clone())
        .collect();
    let already = windows.is_empty() && present.observing;
    PatchPlan {
        already,
        stores: match already {
            true => Vec::new(),
            false => imports_found(input.caller, manifest.worker),
        },
        windows: in_order(windows),
        gate: manifest.observing(),
        slot: other_slot(Some(present)),
        ..base(input, manifest)
    }
}
