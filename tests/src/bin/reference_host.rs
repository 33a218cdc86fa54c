//! `reference_host FUNCTIONS.json NAME`: runs one function, loaded by plain
//! `dlopen`, for requests on its standard input.

#[path = "../cxx_program.rs"]
mod cxx_program;

use std::process::ExitCode;

use nightgraft_testbed::coverage::reference;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [spec, function] = &arguments[..] else {
        eprintln!("usage: reference_host FUNCTIONS.json NAME");
        return ExitCode::FAILURE;
    };
    match reference::serve(spec, &function.to_string_lossy()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("FATAL: {e:#}");
            ExitCode::FAILURE
        }
    }
}
