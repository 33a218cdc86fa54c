//! Applying relocations to a copy of the image's segments.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use nightgraft_bridge::abi;

use super::interpose::{self, Interposed};
use super::{Ifunc, MOST_BYTES, MOST_INITIALISERS, Meaning, Scope, TlsMeaning};
use crate::elf::Image;
use crate::elf::constants as c;
use crate::refused::Refused;

/// A segment as it is to lie in the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedSegment {
    /// Live address of the first page.
    pub start: u64,
    /// Whole pages, in bytes.
    pub len: u64,
    /// May be written (until the bridge seals what RELRO covers).
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
    /// Contents from `start` on; zero behind them.
    pub bytes: Vec<u8>,
}

/// An image at its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Live address = address in the image + `bias` (wrapping).
    pub bias: u64,
    /// Segments, ascending.
    pub segments: Vec<LoadedSegment>,
    /// Slots that the bridge fills.
    pub ifuncs: Vec<Ifunc>,
    /// Live range to seal once they are filled: `(start, bytes)`.
    pub relro: Option<(u64, u64)>,
    /// Initialisers in order, live addresses.
    pub inits: Vec<u64>,
    /// What is called when the process exits, in order, live addresses.
    pub finis: Vec<u64>,
    /// Arguments of TLS descriptors, as they are to lie at
    /// [`Given::tls_indices`].
    pub tls_indices: Vec<TlsSlot>,
    /// Relocations applied, the bridge's among them.
    pub relocations: usize,
}

impl Loaded {
    /// The segment that holds `len` bytes at a live address, and where in it.
    fn find(&self, address: u64, len: usize) -> Option<(usize, usize)> {
        let end = address.checked_add(len as u64)?;
        self.segments
            .iter()
            .position(|s| address >= s.start && end <= s.start + s.len)
            .map(|index| (index, (address - self.segments[index].start) as usize))
    }

    /// Stores a word that an image exports as a constant.
    pub fn set_constant(&mut self, image: &Image, name: &str, value: u64) -> Option<()> {
        let symbol = image.symbols.iter().find(|s| s.name == name)?;
        let (index, at) = self.find(symbol.value.wrapping_add(self.bias), 8)?;
        let bytes = self.segments[index].bytes.get_mut(at..at + 8)?;
        bytes.copy_from_slice(&value.to_le_bytes());
        Some(())
    }

    /// Word at a live address of the image.
    fn word(&self, address: u64) -> Option<u64> {
        let mut word = [0; 8];
        let (index, at) = self.find(address, word.len())?;
        for (i, byte) in word.iter_mut().enumerate() {
            *byte = self.segments[index].bytes.get(at + i).copied().unwrap_or(0);
        }
        Some(u64::from_le_bytes(word))
    }

    fn patch(&mut self, address: u64, bytes: &[u8]) -> Option<()> {
        let (index, at) = self.find(address, bytes.len())?;
        let segment = &mut self.segments[index];
        if !segment.writable {
            return None;
        }
        if segment.bytes.len() < at + bytes.len() {
            segment.bytes.resize(at + bytes.len(), 0);
        }
        segment.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Some(())
    }

    /// The pages that RELRO covers, from its range in the image: as in ld.so,
    /// whole pages inside of the range. They must be the image's own.
    fn sealed(&self, (vaddr, len): (u64, u64)) -> Option<(u64, u64)> {
        let start = vaddr.wrapping_add(self.bias);
        let end = start.checked_add(len)? & !0xfff;
        let start = start & !0xfff;
        let len = end.saturating_sub(start);
        let (index, _) = self.find(start, usize::try_from(len).ok()?)?;
        self.segments[index].writable.then_some((start, len))
    }
}

/// What `__tls_get_addr` is told: an [`abi::TlsIndex`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsSlot {
    /// Address of the image's [`abi::Module`], or [`abi::TLS_STATIC`].
    pub module: u64,
    /// Offset in its block, or from the thread pointer.
    pub offset: u64,
}

/// What the bridge does for thread-local storage; live addresses.
#[derive(Debug, Clone, Copy, Default)]
pub struct GivenTls {
    /// `__tls_get_addr`.
    pub get_addr: u64,
    /// The TLS descriptor's function for a block that is made on demand.
    pub dynamic: u64,
    /// … for a fixed distance from the thread pointer.
    pub fixed: u64,
    /// … for a weak reference to nothing.
    pub nowhere: u64,
}

/// Where an image finds what we give it; live addresses.
#[derive(Debug, Clone, Copy, Default)]
pub struct Given {
    /// The image's thunks, in the order of [`interpose::FUNCTIONS`].
    pub thunks: u64,
    /// The graft's `environ` variable.
    pub environ: u64,
    /// The records ([`abi::Module`]) of all images.
    pub modules: u64,
    /// Where [`Loaded::tls_indices`] will lie.
    pub tls_indices: u64,
    /// Thread-local storage.
    pub tls: GivenTls,
}

/// Which image is put where.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The image's number among those of its scope.
    pub number: usize,
    /// Live address of the first page of each image of the scope.
    pub bases: &'a [u64],
}

/// Puts `image` at its place.
///
/// # Errors
/// What a relocation wants cannot be had.
pub fn relocate(
    library: &str,
    image: &Image,
    place: Place<'_>,
    scope: Option<&Scope>,
    given: &Given,
) -> Result<Loaded, Refused> {
    let broken = |reason: String| Refused::BrokenImage {
        library: library.to_owned(),
        reason,
    };
    let base = place.bases[place.number];
    let span = image.high() - image.low();
    if span > MOST_BYTES {
        return Err(Refused::ImageTooLarge {
            library: library.to_owned(),
            bytes: span,
            most: MOST_BYTES,
        });
    }
    if base.checked_add(span).is_none() {
        return Err(broken(format!("{base:#x} is no place for {span} bytes")));
    }
    let bias = base.wrapping_sub(image.low());
    let bias_of = |number: usize| match scope {
        Some(scope) => place.bases[number].wrapping_sub(scope.images()[number].image.low()),
        None => bias,
    };
    let mut loaded = Loaded {
        bias,
        segments: segments(library, image, bias)?,
        ifuncs: Vec::new(),
        relro: None,
        inits: Vec::new(),
        finis: Vec::new(),
        tls_indices: Vec::new(),
        relocations: 0,
    };
    if let Some(range) = image.relro {
        let sealed = loaded
            .sealed(range)
            .ok_or_else(|| broken(format!("RELRO at {:#x} is not its own", range.0)))?;
        loaded.relro = Some(sealed).filter(|(_, len)| *len > 0);
    }
    // Looked up once each: relocations of one symbol may be many.
    let mut meanings = HashMap::new();
    for entry in &image.dynamic.relocations {
        let unsupported = || Refused::UnsupportedRelocation {
            library: library.to_owned(),
            kind: entry.kind,
            at: entry.offset,
        };
        let at = entry.offset.wrapping_add(bias);
        let in_place = || loaded.word(at).ok_or_else(unsupported);
        let addend = match entry.addend {
            Some(addend) => addend as u64,
            None => in_place()?,
        };
        let jump_slot = entry.kind == c::R_X86_64_JUMP_SLOT;
        let look_up = || -> Result<Meaning, Refused> {
            if entry.symbol == 0 {
                // As in ld.so: a local symbol at the image's address 0.
                return Ok(Meaning::Private(place.number, 0));
            }
            let Some(scope) = scope else {
                // The bridge: it has no imports.
                let own = image
                    .symbols
                    .get(entry.symbol as usize)
                    .filter(|s| !s.undefined());
                return own
                    .map(|s| Meaning::Private(0, s.value))
                    .ok_or_else(unsupported);
            };
            match scope.interposed(place.number, entry.symbol) {
                Some(Interposed::Function(index)) => Ok(Meaning::At(
                    given.thunks + (index * interpose::THUNK) as u64,
                )),
                Some(Interposed::Environ) => Ok(Meaning::At(given.environ)),
                Some(Interposed::TlsGetAddr) => Ok(Meaning::At(given.tls.get_addr)),
                None => scope.meaning(place.number, entry.symbol, jump_slot),
            }
        };
        let mut meaning = || match meanings.entry((entry.symbol, jump_slot)) {
            Entry::Occupied(known) => Ok(*known.get()),
            Entry::Vacant(new) => Ok(*new.insert(look_up()?)),
        };
        let (meaning, addend, relative_to_place) = match entry.kind {
            c::R_X86_64_NONE => continue,
            c::R_X86_64_RELATIVE => (Meaning::Private(place.number, 0), addend, false),
            c::R_X86_64_GLOB_DAT | c::R_X86_64_JUMP_SLOT => (meaning()?, 0, false),
            c::R_X86_64_64 => (meaning()?, addend, false),
            c::R_X86_64_IRELATIVE => (Meaning::PrivateResolver(place.number, addend), 0, false),
            c::R_X86_64_PC64 => (meaning()?, addend, true),
            c::R_X86_64_SIZE64 => {
                let scope = scope.ok_or_else(unsupported)?;
                (
                    Meaning::At(scope.size(place.number, entry.symbol)?),
                    addend,
                    false,
                )
            }
            c::R_X86_64_DTPMOD64
            | c::R_X86_64_DTPOFF64
            | c::R_X86_64_TPOFF64
            | c::R_X86_64_TLSDESC => {
                let scope = scope.ok_or_else(unsupported)?;
                let meaning = scope.tls(place.number, entry.symbol)?;
                if let (c::R_X86_64_TPOFF64, TlsMeaning::Linker { .. }) = (entry.kind, meaning) {
                    return Err(scope.at_no_fixed_place(place.number, entry.symbol));
                }
                let words = tls_words(library, entry.kind, meaning, addend, given, &mut loaded)
                    .ok_or_else(unsupported)??;
                for (index, word) in words.iter().enumerate() {
                    loaded
                        .patch(at.wrapping_add(index as u64 * 8), &word.to_le_bytes())
                        .ok_or_else(unsupported)?;
                }
                loaded.relocations += 1;
                continue;
            }
            _ => return Err(unsupported()),
        };
        let resolver = match meaning {
            Meaning::Resolver(resolver) => Some(resolver),
            Meaning::PrivateResolver(image, vaddr) => Some(vaddr.wrapping_add(bias_of(image))),
            _ => None,
        };
        let value = match meaning {
            Meaning::At(value) => value,
            Meaning::Private(image, vaddr) => vaddr.wrapping_add(bias_of(image)),
            Meaning::Resolver(_) | Meaning::PrivateResolver(..) => 0,
        };
        if let Some(resolver) = resolver {
            if relative_to_place {
                return Err(unsupported());
            }
            loaded.ifuncs.push(Ifunc {
                slot: at,
                resolver,
                addend,
            });
        }
        let value = value
            .wrapping_add(addend)
            .wrapping_sub(if relative_to_place { at } else { 0 });
        loaded
            .patch(at, &value.to_le_bytes())
            .ok_or_else(unsupported)?;
        loaded.relocations += 1;
    }
    if let Some(init) = image.dynamic.init {
        loaded.inits.push(init.wrapping_add(bias));
    }
    loaded
        .inits
        .extend(functions(&loaded, image.dynamic.init_array, "DT_INIT_ARRAY").map_err(broken)?);
    let mut finis =
        functions(&loaded, image.dynamic.fini_array, "DT_FINI_ARRAY").map_err(broken)?;
    finis.reverse();
    finis.extend(image.dynamic.fini.map(|fini| fini.wrapping_add(bias)));
    loaded.finis = finis;
    Ok(loaded)
}

/// The functions in an array of them.
fn functions(loaded: &Loaded, array: Option<(u64, u64)>, what: &str) -> Result<Vec<u64>, String> {
    let Some((array, len)) = array else {
        return Ok(Vec::new());
    };
    if len / 8 > MOST_INITIALISERS {
        return Err(format!("{what} has {} entries", len / 8));
    }
    let mut functions = Vec::new();
    for index in 0..len / 8 {
        let slot = array.wrapping_add(loaded.bias).wrapping_add(index * 8);
        let function = loaded
            .word(slot)
            .ok_or_else(|| format!("{what} at {array:#x}"))?;
        // ld.so skips neither; 0 and -1 are left-overs of old toolchains.
        if function != 0 && function != u64::MAX {
            functions.push(function);
        }
    }
    Ok(functions)
}

/// The words that a relocation for thread-local storage stores; `None` for a
/// kind that its meaning does not go with.
fn tls_words(
    library: &str,
    kind: u32,
    meaning: TlsMeaning,
    addend: u64,
    given: &Given,
    loaded: &mut Loaded,
) -> Option<Result<Vec<u64>, Refused>> {
    let slot = |image: usize, offset: u64| TlsSlot {
        module: interpose::module_at(given.modules, image),
        offset: offset.wrapping_add(addend),
    };
    let words = match (kind, meaning) {
        (c::R_X86_64_DTPMOD64, TlsMeaning::Private { image, .. }) => vec![slot(image, 0).module],
        (c::R_X86_64_DTPMOD64, TlsMeaning::Static(_)) => vec![abi::TLS_STATIC],
        (c::R_X86_64_DTPMOD64, TlsMeaning::Linker { module, .. }) => vec![module],
        (c::R_X86_64_DTPOFF64, TlsMeaning::Private { image, offset }) => {
            vec![slot(image, offset).offset]
        }
        (c::R_X86_64_DTPOFF64, TlsMeaning::Linker { offset, .. }) => {
            vec![offset.wrapping_add(addend)]
        }
        (c::R_X86_64_DTPOFF64 | c::R_X86_64_TPOFF64, TlsMeaning::Static(offset)) => {
            vec![offset.wrapping_add(addend)]
        }
        (c::R_X86_64_TPOFF64, TlsMeaning::Private { .. }) => {
            return Some(Err(Refused::Tls {
                library: library.to_owned(),
            }));
        }
        // As in ld.so: a reference to nothing is not touched.
        (c::R_X86_64_DTPMOD64 | c::R_X86_64_DTPOFF64, TlsMeaning::Nowhere) => Vec::new(),
        (c::R_X86_64_TLSDESC, TlsMeaning::Private { image, offset }) => {
            descriptor(slot(image, offset), given, loaded)
        }
        (c::R_X86_64_TLSDESC, TlsMeaning::Linker { module, offset }) => {
            let offset = offset.wrapping_add(addend);
            descriptor(TlsSlot { module, offset }, given, loaded)
        }
        (c::R_X86_64_TLSDESC, TlsMeaning::Static(offset)) => {
            vec![given.tls.fixed, offset.wrapping_add(addend)]
        }
        (c::R_X86_64_TLSDESC, TlsMeaning::Nowhere) => vec![given.tls.nowhere, addend],
        _ => return None,
    };
    Some(Ok(words))
}

/// A TLS descriptor whose argument is a slot of its own.
fn descriptor(slot: TlsSlot, given: &Given, loaded: &mut Loaded) -> Vec<u64> {
    let at = given.tls_indices + (loaded.tls_indices.len() * size_of::<TlsSlot>()) as u64;
    loaded.tls_indices.push(slot);
    vec![given.tls.dynamic, at]
}

fn segments(library: &str, image: &Image, bias: u64) -> Result<Vec<LoadedSegment>, Refused> {
    let broken = |reason: &str| Refused::BrokenImage {
        library: library.to_owned(),
        reason: reason.into(),
    };
    let mut out: Vec<LoadedSegment> = Vec::new();
    for s in &image.segments {
        let first = s.vaddr & !0xfff;
        let end = (s.vaddr + s.mem_size).next_multiple_of(0x1000);
        // One of zeros alone has no place in the file.
        let file = match s.file_size {
            0 => &[][..],
            len => image
                .at(s.vaddr, len)
                .ok_or_else(|| broken("a segment outside of the file"))?,
        };
        let start = first.wrapping_add(bias);
        if out
            .last()
            .is_some_and(|l: &LoadedSegment| l.start + l.len > start)
        {
            // A page that two segments share would need one protection.
            return Err(broken("two segments share a page"));
        }
        let mut bytes = vec![0; (s.vaddr - first) as usize];
        bytes.extend_from_slice(file);
        out.push(LoadedSegment {
            start,
            len: end - first,
            writable: s.writable(),
            executable: s.executable(),
            bytes,
        });
    }
    Ok(out)
}
