//! Debian's cloud kernels: downloaded once, of each only what is booted.
//!
//! The packages are those of the machine's own sources (`apt-get download`
//! checks them as it does all). Nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::conditions::Series;

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Which.
    pub series: Series,
    /// The compressed image.
    pub image: PathBuf,
    /// The module for overlay file systems, uncompressed.
    pub overlay: PathBuf,
}

impl Kernel {
    fn in_dir(series: Series, dir: &Path) -> Self {
        Self {
            series,
            image: dir.join("vmlinuz"),
            overlay: dir.join("overlay.ko"),
        }
    }

    fn is_whole(&self) -> bool {
        self.image.is_file() && self.overlay.is_file()
    }

    /// The newest of a series that the machine's package sources have, kept
    /// below `cache`.
    pub fn get(series: Series, cache: &Path) -> Result<Self> {
        let dir = cache.join(series.name());
        let kernel = Self::in_dir(series, &dir);
        if kernel.is_whole() {
            return Ok(kernel);
        }
        fs::create_dir_all(cache)?;
        Self::download(series, cache, &dir).or_else(|_| {
            // A fresh machine has no lists yet, or old ones.
            output(Command::new("apt-get").arg("update"))?;
            Self::download(series, cache, &dir)
        })
    }

    fn download(series: Series, cache: &Path, dir: &Path) -> Result<Self> {
        let packages = packages(series)?;
        ensure!(
            !packages.is_empty(),
            "the machine's package sources have no linux-image-{}…-cloud-amd64",
            series.name()
        );
        let mut failures = Vec::new();
        // A source may still list what its server no longer has.
        for package in packages.iter().take(3) {
            match unpack(package, series, cache, dir) {
                Ok(kernel) => return Ok(kernel),
                Err(error) => failures.push(format!("{package}: {error:#}")),
            }
        }
        bail!(
            "no kernel {} to be had: {}",
            series.name(),
            failures.join("; ")
        )
    }
}

/// The packages of a series, newest first.
fn packages(series: Series) -> Result<Vec<String>> {
    let pattern = format!(
        r"^linux-image-{}\.[0-9].*-cloud-amd64$",
        series.name().replace('.', r"\.")
    );
    let listed = output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    Ok(newest_first(&listed))
}

/// Of `linux-image-6.1.0-56-cloud-amd64 - Linux 6.1 for x86-64 cloud (signed)`
/// and the like the names, by the numbers in them.
fn newest_first(listed: &str) -> Vec<String> {
    let mut names: Vec<String> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect();
    names.sort_by_key(|name| {
        let numbers: Vec<u64> = name
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect();
        std::cmp::Reverse(numbers)
    });
    names
}

/// Downloads a package and takes out what is needed.
fn unpack(package: &str, series: Series, cache: &Path, dir: &Path) -> Result<Kernel> {
    // Made aside and moved into place: whoever is killed leaves no half.
    let work = tempfile::Builder::new()
        .prefix("kernel-")
        .tempdir_in(cache)?;
    output(
        Command::new("apt-get")
            .args(["download", "-o", "APT::Sandbox::User=root", package])
            .current_dir(work.path()),
    )?;
    let archive = one_file(work.path(), &|name| name.ends_with(".deb"))?;
    let tree = work.path().join("tree");
    output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&tree))?;
    let made = Kernel::in_dir(series, &work.path().join("made"));
    fs::create_dir(work.path().join("made"))?;
    let image = one_file(&tree.join("boot"), &|name| name.starts_with("vmlinuz"))?;
    fs::rename(image, &made.image)?;
    // Debian 13 has /usr/lib only.
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|at| tree.join(at))
        .into_iter()
        .find(|at| at.is_dir())
        .context("the package has no modules")?;
    let release = one_file(&modules, &|_| true)?;
    let overlay = one_file(&release.join("kernel/fs/overlayfs"), &|name| {
        name.starts_with("overlay.ko")
    })?;
    if overlay.extension().is_some_and(|e| e == "xz") {
        output(Command::new("xz").arg("--decompress").arg(&overlay))?;
    }
    fs::rename(overlay.with_file_name("overlay.ko"), &made.overlay)?;
    let _ = fs::remove_dir_all(dir);
    fs::rename(work.path().join("made"), dir)?;
    Ok(Kernel::in_dir(series, dir))
}

fn one_file(dir: &Path, is_it: &dyn Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    entries
        .flatten()
        .find(|e| is_it(&e.file_name().to_string_lossy()))
        .map(|e| e.path())
        .with_context(|| format!("{} has not what was looked for", dir.display()))
}

/// Runs a program that must succeed, and gives what it prints.
fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{name} cannot be started"))?;
    ensure!(
        output.status.success(),
        "{name} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_comes_first() {
        let listed = "linux-image-6.12.9+deb12-cloud-amd64 - Linux 6.12 (signed)\n\
                      linux-image-6.12.117+deb12-cloud-amd64 - Linux 6.12 (signed)\n\
                      linux-image-6.12.43+deb12-cloud-amd64 - Linux 6.12 (signed)\n";
        let names = newest_first(listed);
        assert_eq!(names[0], "linux-image-6.12.117+deb12-cloud-amd64");
        assert_eq!(names[2], "linux-image-6.12.9+deb12-cloud-amd64");
    }
}
