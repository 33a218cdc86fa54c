//! One agent at a time in a worker.
//!
//! Within an agent the driver sees to that. Two agents may be up on a node
//! nevertheless, each with a socket and a directory of its own, perhaps in
//! containers with different mounts and networks. What they do have in common
//! is the workers. So that is where the lock lies: a `flock` on the pid
//! namespace that a worker lives in (`/proc/PID/ns/pid`), one inode in the
//! whole kernel, whoever opens it and from where. Workers of one container
//! share it; and a request takes those of all workers that it will change,
//! from its beginning to its end, so that a patch and a revert of two agents
//! follow one another as a whole.
//!
//! A worker can take its own namespace's lock and keep it. It is then not
//! patched, and reverted by its gate alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::grafter::{GraftError, Target};

/// How often a lock is tried that another agent has.
const PAUSE: Duration = Duration::from_millis(5);

/// Locks that are held while this lives.
#[derive(Debug, Default)]
pub struct Claim {
    _locks: Vec<Flock<File>>,
}

/// Claims workers, waiting for another agent at most for `patience`. Workers
/// that are gone are left out.
///
/// # Errors
/// [`GraftError::Claimed`] with the first worker that somebody else kept.
pub fn claim<'t>(
    workers: impl IntoIterator<Item = &'t Target>,
    patience: Duration,
) -> Result<Claim, GraftError> {
    // In the order of their inodes, so that no two agents wait for each other.
    let mut namespaces = BTreeMap::new();
    for worker in workers {
        let Ok(file) = File::open(format!("/proc/{}/ns/pid", worker.pid)) else {
            continue;
        };
        let Ok(metadata) = file.metadata() else {
            continue;
        };
        let namespace = (metadata.dev(), metadata.ino());
        namespaces.entry(namespace).or_insert((worker.pid, file));
    }
    let deadline = Instant::now() + patience;
    let mut locks = Vec::new();
    for (pid, mut file) in namespaces.into_values() {
        let lock = loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, errno)) => {
                    return Err(GraftError::Failed(format!(
                        "worker {pid} cannot be claimed: {errno}"
                    )));
                }
            };
            if Instant::now() >= deadline {
                return Err(GraftError::Claimed {
                    pid,
                    holder: holder(&file),
                });
            }
            std::thread::sleep(PAUSE);
        };
        locks.push(lock);
    }
    Ok(Claim { _locks: locks })
}

/// The process that has locked this file, as `/proc/locks` tells.
pub(crate) fn holder(file: &File) -> Option<i32> {
    let metadata = file.metadata().ok()?;
    let device = metadata.dev();
    let (major, minor) = (nix::libc::major(device), nix::libc::minor(device));
    let id = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    // "8: FLOCK  ADVISORY  WRITE 24082 00:04:4026531836 0 EOF"
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, _, pid, inode, ..] if inode == id => pid.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    /// A process in a pid namespace of its own, or in ours.
    struct Inside(Child);

    impl Inside {
        fn new(own: bool) -> Self {
            let mut command = Command::new(if own { "unshare" } else { "sleep" });
            if own {
                command.args(["--pid", "--fork", "--kill-child", "sleep"]);
            }
            Self(command.arg("600").stdin(Stdio::null()).spawn().unwrap())
        }

        fn target(&self) -> Target {
            let outer = self.0.id();
            let children = format!("/proc/{outer}/task/{outer}/children");
            let deadline = Instant::now() + Duration::from_secs(20);
            let own = self.0.id();
            loop {
                let inner = std::fs::read_to_string(&children).unwrap_or_default();
                let inner: Option<i32> =
                    inner.split_whitespace().next().and_then(|p| p.parse().ok());
                let is_sleep =
                    std::fs::read_to_string(format!("/proc/{own}/comm")).unwrap() == "sleep\n";
                if let Some(pid) = inner.or(is_sleep.then(|| own.cast_signed())) {
                    return Target {
                        pid,
                        start_time: 0,
                        library: "/functions/lib.so".into(),
                    };
                }
                assert!(Instant::now() < deadline, "no process in the namespace");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    impl Drop for Inside {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_worker_is_claimed_once_and_another_container_s_all_the_same() {
        let (one, other) = (Inside::new(true), Inside::new(true));
        let (one, other) = (one.target(), other.target());
        let held = claim([&one, &one], Duration::ZERO).unwrap();
        let error = claim([&other, &one], Duration::from_millis(20)).unwrap_err();
        let expected = GraftError::Claimed {
            pid: one.pid,
            holder: Some(std::process::id().cast_signed()),
        };
        assert_eq!(error, expected);
        // What it did get of the two it has given up again.
        let further = claim([&other], Duration::ZERO).unwrap();
        drop(held);
        let again = claim([&one], Duration::ZERO).unwrap();
        drop((further, again));
    }

    #[test]
    fn who_waits_gets_it_when_the_other_is_done() {
        let one = Inside::new(true);
        let target = one.target();
        let held = claim([&target], Duration::ZERO).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| claim([&target], Duration::from_secs(60)));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!waiting.is_finished());
            drop(held);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn the_dead_need_no_claim() {
        let gone = Target {
            pid: i32::MAX,
            start_time: 0,
            library: "/functions/lib.so".into(),
        };
        claim([&gone], Duration::ZERO).unwrap();
    }
}
