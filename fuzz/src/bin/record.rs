//! The record in a worker: JSON, and behind a NUL what its memory holds.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |b| *b == 0);
    let text = parts.next().unwrap_or_default();
    nightgraft_patcher::fuzzing::record(text, parts.next().unwrap_or_default());
});
