//! Stopping all threads of a process.
//!
//! ```text
//!   seize those that are there        nobody is stopped yet
//!   interrupt them all                <- the stop begins
//!   wait for each
//!   list the threads again: new ones are seized, interrupted, waited for,
//!   until a complete list has no new one
//!   read the registers of all
//!   ...                               the caller's work
//!   detach them all                   <- the stop ends
//! ```
//!
//! A thread can only be started by one that is not stopped: once all of a
//! complete list are stopped, there are no others. The kernel's list is not
//! complete if a thread on it exits while it is read, even if their number is
//! right (one more may have been started): so a list counts only if all on it
//! are ours already.

use crate::error::{Error, Result};
use crate::options::StopOptions;
use crate::registers::Interrupted;
use crate::scheduling::Placed;
use crate::stop_thread::{start_tick, write_stopped};
use crate::sys::ptrace;
use crate::sys::tick::Tick;
use crate::sys::wait::Event;
use crate::syscalls::{Disturbed, disturbance};
use crate::tracee::{self, Deadline, Seizure, Settled, Tracee};
use crate::{Address, Memory, PAGE_SIZE, Process, Registers, Tid, WriteMethod};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

const OPERATION: &str = "stopping all threads";

/// Stops all threads of a process.
///
/// Threads that exit meanwhile are no error; new ones are stopped too.
///
/// # Errors
/// Everyone runs on after an error: [`Error::ProcessDied`] or
/// [`Error::NoSuchProcess`]; [`Error::Executed`] or [`Error::AddressSpaceGone`]
/// if it executed another program meanwhile; [`Error::TracedByAnother`], [`Error::NotPermitted`];
/// [`Error::Timeout`] if one did not stop in time.
pub fn stop_all(process: &Process, options: impl Into<StopOptions>) -> Result<StoppedProcess> {
    let options = options.into();
    let memory = Memory::open(process)?;
    let tasks = process.tasks()?;
    let mut listed = Vec::with_capacity(64);
    tasks.list(&mut listed)?;
    let tick = start_tick(process)?;
    let placed = options.scheduling.apply(process, &listed);

    let mut stopped = StoppedProcess {
        since: Instant::now(),
        threads: Vec::with_capacity(listed.len() + 16),
        dead_leader: None,
        process: process.clone(),
        memory,
        _placed: placed,
        _tick: tick,
    };
    // From here on dropping `stopped` resumes everyone.
    stopped.seize(&listed, Deadline::after(options.deadline))?;
    stopped.since = Instant::now();
    let deadline = Deadline::after(options.deadline);
    let mut from = 0;
    loop {
        stopped.halt(from, deadline)?;
        listed.clear();
        let complete = tasks.list(&mut listed)?;
        listed.retain(|tid| stopped.position(*tid).is_none() && !is_dead_leader(process, *tid));
        if complete && listed.is_empty() {
            break;
        }
        // Even one that is gone before it can be seized makes another look
        // necessary: the kernel ends a list early at a thread that exits.
        from = stopped.seize_more(&listed, deadline)?;
        if deadline.has_passed() {
            return Err(deadline.overrun(process, process.pid().leader(), OPERATION));
        }
    }
    stopped.look()?;
    Ok(stopped)
}

/// Whether this is a leader that others outlive: it stays on the list.
fn is_dead_leader(process: &Process, tid: Tid) -> bool {
    tid == process.pid().leader() && process.state(tid) == 'Z'
}

/// A process with all threads stopped.
///
/// Bound to the OS thread that stopped it. Dropped, it runs on.
#[derive(Debug)]
#[must_use = "dropped, the process runs on"]
pub struct StoppedProcess {
    since: Instant,
    threads: Vec<Stopped>,
    /// A leader that died while it was seized.
    dead_leader: Option<Tracee>,
    process: Process,
    memory: Memory,
    // Put back in this order, after the threads run.
    _placed: Placed,
    _tick: Tick,
}

#[derive(Debug)]
struct Stopped {
    tracee: Tracee,
    registers: Registers,
    /// What user code will see, by the registers at the stop.
    disturbed: Option<Disturbed>,
}

/// How long a stop took, and who may have noticed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// From the first request to stop to the last thread's detach.
    pub duration: Duration,
    /// How many threads were stopped.
    pub threads: usize,
    /// Threads whose system call returned EINTR or early.
    pub disturbed: Vec<Disturbed>,
}

impl StoppedProcess {
    /// Each thread with its registers, in the order in which they were found.
    pub fn threads(&self) -> impl Iterator<Item = (Tid, &Registers)> {
        self.threads
            .iter()
            .map(|thread| (thread.tracee.tid, &thread.registers))
    }

    /// The registers of one thread.
    #[must_use]
    pub fn registers(&self, tid: Tid) -> Option<&Registers> {
        let thread = self.threads.get(self.position(tid)?)?;
        Some(&thread.registers)
    }

    /// The memory of the process.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// For how long it has been stopped.
    #[must_use]
    pub fn stopped_for(&self) -> Duration {
        self.since.elapsed()
    }

    /// Sets the general registers of a thread, at once.
    ///
    /// # Errors
    /// [`Error::InSystemCall`] if the thread is in a system call that is to be
    /// restarted: its registers decide how. [`Error::NotStopped`] for a thread
    /// that is not among these. [`Error::ProcessDied`].
    pub fn set_registers(&mut self, tid: Tid, registers: &Registers) -> Result<()> {
        let process = &self.process;
        let thread = self
            .threads
            .iter_mut()
            .find(|thread| thread.tracee.tid == tid)
            .ok_or_else(|| Error::NotStopped {
                pid: process.pid(),
                tid,
            })?;
        match thread.registers.interrupted() {
            Interrupted::Restarting { nr } | Interrupted::RestartingFromBlock { nr } => {
                return Err(Error::InSystemCall { tid, nr });
            }
            Interrupted::UserCode | Interrupted::Returning { .. } => {}
        }
        // What is set is in user code: nothing that could look like a call to
        // be restarted.
        let registers = Registers {
            orig_rax: u64::MAX,
            ..*registers
        };
        ptrace::set_registers(tid, &registers)
            .map_err(|cause| tracee::failed(process, tid, "setting registers", cause))?;
        thread.registers = registers;
        Ok(())
    }

    /// Moves a thread that is in user code.
    ///
    /// # Errors
    /// As for [`StoppedProcess::set_registers`].
    pub fn set_instruction_and_stack_pointer(
        &mut self,
        tid: Tid,
        instruction_pointer: Address,
        stack_pointer: Address,
    ) -> Result<()> {
        let registers = self.registers(tid).ok_or(Error::NotStopped {
            pid: self.process.pid(),
            tid,
        })?;
        let moved = Registers {
            rip: instruction_pointer.0,
            rsp: stack_pointer.0,
            ..*registers
        };
        self.set_registers(tid, &moved)
    }

    /// Writes code in one go.
    ///
    /// # Errors
    /// [`Error::CodeSpans`] if it does not lie within one page, or is longer
    /// than [`WriteMethod::most_in_one_go`]; nothing is written then.
    /// [`Error::Memory`] where nothing is mapped.
    pub fn write_code(&mut self, address: Address, code: &[u8]) -> Result<()> {
        let last = address.0.checked_add((code.len() as u64).max(1) - 1);
        let within_a_page = last.is_some_and(|last| last / PAGE_SIZE == address.0 / PAGE_SIZE);
        let spans = |unit| Error::CodeSpans {
            address,
            length: code.len(),
            unit,
        };
        if !within_a_page {
            return Err(spans("one page"));
        }
        if code.len() > self.write_method().most_in_one_go() {
            return Err(spans("one word"));
        }
        self.write_memory(address, code)
    }

    /// Writes memory, also where the process may not.
    ///
    /// # Errors
    /// As for [`Memory::write`], but for [`Error::ForcedWriteForbidden`].
    pub fn write_memory(&self, address: Address, bytes: &[u8]) -> Result<()> {
        let tid = self.threads.first().map(|thread| thread.tracee.tid);
        let tid = tid.ok_or_else(|| self.died("writing memory"))?;
        write_stopped(&self.memory, tid, address, bytes)
    }

    /// How code is written.
    #[must_use]
    pub fn write_method(&self) -> WriteMethod {
        self.memory.write_method()
    }

    /// Writes as [`WriteMethod::PokeData`] does from here on, whatever the
    /// kernel allows.
    #[doc(hidden)]
    pub fn use_poke_data(&mut self) -> Result<()> {
        self.memory = Memory::open_with(&self.process, WriteMethod::PokeData)?;
        Ok(())
    }

    /// Lets everyone run on.
    ///
    /// # Errors
    /// [`Error::ProcessDied`] if it was killed meanwhile.
    pub fn resume(mut self) -> Result<Stop> {
        let disturbed = self
            .threads
            .iter_mut()
            .filter_map(|thread| thread.disturbed.take())
            .collect();
        let threads = self.threads.len();
        let first = self.threads.first();
        let killed = first.is_some_and(|thread| !thread.tracee.stands_still());
        let (running, duration) = self.let_go();
        if killed || running == 0 {
            return Err(self.died("resuming"));
        }
        Ok(Stop {
            duration,
            threads,
            disturbed,
        })
    }

    fn position(&self, tid: Tid) -> Option<usize> {
        self.threads
            .iter()
            .position(|thread| thread.tracee.tid == tid)
    }

    fn died(&self, operation: &'static str) -> Error {
        Error::ProcessDied {
            pid: self.process.pid(),
            operation,
        }
    }

    /// Seizes more threads; from which on they are.
    fn seize_more(&mut self, tids: &[Tid], deadline: Deadline) -> Result<usize> {
        self.seize(tids, deadline)?;
        let stopped = |thread: &Stopped| thread.tracee.is_stopped();
        // Those that were stopped come first.
        Ok(self.threads.partition_point(stopped))
    }

    /// Seizes these threads, without stopping them.
    fn seize(&mut self, tids: &[Tid], deadline: Deadline) -> Result<()> {
        for &tid in tids {
            loop {
                match Tracee::seize(&self.process, tid)? {
                    Seizure::Done(tracee) => self.threads.push(Stopped {
                        tracee,
                        registers: Registers::default(),
                        disturbed: None,
                    }),
                    Seizure::Gone => {}
                    Seizure::Busy if deadline.has_passed() => {
                        return Err(deadline.overrun(&self.process, tid, OPERATION));
                    }
                    Seizure::Busy => {
                        self.release_dying(0);
                        continue;
                    }
                }
                break;
            }
        }
        Ok(())
    }

    /// Stops the seized threads from the given one on; those that are gone are
    /// buried and left out.
    fn halt(&mut self, from: usize, deadline: Deadline) -> Result<()> {
        for thread in &self.threads[from..] {
            thread.tracee.interrupt();
        }
        // One tick at a time, see below.
        let step = Deadline::after(Duration::ZERO);
        let mut next = from;
        while let Some(thread) = self.threads.get_mut(next) {
            match thread.tracee.settle(&self.process, step, OPERATION) {
                Ok(Settled::Stopped) => next += 1,
                Ok(Settled::Gone) => self.part_with(next),
                Err(Error::Timeout { tid, .. }) => {
                    if deadline.has_passed() {
                        return Err(deadline.overrun(&self.process, tid, OPERATION));
                    }
                    next -= self.release_dying(next);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets go of a thread that is dead or at its exit. A dead leader is kept
    /// to the end: until all others are gone there is nothing to be done.
    fn part_with(&mut self, position: usize) {
        let tracee = self.threads.remove(position).tracee;
        if tracee.tid == self.process.pid().leader() && !tracee.is_at_exit() {
            self.dead_leader = Some(tracee);
        } else {
            tracee.release(&self.process);
        }
    }

    /// Lets go of threads that have come to their exit: a thread that executes
    /// a program can't be stopped before all others are dead. Returns how many
    /// of them stood before `position`.
    fn release_dying(&mut self, position: usize) -> usize {
        let mut before = 0;
        let mut index = 0;
        while let Some(thread) = self.threads.get(index) {
            if matches!(thread.tracee.now(), Some(Event::Exit | Event::Dead)) {
                self.part_with(index);
                before += usize::from(index + before < position);
            } else {
                index += 1;
            }
        }
        before
    }

    /// Reads everyone's registers, and makes sure that all are still what they
    /// were stopped as.
    fn look(&mut self) -> Result<()> {
        if self.threads.is_empty() {
            return Err(self.died(OPERATION));
        }
        for thread in &mut self.threads {
            let tid = thread.tracee.tid;
            // A thread that executed another program while others were being
            // stopped took the leader's place, which had been stopped already.
            if !thread.tracee.stands_still() {
                return Err(if self.process.is_alive() {
                    Error::Executed {
                        pid: self.process.pid(),
                        operation: OPERATION,
                    }
                } else {
                    Error::ProcessDied {
                        pid: self.process.pid(),
                        operation: OPERATION,
                    }
                });
            }
            thread.registers = ptrace::registers(tid)
                .map_err(|cause| tracee::failed(&self.process, tid, "reading registers", cause))?;
            thread.disturbed = disturbance(tid, &thread.registers, &self.memory);
        }
        Ok(())
    }

    /// Detaches from all; how many run on, and how long the stop was.
    fn let_go(&mut self) -> (usize, Duration) {
        let leader = self.process.pid().leader();
        let threads = std::mem::take(&mut self.threads);
        let seized = !threads.is_empty();
        // Those that stand first: letting go of others may take a wait.
        let (stopped, moving): (Vec<_>, Vec<_>) = threads
            .into_iter()
            .map(|thread| thread.tracee)
            .partition(Tracee::is_stopped);
        let mut rest = Vec::new();
        let mut running = 0;
        for tracee in stopped {
            match tracee.detach() {
                Ok(()) => running += 1,
                Err(tracee) => rest.push(tracee),
            }
        }
        let duration = self.since.elapsed();
        // A dead leader can't be buried before all others are.
        rest.extend(moving);
        rest.extend(self.dead_leader.take());
        rest.sort_by_key(|tracee| tracee.tid == leader);
        for tracee in rest {
            running += usize::from(tracee.release(&self.process));
        }
        if seized {
            tracee::release_heir(&self.process);
        }
        (running, duration)
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        self.let_go();
    }
}
