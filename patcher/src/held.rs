//! A worker that is watched to its end, and the counters that outlive it.
//!
//! The control area is a memfd. Whoever holds it can read it when the worker is
//! gone, and see which callee's code was running: a call that was entered and
//! has not returned, or initialisers that have not ended. What a thread of the
//! callee's own does is not counted: its crash is nobody's in particular. While
//! the worker lives, the area tells of guarded calls that crashed.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use ptrace_shim::Process;

use crate::manifest::{self, InFlight};
use crate::snapshot::{Map, Memory, ProcMemory, SnapshotError};

/// How long is waited for a dead process to be reaped, which some kernels need
/// to tell how it ended, and for its parent to show that it dies as well.
const AFTERMATH: Duration = Duration::from_millis(300);

/// See the module.
#[derive(Debug)]
pub struct Held {
    process: Process,
    /// What started it: nightcore's launcher.
    parent: Option<Process>,
    control: Option<File>,
    /// The live address of the control area.
    at: Option<u64>,
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It exited, with a code.
    Exit(i32),
    /// A signal ended it.
    Signal(i32),
    /// The kernel did not tell.
    Unknown,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            End::Exit(code) => write!(f, "exited with code {code}"),
            End::Signal(number) => match nix::sys::signal::Signal::try_from(number) {
                Ok(signal) => write!(f, "died of {signal}"),
                Err(_) => write!(f, "died of signal {number}"),
            },
            End::Unknown => f.write_str("died"),
        }
    }
}

/// What is known of a worker that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub end: End,
    /// What of callees' was running, outermost first; `None` if that is not
    /// known.
    pub in_flight: Option<Vec<InFlight>>,
    /// It was told to end, or its whole container was ended: what was running
    /// has no part in it.
    pub from_outside: bool,
}

impl Held {
    pub(crate) fn new(process: Process, area: Option<&Map>, control: Option<File>) -> Held {
        let pid = process.pid();
        let by_map = || open_area(pid.as_raw(), area?);
        Held {
            parent: process
                .parent()
                .ok()
                .and_then(|parent| Process::open(parent).ok()),
            control: control.or_else(by_map),
            at: area.map(|area| area.start),
            process,
        }
    }

    /// The worker.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid().as_raw()
    }

    /// Its start time in clock ticks since boot.
    #[must_use]
    pub fn start_time(&self) -> u64 {
        self.process.start_time()
    }

    /// Becomes readable when the worker ends.
    #[must_use]
    pub fn pidfd(&self) -> impl AsFd + '_ {
        self.process.pidfd()
    }

    /// Whether its end will tell what was running.
    #[must_use]
    pub fn sees_calls(&self) -> bool {
        self.control.is_some()
    }

    /// Callees that crashed in a guarded call, with the way to each (`Bar/Baz`).
    /// Nobody is stopped; of a worker whose counters are not held its memory is
    /// read.
    ///
    /// # Errors
    /// It cannot be read, as when the worker has ended.
    pub fn crashed(&self) -> Result<Vec<String>, SnapshotError> {
        let (pid, start_time) = (self.pid(), self.start_time());
        match (&self.control, self.at) {
            (Some(control), _) => manifest::crashed(pid, start_time, &Area(control)),
            (None, Some(base)) => {
                let memory = ProcMemory::open(pid)?;
                manifest::crashed(pid, start_time, &Shifted { memory, base })
            }
            (None, None) => Ok(Vec::new()),
        }
    }

    /// What is known, once it has ended. Waits for a moment.
    #[must_use]
    pub fn ended(&self) -> Ended {
        let in_flight = self.control.as_ref().and_then(|control| {
            manifest::in_flight(self.pid(), self.start_time(), &Area(control)).ok()
        });
        let since = Instant::now();
        let mut status = None;
        // A container's end takes the launcher along: it may show a little later.
        let mut parent_dies = false;
        while since.elapsed() < AFTERMATH && !parent_dies {
            status = status.or_else(|| self.process.end());
            parent_dies = self.parent.as_ref().is_some_and(Process::is_dying);
            if matches!(status.map(end), Some(end) if !may_be_the_containers(end)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let end = status.map_or(End::Unknown, end);
        let asked = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
        let told = matches!(end, End::Signal(number) if asked.contains(&number));
        Ended {
            end,
            in_flight,
            from_outside: told || parent_dies && may_be_the_containers(end),
        }
    }
}

/// The end of a container is a SIGKILL to all that is in it.
fn may_be_the_containers(end: End) -> bool {
    matches!(end, End::Signal(libc::SIGKILL) | End::Unknown)
}

/// From a status of `wait`.
fn end(status: i32) -> End {
    match status & 0x7f {
        0 => End::Exit(status >> 8 & 0xff),
        signal => End::Signal(signal),
    }
}

/// The control memory of a worker, by its mapping; `None` for want of a
/// capability.
pub(crate) fn open_area(pid: i32, area: &Map) -> Option<File> {
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", area.start, area.end);
    File::open(path).ok()
}

/// The control area by itself, at address 0.
pub(crate) struct Area<'a>(pub(crate) &'a File);

impl Memory for Area<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), SnapshotError> {
        let file = self.0;
        file.read_exact_at(into, address)
            .map_err(|source| SnapshotError::Read {
                pid: 0,
                what: format!("{} bytes of counters at {address:#x}", into.len()),
                source,
            })
    }
}

/// The same in the living worker's memory.
#[derive(Debug)]
pub(crate) struct Shifted {
    pub(crate) memory: ProcMemory,
    pub(crate) base: u64,
}

impl Memory for Shifted {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), SnapshotError> {
        self.memory.read(self.base.wrapping_add(address), into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn held(script: &str) -> (Held, std::process::Child) {
        let child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::open(child.id().cast_signed()).unwrap();
        (Held::new(process, None, None), child)
    }

    #[test]
    fn an_end_is_told_whether_it_was_reaped_or_not() {
        for (script, expected) in [
            ("read x; exit 3", End::Exit(3)),
            ("read x; kill -SEGV $$", End::Signal(libc::SIGSEGV)),
            ("read x; kill -KILL $$", End::Signal(libc::SIGKILL)),
        ] {
            let (held, mut child) = held(script);
            drop(child.stdin.take());
            while held.process.is_alive() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let ended = held.ended();
            assert_eq!(ended.end, expected);
            assert!(!ended.from_outside && ended.in_flight.is_none());
            child.wait().unwrap();
            // Before Linux 6.15 nobody can tell any more.
            assert!([expected, End::Unknown].contains(&held.ended().end));
        }
    }

    #[test]
    fn whoever_is_told_to_end_ends_from_outside() {
        let (held, mut child) = held("read x; kill -TERM $$");
        drop(child.stdin.take());
        child.wait().unwrap();
        let ended = held.ended();
        assert!(ended.from_outside || ended.end == End::Unknown, "{ended:?}");
        assert_eq!(end(0x8b), End::Signal(libc::SIGSEGV));
        assert_eq!(End::Signal(9).to_string(), "died of SIGKILL");
        assert_eq!(End::Signal(99).to_string(), "died of signal 99");
    }
}
