//! One boot: QEMU, its console, its end.
//!
//! Without KVM: QEMU's own code generator, which runs everywhere and some
//! twenty times slower.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::conditions::Condition;
use crate::kernel::Kernel;
use crate::verdict::Verdict;

/// QEMU's program.
const PROGRAM: &str = "qemu-system-x86_64";
/// Memory of a guest. Its root is in there as well.
const MEGABYTES: u32 = 1536;

/// What came of a boot.
#[derive(Debug)]
pub struct Outcome {
    /// What the guest said, if it got to that.
    pub verdict: Option<Verdict>,
    /// Everything that its console showed.
    pub console: PathBuf,
    /// Whether it had to be killed.
    pub overdue: bool,
    /// How long it took.
    pub took: Duration,
}

/// Killed when dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots, and waits for the end, which the guest makes itself. After `limit` it
/// is killed.
pub fn boot(
    condition: &Condition,
    kernel: &Kernel,
    archive: &Path,
    console: &Path,
    limit: Duration,
) -> Result<Outcome> {
    let since = Instant::now();
    let out = File::create(console).with_context(|| console.display().to_string())?;
    // Warnings and worse are shown. With a panic the machine starts anew,
    // which -no-reboot makes its end. On a busy host the emulated timer may be
    // late: the kernel is told to trust it.
    let command_line = format!(
        "console=ttyS0 loglevel=5 panic=-1 no_timer_check {}",
        condition.command_line()?
    );
    let mut command = Command::new(PROGRAM);
    command
        .args([
            "-accel",
            "tcg",
            "-machine",
            "pc",
            "-nographic",
            "-no-reboot",
        ])
        .args(["-nodefaults", "-serial", "stdio"])
        .args(["-cpu", condition.processor.model()])
        .args(["-smp", &condition.cpus.to_string()])
        .args(["-m", &MEGABYTES.to_string()])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(archive)
        .args(["-append", &command_line])
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    nightgraft_testbed::sys::process::kill_with_parent(&mut command);
    let mut qemu = Qemu(
        command
            .spawn()
            .with_context(|| format!("{PROGRAM} cannot be started (package qemu-system-x86)"))?,
    );
    let deadline = since + limit;
    let mut overdue = false;
    while qemu.0.try_wait()?.is_none() {
        overdue = Instant::now() > deadline;
        if overdue {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(qemu);
    let shown = fs::read(console)?;
    Ok(Outcome {
        verdict: Verdict::find(&String::from_utf8_lossy(&shown)),
        console: console.to_owned(),
        overdue,
        took: since.elapsed(),
    })
}
