//! From the names that somebody typed to functions and workers. Pure.

use crate::api::WorkerKind;
use crate::discover::{Function, Node, Worker};
use crate::error::AgentError;
use crate::grafter::Target;

/// How many near names an error lists.
const MAX_NEAR: usize = 3;
/// Similarity (Jaro-Winkler, 0 to 1) from which a name counts as near.
const NEAR: f64 = 0.75;

/// What somebody asked for.
#[derive(Debug, Clone)]
pub struct Edge<'a> {
    /// Whose workers are meant.
    pub caller: &'a Function,
    /// Whose code.
    pub callee: &'a Function,
    /// The callee's name as it is spelled in the workers; `Bar/Baz` where Baz
    /// is meant as Bar calls it from inside the caller's workers.
    pub name: String,
}

/// Finds the caller and the callee, both of the same engine. A callee
/// `Bar/Baz` is Baz as it is called by a fused Bar.
///
/// # Errors
/// [`AgentError::UnknownFunction`], [`AgentError::AmbiguousFunction`], or
/// [`AgentError::Recursive`] for a way that comes by one function twice.
pub fn edge<'a>(
    node: &'a Node,
    caller: &str,
    callee: &str,
    engine: Option<i32>,
) -> Result<Edge<'a>, AgentError> {
    let mut way = callee.split('/');
    let (first, callee) = pair(node, caller, way.next().unwrap_or_default(), engine)?;
    let mut edge = Edge {
        caller: first,
        callee,
        name: callee.label(),
    };
    let mut seen = vec![first.label(), callee.label()];
    for next in way {
        let (_, callee) = pair(node, &edge.callee.label(), next, first.engine)?;
        edge.callee = callee;
        if seen.contains(&callee.label()) {
            return Err(AgentError::Recursive {
                way: edge.name,
                again: callee.label(),
            });
        }
        seen.push(callee.label());
        edge.name = format!("{}/{}", edge.name, callee.label());
    }
    Ok(edge)
}

fn pair<'a>(
    node: &'a Node,
    caller: &str,
    callee: &str,
    engine: Option<i32>,
) -> Result<(&'a Function, &'a Function), AgentError> {
    let callers = named(node, caller, engine)?;
    let callees = named(node, callee, engine)?;
    let mut pairs = Vec::new();
    for caller in &callers {
        for callee in &callees {
            if caller.engine == callee.engine {
                pairs.push((*caller, *callee));
            }
        }
    }
    match pairs.as_slice() {
        [pair] => Ok(*pair),
        // No pair, or several: whichever name has several meanings is to blame.
        _ if callers.len() > 1 => Err(ambiguous(caller, &callers)),
        _ if callees.len() > 1 => Err(ambiguous(callee, &callees)),
        // Each means one function, but of different engines.
        _ => Err(unknown(node, callee, callers[0].engine)),
    }
}

/// The functions that a name may mean: those of exactly that name, else those
/// that differ in case only. Never empty.
///
/// # Errors
/// [`AgentError::UnknownFunction`].
pub fn named<'a>(
    node: &'a Node,
    name: &str,
    engine: Option<i32>,
) -> Result<Vec<&'a Function>, AgentError> {
    let of_engine = |f: &&Function| engine.is_none() || f.engine == engine;
    let matching = |test: &dyn Fn(&str) -> bool| -> Vec<&'a Function> {
        node.functions
            .iter()
            .filter(of_engine)
            .filter(|f| f.name.as_deref().is_some_and(test))
            .collect()
    };
    let exact = matching(&|known| known == name);
    let found = if exact.is_empty() {
        matching(&|known| known.eq_ignore_ascii_case(name))
    } else {
        exact
    };
    if found.is_empty() {
        Err(unknown(node, name, engine))
    } else {
        Ok(found)
    }
}

/// The error for a name that no function has, with those that are near.
#[must_use]
pub fn unknown(node: &Node, name: &str, engine: Option<i32>) -> AgentError {
    let of_engine = |f: &&Function| engine.is_none() || f.engine == engine;
    let known: Vec<&str> = node
        .functions
        .iter()
        .filter(of_engine)
        .filter_map(|f| f.name.as_deref())
        .collect();
    AgentError::UnknownFunction {
        name: name.to_owned(),
        near: near(name, &known),
        known: known.len(),
    }
}

/// The names most like `name`, nearest first.
fn near(name: &str, known: &[&str]) -> Vec<String> {
    let lower = name.to_lowercase();
    let mut scored: Vec<(f64, &str)> = known
        .iter()
        .map(|other| (strsim::jaro_winkler(&lower, &other.to_lowercase()), *other))
        .filter(|(score, _)| *score >= NEAR)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored
        .into_iter()
        .take(MAX_NEAR)
        .map(|(_, other)| other.to_owned())
        .collect()
}

fn ambiguous(name: &str, found: &[&Function]) -> AgentError {
    let choices = found
        .iter()
        .map(|f| match f.engine {
            Some(engine) => format!("{} (engine {engine})", f.label()),
            None => format!("{} (engine not clear)", f.label()),
        })
        .collect();
    AgentError::AmbiguousFunction {
        name: name.to_owned(),
        choices,
    }
}

/// The native workers of a function, each with what the patcher must know.
///
/// # Errors
/// [`AgentError::NoWorkers`] or, where there are only others,
/// [`AgentError::NotNative`].
pub fn native_workers(function: &Function) -> Result<Vec<(&Worker, Target)>, AgentError> {
    let native: Vec<_> = function
        .workers
        .iter()
        .filter_map(|worker| Some((worker, worker.target()?)))
        .collect();
    match (native.is_empty(), function.workers.first()) {
        (false, _) => Ok(native),
        (true, None) => Err(AgentError::NoWorkers {
            name: function.label(),
        }),
        (true, Some(worker)) => Err(AgentError::NotNative {
            name: function.label(),
            language: match &worker.kind {
                WorkerKind::NotNative { language } => language.clone(),
                WorkerKind::Native => "no func_worker_v1".to_owned(),
            },
            pid: worker.pid,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{function, native_worker, other_worker};

    fn node(functions: Vec<Function>) -> Node {
        Node {
            functions,
            notes: Vec::new(),
        }
    }

    fn text(error: &AgentError) -> String {
        error.to_string()
    }

    #[test]
    fn case_does_not_matter_where_it_is_clear() {
        let node = node(vec![
            function("Foo", 1, Some(9)),
            function("Bar", 2, Some(9)),
        ]);
        let Edge { caller, callee, .. } = edge(&node, "foo", "BAR", None).unwrap();
        assert_eq!((caller.id, callee.id), (1, 2));
    }

    #[test]
    fn the_exact_name_wins_and_else_case_must_be_clear() {
        let node = node(vec![function("Foo", 1, None), function("FOO", 2, None)]);
        assert_eq!(named(&node, "FOO", None).unwrap()[0].id, 2);
        assert_eq!(
            text(&edge(&node, "foo", "Foo", None).unwrap_err()),
            "\"foo\" means more than one function: Foo (engine not clear), FOO (engine not clear)"
        );
    }

    #[test]
    fn a_way_is_spelled_as_the_workers_do_and_comes_by_nothing_twice() {
        let node = node(vec![
            function("Foo", 1, None),
            function("Bar", 2, None),
            function("Baz", 3, None),
        ]);
        let way = edge(&node, "foo", "bar/BAZ", None).unwrap();
        assert_eq!(
            (way.callee.label(), way.name.as_str()),
            ("Baz".into(), "Bar/Baz")
        );
        for again in ["Bar/Foo", "Bar/Baz/bar", "Bar/Bar"] {
            assert_eq!(
                edge(&node, "Foo", again, None).unwrap_err().code(),
                "recursive"
            );
        }
        for unknown in ["Bar/", "/Bar", "Bar/Boz"] {
            let error = edge(&node, "Foo", unknown, None).unwrap_err();
            assert_eq!(error.code(), "unknown-function");
        }
    }

    #[test]
    fn unknown_names_show_near_ones() {
        let node = node(vec![
            function("ComposePost", 1, None),
            function("ComposePoll", 2, None),
            function("UserTimeline", 3, None),
        ]);
        let error = named(&node, "composepots", None).unwrap_err();
        assert_eq!(
            text(&error),
            "there is no function \"composepots\" on this node (near: ComposePost, ComposePoll)"
        );
        assert_eq!(error.hint().unwrap(), "`agentctl ps` lists the functions");
        assert_eq!(
            text(&named(&node, "xyz", None).unwrap_err()),
            "there is no function \"xyz\" on this node"
        );
    }

    #[test]
    fn on_an_empty_node_the_hint_is_another() {
        let error = named(&Node::default(), "Foo", None).unwrap_err();
        assert!(error.hint().unwrap().contains("--pid=host"));
    }

    #[test]
    fn both_ends_belong_to_one_engine() {
        let two = node(vec![
            function("Foo", 1, Some(10)),
            function("Bar", 2, Some(10)),
            function("Bar", 7, Some(20)),
        ]);
        let Edge { callee, .. } = edge(&two, "Foo", "Bar", None).unwrap();
        assert_eq!(callee.engine, Some(10), "the one that Foo can call");
    }

    #[test]
    fn the_same_application_twice_needs_the_engine() {
        let mut functions = Vec::new();
        for engine in [10, 20] {
            functions.push(function("Foo", 1, Some(engine)));
            functions.push(function("Bar", 2, Some(engine)));
        }
        let node = node(functions);
        let error = edge(&node, "foo", "bar", None).unwrap_err();
        assert_eq!(error.code(), "ambiguous-function");
        assert_eq!(
            text(&error),
            "\"foo\" means more than one function: Foo (engine 10), Foo (engine 20)"
        );
        assert_eq!(
            edge(&node, "foo", "bar", Some(20)).unwrap().caller.engine,
            Some(20)
        );
    }

    #[test]
    fn a_callee_of_another_engine_is_unknown_to_the_caller() {
        let node = node(vec![
            function("Foo", 1, Some(10)),
            function("Bar", 2, Some(20)),
        ]);
        assert_eq!(
            edge(&node, "Foo", "Bar", None).unwrap_err().code(),
            "unknown-function"
        );
    }

    #[test]
    fn functions_without_native_workers_say_which_it_is() {
        let mut foo = function("Foo", 1, None);
        assert_eq!(
            text(&native_workers(&foo).unwrap_err()),
            "function Foo has no running worker"
        );
        foo.workers.push(other_worker(50, "Go"));
        assert_eq!(
            text(&native_workers(&foo).unwrap_err()),
            "function Foo runs in a worker that is not native (pid 50, Go): only libraries in a func_worker_v1 can be fused"
        );
        foo.workers.push(native_worker(51));
        assert_eq!(native_workers(&foo).unwrap()[0].0.pid, 51);
    }
}
