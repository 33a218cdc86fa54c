//! The smallest shared object around some code.

/// Where the code lies.
pub(super) const TEXT: u64 = 0x4000;
/// `"Bar"`, in memory that is never written.
pub(super) const BAR: u64 = 0x1000;
/// `"failed"`, likewise.
pub(super) const FAILED: u64 = 0x1008;
/// Four-byte aligned space for a jump table, likewise.
pub(super) const TABLE: u64 = 0x1010;

/// A function: name, offset in the code, size.
pub(super) type Function<'a> = (&'a str, u64, u64);

/// Code at [`TEXT`] with exported functions, and 32-bit words at [`TABLE`].
pub(crate) fn library(code: &[u8], functions: &[Function<'_>], table: &[i32]) -> Vec<u8> {
    let mut file = vec![0_u8; TEXT as usize + code.len()];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = at as usize;
        file[at..at + bytes.len()].copy_from_slice(bytes);
    };
    // The header: ELF64, little-endian, ET_DYN, EM_X86_64, 4 program headers.
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[3, 0, 62, 0, 1]);
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 4, 0, 64, 0]);
    let headers: [(u32, u32, u64, u64); 4] = [
        (1, 4, 0, 0x2000),               // PT_LOAD R
        (1, 5, TEXT, code.len() as u64), // PT_LOAD R E
        (1, 6, 0x3000, 0x1000),          // PT_LOAD RW
        (2, 6, 0x3000, 0x100),           // PT_DYNAMIC
    ];
    for (index, (kind, flags, start, size)) in headers.into_iter().enumerate() {
        let at = 64 + 56 * index as u64;
        put(at, &kind.to_le_bytes());
        put(at + 4, &flags.to_le_bytes());
        for (offset, value) in [(8, start), (16, start), (24, start), (32, size), (40, size)] {
            put(at + offset, &value.to_le_bytes());
        }
    }
    put(BAR, b"Bar\0");
    put(FAILED, b"failed\0");
    for (index, entry) in table.iter().enumerate() {
        put(TABLE + 4 * index as u64, &entry.to_le_bytes());
    }
    put(TEXT, code);
    let (symtab, strtab, hash) = (0x400_u64, 0x800_u64, 0xc00_u64);
    let mut name = 1_u64;
    for (index, (text, offset, size)) in functions.iter().enumerate() {
        let at = symtab + 24 * (index as u64 + 1);
        put(at, &(name as u32).to_le_bytes());
        put(at + 4, &[0x12, 0, 1, 0]); // GLOBAL FUNC, section 1
        put(at + 8, &(TEXT + offset).to_le_bytes());
        put(at + 16, &size.to_le_bytes());
        put(strtab + name, text.as_bytes());
        name += text.len() as u64 + 1;
    }
    put(hash + 4, &(functions.len() as u32 + 1).to_le_bytes());
    for (index, (tag, value)) in [(5_u64, strtab), (6, symtab), (4, hash)]
        .into_iter()
        .enumerate()
    {
        put(0x3000 + 16 * index as u64, &tag.to_le_bytes());
        put(0x3008 + 16 * index as u64, &value.to_le_bytes());
    }
    file
}
