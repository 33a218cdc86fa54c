//! Symbols of which a process has one only (`STB_GNU_UNIQUE`): variables in
//! C++ templates and inline functions, mostly.
//!
//! ld.so keeps a table of them by name alone. The first relocation for which
//! look-up ends at such a definition enters it, and every later one gets what
//! is entered, whatever version it names or library its own look-up found
//! (glibc's `do_lookup_unique`, `elf/dl-lookup.c`). So the order in which
//! objects are relocated counts: each behind what it needs.

use std::collections::HashMap;

use crate::elf::Symbol;
use crate::elf::constants as c;

/// The table: for each name a provider's number and its definition.
#[derive(Debug, Default)]
pub(super) struct Unique(HashMap<String, (usize, Symbol)>);

impl Unique {
    /// Enters what a relocation's look-up found, unless the name is taken.
    pub(super) fn enter(&mut self, provider: usize, found: &Symbol) {
        if found.binding == c::STB_GNU_UNIQUE && !self.0.contains_key(&found.name) {
            self.0.insert(found.name.clone(), (provider, found.clone()));
        }
    }

    /// What a reference gets whose look-up found this.
    pub(super) fn chosen<'a>(&'a self, provider: usize, found: &'a Symbol) -> (usize, &'a Symbol) {
        if found.binding != c::STB_GNU_UNIQUE {
            return (provider, found);
        }
        match self.0.get(&found.name) {
            Some((provider, entered)) => (*provider, entered),
            None => (provider, found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(binding: u8, value: u64, version: &str) -> Symbol {
        Symbol {
            name: "cache".into(),
            value,
            size: 8,
            kind: c::STT_OBJECT,
            binding,
            visibility: c::STV_DEFAULT,
            section: 1,
            version: Some(version.into()),
            version_index: 2,
            hidden: false,
        }
    }

    #[test]
    fn the_first_definition_counts_for_all_versions() {
        let (first, second) = (
            symbol(c::STB_GNU_UNIQUE, 1, "V1"),
            symbol(c::STB_GNU_UNIQUE, 2, "V2"),
        );
        let mut unique = Unique::default();
        assert_eq!(unique.chosen(7, &second).0, 7);
        unique.enter(5, &first);
        unique.enter(7, &second);
        for (provider, found) in [(5, &first), (7, &second)] {
            let (provider, chosen) = unique.chosen(provider, found);
            assert_eq!((provider, chosen.value), (5, 1));
        }
    }

    #[test]
    fn other_symbols_of_the_name_are_as_they_were_found() {
        let other = symbol(c::STB_GLOBAL, 3, "V3");
        let mut unique = Unique::default();
        unique.enter(4, &other);
        unique.enter(5, &symbol(c::STB_GNU_UNIQUE, 1, "V1"));
        let (provider, chosen) = unique.chosen(4, &other);
        assert_eq!((provider, chosen.value), (4, 3));
    }
}
