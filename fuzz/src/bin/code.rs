//! Code bytes, in a library that is otherwise whole: the window finder.
#![no_main]

use std::sync::OnceLock;

static LIBRARY: OnceLock<(Vec<u8>, usize, usize)> = OnceLock::new();

/// A library, and where its `faas_func_call` is in the file.
fn library() -> (Vec<u8>, usize, usize) {
    let path = std::env::var("NIGHTGRAFT_FUZZ_CODE").expect("set by cargo xtask fuzz");
    let bytes = std::fs::read(path).expect("a library");
    let mark = b"NIGHTGRAFT CODE ";
    let at = bytes
        .windows(mark.len())
        .position(|w| w == mark)
        .expect("its mark");
    let end = bytes[at..]
        .iter()
        .rposition(|b| *b == 0xcc)
        .expect("its filler")
        + at
        + 1;
    (bytes, at, end)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let (bytes, at, end) = LIBRARY.get_or_init(library);
    let mut bytes = bytes.clone();
    let len = data.len().min(end - at);
    bytes[*at..at + len].copy_from_slice(&data[..len]);
    bytes[at + len..*end].fill(0xcc);
    nightgraft_patcher::fuzzing::code(&bytes);
});
