//! A root file system with just what a program needs.
//!
//! What a program needs is asked of the system's dynamic loader, which lists
//! (`--list`) all libraries that it would load. Every container gets copies of
//! its own: other inodes, the same build-ids, as with two images.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The loader that the x86-64 ABI names.
pub const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// A file of the root.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it comes from.
    pub from: PathBuf,
    /// Where it goes: absolute, inside.
    pub to: PathBuf,
}

impl Entry {
    /// A file from somewhere, to somewhere.
    pub fn new(from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        Self {
            from: from.into(),
            to: to.into(),
        }
    }
}

/// The libraries that an executable or library needs: all of them, with those
/// that they need. Paths as the loader says them, which is where it will look.
pub fn libraries_of(file: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new(LOADER)
        .arg("--list")
        .arg(file)
        .output()
        .with_context(|| format!("cannot run {LOADER}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    // "statically linked" is a failure too, but one that needs nothing.
    ensure!(
        output.status.success() || text.contains("statically linked"),
        "{} lacks a library: {}{}",
        file.display(),
        text.trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    text.lines()
        .map(parse_line)
        .filter_map(Result::transpose)
        .collect()
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` has one;
/// `linux-vdso.so.1 (0x…)` has none; a line with "not found" is an error.
fn parse_line(line: &str) -> Result<Option<PathBuf>> {
    ensure!(
        !line.contains("not found"),
        "the loader says: {}",
        line.trim()
    );
    let path = match line.split_once("=>") {
        Some((_, right)) => right,
        None => line,
    };
    let path = path.trim().split(" (0x").next().unwrap_or_default();
    Ok(path.starts_with('/').then(|| path.into()))
}

fn is_elf(file: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let read = fs::File::open(file)
        .and_then(|mut f| f.read(&mut magic))
        .with_context(|| file.display().to_string())?;
    Ok(read == magic.len() && magic == *b"\x7fELF")
}

/// Copies `files`, the libraries that they need and the loader to `root`. A
/// library among `files` comes instead of the machine's.
pub fn build(root: &Path, files: &[Entry]) -> Result<()> {
    // By destination, so that nothing is copied twice.
    let mut all = BTreeMap::new();
    all.insert(PathBuf::from(LOADER), PathBuf::from(LOADER));
    for file in files {
        ensure!(
            file.to.is_absolute(),
            "{} is not absolute",
            file.to.display()
        );
        // Configuration and the like needs nothing.
        if is_elf(&file.from)? {
            for library in libraries_of(&file.from)? {
                all.entry(library.clone()).or_insert(library);
            }
        }
    }
    for file in files {
        all.insert(file.to.clone(), file.from.clone());
    }
    for (to, from) in &all {
        let target = inside(root, to);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, &target)
            .with_context(|| format!("cannot copy {} to {}", from.display(), target.display()))?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    }
    for dir in [
        "dev",
        "proc",
        "sys",
        "tmp",
        "etc",
        "outputs",
        "dev/shm",
        "dev/shm/faas_ipc",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/false\n")?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
    Ok(())
}

/// The place below `root` for an absolute path.
pub fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_loader_says() {
        let path = |line| parse_line(line).unwrap().map(|p| p.display().to_string());
        assert_eq!(path("\tlinux-vdso.so.1 (0x00007ff)"), None);
        assert_eq!(
            path("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007ff)").as_deref(),
            Some("/lib/x86_64-linux-gnu/libc.so.6")
        );
        assert_eq!(
            path("\t/lib64/ld-linux-x86-64.so.2 (0x00007ff)").as_deref(),
            Some("/lib64/ld-linux-x86-64.so.2")
        );
        assert_eq!(path("\tstatically linked"), None);
        assert!(parse_line("\tlibx.so => not found").is_err());
    }

    #[test]
    fn this_test_needs_the_c_library() {
        let libraries = libraries_of(&std::env::current_exe().unwrap()).unwrap();
        assert!(
            libraries.iter().any(|l| l.ends_with("libc.so.6")),
            "{libraries:?}"
        );
        for l in &libraries {
            assert!(l.exists(), "{}", l.display());
        }
    }
}
