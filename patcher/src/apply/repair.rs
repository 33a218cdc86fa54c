//! Putting right what a dead agent left: each of these is one step of
//! [`crate::recover`], and harmless to repeat.

use std::mem::offset_of;

use nightgraft_bridge::abi::{Control, MAGIC};
use ptrace_shim::{Address, Gadgets, Memory};

use super::prepare::{call, unmap_region, with_borrowed, write_record};
use super::{ApplyError, Limits, on_tracer_thread, open};
use crate::faults::{self, hit};
use crate::manifest::{CONTROL_PATH, Manifest, Region};

/// Closes descriptors of control areas. Each is looked at once more in the
/// stop, since the worker may have closed it and taken its number again.
pub(crate) fn close(
    pid: i32,
    start_time: u64,
    descriptors: &[i32],
    limits: &Limits,
) -> Result<(), ApplyError> {
    on_tracer_thread(|| {
        let process = open(pid, start_time)?;
        let gadgets = Gadgets::find(&Memory::open(&process)?)?;
        let (mut stops, mut disturbed) = (Vec::new(), Vec::new());
        with_borrowed(
            &process,
            &gadgets,
            None,
            limits,
            &mut stops,
            &mut disturbed,
            |borrowed| {
                for fd in descriptors {
                    let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
                    let ours = link.is_ok_and(|to| {
                        let to = to.to_string_lossy();
                        to.strip_suffix(" (deleted)").unwrap_or(&to) == CONTROL_PATH
                    });
                    if ours {
                        let arguments = [*fd as u64, 0, 0, 0, 0, 0];
                        call(borrowed, pid, "close", libc::SYS_close, arguments)?;
                    }
                }
                Ok(())
            },
        )?;
        hit(faults::RECOVER_CLOSED);
        Ok(())
    })
}

/// Unmaps reservations that nothing leads to.
pub(crate) fn unmap(
    pid: i32,
    start_time: u64,
    regions: &[Region],
    limits: &Limits,
) -> Result<(), ApplyError> {
    on_tracer_thread(|| {
        let process = open(pid, start_time)?;
        let gadgets = Gadgets::find(&Memory::open(&process)?)?;
        let (mut stops, mut disturbed) = (Vec::new(), Vec::new());
        with_borrowed(
            &process,
            &gadgets,
            None,
            limits,
            &mut stops,
            &mut disturbed,
            |borrowed| {
                regions
                    .iter()
                    .try_for_each(|region| unmap_region(borrowed, pid, *region))
            },
        )?;
        hit(faults::RECOVER_UNMAPPED);
        Ok(())
    })
}

/// Writes the record, to the slot that does not hold.
pub(crate) fn record(pid: i32, start_time: u64, record: &Manifest) -> Result<(), ApplyError> {
    let process = open(pid, start_time)?;
    let memory = Memory::open(&process)?;
    let mut head = [0; size_of_val(&MAGIC)];
    memory.read(Address(record.control), &mut head)?;
    let mut which = [0];
    let holds = record.control + offset_of!(Control, manifest) as u64;
    memory.read(Address(holds), &mut which)?;
    let slot = if which[0] == 1 { 2 } else { 1 };
    // Whatever of its head is lost: all of it is written.
    write_record(&process, record, slot, true)?;
    hit(faults::RECOVER_RECORDED);
    Ok(())
}
