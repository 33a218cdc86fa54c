//! What the callee's imports mean.
//!
//! The order of look-up is the one that the callee had in its own worker: the
//! executable and what it started with, then the callee itself. Each of those
//! modules must be in the caller's worker too, as the same build; nothing that
//! the caller's library brought along is ever looked at.

use std::sync::Arc;

use crate::effects::shared_cursor;
use crate::elf::constants as c;
use crate::elf::{Image, Symbol};
use crate::load::Meaning;
use crate::refused::Refused;
use crate::snapshot::{Module, Worker};

/// Functions and variables that an image gets from us instead of from the C
/// library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interposed {
    /// `getenv` and `secure_getenv`: the callee's own environment.
    Getenv,
    /// `environ` and its aliases: a variable of the image's own.
    Environ,
}

/// Imports that would take the process for the callee's own, and why that
/// cannot be had.
const UNSUPPORTED: &[(&[&str], &str)] = &[
    (
        &["dlopen", "dlmopen", "dlsym", "dlvsym", "dlclose", "dlinfo"],
        "asks the dynamic linker, which does not know the image",
    ),
    (
        &["dladdr", "dladdr1", "dl_iterate_phdr", "_dl_find_object"],
        "asks the dynamic linker, which does not know the image",
    ),
    (
        &["setenv", "putenv", "unsetenv", "clearenv"],
        "would change the caller's environment instead of the callee's",
    ),
    (
        &["__tls_get_addr", "__tls_get_addr_slow"],
        "needs thread-local storage of the image's own",
    ),
];

/// Imports of code that throws, catches or has something to clean up when an
/// exception passes.
const EXCEPTIONS: &[&str] = &[
    "__gxx_personality_v0",
    "__gcc_personality_v0",
    "__gnat_personality_v0",
    "__gdc_personality_v0",
    "__gccgo_personality_v0",
    "__objc_personality_v0",
    "__cxa_allocate_exception",
    "__cxa_throw",
    "__cxa_rethrow",
    "__cxa_begin_catch",
    "__cxa_bad_cast",
    "__cxa_bad_typeid",
    "__cxa_throw_bad_array_new_length",
    "__cxa_throw_bad_array_length",
];

/// Whether an import has to do with exceptions. The image's unwind tables are
/// not registered in the worker, so one that reaches its frames ends the
/// process, also where the callee has a handler for it.
fn exceptional(name: &str) -> bool {
    EXCEPTIONS.contains(&name)
        || name.starts_with("_Unwind_")
        || name.starts_with("_ZSt17rethrow_exception")
        // std::__throw_length_error(char const*) and the like.
        || name.starts_with("_ZSt") && name.contains("__throw_")
}

struct Provider {
    name: String,
    image: Arc<Image>,
    /// Bias in the caller's worker; the reason and the two build-ids where it
    /// is not there as the same build.
    home: Result<u64, (String, String)>,
}

/// The callee's scope, mapped to the caller's worker.
pub struct Scope {
    library: String,
    providers: Vec<Provider>,
    own: Arc<Image>,
}

impl Scope {
    /// Builds the scope of `callee`'s function in `caller`'s worker.
    ///
    /// # Errors
    /// The function imports what cannot be had, or what must not be shared with
    /// the caller, or needs a library that its worker did not start with.
    pub fn new(caller: &Worker, callee: &Worker) -> Result<Scope, Refused> {
        let function = callee.function();
        imports(&function.path, &function.image)?;
        for module in &caller.modules[caller.library..] {
            if let Some(symbol) = shared_cursor(&module.image, &function.image) {
                return Err(Refused::SharedState {
                    caller: module.path.clone(),
                    library: function.path.clone(),
                    symbol: symbol.to_owned(),
                });
            }
        }
        let startup = &callee.modules[..callee.library];
        for needed in &function.image.dynamic.needed {
            if !startup
                .iter()
                .any(|m| m.short_name() == needed || m.path.ends_with(&format!("/{needed}")))
            {
                return Err(Refused::Dependency {
                    library: function.path.clone(),
                    needed: needed.clone(),
                });
            }
        }
        let providers = startup
            .iter()
            .enumerate()
            .map(|(index, module)| Provider {
                name: module.path.clone(),
                image: Arc::clone(&module.image),
                home: home(caller, module, index == 0),
            })
            .collect();
        Ok(Scope {
            library: function.path.clone(),
            providers,
            own: Arc::clone(&function.image),
        })
    }

    /// What dynamic symbol `index` of the callee means. `jump_slot` says
    /// that the reference is a call through the PLT, for which an executable's
    /// own stubs do not count as definitions.
    ///
    /// # Errors
    /// It is not found, or means something that differs between the workers.
    pub fn meaning(&self, index: u32, jump_slot: bool) -> Result<Meaning, Refused> {
        let Some(symbol) = self.own.symbols.get(index as usize) else {
            return Err(Refused::BrokenImage {
                library: self.library.clone(),
                reason: format!(
                    "a relocation names symbol {index} of {}",
                    self.own.symbols.len()
                ),
            });
        };
        if symbol.kind == c::STT_TLS {
            return Err(Refused::Tls {
                library: self.library.clone(),
            });
        }
        let own = || {
            if symbol.section == c::SHN_ABS {
                Meaning::At(symbol.value)
            } else if symbol.kind == c::STT_GNU_IFUNC {
                Meaning::OwnResolver(symbol.value)
            } else {
                Meaning::Own(symbol.value)
            }
        };
        let bound_to_itself = symbol.binding == c::STB_LOCAL
            || self.own.dynamic.symbolic
            || matches!(
                symbol.visibility,
                c::STV_HIDDEN | c::STV_INTERNAL | c::STV_PROTECTED
            );
        if !symbol.undefined() && bound_to_itself {
            return Ok(own());
        }
        let wanted = symbol
            .version
            .as_deref()
            .map_or(Wanted::Oldest, Wanted::Version);
        for provider in &self.providers {
            let Some(found) = find(&provider.image, &symbol.name, wanted, jump_slot) else {
                continue;
            };
            let (value, ifunc, absolute) = (
                found.value,
                found.kind == c::STT_GNU_IFUNC && !found.undefined(),
                found.section == c::SHN_ABS,
            );
            if found.kind == c::STT_TLS {
                return Err(Refused::UnsupportedImport {
                    library: self.library.clone(),
                    symbol: symbol.name.clone(),
                    reason: format!("is thread-local in {}", provider.name),
                });
            }
            let bias =
                provider
                    .home
                    .as_ref()
                    .map_err(|(caller, callee)| Refused::DifferentLibrary {
                        library: provider.name.clone(),
                        caller: caller.clone(),
                        callee: callee.clone(),
                    })?;
            return Ok(match (absolute, ifunc) {
                (true, _) => Meaning::At(value),
                (false, true) => Meaning::Resolver(value.wrapping_add(*bias)),
                (false, false) => Meaning::At(value.wrapping_add(*bias)),
            });
        }
        if !symbol.undefined() {
            return Ok(own());
        }
        if symbol.binding == c::STB_WEAK {
            return Ok(Meaning::At(0));
        }
        let version = symbol
            .version
            .as_ref()
            .map_or(String::new(), |v| format!("@{v}"));
        Err(Refused::UnresolvedSymbol {
            library: self.library.clone(),
            symbol: format!("{}{version}", symbol.name),
        })
    }

    /// Whether dynamic symbol `index` is one that we give the image.
    #[must_use]
    pub fn interposed(&self, index: u32) -> Option<Interposed> {
        let symbol = self
            .own
            .symbols
            .get(index as usize)
            .filter(|s| s.undefined())?;
        match symbol.name.as_str() {
            "getenv" | "secure_getenv" => Some(Interposed::Getenv),
            "environ" | "__environ" | "_environ" => Some(Interposed::Environ),
            _ => None,
        }
    }

    /// What a function of the C library means to the bridge.
    ///
    /// # Errors
    /// It is not found, or the workers' C libraries differ.
    pub fn library_function(&self, name: &str) -> Result<Meaning, Refused> {
        for provider in &self.providers {
            let Some(found) = find(&provider.image, name, Wanted::Default, true) else {
                continue;
            };
            let bias =
                provider
                    .home
                    .as_ref()
                    .map_err(|(caller, callee)| Refused::DifferentLibrary {
                        library: provider.name.clone(),
                        caller: caller.clone(),
                        callee: callee.clone(),
                    })?;
            let at = found.value.wrapping_add(*bias);
            return Ok(if found.kind == c::STT_GNU_IFUNC {
                Meaning::Resolver(at)
            } else {
                Meaning::At(at)
            });
        }
        Err(Refused::UnresolvedSymbol {
            library: "the bridge".into(),
            symbol: name.into(),
        })
    }
}

/// Checks what can be told from the imports' names alone, weak ones and those
/// that no relocation uses among them.
fn imports(library: &str, image: &Image) -> Result<(), Refused> {
    for symbol in image.symbols.iter().filter(|s| s.undefined()) {
        let name = symbol.name.as_str();
        if exceptional(name) {
            return Err(Refused::Exceptions {
                library: library.to_owned(),
                symbol: name.to_owned(),
            });
        }
        for (names, reason) in UNSUPPORTED {
            if names.contains(&name) {
                return Err(Refused::UnsupportedImport {
                    library: library.to_owned(),
                    symbol: name.to_owned(),
                    reason: (*reason).into(),
                });
            }
        }
    }
    Ok(())
}

/// The caller's copy of a module of the callee's worker.
fn home(caller: &Worker, module: &Module, executable: bool) -> Result<u64, (String, String)> {
    let id = |m: &Module| match &m.image.build_id {
        Some(_) => m.image.build_id_hex(),
        None => "without a build-id".to_owned(),
    };
    // What the caller's library brought along comes behind it.
    let started_with = &caller.modules[..caller.library];
    let candidate = if executable {
        caller.modules.first()
    } else {
        started_with
            .iter()
            .find(|m| m.short_name() == module.short_name())
    };
    match candidate {
        None => Err(("not loaded".into(), id(module))),
        Some(m) if *m.image.bytes == *module.image.bytes => Ok(m.bias),
        Some(m) if m.image.build_id.is_some() && m.image.build_id == module.image.build_id => {
            Ok(m.bias)
        }
        Some(m) => Err((id(m), id(module))),
    }
}

/// What a reference asks for besides the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted<'a> {
    /// This version, or a definition without any.
    Version(&'a str),
    /// No version, as a relocation of a library that knows of none asks: the
    /// oldest, for which such a library was linked.
    Oldest,
    /// No version, as `dlsym` asks: the default.
    Default,
}

/// The definition that a reference finds in one module, as glibc's
/// `do_lookup_x` and `check_match` have it (`elf/dl-lookup.c`): where the
/// reference names no version, the definition without one or with the file's
/// first, hidden or not; else the default, if there is but one.
/// `jump_slot` says that an executable's own stubs do not count.
pub(super) fn find<'a>(
    image: &'a Image,
    name: &str,
    wanted: Wanted<'_>,
    jump_slot: bool,
) -> Option<&'a Symbol> {
    let mut chosen = None;
    let mut defaults = Vec::new();
    for index in image.exports.get(name)? {
        let symbol = &image.symbols[*index];
        let has_value =
            symbol.value != 0 || symbol.section == c::SHN_ABS || symbol.kind == c::STT_TLS;
        let defines = matches!(
            symbol.kind,
            c::STT_NOTYPE
                | c::STT_OBJECT
                | c::STT_FUNC
                | c::STT_COMMON
                | c::STT_TLS
                | c::STT_GNU_IFUNC
        );
        if !has_value || !defines || jump_slot && symbol.undefined() {
            continue;
        }
        // Indices 0 and 1 are no version, 2 is the first that the file defines.
        let plain = match wanted {
            Wanted::Version(wanted) => match &symbol.version {
                Some(has) => wanted == has,
                None => !symbol.hidden,
            },
            Wanted::Oldest => symbol.version_index <= 2,
            Wanted::Default => symbol.version_index <= 1,
        };
        if plain {
            chosen = Some(symbol);
            break;
        }
        if !matches!(wanted, Wanted::Version(_)) && !symbol.hidden {
            defaults.push(symbol);
        }
    }
    let found = match (chosen, defaults.as_slice()) {
        (Some(symbol), _) | (None, &[symbol]) => symbol,
        _ => return None,
    };
    let local = matches!(found.visibility, c::STV_HIDDEN | c::STV_INTERNAL);
    let global = matches!(
        found.binding,
        c::STB_GLOBAL | c::STB_WEAK | c::STB_GNU_UNIQUE
    );
    (global && !local).then_some(found)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// Compiles a library whose symbols have the versions that `script` says.
    fn library(source: &str, script: &str) -> Image {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (source, script) = (put("a.c", source), put("a.map", script));
        let out = dir.path().join("a.so");
        let done = Command::new("gcc")
            .args(["-shared", "-fPIC", "-nostdlib", "-o"])
            .arg(&out)
            .arg(source)
            .arg(format!("-Wl,--version-script={}", script.display()))
            .status()
            .unwrap();
        assert!(done.success());
        parse(&out)
    }

    fn parse(path: &Path) -> Image {
        Image::parse(std::fs::read(path).unwrap().into()).unwrap()
    }

    const SCRIPT: &str = "V1 { }; V2 { } V1; V3 { } V2;";

    fn version(image: &Image, name: &str, wanted: Wanted<'_>) -> Option<(u16, bool)> {
        find(image, name, wanted, false).map(|s| (s.version_index, s.hidden))
    }

    #[test]
    fn a_reference_without_a_version_finds_the_first_one_even_hidden() {
        let image = library(
            "__asm__(\".symver f1, f@V1\\n.symver f2, f@V2\\n.symver f3, f@@V3\");\
             int f1(void) { return 1; } int f2(void) { return 2; } int f3(void) { return 3; }",
            SCRIPT,
        );
        // 1 is the file's own name.
        assert_eq!(version(&image, "f", Wanted::Oldest), Some((2, true)));
        assert_eq!(version(&image, "f", Wanted::Default), Some((4, false)));
        assert_eq!(version(&image, "f", Wanted::Version("V2")), Some((3, true)));
        assert_eq!(version(&image, "f", Wanted::Version("V9")), None);
    }

    #[test]
    fn a_reference_without_a_version_finds_a_later_default_but_not_a_hidden_one() {
        let image = library(
            "__asm__(\".symver g2, g@V2\\n.symver g3, g@@V3\\n.symver h2, h@V2\");\
             int g2(void) { return 2; } int g3(void) { return 3; } int h2(void) { return 2; }",
            SCRIPT,
        );
        assert_eq!(version(&image, "g", Wanted::Oldest), Some((4, false)));
        assert_eq!(version(&image, "h", Wanted::Oldest), None);
        assert_eq!(version(&image, "h", Wanted::Default), None);
    }

    #[test]
    fn a_file_without_versions_answers_every_reference() {
        let image = library("int f(void) { return 1; }", "{ };");
        for wanted in [
            Wanted::Oldest,
            Wanted::Default,
            Wanted::Version("GLIBC_2.2.5"),
        ] {
            assert!(find(&image, "f", wanted, true).is_some(), "{wanted:?}");
        }
    }
}
