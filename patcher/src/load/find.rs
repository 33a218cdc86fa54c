//! Which of a module's definitions a reference finds.

use crate::elf::constants as c;
use crate::elf::{Image, Symbol};

/// What a reference asks for besides the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted<'a> {
    /// This version, or a definition without any.
    Version(&'a str),
    /// No version, as a relocation of a library that knows of none asks: the
    /// oldest, for which such a library was linked.
    Oldest,
    /// No version, as `dlsym` asks: the default.
    Default,
}

/// The definition that a reference finds in one module, as glibc's
/// `do_lookup_x` and `check_match` have it (`elf/dl-lookup.c`): where the
/// reference names no version, the definition without one or with the file's
/// first, hidden or not; else the default, if there is but one.
/// `jump_slot` says that an executable's own stubs do not count.
pub(super) fn find<'a>(
    image: &'a Image,
    name: &str,
    wanted: Wanted<'_>,
    jump_slot: bool,
) -> Option<&'a Symbol> {
    let mut chosen = None;
    let mut defaults = Vec::new();
    for index in image.exports.get(name)? {
        let symbol = &image.symbols[*index];
        let has_value =
            symbol.value != 0 || symbol.section == c::SHN_ABS || symbol.kind == c::STT_TLS;
        let defines = matches!(
            symbol.kind,
            c::STT_NOTYPE
                | c::STT_OBJECT
                | c::STT_FUNC
                | c::STT_COMMON
                | c::STT_TLS
                | c::STT_GNU_IFUNC
        );
        if !has_value || !defines || jump_slot && symbol.undefined() {
            continue;
        }
        // Indices 0 and 1 are no version, 2 is the first that the file defines.
        let plain = match wanted {
            Wanted::Version(wanted) => match &symbol.version {
                Some(has) => wanted == has,
                None => !symbol.hidden,
            },
            Wanted::Oldest => symbol.version_index <= 2,
            Wanted::Default => symbol.version_index <= 1,
        };
        if plain {
            chosen = Some(symbol);
            break;
        }
        if !matches!(wanted, Wanted::Version(_)) && !symbol.hidden {
            defaults.push(symbol);
        }
    }
    let found = match (chosen, defaults.as_slice()) {
        (Some(symbol), _) | (None, &[symbol]) => symbol,
        _ => return None,
    };
    let local = matches!(found.visibility, c::STV_HIDDEN | c::STV_INTERNAL);
    let global = matches!(
        found.binding,
        c::STB_GLOBAL | c::STB_WEAK | c::STB_GNU_UNIQUE
    );
    (global && !local).then_some(found)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// Compiles a library whose symbols have the versions that `script` says.
    fn library(source: &str, script: &str) -> Image {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (source, script) = (put("a.c", source), put("a.map", script));
        let out = dir.path().join("a.so");
        let done = Command::new("gcc")
            .args(["-shared", "-fPIC", "-nostdlib", "-o"])
            .arg(&out)
            .arg(source)
            .arg(format!("-Wl,--version-script={}", script.display()))
            .status()
            .unwrap();
        assert!(done.success());
        parse(&out)
    }

    fn parse(path: &Path) -> Image {
        Image::parse(std::fs::read(path).unwrap().into()).unwrap()
    }

    const SCRIPT: &str = "V1 { }; V2 { } V1; V3 { } V2;";

    fn version(image: &Image, name: &str, wanted: Wanted<'_>) -> Option<(u16, bool)> {
        find(image, name, wanted, false).map(|s| (s.version_index, s.hidden))
    }

    #[test]
    fn a_reference_without_a_version_finds_the_first_one_even_hidden() {
        let image = library(
            "__asm__(\".symver f1, f@V1\\n.symver f2, f@V2\\n.symver f3, f@@V3\");\
             int f1(void) { return 1; } int f2(void) { return 2; } int f3(void) { return 3; }",
            SCRIPT,
        );
        // 1 is the file's own name.
        assert_eq!(version(&image, "f", Wanted::Oldest), Some((2, true)));
        assert_eq!(version(&image, "f", Wanted::Default), Some((4, false)));
        assert_eq!(version(&image, "f", Wanted::Version("V2")), Some((3, true)));
        assert_eq!(version(&image, "f", Wanted::Version("V9")), None);
    }

    #[test]
    fn a_reference_without_a_version_finds_a_later_default_but_not_a_hidden_one() {
        let image = library(
            "__asm__(\".symver g2, g@V2\\n.symver g3, g@@V3\\n.symver h2, h@V2\");\
             int g2(void) { return 2; } int g3(void) { return 3; } int h2(void) { return 2; }",
            SCRIPT,
        );
        assert_eq!(version(&image, "g", Wanted::Oldest), Some((4, false)));
        assert_eq!(version(&image, "h", Wanted::Oldest), None);
        assert_eq!(version(&image, "h", Wanted::Default), None);
    }

    #[test]
    fn a_file_without_versions_answers_every_reference() {
        let image = library("int f(void) { return 1; }", "{ };");
        for wanted in [
            Wanted::Oldest,
            Wanted::Default,
            Wanted::Version("GLIBC_2.2.5"),
        ] {
            assert!(find(&image, "f", wanted, true).is_some(), "{wanted:?}");
        }
    }
}
