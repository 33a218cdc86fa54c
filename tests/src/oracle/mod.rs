//! The machine's own dynamic linker as the judge of our loader.
//!
//! ```text
//!  library ─► Host: ld.so loads it in a process of its own, and what it
//!             depends on; no initialiser runs
//!          ─► snapshot ─► Scope, as in the library's own worker
//!          ─► relocate, every private image at the very address where ld.so
//!             has put it
//!          ─► compare: every relocated word with the live one, then every
//!             other byte, protections, initialisers, unwind tables
//! ```
//!
//! Initialisers do not run so that no word differs because they wrote it, and
//! so that code of any library of the machine is kept from doing anything; only
//! resolvers of indirect functions are called, which is what ld.so does.
//!
//! A library whose imports are refused is compared all the same: words that
//! come out wrong are differences, whether or not something else is refused.

mod compare;
mod content;
mod find;
mod host;
mod tally;
mod tls;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nightgraft_patcher::Refused;
use nightgraft_patcher::load::Scope;
use nightgraft_patcher::snapshot::Worker;

pub use compare::{Compared, Difference};
pub use find::{below, sample, standard};
pub use host::{Host, Object, Program, Unloadable};
pub use tally::Tally;

/// What became of a library.
#[derive(Debug)]
pub enum Verdict {
    /// Everything is as ld.so made it.
    Agree,
    /// The loader would refuse it; what could be compared nevertheless agrees.
    Refused {
        /// The refusal's stable code, or `snapshot` for a file that the
        /// snapshot cannot read.
        code: String,
        /// The refusal.
        reason: String,
    },
    /// Something is not as ld.so made it.
    Differ(Vec<Difference>),
    /// ld.so does not load it here.
    Unloadable(Unloadable),
}

/// A library, judged.
#[derive(Debug)]
pub struct Outcome {
    /// The library.
    pub library: PathBuf,
    /// What became of it.
    pub verdict: Verdict,
    /// It, or a library of which it gets a copy, wants thread-local storage of
    /// its own at a fixed distance from the thread pointer.
    pub static_tls: bool,
    /// Every word of every private image was compared and is as ld.so made it:
    /// if it is refused, then for what it imports.
    pub equal: bool,
    /// Relocated words compared.
    pub words: usize,
    /// Private images.
    pub images: usize,
    /// Bytes of the private images' files.
    pub bytes: u64,
    /// How long reading the process, its scope and the relocations took.
    pub analysis: Duration,
}

impl Outcome {
    fn new(library: &Path, verdict: Verdict) -> Outcome {
        Outcome {
            library: library.to_owned(),
            verdict,
            static_tls: false,
            equal: false,
            words: 0,
            images: 0,
            bytes: 0,
            analysis: Duration::ZERO,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let library = self.library.display();
        match &self.verdict {
            Verdict::Agree => write!(f, "agree       {library}"),
            Verdict::Refused { code, reason } => {
                write!(f, "refused     {library}: {code}: {reason}")
            }
            Verdict::Unloadable(why) => write!(f, "unloadable  {library}: {why}"),
            Verdict::Differ(differences) => {
                write!(f, "DIFFER      {library}")?;
                differences.iter().try_for_each(|d| write!(f, "\n  {d}"))
            }
        }
    }
}

/// Judges one library. Each wait for its process ends after `patience`.
///
/// # Errors
/// The process cannot be started, or dies while it is looked at.
pub fn judge(program: &Program, library: &Path, patience: Duration) -> Result<Outcome> {
    let mut host = match Host::start(program, library, patience)? {
        Ok(host) => host,
        Err(why) => return Ok(Outcome::new(library, Verdict::Unloadable(why))),
    };
    let started = Instant::now();
    let worker = match Worker::read(host.pid(), Path::new(host.library())) {
        Ok(worker) => worker,
        Err(error) => {
            let verdict = Verdict::Refused {
                code: "snapshot".into(),
                reason: error.to_string(),
            };
            return Ok(Outcome::new(library, verdict));
        }
    };
    if host.started_with(worker.function().bias) {
        return Ok(Outcome::new(
            library,
            Verdict::Unloadable(Unloadable::Startup),
        ));
    }
    let caller = idle(&worker);
    let refused = Scope::new(&caller, &worker).err();
    let scope = match Scope::without_policy(&caller, &worker) {
        Ok(scope) => scope,
        Err(refused) => return Ok(Outcome::new(library, refusal(&refused))),
    };
    let mut outcome = Outcome::new(library, Verdict::Agree);
    let relocated = compare::relocate(&worker, &scope);
    outcome.analysis = started.elapsed();
    let images = scope.images().iter();
    outcome.bytes = images.map(|i| i.image.bytes.len() as u64).sum();
    outcome.images = scope.images().len();
    let compared = compare::compare(&mut host, &worker, &scope, relocated)?;
    outcome.words = compared.words;
    outcome.static_tls = compared.static_tls;
    outcome.equal = compared.differences.is_empty() && compared.refused.is_none();
    if !compared.differences.is_empty() {
        outcome.verdict = Verdict::Differ(compared.differences);
    } else if let Some(refused) = refused.or(compared.refused) {
        outcome.verdict = refusal(&refused);
    }
    Ok(outcome)
}

fn refusal(refused: &Refused) -> Verdict {
    Verdict::Refused {
        code: refused.code().into(),
        reason: refused.to_string(),
    }
}

/// The worker with no function: a caller whose own library is in nobody's way.
fn idle(worker: &Worker) -> Worker {
    let mut caller = worker.clone();
    caller.modules.truncate(worker.library);
    caller
}

/// Judges all `libraries`, `jobs` at once; `each` hears of each as it is done.
///
/// # Errors
/// As [`judge`], of the first that fails; the others are not waited for.
pub fn judge_all(
    program: &Program,
    libraries: &[PathBuf],
    jobs: usize,
    patience: Duration,
    each: &(dyn Fn(&Outcome) + Sync),
) -> Result<Tally> {
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Ok(Tally::default()));
    let work = || {
        while let Some(library) = libraries.get(next.fetch_add(1, Ordering::Relaxed)) {
            let judged = judge(program, library, patience);
            let judged = judged.with_context(|| library.display().to_string());
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            match (judged, tally.as_mut()) {
                (Ok(outcome), Ok(tally)) => {
                    tally.add(&outcome);
                    each(&outcome);
                }
                (Err(error), Ok(_)) => *tally = Err(error),
                (_, Err(_)) => return,
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(work);
        }
    });
    tally.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;

    use nightgraft_patcher::elf::constants as c;

    use super::*;

    const SOURCE: &str = "
        #include <stdlib.h>
        char *value(void) { return getenv(\"HOME\"); }
        char *(*const pointer)(void) = value;
        __thread int own = 3; int *mine(void) { return &own; }
        static void started(void) {} static void ended(void) {}
        __attribute__((section(\".init_array\"), used)) static void (*init)(void) = started;
        __attribute__((section(\".fini_array\"), used)) static void (*fini)(void) = ended;
    ";

    /// What differs in a library if our loader makes something else of it.
    fn differences(spoil: impl Fn(&mut nightgraft_patcher::elf::Image)) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("a.c"), folder.path().join("a.so"));
        std::fs::write(&source, SOURCE).unwrap();
        let gcc = Command::new("gcc")
            .args(["-shared", "-fPIC", "-o"])
            .args([&library, &source])
            .status();
        assert!(gcc.unwrap().success());
        let program = Program::compile().unwrap();
        let mut host = Host::start(&program, &library, Duration::from_secs(10))
            .unwrap()
            .unwrap();
        let mut worker = Worker::read(host.pid(), Path::new(host.library())).unwrap();
        let module = &mut worker.modules[worker.library];
        let mut image = module.image.as_ref().clone();
        spoil(&mut image);
        module.image = Arc::new(image);
        let scope = Scope::without_policy(&idle(&worker), &worker).unwrap();
        let relocated = compare::relocate(&worker, &scope);
        let compared = compare::compare(&mut host, &worker, &scope, relocated).unwrap();
        assert!(compared.words > 10 && compared.refused.is_none());
        let differences = compared.differences.iter();
        differences.map(ToString::to_string).collect()
    }

    #[test]
    fn what_our_loader_would_do_wrong_shows() {
        assert_eq!(differences(|_| ()), [""; 0]);
        let of = |kind: u32, change: i64| {
            differences(|image| {
                let mut relocations = image.dynamic.relocations.iter_mut();
                let entry = relocations.rfind(|r| r.kind == kind).unwrap();
                entry.addend = entry.addend.map(|addend| addend + change);
            })
        };
        for (found, what) in [
            (of(c::R_X86_64_RELATIVE, 8), "R_X86_64_RELATIVE"),
            (of(c::R_X86_64_64, 8), "R_X86_64_64 at"),
        ] {
            assert!(found.iter().any(|text| text.contains(what)), "{found:?}");
        }
        let missing = differences(|image| {
            let relocations = &mut image.dynamic.relocations;
            let at = relocations
                .iter()
                .position(|r| r.kind == c::R_X86_64_JUMP_SLOT || r.kind == c::R_X86_64_GLOB_DAT);
            relocations.remove(at.unwrap());
        });
        assert!(missing[0].contains("without a relocation"), "{missing:?}");
        let unsealed = differences(|image| image.relro = None);
        assert!(
            unsealed[0].contains("(writable, executable)"),
            "{unsealed:?}"
        );
        let uninitialised = differences(|image| image.dynamic.init_array = None);
        assert!(
            uninitialised[0].contains("initialisers"),
            "{uninitialised:?}"
        );
        let endless = differences(|image| image.dynamic.fini_array = None);
        assert!(endless[0].contains("termination"), "{endless:?}");
        let lost = differences(|image| image.eh_frame_header = None);
        assert!(lost[0].contains("PT_GNU_EH_FRAME"), "{lost:?}");
        let own = differences(|image| {
            let own = image.symbols.iter_mut().find(|s| s.name == "own");
            own.unwrap().value += 4;
        });
        assert!(own[0].contains("of own"), "{own:?}");
    }

    #[test]
    fn what_ld_so_does_not_load_has_its_reason() {
        let program = Program::compile().unwrap();
        let judged = |path: &str| {
            let patience = Duration::from_secs(10);
            judge(&program, Path::new(path), patience).unwrap().verdict
        };
        match judged("/nowhere/liba.so") {
            Verdict::Unloadable(why) => assert_eq!(why.kind(), "missing dependency"),
            other => panic!("{other:?}"),
        }
        let executable = std::env::current_exe().unwrap();
        match judged(executable.to_str().unwrap()) {
            Verdict::Unloadable(why) => assert_eq!(why.kind(), "other error"),
            other => panic!("{other:?}"),
        }
    }
}
