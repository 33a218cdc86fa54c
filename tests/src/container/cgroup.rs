//! A cgroup per container, where the machine has them.
//!
//! Version 1 has a hierarchy per controller below `/sys/fs/cgroup`, version 2
//! has one for all; machines with both exist, and there a container gets a
//! group in each. It is named `/docker/<id>`, as Docker names it. A hierarchy
//! in which we may not make a group is left out: the container works without.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

/// The groups of one container, removed when this is dropped.
#[derive(Debug)]
pub(super) struct Cgroup {
    dirs: Vec<PathBuf>,
}

/// The mount points of cgroup hierarchies, out of `/proc/self/mountinfo`.
fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right
                .starts_with("cgroup")
                .then(|| left.split(' ').nth(4).map(PathBuf::from))?
        })
        .collect()
}

impl Cgroup {
    /// Makes the groups.
    pub(super) fn create(id: &str, memory_limit: Option<u64>) -> io::Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
        let mut dirs = Vec::new();
        for hierarchy in hierarchies(&mountinfo) {
            let parent = hierarchy.join("docker");
            let dir = parent.join(id);
            // Without a controller a version 2 group is a mere name, but one
            // that limits need to be handed down to.
            if memory_limit.is_some() && hierarchy.join("cgroup.subtree_control").exists() {
                let _ = fs::write(hierarchy.join("cgroup.subtree_control"), "+memory");
            }
            if fs::create_dir_all(&parent).is_err() {
                continue;
            }
            if memory_limit.is_some() {
                let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
            }
            inherit_cpuset(&hierarchy, &parent);
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            inherit_cpuset(&parent, &dir);
            dirs.push(dir);
        }
        let groups = Self { dirs };
        if let Some(limit) = memory_limit {
            groups.limit_memory(limit)?;
        }
        Ok(groups)
    }

    fn limit_memory(&self, limit: u64) -> io::Result<()> {
        for dir in &self.dirs {
            for file in ["memory.max", "memory.limit_in_bytes"] {
                if dir.join(file).exists() {
                    return fs::write(dir.join(file), limit.to_string());
                }
            }
        }
        Err(io::Error::other("no cgroup here can limit memory"))
    }

    /// Puts a process into the groups.
    pub(super) fn add(&self, pid: Pid) -> io::Result<()> {
        for dir in &self.dirs {
            fs::write(dir.join("cgroup.procs"), pid.to_string())
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", dir.display())))?;
        }
        Ok(())
    }
}

/// A version 1 cpuset takes no process until it is told its processors.
fn inherit_cpuset(parent: &Path, dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (from, to) = (parent.join(file), dir.join(file));
        if let (Ok(value), Ok(own)) = (fs::read_to_string(&from), fs::read_to_string(&to))
            && own.trim().is_empty()
            && !value.trim().is_empty()
        {
            let _ = fs::write(to, value);
        }
    }
}

/// Removes what a keeper that was killed could not: the groups of a container
/// that has ended. Those that are not there are no news.
pub(crate) fn remove_left_behind(id: &str) {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let dirs = hierarchies(&mountinfo)
        .into_iter()
        .map(|h| h.join("docker").join(id));
    drop(Cgroup {
        dirs: dirs.collect(),
    });
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        for dir in &self.dirs {
            // The kernel may hold a group for a moment after its last process.
            while let Err(e) = fs::remove_dir(dir) {
                if e.kind() == io::ErrorKind::NotFound {
                    break;
                }
                if Instant::now() > deadline {
                    eprintln!("cgroup {} stays: {e}", dir.display());
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_both_kinds_of_hierarchy() {
        let mounts = "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
             30 22 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
             31 22 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        let found = hierarchies(mounts);
        assert_eq!(
            found,
            ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"].map(PathBuf::from)
        );
    }
}
