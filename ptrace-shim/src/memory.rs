//! The memory of a process, through `/proc/PID/mem`, while it runs.
//!
//! No write here is atomic for the process, not even that of an aligned word:
//! a running thread may see any mixture of old and new bytes. Code is written
//! only while all threads are stopped ([`crate::StoppedProcess::write_code`]).
//!
//! Writing where the process itself may not (its code) is a *forced* write.
//! Kernels since 6.12 can be told to forbid those (`proc_mem.force_override`),
//! to all or to all but the tracer; then it takes a stop, see [`WriteMethod`].

use crate::error::{Error, Result};
use crate::{Address, Pid, Process, faults};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The memory of one process. Cheap to clone; may be used from any thread.
///
/// It belongs to the program that the process ran when it was opened: after an
/// `execve` everything fails with [`Error::AddressSpaceGone`].
#[derive(Clone, Debug)]
pub struct Memory {
    file: Arc<File>,
    process: Process,
    method: WriteMethod,
}

/// How memory is written that the process itself may not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteMethod {
    /// `/proc/PID/mem`, at any time.
    ProcMem,
    /// `/proc/PID/mem`, only by the OS thread that traces the process's leader.
    ProcMemTraced,
    /// `PTRACE_POKEDATA`, only through a stopped thread, 8 bytes at a time.
    PokeData,
}

impl WriteMethod {
    /// Finds out what this kernel allows, by a forced write to ourselves, and
    /// where that is forbidden to a child that is traced.
    #[must_use]
    pub fn probe() -> WriteMethod {
        let forbidden = |error: &std::io::Error, to: &str| {
            tracing::debug!(%error, "forced writes to /proc/PID/mem are forbidden to {to}");
        };
        match probe_forced_write("self") {
            Ok(()) => return WriteMethod::ProcMem,
            Err(error) => forbidden(&error, "all"),
        }
        match crate::sys::probe::with_traced_child(|child| probe_forced_write(&child.to_string())) {
            Ok(()) => WriteMethod::ProcMemTraced,
            Err(error) => {
                forbidden(&error, "the tracer");
                WriteMethod::PokeData
            }
        }
    }

    /// What [`WriteMethod::probe`] found when it was first needed.
    #[must_use]
    pub fn of_this_kernel() -> WriteMethod {
        static METHOD: std::sync::OnceLock<WriteMethod> = std::sync::OnceLock::new();
        *METHOD.get_or_init(WriteMethod::probe)
    }

    /// The most bytes of code that are written in one go (within one page): an
    /// agent that dies has written all of them or none.
    #[must_use]
    pub fn most_in_one_go(self) -> usize {
        match self {
            WriteMethod::ProcMem | WriteMethod::ProcMemTraced => crate::PAGE_SIZE as usize,
            WriteMethod::PokeData => WORD,
        }
    }
}

/// What `PTRACE_POKEDATA` writes at a time, in bytes; wherever it begins.
pub(crate) const WORD: usize = 8;

/// Writes to a read-only byte of ours, or of a child's that is a copy of us,
/// what it already holds.
fn probe_forced_write(pid: &str) -> std::io::Result<()> {
    static READ_ONLY: u8 = 0x5a;
    let address = std::hint::black_box(&raw const READ_ONLY).addr() as u64;
    File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?
        .write_all_at(&[READ_ONLY], address)
}

impl Memory {
    /// Opens the memory of a process, to be written as this kernel allows.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] without the right to trace it;
    /// [`Error::NoSuchProcess`] if it is gone.
    pub fn open(process: &Process) -> Result<Memory> {
        Memory::open_with(process, WriteMethod::of_this_kernel())
    }

    /// Opens the memory of a process, to be written in the given way.
    ///
    /// # Errors
    /// As for [`Memory::open`].
    pub fn open_with(process: &Process, method: WriteMethod) -> Result<Memory> {
        let file = process
            .open_of_memory("mem", OFlag::O_RDWR)
            .map_err(|error| match error {
                Error::Proc {
                    cause: Errno::EACCES | Errno::EPERM,
                    ..
                } => Error::NotPermitted {
                    pid: process.pid(),
                    tid: process.pid().leader(),
                    yama_scope: crate::tracee::yama_scope(),
                },
                other => other,
            })?;
        Ok(Memory {
            file: Arc::new(file.into()),
            process: process.clone(),
            method,
        })
    }

    /// How memory is written that the process may not write.
    #[must_use]
    pub fn write_method(&self) -> WriteMethod {
        self.method
    }

    /// The process whose memory this is.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Fills `buffer` from `address` on.
    ///
    /// # Errors
    /// [`Error::Memory`] with the first address that can't be read; the buffer
    /// then holds what came before. [`Error::AddressSpaceGone`].
    pub fn read(&self, address: Address, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = self.offset("reading", address, done, buffer.len())?;
            match self.file.read_at(&mut buffer[done..], at) {
                Ok(0) => return Err(self.gone()),
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("reading", at, buffer.len() - done, &error)),
            }
        }
        Ok(())
    }

    /// Reads `length` bytes from `address` on. Memory is allocated as it is
    /// read: a length that a hostile process made up costs no more than it has.
    ///
    /// # Errors
    /// As for [`Memory::read`].
    pub fn read_vec(&self, address: Address, length: usize) -> Result<Vec<u8>> {
        const PIECE: usize = 1 << 20;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let done = bytes.len();
            let at = self.offset("reading", address, done, length)?;
            bytes.resize(length.min(done + PIECE), 0);
            self.read(Address(at), &mut bytes[done..])?;
        }
        Ok(bytes)
    }

    /// Reads a little-endian word of 8 bytes.
    ///
    /// # Errors
    /// As for [`Memory::read`].
    pub fn read_u64(&self, address: Address) -> Result<u64> {
        let mut word = [0; 8];
        self.read(address, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Writes `bytes` from `address` on, in one call where the kernel takes
    /// them in one.
    ///
    /// # Errors
    /// [`Error::ForcedWriteForbidden`] where the process itself may not write
    /// and forced writes take a stop; [`Error::Memory`] with the first address
    /// that can't be written, what came before is written;
    /// [`Error::AddressSpaceGone`].
    pub fn write(&self, address: Address, bytes: &[u8]) -> Result<()> {
        if self.method != WriteMethod::ProcMem && !self.process_may_write(address, bytes.len())? {
            return Err(Error::ForcedWriteForbidden {
                pid: self.pid(),
                address,
                length: bytes.len(),
            });
        }
        self.write_through(address, bytes)
    }

    /// Writes, whether the process may or not: the kernel says no where it does
    /// not allow that to us.
    pub(crate) fn write_through(&self, address: Address, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = self.offset("writing", address, done, bytes.len())?;
            crate::sys::step();
            faults::hit(faults::WRITE.before);
            let result = self.file.write_at(&bytes[done..], at);
            faults::hit(faults::WRITE.after);
            match result {
                Ok(0) => return Err(self.gone()),
                Ok(written) => done += written,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("writing", at, bytes.len() - done, &error)),
            }
        }
        Ok(())
    }

    fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Whether all of it is mapped writable for the process.
    fn process_may_write(&self, address: Address, length: usize) -> Result<bool> {
        let mut next = address;
        let end = address.0.saturating_add(length as u64);
        for mapping in self.process.mappings()? {
            // What lies behind is no matter, adjacent as it may be.
            if next.0 < end && mapping.contains(next) {
                if !mapping.writable {
                    return Ok(false);
                }
                next = mapping.end;
            }
        }
        Ok(next.0 >= end)
    }

    /// The file offset `done` bytes behind `address`. Those past what a file
    /// offset can be (the kernel's half) are never readable.
    fn offset(
        &self,
        operation: &'static str,
        address: Address,
        done: usize,
        length: usize,
    ) -> Result<u64> {
        address
            .0
            .checked_add(done as u64)
            .filter(|&at| i64::try_from(at).is_ok())
            .ok_or(Error::Memory {
                operation,
                pid: self.pid(),
                address,
                length: length - done,
                cause: Errno::EIO,
            })
    }

    fn failed(
        &self,
        operation: &'static str,
        at: u64,
        length: usize,
        error: &std::io::Error,
    ) -> Error {
        Error::Memory {
            operation,
            pid: self.pid(),
            address: Address(at),
            length,
            cause: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        }
    }

    fn gone(&self) -> Error {
        Error::AddressSpaceGone { pid: self.pid() }
    }
}
