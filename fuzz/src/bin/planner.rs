//! A callee's library, fused on paper into this very process, which has a
//! caller's loaded as a worker would.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use nightgraft_patcher::snapshot::Worker;

static WORKER: OnceLock<Worker> = OnceLock::new();

fn worker() -> Worker {
    let path = std::env::var("NIGHTGRAFT_FUZZ_CALLER").expect("set by cargo xtask fuzz");
    // SAFETY: a fixture of our own, without initialisers.
    std::mem::forget(unsafe { libloading::Library::new(&path) }.expect("a caller"));
    let own = i32::try_from(std::process::id()).expect("a pid");
    Worker::read(own, &PathBuf::from(path)).expect("this process")
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = nightgraft_patcher::fuzzing::plan(WORKER.get_or_init(worker), data);
});
