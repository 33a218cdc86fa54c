//! A process becomes a container: the steps between clone and exec.
//!
//! It runs in the child, which has the namespaces already. The order matters:
//! mounts need the capabilities that are dropped afterwards, and the filter
//! comes last because it forbids most of what is done before.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, execve, pivot_root, sethostname, setsid};

use super::embedded::{LOWER, UPPER, WORK};
use super::{ContainerSpec, seccomp};
use crate::sys::process;

/// Docker's default set: chown, dac_override, fowner, fsetid, kill, setgid,
/// setuid, setpcap, net_bind_service, net_raw, sys_chroot, mknod, audit_write,
/// setfcap.
const CAPABILITIES: [u32; 14] = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];

/// What of `/proc` Docker hides (only what exists is).
const HIDDEN: [&str; 8] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
];

/// What of `/proc` Docker makes read-only.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Waits until the parent has done its part.
pub(super) fn wait_for_go(parent: &mut UnixStream) -> Result<()> {
    process::die_with_parent()?;
    // If the parent died before that, this fails: its end is closed.
    let mut go = [0];
    parent.read_exact(&mut go).context("the keeper is gone")
}

/// Does the rest, and becomes the container's PID 1.
pub(super) fn become_container(spec: &ContainerSpec, root: &Path) -> Result<()> {
    setsid()?;
    umask(Mode::from_bits_truncate(0o022));
    // Again: a cgroup may have widened what was inherited.
    process::confine_to(&spec.cpus).context("processors")?;
    sethostname(&spec.id[..12]).context("hostname")?;
    process::loopback_up().context("loopback")?;
    take_streams(spec).context("standard streams")?;
    mounts(spec, root).context("mounts")?;
    if spec.oddities.no_proc {
        umount2("/proc", MntFlags::MNT_DETACH).context("/proc")?;
    }
    process::keep_capabilities(&CAPABILITIES).context("capabilities")?;
    process::no_new_privileges()?;
    process::close_on_exec_from(3)?;
    let c = |s: &str| CString::new(s).context("a NUL in a string");
    let args = spec
        .command
        .iter()
        .map(|a| c(a))
        .collect::<Result<Vec<_>>>()?;
    let env = spec
        .env
        .iter()
        .map(|(k, v)| c(&format!("{k}={v}")))
        .collect::<Result<Vec<_>>>()?;
    let filter = seccomp::default_filter()?;
    process::install_filter(&filter).context("seccomp")?;
    execve(&args[0], &args, &env).with_context(|| format!("cannot run {}", spec.command[0]))?;
    Ok(())
}

fn take_streams(spec: &ContainerSpec) -> Result<()> {
    let null = fs::File::open("/dev/null")?;
    let log = fs::File::create(spec.logs.join(format!("launcher_{}.log", spec.name)))?;
    process::place_fd(null.as_fd(), 0)?;
    process::place_fd(log.as_fd(), 1)?;
    process::place_fd(log.as_fd(), 2)?;
    std::io::stdout().flush()?;
    Ok(())
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(
        Some(from),
        to,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .with_context(|| format!("{} at {}", from.display(), to.display()))
}

fn fresh(kind: &str, to: &Path, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(Some(kind), to, Some(kind), flags, data)
        .with_context(|| format!("{kind} at {}", to.display()))
}

fn read_only(at: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("{} read-only", at.display()))
}

fn mounts(spec: &ContainerSpec, root: &Path) -> Result<()> {
    // Nothing that happens here is to be seen outside.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    if spec.overlay_root {
        let layer = |name: &str| spec.dir.join(name).display().to_string();
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            layer(LOWER),
            layer(UPPER),
            layer(WORK)
        );
        fresh("overlay", root, MsFlags::empty(), Some(&layers))?;
    } else {
        bind(root, root)?;
    }
    let secure = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let dev = root.join("dev");
    fresh(
        "tmpfs",
        &dev,
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("mode=755,size=64k"),
    )?;
    for name in ["null", "zero", "full", "random", "urandom"] {
        fs::File::create(dev.join(name))?;
        bind(&Path::new("/dev").join(name), &dev.join(name))?;
    }
    let shm = dev.join("shm");
    fs::create_dir(&shm)?;
    fresh("tmpfs", &shm, secure, Some("mode=1777,size=64m"))?;
    let ipc = shm.join("faas_ipc");
    fs::create_dir(&ipc)?;
    bind(&spec.ipc, &ipc)?;
    bind(&spec.logs, &root.join("outputs"))?;
    let tmp = root.join("tmp");
    // Where functions were built there, what they need lies there.
    if fs::read_dir(&tmp)?.next().is_none() {
        fresh("tmpfs", &tmp, secure, Some("mode=1777,size=64m"))?;
    }

    // While another one is visible: in a user namespace of its own that is a
    // condition.
    fresh("proc", &root.join("proc"), secure, None)?;

    // The new root over the old one, and then the old one goes.
    chdir(root)?;
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    read_only(Path::new("/"))?;

    for path in READ_ONLY.map(Path::new).into_iter().filter(|p| p.exists()) {
        bind(path, path)?;
        read_only(path)?;
    }
    for path in HIDDEN.map(Path::new) {
        match fs::metadata(path) {
            Ok(m) if m.is_dir() => fresh("tmpfs", path, secure | MsFlags::MS_RDONLY, None)?,
            Ok(_) => bind(Path::new("/dev/null"), path)?,
            Err(_) => {}
        }
    }
    Ok(())
}
