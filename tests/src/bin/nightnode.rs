//! `nightnode Foo=libfoo.so Bar=libbar.so`: a node on its own.
//!
//! Prints one line of JSON when it is ready (the HTTP port, all processes, all
//! paths), and ends the node when its standard input does.

use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use nightgraft_testbed::{FunctionSpec, NestedMode, Node, NodeSpec, RuntimeKind};

/// Runs a node with the given functions until standard input ends.
#[derive(Debug, Parser)]
struct Options {
    /// Functions: NAME=LIBRARY. They get the ids 1, 2, …
    #[arg(required = true)]
    functions: Vec<String>,
    /// What makes the containers.
    #[arg(long, value_enum, default_value = "embedded")]
    runtime: RuntimeKind,
    /// Workers of each function.
    #[arg(long, default_value_t = 1)]
    workers: u16,
    /// Nested calls answer through FIFOs of their own, within 100 ms.
    #[arg(long = "use_fifo_for_nested_call")]
    use_fifo_for_nested_call: bool,
    /// Run the whole node on this processor.
    #[arg(long)]
    cpu: Option<usize>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut functions = Vec::new();
    for (i, text) in options.functions.iter().enumerate() {
        let (name, library) = text.split_once('=').context("functions are NAME=LIBRARY")?;
        let id = u16::try_from(i + 1)?;
        functions
            .push(FunctionSpec::new(name, id, library).workers(options.workers, options.workers));
    }
    let names: Vec<String> = functions.iter().map(|f| f.name.clone()).collect();
    let mut spec = NodeSpec::new(functions).runtime(options.runtime);
    if options.use_fifo_for_nested_call {
        spec = spec.nested_mode(NestedMode::Fifo);
    }
    spec.cpus.extend(options.cpu);
    let node = Node::start(spec)?;
    let mut pids = vec![node.gateway_pid(), node.engine_pid(), node.keeper_pid()];
    for name in &names {
        pids.push(node.container(name)?.init);
        pids.extend(node.workers(name)?.iter().map(|w| w.host_pid));
    }
    let paths: [PathBuf; 2] = [node.dir().into(), node.ipc_root().into()];
    let ready = serde_json::json!({ "http_port": node.http_port(), "pids": pids, "paths": paths });
    println!("{ready}");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    node.stop()
}
