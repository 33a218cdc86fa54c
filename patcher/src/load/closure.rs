//! What a function's library drags along: which libraries it shares with the
//! caller's worker, and of which it gets copies of its own.
//!
//! The callee's worker has them all loaded, so its dynamic linker has already
//! looked for them (RUNPATH, `$ORIGIN`, the container's cache): its list is
//! read instead of searching anew.
//!
//! Shared is what a worker starts with. Everything else is private to the
//! graft: two functions' Thrift, Boost or tracers must not become one.

use std::collections::{HashSet, VecDeque};

use crate::elf::{Image, constants as c};
use crate::refused::Refused;
use crate::snapshot::{Module, Worker};

/// Libraries of which a process must not have a second one: they hold what
/// there is once per process, or hand each other's objects around.
const ONCE: &[&str] = &[
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libutil.so.1",
    "libanl.so.1",
    "libgcc_s.so.1",
    "libstdc++.so.6",
];

/// The modules of the callee's worker that the callee's library uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Closure {
    /// The function's library and, breadth first, what it needs: indices into
    /// the worker's modules.
    pub(super) order: Vec<usize>,
    /// Of these and of `on_demand`, what gets a copy of its own; the
    /// function's library first.
    pub(super) private: Vec<usize>,
    /// What was loaded at run time and is needed by nothing else.
    pub(super) on_demand: Vec<usize>,
    /// All of `private`, each behind what it needs.
    pub(super) initialisation: Vec<usize>,
    /// Libraries that must be the caller's own wherever it got them from.
    pub(super) once: Vec<usize>,
}

/// Finds out.
///
/// # Errors
/// The worker's list does not hold what a library says that it needs.
pub(super) fn closure(worker: &Worker) -> Result<Closure, Refused> {
    let order = breadth_first(worker, worker.library)?;
    let mut private = Vec::new();
    let mut once = Vec::new();
    let mut take = |index: usize| {
        if index < worker.library || private.contains(&index) || once.contains(&index) {
            return;
        }
        // The function's own library is the callee's whatever it is called.
        if index != worker.library && is_once(&worker.modules[index]) {
            once.push(index);
        } else {
            private.push(index);
        }
    };
    order.iter().copied().for_each(&mut take);

    // Only a library that can load another one has done so.
    let loads = |index: &usize| imports(&worker.modules[*index].image, "dlopen");
    let mut on_demand = Vec::new();
    if order.iter().filter(|i| **i >= worker.library).any(loads) {
        let mut rest: Vec<usize> = (worker.library..worker.modules.len())
            .filter(|i| !order.contains(i) && !belongs_to_c_library(&worker.modules[*i]))
            .collect();
        let mut needed = HashSet::new();
        for index in &rest {
            needed.extend(breadth_first(worker, *index)?.into_iter().skip(1));
        }
        rest.iter().copied().for_each(&mut take);
        rest.retain(|index| !needed.contains(index) && !is_once(&worker.modules[*index]));
        on_demand = rest;
    }
    let mut initialisation = Vec::new();
    let mut seen = HashSet::new();
    for index in &private {
        depth_first(worker, *index, &private, &mut seen, &mut initialisation)?;
    }
    // A library that is loaded on demand comes last: its initialisers run
    // when it is asked for.
    initialisation.sort_by_key(|index| on_demand.contains(index));
    Ok(Closure {
        order,
        private,
        on_demand,
        initialisation,
        once,
    })
}

/// Look-up order of what `root` needs, itself first.
///
/// # Errors
/// As [`closure`].
pub(super) fn breadth_first(worker: &Worker, root: usize) -> Result<Vec<usize>, Refused> {
    let mut order = vec![root];
    let mut queue = VecDeque::from([root]);
    while let Some(index) = queue.pop_front() {
        for needed in needs(worker, index)? {
            if !order.contains(&needed) {
                order.push(needed);
                queue.push_back(needed);
            }
        }
    }
    Ok(order)
}

fn depth_first(
    worker: &Worker,
    index: usize,
    private: &[usize],
    seen: &mut HashSet<usize>,
    out: &mut Vec<usize>,
) -> Result<(), Refused> {
    // A chain of dependencies is no longer than there are modules, of which
    // the snapshot bounds the number.
    if !private.contains(&index) || !seen.insert(index) {
        return Ok(());
    }
    for needed in needs(worker, index)? {
        depth_first(worker, needed, private, seen, out)?;
    }
    out.push(index);
    Ok(())
}

fn needs(worker: &Worker, index: usize) -> Result<Vec<usize>, Refused> {
    let module = &worker.modules[index];
    module
        .image
        .dynamic
        .needed
        .iter()
        .map(|needed| {
            worker
                .modules
                .iter()
                .position(|m| is_called(m, needed))
                .ok_or_else(|| Refused::Dependency {
                    library: module.path.clone(),
                    needed: needed.clone(),
                    reason: "the callee's worker has not loaded it".into(),
                })
        })
        .collect()
}

/// Whether a module is what a DT_NEEDED entry asks for.
fn is_called(module: &Module, needed: &str) -> bool {
    if needed.contains('/') {
        return module.path == needed || module.path.ends_with(&format!("/{needed}"));
    }
    module.image.dynamic.soname.as_deref() == Some(needed)
        || module.path.rsplit('/').next() == Some(needed)
}

fn is_once(module: &Module) -> bool {
    ONCE.contains(&module.short_name()) || belongs_to_c_library(module)
}

/// What the C library loads for itself (name services, character sets): it
/// does so in the caller's process too.
fn belongs_to_c_library(module: &Module) -> bool {
    module.short_name().starts_with("libnss_") || module.path.contains("/gconv/")
}

/// Whether an image is one of the empty libraries that newer C libraries keep
/// for old programs: all it defined is in libc itself.
pub(super) fn is_placeholder(image: &Image) -> bool {
    let code = |s: &crate::elf::Symbol| s.kind == c::STT_FUNC && !s.undefined() && s.size > 16;
    !image.symbols.iter().any(code)
}

fn imports(image: &Image, name: &str) -> bool {
    image
        .symbols
        .iter()
        .any(|s| s.undefined() && s.name == name)
}

/// Libraries of which the worker's function gets copies elsewhere, its own
/// excepted.
///
/// # Errors
/// The worker's list does not hold what a library says that it needs.
pub fn private_libraries(worker: &Worker) -> Result<Vec<&Module>, Refused> {
    let closure = closure(worker)?;
    let rest = closure.private.iter().skip(1);
    Ok(rest.map(|index| &worker.modules[*index]).collect())
}
