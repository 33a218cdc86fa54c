#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    nightgraft_agent::fuzzing::proc_text(data);
    let text = String::from_utf8_lossy(data);
    nightgraft_agent::fuzzing::policy(&text);
    nightgraft_patcher::fuzzing::proc_text(&text);
    ptrace_shim::fuzzing::proc_text(&text);
});
