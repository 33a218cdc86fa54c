//! `loadgen --port 8080 --connections 8 --seconds 10`: load on a node's Foo,
//! every answer checked. Fails unless all were correct.

use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use nightgraft_testbed::load::{Load, LoadSpec};

/// Puts load on a node and checks every byte of every answer.
#[derive(Debug, Parser)]
struct Options {
    /// The gateway's port on 127.0.0.1.
    #[arg(long)]
    port: u16,
    /// Connections, each with one request at a time.
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// How long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Bytes of each input; without it 5 to 300.
    #[arg(long)]
    payload: Option<usize>,
    /// Print a line every second.
    #[arg(long)]
    watch: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut spec = LoadSpec::foo(options.port, options.connections);
    if let Some(length) = options.payload {
        spec = spec.payload(length);
    }
    let load = Load::start(&spec)?;
    for _ in 0..options.seconds {
        std::thread::sleep(Duration::from_secs(1));
        if options.watch {
            println!("{:?}", load.snapshot());
        }
    }
    let report = load.stop();
    println!("{report:?}");
    report.all_correct()
}
