//! How much memory a worker may still take.

use std::path::Path;

use crate::refused::Refused;

/// Bytes left below the tightest memory limit of the worker's control group,
/// for cgroup v1 and v2. `None` where there is no limit or it cannot be read
/// (the group's files are not mounted where we run): then nothing is known.
#[must_use]
pub fn memory_room(pid: i32) -> Option<u64> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    room(&groups, Path::new("/sys/fs/cgroup"))
}

fn room(groups: &str, root: &Path) -> Option<u64> {
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
            if path.split('/').any(|part| part == "..") {
                return None;
            }
            if controllers.is_empty() {
                tightest(
                    &[root.to_path_buf(), root.join("unified")],
                    path,
                    "memory.max",
                    "memory.current",
                )
            } else if controllers.split(',').any(|c| c == "memory") {
                tightest(
                    &[root.join("memory")],
                    path,
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                )
            } else {
                None
            }
        })
        .min()
}

/// Processors that the worker's control group may keep busy, by its quota or that
/// of a group above it. `None` where there is none or it cannot be read.
#[must_use]
pub fn processors(pid: i32) -> Option<f64> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    quota(&groups, Path::new("/sys/fs/cgroup"))
}

fn quota(groups: &str, root: &Path) -> Option<f64> {
    let text = |file: &Path| std::fs::read_to_string(file).ok();
    let number = |text: &str| text.trim().parse::<f64>().ok();
    // "max 100000", or two numbers of microseconds.
    let version_2 = |group: &Path| {
        let text = text(&group.join("cpu.max"))?;
        let (quota, period) = text.trim().split_once(' ')?;
        Some(number(quota)? / number(period)?)
    };
    let version_1 = |group: &Path| {
        let quota = number(&text(&group.join("cpu.cfs_quota_us"))?)?;
        Some(quota / number(&text(&group.join("cpu.cfs_period_us"))?)?)
    };
    let mut least: Option<f64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let path = path.trim_start_matches('/');
        if path.split('/').any(|part| part == "..") {
            continue;
        }
        let found: Vec<f64> = match controllers {
            "" => [root.to_path_buf(), root.join("unified")]
                .iter()
                .flat_map(|root| up(root, path))
                .filter_map(|group| version_2(&group))
                .collect(),
            list if list.split(',').any(|c| c == "cpu") => {
                [root.join("cpu"), root.join("cpu,cpuacct")]
                    .iter()
                    .flat_map(|root| up(root, path))
                    .filter_map(|group| version_1(&group))
                    .collect()
            }
            _ => Vec::new(),
        };
        let some = |quota: &f64| quota.is_finite() && *quota > 0.0;
        for quota in found.into_iter().filter(some) {
            least = Some(least.map_or(quota, |least| least.min(quota)));
        }
    }
    least
}

/// A group and those above it.
fn up(root: &Path, path: &str) -> Vec<std::path::PathBuf> {
    let depth = Path::new(path).components().count();
    let group = root.join(path);
    let all = group.ancestors().take(depth + 1);
    all.map(Path::to_path_buf).collect()
}

/// The least room of the group and its ancestors.
fn tightest(roots: &[std::path::PathBuf], path: &str, limit: &str, usage: &str) -> Option<u64> {
    let number = |file: &Path| {
        std::fs::read_to_string(file)
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    roots
        .iter()
        .flat_map(|root| up(root, path))
        .filter_map(|group| {
            // "max" and v1's page-rounded i64::MAX mean that there is none.
            let limit = number(&group.join(limit)).filter(|l| *l < 1 << 62)?;
            Some(limit.saturating_sub(number(&group.join(usage))?))
        })
        .min()
}

/// What a patch takes beside its own pages: page tables, the stack and heap of
/// the bridge's thread, and what the kernel accounts in advance.
const BESIDE: u64 = 1 << 20;

/// Refuses `bytes` that do not fit into the `room` of a memory group.
pub(crate) fn fits(bytes: u64, room: Option<u64>) -> Result<(), Refused> {
    let bytes = bytes.saturating_add(BESIDE);
    match room {
        Some(room) if bytes > room => Err(Refused::MemoryLimit { bytes, room }),
        _ => Ok(()),
    }
}

/// What is left below a process's limits of address space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AddressRoom {
    /// Bytes below `RLIMIT_AS`.
    space: Option<u64>,
    /// Bytes below `RLIMIT_DATA`, which only private writable memory counts to.
    data: Option<u64>,
}

/// Address space that the bridge's thread takes for the time of the
/// initialisers: its stack, usually 8 MiB, and what the C library maps for it.
const THREAD: u64 = 9 << 20;

impl AddressRoom {
    /// Refuses what does not fit, with the thread of the initialisers beside it:
    /// `mapped` bytes, of which `writable` can be written.
    pub(crate) fn is_enough(&self, mapped: u64, writable: u64) -> Result<(), Refused> {
        for (limit, room, bytes) in [
            ("RLIMIT_AS", self.space, mapped),
            ("RLIMIT_DATA", self.data, writable),
        ] {
            let bytes = bytes.saturating_add(THREAD);
            if let Some(room) = room.filter(|room| bytes > *room) {
                return Err(Refused::AddressSpaceLimit {
                    limit: limit.to_owned(),
                    bytes,
                    room,
                });
            }
        }
        Ok(())
    }
}

/// What `RLIMIT_AS` and `RLIMIT_DATA` leave.
#[must_use]
pub fn address_room(pid: i32) -> AddressRoom {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
    match (read("limits"), read("status")) {
        (Ok(limits), Ok(status)) => address_room_of(&limits, &status),
        _ => AddressRoom::default(),
    }
}

fn address_room_of(limits: &str, status: &str) -> AddressRoom {
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let used = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
        kilobytes.checked_mul(1024)
    };
    let room =
        |limit_of: &str, used_by: &str| Some(limit(limit_of)?.saturating_sub(used(used_by)?));
    AddressRoom {
        space: room("Max address space", "VmSize:"),
        data: room("Max data size", "VmData:"),
    }
}

#[cfg(fuzzing)]
pub(crate) fn read_text(text: &str) {
    let nowhere = Path::new("/nowhere");
    let _ = (room(text, nowhere), frozen(text, nowhere));
    let _ = address_room_of(text, text);
}

/// Whether a process is in a control group that is frozen: its threads neither
/// run nor, with cgroup v1, stop. `false` where that cannot be read.
#[must_use]
pub fn is_frozen(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .is_ok_and(|groups| frozen(&groups, Path::new("/sys/fs/cgroup")))
}

fn frozen(groups: &str, root: &Path) -> bool {
    groups.lines().any(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            return false;
        };
        let path = path.trim_start_matches('/');
        if path.split('/').any(|part| part == "..") {
            return false;
        }
        let says = |file: std::path::PathBuf, words: &[&str]| {
            std::fs::read_to_string(file)
                .is_ok_and(|text| text.lines().any(|line| words.contains(&line.trim())))
        };
        if controllers.is_empty() {
            [root.join(path), root.join("unified").join(path)]
                .into_iter()
                .any(|group| says(group.join("cgroup.events"), &["frozen 1"]))
        } else {
            controllers.split(',').any(|c| c == "freezer")
                && says(
                    root.join("freezer").join(path).join("freezer.state"),
                    &["FROZEN", "FREEZING"],
                )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let file = root.join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    }

    #[test]
    fn the_least_quota_of_processors_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let quota = |groups: &str| quota(groups, root);
        put(root, "cpu.max", "max 100000\n");
        put(root, "a/cpu.max", "150000 100000\n");
        put(root, "a/b/cpu.max", "max 100000\n");
        assert_eq!(quota("0::/a/b"), Some(1.5));
        assert_eq!(quota("0::/"), None);
        put(root, "cpu/docker/x/cpu.cfs_quota_us", "50000\n");
        put(root, "cpu/docker/x/cpu.cfs_period_us", "100000\n");
        put(root, "cpu/docker/cpu.cfs_quota_us", "-1\n");
        put(root, "cpu/docker/cpu.cfs_period_us", "100000\n");
        assert_eq!(quota("4:cpu,cpuacct:/docker/x\n0::/a"), Some(0.5));
        assert_eq!(quota("4:cpu,cpuacct:/docker"), None);
        assert_eq!(quota("4:cpu:/../a\nnonsense"), None);
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "docker/abc/memory.max", "max\n");
        put(dir.path(), "docker/abc/memory.current", "1000\n");
        put(dir.path(), "docker/memory.max", "5000\n");
        put(dir.path(), "docker/memory.current", "1500\n");
        assert_eq!(room("0::/docker/abc\n", dir.path()), Some(3500));
    }

    const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max data size             unlimited            unlimited            bytes     
Max address space         104857600            unlimited            bytes     
";

    #[test]
    fn a_limit_of_address_space_leaves_what_is_not_mapped() {
        let status = "VmPeak:\t   90000 kB\nVmSize:\t   51200 kB\nVmData:\t  1000 kB\n";
        let room = address_room_of(LIMITS, status);
        assert_eq!((room.space, room.data), (Some(50 << 20), None));
        assert_eq!(room.is_enough(41 << 20, 0), Ok(()));
        let refused = room.is_enough((41 << 20) + 1, 0).unwrap_err();
        assert_eq!(refused.code(), "address-space-limit");
        let data = LIMITS.replace("unlimited            unlimited", "12048000 unlimited");
        let room = address_room_of(&data, status);
        assert_eq!(room.data, Some(11_024_000));
        assert_eq!(room.is_enough(0, 1 << 20), Ok(()));
        assert!(room.is_enough(0, 2 << 20).is_err());
        assert_eq!(address_room_of("", status), AddressRoom::default());
    }

    #[test]
    fn a_frozen_group_of_either_version_is_known() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "freezer/a/freezer.state", "FROZEN\n");
        put(dir.path(), "freezer/b/freezer.state", "THAWED\n");
        put(dir.path(), "c/cgroup.events", "populated 1\nfrozen 1\n");
        let frozen = |groups: &str| frozen(groups, dir.path());
        assert!(frozen("3:freezer:/a\n0::/\n"));
        assert!(!frozen("3:freezer:/b\n0::/\n"));
        assert!(frozen("0::/c\n"));
        assert!(!frozen("3:freezer:/../a\n"));
    }

    #[test]
    fn version_one_has_its_own_names_and_no_limit_is_none() {
        let dir = tempfile::tempdir().unwrap();
        put(
            dir.path(),
            "memory/a/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        put(dir.path(), "memory/a/memory.usage_in_bytes", "10\n");
        assert_eq!(room("4:cpu,memory:/a\n0::/\n", dir.path()), None);
        put(dir.path(), "memory/a/memory.limit_in_bytes", "4096\n");
        assert_eq!(room("4:cpu,memory:/a\n0::/\n", dir.path()), Some(4086));
        assert_eq!(room("4:memory:/../a\n", dir.path()), None);
    }
}
