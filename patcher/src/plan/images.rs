//! The records of a graft's images, as the bridge reads them.

use std::mem::offset_of;

use nightgraft_bridge::abi::{self, Module, Range, ScopeEntry, Tls};

use super::layout::{self, Area};
use crate::elf::Image;
use crate::load::interpose::{self, module_at};
use crate::load::{Loaded, PrivateImage, Scope, Searched};
use crate::refused::Refused;

/// Live addresses of the records that go together.
#[derive(Debug, Clone, Default)]
pub(super) struct Records {
    /// The [`abi::Graft`].
    pub(super) graft: u64,
    /// The [`Module`]s.
    pub(super) modules: u64,
    /// For each image its [`abi::TlsIndex`]es.
    pub(super) tls_indices: Vec<u64>,
}

/// Takes the places of what images point at, before any is relocated.
pub(super) fn reserve(area: &mut Area, scope: &Scope) -> Records {
    let graft = area.reserve(size_of::<abi::Graft>(), align_of::<abi::Graft>());
    let images = scope.images();
    let modules = area.reserve(size_of_val_of::<Module>(images.len()), 64);
    let tls_indices = images
        .iter()
        .map(|i| area.reserve(size_of_val_of::<abi::TlsIndex>(descriptors(&i.image)), 16))
        .collect();
    Records {
        graft,
        modules,
        tls_indices,
    }
}

fn size_of_val_of<T>(count: usize) -> usize {
    count * size_of::<T>()
}

/// How many TLS descriptors an image may ask for.
fn descriptors(image: &Image) -> usize {
    let kind = crate::elf::constants::R_X86_64_TLSDESC;
    let relocations = image.dynamic.relocations.iter();
    relocations.filter(|r| r.kind == kind).count()
}

/// Bytes of all thunks of one image.
pub(super) const THUNKS: u64 = (interpose::FUNCTIONS.len() * interpose::THUNK) as u64;

/// The thunks of one image.
///
/// # Errors
/// The bridge lacks a function.
pub(super) fn thunks(
    module: u64,
    bridge: impl Fn(&str) -> Result<u64, Refused>,
) -> Result<Vec<u8>, Refused> {
    let mut bytes = Vec::new();
    for function in interpose::FUNCTIONS {
        let target = bridge(function.export)?;
        bytes.extend(interpose::thunk(function.arguments, module, target));
    }
    Ok(bytes)
}

/// Writes every [`Module`] and what it points at; gives the fields of the
/// graft that lead there.
pub(super) fn write(
    area: &mut Area,
    records: &Records,
    scope: &Scope,
    loaded: &[Loaded],
) -> ImageFields {
    let mut tls_count = 0;
    for (number, (image, loaded)) in scope.images().iter().zip(loaded).enumerate() {
        for (index, slot) in loaded.tls_indices.iter().enumerate() {
            let at = records.tls_indices[number] + size_of_val_of::<abi::TlsIndex>(index) as u64;
            area.put_u64(at + offset_of!(abi::TlsIndex, module) as u64, slot.module);
            area.put_u64(at + offset_of!(abi::TlsIndex, offset) as u64, slot.offset);
        }
        module(
            area,
            module_at(records.modules, number),
            records.graft,
            image,
            loaded,
            &mut tls_count,
        );
    }
    let numbers = scope.initialisation();
    let eager = numbers.iter().filter(|n| !scope.images()[**n].on_demand);
    let order: Vec<u64> = numbers
        .iter()
        .map(|n| module_at(records.modules, *n))
        .collect();
    let init_order = area.words(order.into_iter());
    let entries: Vec<(u64, u64)> = scope
        .order()
        .iter()
        .map(|searched| match searched {
            Searched::Private(number) => (module_at(records.modules, *number), 0),
            Searched::Shared(path) => (0, area.string(path.as_bytes())),
        })
        .collect();
    let array = area.reserve(size_of_val_of::<ScopeEntry>(entries.len()), 8);
    for (index, (module, path)) in entries.iter().enumerate() {
        let at = array + size_of_val_of::<ScopeEntry>(index) as u64;
        area.put_u64(at + offset_of!(ScopeEntry, module) as u64, *module);
        area.put_u64(at + offset_of!(ScopeEntry, path) as u64, *path);
    }
    ImageFields {
        modules: (records.modules, scope.images().len() as u64),
        init_order: (init_order, eager.count() as u64),
        scope: (array, entries.len() as u64),
        tls_count,
    }
}

/// Addresses and numbers of entries, for the graft's record.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImageFields {
    pub(super) modules: (u64, u64),
    pub(super) init_order: (u64, u64),
    pub(super) scope: (u64, u64),
    pub(super) tls_count: u64,
}

fn module(
    area: &mut Area,
    at: u64,
    graft: u64,
    private: &PrivateImage,
    loaded: &Loaded,
    tls_count: &mut u64,
) {
    let image = &private.image;
    let live = |vaddr: u64| vaddr.wrapping_add(loaded.bias);
    let or_zero = |vaddr: Option<u64>| vaddr.map_or(0, live);
    let path = area.string(private.path.as_bytes());
    let soname = area.string(private.soname.as_bytes());
    let phdr = area.reserve(image.program_headers.len(), 8);
    area.put(phdr, &image.program_headers);
    let ifuncs = layout::ifuncs(area, &loaded.ifuncs);
    let inits = area.words(loaded.inits.iter().copied());
    let finis = area.words(loaded.finis.iter().copied());
    let relro = loaded.relro.unwrap_or_default();
    let definitions = image.dynamic.version_definitions;
    let range = offset_of!(Module, range);
    let sealed = offset_of!(Module, relro);
    let tls = offset_of!(Module, tls);
    let mut fields = vec![
        (offset_of!(Module, graft), graft),
        (offset_of!(Module, bias), loaded.bias),
        (range + offset_of!(Range, start), live(image.low())),
        (range + offset_of!(Range, len), image.high() - image.low()),
        (offset_of!(Module, path), path),
        (offset_of!(Module, soname), soname),
        (offset_of!(Module, phdr), phdr),
        (
            offset_of!(Module, phnum),
            image.program_headers.len() as u64 / 56,
        ),
        (
            offset_of!(Module, dynamic),
            match image.dynamic_vaddr {
                0 => 0,
                vaddr => live(vaddr),
            },
        ),
        (
            offset_of!(Module, symbols),
            or_zero(image.dynamic.symbol_table),
        ),
        (offset_of!(Module, symbol_count), image.symbols.len() as u64),
        (
            offset_of!(Module, strings),
            or_zero(image.dynamic.string_table),
        ),
        (
            offset_of!(Module, versions),
            or_zero(image.dynamic.symbol_versions),
        ),
        (
            offset_of!(Module, version_definitions),
            or_zero(definitions.map(|d| d.0)),
        ),
        (
            offset_of!(Module, version_definition_count),
            definitions.map_or(0, |d| d.1),
        ),
        (offset_of!(Module, eh_frame), or_zero(image.eh_frame())),
        (offset_of!(Module, ifuncs), ifuncs),
        (offset_of!(Module, ifunc_count), loaded.ifuncs.len() as u64),
        (sealed + offset_of!(Range, start), relro.0),
        (sealed + offset_of!(Range, len), relro.1),
        (offset_of!(Module, inits), inits),
        (offset_of!(Module, init_count), loaded.inits.len() as u64),
        (offset_of!(Module, finis), finis),
        (offset_of!(Module, fini_count), loaded.finis.len() as u64),
        (offset_of!(Module, on_demand), u64::from(private.on_demand)),
    ];
    if let Some(segment) = image.tls {
        fields.extend([
            (tls + offset_of!(Tls, image), live(segment.vaddr)),
            (tls + offset_of!(Tls, file_size), segment.file_size),
            (tls + offset_of!(Tls, mem_size), segment.mem_size),
            (tls + offset_of!(Tls, align), segment.align),
            (
                tls + offset_of!(Tls, skew),
                segment.vaddr & (segment.align - 1),
            ),
            (tls + offset_of!(Tls, index), *tls_count),
        ]);
        *tls_count += 1;
    }
    for (offset, value) in fields {
        area.put_u64(at + offset as u64, value);
    }
}
