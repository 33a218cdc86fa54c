//! How much memory a worker may still take.

use std::path::Path;

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
        .flat_map(|root| {
            let group = root.join(path);
            let depth = Path::new(path).components().count();
            group
                .ancestors()
                .take(depth + 1)
                .map(Path::to_path_buf)
                .collect::<Vec<_>>()
        })
        .filter_map(|group| {
            // "max" and v1's page-rounded i64::MAX mean that there is none.
            let limit = number(&group.join(limit)).filter(|l| *l < 1 << 62)?;
            Some(limit.saturating_sub(number(&group.join(usage))?))
        })
        .min()
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
    fn the_tightest_limit_on_the_way_up_counts() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "docker/abc/memory.max", "max\n");
        put(dir.path(), "docker/abc/memory.current", "1000\n");
        put(dir.path(), "docker/memory.max", "5000\n");
        put(dir.path(), "docker/memory.current", "1500\n");
        assert_eq!(room("0::/docker/abc\n", dir.path()), Some(3500));
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
