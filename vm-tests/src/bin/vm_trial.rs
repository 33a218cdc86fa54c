//! The trial: by hand or in a test on this kernel, by `vm_init` in a guest.
//! Its last line is the verdict.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use nightgraft_vm_tests::trial::{self, Options};

/// Patches, reverts and kills agents under load, on this kernel.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The folder of libfoo.so and libbar.so; else they are compiled.
    #[arg(long)]
    functions: Option<PathBuf>,
    /// Containers have overlay file systems for roots.
    #[arg(long)]
    overlay: bool,
    /// Set Yama's scope to 3 once the node serves: for good, so in guests only.
    #[arg(long)]
    forbid_tracing: bool,
    /// When agents die: the same seed, the same moments.
    #[arg(long, default_value_t = 11)]
    seed: u64,
    /// ptrace-shim's tests of stops, to be run instead.
    #[arg(long)]
    stops: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let verdict = trial::run(&Options {
        functions: arguments.functions,
        overlay: arguments.overlay,
        forbid_tracing: arguments.forbid_tracing,
        seed: arguments.seed,
        stops: arguments.stops,
    });
    println!("{}", verdict.line());
    if verdict.passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
