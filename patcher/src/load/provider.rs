//! The libraries of the callee's worker that the caller's worker has as well.
//!
//! ```text
//!  the same build      a definition lies where it lies in the file
//!  another build of    it is looked up anew, by name and version: that is what
//!  a versioned one     versions are for, and how ld.so would decide
//!  another build       nothing says that the two are alike: a refusal
//! ```

use std::sync::Arc;

use super::find::{Wanted, find};
use crate::elf::constants as c;
use crate::elf::{Image, Symbol};
use crate::refused::Refused;
use crate::snapshot::{Module, Worker};

/// Libraries whose every symbol has a version, and keeps what it means under
/// it from release to release: glibc's and gcc's.
const VERSIONED: &[&str] = &[
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libutil.so.1",
    "libanl.so.1",
    "libresolv.so.2",
    "libgcc_s.so.1",
    "libstdc++.so.6",
];
/// Versions that promise nothing from one build to the next.
const PRIVATE: &[&str] = &["GLIBC_PRIVATE", "GCC_PRIVATE"];

/// A library as the caller's worker has it.
#[derive(Debug, Clone)]
pub(super) struct Theirs {
    /// Its path there.
    pub(super) path: String,
    pub(super) bias: u64,
    pub(super) tls_offset: Option<u64>,
    pub(super) tls_module: Option<u64>,
    /// The file, where it is not the callee's.
    other: Option<Arc<Image>>,
}

/// Where a provider's definitions live in the caller's process.
pub(super) enum Place {
    /// The worker's own.
    Shared(Theirs),
    /// Not there, or not as the same build: why, and the build-id wanted.
    Differs { caller: String, callee: String },
    /// The copy of this number.
    Private(usize),
}

pub(super) struct Provider {
    pub(super) name: String,
    pub(super) image: Arc<Image>,
    pub(super) place: Place,
}

impl Provider {
    /// The refusal of what is found here, if the caller's worker has it not.
    pub(super) fn differs(&self) -> Option<Refused> {
        match &self.place {
            Place::Differs { caller, callee } => Some(Refused::DifferentLibrary {
                library: self.name.clone(),
                caller: caller.clone(),
                callee: callee.clone(),
            }),
            _ => None,
        }
    }

    /// What a symbol that was found here is in the caller's process, where it
    /// is shared. `importer` is the library that refers to it.
    ///
    /// # Errors
    /// The caller's build is too old to have it, or the symbol is of the kind
    /// that no two builds need share.
    pub(super) fn theirs<'a>(
        &'a self,
        theirs: &'a Theirs,
        found: &'a Symbol,
        importer: &str,
    ) -> Result<&'a Symbol, Refused> {
        let Some(image) = &theirs.other else {
            return Ok(found);
        };
        let version = found.version.as_deref();
        let same = match version {
            Some(version) if !PRIVATE.contains(&version) => {
                find(image, &found.name, Wanted::Version(version), false)
            }
            _ => None,
        };
        same.ok_or_else(|| Refused::TooOld {
            library: importer.to_owned(),
            symbol: match version {
                Some(version) => format!("{}@{version}", found.name),
                None => found.name.clone(),
            },
            provider: theirs.path.clone(),
        })
    }

    /// Whether a definition of an executable only stands for one of a library:
    /// a variable that it has copied, or its own stub for a function.
    pub(super) fn stands_in(&self, found: &Symbol) -> bool {
        let copied = |r: &crate::elf::RelocationEntry| {
            r.kind == c::R_X86_64_COPY
                && (self.image.symbols.get(r.symbol as usize)).is_some_and(|s| s.name == found.name)
        };
        found.undefined() || self.image.dynamic.relocations.iter().any(copied)
    }
}

/// The module of `modules` that is called as `like` is.
pub(super) fn named<'a>(modules: &'a [Module], like: &Module) -> Option<&'a Module> {
    modules.iter().find(|m| m.short_name() == like.short_name())
}

/// A module of the callee's worker, with what the caller's has in its place.
pub(super) fn provider(module: &Module, candidate: Option<&Module>) -> Provider {
    let id = |m: &Module| match &m.image.build_id {
        Some(_) => m.image.build_id_hex(),
        None => "without a build-id".to_owned(),
    };
    let same = |m: &Module| {
        *m.image.bytes == *module.image.bytes
            || m.image.build_id.is_some() && m.image.build_id == module.image.build_id
    };
    let place = match candidate {
        Some(m) if same(m) || VERSIONED.contains(&module.short_name()) => Place::Shared(Theirs {
            path: m.path.clone(),
            bias: m.bias,
            tls_offset: m.tls_offset,
            tls_module: m.tls_module,
            other: (!same(m)).then(|| Arc::clone(&m.image)),
        }),
        m => Place::Differs {
            caller: m.map_or("not loaded".into(), id),
            callee: id(module),
        },
    };
    Provider {
        name: module.path.clone(),
        image: Arc::clone(&module.image),
        place,
    }
}

/// Checks that both workers run on the same kind of C library. With another
/// one types and calls mean something else: nothing of it can be shared.
///
/// # Errors
/// They do not.
pub fn same_c_library(caller: &Worker, callee: &Worker) -> Result<(), Refused> {
    let of = |worker: &Worker| {
        let started_with = &worker.modules[..worker.library];
        // musl's is the dynamic linker itself.
        let names = started_with.iter().filter_map(|m| match m.short_name() {
            "libc.so.6" => Some("libc.so.6"),
            _ => m.path.rsplit('/').next().filter(|n| n.contains("musl")),
        });
        names
            .into_iter()
            .next()
            .unwrap_or("none that is known")
            .to_owned()
    };
    let (theirs, wanted) = (of(caller), of(callee));
    if theirs == wanted {
        return Ok(());
    }
    Err(Refused::OtherLibc {
        library: callee.function().path.clone(),
        callee: wanted,
        caller: theirs,
    })
}
