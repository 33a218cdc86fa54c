//! `.symtab`, which only needs to be there for the worker's own routine.

use object::read::elf::ElfFile64;
use object::{Object as _, ObjectSymbol as _};

/// Addresses (in the image) of the functions in `.symtab` whose name starts
/// with `prefix`. Empty if the file is stripped or not readable.
#[must_use]
pub fn symbol_by_prefix(bytes: &[u8], prefix: &str) -> Vec<u64> {
    let Ok(file) = ElfFile64::<object::Endianness>::parse(bytes) else {
        return Vec::new();
    };
    let mut found: Vec<u64> = file
        .symbols()
        .filter(|s| s.is_definition() && s.kind() == object::SymbolKind::Text)
        // Clones that the compiler made (`.cold`, `.part.0`) are not the routine.
        .filter(|s| {
            s.name()
                .is_ok_and(|name| name.starts_with(prefix) && !name.contains('.'))
        })
        .map(|s| s.address())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}
