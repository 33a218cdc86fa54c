//! What the kernel at hand was found to have. Nothing is taken for granted:
//! the trial goes by this, and the verdict tells it.

use std::fs;

use ptrace_shim::WriteMethod;
use serde::{Deserialize, Serialize};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probes {
    /// As `uname -r` says.
    pub kernel: String,
    /// Processors.
    pub cpus: usize,
    /// Whether they have XSAVE; else signal frames are FXSAVE's.
    pub xsave: bool,
    /// `kernel.yama.ptrace_scope`, where there is Yama.
    pub yama: Option<u8>,
    /// The options of `/proc` that say who sees whom.
    pub hidepid: String,
    /// Control groups: `v2`, and the controllers of `v1` that are mounted.
    pub cgroups: Vec<String>,
    /// How code is written.
    pub code_is_written_by: WriteMethod,
}

impl Probes {
    /// Looks.
    pub fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = text("/proc/cpuinfo");
        let mounts = text("/proc/self/mounts");
        Self {
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            xsave: cpuinfo
                .lines()
                .find(|line| line.starts_with("flags"))
                .is_some_and(|line| line.split(' ').any(|flag| flag == "xsave")),
            yama: text("/proc/sys/kernel/yama/ptrace_scope")
                .trim()
                .parse()
                .ok(),
            hidepid: hidepid(&mounts),
            cgroups: cgroups(&mounts),
            code_is_written_by: WriteMethod::probe(),
        }
    }
}

/// Of `proc /proc proc rw,relatime,hidepid=invisible 0 0` what is behind the =.
fn hidepid(mounts: &str) -> String {
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| fields.len() > 3 && fields[1] == "/proc")
        .filter_map(|fields| {
            let option = fields[3]
                .split(',')
                .find_map(|o| o.strip_prefix("hidepid="));
            option.map(str::to_owned)
        })
        .next_back()
        .unwrap_or_else(|| "off".to_owned())
}

fn cgroups(mounts: &str) -> Vec<String> {
    let mut found: Vec<String> = mounts
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            match fields.get(2) {
                Some(&"cgroup2") => Some("v2".to_owned()),
                Some(&"cgroup") => fields[1].rsplit('/').next().map(|c| format!("v1:{c}")),
                _ => None,
            }
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "proc /proc proc rw,relatime,hidepid=invisible 0 0\n\
                          cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n\
                          cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[test]
    fn reads_mounts() {
        assert_eq!(hidepid(MOUNTS), "invisible");
        assert_eq!(hidepid("proc /proc proc rw 0 0\n"), "off");
        assert_eq!(cgroups(MOUNTS), ["v1:pids", "v2"]);
    }

    #[test]
    fn this_kernel_has_a_name() {
        let probes = Probes::read();
        assert!(!probes.kernel.is_empty(), "{probes:?}");
        assert!(probes.cpus > 0);
    }
}
