#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ptrace_shim::fuzzing::filter(data));
