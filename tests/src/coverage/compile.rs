//! Builds what a row needs, once per content: sources, headers, compilers'
//! versions and commands are hashed, and the folder of that hash is used again.
//!
//! ```text
//! <cache>/<fixture>-<hash>/
//!     libfoo.so, libbar.so, …      one per function
//!     libinner.so, …               the fixture's own libraries, $ORIGIN
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use super::directives::{Dependency, Role, Tool};
use super::fixture::Fixture;
use super::matrix::{PROFILE, Variant};
use super::reference::{Reference, ReferenceFunction, ReferenceSpec};
use crate::fixtures::Compiler;

/// How the shared halves are compiled.
const SHARED_FLAGS: &str = "-O2";

/// What a row runs.
#[derive(Clone, Debug)]
pub struct Built {
    /// Libraries of the functions, by name.
    pub functions: BTreeMap<String, PathBuf>,
    /// The fixture's own libraries that the functions link.
    pub own: Vec<PathBuf>,
}

/// Why a row cannot be built.
#[derive(Debug)]
pub enum BuildError {
    /// A program that it needs is not on this machine.
    Missing(String),
    /// Anything else.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for BuildError {
    fn from(e: anyhow::Error) -> Self {
        Self::Failed(e)
    }
}

impl From<std::io::Error> for BuildError {
    fn from(e: std::io::Error) -> Self {
        Self::Failed(e.into())
    }
}

/// Builds the functions of one row below `cache`.
pub fn build(fixture: &Fixture, variant: &Variant, cache: &Path) -> Result<Built, BuildError> {
    let commands = Commands::new(fixture, variant);
    let mut hasher = DefaultHasher::new();
    commands.hash(&mut hasher)?;
    let dir = cache.join(format!("{}-{:016x}", fixture.name, hasher.finish()));
    if !dir.is_dir() {
        fs::create_dir_all(cache)?;
        let work = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(cache)?;
        commands.run(work.path())?;
        let work = work.keep();
        if fs::rename(&work, &dir).is_err() {
            // Somebody else was faster.
            let _ = fs::remove_dir_all(&work);
        }
    }
    let built = commands.built(&dir);
    for library in built.functions.values().chain(&built.own) {
        if !library.is_file() {
            return Err(anyhow::anyhow!("{} is not there", library.display()).into());
        }
    }
    Ok(built)
}

/// The first line of what a compiler says to `--version`.
pub fn version(program: &str) -> String {
    let output = Command::new(program).arg("--version").output();
    output
        .ok()
        .and_then(|o| String::from_utf8(o.stdout).ok())
        .and_then(|text| text.lines().next().map(str::to_owned))
        .unwrap_or_else(|| format!("{program}: missing"))
}

struct Commands<'f> {
    fixture: &'f Fixture,
    variant: &'f Variant,
}

impl<'f> Commands<'f> {
    fn new(fixture: &'f Fixture, variant: &'f Variant) -> Self {
        Self { fixture, variant }
    }

    /// Functions, their sources, and whether they are of the fixture itself.
    fn functions(&self) -> Vec<(&str, PathBuf, bool)> {
        let f = self.fixture;
        let role = f.directives.role;
        let mut all = vec![
            ("Foo", f.caller.clone(), role != Role::Callee),
            ("Bar", f.callee.clone(), role != Role::Caller),
        ];
        for (name, file) in &f.directives.functions {
            // One half of the shared ones, or a source of its own.
            match file.strip_prefix("shared/") {
                Some(_) => all.push((name, f.dir.with_file_name(file), false)),
                None => all.push((name, f.dir.join(file), true)),
            }
        }
        all
    }

    fn built(&self, dir: &Path) -> Built {
        Built {
            functions: self
                .functions()
                .into_iter()
                .map(|(name, ..)| (name.to_owned(), dir.join(library_of(name))))
                .collect(),
            own: self
                .fixture
                .directives
                .libraries
                .iter()
                .chain(&self.fixture.directives.plugins)
                .map(|(source, _)| dir.join(own_library(source)))
                .collect(),
        }
    }

    fn hash(&self, hasher: &mut DefaultHasher) -> Result<()> {
        let d = &self.fixture.directives;
        let root = self.fixture.dir.parent().context("no folder of fixtures")?;
        for dir in [root, &root.join("shared"), &self.fixture.dir] {
            let mut files: Vec<_> = fs::read_dir(dir)
                .with_context(|| dir.display().to_string())?
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .map(|entry| entry.path())
                .filter(|path| path.is_file())
                .collect();
            files.sort();
            for file in files {
                file.file_name().hash(hasher);
                fs::read(&file)?.hash(hasher);
            }
        }
        self.variant.to_string().hash(hasher);
        (&d.link, &d.libraries, &d.plugins).hash(hasher);
        for program in ["gcc", "clang", "rustc"] {
            versions(program).hash(hasher);
        }
        // What this file does with it.
        include_str!("compile.rs").hash(hasher);
        Ok(())
    }

    fn run(&self, work: &Path) -> Result<(), BuildError> {
        let d = &self.fixture.directives;
        for (source, arguments) in d.libraries.iter().chain(&d.plugins) {
            let file = own_library(source);
            let mut command = self.compiler(&self.fixture.dir.join(source), work)?;
            let dir = self.fixture.dir.display().to_string();
            command.args(arguments.iter().map(|a| a.replace("{dir}", &dir)));
            command.arg(format!("-Wl,-soname,{file}"));
            command.args(["-L.", "-Wl,-rpath,$ORIGIN", "-o", &file]);
            finish(command)?;
        }
        if self.variant.profiled() {
            self.profile(work)?;
        }
        for (name, source, own) in self.functions() {
            let out = library_of(name);
            let mut command = if own {
                self.compiler(&source, work)?
            } else {
                let mut command = tool("gcc")?;
                base(&mut command, &source, work, self.root());
                command.args([SHARED_FLAGS]).arg(&source);
                command
            };
            if own && self.variant.profiled() {
                self.use_profile(&mut command, work)?;
            }
            command.arg("-o").arg(&out);
            self.link(&mut command, name, own);
            finish(command)?;
            if own && let Some(tool) = self.variant.tool {
                process(tool, &work.join(&out))?;
            }
        }
        Ok(())
    }

    /// What a function is linked with.
    fn link(&self, command: &mut Command, name: &str, own: bool) {
        let d = &self.fixture.directives;
        let is_rust = self.fixture.callee.extension().is_some_and(|e| e == "rs") && name == "Bar";
        if is_rust {
            return;
        }
        let too = self.variant.dependency == Some(Dependency::InCallerToo);
        if own && (name != "Foo" || d.role == Role::Caller) {
            command.args(self.own_libraries()).args(&d.link);
        } else if name == "Foo" && too {
            // The caller loads them as well, used or not.
            command.arg("-Wl,--no-as-needed");
            command.args(self.own_libraries()).args(&d.link);
        }
    }

    fn own_libraries(&self) -> Vec<String> {
        let libraries = &self.fixture.directives.libraries;
        if libraries.is_empty() {
            return Vec::new();
        }
        let mut arguments = vec!["-L.".to_owned(), "-Wl,-rpath,$ORIGIN".to_owned()];
        for (source, _) in libraries {
            arguments.push(format!("-l:{}", own_library(source)));
        }
        arguments
    }

    fn root(&self) -> &Path {
        self.fixture.dir.parent().unwrap_or(Path::new("."))
    }

    /// The compiler for one of the fixture's own sources, with all flags.
    fn compiler(&self, source: &Path, work: &Path) -> Result<Command, BuildError> {
        let ending = source.extension().and_then(|e| e.to_str()).unwrap_or("");
        let variant = self.variant;
        if ending == "rs" {
            let mut command = tool("rustc")?;
            command
                .current_dir(work)
                .args(["--edition", "2024", "--crate-type", "cdylib"])
                .args(["--crate-name", "function", "-D", "warnings"])
                .args(&variant.flags)
                .arg(source);
            return Ok(command);
        }
        let program = match (variant.compiler.unwrap_or(Compiler::Gcc), ending) {
            (Compiler::Gcc, "cc") => Compiler::Gxx.program(),
            (Compiler::Clang, "cc") => Compiler::Clangxx.program(),
            (compiler, _) => compiler.program(),
        };
        let mut command = tool(program)?;
        base(&mut command, source, work, self.root());
        command.args(variant.flags.iter().filter(|f| *f != PROFILE));
        if variant.tool == Some(Tool::Bolt) {
            command.arg("-Wl,--emit-relocs");
            if variant.compiler == Some(Compiler::Gcc) {
                // What it wants to split by itself.
                command.arg("-fno-reorder-blocks-and-partition");
            }
        }
        let lto = variant.flags.iter().any(|f| f == "-flto");
        if let Some(linker) = variant.linker {
            command.arg(format!("-fuse-ld={}", linker.name()));
        } else if lto && variant.compiler == Some(Compiler::Clang) {
            // The system's own linker does not know LLVM's intermediate code.
            command.arg("-fuse-ld=lld");
        }
        if variant.compiler == Some(Compiler::Clang) {
            command.args([
                "-Wno-unused-command-line-argument",
                "-Wno-ignored-optimization-argument",
            ]);
        }
        command.arg(source);
        Ok(command)
    }

    /// Compiles for a profile, runs the inputs, and leaves it in `work`.
    fn profile(&self, work: &Path) -> Result<(), BuildError> {
        let mut functions = ReferenceSpec::new();
        for (name, source, own) in self.functions() {
            let out = library_of(name);
            let mut command = if own {
                self.compiler(&source, work)?
            } else {
                let mut command = tool("gcc")?;
                base(&mut command, &source, work, self.root());
                command.arg(&source);
                command
            };
            if own {
                match self.variant.compiler {
                    Some(Compiler::Clang) => command.arg("-fprofile-instr-generate"),
                    _ => command.args(["-fprofile-generate", "-fprofile-update=single"]),
                };
            }
            command.arg("-o").arg(&out);
            self.link(&mut command, name, own);
            finish(command)?;
            let mut env = self.fixture.directives.env.clone();
            env.push((
                "LLVM_PROFILE_FILE".to_owned(),
                work.join(format!("{name}.profraw")).display().to_string(),
            ));
            functions.insert(
                name.to_owned(),
                ReferenceFunction {
                    library: work.join(&out),
                    env,
                    dir: work.to_owned(),
                },
            );
        }
        let mut reference = Reference::start(work, &functions, "Foo")?;
        for input in &self.fixture.directives.inputs {
            reference.ask(input)?;
        }
        reference.finish()?;
        Ok(())
    }

    fn use_profile(&self, command: &mut Command, work: &Path) -> Result<(), BuildError> {
        if self.variant.compiler != Some(Compiler::Clang) {
            command.args([
                "-fprofile-use",
                "-Wno-missing-profile",
                "-freorder-blocks-and-partition",
            ]);
            return Ok(());
        }
        let merged = work.join("merged.profdata");
        let mut merge = tool("llvm-profdata")?;
        merge.args(["merge", "-o"]).arg(&merged);
        for entry in fs::read_dir(work)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "profraw") {
                merge.arg(path);
            }
        }
        finish(merge)?;
        command.arg(format!("-fprofile-instr-use={}", merged.display()));
        command.args(["-fsplit-machine-functions", "-Wno-profile-instr-unprofiled"]);
        Ok(())
    }
}

/// A function's library, as its container will name it.
fn library_of(function: &str) -> String {
    format!("lib{}.so", function.to_lowercase())
}

/// `inner.cc` makes `libinner.so`.
fn own_library(source: &str) -> String {
    let stem = source.rsplit_once('.').map_or(source, |(stem, _)| stem);
    format!("lib{stem}.so")
}

fn base(command: &mut Command, source: &Path, work: &Path, root: &Path) {
    command
        .current_dir(work)
        .args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"])
        .arg("-I")
        .arg(root);
    if source.extension().is_some_and(|e| e == "cc") {
        command.arg("-std=c++17");
    }
}

/// Rewrites a finished library in place.
fn process(what: Tool, library: &Path) -> Result<(), BuildError> {
    let rewritten = library.with_extension("rewritten");
    let mut command = match what {
        Tool::Bolt => {
            let mut command = tool_of(&["llvm-bolt", "llvm-bolt-16", "llvm-bolt-15"])?;
            command.arg(library).arg("-o").arg(&rewritten).args([
                "-reorder-blocks=reverse",
                "-split-functions",
                "-split-strategy=random2",
                "-bolt-seed=7",
            ]);
            command
        }
        Tool::Objcopy => {
            let section = library.with_extension("section");
            fs::write(&section, [0; 64])?;
            let mut command = tool("objcopy")?;
            command
                .args(["--strip-unneeded", "--remove-section=.comment"])
                .arg(format!("--add-section=.note.added={}", section.display()))
                .arg(library)
                .arg(&rewritten);
            command
        }
        Tool::Sections => {
            let mut command = tool_of(&["llvm-strip", "llvm-strip-14"])?;
            command.arg("--strip-sections").arg("-o").arg(&rewritten);
            command.arg(library);
            command
        }
        Tool::Patchelf => {
            let mut command = tool("patchelf")?;
            command
                .args(["--add-needed", "libm.so.6", "--set-soname"])
                .arg("libwith-a-name-that-does-not-fit-where-the-old-one-was.so")
                .args(["--set-rpath", "$ORIGIN:/nowhere/at/all/that/anybody/knows"])
                .arg("--output")
                .arg(&rewritten)
                .arg(library);
            command
        }
    };
    command.current_dir(library.parent().unwrap_or(Path::new("/")));
    finish(command)?;
    fs::rename(rewritten, library)?;
    Ok(())
}

fn versions(program: &str) -> String {
    static KNOWN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known
        .entry(program.to_owned())
        .or_insert_with(|| version(program))
        .clone()
}

fn tool(program: &str) -> Result<Command, BuildError> {
    tool_of(&[program])
}

/// The first of these programs that is there.
fn tool_of(programs: &[&str]) -> Result<Command, BuildError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for program in programs {
        if std::env::split_paths(&path).any(|dir| dir.join(program).is_file()) {
            return Ok(Command::new(program));
        }
    }
    Err(BuildError::Missing(programs[0].to_owned()))
}

fn finish(mut command: Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}{}",
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        );
    }
    Ok(())
}
