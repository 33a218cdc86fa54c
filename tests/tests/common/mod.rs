//! What the tests of the node share.

use std::path::PathBuf;

use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{FunctionSpec, Node, NodeSpec};

/// A fixture, built as functions usually are.
pub(crate) fn library(source: &str) -> PathBuf {
    fixtures::compile(source, Compiler::Gcc, &["-O2"]).expect("a fixture compiles")
}

/// Foo, Bar and Baz with so many workers each (Baz one).
pub(crate) fn foo_bar_baz(workers: u16) -> NodeSpec {
    NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foo.c")).workers(workers, workers),
        FunctionSpec::new("Bar", 2, library("bar.c")).workers(workers, workers),
        FunctionSpec::new("Baz", 3, library("baz.c")),
    ])
}

/// An answer as text, for a readable failure; the node's logs if there is none.
pub(crate) fn ask(node: &Node, function: &str, input: &str) -> String {
    match node.call(function, input.as_bytes()) {
        Ok(answer) => String::from_utf8_lossy(&answer).into_owned(),
        Err(e) => panic!("{function} {input:?}: {e}\n{}", node.all_logs()),
    }
}
