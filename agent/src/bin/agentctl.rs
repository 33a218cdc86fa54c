//! Talks to the node's agent: see `agentctl --help`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use nightgraft_agent::cli::{Args, Screen, run};

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start")?;
    let mut out = std::io::stdout().lock();
    let mut err = std::io::stderr().lock();
    let exit = runtime.block_on(run(&args, Screen::of_stdout, &mut out, &mut err));
    let _ = out.flush();
    Ok(exit.into())
}
