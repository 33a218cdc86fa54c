//! What the callee's imports mean.
//!
//! The order of look-up is the one that the callee had in its own worker: the
//! executable and what it started with, then the callee itself. Each of those
//! modules must be in the caller's worker too, as the same build; nothing that
//! the caller's library brought along is ever looked at.

use std::sync::Arc;

use crate::elf::Image;
use crate::elf::constants as c;
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
    (
        &[
            "_Unwind_RaiseException",
            "_Unwind_Resume",
            "_Unwind_ForcedUnwind",
            "_Unwind_Backtrace",
        ],
        "unwinds through frames that the unwinder does not know",
    ),
];

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
    /// The function needs a library that its worker did not start with.
    pub fn new(caller: &Worker, callee: &Worker) -> Result<Scope, Refused> {
        let function = callee.function();
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

    /// What dynamic symbol `index` of the callee means. `plt` says that the
    /// reference comes from the PLT, where an executable's own stubs do not
    /// count as definitions.
    ///
    /// # Errors
    /// It is not found, or means something that differs between the workers.
    pub fn meaning(&self, index: u32, plt: bool) -> Result<Meaning, Refused> {
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
        for (names, reason) in UNSUPPORTED {
            if symbol.undefined() && names.contains(&symbol.name.as_str()) {
                return Err(Refused::UnsupportedImport {
                    library: self.library.clone(),
                    symbol: symbol.name.clone(),
                    reason: (*reason).into(),
                });
            }
        }
        let own = || {
            if symbol.kind == c::STT_GNU_IFUNC {
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
        for provider in &self.providers {
            let Some(found) = find(
                &provider.image,
                &symbol.name,
                symbol.version.as_deref(),
                plt,
            ) else {
                continue;
            };
            let (value, ifunc, absolute) = (
                found.value,
                found.kind == c::STT_GNU_IFUNC,
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
            let Some(found) = find(&provider.image, name, None, true) else {
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

/// The definition that a reference finds in one module (glibc's `do_lookup_x`
/// and `check_match`): by version where the reference names one, else an
/// unversioned or default definition.
fn find<'a>(
    image: &'a Image,
    name: &str,
    version: Option<&str>,
    plt: bool,
) -> Option<&'a crate::elf::Symbol> {
    let candidates = image
        .exports
        .get(name)?
        .iter()
        .map(|index| &image.symbols[*index]);
    let usable = candidates.filter(|s| {
        let defined = !s.undefined() || (!plt && s.value != 0 && image.file_type == c::ET_EXEC);
        defined
            && s.binding != c::STB_LOCAL
            && !matches!(s.visibility, c::STV_HIDDEN | c::STV_INTERNAL)
            && (s.value != 0 || s.section == c::SHN_ABS || s.kind == c::STT_TLS)
    });
    let mut fallback = None;
    for symbol in usable {
        match (version, symbol.version.as_deref()) {
            (Some(wanted), Some(has)) if wanted == has => return Some(symbol),
            (Some(_), None) | (None, None) if !symbol.hidden => return Some(symbol),
            (None, Some(_)) if !symbol.hidden => fallback = Some(symbol),
            _ => {}
        }
    }
    fallback
}
