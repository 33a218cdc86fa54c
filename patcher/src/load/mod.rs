//! Loading a callee's image into a worker, from outside: pure, a function of
//! two snapshots and a base address.
//!
//! ```text
//!  symbols ─► scope: what each import means, in the order that the callee had
//!             in its own worker, bound to the caller's copy of each library
//!  image + base + scope ─► Loaded: bytes per segment, with every relocation
//!             applied whose value can be known from outside; the rest (IFUNC)
//!             as a list for the bridge
//! ```
//!
//! What it leaves to others: where the base is (`plan`), writing (`apply`).

mod relocate;
mod scope;

use serde::{Deserialize, Serialize};

use crate::elf::{Image, Segment};
use crate::refused::Refused;

pub use relocate::{Given, Loaded, LoadedSegment, relocate};
pub use scope::{Interposed, Scope};

/// The worker_v1 functions that a callee must export.
pub const EXPORTS: [&str; 4] = [
    "faas_init",
    "faas_create_func_worker",
    "faas_destroy_func_worker",
    "faas_func_call",
];

/// A value that only the process knows: the result of `resolver`, plus
/// `addend`, goes to `slot`. Live addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ifunc {
    /// Where the result goes.
    pub slot: u64,
    /// The resolver.
    pub resolver: u64,
    /// Added to the result.
    pub addend: u64,
}

/// What an import means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// A live address (or an absolute value).
    At(u64),
    /// Whatever the resolver at this live address gives.
    Resolver(u64),
    /// An address in the image itself.
    Own(u64),
    /// A resolver in the image itself.
    OwnResolver(u64),
}

/// Checks what can be told from the file alone.
///
/// # Errors
/// The first thing that cannot be done right.
pub fn check(library: &str, image: &Image) -> Result<(), Refused> {
    let library = library.to_owned();
    if image.file_type != crate::elf::constants::ET_DYN {
        return Err(Refused::BrokenImage {
            library,
            reason: "not a shared object".into(),
        });
    }
    if image.has_tls || image.dynamic.static_tls {
        return Err(Refused::Tls { library });
    }
    if image.dynamic.text_relocations {
        return Err(Refused::TextRelocations { library });
    }
    if image.executable_stack {
        return Err(Refused::ExecutableStack { library });
    }
    if image
        .segments
        .iter()
        .any(|s: &Segment| s.writable() && s.executable())
    {
        return Err(Refused::BrokenImage {
            library,
            reason: "a segment is writable and executable".into(),
        });
    }
    for symbol in EXPORTS {
        let exported = image
            .exports
            .get(symbol)
            .is_some_and(|found| found.iter().any(|index| !image.symbols[*index].undefined()));
        if !exported {
            return Err(Refused::MissingExport {
                library,
                symbol: symbol.into(),
            });
        }
    }
    Ok(())
}

/// The image address of an exported function.
#[must_use]
pub fn export(image: &Image, name: &str) -> Option<u64> {
    image
        .exports
        .get(name)?
        .iter()
        .map(|i| &image.symbols[*i])
        .find(|s| !s.undefined())
        .map(|s| s.value)
}
