//! The caller's library as its file: segments, relocations, symbols.
//!
//! Read through the program headers and the dynamic section, which every
//! loadable object has. Section headers, where they are, only sharpen the
//! view: they tell code from data within a segment, and hold `.symtab`.

mod dynamic;

use std::collections::HashSet;
use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};

use super::CodeError;

/// Largest file that is analysed, in bytes.
const MAX_FILE: usize = 1 << 30;
/// Images lie in the lower half of the address space, so that sums of an
/// address and a small length don't overflow.
const MAX_ADDRESS: u64 = 1 << 47;
/// Most relocations and symbols that are read.
const MAX_TABLE: usize = 1 << 22;
/// Longest name that a function may have, in bytes without terminator.
const MAX_NAME: usize = 255;

/// What a relocation stores at its place once the library is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// The address of something in this image.
    Address(u64),
    /// The address of a symbol that another object defines.
    Import,
    /// Something else (a TLS offset, a size, a resolver's result).
    Other,
}

/// A function-like symbol.
#[derive(Debug, Clone)]
pub(super) struct Symbol {
    pub(super) name: String,
    pub(super) at: u64,
    pub(super) size: u64,
    /// In `.dynsym`, so that other objects may call it.
    pub(super) exported: bool,
}

struct Segment {
    start: u64,
    /// End of what the file holds of it (the rest is zero).
    end: u64,
    offset: usize,
    flags: elf::ProgramFlags,
}

pub(super) struct Image {
    data: Vec<u8>,
    segments: Vec<Segment>,
    /// Executable ranges, ascending, disjoint.
    code: Vec<(u64, u64)>,
    relro: (u64, u64),
    /// By place, ascending.
    stored: Vec<(u64, Stored)>,
    pub(super) symbols: Vec<Symbol>,
    /// Places that hold the address of an import that does not return.
    noreturn: HashSet<u64>,
    eh_frame: Option<(u64, u64)>,
}

fn malformed(what: &'static str) -> CodeError {
    CodeError::Malformed { what }
}

impl Image {
    pub(super) fn parse(file: &[u8]) -> Result<Image, CodeError> {
        Image::parse_as(file, false)
    }

    /// Reads a library or, with `executable`, an executable, which may also be
    /// one that lies at fixed addresses.
    pub(super) fn parse_as(file: &[u8], executable: bool) -> Result<Image, CodeError> {
        if file.len() > MAX_FILE {
            return Err(CodeError::TooLarge {
                what: "file",
                size: file.len() as u64,
                limit: MAX_FILE as u64,
            });
        }
        let header = elf::FileHeader64::<LE>::parse(file).map_err(|_| CodeError::NotElf)?;
        let endian = header.endian().map_err(|_| CodeError::NotElf)?;
        if header.e_machine(endian) != elf::EM_X86_64 {
            return Err(CodeError::NotX86_64);
        }
        let kind = header.e_type(endian);
        if kind != elf::ET_DYN && !(executable && kind == elf::ET_EXEC) {
            return Err(CodeError::NotSharedObject);
        }
        let programs = header
            .program_headers(endian, file)
            .map_err(|_| malformed("program headers"))?;
        let mut image = Image {
            data: Vec::new(),
            segments: Vec::new(),
            code: Vec::new(),
            relro: (0, 0),
            stored: Vec::new(),
            symbols: Vec::new(),
            noreturn: HashSet::new(),
            eh_frame: None,
        };
        let mut dynamic = None;
        let mut eh_frame_hdr = None;
        for program in programs {
            let start = program.p_vaddr(endian);
            let size = program.p_filesz(endian);
            let range = (start, start.checked_add(size).ok_or(malformed("segment"))?);
            match program.p_type(endian) {
                elf::PT_LOAD => {
                    let offset = usize::try_from(program.p_offset(endian))
                        .map_err(|_| malformed("segment"))?;
                    let bytes = usize::try_from(size).map_err(|_| malformed("segment"))?;
                    let outside = offset.checked_add(bytes).is_none_or(|end| end > file.len());
                    if outside || range.1 > MAX_ADDRESS {
                        return Err(malformed("segment"));
                    }
                    image.segments.push(Segment {
                        start,
                        end: range.1,
                        offset,
                        flags: program.p_flags(endian),
                    });
                }
                elf::PT_DYNAMIC => dynamic = Some(range),
                elf::PT_GNU_EH_FRAME => eh_frame_hdr = Some(range),
                elf::PT_GNU_RELRO => {
                    image.relro = (start, start.saturating_add(program.p_memsz(endian)));
                }
                _ => {}
            }
        }
        image.segments.sort_by_key(|s| s.start);
        if image.segments.windows(2).any(|w| w[0].end > w[1].start) {
            return Err(malformed("segments overlap"));
        }
        image.data = file.to_vec();
        image.read_sections(header);
        image.read_dynamic(dynamic)?;
        image.stored.sort_by_key(|s| s.0);
        if image.eh_frame.is_none()
            && let Some((start, end)) = eh_frame_hdr
        {
            image.eh_frame = image.eh_frame_from_header(start, end);
        }
        if image.code.is_empty() {
            return Err(CodeError::NoCode);
        }
        Ok(image)
    }

    /// What section headers tell: where code is, and `.symtab`.
    /// They are optional: broken ones count as none.
    fn read_sections(&mut self, header: &elf::FileHeader64<LE>) {
        let data = std::mem::take(&mut self.data);
        let mut code = Vec::new();
        if let Ok(sections) = header.sections(LE, data.as_slice()) {
            for section in sections.iter() {
                let start = section.sh_addr(LE);
                let Some(end) = start.checked_add(section.sh_size(LE)) else {
                    continue;
                };
                let flags = section.sh_flags(LE);
                if flags.contains(elf::SHF_EXECINSTR) && flags.contains(elf::SHF_ALLOC) {
                    code.push((start, end));
                }
                if sections.section_name(LE, section).ok() == Some(b".eh_frame") {
                    self.eh_frame = Some((start, end));
                }
            }
            if let Ok(symbols) = sections.symbols(LE, data.as_slice(), elf::SHT_SYMTAB) {
                let strings = symbols.strings();
                for symbol in symbols.iter().take(MAX_TABLE) {
                    if let Some(name) = function_symbol(symbol)
                        .then(|| strings.get(symbol.st_name.get(LE)).ok())
                        .flatten()
                    {
                        self.symbols.push(Symbol {
                            name: String::from_utf8_lossy(name).into_owned(),
                            at: symbol.st_value.get(LE),
                            size: symbol.st_size.get(LE),
                            exported: false,
                        });
                    }
                }
            }
        }
        self.data = data;
        let executable: Vec<_> = self
            .segments
            .iter()
            .filter(|s| s.flags.contains(elf::PF_X))
            .map(|s| (s.start, s.end))
            .collect();
        // Sections are believed only where a segment confirms them.
        code.retain(|&(start, end)| {
            start < end && executable.iter().any(|&(s, e)| s <= start && end <= e)
        });
        code.sort_unstable();
        let mut last = 0;
        code.retain(|&(start, end)| {
            let fits = start >= last;
            if fits {
                last = end;
            }
            fits
        });
        self.code = if code.is_empty() { executable } else { code };
    }

    /// `.eh_frame` through `PT_GNU_EH_FRAME`, for files without sections:
    /// it ends at its zero terminator or with its segment.
    fn eh_frame_from_header(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let bytes = self.bytes(start, end)?;
        let bases = gimli::BaseAddresses::default().set_eh_frame_hdr(start);
        let header = gimli::EhFrameHdr::new(bytes, gimli::LittleEndian)
            .parse(&bases, 8)
            .ok()?;
        let gimli::Pointer::Direct(at) = header.eh_frame_ptr() else {
            return None;
        };
        let segment = self.segment(at)?;
        Some((at, segment.end))
    }

    fn segment(&self, at: u64) -> Option<&Segment> {
        let index = self.segments.partition_point(|s| s.start <= at);
        let segment = self.segments.get(index.checked_sub(1)?)?;
        (at < segment.end).then_some(segment)
    }

    /// The file's bytes of `start..end`, if they lie in one segment.
    pub(super) fn bytes(&self, start: u64, end: u64) -> Option<&[u8]> {
        if start >= end {
            return None;
        }
        let segment = self.segment(start)?;
        if end > segment.end {
            return None;
        }
        let from = segment.offset + usize::try_from(start - segment.start).ok()?;
        let to = segment.offset + usize::try_from(end - segment.start).ok()?;
        self.data.get(from..to)
    }

    /// The file's bytes from `at` to the end of its segment.
    pub(super) fn bytes_from(&self, at: u64) -> Option<&[u8]> {
        self.bytes(at, self.segment(at)?.end)
    }

    pub(super) fn u32_at(&self, at: u64) -> Option<u32> {
        let bytes = self.bytes(at, at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    pub(super) fn u64_at(&self, at: u64) -> Option<u64> {
        let bytes = self.bytes(at, at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    fn c_string(&self, at: u64, limit: usize) -> Option<&[u8]> {
        let bytes = self.bytes_from(at)?;
        let bytes = &bytes[..bytes.len().min(limit + 1)];
        bytes
            .split(|&b| b == 0)
            .next()
            .filter(|s| s.len() < bytes.len())
    }

    /// From the first to behind the last address that the file holds.
    pub(super) fn span(&self) -> Range<u64> {
        let start = self.segments.first().map_or(0, |s| s.start);
        start..self.segments.last().map_or(0, |s| s.end)
    }

    /// Executable ranges, ascending and disjoint.
    pub(super) fn code(&self) -> &[(u64, u64)] {
        &self.code
    }

    /// The executable range that holds `at`.
    pub(super) fn code_range(&self, at: u64) -> Option<(u64, u64)> {
        let index = self.code.partition_point(|c| c.0 <= at);
        let range = *self.code.get(index.checked_sub(1)?)?;
        (at < range.1).then_some(range)
    }

    pub(super) fn is_code(&self, at: u64) -> bool {
        self.code_range(at).is_some()
    }

    /// Whether `at` lies where nobody writes and nothing executes. (With
    /// `-z noseparate-code` that can be beside the code, in its segment.)
    pub(super) fn is_constant(&self, at: u64) -> bool {
        self.segment(at)
            .is_some_and(|s| !s.flags.contains(elf::PF_W))
            && !self.is_code(at)
    }

    /// Whether `at` is sealed against writes after relocation.
    pub(super) fn is_relro(&self, at: u64) -> bool {
        (self.relro.0..self.relro.1).contains(&at)
    }

    /// What a relocation stores at exactly `at`.
    pub(super) fn stored(&self, at: u64) -> Option<Stored> {
        let index = self.stored.binary_search_by_key(&at, |s| s.0).ok()?;
        Some(self.stored[index].1)
    }

    /// Relocations whose place lies in `start..end`, ascending.
    pub(super) fn stored_in(&self, start: u64, end: u64) -> &[(u64, Stored)] {
        let from = self.stored.partition_point(|s| s.0 < start);
        let to = self.stored.partition_point(|s| s.0 < end);
        self.stored.get(from..to).unwrap_or_default()
    }

    /// All relocations by place.
    pub(super) fn all_stored(&self) -> &[(u64, Stored)] {
        &self.stored
    }

    /// Whether the pointer at `at` is to an import that does not return.
    pub(super) fn is_noreturn(&self, at: u64) -> bool {
        self.noreturn.contains(&at)
    }

    /// The constant name at `at`: NUL-terminated and printable.
    pub(super) fn name_at(&self, at: u64) -> Option<&str> {
        if !self.is_constant(at) {
            return None;
        }
        let text = self.c_string(at, MAX_NAME)?;
        let printable = !text.is_empty() && text.iter().all(|b| (0x20..0x7f).contains(b));
        printable.then(|| std::str::from_utf8(text).ok()).flatten()
    }

    /// Address range of `.eh_frame`.
    pub(super) fn eh_frame(&self) -> Option<(u64, u64)> {
        self.eh_frame
    }
}

fn function_symbol(symbol: &elf::Sym64<LE>) -> bool {
    let kind = symbol.st_type();
    symbol.st_shndx.get(LE) != elf::SHN_UNDEF
        && symbol.st_value.get(LE) != 0
        && (kind == elf::STT_FUNC || kind == elf::STT_NOTYPE || kind == elf::STT_GNU_IFUNC)
}
