//! The caller's sites, found in real code: gcc and clang over the matrix of
//! options that must work, stripped or not.

#[path = "code/build.rs"]
mod build;

use std::collections::BTreeMap;

use build::{Build, compile, matrix, matrix_of_exceptions};
use nightgraft_patcher::code::{CodeMap, analyse};
use tempfile::TempDir;

/// The names that `caller.c` passes to the RPC, each at one place.
const NAMES: [&str; 30] = [
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
];
/// The names that `caller.cc` passes. Destructors are inlined where they run,
/// once for the return and once for the unwinding, and loops are unrolled.
const NAMES_CC: [&str; 7] = [
    "InDestructor",
    "Throws",
    "InHandler",
    "BehindHandler",
    "ListA",
    "ListB",
    "ListC",
];

fn map_of(dir: &TempDir, source: &str, build: &Build) -> CodeMap {
    let library = compile(dir, source, build);
    let bytes = std::fs::read(&library).expect("the compiler wrote it");
    analyse(&bytes).unwrap_or_else(|error| panic!("{build}: {error}"))
}

/// What is wrong with the sites of one build; empty if nothing is. A name may
/// be passed at up to `most` sites, where compilers duplicate code.
fn complaints(map: &CodeMap, names: &[&str], most: usize) -> String {
    let mut text = String::new();
    let mut by_name: BTreeMap<&str, usize> = names.iter().map(|&n| (n, 0)).collect();
    for site in map.all_sites() {
        for name in &site.names {
            match by_name.get_mut(name.text.as_str()) {
                Some(count) => *count += 1,
                None => text += &format!("  false site {} with {:?}\n", site.at, name.text),
            }
        }
        if let Err(reason) = &site.window {
            text += &format!("  no window at {} {:?}: {reason}\n", site.at, site.names);
        }
    }
    for (name, count) in by_name {
        if count == 0 || count > most {
            text += &format!("  {name} is found at {count} sites\n");
        }
        assert_eq!(map.sites(name).len(), count);
    }
    if let Err(reason) = map.entry_window("faas_func_call") {
        text += &format!("  no window at the entry: {reason}\n");
    }
    text
}

fn check(source: &str, builds: Vec<Build>, names: &[&str], most: usize) {
    let dir = TempDir::new().expect("a directory");
    let mut report = String::new();
    for build in builds {
        let map = map_of(&dir, source, &build);
        let text = complaints(&map, names, most);
        if !text.is_empty() {
            report += &format!("{build}\n{text}\n");
        }
    }
    assert!(report.is_empty(), "{report}");
}

#[test]
fn every_rpc_is_found_once_and_no_append_is() {
    check("caller.c", matrix("gcc", "clang"), &NAMES, 1);
}

#[test]
fn rpcs_among_exceptions_are_found() {
    check(
        "caller.cc",
        matrix_of_exceptions("g++", "clang++"),
        &NAMES_CC,
        3,
    );
}

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below as u64) as usize
    }
}

#[test]
fn broken_libraries_are_survived() {
    let dir = TempDir::new().expect("a directory");
    let build = Build {
        compiler: "g++",
        flags: vec!["-O2"],
        stripped: false,
    };
    let library = std::fs::read(compile(&dir, "caller.cc", &build)).expect("the compiler wrote it");
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut analysed = 0;
    for round in 0..600 {
        let mut broken = library.clone();
        if round % 3 == 0 {
            broken.truncate(random.next(library.len()));
        }
        for _ in 0..random.next(12) {
            let at = random.next(library.len());
            if let Some(byte) = broken.get_mut(at) {
                *byte = [0, 0xff, 0x80, random.next(256) as u8][random.next(4)];
            }
        }
        if let Ok(map) = analyse(&broken) {
            analysed += 1;
            let _ = map.entry_window("faas_func_call");
        }
    }
    assert!(
        analysed > 100,
        "most changes do not keep it from being read"
    );
}
