//! Bounds-checked reading of the file header, program headers and notes.

use super::constants as elf;

use super::{ElfError, Segment, TlsSegment};

/// More segments than any linker makes. Addresses are looked up in them one
/// by one.
const MOST_SEGMENTS: usize = 128;
/// More notes than any file has.
const MOST_NOTES: usize = 4096;
/// First address that user space does not have (47 bits).
const HIGHEST: u64 = 1 << 47;

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

pub(super) struct Header {
    pub(super) file_type: u16,
    pub(super) entry: u64,
    program_offset: u64,
    program_count: u16,
}

pub(super) struct Program {
    pub(super) kind: u32,
    pub(super) segment: Segment,
}

pub(super) fn broken(what: &str, at: u64) -> ElfError {
    ElfError::Broken {
        what: what.to_owned(),
        at,
    }
}

/// `len` bytes of `bytes` at `offset`.
pub(super) fn slice<'a>(
    bytes: &'a [u8],
    offset: u64,
    len: u64,
    what: &str,
) -> Result<&'a [u8], ElfError> {
    let end = offset
        .checked_add(len)
        .ok_or_else(|| broken(what, offset))?;
    usize::try_from(offset)
        .ok()
        .zip(usize::try_from(end).ok())
        .and_then(|(start, end)| bytes.get(start..end))
        .ok_or_else(|| broken(what, offset))
}

pub(super) fn u16_at(bytes: &[u8], offset: u64, what: &str) -> Result<u16, ElfError> {
    let b = slice(bytes, offset, 2, what)?;
    Ok(u16::from_le_bytes([b[0], b[1]]))
}

pub(super) fn u32_at(bytes: &[u8], offset: u64, what: &str) -> Result<u32, ElfError> {
    let b = slice(bytes, offset, 4, what)?;
    Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

pub(super) fn u64_at(bytes: &[u8], offset: u64, what: &str) -> Result<u64, ElfError> {
    let b = slice(bytes, offset, 8, what)?;
    Ok(u64::from_le_bytes([
        b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7],
    ]))
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes }
    }

    pub(super) fn header(&self) -> Result<Header, ElfError> {
        let b = self.bytes;
        let foreign = |what: &str| ElfError::Foreign {
            what: what.to_owned(),
        };
        if b.len() < 64 || b[..4] != elf::ELFMAG {
            return Err(foreign("no ELF header"));
        }
        if b[4] != elf::ELFCLASS64 {
            return Err(foreign("a 32-bit file"));
        }
        if b[5] != elf::ELFDATA2LSB {
            return Err(foreign("a big-endian file"));
        }
        let machine = u16_at(b, 18, "e_machine")?;
        if machine != elf::EM_X86_64 {
            return Err(foreign(&format!("machine {machine}")));
        }
        let file_type = u16_at(b, 16, "e_type")?;
        if file_type != elf::ET_DYN && file_type != elf::ET_EXEC {
            return Err(foreign(&format!("file type {file_type}")));
        }
        let entry_size = u16_at(b, 54, "e_phentsize")?;
        if entry_size != 56 {
            return Err(broken("e_phentsize", u64::from(entry_size)));
        }
        Ok(Header {
            file_type,
            entry: u64_at(b, 24, "e_entry")?,
            program_offset: u64_at(b, 32, "e_phoff")?,
            program_count: u16_at(b, 56, "e_phnum")?,
        })
    }

    pub(super) fn program_header_bytes(&self, header: &Header) -> Result<&'a [u8], ElfError> {
        slice(
            self.bytes,
            header.program_offset,
            u64::from(header.program_count) * 56,
            "program headers",
        )
    }

    pub(super) fn program_headers(&self, header: &Header) -> Result<Vec<Program>, ElfError> {
        self.program_header_bytes(header)?
            .chunks_exact(56)
            .map(|entry| {
                Ok(Program {
                    kind: u32_at(entry, 0, "p_type")?,
                    segment: Segment {
                        flags: u32_at(entry, 4, "p_flags")?,
                        offset: u64_at(entry, 8, "p_offset")?,
                        vaddr: u64_at(entry, 16, "p_vaddr")?,
                        file_size: u64_at(entry, 32, "p_filesz")?,
                        mem_size: u64_at(entry, 40, "p_memsz")?,
                        align: u64_at(entry, 48, "p_align")?,
                    },
                })
            })
            .collect()
    }

    /// The build-id in these notes and its address in the image.
    pub(super) fn build_id(
        &self,
        segment: &Segment,
        notes_left: &mut usize,
    ) -> Result<Option<BuildId>, ElfError> {
        let notes = slice(self.bytes, segment.offset, segment.file_size, "PT_NOTE")?;
        let mut at = 0_u64;
        while at + 12 <= notes.len() as u64 {
            *notes_left = notes_left
                .checked_sub(1)
                .ok_or_else(|| broken("the number of notes", segment.offset))?;
            let name_len = u64::from(u32_at(notes, at, "note")?);
            let desc_len = u64::from(u32_at(notes, at + 4, "note")?);
            let kind = u32_at(notes, at + 8, "note")?;
            let desc_at = at + 12 + name_len.next_multiple_of(4);
            if kind == elf::NT_GNU_BUILD_ID
                && slice(notes, at + 12, name_len, "note name")? == b"GNU\0"
            {
                let id = slice(notes, desc_at, desc_len, "build-id")?;
                // Longer ones are not made by any linker.
                return Ok((id.len() <= 64).then(|| BuildId {
                    bytes: id.to_vec(),
                    vaddr: segment.vaddr.wrapping_add(desc_at),
                }));
            }
            at = desc_at + desc_len.next_multiple_of(4);
        }
        Ok(None)
    }
}

pub(super) struct BuildId {
    pub(super) bytes: Vec<u8>,
    pub(super) vaddr: u64,
}

impl Reader<'_> {
    /// How many notes of one file are looked at.
    pub(super) const NOTES: usize = MOST_NOTES;
}

/// Most bytes of thread-local storage of one image, and its largest alignment.
const MOST_TLS: u64 = 64 << 20;

pub(super) fn tls(s: &Segment) -> Result<TlsSegment, ElfError> {
    let align = s.align.max(1);
    if s.file_size > s.mem_size || s.mem_size > MOST_TLS || align > 1 << 16 {
        return Err(broken("PT_TLS", s.mem_size));
    }
    if !align.is_power_of_two() {
        return Err(broken("PT_TLS's alignment", align));
    }
    Ok(TlsSegment {
        vaddr: s.vaddr,
        file_size: s.file_size,
        mem_size: s.mem_size,
        align,
    })
}

/// The segments lie in the file and in user space, ascend without overlap,
/// and stay below 2 GiB altogether.
pub(super) fn check_segments(segments: &[Segment], file_len: u64) -> Result<(), ElfError> {
    if segments.len() > MOST_SEGMENTS {
        return Err(broken("the number of PT_LOAD", segments.len() as u64));
    }
    let mut end = 0_u64;
    for s in segments {
        let fits = s
            .offset
            .checked_add(s.file_size)
            .is_some_and(|e| e <= file_len);
        if s.file_size > s.mem_size || s.file_size > 0 && !fits {
            return Err(broken("PT_LOAD", s.offset));
        }
        if s.vaddr & 0xfff != s.offset & 0xfff && s.file_size > 0 {
            return Err(broken("PT_LOAD's alignment", s.vaddr));
        }
        if s.align != 0 && !s.align.is_power_of_two() {
            return Err(broken("PT_LOAD's alignment", s.align));
        }
        if s.vaddr < end {
            return Err(broken("PT_LOAD's order", s.vaddr));
        }
        end = s
            .vaddr
            .checked_add(s.mem_size)
            .filter(|end| *end <= HIGHEST)
            .ok_or_else(|| broken("PT_LOAD", s.vaddr))?;
    }
    match segments.first() {
        Some(first) if end - first.vaddr <= 1 << 31 => Ok(()),
        Some(_) => Err(broken("an image of more than 2 GiB", end)),
        None => Err(broken("no PT_LOAD", 0)),
    }
}
