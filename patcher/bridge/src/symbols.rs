//! Symbols of images, as the dynamic linker would look them up: `dlsym`,
//! `dlvsym`, `dladdr` are rare, so a table is read from its start to its end.

use core::ffi::c_char;

use crate::abi::{Graft, Module};
use crate::tls;

/// `Elf64_Sym`.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Symbol {
    name: u32,
    info: u8,
    other: u8,
    section: u16,
    value: u64,
    size: u64,
}

/// `Elf64_Verdef`.
#[repr(C)]
struct VersionDefinition {
    version: u16,
    flags: u16,
    index: u16,
    count: u16,
    hash: u32,
    /// Bytes to the first [`VersionName`].
    names: u32,
    /// Bytes to the next definition.
    next: u32,
}

/// `Elf64_Verdaux`.
#[repr(C)]
struct VersionName {
    name: u32,
    next: u32,
}

/// `Elf64_Dyn`.
#[repr(C)]
struct Dynamic {
    tag: u64,
    value: u64,
}

const SHN_UNDEF: u16 = 0;
const SHN_ABS: u16 = 0xfff1;
const STT_TLS: u8 = 6;
const STT_GNU_IFUNC: u8 = 10;
const DT_NEEDED: u64 = 1;
/// A version's bit that says that only who names it gets the symbol.
const HIDDEN: u16 = 0x8000;

impl Symbol {
    fn kind(&self) -> u8 {
        self.info & 15
    }

    /// Whether a lookup can find it: defined, and global, weak or unique; no
    /// section, file or the like.
    fn found(&self) -> bool {
        let kind = matches!(self.kind(), 0..=2 | 5 | STT_TLS | STT_GNU_IFUNC);
        let place = self.value != 0 || self.section == SHN_ABS || self.kind() == STT_TLS;
        kind && place && self.section != SHN_UNDEF && matches!(self.info >> 4, 1 | 2 | 10)
    }
}

/// Whether two NUL-terminated strings are equal.
///
/// # Safety
/// They are.
pub(crate) unsafe fn same(a: u64, b: u64) -> bool {
    let (mut a, mut b) = (a as *const u8, b as *const u8);
    // SAFETY: the loop ends at the first difference or at the common NUL.
    unsafe {
        while *a == *b {
            if *a == 0 {
                return true;
            }
            (a, b) = (a.add(1), b.add(1));
        }
    }
    false
}

/// Module `index` of the graft's.
pub(crate) unsafe fn module<'a>(graft: &Graft, index: usize) -> Option<&'a Module> {
    // SAFETY: the patcher wrote the array; it is never unmapped.
    (index < graft.module_count as usize)
        .then(|| unsafe { &*(graft.modules as *const Module).add(index) })
}

/// The graft's module whose address a handle is.
pub(crate) unsafe fn by_handle<'a>(graft: &Graft, handle: u64) -> Option<&'a Module> {
    let place = handle.wrapping_sub(graft.modules);
    let stride = size_of::<Module>() as u64;
    if !place.is_multiple_of(stride) || place / stride >= graft.module_count {
        return None;
    }
    // SAFETY: it is in the array.
    unsafe { module(graft, (place / stride) as usize) }
}

/// The graft's module that `address` lies in.
pub(crate) unsafe fn by_address<'a>(graft: &Graft, address: u64) -> Option<&'a Module> {
    let mut index = 0;
    // SAFETY: as for `module`.
    while let Some(module) = unsafe { module(graft, index) } {
        if address.wrapping_sub(module.range.start) < module.range.len {
            return Some(module);
        }
        index += 1;
    }
    None
}

/// The graft's module of this name: a path if there is a slash in it, else a
/// `DT_SONAME`.
pub(crate) unsafe fn by_name<'a>(graft: &Graft, name: *const c_char) -> Option<&'a Module> {
    // SAFETY: names are NUL-terminated.
    unsafe {
        let mut at = name;
        while *at != 0 && *at != b'/' as c_char {
            at = at.add(1);
        }
        let path = *at != 0;
        let mut index = 0;
        while let Some(module) = module(graft, index) {
            if same(if path { module.path } else { module.soname }, name as u64) {
                return Some(module);
            }
            index += 1;
        }
    }
    None
}

/// Name of the module's `index`th dependency (`DT_NEEDED`).
pub(crate) unsafe fn needed(module: &Module, mut index: usize) -> Option<*const c_char> {
    let mut entry = module.dynamic as *const Dynamic;
    if entry.is_null() {
        return None;
    }
    // SAFETY: the section ends with DT_NULL.
    unsafe {
        while (*entry).tag != 0 {
            if (*entry).tag == DT_NEEDED {
                if index == 0 {
                    return Some((module.strings + (*entry).value) as *const c_char);
                }
                index -= 1;
            }
            entry = entry.add(1);
        }
    }
    None
}

/// The symbol of this name that a module defines: of this version, or, where
/// that is null, the default one.
pub(crate) unsafe fn lookup(
    module: &Module,
    name: *const c_char,
    version: *const c_char,
) -> Option<*const Symbol> {
    let symbols = module.symbols as *const Symbol;
    let versions = module.versions as *const u16;
    let mut default = None;
    let mut index = 1;
    // SAFETY: the tables are the image's own, of `symbol_count` entries.
    unsafe {
        while index < module.symbol_count as usize {
            let symbol = symbols.add(index);
            if (*symbol).found() && same(module.strings + u64::from((*symbol).name), name as u64) {
                if versions.is_null() {
                    return Some(symbol);
                }
                let own = *versions.add(index);
                if version.is_null() {
                    // Without a version of its own it is the one.
                    if own & !HIDDEN < 2 {
                        return Some(symbol);
                    }
                    if own & HIDDEN == 0 && default.is_none() {
                        default = Some(symbol);
                    }
                } else if is_version(module, own & !HIDDEN, version) {
                    return Some(symbol);
                }
            }
            index += 1;
        }
    }
    default
}

unsafe fn is_version(module: &Module, index: u16, name: *const c_char) -> bool {
    let mut at = module.version_definitions;
    let mut left = module.version_definition_count;
    // SAFETY: the definitions are the image's own.
    unsafe {
        while at != 0 && left != 0 {
            let definition = at as *const VersionDefinition;
            if (*definition).index & !HIDDEN == index {
                let first = (at + u64::from((*definition).names)) as *const VersionName;
                return same(module.strings + u64::from((*first).name), name as u64);
            }
            at += u64::from((*definition).next);
            left -= 1;
        }
    }
    false
}

/// What `dlsym` gives for a symbol; 0 where there is no memory for the
/// thread's block.
pub(crate) unsafe fn value(module: &Module, symbol: *const Symbol) -> u64 {
    // SAFETY: the symbol is one of the module's.
    unsafe {
        let symbol = &*symbol;
        let address = match symbol.section {
            SHN_ABS => symbol.value,
            _ => symbol.value.wrapping_add(module.bias),
        };
        match symbol.kind() {
            STT_TLS => match tls::block(module) {
                Some(block) => block.wrapping_add(symbol.value),
                None => 0,
            },
            STT_GNU_IFUNC => {
                let resolver: unsafe extern "C" fn() -> u64 =
                    core::mem::transmute(address as usize);
                resolver()
            }
            _ => address,
        }
    }
}

/// The symbol that `address` lies in (or is at, where it has no size), with
/// its name and its own address.
pub(crate) unsafe fn nearest(module: &Module, address: u64) -> Option<(*const Symbol, u64, u64)> {
    let symbols = module.symbols as *const Symbol;
    let mut best: Option<(*const Symbol, u64, u64)> = None;
    let mut index = 1;
    // SAFETY: as for `lookup`.
    unsafe {
        while index < module.symbol_count as usize {
            let symbol = &*symbols.add(index);
            let start = symbol.value.wrapping_add(module.bias);
            let inside = match symbol.size {
                0 => address == start,
                size => address.wrapping_sub(start) < size,
            };
            if inside
                && symbol.found()
                && symbol.kind() != STT_TLS
                && symbol.section != SHN_ABS
                && best.is_none_or(|(_, _, other)| other < start)
            {
                let name = module.strings + u64::from(symbol.name);
                best = Some((symbol, name, start));
            }
            index += 1;
        }
    }
    best
}
