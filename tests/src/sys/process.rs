//! Children in namespaces of their own, and what a process gives up before it
//! becomes another program.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::signal::SigSet;
use nix::unistd::Pid;

/// Which side of a [`fork_into`] this is.
#[derive(Debug)]
pub enum Side {
    /// The caller, with the child's pid.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Forks a child into new namespaces.
///
/// # Panics
/// If the process has more than one thread: the child would be left with the
/// locks that the others held.
pub fn fork_into(namespaces: CloneFlags) -> io::Result<Side> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    assert_eq!(
        threads, 1,
        "only a process of one thread may fork without exec"
    );
    let flags = namespaces.bits() as libc::c_long | libc::c_long::from(libc::SIGCHLD);
    // SAFETY: without CLONE_VM and with a null stack this is fork: the child
    // has a copy of everything, and there is no other thread (checked above)
    // whose locks it could have inherited.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent(Pid::from_raw(pid as i32))),
    }
}

/// Ends this process at once, without running anything of the program's.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

fn prctl(option: libc::c_int, a: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take numbers, no pointers.
    match unsafe { libc::prctl(option, a, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Has this process killed when the thread that started it ends.
pub fn die_with_parent() -> io::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)
}

/// Gives up, for good, any privilege that an exec could add.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Keeps only the capabilities numbered in `keep`, in every set.
pub fn keep_capabilities(keep: &[u32]) -> io::Result<()> {
    for cap in 0..64 {
        if !keep.contains(&cap) {
            match prctl(libc::PR_CAPBSET_DROP, cap.into()) {
                // The kernel's last capability is behind us.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
                other => other?,
            }
        }
    }
    // _LINUX_CAPABILITY_VERSION_3: two words of 32 capabilities.
    let header = CapHeader {
        version: 0x2008_0522,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: capget writes the two words that version 3 has.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &header, data.as_mut_ptr()) })?;
    for (i, word) in data.iter_mut().enumerate() {
        let wanted = keep
            .iter()
            .filter(|&&c| c as usize / 32 == i)
            .fold(0u32, |m, &c| m | 1 << (c % 32));
        word.permitted &= wanted;
        word.effective = word.permitted;
        word.inheritable = 0;
    }
    // SAFETY: capset reads the two words that version 3 has.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) })?;
    Ok(())
}

/// Brings the loopback interface of this network namespace up.
pub fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let s = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the ifreq that it is given.
    Errno::result(unsafe { libc::ioctl(s.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })?;
    Ok(())
}

/// Has `command` killed when the thread that starts it ends.
pub fn kill_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe, and nothing else runs between fork
    // and exec.
    unsafe { command.pre_exec(die_with_parent) };
}

/// Gives `command` a mount namespace of its own, from which nothing that it
/// mounts comes out, and which is gone with its last process.
pub fn own_mounts(command: &mut Command) {
    // SAFETY: unshare and mount are system calls with constant arguments, and
    // nix allocates nothing for a path this short.
    unsafe {
        command.pre_exec(|| {
            use nix::mount::{MsFlags, mount};
            nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
            Ok(())
        });
    }
}

/// Gives `fd` to `command` as descriptor 3, nothing above it, and no blocked
/// signal.
pub fn give_as_third(command: &mut Command, fd: OwnedFd) {
    const PLACE: RawFd = 3;
    // SAFETY: sigprocmask, dup2, fcntl and close_range are async-signal-safe;
    // `fd` is owned by the closure and thereby open; descriptors above 3 are
    // closed in the child, when it becomes another program.
    unsafe {
        command.pre_exec(move || {
            // The launcher blocks SIGCHLD for itself, not for its workers.
            SigSet::empty().thread_set_mask()?;
            if fd.as_raw_fd() == PLACE {
                Errno::result(libc::fcntl(PLACE, libc::F_SETFD, 0))?;
            } else {
                Errno::result(libc::dup2(fd.as_raw_fd(), PLACE))?;
            }
            // Marked, not closed: the standard library reports a failed exec
            // through a descriptor of its own, which is marked already.
            Errno::result(libc::syscall(
                libc::SYS_close_range,
                PLACE as libc::c_uint + 1,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            ))?;
            Ok(())
        });
    }
}

/// Makes `fd` the descriptor `place` of this process, to be inherited.
pub fn place_fd(fd: BorrowedFd<'_>, place: RawFd) -> io::Result<()> {
    // SAFETY: only used for 0, 1 and 2, which this process owns and nothing in
    // it holds as an `OwnedFd`.
    Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), place) })?;
    Ok(())
}

/// Marks all descriptors from `first` on to be closed by exec.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: close_range with CLOEXEC closes nothing now.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as libc::c_uint,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })?;
    Ok(())
}

/// Installs a seccomp filter on this thread.
pub fn install_filter(filter: &seccompiler::BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

/// Takes over a descriptor that this process was started with.
pub fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl takes any number and fails if it is no open descriptor.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and was passed to this process to be its own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives SIGPIPE back its default, which Rust's start-up code took away.
pub fn default_sigpipe() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    Ok(())
}

/// Confines this thread, and what it starts, to some processors (none: no
/// change).
pub fn confine_to(cpus: &[usize]) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = nix::sched::CpuSet::new();
    for &cpu in cpus {
        set.set(cpu)?;
    }
    nix::sched::sched_setaffinity(Pid::from_raw(0), &set).map_err(Into::into)
}
