//! ELF images as the loader needs them: program headers and what the dynamic
//! section leads to. Section headers are not used (they may be stripped),
//! except to find a symbol in `.symtab`.
//!
//! The bytes come from a container and are not trusted: every offset is
//! checked, every count is bounded by the file's size, and what is not
//! consistent is an [`ElfError`].
//!
//! What it leaves to others: deciding whether an image can be loaded
//! (`load`), finding code (`code`).

pub mod constants;
mod dynamic;
mod read;
mod symtab;
#[cfg(test)]
mod tests;
mod unwind;

use std::collections::HashMap;
use std::sync::Arc;

use constants as elf;
use serde::{Deserialize, Serialize};

pub use dynamic::{Dynamic, RelocationEntry};
use read::Reader;
pub use symtab::symbol_by_prefix;

/// More definitions than any file has of one name: a version each.
const MOST_OF_A_NAME: usize = 64;

/// Why a file is not an image that we can read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum ElfError {
    /// Not ELF, or of another class, byte order or machine.
    #[error("not an ELF file for 64-bit x86-64 Linux: {what}")]
    Foreign {
        /// What differs.
        what: String,
    },
    /// Something points outside of the file or contradicts something else.
    #[error("truncated or inconsistent: {what} at {at:#x}")]
    Broken {
        /// What was read.
        what: String,
        /// Offset or address that did not fit.
        at: u64,
    },
}

/// A segment that is mapped (`PT_LOAD`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Virtual address in the image.
    pub vaddr: u64,
    /// Bytes that come from the file.
    pub file_size: u64,
    /// Bytes in memory; those behind `file_size` are zero.
    pub mem_size: u64,
    /// `PF_R | PF_W | PF_X`.
    pub flags: u32,
    /// What its address must be a multiple of, apart from what `vaddr` is off:
    /// a power of two, or 0 for none.
    pub align: u64,
}

impl Segment {
    /// The segment may be written.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.flags & elf::PF_W != 0
    }

    /// The segment may be executed.
    #[must_use]
    pub fn executable(&self) -> bool {
        self.flags & elf::PF_X != 0
    }
}

/// The initial values of thread-local storage (`PT_TLS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsSegment {
    /// Virtual address in the image.
    pub vaddr: u64,
    /// Bytes that come from the file.
    pub file_size: u64,
    /// Bytes of a block; those behind `file_size` are zero. Not 0.
    pub mem_size: u64,
    /// Alignment of a block: a power of two.
    pub align: u64,
}

/// A dynamic symbol.
#[derive(Debug, Clone)]
pub struct Symbol {
    /// Name.
    pub name: String,
    /// Virtual address in the image (or a TLS offset, or an absolute value).
    pub value: u64,
    /// Bytes.
    pub size: u64,
    /// `STT_…`.
    pub kind: u8,
    /// `STB_…`.
    pub binding: u8,
    /// `STV_…`.
    pub visibility: u8,
    /// Section index; `SHN_UNDEF` for an import.
    pub section: u16,
    /// Version that it is defined with or wants; `None` where there is none.
    pub version: Option<String>,
    /// Index of that version in the file; 0 and 1 stand for none.
    pub version_index: u16,
    /// Only found by references that name the version.
    pub hidden: bool,
}

impl Symbol {
    /// The symbol is an import.
    #[must_use]
    pub fn undefined(&self) -> bool {
        self.section == elf::SHN_UNDEF
    }
}

/// A parsed image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The whole file.
    pub bytes: Arc<[u8]>,
    /// `ET_DYN` or `ET_EXEC`.
    pub file_type: u16,
    /// Entry point.
    pub entry: u64,
    /// Mapped segments, ascending by address.
    pub segments: Vec<Segment>,
    /// `PT_GNU_RELRO`: `(vaddr, bytes)`.
    pub relro: Option<(u64, u64)>,
    /// `PT_TLS`, unless it is empty.
    pub tls: Option<TlsSegment>,
    /// `PT_GNU_EH_FRAME`'s address.
    pub eh_frame_header: Option<u64>,
    /// The program headers as they stand in the file, 56 bytes each.
    pub program_headers: Vec<u8>,
    /// `PT_GNU_STACK` is absent or executable.
    pub executable_stack: bool,
    /// `PT_DYNAMIC`'s address.
    pub dynamic_vaddr: u64,
    /// `PT_DYNAMIC`'s bytes.
    pub dynamic_bytes: u64,
    /// What the dynamic section says.
    pub dynamic: Dynamic,
    /// Dynamic symbols, by index.
    pub symbols: Vec<Symbol>,
    /// Indices of defined symbols, by name.
    pub exports: HashMap<String, Vec<usize>>,
    /// `NT_GNU_BUILD_ID`.
    pub build_id: Option<Vec<u8>>,
    /// Address in the image of the build-id's bytes.
    pub build_id_vaddr: Option<u64>,
}

impl Image {
    /// Reads an image.
    ///
    /// # Errors
    /// Names what is not x86-64 ELF or not consistent.
    pub fn parse(bytes: Arc<[u8]>) -> Result<Image, ElfError> {
        let reader = Reader::new(&bytes);
        let header = reader.header()?;
        let programs = reader.program_headers(&header)?;
        let mut segments = Vec::new();
        let (mut relro, mut tls, mut stack, mut dynamic_range) = (None, None, None, None);
        let mut eh_frame_header = None;
        let (mut build_id, mut notes_left) = (None, Reader::NOTES);
        for p in &programs {
            match p.kind {
                elf::PT_LOAD if p.segment.mem_size > 0 => segments.push(p.segment),
                elf::PT_GNU_RELRO => relro = Some((p.segment.vaddr, p.segment.mem_size)),
                elf::PT_TLS if p.segment.mem_size > 0 => tls = Some(read::tls(&p.segment)?),
                elf::PT_GNU_EH_FRAME => eh_frame_header = Some(p.segment.vaddr),
                elf::PT_GNU_STACK => stack = Some(p.segment.flags),
                elf::PT_DYNAMIC => dynamic_range = Some((p.segment.vaddr, p.segment.file_size)),
                elf::PT_NOTE if build_id.is_none() => {
                    build_id = reader.build_id(&p.segment, &mut notes_left)?;
                }
                _ => {}
            }
        }
        read::check_segments(&segments, bytes.len() as u64)?;
        let view = dynamic::View::new(&bytes, &segments);
        let (dynamic, symbols) = match dynamic_range {
            Some((vaddr, size)) => dynamic::read(&view, vaddr, size)?,
            None => (Dynamic::default(), Vec::new()),
        };
        let mut exports: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, symbol) in symbols.iter().enumerate().skip(1) {
            if symbol.binding == elf::STB_LOCAL || symbol.undefined() && symbol.value == 0 {
                continue;
            }
            let same = exports.entry(symbol.name.clone()).or_default();
            if same.len() == MOST_OF_A_NAME {
                return Err(read::broken(
                    "the number of symbols of one name",
                    symbol.value,
                ));
            }
            same.push(index);
        }
        Ok(Image {
            file_type: header.file_type,
            entry: header.entry,
            segments,
            relro,
            tls,
            eh_frame_header,
            program_headers: reader.program_header_bytes(&header)?.to_vec(),
            executable_stack: stack.is_none_or(|flags| flags & elf::PF_X != 0),
            dynamic_vaddr: dynamic_range.map_or(0, |(vaddr, _)| vaddr),
            dynamic_bytes: dynamic_range.map_or(0, |(_, size)| size),
            dynamic,
            symbols,
            exports,
            build_id_vaddr: build_id.as_ref().map(|id| id.vaddr),
            build_id: build_id.map(|id| id.bytes),
            bytes,
        })
    }

    /// Build-id as lower-case hex, or `""` where there is none.
    #[must_use]
    pub fn build_id_hex(&self) -> String {
        hex(self.build_id.as_deref().unwrap_or_default())
    }

    /// First page boundary at or below the first segment.
    #[must_use]
    pub fn low(&self) -> u64 {
        self.segments.first().map_or(0, |s| s.vaddr & !0xfff)
    }

    /// First page boundary at or above the last segment's end.
    #[must_use]
    pub fn high(&self) -> u64 {
        self.segments
            .last()
            .map_or(0, |s| (s.vaddr + s.mem_size + 0xfff) & !0xfff)
    }

    /// What the address of the image's first page must be a multiple of: at
    /// least a page.
    #[must_use]
    pub fn alignment(&self) -> u64 {
        let largest = self.segments.iter().map(|s| s.align).max();
        largest.unwrap_or(0).max(0x1000)
    }

    /// The bytes in the file that are mapped at `vaddr`.
    #[must_use]
    pub fn at(&self, vaddr: u64, len: u64) -> Option<&[u8]> {
        dynamic::View::new(&self.bytes, &self.segments)
            .bytes(vaddr, len)
            .ok()
    }

    /// Whether `vaddr` lies in a segment that is neither written nor executed.
    #[must_use]
    pub fn read_only(&self, vaddr: u64) -> bool {
        self.segments
            .iter()
            .any(|s| (s.vaddr..s.vaddr + s.file_size).contains(&vaddr) && !s.writable())
    }
}

/// Lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}
