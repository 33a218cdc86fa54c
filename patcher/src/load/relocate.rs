//! Applying relocations to a copy of the image's segments.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::{Ifunc, Interposed, MOST_BYTES, MOST_INITIALISERS, Meaning, Scope};
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

/// Where the image finds what we give it; live addresses.
#[derive(Debug, Clone, Copy)]
pub struct Given {
    /// The image's `getenv` thunk.
    pub getenv: u64,
    /// The image's `environ` variable.
    pub environ: u64,
}

/// Puts `image` at `base` (the live address of its first page).
///
/// # Errors
/// What a relocation wants cannot be had.
pub fn relocate(
    library: &str,
    image: &Image,
    base: u64,
    scope: Option<&Scope>,
    given: Given,
) -> Result<Loaded, Refused> {
    let broken = |reason: String| Refused::BrokenImage {
        library: library.to_owned(),
        reason,
    };
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
    let mut loaded = Loaded {
        bias,
        segments: segments(library, image, bias)?,
        ifuncs: Vec::new(),
        relro: None,
        inits: Vec::new(),
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
                return Ok(Meaning::Own(0));
            }
            let Some(scope) = scope else {
                // The bridge: it has no imports.
                let own = image
                    .symbols
                    .get(entry.symbol as usize)
                    .filter(|s| !s.undefined());
                return own.map(|s| Meaning::Own(s.value)).ok_or_else(unsupported);
            };
            match scope.interposed(entry.symbol) {
                Some(Interposed::Getenv) => Ok(Meaning::At(given.getenv)),
                Some(Interposed::Environ) => Ok(Meaning::At(given.environ)),
                None => scope.meaning(entry.symbol, jump_slot),
            }
        };
        let mut meaning = || match meanings.entry((entry.symbol, jump_slot)) {
            Entry::Occupied(known) => Ok(*known.get()),
            Entry::Vacant(new) => Ok(*new.insert(look_up()?)),
        };
        let (meaning, addend, relative_to_place) = match entry.kind {
            c::R_X86_64_NONE => continue,
            c::R_X86_64_RELATIVE => (Meaning::Own(0), addend, false),
            c::R_X86_64_GLOB_DAT | c::R_X86_64_JUMP_SLOT => (meaning()?, 0, false),
            c::R_X86_64_64 => (meaning()?, addend, false),
            c::R_X86_64_IRELATIVE => (Meaning::OwnResolver(addend), 0, false),
            c::R_X86_64_PC64 => (meaning()?, addend, true),
            c::R_X86_64_DTPMOD64
            | c::R_X86_64_DTPOFF64
            | c::R_X86_64_TPOFF64
            | c::R_X86_64_TLSDESC => {
                return Err(Refused::Tls {
                    library: library.to_owned(),
                });
            }
            _ => return Err(unsupported()),
        };
        let value = match meaning {
            Meaning::At(value) => value,
            Meaning::Own(vaddr) => vaddr.wrapping_add(bias),
            Meaning::Resolver(_) | Meaning::OwnResolver(_) if relative_to_place => {
                return Err(unsupported());
            }
            Meaning::Resolver(resolver) => {
                loaded.ifuncs.push(Ifunc {
                    slot: at,
                    resolver,
                    addend,
                });
                0
            }
            Meaning::OwnResolver(vaddr) => {
                loaded.ifuncs.push(Ifunc {
                    slot: at,
                    resolver: vaddr.wrapping_add(bias),
                    addend,
                });
                0
            }
        };
        let value = value
            .wrapping_add(addend)
            .wrapping_sub(if relative_to_place { at } else { 0 });
        loaded
            .patch(at, &value.to_le_bytes())
            .ok_or_else(unsupported)?;
        loaded.relocations += 1;
    }
    // Bound once the plain relocations are: as in ld.so, a resolver may use
    // the image's own data.
    if let Some(init) = image.dynamic.init {
        loaded.inits.push(init.wrapping_add(bias));
    }
    if let Some((array, len)) = image.dynamic.init_array {
        if len / 8 > MOST_INITIALISERS {
            return Err(broken(format!("DT_INIT_ARRAY has {} entries", len / 8)));
        }
        for index in 0..len / 8 {
            let slot = array.wrapping_add(bias).wrapping_add(index * 8);
            let function = loaded
                .word(slot)
                .ok_or_else(|| broken(format!("DT_INIT_ARRAY at {array:#x}")))?;
            // ld.so skips neither; 0 and -1 are left-overs of old toolchains.
            if function != 0 && function != u64::MAX {
                loaded.inits.push(function);
            }
        }
    }
    Ok(loaded)
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
