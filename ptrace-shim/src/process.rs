//! A process, and what `/proc` says of it without stopping anyone.
//!
//! A [`Process`] holds a pidfd and the directory `/proc/PID`, both of which
//! belong to this very process: once it is gone everything fails with
//! [`Error::NoSuchProcess`], even if its number is in use again.

use crate::error::{Error, Result};
use crate::maps::{self, Mapping};
use crate::sys;
use crate::{Pid, Tid};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, fstat};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// A process that may be looked at and stopped. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Process {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pid: Pid,
    pidfd: OwnedFd,
    directory: OwnedFd,
    start_time: u64,
}

/// Of `/proc/PID/task/TID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) state: char,
    pub(crate) parent: Pid,
    /// In clock ticks since boot.
    pub(crate) start_time: u64,
    /// The CPU that the thread last ran on.
    pub(crate) cpu: usize,
}

impl Process {
    /// Opens the process `pid`, as seen from our PID namespace.
    ///
    /// # Errors
    /// [`Error::NoSuchProcess`] if there is none, or `pid` is a mere thread.
    pub fn open(pid: impl Into<Pid>) -> Result<Process> {
        let pid = pid.into();
        let gone = |_: Errno| Error::NoSuchProcess { pid };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory =
            open(format!("/proc/{pid}").as_str(), flags, Mode::empty()).map_err(gone)?;
        let pidfd = sys::proc::pidfd_open(pid.as_raw()).map_err(gone)?;
        let mut process = Process {
            inner: Arc::new(Inner {
                pid,
                pidfd,
                directory,
                start_time: 0,
            }),
        };
        // Read through the directory and after the pidfd was had: if it can
        // be read, both mean the same process.
        let start_time = process.stat(pid.leader())?.start_time;
        if let Some(inner) = Arc::get_mut(&mut process.inner) {
            inner.start_time = start_time;
        }
        if process.is_alive() {
            Ok(process)
        } else {
            Err(Error::NoSuchProcess { pid })
        }
    }

    /// The process's id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.inner.pid
    }

    /// When it started, in clock ticks since boot: together with the pid, this
    /// names a process for good.
    #[must_use]
    pub fn start_time(&self) -> u64 {
        self.inner.start_time
    }

    /// Whether it still runs (a zombie does not).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.inner.pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0) | Err(Errno::EINTR))
    }

    /// The pidfd, which becomes readable when the process ends.
    #[must_use]
    pub fn pidfd(&self) -> impl AsFd + '_ {
        self.inner.pidfd.as_fd()
    }

    /// How it ended, as a status of `wait`: asked while it is a zombie, or of
    /// kernels from 6.15 on at any time. `None` if that cannot be told (yet).
    #[must_use]
    pub fn end(&self) -> Option<i32> {
        if self.is_alive() {
            return None;
        }
        // Field 52 of a zombie's stat.
        let zombie = self.read_text("stat").ok().and_then(|text| {
            let (_, rest) = text.rsplit_once(')')?;
            let mut fields = rest.split_ascii_whitespace();
            (fields.next()? == "Z").then(|| fields.nth(52 - 4)?.parse().ok())?
        });
        zombie.or_else(|| sys::proc::pidfd_exit(self.inner.pidfd.as_fd()))
    }

    /// Whether it is on its way out, or gone: it has no memory any more, or a
    /// SIGKILL is pending.
    #[must_use]
    pub fn is_dying(&self) -> bool {
        const SIGKILL: u64 = 1 << 8;
        let Ok(status) = self.read_text("status") else {
            return true;
        };
        let pending = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            u64::from_str_radix(line.trim(), 16).ok()
        };
        let killed = ["SigPnd:", "ShdPnd:"]
            .into_iter()
            .filter_map(pending)
            .any(|signals| signals & SIGKILL != 0);
        killed || !status.contains("VmSize:")
    }

    /// Its threads, the leader first; some may be about to exit.
    ///
    /// # Errors
    /// [`Error::NoSuchProcess`] if it is gone.
    pub fn threads(&self) -> Result<Vec<Tid>> {
        let mut threads = Vec::with_capacity(16);
        self.tasks()?.list(&mut threads)?;
        Ok(threads)
    }

    /// Who traces the process's leader, by id and name.
    ///
    /// # Errors
    /// [`Error::NoSuchProcess`] if it is gone.
    pub fn tracer_of(&self) -> Result<Option<(Pid, String)>> {
        self.tracer_of_thread(self.pid().leader())
    }

    /// Who traces one of its threads. The id is that of the tracing thread.
    ///
    /// # Errors
    /// [`Error::NoSuchProcess`] if the process is gone, [`Error::Proc`] if the
    /// thread is.
    pub fn tracer_of_thread(&self, tid: Tid) -> Result<Option<(Pid, String)>> {
        let status = self.read_text(&format!("task/{tid}/status"))?;
        let tracer = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"))
            .and_then(|value| value.trim().parse().ok())
            .unwrap_or(0);
        if tracer == 0 {
            return Ok(None);
        }
        let comm = std::fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
        Ok(Some((Pid::from_raw(tracer), comm.trim_end().to_owned())))
    }

    /// What is mapped where, in ascending order.
    ///
    /// # Errors
    /// [`Error::NoSuchProcess`] if it is gone; [`Error::Proc`] if we are not
    /// permitted to know.
    pub fn mappings(&self) -> Result<Vec<Mapping>> {
        let text = self
            .read_text(&format!("{}maps", self.with_memory()?))
            .map_err(|error| self.without_memory(error))?;
        maps::parse(&text).map_err(|()| self.broken("maps"))
    }

    pub(crate) fn stat(&self, tid: Tid) -> Result<Stat> {
        let file = format!("task/{tid}/stat");
        let text = self.read_text(&file)?;
        parse_stat(&text).ok_or_else(|| self.broken(&file))
    }

    /// A thread's state letter; X if it is gone.
    pub(crate) fn state(&self, tid: Tid) -> char {
        self.stat(tid).map_or('X', |stat| stat.state)
    }

    pub(crate) fn tasks(&self) -> Result<Tasks> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        Ok(Tasks {
            pid: self.pid(),
            directory: self.open_at("task", flags)?,
        })
    }

    /// Opens a file below `/proc/PID`.
    pub(crate) fn open_at(&self, file: &str, flags: OFlag) -> Result<OwnedFd> {
        openat(
            self.inner.directory.as_fd(),
            file,
            flags | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|cause| self.failed(file, cause))
    }

    /// Opens a file about the memory that its threads share.
    pub(crate) fn open_of_memory(&self, file: &str, flags: OFlag) -> Result<OwnedFd> {
        self.open_at(&format!("{}{file}", self.with_memory()?), flags)
            .map_err(|error| self.without_memory(error))
    }

    /// A thread whose files tell of the memory may end before they are opened.
    fn without_memory(&self, error: Error) -> Error {
        match error {
            Error::Proc {
                cause: Errno::ESRCH | Errno::ENOENT,
                ..
            } => Error::AddressSpaceGone { pid: self.pid() },
            other => other,
        }
    }

    /// Whose files tell of the memory: a leader that others outlive has none.
    fn with_memory(&self) -> Result<String> {
        let dead = |tid| matches!(self.state(tid), 'Z' | 'X' | 'x');
        if !dead(self.pid().leader()) {
            return Ok(String::new());
        }
        let others = self.threads()?;
        Ok(match others.into_iter().find(|&tid| !dead(tid)) {
            Some(tid) => format!("task/{tid}/"),
            None => String::new(),
        })
    }

    pub(crate) fn read_text(&self, file: &str) -> Result<String> {
        let mut text = Vec::with_capacity(4096);
        File::from(self.open_at(file, OFlag::O_RDONLY)?)
            .read_to_end(&mut text)
            .map_err(|error| {
                let cause = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
                self.failed(file, cause)
            })?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Where a link below `/proc/PID` leads.
    pub(crate) fn read_link(&self, file: &str) -> Option<String> {
        let target = nix::fcntl::readlinkat(self.inner.directory.as_fd(), file).ok()?;
        target.into_string().ok()
    }

    fn failed(&self, file: &str, cause: Errno) -> Error {
        // A thread's own files go with the thread.
        let of_thread = file.starts_with("task/");
        if matches!(cause, Errno::ESRCH | Errno::ENOENT) && !(of_thread && self.is_alive()) {
            return Error::NoSuchProcess { pid: self.pid() };
        }
        Error::Proc {
            pid: self.pid(),
            file: file.to_owned(),
            cause,
        }
    }

    fn broken(&self, file: &str) -> Error {
        Error::Proc {
            pid: self.pid(),
            file: file.to_owned(),
            cause: Errno::EPROTO,
        }
    }
}

/// `/proc/PID/task`, kept open to be read again and again.
#[derive(Debug)]
pub(crate) struct Tasks {
    pid: Pid,
    directory: OwnedFd,
}

impl Tasks {
    /// Appends the threads that there are; `Ok(false)` if the list may lack
    /// some: the kernel ends it early when the thread that it has come to
    /// exits just then.
    pub(crate) fn list(&self, threads: &mut Vec<Tid>) -> Result<bool> {
        let gone = |_: Errno| Error::NoSuchProcess { pid: self.pid };
        let mut found = 0u64;
        sys::proc::numbered_entries(self.directory.as_fd(), |tid| {
            found += 1;
            threads.push(Tid::from_raw(tid));
        })
        .map_err(gone)?;
        // The directory's links are "." and ".." and one per thread.
        let links = fstat(self.directory.as_fd()).map_err(gone)?.st_nlink;
        if found == 0 {
            return Err(Error::NoSuchProcess { pid: self.pid });
        }
        Ok(found + 2 == links)
    }
}

/// Parses a `stat` file; the name in it may hold spaces and parentheses.
pub(crate) fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    // Numbered as in proc(5), where 3 is the state.
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse::<i32>().ok()?;
    let start_time = fields.nth(22 - 5)?.parse().ok()?;
    let cpu = fields.nth(39 - 23)?.parse().ok()?;
    Some(Stat {
        state,
        parent: Pid::from_raw(parent),
        start_time,
        cpu,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_parsed_from_behind_the_name() {
        let text = "27287 (a) R b) S 27260 27287 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 \
                    987654 100 200 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 3 0 0 0";
        let stat = parse_stat(text).unwrap();
        assert_eq!(stat.state, 'S');
        assert_eq!(stat.parent, Pid::from_raw(27260));
        assert_eq!(stat.start_time, 987_654);
        assert_eq!(stat.cpu, 3);
        assert_eq!(parse_stat("1 (x) S 2"), None);
    }

    #[test]
    fn our_own_process_is_seen() {
        let pid = Pid::from_raw(std::process::id().cast_signed());
        let process = Process::open(pid).unwrap();
        assert!(process.is_alive());
        assert!(process.start_time() > 0);
        assert!(process.threads().unwrap().contains(&pid.leader()));
        assert_eq!(process.tracer_of().unwrap(), None);
        assert!(process.mappings().unwrap().iter().any(|m| m.executable));
    }

    #[test]
    fn a_thread_or_a_nobody_is_no_process() {
        let other = std::thread::spawn(nix::unistd::gettid);
        let tid = nix::unistd::gettid();
        if tid != nix::unistd::getpid() {
            let error = Process::open(tid.as_raw()).unwrap_err();
            assert!(matches!(error, Error::NoSuchProcess { .. }));
        }
        drop(other.join());
        let error = Process::open(i32::MAX).unwrap_err();
        assert_eq!(error.to_string(), "process 2147483647: no such process");
    }
}
