//! The stop in which a worker's own code changes.

use std::cell::Cell;
use std::time::Instant;

use ptrace_shim::{
    Address, Error, Memory, Process, Stop, StoppedProcess, StoppedThread, Tid, stop_all,
    where_threads_are,
};

use super::frames::{self, Interrupted, Span, Stack};
use super::{ApplyError, Limits, options};
use crate::elf::hex;
use crate::faults::{self, hit};
use crate::manifest::WindowRecord;
use crate::plan::PatchPlan;
use crate::refused::Refused;

/// Time between two tries, to let a thread run on.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(1);

/// Every window's live bytes are what the plan took them for, and can be
/// replaced in one go on this kernel.
pub(super) fn expect_bytes(process: &Process, plan: &PatchPlan) -> Result<(), ApplyError> {
    let memory = Memory::open(process)?;
    for window in &plan.windows {
        let live = memory.read_vec(Address(window.address), window.before.len())?;
        if live != window.before {
            return Err(foreign(window.address, &window.before, &live).into());
        }
        one_go(&memory, window)?;
    }
    Ok(())
}

fn foreign(at: u64, expected: &[u8], live: &[u8]) -> Refused {
    Refused::ForeignBytes {
        at,
        expected: hex(expected),
        found: hex(live),
    }
}

fn one_go(memory: &Memory, window: &WindowRecord) -> Result<(), ApplyError> {
    let most = memory.write_method().most_in_one_go();
    if window.before.len() > most {
        return Err(Refused::NoWindow {
            library: String::new(),
            at: window.address,
            reason: format!(
                "the kernel forbids forced writes to /proc/PID/mem, and the window of {} bytes is longer than the {most} that ptrace writes in one go",
                window.before.len()
            ),
        }
        .into());
    }
    Ok(())
}

/// Which way windows are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The library's bytes become ours.
    In,
    /// Ours become the library's.
    Out,
}

/// Writes the plan's stores, gate and windows. `touched` is set once anything
/// of the worker's was changed.
pub(super) fn commit(
    process: &Process,
    plan: &PatchPlan,
    limits: &Limits,
    touched: &Cell<bool>,
) -> Result<Stop, ApplyError> {
    at_a_safe_moment(
        process,
        &plan.windows,
        Direction::In,
        limits,
        touched,
        |stopped| {
            for store in &plan.stores {
                // Some of them are sealed by now.
                stopped.write_memory(Address(store.address), &store.bytes)?;
                hit(faults::STORED);
            }
            stopped.memory().write(Address(plan.gate), &[1])?;
            hit(faults::GATE);
            for window in &plan.windows {
                stopped.write_code(Address(window.address), &window.after)?;
                hit(faults::WINDOW);
            }
            Ok(())
        },
    )
    .inspect(|_| hit(faults::RESUMED))
}

/// Stops all threads at a moment when none is in the middle of a window, and
/// runs `work`. A thread whose next instruction is there is moved. The windows'
/// bytes are checked first of all.
pub(super) fn at_a_safe_moment(
    process: &Process,
    windows: &[WindowRecord],
    direction: Direction,
    limits: &Limits,
    touched: &Cell<bool>,
    work: impl FnOnce(&mut StoppedProcess) -> Result<(), ApplyError>,
) -> Result<Stop, ApplyError> {
    let pid = process.pid().as_raw();
    let since = Instant::now();
    let spans: Vec<Span> = windows.iter().map(span).collect();
    loop {
        wait_for_quiet(process, limits);
        let maps = ranges(process)?;
        let reason = match stop_all(process, options(limits)) {
            Ok(mut stopped) => {
                check_live(&stopped, windows, direction)?;
                match find_moves(&stopped, windows, &spans, &maps, direction) {
                    Ok(moves) => {
                        hit(faults::STOPPED);
                        touched.set(true);
                        for (tid, to) in moves {
                            move_thread(&mut stopped, tid, &to)?;
                            hit(faults::MOVED);
                        }
                        work(&mut stopped)?;
                        return Ok(stopped.resume()?);
                    }
                    Err(reason) => {
                        stopped.resume()?;
                        reason
                    }
                }
            }
            Err(error @ Error::Timeout { .. }) => error.to_string(),
            Err(other) => return Err(other.into()),
        };
        if since.elapsed() > limits.commit {
            return Err(ApplyError::NoMoment {
                pid,
                waited: since.elapsed(),
                reason,
            });
        }
        std::thread::sleep(PAUSE);
    }
}

fn check_live(
    stopped: &StoppedProcess,
    windows: &[WindowRecord],
    direction: Direction,
) -> Result<(), ApplyError> {
    for window in windows {
        let expected = match direction {
            Direction::In => &window.before,
            Direction::Out => &window.after,
        };
        let mut live = vec![0; expected.len()];
        stopped.memory().read(Address(window.address), &mut live)?;
        if live != *expected {
            return Err(foreign(window.address, expected, &live).into());
        }
    }
    Ok(())
}

/// Prefers a moment when no thread would see the stop.
fn wait_for_quiet(process: &Process, limits: &Limits) {
    let since = Instant::now();
    while since.elapsed() < limits.quiet {
        match where_threads_are(process) {
            Ok(threads) if threads.iter().any(|t| t.may_see_stop) => std::thread::sleep(PAUSE),
            _ => return,
        }
    }
}

/// Where threads must go that are in windows. An error says why this is no
/// safe moment.
fn find_moves(
    stopped: &StoppedProcess,
    windows: &[WindowRecord],
    spans: &[Span],
    maps: &[(u64, u64)],
    direction: Direction,
) -> Result<Vec<(Tid, Move)>, String> {
    let mut moves = Vec::new();
    let stack = Live {
        memory: stopped.memory(),
        maps,
    };
    for (tid, registers) in stopped.threads() {
        match frames::interrupted(registers.rsp, &stack, spans) {
            Interrupted::Elsewhere => {}
            Interrupted::Inside => {
                return Err(format!(
                    "a signal handler of thread {tid} interrupted a site"
                ));
            }
            Interrupted::Unknown => {
                return Err(format!("the stack of thread {tid} has just changed"));
            }
        }
        if let Some(index) = frames::inside(registers.rip, spans) {
            match moved(&windows[index], registers.rip, registers.rsp, direction) {
                Some(to) => moves.push((tid, to)),
                None => {
                    return Err(format!(
                        "thread {tid} is inside of an instruction of a site"
                    ));
                }
            }
        }
    }
    Ok(moves)
}

/// What no thread may be strictly inside of. A jump in filler has no original
/// that its start could stand for.
fn span(window: &WindowRecord) -> Span {
    let start = (window.address).saturating_sub(u64::from(window.hop_of != 0));
    (start, window.end())
}

struct Move {
    rip: u64,
    rsp: u64,
    /// Return address to store at `rsp`.
    push: Option<u64>,
}

fn moved(window: &WindowRecord, rip: u64, rsp: u64, direction: Direction) -> Option<Move> {
    match direction {
        // Only no-operations lie between the start and our branch, and
        // nothing was done yet before the jump in filler.
        Direction::Out => Some(Move {
            rip: match window.hop_of {
                0 => window.address,
                from => from,
            },
            rsp,
            push: None,
        }),
        Direction::In => {
            let offset = u8::try_from(rip - window.address).ok()?;
            let (_, copy) = window.copies.iter().find(|(from, _)| *from == offset)?;
            // The copies in a call's stub run with the return address pushed.
            let push = window.call.then(|| window.end());
            Some(Move {
                rip: *copy,
                rsp: if window.call { rsp - 8 } else { rsp },
                push,
            })
        }
    }
}

/// The stack first: a thread that is not moved after all has lost nothing, as
/// no instruction in a window uses what lies below the stack pointer.
fn move_thread(stopped: &mut StoppedProcess, tid: Tid, to: &Move) -> Result<(), ApplyError> {
    if let Some(address) = to.push {
        stopped
            .memory()
            .write(Address(to.rsp), &address.to_le_bytes())?;
    }
    stopped.set_instruction_and_stack_pointer(tid, Address(to.rip), Address(to.rsp))?;
    Ok(())
}

/// The process's mappings, ascending: `(start, end)`.
pub(super) fn ranges(process: &Process) -> Result<Vec<(u64, u64)>, Error> {
    let mappings = process.mappings()?;
    Ok(mappings.iter().map(|m| (m.start.0, m.end.0)).collect())
}

/// Why a stopped thread will return strictly into a window from a signal
/// handler; `None` if it will not.
pub(super) fn interrupted_site(
    stopped: &StoppedThread,
    windows: &[WindowRecord],
    maps: &[(u64, u64)],
) -> Option<String> {
    let spans: Vec<Span> = windows.iter().map(span).collect();
    let memory = stopped.memory();
    let stack = Live { memory, maps };
    let found = frames::interrupted(stopped.registers().rsp, &stack, &spans);
    (!spans.is_empty() && found == Interrupted::Inside).then(|| {
        format!(
            "a signal handler of thread {} interrupted a site",
            stopped.tid()
        )
    })
}

struct Live<'a> {
    memory: &'a Memory,
    maps: &'a [(u64, u64)],
}

impl Stack for Live<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        self.memory.read(Address(address), into).is_ok()
    }

    fn mapping_end(&self, address: u64) -> Option<u64> {
        let index = self.maps.partition_point(|(_, end)| *end <= address);
        self.maps
            .get(index)
            .filter(|(start, _)| *start <= address)
            .map(|(_, end)| *end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(call: bool) -> WindowRecord {
        WindowRecord {
            address: 0x1000,
            before: vec![0; 6],
            after: vec![0; 6],
            call,
            copies: vec![(0, 0x9000), (3, 0x9005)],
            ..WindowRecord::default()
        }
    }

    #[test]
    fn a_window_is_no_longer_than_what_the_kernel_writes_in_one_go() {
        use ptrace_shim::WriteMethod;
        let own = Process::open(std::process::id().cast_signed()).unwrap();
        let memory = Memory::open_with(&own, WriteMethod::PokeData).unwrap();
        let of = |length| WindowRecord {
            address: 0x1003,
            before: vec![0; length],
            ..window(true)
        };
        one_go(&memory, &of(8)).unwrap();
        let refused = one_go(&memory, &of(9)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the call at +0x1003 cannot be rewritten: the kernel forbids forced writes to \
             /proc/PID/mem, and the window of 9 bytes is longer than the 8 that ptrace writes in \
             one go"
        );
        let memory = Memory::open_with(&own, WriteMethod::ProcMemTraced).unwrap();
        one_go(&memory, &of(9)).unwrap();
    }

    #[test]
    fn a_thread_before_the_call_goes_on_in_the_stub_with_its_return_address() {
        let to = moved(&window(true), 0x1003, 0x7ff0, Direction::In).unwrap();
        assert_eq!((to.rip, to.rsp, to.push), (0x9005, 0x7fe8, Some(0x1006)));
    }

    #[test]
    fn a_jump_pushes_nothing() {
        let to = moved(&window(false), 0x1003, 0x7ff0, Direction::In).unwrap();
        assert_eq!((to.rip, to.rsp, to.push), (0x9005, 0x7ff0, None));
    }

    #[test]
    fn a_thread_in_filler_goes_back_to_the_call() {
        let hop = WindowRecord {
            address: 0x1040,
            before: vec![0x90; 5],
            hop_of: 0x1000,
            ..window(false)
        };
        assert_eq!(frames::inside(0x1040, &[span(&hop)]), Some(0));
        assert_eq!(frames::inside(0x103f, &[span(&hop)]), None);
        assert_eq!(frames::inside(0x1045, &[span(&hop)]), None);
        let to = moved(&hop, 0x1040, 0x7ff0, Direction::Out).unwrap();
        assert_eq!((to.rip, to.rsp, to.push), (0x1000, 0x7ff0, None));
        assert!(
            moved(
                &WindowRecord {
                    copies: Vec::new(),
                    ..hop
                },
                0x1040,
                0x7ff0,
                Direction::In
            )
            .is_none(),
            "nobody is in what never runs"
        );
    }

    #[test]
    fn inside_of_an_instruction_there_is_no_copy() {
        assert!(moved(&window(true), 0x1004, 0x7ff0, Direction::In).is_none());
    }

    #[test]
    fn on_the_way_back_nothing_was_executed_yet() {
        let to = moved(&window(true), 0x1001, 0x7ff0, Direction::Out).unwrap();
        assert_eq!((to.rip, to.rsp, to.push), (0x1000, 0x7ff0, None));
    }
}
