//! What a callee may touch that is the caller's once both share a process,
//! told from what its libraries import: what the process owns ([`effects`]),
//! and hidden variables of the C library ([`shared_cursor`]).
//!
//! ```text
//!  function library ──┐ imports ─► kinds ─► effects ─► explain, the answer
//!  private copies ────┘ strings ─► evidence ──┘  └─► guarded and not allowed?
//!                                                    a refusal
//! ```
//!
//! An import shows that a callee can do a thing, not that it does; what it
//! does through a pointer, a system call of its own or a library that it
//! shares with the caller does not show. A weak import that nothing in the
//! callee's worker defines can do nothing and does not count. What a private
//! copy of a dependency imports counts like the function's own, whether or not
//! the function can reach it: calls through pointers leave no trace that would
//! tell. Each import stands under the library that has it, so that the reader
//! can judge.
//!
//! Strings are evidence, never a reason: they are looked for only where an
//! import shows the kind already.

mod allowance;
mod kinds;
mod strings;

use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};

use crate::elf::Image;
use crate::elf::constants::STB_WEAK;
use crate::refused::Refused;
use crate::snapshot::{Module, Worker};

pub use allowance::{Allowance, Guarded, UnknownEffect};
pub use kinds::shared_cursor;
use kinds::{KINDS, shows};

/// Imports of one library that a refusal names before it counts the rest.
const MOST_NAMED: usize = 6;

/// One kind of effect and what gives it away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effect {
    /// `files`, `network`, `environment`, `processes`, `libraries`, `threads`, `signals`,
    /// `credentials`, `working-directory`, `exit`, `time-zone`, `host-name`,
    /// `locale`, `descriptors`, `process-settings`, `static-results`,
    /// `databases`, `system-calls`.
    pub kind: String,
    /// What is the caller's now.
    pub means: String,
    /// A patch needs this kind to be allowed ([`Guarded`]).
    pub guarded: bool,
    /// It is allowed, or need not be.
    pub allowed: bool,
    /// By library, the function's own first; never empty.
    pub seen: Vec<Seen>,
}

/// What one library shows of a kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The library, as the callee's container names it.
    pub library: String,
    /// Its imports of that kind, sorted; never empty.
    pub imports: Vec<String>,
    /// Constants of the library that may say what: paths, addresses, time
    /// zones. A few, none long.
    pub strings: Vec<String>,
    /// How many more there are.
    pub more_strings: usize,
}

/// A library of which the callee gets a copy.
#[derive(Debug, Clone, Copy)]
pub struct Library<'a> {
    /// Its path in the callee's container.
    pub path: &'a str,
    /// The file.
    pub image: &'a Image,
}

impl<'a> From<&'a Module> for Library<'a> {
    fn from(module: &'a Module) -> Library<'a> {
        Library {
            path: &module.path,
            image: &module.image,
        }
    }
}

/// The effects of these libraries, in a fixed order; empty if none shows.
/// `defined` says whether a weak import of this name means anything.
#[must_use]
pub fn effects(
    libraries: &[Library<'_>],
    defined: impl Fn(&str) -> bool,
    allowed: Allowance,
) -> Vec<Effect> {
    let imported: Vec<Vec<&str>> = libraries
        .iter()
        .map(|library| {
            let counts = |name: &&str| !is_weak(library.image, name) || defined(name);
            let mut names: Vec<&str> = imports(library.image).filter(counts).collect();
            names.sort_unstable();
            names.dedup();
            names
        })
        .collect();
    KINDS
        .iter()
        .filter_map(|(kind, means, names)| {
            let seen: Vec<Seen> = libraries
                .iter()
                .zip(&imported)
                .filter_map(|(library, imported)| {
                    let imports: Vec<String> = imported
                        .iter()
                        .filter(|import| shows(import, kind, names))
                        .map(|import| (*import).to_owned())
                        .collect();
                    if imports.is_empty() {
                        return None;
                    }
                    let found = strings::evidence(library.image, kind);
                    Some(Seen {
                        library: library.path.to_owned(),
                        imports,
                        strings: found.strings,
                        more_strings: found.more,
                    })
                })
                .collect();
            let guarded = Guarded::named(kind);
            (!seen.is_empty()).then(|| Effect {
                kind: (*kind).into(),
                means: (*means).into(),
                guarded: guarded.is_some(),
                allowed: guarded.is_none_or(|kind| allowed.has(kind)),
                seen,
            })
        })
        .collect()
}

/// The effects of a function: its library's and those of the dependencies of
/// which it gets copies.
#[must_use]
pub fn of_function(worker: &Worker, private: &[&Module], allowed: Allowance) -> Vec<Effect> {
    let mut libraries = vec![Library::from(worker.function())];
    libraries.extend(private.iter().map(|module| Library::from(*module)));
    let defined = |name: &str| {
        worker.modules.iter().any(|module| {
            let found = module.image.exports.get(name).into_iter().flatten();
            found
                .filter_map(|index| module.image.symbols.get(*index))
                .any(|symbol| !symbol.undefined())
        })
    };
    effects(&libraries, defined, allowed)
}

/// The refusal, if an effect needs to be allowed and is not.
#[must_use]
pub fn refusal(library: &str, effects: &[Effect]) -> Option<Refused> {
    let seen: Vec<Effect> = effects.iter().filter(|e| !e.allowed).cloned().collect();
    if seen.is_empty() {
        return None;
    }
    Some(Refused::Effects {
        library: library.to_owned(),
        seen: EffectsSeen(seen),
        flag: needed(effects),
    })
}

/// The effects of `callee` for people, a line each and one that says what a
/// patch needs; ends with a newline.
#[must_use]
pub fn report(callee: &str, effects: &[Effect]) -> String {
    if effects.is_empty() {
        return format!("no import of {callee} shows an effect on what the caller owns\n");
    }
    let mut text = format!("fused, {callee} shares with the caller:\n");
    for effect in effects {
        let note = match (effect.guarded, effect.allowed) {
            (true, true) => " [allowed]",
            (true, false) => " [not allowed]",
            (false, _) => "",
        };
        text.push_str(&format!("  {}{note}: {}\n", effect.kind, effect.means));
        for seen in &effect.seen {
            text.push_str(&format!(
                "    {}: {}\n",
                seen.library,
                seen.imports.join(", ")
            ));
            if !seen.strings.is_empty() {
                let quoted: Vec<String> = seen.strings.iter().map(|s| format!("{s:?}")).collect();
                let more = match seen.more_strings {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                text.push_str(&format!(
                    "      its constants: {}{more}\n",
                    quoted.join(", ")
                ));
            }
        }
    }
    if effects.iter().any(|effect| !effect.allowed) {
        text.push_str(&format!(
            "to be fused it needs --allow-effects {}, or the agent's configuration to say so for this edge\n",
            needed(effects)
        ));
    }
    text
}

/// The kinds that a patch needs to be allowed, as `--allow-effects` takes
/// them; empty for none.
#[must_use]
pub fn needed(effects: &[Effect]) -> String {
    let guarded = effects.iter().filter(|e| e.guarded);
    let kinds: Vec<&str> = guarded.map(|e| e.kind.as_str()).collect();
    kinds.join(",")
}

/// Effects in a sentence: kinds, libraries and their imports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EffectsSeen(pub Vec<Effect>);

impl fmt::Display for EffectsSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, effect) in self.0.iter().enumerate() {
            let libraries: Vec<String> = effect.seen.iter().map(named).collect();
            let gap = if index == 0 { "" } else { "; " };
            write!(f, "{gap}{} ({})", effect.kind, libraries.join(", "))?;
        }
        Ok(())
    }
}

/// `libbar.so: fopen, open and 3 more`.
fn named(seen: &Seen) -> String {
    let file = seen.library.rsplit('/').next().unwrap_or_default();
    let first: Vec<&str> = seen
        .imports
        .iter()
        .take(MOST_NAMED)
        .map(String::as_str)
        .collect();
    let mut text = format!("{file}: {}", first.join(", "));
    let more = seen.imports.len() - first.len();
    if more > 0 {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {more} more");
    }
    text
}

fn imports(image: &Image) -> impl Iterator<Item = &str> {
    image
        .symbols
        .iter()
        .filter(|s| s.undefined())
        .map(|s| s.name.as_str())
}

/// Whether all references to this name are weak.
fn is_weak(image: &Image, name: &str) -> bool {
    image
        .symbols
        .iter()
        .filter(|s| s.undefined() && s.name == name)
        .all(|s| s.binding == STB_WEAK)
}
