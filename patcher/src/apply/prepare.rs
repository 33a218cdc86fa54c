//! Mapping and filling: everything before the worker's own code is touched.

use std::fs::File;
use std::mem::offset_of;
use std::time::{Duration, Instant};

use nightgraft_bridge::abi::{BRIDGE_VERSION, CONTROL_NAME, Control, MAGIC};
use nix::errno::Errno;
use ptrace_shim::{
    Address, Borrowed, Error, Gadgets, Memory, Process, StopOptions, StoppedThread, stop_thread,
};

use super::{ApplyError, Limits, commit, disturbance, filters, nanoseconds, options};
use crate::faults::{self, hit};
use crate::manifest::{Manifest, Region, WindowRecord, slot_address};
use crate::plan::{Access, Mapping, PatchPlan};
use crate::report::Disturbed;

/// Proof that the mapping is there, to be given back if it is not needed.
pub(super) struct Undo {
    gadgets: Gadgets,
    /// The control memory, if this patch made it: it is what tells what ran when
    /// the worker dies.
    pub(super) control: Option<File>,
}

/// Maps and fills. If it fails, what it mapped is unmapped again.
pub(super) fn prepare(
    process: &Process,
    plan: &PatchPlan,
    limits: &Limits,
    stops: &mut Vec<u64>,
    disturbed: &mut Vec<Disturbed>,
) -> Result<Undo, ApplyError> {
    let memory = Memory::open(process)?;
    let gadgets = Gadgets::find(&memory)?;
    let (mut thread_pointer, mut control) = (0, None);
    with_borrowed(
        process,
        &gadgets,
        Some(plan),
        limits,
        stops,
        disturbed,
        |borrowed| {
            thread_pointer = borrowed.registers().fs_base;
            map_all(borrowed, plan, &mut control)
        },
    )?;
    hit(faults::MAPPED);
    let undo = Undo { gadgets, control };
    let filled = plan
        .mappings()
        .try_for_each(|mapping| fill(process, &memory, mapping, thread_pointer, limits, stops));
    match filled {
        Ok(()) => {
            hit(faults::FILLED);
            Ok(undo)
        }
        Err(failure) => {
            // Written down as being mapped: unmapped or not, that is true.
            take_back(process, plan, &undo, limits);
            Err(failure)
        }
    }
}

/// Checks what a plan that maps nothing will have called in the worker.
pub(super) fn foresee(
    process: &Process,
    plan: &PatchPlan,
    limits: &Limits,
    stops: &mut Vec<u64>,
    disturbed: &mut Vec<Disturbed>,
) -> Result<(), ApplyError> {
    let gadgets = Gadgets::find(&Memory::open(process)?)?;
    let nothing = |_: &mut Borrowed| Ok(());
    with_borrowed(
        process,
        &gadgets,
        Some(plan),
        limits,
        stops,
        disturbed,
        nothing,
    )
}

/// Unmaps what [`prepare`] mapped. Nothing leads there; if it cannot be
/// unmapped, unused memory stays behind for now, which is harmless. Gives
/// whether it was.
pub(super) fn take_back(process: &Process, plan: &PatchPlan, undo: &Undo, limits: &Limits) -> bool {
    let gadgets = &undo.gadgets;
    let unrecorded = unrecord(process, plan);
    let (mut stops, mut disturbed) = (Vec::new(), Vec::new());
    let result = unrecorded.and_then(|()| {
        hit(faults::UNRECORDED);
        with_borrowed(
            process,
            gadgets,
            None,
            limits,
            &mut stops,
            &mut disturbed,
            |borrowed| {
                plan.mappings()
                    .try_for_each(|mapping| unmap(borrowed, plan.pid, mapping))
            },
        )
    });
    if let Err(error) = &result {
        tracing::warn!(pid = plan.pid, %error, bytes = plan.mapped_bytes(), "unused memory stays in the worker");
    } else {
        hit(faults::TAKEN_BACK);
    }
    result.is_ok()
}

/// Stops the worker's main thread, borrows it, and gives it back whatever
/// happens. A thread that can't be borrowed just now is tried again, and so is
/// one whose signal handler interrupted one of the `plan`'s windows: the commit
/// would have to wait for it, and nothing should be mapped for a patch that may
/// never come to that. What the plan needs to call is checked first; without a
/// plan, what was called before is taken back.
pub(super) fn with_borrowed(
    process: &Process,
    gadgets: &Gadgets,
    plan: Option<&PatchPlan>,
    limits: &Limits,
    stops: &mut Vec<u64>,
    disturbed: &mut Vec<Disturbed>,
    work: impl FnOnce(&mut Borrowed) -> Result<(), ApplyError>,
) -> Result<(), ApplyError> {
    let since = Instant::now();
    let windows: &[WindowRecord] = plan.map_or(&[], |plan| &plan.windows);
    let mut seen = None;
    let mut borrowed = loop {
        let maps = commit::ranges(process)?;
        match stop(process, options(limits)) {
            Ok(stopped) => {
                disturbed.extend(stopped.disturbed().as_ref().map(disturbance));
                if let Some(plan) = plan {
                    filters::check(&stopped, gadgets, plan)?;
                }
                match commit::interrupted_site(&stopped, windows, &maps) {
                    Some(reason) => {
                        stopped.resume()?;
                        seen = Some(reason);
                    }
                    None => match stopped.borrow(gadgets) {
                        Ok(borrowed) => break borrowed,
                        Err(Error::NotBorrowable { reason, .. }) => seen = Some(reason.to_string()),
                        Err(other) => return Err(other.into()),
                    },
                }
            }
            // A thread that wants a processor on a busy node, and may have it
            // the next time.
            Err(Error::Timeout { .. }) if since.elapsed() <= limits.commit => {}
            Err(timeout @ Error::Timeout { .. }) if seen.is_none() => return Err(timeout.into()),
            Err(Error::Timeout { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        if since.elapsed() > limits.commit
            && let Some(reason) = seen
        {
            return Err(ApplyError::NoMoment {
                pid: process.pid().as_raw(),
                waited: since.elapsed(),
                reason,
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let result = work(&mut borrowed);
    let stopped = borrowed.give_back()?;
    stops.push(nanoseconds(stopped.resume()?));
    result
}

fn stop(process: &Process, options: StopOptions) -> Result<StoppedThread, Error> {
    stop_thread(process, process.pid().leader(), options)
}

const NONE: u64 = u64::MAX; // no descriptor: -1

/// Maps all, or nothing.
fn map_all(
    borrowed: &mut Borrowed,
    plan: &PatchPlan,
    kept: &mut Option<File>,
) -> Result<(), ApplyError> {
    for (index, mapping) in plan.mappings().enumerate() {
        if let Err(failure) = map(borrowed, plan.pid, mapping, kept) {
            for mapped in plan.mappings().take(index) {
                let _ = unmap(borrowed, plan.pid, mapped);
            }
            return Err(failure);
        }
    }
    Ok(())
}

fn map(
    borrowed: &mut Borrowed,
    pid: i32,
    mapping: &Mapping,
    kept: &mut Option<File>,
) -> Result<(), ApplyError> {
    let whole = mapping.reservation;
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
    let at = mmap(
        borrowed,
        pid,
        whole.start,
        whole.len,
        Access::Read,
        flags,
        NONE,
    )?;
    if at != whole.start {
        // A kernel before 4.17 takes the address for a hint.
        let _ = call(
            borrowed,
            pid,
            "munmap",
            libc::SYS_munmap,
            [at, whole.len, 0, 0, 0, 0],
        );
        return Err(ApplyError::Occupied {
            pid,
            at: whole.start,
        });
    }
    let result = map_parts(borrowed, pid, mapping, kept);
    if result.is_err() {
        let _ = unmap(borrowed, pid, mapping);
    }
    result
}

fn map_parts(
    borrowed: &mut Borrowed,
    pid: i32,
    mapping: &Mapping,
    kept: &mut Option<File>,
) -> Result<(), ApplyError> {
    let fixed = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    for part in mapping.parts.iter().filter(|p| p.access != Access::Read) {
        mmap(
            borrowed,
            pid,
            part.start,
            part.len,
            part.access,
            fixed,
            NONE,
        )?;
    }
    let Some(control) = mapping.control else {
        return Ok(());
    };
    let name: Vec<u8> = CONTROL_NAME.bytes().chain([0]).collect();
    let name = borrowed.put(0, &name)?;
    let fd = call(
        borrowed,
        pid,
        "memfd_create",
        libc::SYS_memfd_create,
        [name.0, u64::from(libc::MFD_CLOEXEC), 0, 0, 0, 0],
    )?;
    // Later it could only be had with more capabilities.
    *kept = File::open(format!("/proc/{pid}/fd/{fd}"))
        .inspect_err(|error| tracing::warn!(pid, %error, "the counters cannot be kept"))
        .ok();
    let shared = libc::MAP_SHARED | libc::MAP_FIXED;
    let mapped = call(
        borrowed,
        pid,
        "ftruncate",
        libc::SYS_ftruncate,
        [fd, control.len, 0, 0, 0, 0],
    )
    .and_then(|_| {
        mmap(
            borrowed,
            pid,
            control.start,
            control.len,
            Access::ReadWrite,
            shared,
            fd,
        )
    });
    call(borrowed, pid, "close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    mapped.map(|_| ())
}

fn unmap(borrowed: &mut Borrowed, pid: i32, mapping: &Mapping) -> Result<(), ApplyError> {
    unmap_region(borrowed, pid, mapping.reservation)
}

pub(super) fn unmap_region(
    borrowed: &mut Borrowed,
    pid: i32,
    whole: Region,
) -> Result<(), ApplyError> {
    call(
        borrowed,
        pid,
        "munmap",
        libc::SYS_munmap,
        [whole.start, whole.len, 0, 0, 0, 0],
    )
    .map(|_| ())
}

fn mmap(
    borrowed: &mut Borrowed,
    pid: i32,
    start: u64,
    len: u64,
    access: Access,
    flags: libc::c_int,
    fd: u64,
) -> Result<u64, ApplyError> {
    let protection = match access {
        Access::Read => libc::PROT_READ,
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        Access::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
    };
    let arguments = [start, len, protection as u64, flags as u64, fd, 0];
    match call(borrowed, pid, "mmap", libc::SYS_mmap, arguments) {
        Err(ApplyError::Call {
            errno: Errno::EEXIST,
            ..
        }) => Err(ApplyError::Occupied { pid, at: start }),
        other => other,
    }
}

pub(super) fn call(
    borrowed: &mut Borrowed,
    pid: i32,
    name: &'static str,
    nr: libc::c_long,
    arguments: [u64; 6],
) -> Result<u64, ApplyError> {
    hit(faults::CALL_BEFORE);
    let result = borrowed.syscall(nr, arguments);
    hit(faults::CALL_AFTER);
    result?.map_err(|errno| ApplyError::Call {
        pid,
        call: name,
        errno,
    })
}

/// What is written in one stop where writing takes one, in bytes.
const PIECE: usize = 32 * 1024;

/// Writes the parts while the worker runs: nothing leads to them yet.
fn fill(
    process: &Process,
    memory: &Memory,
    mapping: &Mapping,
    thread_pointer: u64,
    limits: &Limits,
    stops: &mut Vec<u64>,
) -> Result<(), ApplyError> {
    let pid = process.pid().as_raw();
    let mut late = Vec::new();
    for part in mapping.parts.iter().filter(|p| !p.bytes.is_empty()) {
        match memory.write(Address(part.start), &part.bytes) {
            Ok(()) => hit(faults::FILLED_PART),
            Err(Error::ForcedWriteForbidden { .. }) => late.push(part),
            Err(other) => return Err(other.into()),
        }
    }
    for part in &late {
        // Many short stops: word by word a megabyte takes some 50 ms.
        for (piece, at) in part.bytes.chunks(PIECE).zip((part.start..).step_by(PIECE)) {
            let stopped = stop(process, options(limits))?;
            stopped.write_memory(Address(at), piece)?;
            stops.push(nanoseconds(stopped.resume()?));
        }
    }
    if let Some(field) = mapping.thread_field {
        memory.write(Address(field), &thread_pointer.to_le_bytes())?;
        hit(faults::THREAD_FIELD);
    }
    let field = |part: &crate::plan::Part| {
        mapping
            .thread_field
            .filter(|f| (part.start..part.start + part.len).contains(f))
            .map(|f| (f - part.start) as usize)
    };
    for part in mapping.parts.iter().filter(|p| !p.bytes.is_empty()) {
        let mut expected = part.bytes.clone();
        if let Some(at) = field(part) {
            expected[at..at + 8].copy_from_slice(&thread_pointer.to_le_bytes());
        }
        if memory.read_vec(Address(part.start), expected.len())? != expected {
            return Err(ApplyError::Unproven {
                pid,
                at: part.start,
            });
        }
    }
    Ok(())
}

/// Writes the record: first the slot that does not hold, then the byte that
/// says which does; the mark of a new area last of all, as nobody looks at an
/// area without it.
pub(super) fn record(process: &Process, plan: &PatchPlan) -> Result<(), ApplyError> {
    let fresh = plan.mapping.as_ref().is_some_and(|m| m.control.is_some());
    write_record(process, &plan.manifest, plan.slot, fresh)
}

/// The same for any record; `fresh` is an area without a mark.
pub(super) fn write_record(
    process: &Process,
    record: &Manifest,
    slot: u8,
    fresh: bool,
) -> Result<(), ApplyError> {
    let memory = Memory::open(process)?;
    let control = record.control;
    let field = |offset: usize| Address(control + offset as u64);
    memory.write(Address(slot_address(control, slot)), &record.encode()?)?;
    hit(faults::RECORD_SLOT);
    if fresh {
        memory.write(
            field(offset_of!(Control, worker)),
            &record.worker.to_le_bytes(),
        )?;
        hit(faults::RECORD_WORKER);
        memory.write(
            field(offset_of!(Control, version)),
            &BRIDGE_VERSION.to_le_bytes(),
        )?;
        hit(faults::RECORD_VERSION);
    }
    memory.write(field(offset_of!(Control, manifest)), &[slot])?;
    hit(faults::RECORD_HOLDS);
    if fresh {
        memory.write(Address(control), &MAGIC)?;
        hit(faults::RECORD_MARK);
    }
    Ok(())
}

/// The record of before holds again, or none.
fn unrecord(process: &Process, plan: &PatchPlan) -> Result<(), ApplyError> {
    let fresh = plan.mapping.as_ref().is_some_and(|m| m.control.is_some());
    let memory = Memory::open(process)?;
    if fresh {
        memory.write(Address(plan.manifest.control), &[0; 8])?;
    } else {
        let which = plan.manifest.control + offset_of!(Control, manifest) as u64;
        memory.write(Address(which), &[3 - plan.slot])?;
    }
    Ok(())
}
