//! The caller's code: where it makes RPCs, and how each is led elsewhere.
//!
//! Pure: bytes in, values out.
//!
//! ```text
//!  library ─► image ─► extents ─► labels ─► flow ─► sites ─► window ─► stub
//!  (ELF)      segments, functions  all ways  values  RPCs     bytes     code
//!             relocations          into code                  replaced  at the other end
//! ```
//!
//! - [`analyse`] finds every indirect call and jump whose second argument is
//!   the constant name of a function, and which has an RPC's six arguments.
//! - A [`Window`] ends where the call ended, so that return addresses stay
//!   what they were: whole instructions before the call are displaced until a
//!   near call fits. They run in the [`Stub`].
//! - Nothing may enter a window but at its start: [`NoWindow`] says what does.
//!
//! What is found here is checked again when it runs (by the bridge: target
//! and name). It is left to others to place stubs, to read the live bytes and
//! compare them with [`Window::before`], and to look where threads are.

mod extents;
mod flow;
#[cfg(fuzzing)]
mod fuzzing;
mod image;
mod labels;
mod lsda;
mod routine;
mod seen;
mod sites;
mod stub;
mod window;

#[cfg(test)]
pub(crate) mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use routine::Executable;
pub use seen::{Live, NotASite, Seen, SeenSite};
pub use stub::{Line, OutOfReach, Stub, StubError, Tail};
use window::Hops;
pub use window::{Hop, NoWindow, Obstacle, Target, Window, WindowKind};

/// A virtual address in the image, as the library's file has it. The live
/// address is this plus the load bias.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ImageAddress(pub u64);

impl fmt::Display for ImageAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Why a library can't be analysed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "code", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum CodeError {
    /// Not a little-endian 64-bit ELF file.
    #[error("not a 64-bit little-endian ELF file")]
    NotElf,
    /// For another processor.
    #[error("not for x86-64")]
    NotX86_64,
    /// Not a shared object with a dynamic section.
    #[error("not a shared object")]
    NotSharedObject,
    /// Nothing in it is executable.
    #[error("the library has no code")]
    NoCode,
    /// A part of the file contradicts the rest of it.
    #[error("malformed {what}")]
    Malformed {
        /// The part.
        what: &'static str,
    },
    /// A part of the file is larger than is read.
    #[error("{what}: {size} is more than the {limit} that are read")]
    TooLarge {
        /// The part.
        what: &'static str,
        /// Its size, in what the part consists of.
        size: u64,
        /// The largest that is read.
        limit: u64,
    },
}

/// How a site gets to its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SiteKind {
    /// An indirect call through memory or a register.
    Call,
    /// An indirect jump out of the function: `return invoke_func(…)`.
    TailJump,
    /// A direct call of a retpoline thunk.
    ThunkCall,
    /// A direct jump to a retpoline thunk.
    ThunkJump,
}

/// A constant that a site passes as the callee's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// Where it lies, in memory that is never written.
    pub at: ImageAddress,
    /// The name, without terminator.
    pub text: String,
}

/// An instruction that makes an RPC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// The call or jump itself.
    pub at: ImageAddress,
    /// Start of the function that it belongs to.
    pub function: ImageAddress,
    /// How it gets to its target.
    pub kind: SiteKind,
    /// All the constant names that were seen, by address; at least one.
    pub names: Vec<Name>,
    /// Whether no other name can pass here.
    pub exhaustive: bool,
    /// The bytes to replace, or why none can be.
    pub window: Result<Window, NoWindow>,
}

/// An analysed library.
pub struct CodeMap {
    image: image::Image,
    extents: Vec<extents::Extent>,
    labels: labels::Labels,
    sites: Vec<Site>,
    unknown_names: bool,
}

/// Analyses a caller's library, an ELF64 shared object for x86-64.
///
/// # Errors
/// [`CodeError`] if the file is none, or not well-formed where it is read.
pub fn analyse(file: &[u8]) -> Result<CodeMap, CodeError> {
    let image = image::Image::parse(file)?;
    let extents = extents::extents(&image)?;
    let (extents, labels) = labels::collect(&image, extents)?;
    let mut map = CodeMap {
        image,
        extents,
        labels,
        sites: Vec::new(),
        unknown_names: false,
    };
    (map.sites, map.unknown_names) = map.find_sites();
    Ok(map)
}

impl CodeMap {
    fn find_sites(&self) -> (Vec<Site>, bool) {
        let code = flow::Code::new(&self.image, &self.extents, &self.labels);
        let mut taken: Vec<(u64, u64)> = self
            .entry_window("faas_func_call")
            .ok()
            .map(|w| w.range())
            .into_iter()
            .collect();
        let mut sites = Vec::new();
        let (all, unknown) = sites::find(&code);
        for mut found in all {
            found.names.sort_by_key(|n| n.at);
            let window = window::of_site(&code, found.at, found.kind, Hops::No, &taken);
            taken.extend(window.iter().flat_map(Window::ranges));
            sites.push(Site {
                at: ImageAddress(found.at),
                function: ImageAddress(found.function),
                kind: found.kind,
                names: found.names,
                exhaustive: found.exhaustive,
                window,
            });
        }
        // Filler that nobody has for a window of its own.
        for site in &mut sites {
            if site.window.is_err() {
                let hop = window::of_site(&code, site.at.0, site.kind, Hops::Allowed, &taken);
                taken.extend(hop.iter().flat_map(Window::ranges));
                site.window = hop;
            }
        }
        let open = unknown || sites.iter().any(|s| !s.exhaustive);
        (sites, open)
    }

    /// Whether the library may pass names to the RPC that are not among the
    /// constants of its sites: because one is not known where it is called, or
    /// because no RPC was found at all (another library may make them for it).
    #[must_use]
    pub fn may_pass_other_names(&self) -> bool {
        self.unknown_names || self.sites.is_empty()
    }

    /// The sites one of whose names equals `name`, case included, by address.
    #[must_use]
    pub fn sites(&self, name: &str) -> Vec<Site> {
        let passes = |site: &&Site| site.names.iter().any(|n| n.text == name);
        self.sites.iter().filter(passes).cloned().collect()
    }

    /// All sites with a constant name, by address.
    #[must_use]
    pub fn all_sites(&self) -> Vec<Site> {
        self.sites.clone()
    }

    /// Every call through a pointer and every jump through one that leaves its
    /// function, by address, with the window that it would have if it were the
    /// only site: for surveys.
    #[must_use]
    pub fn survey(&self) -> Vec<(ImageAddress, SiteKind, Result<Window, NoWindow>)> {
        let code = flow::Code::new(&self.image, &self.extents, &self.labels);
        sites::indirect(&code)
            .into_iter()
            .map(|(at, kind)| {
                let window = window::of_site(&code, at, kind, Hops::Allowed, &[]);
                (ImageAddress(at), kind, window)
            })
            .collect()
    }

    /// The window at the entry of an exported function, such as
    /// `faas_func_call`.
    ///
    /// # Errors
    /// [`NoWindow`] if there is no such function, or no room at its start.
    pub fn entry_window(&self, function: &str) -> Result<Window, NoWindow> {
        let code = flow::Code::new(&self.image, &self.extents, &self.labels);
        window::of_entry(&code, function)
    }
}
