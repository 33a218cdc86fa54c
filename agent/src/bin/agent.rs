//! The node agent: finds nightcore's workers and fuses functions in them, as
//! `agentctl` asks.

use std::process::ExitCode;

fn main() -> ExitCode {
    nightgraft_agent::daemon::main()
}
