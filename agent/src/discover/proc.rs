//! `/proc`, read warily.
//!
//! A process can vanish between any two reads, its pid can come back as
//! another process, and it writes its own command line and environment. So:
//!
//! * a [`Process`] is a descriptor of `/proc/PID` as it was when opened; every
//!   read goes through it, and once the process is gone every read fails, even
//!   where the pid is in use again;
//! * every read has an upper limit;
//! * nothing here follows a path of the process's own choosing, but
//!   [`Process::open_in_root`], which cannot leave the process's root.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{Mode, fstat};

/// Longest command line that is read, in bytes.
const MAX_CMDLINE: u64 = 256 << 10;
/// Largest environment that is read, in bytes.
const MAX_ENVIRON: u64 = 1 << 20;
/// Largest of the kernel's own small files that is read, in bytes.
const MAX_SMALL: u64 = 64 << 10;

/// A mounted proc file system, or a directory that looks like one.
#[derive(Debug, Clone)]
pub struct ProcRoot(PathBuf);

impl Default for ProcRoot {
    fn default() -> Self {
        Self(PathBuf::from("/proc"))
    }
}

impl ProcRoot {
    /// A proc file system at `path`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The pids that are there, ascending.
    ///
    /// # Errors
    /// When the directory can't be listed.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        for entry in std::fs::read_dir(&self.0)? {
            let Ok(entry) = entry else { continue };
            if let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            {
                pids.push(pid);
            }
        }
        pids.sort_unstable();
        Ok(pids)
    }

    /// Opens one process.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn process(&self, pid: i32) -> io::Result<Process> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let path = self.0.join(pid.to_string());
        let dir = nix::fcntl::open(&path, flags, Mode::empty())?;
        Ok(Process { pid, dir })
    }
}

/// One process, pinned: never another one of the same pid.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    dir: OwnedFd,
}

/// What `/proc/PID/stat` says, as far as it is used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Command name, up to 15 bytes, chosen by the process.
    pub comm: String,
    /// State letter: `Z` and `X` are dead.
    pub state: char,
    /// The parent's pid.
    pub ppid: i32,
    /// Number of threads.
    pub threads: u32,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
    /// Processor time of all its threads so far, in clock ticks.
    pub cpu_ticks: u64,
}

/// What `/proc/PID/status` says, as far as it is used here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcStatus {
    /// Pids from the outermost visible namespace to the process's own.
    pub ns_pids: Vec<i32>,
    /// Pid of the tracer; 0 where there is none.
    pub tracer_pid: i32,
    /// Effective capabilities, a bit per capability number.
    pub cap_effective: u64,
}

impl Process {
    /// The pid by which it was opened.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Parses `stat`.
    ///
    /// # Errors
    /// `NotFound` when the process is gone, `InvalidData` when the text is not
    /// what proc(5) says.
    pub fn stat(&self) -> io::Result<Stat> {
        let bytes = self.read("stat", MAX_SMALL)?;
        parse_stat(&bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "stat is not as in proc(5)"))
    }

    /// Parses `status`.
    ///
    /// # Errors
    /// `NotFound` when the process is gone.
    pub fn status(&self) -> io::Result<ProcStatus> {
        Ok(parse_status(&String::from_utf8_lossy(
            &self.read("status", MAX_SMALL)?,
        )))
    }

    /// The command line's arguments; empty for a kernel thread or a zombie.
    ///
    /// # Errors
    /// `NotFound` when the process is gone.
    pub fn argv(&self) -> io::Result<Vec<OsString>> {
        Ok(split_nul(&self.read("cmdline", MAX_CMDLINE)?))
    }

    /// The environment that the process was started with, as `KEY=value`.
    ///
    /// # Errors
    /// `NotFound` when the process is gone, `PermissionDenied` without
    /// CAP_SYS_PTRACE over it.
    pub fn environ(&self) -> io::Result<Vec<OsString>> {
        Ok(split_nul(&self.read("environ", MAX_ENVIRON)?))
    }

    /// The text of `cgroup`.
    ///
    /// # Errors
    /// `NotFound` when the process is gone.
    pub fn cgroup(&self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&self.read("cgroup", MAX_SMALL)?).into_owned())
    }

    /// Where a link such as `cwd`, `root` or `fd/1` points to, as text.
    ///
    /// # Errors
    /// `NotFound` when the process or the link is gone, `PermissionDenied`
    /// without CAP_SYS_PTRACE over it.
    pub fn link(&self, name: &str) -> io::Result<PathBuf> {
        Ok(PathBuf::from(readlinkat(&self.dir, name)?))
    }

    /// A path of the process's as seen from its root: what is relative is
    /// taken from its working directory.
    ///
    /// # Errors
    /// As [`Process::link`], where the path is relative.
    pub fn absolute(&self, path: &Path) -> io::Result<PathBuf> {
        if path.is_absolute() {
            return Ok(path.to_owned());
        }
        let cwd = self.link("cwd")?;
        // Both links show the path up to the top of the process's mounts; of a
        // mere chroot they show the way there too.
        let root = self.link("root").unwrap_or_else(|_| PathBuf::from("/"));
        let inside = cwd.strip_prefix(&root).unwrap_or(&cwd);
        Ok(Path::new("/").join(inside).join(path))
    }

    /// Opens a path beneath the process's own root. Symbolic links and `..`
    /// are resolved as the process would see them and can't lead out.
    ///
    /// # Errors
    /// As openat2(2); `PermissionDenied` without CAP_SYS_PTRACE over it.
    pub fn open_in_root(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let root_flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat(&self.dir, "root", root_flags, Mode::empty())?;
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        Ok(openat2(&root, path, how)?)
    }

    /// Reads a regular file beneath the process's own root.
    ///
    /// # Errors
    /// As [`Process::open_in_root`]; `InvalidData` when it is no regular file
    /// or has more than `limit` bytes.
    pub fn read_in_root(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        // Looked at before it is opened, for to open a FIFO or a device is
        // already to do something.
        let looked_at = self.open_in_root(path, OFlag::O_PATH)?;
        if !is_regular(&looked_at)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a regular file",
            ));
        }
        let fd = self.open_in_root(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?;
        if !is_regular(&fd)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a regular file",
            ));
        }
        let bytes = read_limited(fd, limit + 1)?;
        if bytes.len() as u64 > limit {
            let text = format!("larger than {limit} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(bytes)
    }

    /// Device and inode of a path beneath the process's own root.
    ///
    /// # Errors
    /// As [`Process::open_in_root`].
    pub fn identity_in_root(&self, path: &Path) -> io::Result<(u64, u64)> {
        let stat = fstat(self.open_in_root(path, OFlag::O_PATH)?)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        read_limited(openat(&self.dir, name, flags, Mode::empty())?, limit)
    }
}

/// Whether an error of [`Process`] means that the process has exited.
#[must_use]
pub fn vanished(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH)
}

fn is_regular(fd: &OwnedFd) -> io::Result<bool> {
    Ok(fstat(fd)?.st_mode & nix::libc::S_IFMT == nix::libc::S_IFREG)
}

fn read_limited(fd: OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::from(fd).take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn split_nul(bytes: &[u8]) -> Vec<OsString> {
    let text = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    if text.is_empty() {
        return Vec::new();
    }
    text.split(|&b| b == 0)
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect()
}

/// The command name stands in parentheses and may itself hold any byte, so
/// the fields are counted from the last closing one.
fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let open = bytes.iter().position(|&b| b == b'(')?;
    let close = bytes.iter().rposition(|&b| b == b')')?;
    let comm = String::from_utf8_lossy(bytes.get(open + 1..close)?).into_owned();
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    // `rest` begins with field 3 of proc_pid_stat(5).
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied();
    Some(Stat {
        comm,
        state: field(3)?.chars().next()?,
        ppid: field(4)?.parse().ok()?,
        threads: field(20)?.parse().ok()?,
        start_time: field(22)?.parse().ok()?,
        cpu_ticks: field(14)?
            .parse::<u64>()
            .ok()?
            .saturating_add(field(15)?.parse().ok()?),
    })
}

fn parse_status(text: &str) -> ProcStatus {
    let mut status = ProcStatus::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match key {
            "NSpid" => {
                status.ns_pids = value
                    .split_ascii_whitespace()
                    .filter_map(|pid| pid.parse().ok())
                    .collect();
            }
            "TracerPid" => status.tracer_pid = value.parse().unwrap_or(0),
            "CapEff" => status.cap_effective = u64::from_str_radix(value, 16).unwrap_or(0),
            _ => {}
        }
    }
    status
}

#[cfg(fuzzing)]
pub(crate) fn read_bytes(bytes: &[u8]) {
    let _ = (parse_stat(bytes), split_nul(bytes));
    let _ = parse_status(&String::from_utf8_lossy(bytes));
}

/// The last component of a program's name.
#[must_use]
pub fn basename(arg: &OsStr) -> &OsStr {
    Path::new(arg)
        .file_name()
        .unwrap_or_else(|| OsStr::from_bytes(b""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_survives_a_hostile_command_name() {
        let text = b"42 (a) S 1 (b) c) R 7 42 42 0 -1 4194304 1 0 0 0 30 12 0 0 20 0 3 0 9876 1 1";
        let stat = parse_stat(text).unwrap();
        assert_eq!(stat.comm, "a) S 1 (b) c");
        assert_eq!(
            (stat.state, stat.ppid, stat.threads, stat.start_time),
            ('R', 7, 3, 9876)
        );
        assert_eq!(stat.cpu_ticks, 42);
    }

    #[test]
    fn stat_that_is_cut_off_is_no_stat() {
        assert_eq!(parse_stat(b"42 (foo) S 1 2"), None);
        assert_eq!(parse_stat(b""), None);
        assert_eq!(parse_stat(b")("), None);
    }

    #[test]
    fn status_is_read_by_its_keys() {
        let text = "Name:\tx\nTracerPid:\t99\nNSpid:\t27287\t8\nCapEff:\t0000000000080000\n";
        let status = parse_status(text);
        assert_eq!(status.ns_pids, [27287, 8]);
        assert_eq!(status.tracer_pid, 99);
        assert_eq!(status.cap_effective, 1 << 19);
    }

    #[test]
    fn arguments_keep_empty_ones_and_have_no_ghost() {
        assert_eq!(split_nul(b"a\0\0b\0"), ["a", "", "b"]);
        assert!(split_nul(b"").is_empty());
    }

    #[test]
    fn this_process_reads_as_itself() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let process = ProcRoot::default().process(pid).unwrap();
        assert!(process.stat().unwrap().threads >= 1);
        assert_eq!(process.status().unwrap().ns_pids.first(), Some(&pid));
        assert!(!process.argv().unwrap().is_empty());
    }

    #[test]
    fn a_pinned_process_never_becomes_another() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = ProcRoot::default()
            .process(i32::try_from(child.id()).unwrap())
            .unwrap();
        process.stat().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(vanished(&process.stat().unwrap_err()));
        assert!(vanished(&process.environ().unwrap_err()));
    }

    #[test]
    fn links_of_a_container_cannot_lead_to_the_host() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path().join("1/root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(host.path().join("secret"), "host").unwrap();
        std::fs::write(root.join("secret"), "inside").unwrap();
        std::os::unix::fs::symlink("/secret", root.join("etc/absolute")).unwrap();
        std::os::unix::fs::symlink("../../../../secret", root.join("etc/dots")).unwrap();
        let process = ProcRoot::at(host.path()).process(1).unwrap();
        for path in ["/etc/absolute", "/etc/dots", "/../secret"] {
            assert_eq!(
                process.read_in_root(Path::new(path), 100).unwrap(),
                b"inside",
                "{path}"
            );
        }
    }

    #[test]
    fn only_regular_files_up_to_the_limit_are_read() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path().join("1/root");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("big"), [b'x'; 11]).unwrap();
        nix::unistd::mkfifo(&root.join("fifo"), Mode::S_IRWXU).unwrap();
        let process = ProcRoot::at(host.path()).process(1).unwrap();
        let fails = |path: &str| {
            process
                .read_in_root(Path::new(path), 10)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(fails("/big"), "larger than 10 bytes");
        assert_eq!(fails("/fifo"), "not a regular file");
        assert_eq!(fails("/"), "not a regular file");
    }
}
