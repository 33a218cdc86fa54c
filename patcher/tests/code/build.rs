//! Compiling the callers of `fixtures/code` in every way that must work.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// One way of building a caller.
#[derive(Debug, Clone)]
pub(crate) struct Build {
    pub(crate) compiler: &'static str,
    pub(crate) flags: Vec<&'static str>,
    pub(crate) stripped: bool,
}

impl std::fmt::Display for Build {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.compiler, self.flags.join(" "))?;
        if self.stripped {
            f.write_str(", stripped")?;
        }
        Ok(())
    }
}

const LEVELS: [&str; 5] = ["-O0", "-O1", "-O2", "-O3", "-Os"];

/// Every build of the matrix for these two compilers.
pub(crate) fn matrix(gcc: &'static str, clang: &'static str) -> Vec<Build> {
    let mut builds = Vec::new();
    for (compiler, thunk) in [(gcc, "-mindirect-branch=thunk"), (clang, "-mretpoline")] {
        for level in LEVELS {
            let variants: [&[&'static str]; 8] = [
                &[],
                &["-fcf-protection=full"],
                &["-fno-plt"],
                &[thunk],
                &["-ffunction-sections", "-Wl,--gc-sections"],
                &["-fomit-frame-pointer", "-fno-asynchronous-unwind-tables"],
                &["-march=haswell", "-fstack-protector-all"],
                &["-fno-jump-tables", "-Wl,-z,noseparate-code"],
            ];
            for (index, variant) in variants.into_iter().enumerate() {
                let mut flags = vec![level];
                flags.extend(variant);
                for stripped in [false, true] {
                    // Stripping changes what is analysed, not the code: half of
                    // the variants are enough.
                    if !stripped || index % 2 == 1 || index == 0 {
                        builds.push(Build {
                            compiler,
                            flags: flags.clone(),
                            stripped,
                        });
                    }
                }
            }
        }
    }
    builds
}

/// The builds that differ in what exceptions have to do with: C++ takes long
/// to compile.
pub(crate) fn matrix_of_exceptions(gcc: &'static str, clang: &'static str) -> Vec<Build> {
    let mut builds = matrix(gcc, clang);
    builds.retain(|build| {
        let plain = build.flags.len() == 1;
        let telling = [
            "-fcf-protection=full",
            "-mindirect-branch=thunk",
            "-mretpoline",
        ];
        plain || !build.stripped && telling.contains(&build.flags[1])
    });
    builds
}

/// Compiles a fixture into `dir`.
///
/// # Panics
/// If the compiler is missing or rejects the source.
pub(crate) fn compile(dir: &TempDir, source: &str, build: &Build) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/code");
    let output = dir
        .path()
        .join(format!("{build}.so").replace([' ', ','], "_"));
    let mut command = Command::new(build.compiler);
    command
        .args(["-shared", "-fPIC", "-g0", "-o"])
        .arg(&output)
        .arg(fixtures.join(source))
        .args(&build.flags);
    if build.stripped {
        command.arg("-s");
    }
    let result = command.output().unwrap_or_else(|error| {
        panic!(
            "{} can't be run ({error}): `cargo xtask setup` installs it",
            build.compiler
        )
    });
    assert!(
        result.status.success(),
        "{build} rejects {source}:\n{}",
        String::from_utf8_lossy(&result.stderr)
    );
    output
}
