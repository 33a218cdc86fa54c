//! The dynamic section: relocations and dynamic symbols.

use std::collections::HashSet;

use object::LittleEndian as LE;
use object::elf;
use object::pod::slice_from_bytes;

use super::{Image, MAX_TABLE, Stored, Symbol, function_symbol, malformed};
use crate::code::CodeError;

impl Image {
    pub(super) fn read_dynamic(&mut self, range: Option<(u64, u64)>) -> Result<(), CodeError> {
        let Some((start, end)) = range else {
            return Err(CodeError::NotSharedObject);
        };
        let bytes = self.bytes(start, end).ok_or(malformed("dynamic section"))?;
        let count = bytes.len() / size_of::<elf::Dyn64<LE>>();
        let entries = slice_from_bytes::<elf::Dyn64<LE>>(bytes, count)
            .map_err(|()| malformed("dynamic section"))?
            .0;
        let value = |tag| {
            let mut live = entries
                .iter()
                .take_while(|e| e.d_tag.get(LE) != elf::DT_NULL);
            live.find(|e| e.d_tag.get(LE) == tag)
                .map(|e| e.d_val.get(LE))
        };
        let table = |at, size| match (value(at), value(size)) {
            (Some(at), Some(size)) if size > 0 => Some((at, size)),
            _ => None,
        };
        let rela = table(elf::DT_RELA, elf::DT_RELASZ);
        let plt = table(elf::DT_JMPREL, elf::DT_PLTRELSZ);
        let relr = table(elf::DT_RELR, elf::DT_RELRSZ);
        let (symtab, strtab) = (value(elf::DT_SYMTAB), value(elf::DT_STRTAB));
        let (hash, gnu_hash) = (value(elf::DT_HASH), value(elf::DT_GNU_HASH));

        let mut last_symbol = 0;
        let mut relocations = Vec::new();
        for (at, size) in [rela, plt].into_iter().flatten() {
            let count = usize::try_from(size).map_err(|_| malformed("relocations"))?
                / size_of::<elf::Rela64<LE>>();
            if count > MAX_TABLE {
                return Err(CodeError::TooLarge {
                    what: "relocations",
                    size: count as u64,
                    limit: MAX_TABLE as u64,
                });
            }
            let bytes = at
                .checked_add(size)
                .and_then(|end| self.bytes(at, end))
                .ok_or(malformed("relocations"))?;
            let entries = slice_from_bytes::<elf::Rela64<LE>>(bytes, count)
                .map_err(|()| malformed("relocations"))?
                .0;
            for entry in entries {
                let info = entry.r_info.get(LE);
                let (symbol, kind) = ((info >> 32) as u32, info as u32);
                last_symbol = last_symbol.max(symbol);
                relocations.push((entry.r_offset.get(LE), kind, symbol, entry.r_addend.get(LE)));
            }
        }
        let mut stored = Vec::new();
        if let Some((at, size)) = relr {
            self.read_relr(at, size, &mut stored)?;
        }
        let (symbols, endless) = self.dynamic_symbols(symtab, strtab, hash, gnu_hash, last_symbol);
        for (place, kind, symbol, addend) in relocations {
            let defined = symbols.get(symbol as usize).copied().flatten();
            let what = match elf::RelocationType(kind) {
                elf::R_X86_64_RELATIVE => Stored::Address(addend as u64),
                elf::R_X86_64_GLOB_DAT | elf::R_X86_64_JUMP_SLOT | elf::R_X86_64_64 => {
                    match defined {
                        Some(value) => Stored::Address(value.wrapping_add_signed(addend)),
                        None => {
                            if endless.contains(&symbol) {
                                self.noreturn.insert(place);
                            }
                            Stored::Import
                        }
                    }
                }
                _ => Stored::Other,
            };
            stored.push((place, what));
        }
        self.stored = stored;
        Ok(())
    }

    fn read_relr(
        &self,
        at: u64,
        size: u64,
        stored: &mut Vec<(u64, Stored)>,
    ) -> Result<(), CodeError> {
        let bytes = at
            .checked_add(size)
            .and_then(|end| self.bytes(at, end))
            .ok_or(malformed("relative relocations"))?;
        let mut place = 0_u64;
        let add = |place, stored: &mut Vec<_>| {
            if let Some(value) = self.u64_at(place) {
                stored.push((place, Stored::Address(value)));
            }
        };
        for word in bytes.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            if stored.len() > MAX_TABLE {
                return Err(CodeError::TooLarge {
                    what: "relative relocations",
                    size: stored.len() as u64,
                    limit: MAX_TABLE as u64,
                });
            }
            if word & 1 == 0 {
                add(word, stored);
                place = word.wrapping_add(8);
            } else {
                for bit in 1..64 {
                    if word >> bit & 1 == 1 {
                        add(place.wrapping_add((bit - 1) * 8), stored);
                    }
                }
                place = place.wrapping_add(63 * 8);
            }
        }
        Ok(())
    }

    /// Values of the dynamic symbols that this object defines, by index, and
    /// the imports that do not return. Functions are added to `symbols`.
    fn dynamic_symbols(
        &mut self,
        symtab: Option<u64>,
        strtab: Option<u64>,
        hash: Option<u64>,
        gnu_hash: Option<u64>,
        last_used: u32,
    ) -> (Vec<Option<u64>>, HashSet<u32>) {
        let mut endless = HashSet::new();
        let (Some(symtab), Some(strtab)) = (symtab, strtab) else {
            return (Vec::new(), endless);
        };
        // The dynamic section does not say how many there are; hash tables do.
        let count = hash
            .and_then(|at| self.u32_at(at.checked_add(4)?))
            .into_iter()
            .chain(gnu_hash.and_then(|at| self.gnu_hash_count(at)))
            .chain([last_used.saturating_add(1)])
            .max()
            .unwrap_or(0);
        let mut values = Vec::new();
        for index in 0..(count as usize).min(MAX_TABLE) {
            let at = (index as u64)
                .checked_mul(24)
                .and_then(|o| symtab.checked_add(o));
            let Some(bytes) = at.and_then(|at| self.bytes(at, at.checked_add(24)?)) else {
                break;
            };
            let Ok((entry, _)) = object::pod::from_bytes::<elf::Sym64<LE>>(bytes) else {
                break;
            };
            let defined = entry.st_shndx.get(LE) != elf::SHN_UNDEF;
            let value = entry.st_value.get(LE);
            // An IFUNC's value is its resolver: what gets stored is not known.
            let resolver = entry.st_type() == elf::STT_GNU_IFUNC;
            let tls = entry.st_type() == elf::STT_TLS;
            values.push((defined && !resolver && !tls).then_some(value));
            let name = strtab
                .checked_add(entry.st_name.get(LE).into())
                .and_then(|at| self.c_string(at, 4096));
            if !defined && name.is_some_and(never_returns) {
                endless.insert(index as u32);
            }
            if function_symbol(entry)
                && let Some(name) = name
            {
                let symbol = Symbol {
                    name: String::from_utf8_lossy(name).into_owned(),
                    at: value,
                    size: entry.st_size.get(LE),
                    exported: true,
                };
                self.symbols.push(symbol);
            }
        }
        (values, endless)
    }

    /// One more than the highest symbol index in a GNU hash table.
    fn gnu_hash_count(&self, at: u64) -> Option<u32> {
        let buckets = self.u32_at(at)?;
        let first = self.u32_at(at.checked_add(4)?)?;
        let bloom = self.u32_at(at.checked_add(8)?)?;
        let table = at.checked_add(16)?.checked_add(u64::from(bloom) * 8)?;
        let end = table.checked_add(u64::from(buckets) * 4)?;
        let highest = self
            .bytes(table, end)?
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
            .max()?;
        if highest < first {
            return Some(first);
        }
        let mut index = highest;
        loop {
            let link = self.u32_at(end.checked_add(u64::from(index - first) * 4)?)?;
            index = index.checked_add(1)?;
            if link & 1 == 1 {
                return Some(index);
            }
        }
    }
}

/// Functions of the C and C++ runtimes that do not return. Compilers put
/// nothing behind their calls, so what follows there belongs to another path.
fn never_returns(name: &[u8]) -> bool {
    const NAMES: [&str; 24] = [
        "__stack_chk_fail",
        "__chk_fail",
        "__fortify_fail",
        "__assert_fail",
        "__assert_perror_fail",
        "__assert",
        "abort",
        "exit",
        "_exit",
        "_Exit",
        "quick_exit",
        "pthread_exit",
        "longjmp",
        "siglongjmp",
        "_longjmp",
        "__longjmp_chk",
        "_Unwind_Resume",
        "__cxa_throw",
        "__cxa_rethrow",
        "__cxa_bad_cast",
        "__cxa_bad_typeid",
        "__cxa_throw_bad_array_new_length",
        "__cxa_pure_virtual",
        "_ZSt9terminatev",
    ];
    let std_throw = name.starts_with(b"_ZSt") && name.windows(8).any(|w| w == b"__throw_");
    std_throw || NAMES.iter().any(|n| n.as_bytes() == name)
}
