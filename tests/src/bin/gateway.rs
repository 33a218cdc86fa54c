//! `gateway --func_config_file=func_config.json --http_port=8080`: HTTP in.

use std::process::ExitCode;

use nightgraft_testbed::gateway::{GatewayOptions, run};

fn main() -> ExitCode {
    match GatewayOptions::from_env().and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("FATAL: {e:#}");
            ExitCode::FAILURE
        }
    }
}
