//! The node agent with fault points: for tests that end it at each of them.

use std::process::ExitCode;

fn main() -> ExitCode {
    nightgraft_agent::daemon::main()
}
