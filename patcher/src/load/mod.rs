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

mod closure;
mod find;
mod imports;
pub mod interpose;
mod provider;
mod relocate;
mod scope;
mod unique;

use serde::{Deserialize, Serialize};

use crate::elf::constants as c;
use crate::elf::{Image, Segment};
use crate::refused::Refused;

pub use closure::private_libraries;
use find::{Wanted, find};
pub use provider::same_c_library;
pub use relocate::{Given, GivenTls, Loaded, LoadedSegment, Place, TlsSlot, relocate};
pub use scope::{PrivateImage, Scope, Searched, exported_by, unwinder};

/// Largest alignment of an image: a huge page, as older linkers ask for.
const MOST_ALIGNED: u64 = 2 << 20;
/// Largest image that is loaded, in bytes of address space.
pub const MOST_BYTES: u64 = 256 << 20;
/// More initialisers than any image has.
const MOST_INITIALISERS: u64 = 1 << 16;

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
    /// An address in the image of this number.
    Private(usize, u64),
    /// A resolver in the image of this number.
    PrivateResolver(usize, u64),
}

/// Where a thread-local variable is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMeaning {
    /// In the block of the image of this number.
    Private {
        /// The image.
        image: usize,
        /// Offset in its block.
        offset: u64,
    },
    /// So far from the thread pointer (wrapping).
    Static(u64),
    /// Where ld.so's `__tls_get_addr` says.
    Linker {
        /// Its number of the library.
        module: u64,
        /// Offset in the library's block.
        offset: u64,
    },
    /// A weak reference to nothing.
    Nowhere,
}

/// Checks what can be told from the file alone.
///
/// # Errors
/// The first thing that cannot be done right.
pub fn check(library: &str, image: &Image) -> Result<(), Refused> {
    let library = library.to_owned();
    if image.file_type != c::ET_DYN {
        return Err(Refused::BrokenImage {
            library,
            reason: "not a shared object".into(),
        });
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
    if image.alignment() > MOST_ALIGNED {
        return Err(Refused::Alignment {
            library,
            bytes: image.alignment(),
        });
    }
    let span = image.high() - image.low();
    if span > MOST_BYTES {
        return Err(Refused::ImageTooLarge {
            library,
            bytes: span,
            most: MOST_BYTES,
        });
    }
    Ok(())
}

/// Checks that the functions of the worker_v1 ABI are there.
///
/// # Errors
/// The first that is not.
pub fn check_exports(library: &str, image: &Image) -> Result<(), Refused> {
    let library = library.to_owned();
    for name in EXPORTS {
        let symbol = name.to_owned();
        match exported(image, name) {
            Exported::At(_) => {}
            Exported::Not => return Err(Refused::MissingExport { library, symbol }),
            Exported::Unusable(reason) => {
                return Err(Refused::UnusableExport {
                    library,
                    symbol,
                    reason: reason.into(),
                });
            }
        }
    }
    Ok(())
}

/// The image address of an exported function; `None` too if it is one that
/// cannot be called there.
#[must_use]
pub fn export(image: &Image, name: &str) -> Option<u64> {
    match exported(image, name) {
        Exported::At(address) => Some(address),
        Exported::Not | Exported::Unusable(_) => None,
    }
}

enum Exported {
    At(u64),
    Not,
    Unusable(&'static str),
}

/// What `dlsym` finds, as the worker looked for it.
fn exported(image: &Image, name: &str) -> Exported {
    let Some(symbol) = find(image, name, Wanted::Default, true) else {
        let some = image.exports.get(name).into_iter().flatten();
        let mut defined = some.filter(|index| !image.symbols[**index].undefined());
        return match defined.next() {
            Some(_) => Exported::Unusable("is hidden from those who look for it"),
            None => Exported::Not,
        };
    };
    let code = image
        .segments
        .iter()
        .any(|s| s.executable() && (s.vaddr..s.vaddr + s.file_size).contains(&symbol.value));
    match symbol.kind {
        c::STT_GNU_IFUNC => Exported::Unusable("is chosen at run time (an indirect function)"),
        _ if symbol.section == c::SHN_ABS => Exported::Unusable("is an absolute value"),
        c::STT_FUNC | c::STT_NOTYPE if code => Exported::At(symbol.value),
        _ => Exported::Unusable("is not a function"),
    }
}
