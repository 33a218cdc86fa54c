//! What a worker executes and has mapped, to be compared byte for byte.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context, Result, bail, ensure};

/// Taken of a worker that stands still: one that waits for a request, or that
/// is stopped.
#[derive(PartialEq, Eq)]
pub(crate) struct Code {
    pid: i32,
    maps: String,
    executable: Vec<(u64, Vec<u8>)>,
    descriptors: usize,
}

impl Code {
    /// The list of mappings, the bytes of all that can be executed, and how
    /// many descriptors are open.
    pub(crate) fn of(pid: i32) -> Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let mut executable = Vec::new();
        for line in maps.lines() {
            let (range, rest) = line.split_once(' ').context("a line of maps")?;
            // The kernel's own pages can't be read through mem.
            if !rest.starts_with("r-x") && !rest.starts_with("rwx") || rest.ends_with("[vsyscall]")
            {
                continue;
            }
            let (start, end) = range.split_once('-').context("a range")?;
            let (start, end) = (
                u64::from_str_radix(start, 16)?,
                u64::from_str_radix(end, 16)?,
            );
            let mut bytes = vec![0; usize::try_from(end - start)?];
            memory
                .read_exact_at(&mut bytes, start)
                .with_context(|| line.to_owned())?;
            executable.push((start, bytes));
        }
        ensure!(!executable.is_empty(), "nothing to execute in {pid}");
        Ok(Self {
            pid,
            maps,
            executable,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        })
    }

    /// That the worker is as it was, byte for byte.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let now = Self::of(self.pid)?;
        ensure!(
            self.maps == now.maps,
            "the mappings of {} were\n{}\nand are\n{}",
            self.pid,
            self.maps,
            now.maps
        );
        self.runs_the_same()?;
        ensure!(
            self.descriptors == now.descriptors,
            "worker {} had {} descriptors and has {}",
            self.pid,
            self.descriptors,
            now.descriptors
        );
        Ok(())
    }

    /// That what could be executed then still has the same bytes, whatever has
    /// been mapped beside it.
    pub(crate) fn runs_the_same(&self) -> Result<()> {
        let memory = File::open(format!("/proc/{}/mem", self.pid))?;
        for (start, was) in &self.executable {
            let mut is = vec![0; was.len()];
            memory.read_exact_at(&mut is, *start)?;
            if let Some(at) = was.iter().zip(&is).position(|(a, b)| a != b) {
                let at = at as u64 + start;
                bail!("the byte at {at:#x} in {} is another", self.pid);
            }
        }
        Ok(())
    }
}
