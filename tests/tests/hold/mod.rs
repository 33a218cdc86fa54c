//! Holding a worker at an exact instruction.
//!
//! The test traces the worker for that long, and lets go of it with a signal:
//! SIGSTOP leaves it stopped right there, untraced, so that the agent can do
//! its work. All of it must happen on one thread, as tracing does.

mod request;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nightgraft_testbed::until;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
pub(crate) use request::Request;

const WITHIN: Duration = Duration::from_secs(10);
const INT3: u8 = 0xcc;

/// A breakpoint in a worker that this thread traces. The worker's byte is put
/// back by [`Breakpoint::leave`], or when this is dropped.
pub(crate) struct Breakpoint {
    pid: Pid,
    memory: File,
    address: u64,
    original: u8,
    /// The signal that the worker is stopped with; `None` while it runs.
    stopped: Option<Signal>,
    left: bool,
}

impl Breakpoint {
    /// Seizes the worker's main thread and sets a breakpoint.
    pub(crate) fn set(pid: i32, address: u64) -> Result<Self> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        let mut original = [0];
        memory.read_exact_at(&mut original, address)?;
        let pid = Pid::from_raw(pid);
        ptrace::seize(pid, ptrace::Options::empty()).context("seize")?;
        let mut breakpoint = Self {
            pid,
            memory,
            address,
            original: original[0],
            stopped: None,
            left: false,
        };
        breakpoint.interrupt()?;
        breakpoint.memory.write_all_at(&[INT3], address)?;
        breakpoint.go(None)?;
        Ok(breakpoint)
    }

    fn interrupt(&mut self) -> Result<()> {
        ptrace::interrupt(self.pid)?;
        let deadline = Instant::now() + WITHIN;
        while self.stop()?.is_none() {
            ensure!(Instant::now() < deadline, "it does not stop");
        }
        Ok(())
    }

    fn go(&mut self, signal: Option<Signal>) -> Result<()> {
        ptrace::cont(self.pid, signal)?;
        self.stopped = None;
        Ok(())
    }

    /// The next stop, if there is one now; waits for it for a moment.
    fn stop(&mut self) -> Result<Option<Signal>> {
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL))? {
            WaitStatus::StillAlive => {
                std::thread::sleep(Duration::from_micros(200));
                Ok(None)
            }
            WaitStatus::Stopped(_, signal) | WaitStatus::PtraceEvent(_, signal, _) => {
                self.stopped = Some(signal);
                Ok(Some(signal))
            }
            other => bail!("the worker: {other:?}"),
        }
    }

    /// Waits until the worker comes by, and takes the breakpoint away. `false`
    /// where `is_over` is so before that.
    pub(crate) fn reached(&mut self, is_over: impl Fn() -> bool) -> Result<bool> {
        let deadline = Instant::now() + WITHIN;
        loop {
            ensure!(Instant::now() < deadline, "neither reached nor over");
            let over = is_over();
            match self.stop()? {
                None if over => return Ok(false),
                None => {}
                Some(Signal::SIGTRAP) => break,
                Some(signal) => self.go(Some(signal))?,
            }
        }
        let mut registers = ptrace::getregs(self.pid)?;
        assert_eq!(registers.rip, self.address + 1, "another trap");
        self.memory.write_all_at(&[self.original], self.address)?;
        registers.rip = self.address;
        ptrace::setregs(self.pid, registers)?;
        Ok(true)
    }

    /// Lets go of the worker, with a signal. Returns once a stop by it is seen.
    pub(crate) fn leave(mut self, signal: Signal) -> Result<()> {
        if self.stopped.is_none() {
            self.interrupt()?;
        }
        self.memory.write_all_at(&[self.original], self.address)?;
        self.left = true;
        ptrace::detach(self.pid, Some(signal))?;
        let pid = self.pid.as_raw();
        if signal == Signal::SIGSTOP {
            until("the worker is stopped and not traced", || is_stopped(pid));
        }
        Ok(())
    }
}

impl Drop for Breakpoint {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        // A test that fails: as far as it goes.
        if self.stopped.is_none() {
            let _ = self.interrupt();
        }
        let _ = self.memory.write_all_at(&[self.original], self.address);
        let _ = ptrace::detach(self.pid, None);
    }
}

fn status(pid: i32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.trim_start_matches([':', '\t']).to_owned())
}

/// Whether a process is stopped by a signal, and by nobody else.
pub(crate) fn is_stopped(pid: i32) -> bool {
    status(pid, "State").is_some_and(|s| s.starts_with('T'))
        && status(pid, "TracerPid").as_deref() == Some("0")
}

/// Where a stopped process stands, outside of any system call.
pub(crate) fn instruction_pointer(pid: i32) -> Result<u64> {
    // "-1 0x<stack pointer> 0x<instruction pointer>"
    let text = fs::read_to_string(format!("/proc/{pid}/syscall"))?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let ["-1", _, at] = words[..] else {
        bail!("{pid} is in a system call: {text}")
    };
    Ok(u64::from_str_radix(at.trim_start_matches("0x"), 16)?)
}
