//! Under which conditions a kernel is tried, and how they get into the guest:
//! as options of QEMU and words of the kernel's command line. What the kernel
//! does not know of those it leaves to us (words with a dot in them belong to
//! modules that may come), so the guest's init reads the rest there.

use std::fmt;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::pairwise::{self, Problem};

/// Begins our words on the command line.
const PREFIX: &str = "nightgraft.condition=";

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Series {
    /// That of Debian 12.
    #[serde(rename = "6.1")]
    V6_1,
    /// That of Debian 13, and of Debian 12's backports.
    #[serde(rename = "6.12")]
    V6_12,
}

impl Series {
    /// All, oldest first.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// As `uname -r` begins.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }
}

/// What the processor can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Processor {
    /// All that QEMU can emulate: AVX2, XSAVE, PKU, SMEP, SMAP.
    Max,
    /// The same without XSAVE, and so without AVX: the C library and the
    /// kernel's signal frames know FXSAVE only.
    NoXsave,
    /// The least that x86-64 is: SSE2 and little more.
    Qemu64,
}

impl Processor {
    /// QEMU's name.
    pub fn model(self) -> &'static str {
        match self {
            Self::Max => "max",
            Self::NoXsave => "max,-xsave,-avx,-avx2,-f16c,-fma,-pku",
            Self::Qemu64 => "qemu64",
        }
    }
}

/// Which control groups there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cgroups {
    /// One hierarchy for each controller that the kernel has, and no other.
    V1,
    /// The unified hierarchy only.
    V2,
}

/// `proc_mem.force_override`, of 6.12 and later: who may write through
/// `/proc/PID/mem` what the process itself may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForcedWrites {
    /// Whoever may open it; older kernels know nothing else.
    Always,
    /// Who traces the process.
    Ptrace,
    /// Nobody.
    Never,
}

/// What the containers' roots are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Root {
    /// A folder of the host's.
    Plain,
    /// An overlayfs, as Docker's: before Linux 6.8 a mapped file has another
    /// device and inode in `/proc/PID/maps` than `stat` says.
    Overlay,
}

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trial {
    /// The patch under load.
    Patch,
    /// ptrace-shim's tests of stops.
    Stops,
}

/// The conditions of one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What is tried.
    pub trial: Trial,
    /// The kernel.
    pub kernel: Series,
    /// Processors.
    pub cpus: u8,
    /// What they can do.
    pub processor: Processor,
    /// `kernel.yama.ptrace_scope`: 0 to 3.
    pub yama: u8,
    /// `hidepid` of `/proc`: 0 or 2.
    pub hidepid: u8,
    /// Control groups.
    pub cgroups: Cgroups,
    /// Forced writes.
    pub forced: ForcedWrites,
    /// The containers' roots.
    pub root: Root,
}

const CPUS: [u8; 2] = [1, 4];
const PROCESSORS: [Processor; 3] = [Processor::Max, Processor::NoXsave, Processor::Qemu64];
const YAMA: [u8; 4] = [0, 1, 2, 3];
const HIDEPID: [u8; 2] = [0, 2];
const CGROUPS: [Cgroups; 2] = [Cgroups::V2, Cgroups::V1];
const FORCED: [ForcedWrites; 3] = [
    ForcedWrites::Always,
    ForcedWrites::Ptrace,
    ForcedWrites::Never,
];
const ROOTS: [Root; 2] = [Root::Plain, Root::Overlay];

impl Condition {
    fn at(row: &[usize]) -> Self {
        Self {
            trial: Trial::Patch,
            kernel: Series::ALL[row[0]],
            cpus: CPUS[row[1]],
            processor: PROCESSORS[row[2]],
            yama: YAMA[row[3]],
            hidepid: HIDEPID[row[4]],
            cgroups: CGROUPS[row[5]],
            forced: FORCED[row[6]],
            root: ROOTS[row[7]],
        }
    }

    /// Whether the kernel has what is asked for.
    fn is_possible(&self) -> bool {
        self.kernel != Series::V6_1 || self.forced == ForcedWrites::Always
    }

    /// Conditions in which every `strength` values of different parameters
    /// meet, where they can.
    pub fn combined(strength: usize) -> Vec<Self> {
        let levels = [
            Series::ALL.len(),
            CPUS.len(),
            PROCESSORS.len(),
            YAMA.len(),
            HIDEPID.len(),
            CGROUPS.len(),
            FORCED.len(),
            ROOTS.len(),
        ];
        pairwise::rows(&Problem {
            levels: &levels,
            strength,
            possible: &|row| Self::at(row).is_possible(),
            // Nobody may trace: the agent refuses, and nothing else is seen.
            ended_by: &|row| (Self::at(row).yama == 3).then_some(3),
        })
        .iter()
        .map(|row| Self::at(row))
        .collect()
    }

    /// Conditions for ptrace-shim's tests. What they do depends on the kernel,
    /// on how many processors there are, on what a signal frame holds and on
    /// how code is written; control groups and roots are nothing to them.
    pub fn stops(all: bool) -> Vec<Self> {
        let of = |kernel, cpus, processor, forced| Self {
            trial: Trial::Stops,
            kernel,
            cpus,
            processor,
            yama: 1,
            hidepid: 0,
            cgroups: Cgroups::V2,
            forced,
            root: Root::Plain,
        };
        use ForcedWrites::{Always, Never, Ptrace};
        use Processor::{Max, NoXsave, Qemu64};
        let mut chosen = vec![
            of(Series::V6_1, 1, Qemu64, Always),
            of(Series::V6_12, 4, Max, Never),
        ];
        if all {
            chosen.extend([
                of(Series::V6_1, 4, Max, Always),
                of(Series::V6_12, 1, NoXsave, Ptrace),
                of(Series::V6_12, 1, Max, Always),
            ]);
        }
        chosen
    }

    /// The words for the kernel's command line.
    pub fn command_line(&self) -> Result<String> {
        let mut words = vec![format!("{PREFIX}{}", serde_json::to_string(self)?)];
        if self.cgroups == Cgroups::V2 {
            words.push("cgroup_no_v1=all".into());
        }
        match self.forced {
            ForcedWrites::Always if self.kernel == Series::V6_1 => {}
            ForcedWrites::Always => words.push("proc_mem.force_override=always".into()),
            ForcedWrites::Ptrace => words.push("proc_mem.force_override=ptrace".into()),
            ForcedWrites::Never => words.push("proc_mem.force_override=never".into()),
        }
        Ok(words.join(" "))
    }

    /// Reads them back.
    pub fn from_command_line(line: &str) -> Result<Self> {
        let json = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix(PREFIX))
            .with_context(|| format!("no {PREFIX} on the kernel's command line: {line}"))?;
        serde_json::from_str(json).with_context(|| format!("no condition: {json}"))
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trial = match self.trial {
            Trial::Patch => "patch",
            Trial::Stops => "stops",
        };
        let processor = match self.processor {
            Processor::Max => "max",
            Processor::NoXsave => "no-xsave",
            Processor::Qemu64 => "qemu64",
        };
        let cgroups = match self.cgroups {
            Cgroups::V1 => "v1",
            Cgroups::V2 => "v2",
        };
        let forced = match self.forced {
            ForcedWrites::Always => "always",
            ForcedWrites::Ptrace => "ptrace",
            ForcedWrites::Never => "never",
        };
        let root = match self.root {
            Root::Plain => "plain",
            Root::Overlay => "overlay",
        };
        write!(
            f,
            "{trial} {} cpus={} cpu={processor} yama={} hidepid={} cgroups={cgroups} force={forced} root={root}",
            self.kernel.name(),
            self.cpus,
            self.yama,
            self.hidepid,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_comes_through_the_command_line() {
        for condition in Condition::combined(2) {
            let line = format!("console=ttyS0 {} quiet", condition.command_line().unwrap());
            // The kernel takes a word with a blank or a quote in it apart.
            assert_eq!(Condition::from_command_line(&line).unwrap(), condition);
            // COMMAND_LINE_SIZE of x86
            assert!(line.len() < 1024, "{line}");
        }
    }

    #[test]
    fn pairs_fit_into_a_run_of_minutes_and_contain_every_value() {
        let all = Condition::combined(2);
        assert!(all.len() <= 20, "{}", all.len());
        let whole = |c: &&Condition| c.yama < 3;
        let meet = |what: &str, holds: &dyn Fn(&Condition) -> bool| {
            assert!(all.iter().filter(whole).any(holds), "{what}");
        };
        for forced in FORCED {
            for processor in PROCESSORS {
                meet("forced writes and processor", &|c| {
                    c.forced == forced && c.processor == processor
                });
            }
            meet("forced writes on an overlay", &|c| {
                c.forced == forced && c.root == Root::Overlay
            });
        }
        for kernel in Series::ALL {
            for cpus in CPUS {
                meet("kernel and processors", &|c| {
                    c.kernel == kernel && c.cpus == cpus
                });
            }
            assert!(all.iter().any(|c| c.kernel == kernel && c.yama == 3));
        }
        assert!(all.iter().all(Condition::is_possible));
    }
}
