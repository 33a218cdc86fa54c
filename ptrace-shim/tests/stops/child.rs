//! Starting and talking to a subject.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ptrace_shim::{Gadgets, Memory, Process, StopOptions, Tid};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Names the role to a subject.
pub(crate) const ROLE: &str = "PTRACE_SHIM_TEST_ROLE";

/// Longer than anything here takes on a loaded machine, or on an emulated
/// processor.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A subject; killed and reaped when dropped.
pub(crate) struct Subject {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    rest: Vec<u8>,
}

impl Subject {
    /// Starts this binary in a role, given as words.
    pub(crate) fn start(role: &str) -> Subject {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new(program)
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Subject {
            input: child.stdin.take(),
            output: child.stdout.take().unwrap(),
            child,
            rest: Vec::new(),
        }
    }

    /// Starts one, and waits for its "ready"; the thread that it names there.
    pub(crate) fn ready(role: &str) -> (Subject, Tid) {
        let mut subject = Subject::start(role);
        let line = subject.line();
        let tid = line.strip_prefix("ready ").unwrap().parse::<i32>().unwrap();
        (subject, Tid::from_raw(tid))
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub(crate) fn process(&self) -> Process {
        Process::open(self.pid()).unwrap()
    }

    pub(crate) fn gadgets(&self) -> Gadgets {
        Gadgets::find(&Memory::open(&self.process()).unwrap()).unwrap()
    }

    /// Sends it some bytes.
    pub(crate) fn tell(&mut self, bytes: &str) {
        let input = self.input.as_mut().unwrap();
        input.write_all(bytes.as_bytes()).unwrap();
    }

    /// Ends its input.
    pub(crate) fn hang_up(&mut self) {
        self.input = None;
    }

    /// The next line that it prints.
    pub(crate) fn line(&mut self) -> String {
        self.line_within(PATIENCE)
            .unwrap_or_else(|| panic!("the subject says nothing: {}", self.status()))
    }

    /// The next line, if it comes soon enough.
    pub(crate) fn line_within(&mut self, patience: Duration) -> Option<String> {
        let end = Instant::now() + patience;
        loop {
            if let Some(at) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=at).collect();
                return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis() as i32 + 1).unwrap();
            let mut fds = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, timeout) == Ok(0) {
                return None;
            }
            let mut piece = [0; 4096];
            let read = self.output.read(&mut piece).unwrap();
            if read == 0 {
                return None;
            }
            self.rest.extend_from_slice(&piece[..read]);
        }
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "no end: {}", self.status());
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    /// Sends it a signal.
    pub(crate) fn kill(&self, signal: i32) {
        // SAFETY: two numbers; the child has not been reaped.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
    }

    /// A thread's state letter, of `/proc/PID/task/TID/stat`.
    pub(crate) fn state(&self, tid: impl Into<Tid>) -> char {
        let path = format!("/proc/{}/task/{}/stat", self.pid(), tid.into());
        let stat = std::fs::read_to_string(path).unwrap_or_default();
        let rest = stat.rsplit_once(") ").map_or("X", |(_, rest)| rest);
        rest.chars().next().unwrap()
    }

    /// Whether a thread is gone, or on its way out: past its last user code.
    pub(crate) fn is_exiting(&self, tid: Tid) -> bool {
        const PF_EXITING: u64 = 4;
        let path = format!("/proc/{}/task/{tid}/stat", self.pid());
        let flags = || {
            let stat = std::fs::read_to_string(&path).ok()?;
            let (_, rest) = stat.rsplit_once(") ")?;
            rest.split(' ').nth(6)?.parse::<u64>().ok()
        };
        // An instant passes between being let go of and the flag.
        until(
            || flags().is_none_or(|flags| flags & PF_EXITING != 0),
            || format!("{:?}", std::fs::read_to_string(&path)),
        );
        true
    }

    /// Waits until a thread is in a state.
    pub(crate) fn until_state(&self, tid: impl Into<Tid>, state: char) {
        let tid = tid.into();
        until(|| self.state(tid) == state, || self.status());
    }

    /// Waits until a thread is blocked in a system call.
    pub(crate) fn until_in_call(&self, tid: impl Into<Tid>, nr: libc::c_long) {
        let path = format!("/proc/{}/task/{}/syscall", self.pid(), tid.into());
        let start = format!("{nr} ");
        until(
            || std::fs::read_to_string(&path).is_ok_and(|text| text.starts_with(&start)),
            || self.status(),
        );
    }

    /// Its status file, to be printed when something is wrong.
    pub(crate) fn status(&self) -> String {
        let path = format!("/proc/{}/status", self.pid());
        std::fs::read_to_string(path).unwrap_or_else(|error| error.to_string())
    }

    /// Asserts that nobody traces any of its threads.
    pub(crate) fn assert_untraced(&self) {
        let process = self.process();
        for tid in process.threads().unwrap() {
            if let Ok(tracer) = process.tracer_of_thread(tid) {
                assert_eq!(tracer, None, "thread {tid}");
            }
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // Fails if it has ended and been reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something holds.
pub(crate) fn until(holds: impl Fn() -> bool, explain: impl Fn() -> String) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "it never came to that: {}", explain());
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// Deadlines that no loaded machine overruns.
pub(crate) fn patient() -> StopOptions {
    StopOptions {
        deadline: PATIENCE,
        call_deadline: PATIENCE,
        ..StopOptions::default()
    }
}

/// Numbers that look random and are the same each time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
