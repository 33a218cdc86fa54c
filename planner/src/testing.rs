//! Small graphs for tests.

use crate::graph::{Edge, Function, Graph};

/// A function with two workers, 10 µs of its own and 100 KiB as a graft.
pub(crate) fn function(name: &str, arrivals: f64) -> Function {
    Function {
        name: name.to_owned(),
        arrivals,
        own_s: 10e-6,
        workers: 2,
        memory_room: None,
        cores: None,
        graft_bytes: 100 << 10,
        domain: String::new(),
        unfusable: None,
    }
}

/// An edge with 20 µs of overhead a call.
pub(crate) fn edge(caller: usize, callee: usize, rate: f64) -> Edge {
    Edge {
        caller,
        callee,
        rate,
        overhead_s: 20e-6,
        forbidden: None,
        required: false,
    }
}

/// Each calls the next once.
pub(crate) fn chain(names: &[&str], rate: f64) -> Graph {
    let of = |(index, name): (usize, &&str)| function(name, if index == 0 { rate } else { 0.0 });
    Graph {
        functions: names.iter().enumerate().map(of).collect(),
        edges: (1..names.len()).map(|i| edge(i - 1, i, rate)).collect(),
    }
}
