//! `func_worker_v1 /path/to/library.so`: serves one function.

#[path = "../cxx_program.rs"]
mod cxx_program;

use std::path::Path;

use anyhow::{Result, ensure};
use nightgraft_testbed::flags::Flags;
use nightgraft_testbed::sys::process;
use nightgraft_testbed::worker::{WorkerEnv, serve};

fn run() -> Result<()> {
    let flags = Flags::from_env(&["v"], &[])?;
    ensure!(
        flags.positional.len() == 1,
        "the only positional argument should be the path of the function library"
    );
    process::default_sigpipe()?;
    serve(&WorkerEnv::read()?, Path::new(&flags.positional[0]))
}

fn main() {
    if let Err(e) = run() {
        eprintln!("FATAL: {e:#}");
        // As a failed check of nightcore's does: no destructors, no exit
        // handlers of the library's.
        std::process::abort();
    }
}
