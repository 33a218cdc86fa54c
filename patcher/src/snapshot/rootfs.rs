//! Files of a container, opened through `/proc/PID/root` and never outside
//! of it: the kernel resolves every symbolic link, `..` and absolute target
//! beneath that root (`openat2(2)`, `RESOLVE_IN_ROOT`). What a container puts
//! there is not trusted: only regular files are read, up to a size.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::SnapshotError;

/// Largest file that is read, in bytes.
const LARGEST: u64 = 512 << 20;

/// Reads the file that process `pid` knows as `path`.
pub(super) fn read(pid: i32, path: &Path) -> Result<Arc<[u8]>, SnapshotError> {
    let failed = |what: &str, source: std::io::Error| SnapshotError::Read {
        pid,
        what: format!("{} ({what})", path.display()),
        source,
    };
    let root = open(
        format!("/proc/{pid}/root").as_str(),
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| failed("its root directory", e.into()))?;
    let how = OpenHow::new()
        // Not blocking: a FIFO would keep us waiting for a writer.
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let relative = path.strip_prefix("/").unwrap_or(path);
    let file: OwnedFd = openat2(&root, relative, how).map_err(|e| failed("open", e.into()))?;
    read_regular(File::from(file)).map_err(|e| failed("read", e))
}

/// Reads the executable of process `pid`, whatever its path has become.
pub(super) fn read_executable(pid: i32) -> Result<Arc<[u8]>, SnapshotError> {
    let path = format!("/proc/{pid}/exe");
    File::open(&path)
        .and_then(read_regular)
        .map_err(|source| SnapshotError::Read {
            pid,
            what: path,
            source,
        })
}

fn read_regular(file: File) -> std::io::Result<Arc<[u8]>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    if metadata.len() > LARGEST {
        return Err(std::io::Error::other(format!(
            "{} bytes are more than {LARGEST}",
            metadata.len()
        )));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    file.take(LARGEST).read_to_end(&mut bytes)?;
    Ok(bytes.into())
}
