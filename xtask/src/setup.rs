//! What a fresh Debian machine lacks.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Package, and the file that shows that it (or something equal) is there.
type Needed = (&'static str, &'static str);

/// For building functions in C and C++, and for asking them as users do.
const BUILD: &[Needed] = &[
    ("gcc", "/usr/bin/gcc"),
    ("g++", "/usr/bin/g++"),
    ("libc6-dev", "/usr/include/stdio.h"),
    ("clang", "/usr/bin/clang"),
    ("curl", "/usr/bin/curl"),
];
/// For tests and the demo with Docker.
const DOCKER: &[Needed] = &[("docker.io", "/usr/sbin/dockerd")];

/// Installs what is missing; `docker` includes what only Docker's tests and
/// demo need.
pub(crate) fn install(docker: bool) -> Result<()> {
    let docker = if docker { DOCKER } else { &[] };
    let missing: Vec<&str> = BUILD
        .iter()
        .chain(docker)
        .filter(|(_, file)| !std::path::Path::new(file).exists())
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let by_hand = format!("install them by hand: apt-get install --no-install-recommends {list}");
    ensure!(
        std::path::Path::new("/usr/bin/apt-get").exists(),
        "missing: {list}, and there is no apt-get; {by_hand}"
    );
    eprintln!("installing Debian packages that are missing: {list}");
    apt(&["update"])
        .context("apt-get update")
        .with_context(|| by_hand.clone())?;
    let arguments = ["install", "--yes", "--no-install-recommends"];
    apt(&arguments.into_iter().chain(missing).collect::<Vec<_>>()).with_context(|| by_hand)
}

fn apt(arguments: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("apt-get cannot be started")?;
    if !output.status.success() {
        bail!(
            "apt-get failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
