//! The caller's sites, found in real code: gcc and clang over the matrix of
//! options that must work, stripped or not.

#[path = "code/build.rs"]
mod build;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use build::{Build, compile, matrix};
use nightgraft_patcher::code::{CodeMap, Site, SiteKind, Tail, WindowKind, analyse};
use tempfile::TempDir;

/// The names that `caller.c` passes to the RPC, each at one place.
const NAMES: [&str; 31] = [
    "AlignedFrame",
    "CaseFour",
    "CaseOne",
    "CaseTwo",
    "CaseZero",
    "EmptyInput",
    "Four",
    "FromStack",
    "Global",
    "GlobalTail",
    "InColdPart",
    "Left",
    "LocalFirst",
    "LocalSecond",
    "LoopFirst",
    "LoopSecond",
    "One",
    "Plain",
    "Right",
    "TableA",
    "TableB",
    "TableC",
    "Tail",
    "TailAfterWork",
    "Three",
    "Two",
    "VariableFrame",
    "Wrapped",
    "WrappedTwice",
    "Zero",
    "zzz",
];

fn map_of(dir: &TempDir, source: &str, build: &Build) -> CodeMap {
    let library = compile(dir, source, build);
    let bytes = std::fs::read(&library).expect("the compiler wrote it");
    analyse(&bytes).unwrap_or_else(|error| panic!("{build}: {error}"))
}

/// What is wrong with the sites of one build; empty if nothing is.
fn complaints(map: &CodeMap, names: &[&str]) -> String {
    let mut text = String::new();
    let sites = map.all_sites();
    let mut by_name: BTreeMap<&str, usize> = names.iter().map(|&n| (n, 0)).collect();
    for site in &sites {
        for name in &site.names {
            match by_name.get_mut(name.text.as_str()) {
                Some(count) => *count += 1,
                None => writeln!(text, "  false site {} with {:?}", site.at, name.text).unwrap(),
            }
        }
        if let Err(reason) = &site.window {
            writeln!(
                text,
                "  no window at {} {:?}: {reason}",
                site.at, site.names
            )
            .unwrap();
        }
    }
    for (name, count) in by_name {
        if count != 1 {
            writeln!(text, "  {name} is found at {count} sites").unwrap();
        }
    }
    text
}

#[test]
fn every_rpc_is_found_once_and_no_append_is() {
    let dir = TempDir::new().expect("a directory");
    let mut report = String::new();
    for build in matrix("gcc", "clang") {
        let map = map_of(&dir, "caller.c", &build);
        let text = complaints(&map, &NAMES[..30]);
        if !text.is_empty() {
            writeln!(report, "{build}\n{text}").unwrap();
        }
    }
    assert!(report.is_empty(), "{report}");
}
