//! The dynamic section: dependencies, symbols with versions, relocations,
//! initialisers. Addresses in it are virtual addresses in the image.

use std::cell::Cell;
use std::collections::HashMap;

use super::constants as elf;

use super::read::{broken, slice, u16_at, u32_at, u64_at};
use super::{ElfError, Segment, Symbol};

/// More symbols, and more relocations, than any real image has: bounds on
/// what a hostile one costs.
const MOST: u64 = 1 << 22;
/// More versions, defined or needed, than any real image has.
const MOST_VERSIONS: u64 = 1 << 14;

/// A file seen through its mapped addresses.
pub(super) struct View<'a> {
    bytes: &'a [u8],
    segments: &'a [Segment],
}

impl<'a> View<'a> {
    pub(super) fn new(bytes: &'a [u8], segments: &'a [Segment]) -> View<'a> {
        View { bytes, segments }
    }

    fn rest(&self, vaddr: u64) -> Result<&'a [u8], ElfError> {
        let segment = self
            .segments
            .iter()
            .find(|s| (s.vaddr..s.vaddr.saturating_add(s.file_size)).contains(&vaddr))
            .ok_or_else(|| broken("an address outside of the file", vaddr))?;
        let skip = vaddr - segment.vaddr;
        slice(
            self.bytes,
            segment.offset + skip,
            segment.file_size - skip,
            "a segment",
        )
    }

    pub(super) fn bytes(&self, vaddr: u64, len: u64) -> Result<&'a [u8], ElfError> {
        slice(
            self.rest(vaddr)?,
            0,
            len,
            "an address range outside of the file",
        )
        .map_err(|_| broken("a table", vaddr))
    }
}

/// The string table. Names may overlap in it and many symbols may share one,
/// so that a small file could ask for any amount of memory: all names that
/// are read together are bounded by the file's own size, which those of a
/// real file stay below.
struct Names<'a> {
    table: Option<&'a [u8]>,
    left: Cell<u64>,
}

impl<'a> Names<'a> {
    fn new(view: &View<'a>, table: Option<u64>) -> Result<Names<'a>, ElfError> {
        Ok(Names {
            table: table.map(|at| view.rest(at)).transpose()?,
            left: Cell::new((1 << 20) + 2 * view.bytes.len() as u64),
        })
    }

    fn at(&self, offset: u64) -> Result<String, ElfError> {
        let table = self.table.ok_or_else(|| broken("DT_STRTAB", 0))?;
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| table.get(offset..))
            .ok_or_else(|| broken("a name", offset))?;
        let most = rest
            .len()
            .min(usize::try_from(self.left.get()).unwrap_or(usize::MAX));
        let len = rest[..most]
            .iter()
            .position(|b| *b == 0)
            .ok_or_else(|| broken("a name, or the length of all", offset))?;
        self.take(len)?;
        Ok(String::from_utf8_lossy(&rest[..len]).into_owned())
    }

    /// Counts a copy of `len` bytes.
    fn take(&self, len: usize) -> Result<(), ElfError> {
        let left = self.left.get().checked_sub(len as u64);
        self.left
            .set(left.ok_or_else(|| broken("the length of all names", len as u64))?);
        Ok(())
    }
}

/// One relocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelocationEntry {
    /// Address in the image that is changed.
    pub offset: u64,
    /// `R_X86_64_…`.
    pub kind: u32,
    /// Index into the dynamic symbols.
    pub symbol: u32,
    /// Added to the symbol's address; `None` for RELR, whose addend is in place.
    pub addend: Option<i64>,
    /// From the PLT's table.
    pub plt: bool,
}

/// What the dynamic section says.
#[derive(Debug, Clone, Default)]
pub struct Dynamic {
    /// `DT_SONAME`.
    pub soname: Option<String>,
    /// `DT_NEEDED`, in order.
    pub needed: Vec<String>,
    /// Relocations in the order in which ld.so applies them.
    pub relocations: Vec<RelocationEntry>,
    /// `DT_INIT`.
    pub init: Option<u64>,
    /// `DT_INIT_ARRAY`: `(address, bytes)`.
    pub init_array: Option<(u64, u64)>,
    /// `DT_FINI`.
    pub fini: Option<u64>,
    /// `DT_FINI_ARRAY`: `(address, bytes)`.
    pub fini_array: Option<(u64, u64)>,
    /// `DT_SYMTAB`.
    pub symbol_table: Option<u64>,
    /// `DT_STRTAB`.
    pub string_table: Option<u64>,
    /// `DT_STRSZ`, in bytes.
    pub string_table_size: Option<u64>,
    /// `DT_VERSYM`.
    pub symbol_versions: Option<u64>,
    /// `DT_VERDEF` and its number of entries.
    pub version_definitions: Option<(u64, u64)>,
    /// `DT_SYMBOLIC` or `DF_SYMBOLIC`.
    pub symbolic: bool,
    /// `DT_TEXTREL` or `DF_TEXTREL`.
    pub text_relocations: bool,
    /// `DF_STATIC_TLS`.
    pub static_tls: bool,
    /// Address of the `DT_DEBUG` entry's value.
    pub debug_slot: Option<u64>,
}

/// Reads the dynamic section at `vaddr`.
pub(super) fn read(
    view: &View<'_>,
    vaddr: u64,
    size: u64,
) -> Result<(Dynamic, Vec<Symbol>), ElfError> {
    let table = view.bytes(vaddr, size)?;
    let mut tags: HashMap<i64, u64> = HashMap::new();
    let mut needed = Vec::new();
    let mut debug_slot = None;
    for (index, entry) in table.chunks_exact(16).enumerate() {
        let tag = u64_at(entry, 0, "d_tag")? as i64;
        let value = u64_at(entry, 8, "d_val")?;
        match tag {
            elf::DT_NULL => break,
            elf::DT_NEEDED => needed.push(value),
            elf::DT_DEBUG => debug_slot = Some(vaddr + index as u64 * 16 + 8),
            _ => {
                tags.insert(tag, value);
            }
        }
    }
    let tag = |t: i64| tags.get(&t).copied();
    let names = Names::new(view, tag(elf::DT_STRTAB))?;
    let flags = tag(elf::DT_FLAGS).unwrap_or(0);
    let mut dynamic = Dynamic {
        soname: tag(elf::DT_SONAME).map(|at| names.at(at)).transpose()?,
        needed: needed
            .into_iter()
            .map(|at| names.at(at))
            .collect::<Result<_, _>>()?,
        relocations: Vec::new(),
        init: tag(elf::DT_INIT).filter(|a| *a != 0),
        init_array: tag(elf::DT_INIT_ARRAY)
            .zip(tag(elf::DT_INIT_ARRAYSZ))
            .filter(|(_, len)| *len != 0),
        fini: tag(elf::DT_FINI).filter(|a| *a != 0),
        fini_array: tag(elf::DT_FINI_ARRAY)
            .zip(tag(elf::DT_FINI_ARRAYSZ))
            .filter(|(_, len)| *len != 0),
        symbol_table: tag(elf::DT_SYMTAB),
        string_table: tag(elf::DT_STRTAB),
        string_table_size: tag(elf::DT_STRSZ),
        symbol_versions: tag(elf::DT_VERSYM),
        version_definitions: tag(elf::DT_VERDEF).zip(tag(elf::DT_VERDEFNUM)),
        symbolic: tags.contains_key(&elf::DT_SYMBOLIC) || flags & elf::DF_SYMBOLIC != 0,
        text_relocations: tags.contains_key(&elf::DT_TEXTREL) || flags & elf::DF_TEXTREL != 0,
        static_tls: flags & elf::DF_STATIC_TLS != 0,
        debug_slot,
    };
    if let Some((relr, len)) = tag(elf::DT_RELR)
        .zip(tag(elf::DT_RELRSZ))
        .filter(|(_, len)| *len != 0)
    {
        // One relocation per word; its addend is there, so it is in the file.
        let words = view.segments.iter().map(|s| s.file_size / 8).sum::<u64>();
        read_relr(view.bytes(relr, len)?, words, &mut dynamic.relocations)?;
    }
    if tags.contains_key(&elf::DT_REL)
        || tag(elf::DT_PLTREL).is_some_and(|kind| kind as i64 != elf::DT_RELA)
    {
        return Err(broken("relocations without addends", 0));
    }
    for (table, len, plt) in [
        (elf::DT_RELA, elf::DT_RELASZ, false),
        (elf::DT_JMPREL, elf::DT_PLTRELSZ, true),
    ] {
        if let Some((table, len)) = tag(table).zip(tag(len)).filter(|(_, len)| *len != 0) {
            if dynamic.relocations.len() as u64 + len / 24 > MOST {
                return Err(broken("the number of relocations", len / 24));
            }
            for entry in view.bytes(table, len)?.chunks_exact(24) {
                let info = u64_at(entry, 8, "r_info")?;
                dynamic.relocations.push(RelocationEntry {
                    offset: u64_at(entry, 0, "r_offset")?,
                    kind: info as u32,
                    symbol: (info >> 32) as u32,
                    addend: Some(u64_at(entry, 16, "r_addend")? as i64),
                    plt,
                });
            }
        }
    }
    let symbols = match tag(elf::DT_SYMTAB) {
        Some(base) => read_symbols(view, base, &tags, &dynamic, &names)?,
        None => Vec::new(),
    };
    Ok((dynamic, symbols))
}

/// `DT_RELR`: an even entry is an address, an odd one a bitmap of the 63
/// words behind the last address (generic ABI, "Relative relocation table").
fn read_relr(table: &[u8], words: u64, out: &mut Vec<RelocationEntry>) -> Result<(), ElfError> {
    let most = words.min(MOST);
    let mut push = |offset: u64| {
        if out.len() as u64 >= most {
            return Err(broken("the number of relocations", offset));
        }
        out.push(RelocationEntry {
            offset,
            kind: elf::R_X86_64_RELATIVE,
            symbol: 0,
            addend: None,
            plt: false,
        });
        Ok(())
    };
    let mut next = 0_u64;
    for entry in table.chunks_exact(8) {
        let entry = u64_at(entry, 0, "DT_RELR")?;
        if entry & 1 == 0 {
            push(entry)?;
            next = entry
                .checked_add(8)
                .ok_or_else(|| broken("DT_RELR", entry))?;
        } else {
            for bit in 0..63 {
                if entry >> (bit + 1) & 1 != 0 {
                    push(
                        next.checked_add(bit * 8)
                            .ok_or_else(|| broken("DT_RELR", next))?,
                    )?;
                }
            }
            next = next
                .checked_add(63 * 8)
                .ok_or_else(|| broken("DT_RELR", next))?;
        }
    }
    Ok(())
}

fn read_symbols(
    view: &View<'_>,
    base: u64,
    tags: &HashMap<i64, u64>,
    dynamic: &Dynamic,
    names: &Names<'_>,
) -> Result<Vec<Symbol>, ElfError> {
    let mut count = match (tags.get(&elf::DT_HASH), tags.get(&elf::DT_GNU_HASH)) {
        (Some(hash), _) => u64::from(u32_at(view.bytes(*hash, 8)?, 4, "DT_HASH")?),
        (None, Some(hash)) => gnu_hash_count(view, *hash)?,
        (None, None) => 0,
    };
    // A hash table leaves out imports that lie behind all exports or, where
    // there is no export, everything.
    for r in &dynamic.relocations {
        count = count.max(u64::from(r.symbol) + 1);
    }
    if count > MOST {
        return Err(broken("the number of symbols", count));
    }
    let table = view.bytes(base, count * 24)?;
    let versions = tags
        .get(&elf::DT_VERSYM)
        .map(|at| view.bytes(*at, count * 2))
        .transpose()?;
    let version_names = read_versions(view, tags, names)?;
    let mut symbols = Vec::with_capacity(count as usize);
    for (index, entry) in table.chunks_exact(24).enumerate() {
        let version = match versions {
            Some(table) => u16_at(table, index as u64 * 2, "DT_VERSYM")?,
            None => 1,
        };
        let (info, other) = (entry[4], entry[5]);
        let version_name = version_names.get(&(version & 0x7fff)).cloned();
        names.take(version_name.as_ref().map_or(0, String::len))?;
        symbols.push(Symbol {
            name: names.at(u64::from(u32_at(entry, 0, "st_name")?))?,
            value: u64_at(entry, 8, "st_value")?,
            size: u64_at(entry, 16, "st_size")?,
            kind: info & 0xf,
            binding: info >> 4,
            visibility: other & 3,
            section: u16_at(entry, 6, "st_shndx")?,
            version: version_name,
            version_index: version & 0x7fff,
            hidden: version & 0x8000 != 0,
        });
    }
    Ok(symbols)
}

fn gnu_hash_count(view: &View<'_>, at: u64) -> Result<u64, ElfError> {
    let head = view.bytes(at, 16)?;
    let buckets = u64::from(u32_at(head, 0, "DT_GNU_HASH")?);
    let first = u64::from(u32_at(head, 4, "DT_GNU_HASH")?);
    let blooms = u64::from(u32_at(head, 8, "DT_GNU_HASH")?);
    let buckets_at = at + 16 + blooms * 8;
    let chains_at = buckets_at + buckets * 4;
    let mut last = 0_u64;
    for bucket in view.bytes(buckets_at, buckets * 4)?.chunks_exact(4) {
        last = last.max(u64::from(u32_at(bucket, 0, "a hash bucket")?));
    }
    if last < first {
        return Ok(first);
    }
    while last < MOST {
        let chain = view.bytes(chains_at + (last - first) * 4, 4)?;
        if chain[0] & 1 != 0 {
            return Ok(last + 1);
        }
        last += 1;
    }
    Err(broken("DT_GNU_HASH's chains", at))
}

/// Version names by index, from `DT_VERDEF` and `DT_VERNEED`. The base
/// definition (the file's own name) is left out: it means "no version".
fn read_versions(
    view: &View<'_>,
    tags: &HashMap<i64, u64>,
    names: &Names<'_>,
) -> Result<HashMap<u16, String>, ElfError> {
    let mut found = HashMap::new();
    // Chains may meet again: what is bounded is the walk.
    let mut left = MOST_VERSIONS;
    let mut step = |at: u64| {
        left = left
            .checked_sub(1)
            .ok_or_else(|| broken("the number of versions", at))?;
        Ok(())
    };
    if let Some((mut at, count)) = tags
        .get(&elf::DT_VERDEF)
        .copied()
        .zip(tags.get(&elf::DT_VERDEFNUM))
    {
        for _ in 0..*count {
            step(at)?;
            let d = view.bytes(at, 20)?;
            let flags = u16_at(d, 2, "vd_flags")?;
            let index = u16_at(d, 4, "vd_ndx")?;
            let aux = at + u64::from(u32_at(d, 12, "vd_aux")?);
            if flags & 1 == 0 {
                found.insert(
                    index,
                    names.at(u64::from(u32_at(view.bytes(aux, 8)?, 0, "vda_name")?))?,
                );
            }
            let next = u64::from(u32_at(d, 16, "vd_next")?);
            if next == 0 {
                break;
            }
            at += next;
        }
    }
    if let Some((mut at, count)) = tags
        .get(&elf::DT_VERNEED)
        .copied()
        .zip(tags.get(&elf::DT_VERNEEDNUM))
    {
        for _ in 0..*count {
            step(at)?;
            let n = view.bytes(at, 16)?;
            let mut aux_at = at + u64::from(u32_at(n, 8, "vn_aux")?);
            for _ in 0..u16_at(n, 2, "vn_cnt")? {
                step(aux_at)?;
                let aux = view.bytes(aux_at, 16)?;
                found.insert(
                    u16_at(aux, 6, "vna_other")? & 0x7fff,
                    names.at(u64::from(u32_at(aux, 8, "vna_name")?))?,
                );
                let next = u64::from(u32_at(aux, 12, "vna_next")?);
                if next == 0 {
                    break;
                }
                aux_at += next;
            }
            let next = u64::from(u32_at(n, 12, "vn_next")?);
            if next == 0 {
                break;
            }
            at += next;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relr_bitmaps_cover_the_words_behind_the_last_address() {
        let mut table = Vec::new();
        for entry in [0x1000_u64, 0b101 << 1 | 1, 1 | 1 << 63, 0x9000] {
            table.extend(entry.to_le_bytes());
        }
        let mut out = Vec::new();
        read_relr(&table, 100, &mut out).unwrap();
        let offsets: Vec<u64> = out.iter().map(|r| r.offset).collect();
        assert_eq!(
            offsets,
            [0x1000, 0x1008, 0x1018, 0x1008 + 63 * 8 + 62 * 8, 0x9000]
        );
    }
}
