//! Stopping one thread while all others run on.

use crate::borrow::Borrowed;
use crate::error::{Error, NotBorrowable, Result};
use crate::gadgets::Gadgets;
use crate::memory::WORD;
use crate::options::StopOptions;
use crate::scheduling::Placed;
use crate::sys::proc::{Area, area_at};
use crate::sys::ptrace;
use crate::sys::tick::Tick;
use crate::sys::wait::Event;
use crate::syscalls::{Disturbed, disturbance};
use crate::tracee::{self, Deadline, Seizure, Settled, Tracee};
use crate::{Address, Memory, PAGE_SIZE, Process, Registers, Tid, WriteMethod};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Stops exactly one thread (`PTRACE_SEIZE`, `PTRACE_INTERRUPT`).
///
/// The thread is where the kernel left it: in user code, or in a system call
/// that will be restarted ([`Registers::interrupted`]). Some calls do not
/// restart but return early, see [`StoppedThread::disturbed`].
///
/// # Errors
/// [`Error::ThreadGone`], [`Error::ProcessDied`] and [`Error::Executed`] if
/// that happened first; [`Error::TracedByAnother`], [`Error::NotPermitted`];
/// [`Error::Timeout`] if it did not stop in time. It then runs on, or is let
/// go of as [`crate::tracer_thread`] describes.
pub fn stop_thread(
    process: &Process,
    tid: impl Into<Tid>,
    options: impl Into<StopOptions>,
) -> Result<StoppedThread> {
    const OPERATION: &str = "stopping the thread";
    let (tid, options) = (tid.into(), options.into());
    let gone = || tracee::gone(process, tid, OPERATION);
    let memory = Memory::open(process)?;
    let maps = process.open_of_memory("maps", OFlag::O_RDONLY)?;
    let tick = start_tick(process)?;
    let placed = options.scheduling.apply(process, &[tid]);

    let deadline = Deadline::after(options.deadline);
    let tracee = loop {
        match Tracee::seize(process, tid)? {
            Seizure::Done(tracee) => break tracee,
            Seizure::Gone => return Err(gone()),
            Seizure::Busy if deadline.has_passed() => {
                return Err(deadline.overrun(process, tid, OPERATION));
            }
            Seizure::Busy => {}
        }
    };
    let mut stopped = StoppedThread {
        since: Instant::now(),
        tracee: Some(tracee),
        registers: Registers::default(),
        process: process.clone(),
        memory,
        maps,
        options,
        _placed: placed,
        _tick: tick,
    };
    // From here on dropping `stopped` resumes the thread.
    let Some(tracee) = &mut stopped.tracee else {
        return Err(gone());
    };
    tracee.interrupt();
    match tracee.settle(process, Deadline::after(options.deadline), OPERATION)? {
        Settled::Stopped => {}
        Settled::Gone => return Err(gone()),
    }
    stopped.registers = match ptrace::registers(tid) {
        Ok(registers) => registers,
        Err(Errno::ENOEXEC) => return Err(stopped.not_borrowable(NotBorrowable::Not64Bit)),
        Err(cause) => return Err(tracee::failed(process, tid, "reading registers", cause)),
    };
    Ok(stopped)
}

pub(crate) fn start_tick(process: &Process) -> Result<Tick> {
    Tick::start().map_err(|cause| Error::Setup {
        pid: process.pid(),
        operation: "starting the timer",
        cause,
    })
}

/// A stopped thread; everyone else in its process runs.
///
/// Bound to the OS thread that stopped it. Dropped, it runs on.
#[derive(Debug)]
#[must_use = "dropped, the thread runs on"]
pub struct StoppedThread {
    tracee: Option<Tracee>,
    since: Instant,
    registers: Registers,
    process: Process,
    memory: Memory,
    maps: OwnedFd,
    options: StopOptions,
    // Put back in this order, after the thread runs.
    _placed: Placed,
    _tick: Tick,
}

impl StoppedThread {
    /// The thread.
    #[must_use]
    pub fn tid(&self) -> Tid {
        self.tracee
            .as_ref()
            .map_or(self.process.pid().leader(), |tracee| tracee.tid)
    }

    /// Its registers as it was stopped.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// The memory of its process.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// For how long it has been stopped.
    #[must_use]
    pub fn stopped_for(&self) -> Duration {
        self.since.elapsed()
    }

    /// What user code will see of this stop, if anything.
    #[must_use]
    pub fn disturbed(&self) -> Option<Disturbed> {
        disturbance(self.tid(), &self.registers, &self.memory)
    }

    /// Writes memory, also where the process may not and the kernel forbids
    /// forced writes to `/proc/PID/mem`: then as its tracer, or word by word
    /// through this thread. Others may see any part of it written.
    ///
    /// # Errors
    /// As for [`Memory::write`], but for [`Error::ForcedWriteForbidden`].
    pub fn write_memory(&self, address: Address, bytes: &[u8]) -> Result<()> {
        write_stopped(&self.memory, self.tid(), address, bytes)
    }

    /// How [`StoppedThread::write_memory`] writes where the process may not.
    #[must_use]
    pub fn write_method(&self) -> WriteMethod {
        self.memory.write_method()
    }

    /// Lends the thread for system calls of ours. It can heal itself before
    /// anything of it changes.
    ///
    /// # Errors
    /// [`Error::NotBorrowable`] with the reason, [`Error::GadgetGone`], or if
    /// its state can't be read; it is resumed in any such case.
    pub fn borrow(self, gadgets: &Gadgets) -> Result<Borrowed> {
        Borrowed::new(self, gadgets)
    }

    /// Lets it run on. Returns for how long it was stopped: from the request
    /// to stop to the detach.
    ///
    /// # Errors
    /// [`Error::ThreadGone`] or [`Error::ProcessDied`] if it was killed
    /// meanwhile.
    pub fn resume(mut self) -> Result<Duration> {
        let tid = self.tid();
        let (runs, stopped) = self.let_go();
        if runs {
            Ok(stopped)
        } else {
            Err(tracee::gone(&self.process, tid, "resuming"))
        }
    }

    fn let_go(&mut self) -> (bool, Duration) {
        let Some(tracee) = self.tracee.take() else {
            return (true, self.since.elapsed());
        };
        let tid = tracee.tid;
        let vanished = tid != self.process.pid().leader() && tracee.now() == Some(Event::NotOurs);
        let runs = tracee.release(&self.process);
        let stopped = self.since.elapsed();
        if vanished {
            tracee::release_heir(&self.process);
        }
        (runs, stopped)
    }

    /// Waits for whatever it comes to next, having been resumed.
    pub(crate) fn wait(&mut self, deadline: Deadline, operation: &'static str) -> Result<Event> {
        let Some(tracee) = &mut self.tracee else {
            return Ok(Event::NotOurs);
        };
        tracee.runs();
        let event = tracee.wait(&self.process, deadline, operation)?;
        tracee.stands();
        Ok(event)
    }

    /// Waits until it is stopped again, having been resumed with a request to.
    pub(crate) fn settle(&mut self, operation: &'static str) -> Result<Settled> {
        // It only has to be scheduled, however short the calls must be.
        const LEAST: Duration = Duration::from_secs(2);
        let deadline = Deadline::after(self.options.call_deadline.max(LEAST));
        match &mut self.tracee {
            Some(tracee) => tracee.settle(&self.process, deadline, operation),
            None => Ok(Settled::Gone),
        }
    }

    pub(crate) fn call_deadline(&self) -> Deadline {
        Deadline::after(self.options.call_deadline)
    }

    pub(crate) fn not_borrowable(&self, reason: NotBorrowable) -> Error {
        Error::NotBorrowable {
            pid: self.process.pid(),
            tid: self.tid(),
            reason,
        }
    }

    pub(crate) fn failed(&self, operation: &'static str, cause: Errno) -> Error {
        tracee::failed(&self.process, self.tid(), operation, cause)
    }

    /// The mapping that holds `address`.
    pub(crate) fn area_at(&self, address: Address) -> Result<Option<Area>> {
        match area_at(self.maps.as_fd(), address.0) {
            Ok(area) => return Ok(area),
            // Before 6.11.
            Err(Errno::ENOTTY | Errno::EINVAL) => {}
            Err(error) => tracing::debug!(%error, "PROCMAP_QUERY failed, reading maps instead"),
        }
        let mappings = self.process.mappings()?;
        Ok(mappings
            .iter()
            .find(|mapping| mapping.contains(address))
            .map(|mapping| Area {
                start: mapping.start.0,
                end: mapping.end.0,
                writable: mapping.writable,
                main_stack: mapping.path == "[stack]",
            }))
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// Writes through the stopped thread `tid`, in whichever way there is.
pub(crate) fn write_stopped(
    memory: &Memory,
    tid: Tid,
    address: Address,
    bytes: &[u8],
) -> Result<()> {
    match memory.write(address, bytes) {
        Err(Error::ForcedWriteForbidden { .. }) => {}
        result => return result,
    }
    if memory.write_method() == WriteMethod::ProcMemTraced {
        match memory.write_through(address, bytes) {
            // The leader is not traced by us, or is gone.
            Err(Error::Memory {
                cause: Errno::EIO, ..
            }) => {}
            result => return result,
        }
    }
    poke_bytes(memory.process(), tid, address, bytes)
}

/// Writes through a stopped thread, a word at a time. A word may begin
/// anywhere, and within a page is written whole or not at all; so up to 8 bytes
/// in one page are.
fn poke_bytes(process: &Process, tid: Tid, address: Address, bytes: &[u8]) -> Result<()> {
    let failed = |at: u64, cause| match cause {
        Errno::EIO | Errno::EFAULT => Error::Memory {
            operation: "writing",
            pid: process.pid(),
            address: Address(at),
            length: bytes.len(),
            cause,
        },
        _ => tracee::failed(process, tid, "writing a word", cause),
    };
    let mut at = address.0;
    let mut rest = bytes;
    while !rest.is_empty() {
        // Not over the end of the page: the next one need not be there.
        let page_end = (at & !(PAGE_SIZE - 1)).saturating_add(PAGE_SIZE);
        let word_at = at.min(page_end - WORD as u64);
        let skip = (at - word_at) as usize;
        let (now, later) = rest.split_at(rest.len().min(WORD - skip));
        let mut word = if now.len() < WORD {
            ptrace::peek(tid, word_at)
                .map_err(|cause| failed(word_at, cause))?
                .to_le_bytes()
        } else {
            [0; WORD]
        };
        word[skip..skip + now.len()].copy_from_slice(now);
        ptrace::poke(tid, word_at, u64::from_le_bytes(word))
            .map_err(|cause| failed(word_at, cause))?;
        at += now.len() as u64;
        rest = later;
    }
    Ok(())
}
