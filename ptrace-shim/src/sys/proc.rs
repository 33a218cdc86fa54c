//! Directory entries and queries of `/proc`, without allocation.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Calls `found` with each entry of the directory whose name is a number.
pub(crate) fn numbered_entries(
    directory: BorrowedFd<'_>,
    mut found: impl FnMut(i32),
) -> Result<(), Errno> {
    #[repr(align(8))]
    struct Buffer([u8; 8192]);
    const NAME: usize = 19;

    let fd = directory.as_raw_fd();
    // SAFETY: the descriptor is borrowed; seeking has no memory effects.
    Errno::result(unsafe { libc::lseek(fd, 0, libc::SEEK_SET) })?;
    let mut buffer = Buffer([0; 8192]);
    loop {
        // SAFETY: the buffer is ours, and its size is given.
        let filled = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                fd,
                buffer.0.as_mut_ptr(),
                buffer.0.len(),
            )
        })?;
        if filled == 0 {
            return Ok(());
        }
        // struct linux_dirent64: inode (8), offset (8), length (2), type (1), name
        let mut rest = &buffer.0[..usize::try_from(filled).unwrap_or(0)];
        while rest.len() > NAME {
            let length = usize::from(u16::from_le_bytes([rest[16], rest[17]]));
            let (entry, next) = rest.split_at(length.clamp(NAME, rest.len()));
            let name = entry[NAME..].split(|&byte| byte == 0).next();
            if let Some(number) = name.and_then(number) {
                found(number);
            }
            rest = next;
        }
    }
}

fn number(name: &[u8]) -> Option<i32> {
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// `pidfd_open(2)`.
pub(crate) fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: two numbers in, a new descriptor out, which nobody else owns.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)))
    }
}

/// How the process of a pidfd ended, as of `wait`; `None` if it has not, was
/// not reaped yet, or the kernel (before 6.15) does not tell.
pub(crate) fn pidfd_exit(pidfd: BorrowedFd<'_>) -> Option<i32> {
    /// The first version of `struct pidfd_info` (linux/pidfd.h).
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
    const EXIT: u64 = 1 << 3;
    let mut info = Info {
        mask: EXIT,
        ..Info::default()
    };
    // SAFETY: the structure is of the size that the request's number states.
    let result =
        Errno::result(unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) });
    (result.is_ok() && info.mask & EXIT != 0).then_some(info.exit_code)
}

/// Sends a signal to one thread.
pub(crate) fn tgkill(pid: i32, tid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: three numbers.
    Errno::result(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) }).map(drop)
}

/// What `PROCMAP_QUERY` says of the mapping at an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) writable: bool,
    pub(crate) main_stack: bool,
}

/// Asks for the mapping that covers `address`; `Ok(None)` if there is none.
/// Kernels before 6.11 do not know the query (`ENOTTY`).
pub(crate) fn area_at(maps: BorrowedFd<'_>, address: u64) -> Result<Option<Area>, Errno> {
    /// `struct procmap_query` of `linux/fs.h`
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        size: u64,
        query_flags: u64,
        query_addr: u64,
        vma_start: u64,
        vma_end: u64,
        vma_flags: u64,
        vma_page_size: u64,
        vma_offset: u64,
        inode: u64,
        dev_major: u32,
        dev_minor: u32,
        vma_name_size: u32,
        build_id_size: u32,
        vma_name_addr: u64,
        build_id_addr: u64,
    }
    const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;
    const WRITABLE: u64 = 2;
    let mut name = [0u8; 4096];
    let mut query = Query {
        size: size_of::<Query>() as u64,
        query_addr: address,
        vma_name_size: name.len() as u32,
        vma_name_addr: name.as_mut_ptr() as u64,
        ..Query::default()
    };
    // SAFETY: the structure is of the size that it and the request's number
    // state, and the name's buffer of the size that the structure states.
    let result =
        Errno::result(unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) });
    match result {
        Ok(_) => Ok(Some(Area {
            start: query.vma_start,
            end: query.vma_end,
            writable: query.vma_flags & WRITABLE != 0,
            main_stack: name.starts_with(b"[stack]\0"),
        })),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}
