//! Containers made by the testbed itself.
//!
//! ```text
//! keeper                               child (PID 1 of its namespace)
//!   clone(NEWNS|NEWPID|NEWNET|NEWIPC|NEWUTS) ─►  waits
//!   puts it into its cgroup
//!   "go" ──────────────────────────────────►  mounts, pivot_root, capabilities,
//!                                             seccomp, exec of the launcher
//!   ◄─────────────── an error, or (closed by exec) nothing
//! ```
//!
//! PID 1 is killed when the keeper dies, and with it the kernel ends every
//! process of its namespace: nothing is left behind, whoever dies how.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::{Container, ContainerSpec, Runtime, enter, rootfs};
use crate::sys::process::{Side, exit_now, fork_into};

/// How long a container may take to become one.
const ENTER_WITHIN: Duration = Duration::from_secs(60);

/// The layers of an overlay root, beside it.
pub(super) const LOWER: &str = "lower";
pub(super) const UPPER: &str = "upper";
pub(super) const WORK: &str = "work";

/// The runtime that needs nothing installed. It must run in a process of one
/// thread, and needs the rights of root.
#[derive(Debug, Default)]
pub struct Embedded;

struct Running {
    id: String,
    init: Pid,
    ended: bool,
    _cgroup: Cgroup,
}

impl Runtime for Embedded {
    fn start(&mut self, spec: &ContainerSpec) -> Result<Box<dyn Container>> {
        let root = spec.dir.join("root");
        fs::create_dir(&root)?;
        if spec.overlay_root {
            // The image is the lower layer; the root is mounted from inside.
            let lower = spec.dir.join(LOWER);
            for layer in [LOWER, UPPER, WORK] {
                fs::create_dir(spec.dir.join(layer))?;
            }
            rootfs::build(&lower, &spec.files)?;
        } else {
            rootfs::build(&root, &spec.files)?;
        }
        let cgroup = Cgroup::create(&spec.id, spec.memory_limit).context("cgroup")?;
        let (mut ours, mut theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(ENTER_WITHIN))?;
        let mut namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS;
        namespaces.set(CloneFlags::CLONE_NEWUSER, spec.oddities.user_namespace);
        let init = match fork_into(namespaces).context("cannot make namespaces (are we root?)")? {
            Side::Parent(pid) => pid,
            Side::Child => {
                drop(ours);
                let result = enter::wait_for_go(&mut theirs)
                    .and_then(|()| enter::become_container(spec, &root));
                if let Err(e) = result {
                    let _ = theirs.write_all(format!("{e:#}").as_bytes());
                }
                exit_now(127);
            }
        };
        drop(theirs);
        let running = Running {
            id: spec.id.clone(),
            init,
            ended: false,
            _cgroup: cgroup,
        };
        running._cgroup.add(init).context("cgroup")?;
        if spec.oddities.user_namespace {
            for map in ["uid_map", "gid_map"] {
                fs::write(format!("/proc/{init}/{map}"), "0 0 65536").context(map)?;
            }
        }
        ours.write_all(b"g")?;
        // Closed by the exec: an empty answer is success.
        let mut error = String::new();
        ours.read_to_string(&mut error)
            .context("the container's process does not answer")?;
        if !error.is_empty() {
            bail!("container of {}: {error}", spec.name);
        }
        Ok(Box::new(running))
    }
}

impl Container for Running {
    fn id(&self) -> &str {
        &self.id
    }

    fn init(&self) -> Pid {
        self.init
    }

    fn stop(&mut self) -> Result<()> {
        if !self.ended {
            self.ended = true;
            // Our own child, not yet waited for: the pid is surely it.
            let _ = kill(self.init, Signal::SIGKILL);
            // Returns once the whole namespace is gone.
            waitpid(self.init, None).context("waiting for a container's end")?;
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("container {}: {e:#}", self.id);
        }
    }
}
