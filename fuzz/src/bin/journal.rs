#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nightgraft_patcher::fuzzing::journal(data));
