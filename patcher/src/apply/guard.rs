//! Giving back the signals that a guard has taken over, when no edge is guarded
//! any more.
//!
//! The worker may be idle for good, so that the bridge would never come to it: a
//! borrowed thread does it, with the very calls that the bridge made. An action
//! that is not ours any more is left alone. Whatever fails leaves the guard as it
//! is, which is harmless: it passes on all that is not its own.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use nightgraft_bridge::abi::{
    self, ACTION_OURS, ACTION_THEIRS, Action, GUARD_WAITING, GUARDED_SIGNALS, Guard,
};
use ptrace_shim::{Address, Borrowed, Gadgets, Memory, Process};

use super::prepare::{call, with_borrowed};
use super::{ApplyError, Limits};
use crate::manifest::Manifest;
use crate::report::{RevertReceipt, SignalsBack};

/// Gives them back, and says in the receipt what the stop was like.
pub(super) fn give_back(
    process: &Process,
    manifest: &Manifest,
    limits: &Limits,
    receipt: &mut RevertReceipt,
) -> SignalsBack {
    let mut under_way = false;
    match drained(process, manifest, limits) {
        Ok(true) => {}
        Ok(false) => return SignalsBack::CallUnderWay,
        Err(error) => return not_reached(manifest, &error),
    }
    let (mut stops, mut disturbed) = (Vec::new(), Vec::new());
    let result = Memory::open(process)
        .and_then(|memory| Ok((Gadgets::find(&memory)?, memory)))
        .map_err(ApplyError::from)
        .and_then(|(gadgets, memory)| {
            with_borrowed(
                process,
                &gadgets,
                None,
                limits,
                &mut stops,
                &mut disturbed,
                |borrowed| {
                    under_way = in_flight(&memory, manifest)?;
                    if under_way {
                        return Ok(());
                    }
                    actions(borrowed, &memory, manifest)
                },
            )
        });
    receipt.stops_ns.extend(stops);
    receipt.disturbed.extend(disturbed);
    match result {
        Ok(()) if under_way => SignalsBack::CallUnderWay,
        Ok(()) => SignalsBack::GivenBack,
        Err(error) => not_reached(manifest, &error),
    }
}

fn not_reached(manifest: &Manifest, error: &ApplyError) -> SignalsBack {
    tracing::warn!(pid = manifest.pid, %error, "the guard's signals are not given back");
    SignalsBack::NotReached
}

/// Waits a moment for calls that began before the gate was closed; a thread in
/// one of them may not even be one that can be borrowed.
fn drained(process: &Process, manifest: &Manifest, limits: &Limits) -> Result<bool, ApplyError> {
    let memory = Memory::open(process)?;
    let since = Instant::now();
    while in_flight(&memory, manifest)? {
        if since.elapsed() > limits.stop {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// Whether a call of any callee is under way, guarded or not.
fn in_flight(memory: &Memory, manifest: &Manifest) -> Result<bool, ApplyError> {
    for graft in &manifest.grafts {
        let edge = manifest.edge(graft);
        let entered = edge + offset_of!(abi::SharedEdge, entered) as u64;
        let returned = edge + offset_of!(abi::SharedEdge, returned) as u64;
        if word(memory, entered)? != word(memory, returned)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn actions(
    borrowed: &mut Borrowed,
    memory: &Memory,
    manifest: &Manifest,
) -> Result<(), ApplyError> {
    let guard = manifest.worker + offset_of!(abi::Worker, guard) as u64;
    let probe = guard + offset_of!(Guard, probe) as u64;
    let handler = word(memory, guard + offset_of!(Guard, handler) as u64)?;
    let mut sigaction = |signal: u32, new: u64, old: u64| {
        let arguments = [u64::from(signal), new, old, 8, 0, 0];
        let name = "rt_sigaction";
        call(
            borrowed,
            manifest.pid,
            name,
            libc::SYS_rt_sigaction,
            arguments,
        )
    };
    for (index, signal) in GUARDED_SIGNALS.into_iter().enumerate() {
        let ours = guard + (offset_of!(Guard, ours) + index) as u64;
        let saved = guard + (offset_of!(Guard, saved) + index * size_of::<Action>()) as u64;
        let mut is = [0];
        memory.read(Address(ours), &mut is)?;
        if is[0] == ACTION_OURS {
            sigaction(signal, 0, probe)?;
            let now = word(memory, probe + offset_of!(Action, handler) as u64)?;
            if now == handler {
                sigaction(signal, saved, 0)?;
            }
        }
        // The next guarded call begins anew.
        memory.write(Address(ours), &[ACTION_THEIRS])?;
    }
    let left = guard + offset_of!(Guard, left) as u64;
    memory.write(Address(left), &0_u32.to_le_bytes())?;
    let state = guard + offset_of!(Guard, state) as u64;
    memory.write(Address(state), &[GUARD_WAITING])?;
    Ok(())
}

fn word(memory: &Memory, address: u64) -> Result<u64, ApplyError> {
    let mut bytes = [0; 8];
    memory.read(Address(address), &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
