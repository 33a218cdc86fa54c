//! What the callee's imports mean.
//!
//! The order of look-up is the one that the callee had in its own worker: the
//! executable and what it started with, then the callee itself and what it
//! depends on, breadth first. What the worker started with must be in the
//! caller's worker too, as the same build; of the rest the callee has copies
//! of its own. Nothing else that the caller's library brought along is ever
//! looked at.

use std::collections::HashSet;
use std::sync::Arc;

use super::closure::{self, Closure};
use super::find::{Wanted, find};
use super::imports;
use super::interpose::{self, Interposed};
use super::provider::{Place, Provider, named, provider};
use super::unique::Unique;
use crate::effects::shared_cursor;
use crate::elf::constants as c;
use crate::elf::{Image, Symbol};
use crate::load::{Meaning, TlsMeaning};
use crate::refused::Refused;
use crate::snapshot::{Module, Worker};

/// A library of which the callee gets a copy.
#[derive(Debug, Clone)]
pub struct PrivateImage {
    /// Its path in the callee's container.
    pub path: String,
    /// `DT_SONAME`, or the file's name.
    pub soname: String,
    /// The file.
    pub image: Arc<Image>,
    /// The callee loads it at run time.
    pub on_demand: bool,
    /// Providers in look-up order behind those that the worker started with.
    order: Vec<usize>,
}

/// One place in the order in which `dlsym` looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Searched {
    /// The copy of this number.
    Private(usize),
    /// A library of the caller's worker, by its path there.
    Shared(String),
}

/// The callee's scope, mapped to the caller's worker.
pub struct Scope {
    providers: Vec<Provider>,
    /// How many of `providers` the worker started with.
    startup: usize,
    images: Vec<PrivateImage>,
    initialisation: Vec<usize>,
    order: Vec<Searched>,
    unique: Unique,
    /// The caller's executable, and where it lies.
    executable: (Arc<Image>, u64),
}

impl Scope {
    /// Builds the scope of `callee`'s function in `caller`'s worker.
    ///
    /// # Errors
    /// The function or what it depends on imports what cannot be had, or what
    /// must not be shared with the caller, or needs a library of which there
    /// must be only one and which the caller's worker does not have.
    pub fn new(caller: &Worker, callee: &Worker) -> Result<Scope, Refused> {
        let closure = closure::closure(callee)?;
        let unwinder = unwinder(caller).is_some();
        for index in &closure.private {
            let module = &callee.modules[*index];
            imports::check(&module.path, &module.image, unwinder)?;
            for theirs in &caller.modules[caller.library..] {
                if let Some(symbol) = shared_cursor(&theirs.image, &module.image) {
                    return Err(Refused::SharedState {
                        caller: theirs.path.clone(),
                        library: module.path.clone(),
                        symbol: symbol.to_owned(),
                    });
                }
            }
        }
        Scope::build(caller, callee, closure)
    }

    /// Builds it whatever the imports are: for a comparison with what the
    /// dynamic linker makes of them, not for loading.
    ///
    /// # Errors
    /// As [`Scope::new`], but for imports.
    pub fn without_policy(caller: &Worker, callee: &Worker) -> Result<Scope, Refused> {
        Scope::build(caller, callee, closure::closure(callee)?)
    }

    fn build(caller: &Worker, callee: &Worker, closure: Closure) -> Result<Scope, Refused> {
        let Closure {
            order,
            private,
            on_demand,
            initialisation,
            once,
        } = closure;
        let mut providers = Vec::new();
        let startup = &callee.modules[..callee.library];
        for (index, module) in startup.iter().enumerate() {
            let started_with = &caller.modules[..caller.library];
            let candidate = if index == 0 {
                caller.modules.first()
            } else {
                named(started_with, module)
            };
            providers.push(provider(module, candidate));
        }
        // The number of each module of the callee's worker among the providers.
        let mut numbers: Vec<Option<usize>> = (0..providers.len()).map(Some).collect();
        numbers.resize(callee.modules.len(), None);
        for (number, index) in private.iter().enumerate() {
            let module = &callee.modules[*index];
            numbers[*index] = Some(providers.len());
            providers.push(Provider {
                name: module.path.clone(),
                image: Arc::clone(&module.image),
                place: Place::Private(number),
            });
        }
        for index in &once {
            let module = &callee.modules[*index];
            let candidate = named(&caller.modules, module);
            if candidate.is_none() && !closure::is_placeholder(&module.image) {
                return Err(Refused::Dependency {
                    library: callee.function().path.clone(),
                    needed: module.short_name().to_owned(),
                    reason: "a process must have only one, and the caller's has none".into(),
                });
            }
            numbers[*index] = Some(providers.len());
            providers.push(provider(module, candidate));
        }
        let places = |order: &[usize]| -> Vec<usize> {
            let behind = order.iter().filter(|i| **i >= callee.library);
            behind.filter_map(|index| numbers[*index]).collect()
        };
        let function_order = places(&order);
        let mut images = Vec::new();
        for index in &private {
            let module = &callee.modules[*index];
            let order = if order.contains(index) {
                function_order.clone()
            } else {
                places(&closure::breadth_first(callee, *index)?)
            };
            images.push(PrivateImage {
                path: module.path.clone(),
                soname: module.short_name().to_owned(),
                image: Arc::clone(&module.image),
                on_demand: on_demand.contains(index),
                order,
            });
        }
        let number = |index: &usize| private.iter().position(|p| p == index);
        let searched = order.iter().filter_map(|index| {
            number(index).map(Searched::Private).or_else(|| {
                let theirs = named(&caller.modules, &callee.modules[*index])?;
                Some(Searched::Shared(theirs.path.clone()))
            })
        });
        let mut scope = Scope {
            order: searched.collect(),
            initialisation: initialisation.iter().filter_map(number).collect(),
            startup: startup.len(),
            providers,
            images,
            unique: Unique::default(),
            executable: {
                let executable = caller.executable();
                (Arc::clone(&executable.image), executable.bias)
            },
        };
        scope.unique = scope.unique();
        Ok(scope)
    }

    /// What gets a copy; the function's library first.
    #[must_use]
    pub fn images(&self) -> &[PrivateImage] {
        &self.images
    }

    /// Numbers of the images, each behind what it needs; those on demand last.
    #[must_use]
    pub fn initialisation(&self) -> &[usize] {
        &self.initialisation
    }

    /// Where `dlsym` looks for what the function's library sees.
    #[must_use]
    pub fn order(&self) -> &[Searched] {
        &self.order
    }

    fn symbol(&self, image: usize, index: u32) -> Result<&Symbol, Refused> {
        let own = &self.images[image];
        own.image
            .symbols
            .get(index as usize)
            .ok_or_else(|| Refused::BrokenImage {
                library: own.path.clone(),
                reason: format!(
                    "a relocation names symbol {index} of {}",
                    own.image.symbols.len()
                ),
            })
    }

    /// The first definition in look-up order; `None` where there is none.
    fn definition(
        &self,
        image: usize,
        symbol: &Symbol,
        jump_slot: bool,
    ) -> Option<(&Provider, &Symbol)> {
        let (number, found) = self.look_up(image, symbol, jump_slot)?;
        let (number, found) = self.unique.chosen(number, found);
        Some((&self.providers[number], found))
    }

    /// The first definition in an image's look-up order: a provider's number
    /// and its symbol.
    fn look_up(&self, image: usize, symbol: &Symbol, jump_slot: bool) -> Option<(usize, &Symbol)> {
        let own = &self.images[image];
        let itself = own.image.dynamic.symbolic.then_some(self.startup + image);
        let order = itself
            .into_iter()
            .chain(0..self.startup)
            .chain(own.order.iter().copied());
        self.first(order, symbol, jump_slot)
    }

    fn first(
        &self,
        mut order: impl Iterator<Item = usize>,
        symbol: &Symbol,
        jump_slot: bool,
    ) -> Option<(usize, &Symbol)> {
        let wanted = symbol
            .version
            .as_deref()
            .map_or(Wanted::Oldest, Wanted::Version);
        order.find_map(|number| {
            let image = &self.providers[number].image;
            Some((number, find(image, &symbol.name, wanted, jump_slot)?))
        })
    }

    /// What the relocations of the callee's worker have made unique, in ld.so's
    /// order: the objects that it started with from the last to the first,
    /// then each of the rest behind what it needs.
    fn unique(&self) -> Unique {
        let mut unique = Unique::default();
        let names: HashSet<&str> = self
            .providers
            .iter()
            .flat_map(|provider| &provider.image.symbols)
            .filter(|s| s.binding == c::STB_GNU_UNIQUE && !s.undefined())
            .map(|s| s.name.as_str())
            .collect();
        for number in (0..self.startup).rev() {
            for (symbol, jump_slot) in looked_up(&self.providers[number].image, &names) {
                if let Some((at, found)) = self.first(0..self.startup, symbol, jump_slot) {
                    unique.enter(at, found);
                }
            }
        }
        for image in &self.initialisation {
            for (symbol, jump_slot) in looked_up(&self.images[*image].image, &names) {
                if let Some((at, found)) = self.look_up(*image, symbol, jump_slot) {
                    unique.enter(at, found);
                }
            }
        }
        unique
    }

    /// What dynamic symbol `index` of image `image` means. `jump_slot` says
    /// that the reference is a call through the PLT, for which an executable's
    /// own stubs do not count as definitions.
    ///
    /// # Errors
    /// It is not found, or means something that differs between the workers.
    pub fn meaning(&self, image: usize, index: u32, jump_slot: bool) -> Result<Meaning, Refused> {
        let symbol = self.symbol(image, index)?;
        let library = || self.images[image].path.clone();
        if bound_to_itself(&self.images[image].image, symbol) {
            return Ok(private(image, symbol));
        }
        match self.definition(image, symbol, jump_slot) {
            Some((provider, found)) => {
                if let Some(there) = self.stand_in(provider, found, jump_slot) {
                    return Ok(there);
                }
                if found.kind == c::STT_TLS {
                    return Err(Refused::UnsupportedImport {
                        library: library(),
                        symbol: symbol.name.clone(),
                        reason: format!("is thread-local in {}", provider.name),
                    });
                }
                let theirs = match &provider.place {
                    Place::Private(number) => return Ok(private(*number, found)),
                    Place::Shared(theirs) => theirs,
                    Place::Differs { .. } => {
                        return Err(provider
                            .differs()
                            .unwrap_or_else(|| self.unresolved(image, symbol)));
                    }
                };
                let found = provider.theirs(theirs, found, &library())?;
                Ok(shared(found, theirs.bias))
            }
            // Not exported, but its own.
            None if !symbol.undefined() => Ok(private(image, symbol)),
            None if symbol.binding == c::STB_WEAK => Ok(Meaning::At(0)),
            None => Err(self.unresolved(image, symbol)),
        }
    }

    /// What a definition in the callee's executable means where the caller's is
    /// another one, if it only stands for a library's.
    fn stand_in(&self, provider: &Provider, found: &Symbol, jump_slot: bool) -> Option<Meaning> {
        let executable = &self.providers[0];
        let other = matches!(executable.place, Place::Differs { .. });
        if !other || !std::ptr::eq(provider, executable) || !provider.stands_in(found) {
            return None;
        }
        // The caller's executable may have a copy or a stub of its own.
        let (image, bias) = &self.executable;
        let wanted = found
            .version
            .as_deref()
            .map_or(Wanted::Default, Wanted::Version);
        if let Some(theirs) = find(image, &found.name, wanted, jump_slot) {
            return Some(shared(theirs, *bias));
        }
        let (number, found) = self.first(1..self.startup, found, jump_slot)?;
        let provider = &self.providers[number];
        match &provider.place {
            Place::Shared(theirs) => {
                let found = provider.theirs(theirs, found, &provider.name).ok()?;
                Some(shared(found, theirs.bias))
            }
            _ => None,
        }
    }

    fn unresolved(&self, image: usize, symbol: &Symbol) -> Refused {
        let version = symbol
            .version
            .as_ref()
            .map_or(String::new(), |v| format!("@{v}"));
        Refused::UnresolvedSymbol {
            library: self.images[image].path.clone(),
            symbol: format!("{}{version}", symbol.name),
        }
    }

    /// Bytes of what dynamic symbol `index` means.
    ///
    /// # Errors
    /// It is not found.
    pub fn size(&self, image: usize, index: u32) -> Result<u64, Refused> {
        let symbol = self.symbol(image, index)?;
        if bound_to_itself(&self.images[image].image, symbol) {
            return Ok(symbol.size);
        }
        match self.definition(image, symbol, false) {
            Some((_, found)) => Ok(found.size),
            None if symbol.binding == c::STB_WEAK || !symbol.undefined() => Ok(symbol.size),
            None => Err(self.unresolved(image, symbol)),
        }
    }

    /// Where the thread-local variable of dynamic symbol `index` is; index 0
    /// stands for the image's own block.
    ///
    /// # Errors
    /// It is not found, or nobody can tell where it is.
    pub fn tls(&self, image: usize, index: u32) -> Result<TlsMeaning, Refused> {
        let own = |value| TlsMeaning::Private {
            image,
            offset: value,
        };
        if index == 0 {
            return Ok(own(0));
        }
        let symbol = self.symbol(image, index)?;
        if bound_to_itself(&self.images[image].image, symbol) {
            return Ok(own(symbol.value));
        }
        match self.definition(image, symbol, false) {
            Some((provider, found)) if found.kind == c::STT_TLS => match &provider.place {
                Place::Private(number) => Ok(TlsMeaning::Private {
                    image: *number,
                    offset: found.value,
                }),
                Place::Shared(theirs) => {
                    let found = provider.theirs(theirs, found, &self.images[image].path)?;
                    match (theirs.tls_offset, theirs.tls_module) {
                        (Some(offset), _) => {
                            Ok(TlsMeaning::Static(found.value.wrapping_sub(offset)))
                        }
                        (None, Some(module)) => Ok(TlsMeaning::Linker {
                            module,
                            offset: found.value,
                        }),
                        (None, None) => Err(self.at_no_fixed_place(image, index)),
                    }
                }
                Place::Differs { .. } => Err(provider
                    .differs()
                    .unwrap_or_else(|| self.unresolved(image, symbol))),
            },
            Some(_) => Err(self.unresolved(image, symbol)),
            None if !symbol.undefined() => Ok(own(symbol.value)),
            None if symbol.binding == c::STB_WEAK => Ok(TlsMeaning::Nowhere),
            None => Err(self.unresolved(image, symbol)),
        }
    }

    /// The refusal of a thread-local variable whose distance from the thread
    /// pointer nobody can tell.
    #[must_use]
    pub fn at_no_fixed_place(&self, image: usize, index: u32) -> Refused {
        let symbol = match self.symbol(image, index) {
            Ok(symbol) => symbol,
            Err(refused) => return refused,
        };
        let provider = self.definition(image, symbol, false);
        let provider = provider.map_or("its library", |(provider, _)| &provider.name);
        Refused::UnsupportedImport {
            library: self.images[image].path.clone(),
            symbol: symbol.name.clone(),
            reason: format!("is thread-local in {provider}, at no fixed place"),
        }
    }

    /// Whether dynamic symbol `index` is one that we give the image: a library
    /// of the worker's defines it, not one of the callee's own.
    #[must_use]
    pub fn interposed(&self, image: usize, index: u32) -> Option<Interposed> {
        let symbol = self.symbol(image, index).ok().filter(|s| s.undefined())?;
        let ours = interpose::interposed(&symbol.name)?;
        let (provider, _) = self.definition(image, symbol, false)?;
        (!matches!(provider.place, Place::Private(_))).then_some(ours)
    }

    /// What a function of the C library means to the bridge.
    ///
    /// # Errors
    /// It is not found, or the workers' C libraries differ.
    pub fn library_function(&self, name: &str) -> Result<Meaning, Refused> {
        for provider in &self.providers[..self.startup] {
            let Some(found) = find(&provider.image, name, Wanted::Default, true) else {
                continue;
            };
            if let Some(refused) = provider.differs() {
                return Err(refused);
            }
            let Place::Shared(theirs) = &provider.place else {
                continue;
            };
            let found = provider.theirs(theirs, found, "the bridge")?;
            return Ok(shared(found, theirs.bias));
        }
        Err(Refused::UnresolvedSymbol {
            library: "the bridge".into(),
            symbol: name.into(),
        })
    }
}

/// The symbols of these names that an image's relocations look up, in their
/// order, with whether as the target of a call.
fn looked_up<'a>(image: &'a Image, names: &HashSet<&str>) -> Vec<(&'a Symbol, bool)> {
    let mut seen = HashSet::new();
    let relocations = image.dynamic.relocations.iter();
    relocations
        .filter(|r| r.symbol != 0 && r.kind != c::R_X86_64_COPY && seen.insert(r.symbol))
        .filter_map(|r| Some((r, image.symbols.get(r.symbol as usize)?)))
        .filter(|(_, s)| names.contains(s.name.as_str()) && !bound_to_itself(image, s))
        .map(|(r, symbol)| (symbol, r.kind == c::R_X86_64_JUMP_SLOT))
        .collect()
}

/// A definition in a library of the caller's worker.
fn shared(found: &Symbol, bias: u64) -> Meaning {
    let at = found.value.wrapping_add(bias);
    if found.section == c::SHN_ABS {
        Meaning::At(found.value)
    } else if found.kind == c::STT_GNU_IFUNC && !found.undefined() {
        Meaning::Resolver(at)
    } else {
        Meaning::At(at)
    }
}

/// A definition in the image of this number.
fn private(image: usize, symbol: &Symbol) -> Meaning {
    if symbol.section == c::SHN_ABS {
        Meaning::At(symbol.value)
    } else if symbol.kind == c::STT_GNU_IFUNC {
        Meaning::PrivateResolver(image, symbol.value)
    } else {
        Meaning::Private(image, symbol.value)
    }
}

/// Whether a symbol's references are the image's own whatever its scope has.
fn bound_to_itself(image: &Image, symbol: &Symbol) -> bool {
    !symbol.undefined()
        && (symbol.binding == c::STB_LOCAL
            || image.dynamic.symbolic && symbol.binding != c::STB_GNU_UNIQUE
            || matches!(
                symbol.visibility,
                c::STV_HIDDEN | c::STV_INTERNAL | c::STV_PROTECTED
            ))
}

/// The worker's unwinder: libgcc_s, if it has loaded it.
#[must_use]
pub fn unwinder(worker: &Worker) -> Option<&Module> {
    let mut modules = worker.modules.iter();
    modules.find(|m| m.short_name() == "libgcc_s.so.1")
}

/// Live address of a function that `module` exports.
#[must_use]
pub fn exported_by(module: &Module, name: &str) -> Option<u64> {
    let found = find(&module.image, name, Wanted::Default, true)?;
    (found.kind == c::STT_FUNC).then(|| found.value.wrapping_add(module.bias))
}
