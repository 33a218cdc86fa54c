//! A worker as it is, read without stopping it.
//!
//! ```text
//!  /proc/PID/{maps,limits,environ,cmdline,auxv}   what the kernel says
//!  /proc/PID/mem                                  the dynamic linker's list,
//!                                                 headers, bytes at sites
//!  /proc/PID/root/…                               the ELF files
//! ```
//!
//! A file is taken for what is mapped only if its headers and build-id, as
//! they lie in memory, are the file's; without a build-id, all that is never
//! written is compared. Names, devices and inodes can lie (a file replaced on
//! disk, overlayfs before Linux 6.8).
//!
//! A worker runs on while it is read, so a snapshot may be out of date at
//! once. Whatever a patch relies on is checked again while it is stopped.

mod linkmap;
mod mapped;
mod rootfs;
mod routine;
mod static_tls;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use procfs::process::{MMPermissions, MMapPath};

use crate::elf::{ElfError, Image, constants};

pub use routine::invoke_routines;

/// Why a worker could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The process is gone, or another one has its pid.
    #[error("worker {pid} is gone")]
    Gone {
        /// The worker.
        pid: i32,
    },
    /// Something of the process could not be read.
    #[error("worker {pid}: cannot read {what}: {source}")]
    Read {
        /// The worker.
        pid: i32,
        /// What was to be read.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The dynamic linker's list makes no sense.
    #[error("the dynamic linker's list of libraries: {what}")]
    LinkMap {
        /// What is wrong with it.
        what: String,
    },
    /// A file is no image.
    #[error("{path}: {source}")]
    Elf {
        /// The file, as the worker's container names it.
        path: String,
        /// What is wrong with it.
        source: ElfError,
    },
    /// The function's library is not loaded in the worker.
    #[error("worker {pid} has not loaded {library}")]
    NotLoaded {
        /// The worker.
        pid: i32,
        /// The library, as the worker names it.
        library: String,
    },
    /// A file on disk is not what is mapped.
    #[error("{path} is not the file that worker {pid} has mapped: it was replaced on disk since")]
    Replaced {
        /// The worker.
        pid: i32,
        /// The file.
        path: String,
    },
}

/// Reading a process's memory while it runs.
pub trait Memory {
    /// Fills `into` from `address`.
    ///
    /// # Errors
    /// When any byte of it is not mapped, or the process is gone.
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), SnapshotError>;

    /// A little-endian word.
    ///
    /// # Errors
    /// As [`Memory::read`].
    fn u64(&self, address: u64) -> Result<u64, SnapshotError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A NUL-terminated string of at most `most` bytes.
    ///
    /// # Errors
    /// As [`Memory::read`]; a longer one is cut.
    fn string(&self, address: u64, most: usize) -> Result<String, SnapshotError> {
        let mut text = Vec::new();
        let mut byte = [0];
        while text.len() < most {
            self.read(address.wrapping_add(text.len() as u64), &mut byte)?;
            if byte[0] == 0 {
                break;
            }
            text.push(byte[0]);
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// `/proc/PID/mem`.
#[derive(Debug)]
pub struct ProcMemory {
    pid: i32,
    file: std::fs::File,
}

impl ProcMemory {
    /// Opens the memory of process `pid` for reading.
    ///
    /// # Errors
    /// The process is gone or may not be read.
    pub fn open(pid: i32) -> Result<ProcMemory, SnapshotError> {
        let path = format!("/proc/{pid}/mem");
        match std::fs::File::open(&path) {
            Ok(file) => Ok(ProcMemory { pid, file }),
            Err(source) => Err(read_error(pid, path, source)),
        }
    }
}

impl Memory for ProcMemory {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), SnapshotError> {
        use std::os::unix::fs::FileExt as _;
        self.file.read_exact_at(into, address).map_err(|source| {
            read_error(
                self.pid,
                format!("{} bytes of its memory at {address:#x}", into.len()),
                source,
            )
        })
    }
}

fn read_error(pid: i32, what: String, source: std::io::Error) -> SnapshotError {
    use std::io::ErrorKind;
    let gone = source.raw_os_error() == Some(libc::ESRCH) || source.kind() == ErrorKind::NotFound;
    if gone && !Path::new(&format!("/proc/{pid}/stat")).exists() {
        return SnapshotError::Gone { pid };
    }
    SnapshotError::Read { pid, what, source }
}

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// May be written.
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
    /// The kernel's name for it: a path, `[stack]`, `/memfd:…`, or nothing.
    pub name: String,
}

impl Map {
    /// All mappings of a process, ascending, and its start time in clock ticks
    /// since boot.
    ///
    /// # Errors
    /// The process is gone or may not be read.
    pub fn all(pid: i32) -> Result<(u64, Vec<Map>), SnapshotError> {
        let gone_or = gone_or(pid);
        let process = procfs::process::Process::new(pid).map_err(&gone_or)?;
        let start_time = process.stat().map_err(&gone_or)?.starttime;
        Ok((
            start_time,
            process
                .maps()
                .map_err(&gone_or)?
                .into_iter()
                .map(map)
                .collect(),
        ))
    }
}

fn gone_or(pid: i32) -> impl Fn(procfs::ProcError) -> SnapshotError {
    move |e| match e {
        procfs::ProcError::NotFound(_) => SnapshotError::Gone { pid },
        procfs::ProcError::PermissionDenied(path) => SnapshotError::Read {
            pid,
            what: path.map_or("/proc".into(), |p| p.display().to_string()),
            source: std::io::ErrorKind::PermissionDenied.into(),
        },
        e => SnapshotError::Read {
            pid,
            what: "/proc".into(),
            source: std::io::Error::other(e),
        },
    }
}

/// A library (or the executable) that a worker has loaded.
#[derive(Debug, Clone)]
pub struct Module {
    /// File name, as the worker names it; the executable's own link for it.
    pub path: String,
    /// Live address = address in the image + `bias` (wrapping).
    pub bias: u64,
    /// The file.
    pub image: Arc<Image>,
    /// Its thread-local storage begins so many bytes below the thread pointer
    /// in every thread; `None` if it has none there, or nothing tells.
    pub tls_offset: Option<u64>,
    /// The number that ld.so's `__tls_get_addr` knows its thread-local storage
    /// by; `None` if it has none, or nothing tells.
    pub tls_module: Option<u64>,
}

impl Module {
    /// The file name without its folders, or the name that it gives itself.
    #[must_use]
    pub fn short_name(&self) -> &str {
        self.image
            .dynamic
            .soname
            .as_deref()
            .or_else(|| Path::new(&self.path).file_name()?.to_str())
            .unwrap_or(&self.path)
    }
}

/// A worker, read.
#[derive(Debug, Clone)]
pub struct Worker {
    /// The process, as the host numbers it.
    pub pid: i32,
    /// Start time in clock ticks since boot: with `pid`, its identity.
    pub start_time: u64,
    /// Mappings, ascending.
    pub maps: Vec<Map>,
    /// Loaded modules in look-up order; the executable first.
    pub modules: Vec<Module>,
    /// Which of `modules` is the function's library.
    pub library: usize,
    /// `KEY=value` strings that it was started with.
    pub environment: Vec<Vec<u8>>,
    /// Arguments that it was started with.
    pub arguments: Vec<Vec<u8>>,
    /// Soft limit of its stack in bytes (`RLIMIT_STACK`).
    pub stack_limit: u64,
}

impl Worker {
    /// Reads the worker `pid`, whose function is in `library` (the path as
    /// the worker names it).
    ///
    /// # Errors
    /// Says what could not be read or makes no sense.
    pub fn read(pid: i32, library: &Path) -> Result<Worker, SnapshotError> {
        let gone_or = gone_or(pid);
        let process = procfs::process::Process::new(pid).map_err(&gone_or)?;
        let memory = ProcMemory::open(pid)?;
        let (start_time, maps) = Map::all(pid)?;
        let auxv = process.auxv().map_err(&gone_or)?;
        let limits = process.limits().map_err(&gone_or)?;
        let stack_limit = match limits.max_stack_size.soft_limit {
            procfs::process::LimitValue::Value(bytes) => bytes,
            procfs::process::LimitValue::Unlimited => u64::MAX,
        };

        let executable_path = process
            .exe()
            .map_err(&gone_or)?
            .to_string_lossy()
            .into_owned();
        let mut left = MOST_BYTES;
        let executable = parse(&executable_path, rootfs::read_executable(pid)?, &mut left)?;
        let entry = auxv.get(&AT_ENTRY).copied().unwrap_or(executable.entry);
        let bias = entry.wrapping_sub(executable.entry);
        let Some(slot) = executable.dynamic.debug_slot else {
            return Err(SnapshotError::LinkMap {
                what: "the executable is static".into(),
            });
        };
        let chain = linkmap::read(&memory, slot.wrapping_add(bias))?;
        let mapped = mapped::Mapped {
            pid,
            start_time,
            maps: &maps,
            memory: &memory,
        };
        let mut modules = Vec::with_capacity(chain.len());
        for loaded in chain {
            if modules.is_empty() {
                mapped.check(&executable_path, &executable, bias)?;
                modules.push(Module {
                    path: executable_path.clone(),
                    bias,
                    tls_offset: None,
                    tls_module: None,
                    image: Arc::new(executable.clone()),
                });
            } else if loaded.name.starts_with('/') {
                let bytes = rootfs::read(pid, Path::new(&loaded.name))?;
                let image = parse(&loaded.name, bytes, &mut left)?;
                mapped.check(&loaded.name, &image, loaded.bias)?;
                modules.push(Module {
                    path: loaded.name,
                    bias: loaded.bias,
                    tls_offset: tls_offset(&memory, &image, loaded.bias)?,
                    tls_module: tls_module(&memory, &image, loaded.bias)?,
                    image: Arc::new(image),
                });
            } else if !loaded.name.starts_with("linux-vdso") && !loaded.name.is_empty() {
                // A relative name: the working directory may have changed.
                return Err(SnapshotError::LinkMap {
                    what: format!("\"{}\" is a relative name", loaded.name),
                });
            }
        }
        let wanted = normal(library);
        let library = modules
            .iter()
            .position(|m| normal(Path::new(&m.path)) == wanted)
            .ok_or_else(|| SnapshotError::NotLoaded {
                pid,
                library: library.display().to_string(),
            })?;
        static_tls::complete(&mut modules[..library]);
        Ok(Worker {
            pid,
            start_time,
            maps,
            modules,
            library,
            // Those without a name are what is left of strings taken away.
            environment: strings(pid, "environ")?
                .into_iter()
                .filter(|s| !s.is_empty())
                .collect(),
            arguments: strings(pid, "cmdline")?,
            stack_limit,
        })
    }

    /// The function's library.
    #[must_use]
    pub fn function(&self) -> &Module {
        &self.modules[self.library]
    }

    /// The executable.
    #[must_use]
    pub fn executable(&self) -> &Module {
        &self.modules[0]
    }
}

/// Where a module's thread-local storage begins below the thread pointer: what
/// the dynamic linker made of a relocation that asks for it.
fn tls_offset(memory: &dyn Memory, image: &Image, bias: u64) -> Result<Option<u64>, SnapshotError> {
    let asks = image.dynamic.relocations.iter().find_map(|r| {
        if image.tls.is_none() || r.kind != constants::R_X86_64_TPOFF64 {
            return None;
        }
        let value = match image.symbols.get(r.symbol as usize) {
            _ if r.symbol == 0 => 0,
            Some(s) if !s.undefined() && s.binding == constants::STB_LOCAL => s.value,
            _ => return None,
        };
        Some((r.offset, value.wrapping_add_signed(r.addend?)))
    });
    match asks {
        Some((at, variable)) => Ok(Some(
            variable.wrapping_sub(memory.u64(at.wrapping_add(bias))?),
        )),
        None => Ok(None),
    }
}

/// The number of a module's thread-local storage: what the dynamic linker made
/// of a relocation that asks for it. It does so when it loads the module, never
/// later.
fn tls_module(memory: &dyn Memory, image: &Image, bias: u64) -> Result<Option<u64>, SnapshotError> {
    let own = image.dynamic.relocations.iter().find(|r| {
        image.tls.is_some()
            && r.kind == constants::R_X86_64_DTPMOD64
            && match image.symbols.get(r.symbol as usize) {
                _ if r.symbol == 0 => true,
                Some(s) => !s.undefined() && s.binding == constants::STB_LOCAL,
                None => false,
            }
    });
    match own {
        Some(r) => {
            let number = memory.u64(r.offset.wrapping_add(bias))?;
            // The bridge tells its own records from the linker's numbers so.
            Ok((1..1 << 32).contains(&number).then_some(number))
        }
        None => Ok(None),
    }
}

/// `AT_ENTRY` of `<elf.h>`.
const AT_ENTRY: u64 = 9;

fn normal(path: &Path) -> PathBuf {
    path.components()
        .filter(|c| *c != std::path::Component::CurDir)
        .collect()
}

fn map(m: procfs::process::MemoryMap) -> Map {
    let name = match m.pathname {
        MMapPath::Path(path) => path.to_string_lossy().into_owned(),
        MMapPath::Heap => "[heap]".into(),
        MMapPath::Stack => "[stack]".into(),
        MMapPath::Vdso => "[vdso]".into(),
        MMapPath::Vvar => "[vvar]".into(),
        MMapPath::Vsyscall => "[vsyscall]".into(),
        MMapPath::Anonymous => String::new(),
        other => format!("{other:?}"),
    };
    Map {
        start: m.address.0,
        end: m.address.1,
        writable: m.perms.contains(MMPermissions::WRITE),
        executable: m.perms.contains(MMPermissions::EXECUTE),
        name,
    }
}

/// Most bytes that the files of all of a worker's modules may have together.
const MOST_BYTES: u64 = 2 << 30;

fn parse(path: &str, bytes: Arc<[u8]>, left: &mut u64) -> Result<Image, SnapshotError> {
    *left = left
        .checked_sub(bytes.len() as u64)
        .ok_or_else(|| SnapshotError::LinkMap {
            what: format!("with {path}, its files have more than {MOST_BYTES} bytes"),
        })?;
    Image::parse(bytes).map_err(|source| SnapshotError::Elf {
        path: path.to_owned(),
        source,
    })
}

/// The strings of `/proc/PID/environ` or `cmdline`, each ended by a NUL; an
/// empty one is a string too.
fn strings(pid: i32, file: &str) -> Result<Vec<Vec<u8>>, SnapshotError> {
    let path = format!("/proc/{pid}/{file}");
    let bytes = std::fs::read(&path).map_err(|source| read_error(pid, path, source))?;
    Ok(split(&bytes))
}

fn split(bytes: &[u8]) -> Vec<Vec<u8>> {
    // Nothing is behind the last NUL, which is no string.
    let whole = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    match bytes {
        [] => Vec::new(),
        _ => whole.split(|b| *b == 0).map(<[u8]>::to_vec).collect(),
    }
}

/// `faas::worker_v1::FuncWorker::InvokeFuncWrapper`, mangled, without its
/// argument types.
pub const INVOKE_PREFIX: &str = "_ZN4faas9worker_v110FuncWorker17InvokeFuncWrapperE";

#[cfg(fuzzing)]
pub(crate) fn link_map_names(memory: &dyn Memory, slot: u64) -> Result<usize, SnapshotError> {
    let chain = linkmap::read(memory, slot)?;
    Ok(chain.iter().map(|loaded| loaded.name.len()).sum())
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use std::collections::BTreeMap;

    /// Memory made of bytes.
    #[derive(Default)]
    pub(crate) struct FakeMemory(BTreeMap<u64, u8>);

    impl FakeMemory {
        pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
            self.0.extend((at..).zip(bytes.iter().copied()));
        }

        pub(crate) fn put_u64(&mut self, at: u64, value: u64) {
            self.put(at, &value.to_le_bytes());
        }
    }

    impl Memory for FakeMemory {
        fn read(&self, address: u64, into: &mut [u8]) -> Result<(), SnapshotError> {
            for (at, byte) in (address..).zip(into) {
                *byte = *self.0.get(&at).ok_or_else(|| SnapshotError::Read {
                    pid: 0,
                    what: format!("{at:#x}"),
                    source: std::io::Error::other("not mapped"),
                })?;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_arguments_are_arguments() {
        let all = |bytes: &[u8]| split(bytes).len();
        assert_eq!(split(b"a\0\0b\0\0"), [&b"a"[..], b"", b"b", b""]);
        assert_eq!((all(b""), all(b"\0"), all(b"a"), all(b"a\0")), (0, 1, 1, 1));
    }
}
