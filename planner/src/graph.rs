//! The RPC graph: what was measured of a node, as the planner takes it.
//!
//! All rates are of the whole node, per second; all times are in seconds of one
//! call; all sizes in bytes of one worker.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::settings::WrongSetting;

/// A function of the node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Its name, as its engine knows it.
    pub name: String,
    /// Calls per second that no function of the graph makes.
    #[serde(default)]
    pub arrivals: f64,
    /// Seconds that a call takes in the function itself, without the calls that
    /// it makes.
    pub own_s: f64,
    /// Workers that run.
    pub workers: u32,
    /// Bytes that one worker may hold of other functions; `None` for no limit.
    #[serde(default)]
    pub memory_room: Option<u64>,
    /// Processors that its workers may keep busy; `None` for no limit.
    #[serde(default)]
    pub cores: Option<f64>,
    /// Bytes that a worker holds more with a graft of this function: its
    /// writable data, its code, and what an instance allocates.
    pub graft_bytes: u64,
    /// Only functions of one trust domain are fused.
    #[serde(default)]
    pub domain: String,
    /// Why it can be neither patched nor grafted (a function in Go, Node.js or
    /// Python); `None` if it can.
    #[serde(default)]
    pub unfusable: Option<String>,
}

/// Calls of one function by another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    /// Which of [`Graph::functions`] calls.
    pub caller: usize,
    /// Which is called.
    pub callee: usize,
    /// Calls per second, fused ones included.
    pub rate: f64,
    /// Seconds that a call by RPC takes beyond what the callee itself needs.
    pub overhead_s: f64,
    /// Why it may not be fused (refused by the patcher, effects, policy).
    #[serde(default)]
    pub forbidden: Option<String>,
    /// The policy wants it fused, whatever it saves.
    #[serde(default)]
    pub required: bool,
}

/// What is wrong with a graph.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GraphError {
    /// An edge names a function that is not there.
    #[error("edge {edge} names function {function}, of {functions}")]
    NoFunction {
        /// Its index.
        edge: usize,
        /// What it names.
        function: usize,
        /// How many there are.
        functions: usize,
    },
    /// Two edges between the same functions.
    #[error("there are two edges {caller} → {callee}")]
    Twice {
        /// Name.
        caller: String,
        /// Name.
        callee: String,
    },
    /// A path that is fused names a function that is not there, or none.
    #[error("a fused path names functions {path:?}, of {functions}")]
    NoPath {
        /// What it names.
        path: Vec<usize>,
        /// How many there are.
        functions: usize,
    },
    /// A setting that makes no sense.
    #[error(transparent)]
    Setting(#[from] WrongSetting),
    /// A number that is none, is negative, or infinite.
    #[error("{what} is {value}: a finite number of at least 0 is wanted")]
    Number {
        /// Which number, of what.
        what: String,
        /// The number.
        value: f64,
    },
}

/// Functions and edges.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// The functions.
    pub functions: Vec<Function>,
    /// The edges, each pair once.
    pub edges: Vec<Edge>,
}

impl Graph {
    /// Looks whether it makes sense.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), GraphError> {
        let number = |what: &str, of: String, value: f64| {
            if value.is_finite() && value >= 0.0 {
                return Ok(());
            }
            let what = format!("{what} of {of}");
            Err(GraphError::Number { what, value })
        };
        for function in &self.functions {
            let name = || function.name.clone();
            number("arrivals", name(), function.arrivals)?;
            number("own_s", name(), function.own_s)?;
            number("cores", name(), function.cores.unwrap_or(0.0))?;
        }
        let mut seen = HashMap::new();
        for (index, edge) in self.edges.iter().enumerate() {
            for function in [edge.caller, edge.callee] {
                if function >= self.functions.len() {
                    return Err(GraphError::NoFunction {
                        edge: index,
                        function,
                        functions: self.functions.len(),
                    });
                }
            }
            let (caller, callee) = (self.name(edge.caller), self.name(edge.callee));
            let name = || format!("{caller} → {callee}");
            number("rate", name(), edge.rate)?;
            number("overhead_s", name(), edge.overhead_s)?;
            if seen.insert((edge.caller, edge.callee), index).is_some() {
                return Err(GraphError::Twice {
                    caller: caller.to_owned(),
                    callee: callee.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// A function's name.
    #[must_use]
    pub fn name(&self, function: usize) -> &str {
        &self.functions[function].name
    }
}

/// The graph with what follows from it.
#[derive(Debug)]
pub(crate) struct Calls<'a> {
    pub(crate) graph: &'a Graph,
    /// Executions per second of each function, wherever: what is called runs,
    /// fused or not, so that no plan changes them.
    pub(crate) executions: Vec<f64>,
    /// Edges out of each function: (edge, calls per execution).
    pub(crate) out: Vec<Vec<(usize, f64)>>,
    /// The functions, callers before callees but where calls go in circles.
    pub(crate) order: Vec<usize>,
    /// Where in `order` each function is.
    pub(crate) position: Vec<usize>,
}

impl<'a> Calls<'a> {
    pub(crate) fn of(graph: &'a Graph) -> Calls<'a> {
        let mut executions: Vec<f64> = graph.functions.iter().map(|f| f.arrivals).collect();
        for edge in &graph.edges {
            executions[edge.callee] += edge.rate;
        }
        let mut out = vec![Vec::new(); graph.functions.len()];
        for (index, edge) in graph.edges.iter().enumerate() {
            // Who was not seen to run calls nobody.
            let per_execution = match executions[edge.caller] {
                all if all > 0.0 => edge.rate / all,
                _ => 0.0,
            };
            out[edge.caller].push((index, per_execution));
        }
        let order = order(graph, &out);
        let mut position = vec![0; order.len()];
        for (at, &function) in order.iter().enumerate() {
            position[function] = at;
        }
        Calls {
            graph,
            executions,
            out,
            order,
            position,
        }
    }

    /// Seconds of RPC overhead that the node spends per second with nothing
    /// fused.
    pub(crate) fn overhead(&self) -> f64 {
        let edges = self.graph.edges.iter();
        edges.map(|e| e.rate * e.overhead_s).sum()
    }
}

/// Functions by when a depth-first walk leaves them, last first.
fn order(graph: &Graph, out: &[Vec<(usize, f64)>]) -> Vec<usize> {
    let mut order = Vec::with_capacity(graph.functions.len());
    let mut seen = vec![false; graph.functions.len()];
    for start in 0..graph.functions.len() {
        if std::mem::replace(&mut seen[start], true) {
            continue;
        }
        let mut stack = vec![(start, 0)];
        while let Some((function, next)) = stack.last_mut() {
            match out[*function].get(*next) {
                Some(&(edge, _)) => {
                    *next += 1;
                    let callee = graph.edges[edge].callee;
                    if !std::mem::replace(&mut seen[callee], true) {
                        stack.push((callee, 0));
                    }
                }
                None => {
                    order.push(*function);
                    stack.pop();
                }
            }
        }
    }
    order.reverse();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{chain, edge, function};

    #[test]
    fn executions_are_arrivals_and_calls() {
        let graph = chain(&["A", "B", "C"], 100.0);
        let calls = Calls::of(&graph);
        assert_eq!(calls.executions, [100.0, 100.0, 100.0]);
        assert_eq!(calls.out[0], [(0, 1.0)]);
        assert!(calls.out[2].is_empty());
    }

    #[test]
    fn callers_come_before_callees() {
        let mut graph = chain(&["A", "B", "C"], 100.0);
        graph.functions.reverse();
        for edge in &mut graph.edges {
            (edge.caller, edge.callee) = (2 - edge.caller, 2 - edge.callee);
        }
        let calls = Calls::of(&graph);
        assert_eq!(calls.order, [2, 1, 0]);
        assert_eq!(calls.position, [2, 1, 0]);
        // A circle is left somewhere.
        graph.edges.push(edge(0, 2, 1.0));
        assert_eq!(Calls::of(&graph).order.len(), 3);
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        let of = |edges: Vec<Edge>| Graph {
            functions: vec![function("A", 1.0), function("B", 0.0)],
            edges,
        };
        assert_eq!(of(vec![edge(0, 1, 1.0)]).check(), Ok(()));
        let text = |graph: Graph| graph.check().unwrap_err().to_string();
        assert_eq!(
            text(of(vec![edge(0, 2, 1.0)])),
            "edge 0 names function 2, of 2"
        );
        assert_eq!(
            text(of(vec![edge(0, 1, 1.0), edge(0, 1, 2.0)])),
            "there are two edges A → B"
        );
        assert_eq!(
            text(of(vec![edge(0, 1, -1.0)])),
            "rate of A → B is -1: a finite number of at least 0 is wanted"
        );
        let mut graph = of(Vec::new());
        graph.functions[1].own_s = f64::NAN;
        assert!(text(graph).starts_with("own_s of B is NaN"));
    }
}
