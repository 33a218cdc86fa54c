#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nightgraft_patcher::fuzzing::library(data));
