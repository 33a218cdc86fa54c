//! What PID 1 does in a guest: makes the conditions, runs the trial, says what
//! came of it in one line, and turns the machine off.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nightgraft_testbed::sys::process;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::conditions::{Cgroups, Condition, Root, Trial};
use crate::initramfs::{FIXTURES, INSIDE, STOPS};
use crate::verdict::Verdict;

/// How long a trial may take before it is ended from inside, where its logs
/// can still be had. The host's limit is longer.
pub const TRIAL_WITHIN: Duration = Duration::from_secs(600);

/// Does it all. Never returns: the kernel would panic.
pub fn run() -> ! {
    let since = Instant::now();
    let verdict = prepare()
        .and_then(|condition| trial(&condition))
        .unwrap_or_else(|error| Verdict {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            passed: false,
            error: Some(format!("{error:#}")),
            seen: serde_json::Value::Null,
            seconds: since.elapsed().as_secs(),
        });
    if !verdict.passed {
        show_kernel_log();
    }
    // From here on the console is ours alone.
    let _ = fs::write("/proc/sys/kernel/printk", "1");
    println!("{}", verdict.line());
    let _ = std::io::stdout().flush();
    loop {
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        println!("the machine cannot be turned off: {error}");
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn fresh(kind: &str, at: &str, options: Option<&str>) -> Result<()> {
    fs::create_dir_all(at)?;
    mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("{kind} at {at} with {options:?}"))
}

/// Makes the conditions that are made from inside.
fn prepare() -> Result<Condition> {
    leave_the_first_root().context("the root")?;
    fresh("proc", "/proc", None)?;
    fresh("devtmpfs", "/dev", None)?;
    fresh("sysfs", "/sys", None)?;
    fresh("tmpfs", "/dev/shm", None)?;
    fresh("tmpfs", "/tmp", None)?;
    fs::create_dir_all("/run")?;
    process::loopback_up().context("loopback")?;

    let condition = Condition::from_command_line(&fs::read_to_string("/proc/cmdline")?)?;
    println!("condition: {condition}");
    if condition.hidepid > 0 {
        let options = format!("hidepid={}", condition.hidepid);
        mount(
            None::<&str>,
            "/proc",
            None::<&str>,
            MsFlags::MS_REMOUNT,
            Some(options.as_str()),
        )
        .with_context(|| options.clone())?;
    }
    match condition.cgroups {
        Cgroups::V2 => fresh("cgroup2", "/sys/fs/cgroup", None)?,
        Cgroups::V1 => version_1_groups()?,
    }
    if condition.root == Root::Overlay {
        let module = File::open(format!("{INSIDE}/overlay.ko"))?;
        let flags = nix::kmod::ModuleInitFlags::empty();
        nix::kmod::finit_module(module.as_fd(), c"", flags).context("overlay.ko")?;
    }
    // Where there is no Yama the probe says so, and the trial goes by that.
    let yama = "/proc/sys/kernel/yama/ptrace_scope";
    // Scope 3 ends all tracing, and is left to the trial.
    if condition.yama < 3 && Path::new(yama).exists() {
        fs::write(yama, condition.yama.to_string()).context(yama)?;
    }
    Ok(condition)
}

/// The kernel's first root cannot be pivoted away from, and containers do that:
/// it is mounted over itself.
fn leave_the_first_root() -> Result<()> {
    let none = None::<&str>;
    fs::create_dir_all("/root")?;
    mount(Some("/"), "/root", none, MsFlags::MS_BIND, none)?;
    nix::unistd::chdir("/root")?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// A hierarchy for each controller that the kernel still has in version 1.
fn version_1_groups() -> Result<()> {
    fresh("tmpfs", "/sys/fs/cgroup", None)?;
    let controllers = fs::read_to_string("/proc/cgroups")?;
    let mut mounted = 0;
    for line in controllers.lines().filter(|l| !l.starts_with('#')) {
        let Some(name) = line.split_whitespace().next() else {
            continue;
        };
        let at = format!("/sys/fs/cgroup/{name}");
        fs::create_dir(&at)?;
        match mount(
            Some("cgroup"),
            at.as_str(),
            Some("cgroup"),
            MsFlags::empty(),
            Some(name),
        ) {
            Ok(()) => mounted += 1,
            Err(error) => {
                println!("cgroup v1 without {name}: {error}");
                fs::remove_dir(&at)?;
            }
        }
    }
    ensure!(mounted > 0, "the kernel has no cgroup v1 controller");
    Ok(())
}

/// Runs the trial as a child; what it prints goes to the console, but for its
/// verdict, which is for the end.
fn trial(condition: &Condition) -> Result<Verdict> {
    let mut command = Command::new(format!("{INSIDE}/vm_trial"));
    command
        .args(["--functions", &format!("{INSIDE}/{FIXTURES}")])
        .args(["--seed", &seed(condition).to_string()])
        .env("NIGHTGRAFT_BIN", INSIDE)
        .env("PATH", format!("{INSIDE}:/usr/bin:/bin"))
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if condition.root == Root::Overlay {
        command.arg("--overlay");
    }
    if condition.yama == 3 {
        command.arg("--forbid-tracing");
    }
    if condition.trial == Trial::Stops {
        command.arg("--stops").arg(format!("{INSIDE}/{STOPS}"));
    }
    let mut child = command.spawn().context("vm_trial cannot be started")?;
    let out = child.stdout.take().context("no pipe from the trial")?;
    let reader = std::thread::spawn(move || {
        let mut verdict = None;
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            match Verdict::find(&line) {
                Some(found) => verdict = Some(found),
                None => println!("{line}"),
            }
        }
        verdict
    });
    let deadline = Instant::now() + TRIAL_WITHIN;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            show_processes();
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let status = status.with_context(|| format!("no end of the trial within {TRIAL_WITHIN:?}"))?;
    // Ends when the last holder of the pipe does.
    let verdict = reader
        .join()
        .ok()
        .flatten()
        .with_context(|| format!("the trial ended with {status} and without a verdict"))?;
    ensure!(
        status.success() == verdict.passed,
        "the trial ended with {status} and the verdict {verdict:?}"
    );
    Ok(verdict)
}

/// Other conditions, other moments; the same ones each time.
fn seed(condition: &Condition) -> u64 {
    let text = condition.to_string();
    text.bytes().fold(7, |seed, byte| {
        seed.wrapping_mul(31).wrapping_add(u64::from(byte))
    })
}

/// Where everyone is, for a trial that does not end.
fn show_processes() {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let at = entry.path();
        let read = |name: &str| fs::read_to_string(at.join(name)).unwrap_or_default();
        let command = read("cmdline").replace('\0', " ");
        if command.is_empty() {
            continue;
        }
        println!(
            "{} {command}: state {}, in {}, {}",
            entry.file_name().to_string_lossy(),
            read("stat")
                .rsplit_once(") ")
                .map_or("?", |(_, rest)| rest.split(' ').next().unwrap_or("?")),
            read("syscall").trim(),
            read("stack").replace('\n', " ")
        );
    }
}

/// What the kernel has said, quiet messages included.
fn show_kernel_log() {
    let log = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = log else { return };
    let mut record = [0; 8192];
    // One record a read; "would block" is the end.
    while let Ok(length) = log.read(&mut record) {
        let text = String::from_utf8_lossy(&record[..length]);
        if let Some((_, message)) = text.split_once(';') {
            println!("kernel: {}", message.lines().next().unwrap_or_default());
        }
    }
}
