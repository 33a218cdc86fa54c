//! `node_keeper`: owns a node. Started by the testbed's library, not by hand.

use std::process::ExitCode;

fn main() -> ExitCode {
    match nightgraft_testbed::keeper::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("node_keeper: {e:#}");
            ExitCode::FAILURE
        }
    }
}
