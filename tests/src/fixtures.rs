//! The functions that tests run, in C, and what they answer.
//!
//! The sources are part of this library and their protocol stands at their
//! tops. [`compile`] makes a shared library of one, once per content of source,
//! compiler and flags; what has been compiled is found again even where there
//! is no compiler.

use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Debian packages that [`compile`] and the demo need.
pub const DEBIAN_PACKAGES: &[&str] = &["gcc", "g++", "libc6-dev", "clang"];
/// Debian packages that the Docker runtime needs beside these.
pub const DEBIAN_PACKAGES_FOR_DOCKER: &[&str] = &["docker.io"];
/// Where libraries are kept, if not below the target directory.
pub const CACHE_VARIABLE: &str = "NIGHTGRAFT_FIXTURES";

const SOURCES: &[(&str, &str)] = &[
    ("worker_v1.h", include_str!("../fixtures/worker_v1.h")),
    ("lifecycle.h", include_str!("../fixtures/lifecycle.h")),
    ("bar_logic.h", include_str!("../fixtures/bar_logic.h")),
    ("foo_logic.h", include_str!("../fixtures/foo_logic.h")),
    ("foo.c", include_str!("../fixtures/foo.c")),
    ("bar.c", include_str!("../fixtures/bar.c")),
    ("baz.c", include_str!("../fixtures/baz.c")),
    ("dynamic.c", include_str!("../fixtures/dynamic.c")),
    ("named.c", include_str!("../fixtures/named.c")),
    ("foobar_fused.c", include_str!("../fixtures/foobar_fused.c")),
];

/// Which compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compiler {
    /// GNU's.
    Gcc,
    /// LLVM's.
    Clang,
    /// GNU's, for C++.
    Gxx,
    /// LLVM's, for C++.
    Clangxx,
}

impl Compiler {
    /// Its program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Gcc => "gcc",
            Self::Clang => "clang",
            Self::Gxx => "g++",
            Self::Clangxx => "clang++",
        }
    }

    /// What it must be told about a source whose name ends in `.c`.
    fn language(self) -> &'static [&'static str] {
        match self {
            Self::Gcc | Self::Clang => &[],
            Self::Gxx | Self::Clangxx => &["-x", "c++", "-std=c++17"],
        }
    }
}

/// Compiles one of the fixtures ("foo.c") and returns the library.
pub fn compile(source: &str, compiler: Compiler, flags: &[&str]) -> Result<PathBuf> {
    if !SOURCES.iter().any(|(name, _)| *name == source) {
        bail!("there is no fixture {source}");
    }
    let stem = source.strip_suffix(".c").context("a fixture ends in .c")?;
    build(stem, source, SOURCES, compiler, flags)
}

/// Compiles source text given by the caller, beside the fixtures' headers.
pub fn compile_text(stem: &str, text: &str, compiler: Compiler, flags: &[&str]) -> Result<PathBuf> {
    let name = format!("{stem}.c");
    let mut sources: Vec<_> = SOURCES
        .iter()
        .copied()
        .filter(|(n, _)| n.ends_with(".h"))
        .collect();
    sources.push((&name, text));
    build(stem, &name, &sources, compiler, flags)
}

fn build(
    stem: &str,
    source: &str,
    sources: &[(&str, &str)],
    compiler: Compiler,
    flags: &[&str],
) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (sources, source, compiler, flags).hash(&mut hasher);
    let dir = cache_dir()?.join(format!("{stem}-{:016x}", hasher.finish()));
    let library = dir.join(format!("lib{stem}.so"));
    if library.is_file() {
        return Ok(library);
    }
    // Made aside and moved into place, since tests compile at the same time.
    let parent = dir.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    let work = tempfile::Builder::new()
        .prefix("build-")
        .tempdir_in(parent)?;
    for (name, text) in sources {
        fs::write(work.path().join(name), text)?;
    }
    let output = Command::new(compiler.program())
        .current_dir(work.path())
        .args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"])
        .args(compiler.language())
        .args(flags)
        .arg("-o")
        .arg(format!("lib{stem}.so"))
        .arg(source)
        .output()
        .with_context(|| format!("cannot run {} (is it installed?)", compiler.program()))?;
    if !output.status.success() {
        bail!(
            "{} {} {source}: {}",
            compiler.program(),
            flags.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let work = work.keep();
    if fs::rename(&work, &dir).is_err() {
        // Somebody else was faster.
        let _ = fs::remove_dir_all(&work);
    }
    anyhow::ensure!(library.is_file(), "{} is not there", library.display());
    Ok(library)
}

fn cache_dir() -> Result<PathBuf> {
    match std::env::var_os(CACHE_VARIABLE) {
        Some(dir) => Ok(dir.into()),
        None => Ok(crate::bin_dir()?.join("testbed-fixtures")),
    }
}

/// What Bar answers to an input that is no command.
pub fn bar(input: &[u8]) -> Vec<u8> {
    let mut hash = 2_166_136_261_u32;
    for &b in input {
        hash = (hash ^ u32::from(b)).wrapping_mul(16_777_619);
    }
    let mut sample = input[..input.len().min(64)].to_vec();
    sample.sort_unstable();
    let middle = sample.get(sample.len() / 2).copied().unwrap_or(0);
    let mut answer: Vec<u8> = input.iter().rev().copied().collect();
    let mut tail = String::new();
    let _ = write!(tail, "|{hash:08x}|{middle:02x}");
    answer.extend_from_slice(tail.as_bytes());
    answer
}

/// What Foo answers to an input that is no command: Bar's answer after "Foo:".
pub fn foo(input: &[u8]) -> Vec<u8> {
    let mut answer = b"Foo:".to_vec();
    answer.extend_from_slice(&bar(input));
    answer
}

/// What Foo answers to `big N`.
pub fn foo_big(n: usize) -> Vec<u8> {
    let pattern: Vec<u8> = (0..n).map(|i| (i * 131 + i / 256) as u8).collect();
    foo(&pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_bars_answers() {
        assert_eq!(bar(b"hello"), b"olleh|4f9f2cab|6c");
        assert_eq!(bar(b""), b"|811c9dc5|00");
    }

    #[test]
    fn a_library_is_compiled_once() {
        let one = compile("baz.c", Compiler::Gcc, &["-O1"]).unwrap();
        let made = fs::metadata(&one).unwrap().modified().unwrap();
        let two = compile("baz.c", Compiler::Gcc, &["-O1"]).unwrap();
        assert_eq!(one, two);
        assert_eq!(fs::metadata(&two).unwrap().modified().unwrap(), made);
        assert_ne!(compile("baz.c", Compiler::Gcc, &["-O2"]).unwrap(), one);
    }

    #[test]
    fn a_compilers_complaint_is_told() {
        let e = compile_text("bad", "int f(void) { return x; }", Compiler::Gcc, &[]).unwrap_err();
        assert!(e.to_string().contains("undeclared"), "{e}");
        assert!(compile("nix.c", Compiler::Gcc, &[]).is_err());
    }
}
