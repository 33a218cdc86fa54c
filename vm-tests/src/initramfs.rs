//! What a guest finds: the programs as they were built here, what they need,
//! and our init. An archive in memory is all there is; no disk, no network.
//!
//! ```text
//! /init                     vm_init
//! /nightgraft/…             agent, agentctl, the testbed's programs, vm_trial,
//!                           ptrace-shim's stop tests
//! /nightgraft/fixtures/…    the functions
//! /bin/sh                   for ptrace-shim's tests
//! /nightgraft/overlay.ko    the kernel's own module
//! /lib…, /lib64/…           libraries, where the programs look for them
//! ```
//!
//! Programs are without debugging information, which would be nine tenths.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use cpio::newc;
use nightgraft_testbed::container::rootfs;
use nightgraft_testbed::fixtures::{self, Compiler};

/// Where our files are, inside.
pub const INSIDE: &str = "/nightgraft";
/// The folder of functions below it.
pub const FIXTURES: &str = "fixtures";
/// ptrace-shim's tests below it.
pub const STOPS: &str = "stops";

/// The programs that take part, as cargo names them.
const PROGRAMS: [&str; 9] = [
    "agent",
    "agentctl",
    "engine",
    "func_worker_v1",
    "gateway",
    "launcher",
    "node_keeper",
    "vm_init",
    "vm_trial",
];

/// The functions that take part.
const FUNCTIONS: [&str; 3] = ["foo.c", "bar.c", "baz.c"];

const FOLDER: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// Makes the archive: `programs` is the folder of this build's programs,
/// `stops` the tests of ptrace-shim, `work` a folder for what is made.
pub fn make(
    programs: &Path,
    stops: &Path,
    overlay: &Path,
    work: &Path,
    archive: &Path,
) -> Result<()> {
    let mut files = BTreeMap::new();
    for program in PROGRAMS {
        let stripped = strip(&programs.join(program), work)?;
        let inside = match program {
            "vm_init" => "/init".to_owned(),
            _ => format!("{INSIDE}/{program}"),
        };
        add(&mut files, &inside, &stripped)?;
    }
    add(
        &mut files,
        &format!("{INSIDE}/{STOPS}"),
        &strip(stops, work)?,
    )?;
    for source in FUNCTIONS {
        let library = fixtures::compile(source, Compiler::Gcc, &["-O2"])?;
        let name = library.file_name().context("a library has a name")?;
        let inside = format!("{INSIDE}/{FIXTURES}/{}", name.to_string_lossy());
        add(&mut files, &inside, &library)?;
    }
    files.insert(format!("{INSIDE}/overlay.ko"), overlay.to_owned());
    // Tests of ptrace-shim start one.
    add(&mut files, "/bin/sh", Path::new("/bin/sh"))?;
    files.insert(rootfs::LOADER.to_owned(), rootfs::LOADER.into());
    write(&files, archive)
}

/// Adds a program or library, with the libraries that it needs.
fn add(files: &mut BTreeMap<String, PathBuf>, inside: &str, file: &Path) -> Result<()> {
    for library in rootfs::libraries_of(file)? {
        files.insert(library.to_string_lossy().into_owned(), library);
    }
    files.insert(inside.to_owned(), file.to_owned());
    Ok(())
}

fn strip(program: &Path, work: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program has a name")?;
    let stripped = work.join(name);
    let output = Command::new("strip")
        .args(["--strip-debug", "-o"])
        .arg(&stripped)
        .arg(program)
        .stdin(Stdio::null())
        .output()
        .context("strip (package binutils) cannot be started")?;
    ensure!(
        output.status.success(),
        "strip {}: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(stripped)
}

fn write(files: &BTreeMap<String, PathBuf>, archive: &Path) -> Result<()> {
    let mut out = std::io::BufWriter::new(File::create(archive)?);
    let mut folders = std::collections::BTreeSet::new();
    for inside in files.keys() {
        let above = Path::new(inside).ancestors().skip(1);
        folders.extend(
            above
                .filter(|f| f.parent().is_some())
                .map(Path::to_path_buf),
        );
    }
    // A parent sorts before what is in it.
    for folder in &folders {
        entry(&mut out, &folder.to_string_lossy(), FOLDER, &[])?;
    }
    for (inside, file) in files {
        let bytes = fs::read(file).with_context(|| file.display().to_string())?;
        entry(&mut out, inside, EXECUTABLE, &bytes)?;
    }
    newc::trailer(&mut out)?;
    out.flush()?;
    Ok(())
}

fn entry(out: &mut impl Write, inside: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let name = inside.trim_start_matches('/');
    let size = u32::try_from(bytes.len()).with_context(|| format!("{name} is too large"))?;
    let mut writer = newc::Builder::new(name)
        .mode(mode)
        .nlink(1)
        .write(out, size);
    writer.write_all(bytes)?;
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_folders_before_what_is_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"content").unwrap();
        let files = BTreeMap::from([
            ("/init".to_owned(), file.clone()),
            ("/a/b/c".to_owned(), file),
        ]);
        let archive = dir.path().join("archive");
        write(&files, &archive).unwrap();
        let mut found = Vec::new();
        let mut rest = File::open(&archive).unwrap();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut content = String::new();
            std::io::Read::read_to_string(&mut reader, &mut content).unwrap();
            let entry = reader.entry();
            found.push((entry.name().to_owned(), entry.mode(), content));
            rest = reader.finish().unwrap();
        }
        let content = || "content".to_owned();
        assert_eq!(
            found,
            [
                ("a".to_owned(), FOLDER, String::new()),
                ("a/b".to_owned(), FOLDER, String::new()),
                ("a/b/c".to_owned(), EXECUTABLE, content()),
                ("init".to_owned(), EXECUTABLE, content()),
            ]
        );
    }
}
