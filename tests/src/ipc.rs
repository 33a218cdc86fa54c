//! What processes on the node share: one directory with the engine's socket,
//! the FIFOs and the payload files.
//!
//! ```text
//! <root>/engine.sock                 launchers and workers introduce themselves here
//! <root>/fifo/worker_<n>_input       engine → worker n
//! <root>/fifo/worker_<n>_output      worker n → engine
//! <root>/fifo/<call>.o               one nested call's answer (with --use_fifo_for_nested_call)
//! <root>/shm/<call>.i, <call>.o      a payload too large for its message
//! ```
//!
//! The directory is a tmpfs, mounted into every container; its path there may
//! be another, which is why nothing but file *names* is ever sent.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;

use crate::sys::Region;
use crate::wire::CallId;

/// Where the shared directory is unless something else is said.
pub const DEFAULT_ROOT: &str = "/dev/shm/faas_ipc";

/// The shared directory, as one process sees it.
#[derive(Clone, Debug)]
pub struct Ipc {
    root: PathBuf,
}

impl Ipc {
    /// Uses a directory that the engine made.
    pub fn open(root: &Path) -> io::Result<Self> {
        for part in ["shm", "fifo"] {
            if !root.join(part).is_dir() {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!(
                        "{} is no directory of an engine: it has no {part}",
                        root.display()
                    ),
                ));
            }
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Makes the directory anew, as the engine does when it starts. The
    /// directory itself stays if it is there: it may be a mount point.
    pub fn create(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        for part in ["shm", "fifo"] {
            let dir = root.join(part);
            if dir.exists() {
                fs::remove_dir_all(&dir)?;
            }
            fs::create_dir(&dir)?;
        }
        match fs::remove_file(root.join("engine.sock")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The engine's socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("engine.sock")
    }

    /// The FIFO that worker `client` reads.
    pub fn worker_input(&self, client: u16) -> PathBuf {
        self.root.join(format!("fifo/worker_{client}_input"))
    }

    /// The FIFO that worker `client` writes.
    pub fn worker_output(&self, client: u16) -> PathBuf {
        self.root.join(format!("fifo/worker_{client}_output"))
    }

    /// The FIFO for the answer of one nested call.
    pub fn call_fifo(&self, call: CallId) -> PathBuf {
        self.root.join(format!("fifo/{}.o", call.0))
    }

    fn payload(&self, call: CallId, which: Payload) -> PathBuf {
        let suffix = match which {
            Payload::Input => "i",
            Payload::Output => "o",
        };
        self.root.join(format!("shm/{}.{suffix}", call.0))
    }

    /// Writes a payload's file. It must not be there yet.
    pub fn write_payload(&self, call: CallId, which: Payload, data: &[u8]) -> io::Result<()> {
        let path = self.payload(call, which);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o664)
            .open(&path)?;
        file.write_all(data).inspect_err(|_| {
            let _ = fs::remove_file(&path);
        })
    }

    /// Maps a payload's file, read-only.
    pub fn map_payload(&self, call: CallId, which: Payload) -> io::Result<Region> {
        Region::of_file(&File::open(self.payload(call, which))?)
    }

    /// Removes a payload's file; it need not be there.
    pub fn remove_payload(&self, call: CallId, which: Payload) {
        let _ = fs::remove_file(self.payload(call, which));
    }
}

/// Which way a payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// To the callee.
    Input,
    /// Back to the caller.
    Output,
}

/// Makes a FIFO.
pub fn make_fifo(path: &Path) -> io::Result<()> {
    nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o664)).map_err(Into::into)
}

fn open_fifo(path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    nix::fcntl::open(
        path,
        flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(Into::into)
}

/// Opens a FIFO for reading, whether or not it has a writer; non-blocking.
pub fn fifo_reader(path: &Path) -> io::Result<OwnedFd> {
    open_fifo(path, OFlag::O_RDONLY)
}

/// Opens a FIFO for writing; fails if nobody reads it. Non-blocking.
pub fn fifo_writer(path: &Path) -> io::Result<OwnedFd> {
    open_fifo(path, OFlag::O_WRONLY)
}

/// Opens a FIFO for both, so that it never sees its end; non-blocking.
pub fn fifo_both(path: &Path) -> io::Result<OwnedFd> {
    open_fifo(path, OFlag::O_RDWR)
}

/// Lets reads of this FIFO block.
pub fn set_blocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Reads until `buf` is full. Interruptions are no end; end of file is an
/// error of kind `UnexpectedEof`.
pub fn read_full(fd: &OwnedFd, buf: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    while at < buf.len() {
        match nix::unistd::read(fd, &mut buf[at..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => at += n,
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Writes all of `buf`.
pub fn write_full(fd: &OwnedFd, buf: &[u8]) -> io::Result<()> {
    let mut at = 0;
    while at < buf.len() {
        match nix::unistd::write(fd, &buf[at..]) {
            Ok(n) => at += n,
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
