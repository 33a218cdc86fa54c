//! The process in which ld.so loads a library.

use std::collections::HashMap;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

const SOURCE: &str = include_str!("host.c");
/// The longest answer, in bytes: a list of objects.
const MOST: usize = 1 << 20;

/// The host, compiled: it starts with what a worker starts with.
#[derive(Debug)]
pub struct Program {
    folder: TempDir,
}

impl Program {
    /// Compiles it.
    ///
    /// # Errors
    /// There is no C compiler, or it fails.
    pub fn compile() -> Result<Program> {
        let program = Program {
            folder: TempDir::new()?,
        };
        let source = program.folder.path().join("host.c");
        std::fs::write(&source, SOURCE)?;
        let status = Command::new("gcc")
            .args(["-O1", "-no-pie", "-fno-pie", "-o"])
            .args([&program.path(), &source])
            .args(["-Wl,--no-as-needed", "-lstdc++", "-lm"])
            .args(["-ldl", "-lpthread"])
            .status()
            .context("starting gcc")?;
        ensure!(status.success(), "gcc: {status}");
        Ok(program)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("host")
    }
}

/// Why ld.so does not load a library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unloadable {
    /// It says so.
    Error(String),
    /// The process died.
    Died(String),
    /// It took too long.
    Timeout,
    /// A worker starts with it: nothing is ever loaded.
    Startup,
}

impl Unloadable {
    /// The reason in a word or two, the same for all libraries of a kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Unloadable::Error(text) if text.contains("undefined symbol") => "undefined symbol",
            Unloadable::Error(text) if text.contains("cannot open shared") => "missing dependency",
            Unloadable::Error(text) if text.contains("static TLS block") => {
                "no room for static TLS"
            }
            Unloadable::Error(_) => "other error",
            Unloadable::Died(_) => "died",
            Unloadable::Timeout => "timeout",
            Unloadable::Startup => "part of every worker",
        }
    }
}

impl fmt::Display for Unloadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unloadable::Error(text) | Unloadable::Died(text) => f.write_str(text),
            Unloadable::Timeout => f.write_str("the process did not answer in time"),
            Unloadable::Startup => f.write_str("a worker starts with it"),
        }
    }
}

/// Functions that run when an object is loaded, or at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routines {
    /// `DT_INIT` or `DT_FINI`, an address in the image.
    pub function: u64,
    /// `DT_INIT_ARRAY` or `DT_FINI_ARRAY`, an address in the image.
    pub array: u64,
    /// The array's size.
    pub bytes: u64,
}

/// What the process says of a loaded object; numbers are 0 where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// Live address = address in the image + `bias` (wrapping).
    pub bias: u64,
    /// The number of its thread-local storage.
    pub tls_module: u64,
    /// Where the main thread has it, if it has it already.
    pub tls_block: u64,
    /// Live address of `PT_GNU_EH_FRAME`.
    pub unwind: u64,
    /// What initialises it.
    pub init: Routines,
    /// What runs at its end.
    pub fini: Routines,
}

impl Object {
    fn parse(line: &str) -> Result<Object> {
        let numbers: Vec<u64> = line
            .split(' ')
            .map(|word| u64::from_str_radix(word, 16))
            .collect::<Result<_, _>>()
            .with_context(|| format!("the host said {line:?}"))?;
        let &[bias, tls_module, tls_block, unwind, ref routines @ ..] = numbers.as_slice() else {
            bail!("the host said {line:?}");
        };
        let &[init, init_array, init_bytes, fini, fini_array, fini_bytes] = routines else {
            bail!("the host said {line:?}");
        };
        Ok(Object {
            bias,
            tls_module,
            tls_block,
            unwind,
            init: Routines {
                function: init,
                array: init_array,
                bytes: init_bytes,
            },
            fini: Routines {
                function: fini,
                array: fini_array,
                bytes: fini_bytes,
            },
        })
    }
}

/// A process that has loaded a library; killed when dropped.
#[derive(Debug)]
pub struct Host {
    process: Process,
    library: String,
    thread_pointer: u64,
    objects: Vec<Object>,
    /// How many of `objects` it started with.
    startup: usize,
    called: HashMap<u64, u64>,
}

impl Host {
    /// Starts a process that loads `library`, an absolute path.
    ///
    /// # Errors
    /// The process cannot be started, or says what is not to be understood.
    pub fn start(
        program: &Program,
        library: &Path,
        patience: Duration,
    ) -> Result<Result<Host, Unloadable>> {
        let mut process = Process::start(program, library, patience)?;
        let first = match process.line() {
            Ok(line) => line,
            Err(why) => return Ok(Err(why)),
        };
        if let Some(error) = first.strip_prefix("error ") {
            return Ok(Err(Unloadable::Error(error.to_owned())));
        }
        let mut lines = Vec::new();
        loop {
            match process.line() {
                Ok(line) if line.is_empty() => break,
                Ok(line) => lines.push(line),
                Err(why) => return Ok(Err(why)),
            }
        }
        ensure!(lines.len() > 2, "the host said too little");
        let number = |line: &str| {
            u64::from_str_radix(line, 16).with_context(|| format!("the host said {line:?}"))
        };
        Ok(Ok(Host {
            process,
            library: first,
            thread_pointer: number(&lines[0])?,
            startup: number(&lines[1])? as usize,
            objects: lines[2..]
                .iter()
                .map(|line| Object::parse(line))
                .collect::<Result<_>>()?,
            called: HashMap::new(),
        }))
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.child.id() as i32
    }

    /// The library as ld.so names it.
    #[must_use]
    pub fn library(&self) -> &str {
        &self.library
    }

    /// The main thread's thread pointer.
    #[must_use]
    pub fn thread_pointer(&self) -> u64 {
        self.thread_pointer
    }

    /// The object that is loaded with this bias.
    #[must_use]
    pub fn object(&self, bias: u64) -> Option<&Object> {
        self.objects.iter().find(|object| object.bias == bias)
    }

    /// The object whose thread-local storage has this number.
    #[must_use]
    pub fn tls_object(&self, module: u64) -> Option<&Object> {
        let mut objects = self.objects.iter();
        objects.find(|object| module != 0 && object.tls_module == module)
    }

    /// Whether the process started with the object of this bias.
    #[must_use]
    pub fn started_with(&self, bias: u64) -> bool {
        let startup = &self.objects[..self.startup.min(self.objects.len())];
        startup.iter().any(|object| object.bias == bias)
    }

    /// What the function at a live address returns, called without arguments.
    ///
    /// # Errors
    /// The process dies of it, or takes too long.
    pub fn call(&mut self, function: u64) -> Result<u64> {
        if let Some(known) = self.called.get(&function) {
            return Ok(*known);
        }
        let result = self.ask('c', function, 0)?;
        self.called.insert(function, result);
        Ok(result)
    }

    /// What the TLS descriptor at a live address yields: the distance of a
    /// variable from the thread pointer (wrapping).
    ///
    /// # Errors
    /// As [`Host::call`].
    pub fn descriptor(&mut self, at: u64) -> Result<u64> {
        self.ask('d', at, 0)
    }

    /// What `__tls_get_addr` returns, less the thread pointer (wrapping).
    ///
    /// # Errors
    /// As [`Host::call`].
    pub fn tls(&mut self, module: u64, offset: u64) -> Result<u64> {
        self.ask('t', module, offset)
    }

    fn ask(&mut self, what: char, first: u64, second: u64) -> Result<u64> {
        writeln!(self.process.input, "{what} {first:x} {second:x}")?;
        let line = match self.process.line() {
            Ok(line) => line,
            Err(why) => bail!("asked for {what} {first:#x} {second:#x}: {why}"),
        };
        Ok(u64::from_str_radix(&line, 16)?)
    }
}

#[derive(Debug)]
struct Process {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    received: Vec<u8>,
    patience: Duration,
    _scratch: TempDir,
}

impl Process {
    fn start(program: &Program, library: &Path, patience: Duration) -> Result<Process> {
        let scratch = TempDir::new()?;
        let mut child = Command::new(program.path())
            .arg(library)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", scratch.path())
            .env("TMPDIR", scratch.path())
            .current_dir(scratch.path())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting the host")?;
        let input = child.stdin.take().context("the host's input")?;
        let output = child.stdout.take().context("the host's output")?;
        Ok(Process {
            child,
            input,
            output,
            received: Vec::new(),
            patience,
            _scratch: scratch,
        })
    }

    /// The next line, without its end.
    fn line(&mut self) -> Result<String, Unloadable> {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.received.len() > MOST {
                return Err(Unloadable::Timeout);
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut ready = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, timeout) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(Unloadable::Died(error.to_string())),
            }
            let mut bytes = [0; 4096];
            match self.output.read(&mut bytes) {
                Ok(0) => return Err(self.ended()),
                Ok(len) => self.received.extend_from_slice(&bytes[..len]),
                Err(error) => return Err(Unloadable::Died(error.to_string())),
            }
        }
    }

    fn ended(&mut self) -> Unloadable {
        // Nothing holds its output but itself, so it is ending.
        Unloadable::Died(match self.child.wait() {
            Ok(status) => match status.signal() {
                Some(signal) => format!("the process died of signal {signal}"),
                None => format!("the process ended: {status}"),
            },
            Err(error) => error.to_string(),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_read_as_they_are_said() {
        let object = Object::parse("7f00 1 7e00 7f10 1000 2000 8 0 3000 10").unwrap();
        assert_eq!((object.bias, object.tls_module), (0x7f00, 1));
        assert_eq!((object.init.array, object.init.bytes), (0x2000, 8));
        assert_eq!((object.fini.array, object.fini.bytes), (0x3000, 16));
        let wrong = ["", "1 2 3", "1 2 3 4 5 6 7 8 9 x", "1 2 3 4 5 6 7 8 9 a b"];
        for wrong in wrong {
            assert!(Object::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn reasons_have_kinds() {
        let kind = |text: &str| Unloadable::Error(text.into()).kind();
        assert_eq!(kind("a.so: undefined symbol: f"), "undefined symbol");
        let missing = "b.so: cannot open shared object file: No such file";
        assert_eq!(kind(missing), "missing dependency");
    }
}
