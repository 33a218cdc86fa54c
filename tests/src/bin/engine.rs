//! `engine --func_config_file=func_config.json`: dispatches the node's calls.

use std::process::ExitCode;

use nightgraft_testbed::engine::{EngineOptions, run};

fn main() -> ExitCode {
    match EngineOptions::from_env().and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("FATAL: {e:#}");
            ExitCode::FAILURE
        }
    }
}
