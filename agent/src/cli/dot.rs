//! The graph in Graphviz's language. Pure, and the same for the same graph.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write;

use super::format::{clean, nanos_f64, rate};
use super::graph::{Names, unfusable};
use crate::api::{EdgeState, Graph, GraphEdge, GraphNode, Latency};

const HEAD: &str = "\
// black: RPC; green: fused; green and dashed: fused in some workers
// a dashed box can't be fused
digraph nightgraft {
  graph [rankdir=LR];
  node [shape=box, style=rounded];
";

/// `agentctl graph --dot`.
pub(super) fn dot(graph: &Graph) -> String {
    let names = Names::of(graph);
    let mut text = HEAD.to_owned();
    // Numbers, so that no name has to serve as one of Graphviz's.
    let mut numbers = BTreeMap::new();
    for node in &graph.nodes {
        let number = numbers.len();
        if let Entry::Vacant(entry) = numbers.entry((node.engine, node.function.as_str())) {
            entry.insert(number);
            node_line(&mut text, number, &names, node);
        }
    }
    for edge in &graph.edges {
        let mut end = |function| {
            let next = numbers.len();
            *numbers.entry((edge.engine, function)).or_insert_with(|| {
                let name = names.name(function, edge.engine);
                let _ = writeln!(text, "  n{next} [label={}];", quoted(&[name]));
                next
            })
        };
        let ends = (end(&edge.caller), end(&edge.callee));
        edge_line(&mut text, ends, edge);
    }
    text.push_str("}\n");
    text
}

fn node_line(text: &mut String, number: usize, names: &Names, node: &GraphNode) {
    let mut lines = vec![
        names.name(&node.function, node.engine),
        format!("{}/s", rate(node.calls_per_s)),
    ];
    if let Some(own) = node.own {
        lines.push(latency("own", own));
    }
    let mut marks = String::new();
    if let Some(why) = unfusable(node) {
        lines.push("can't be fused".to_owned());
        let why = quoted(&[clean(&why)]);
        let _ = write!(marks, ", style=\"rounded,dashed\", tooltip={why}");
    }
    let _ = writeln!(text, "  n{number} [label={}{marks}];", quoted(&lines));
}

fn edge_line(text: &mut String, (caller, callee): (usize, usize), edge: &GraphEdge) {
    let mut lines = vec![format!("{}/s", rate(edge.calls_per_s))];
    if edge.errors_per_s > 0.0 {
        lines.push(format!("{} errors/s", rate(edge.errors_per_s)));
    }
    lines.extend(edge.rpc.map(|rpc| latency("RPC", rpc)));
    lines.extend(edge.fused.map(|fused| latency("fused", fused)));
    let marks = match edge.state {
        EdgeState::Rpc => "",
        EdgeState::Fused => ", color=\"#1a7f37\", penwidth=2",
        EdgeState::Mixed => ", color=\"#1a7f37\", penwidth=2, style=dashed",
    };
    let label = quoted(&lines);
    let _ = writeln!(text, "  n{caller} -> n{callee} [label={label}{marks}];");
}

fn latency(what: &str, latency: Latency) -> String {
    format!(
        "{what} {}, p99 {}",
        nanos_f64(latency.mean_ns),
        nanos_f64(latency.p99_ns)
    )
}

/// Lines as one string of Graphviz's. Besides quotes, it would obey backslashes
/// (`\N`, `\l`) and HTML's entities.
fn quoted(lines: &[String]) -> String {
    let escaped: Vec<String> = lines
        .iter()
        .map(|line| {
            line.replace('&', "&amp;")
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
        })
        .collect();
    format!("\"{}\"", escaped.join("\\n"))
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn edges_and_nodes_tell_their_figures_and_how_they_run() {
        let expected = r##"// black: RPC; green: fused; green and dashed: fused in some workers
// a dashed box can't be fused
digraph nightgraft {
  graph [rankdir=LR];
  node [shape=box, style=rounded];
  n0 [label="Bar\n12.5/s\nown 1.50 ms, p99 4.50 ms"];
  n1 [label="Baz\n12.5/s\nown 1.50 ms, p99 4.50 ms"];
  n2 [label="Foo\n12.5/s\nown 1.50 ms, p99 4.50 ms"];
  n3 [label="Gopher\n0/s\ncan't be fused", style="rounded,dashed", tooltip="not native (Go)"];
  n2 -> n0 [label="120/s\n0.20 errors/s\nRPC 150 µs, p99 450 µs"];
  n2 -> n1 [label="1,000/s\nfused 80 ns, p99 240 ns", color="#1a7f37", penwidth=2];
}
"##;
        assert_eq!(dot(&sample::graph()), expected);
    }

    #[test]
    fn a_name_stays_a_name() {
        let mut graph = Graph {
            edges: vec![sample::edge("Foo", "\"]; x \\N &lt;\n</script>")],
            ..Graph::default()
        };
        let text = dot(&graph);
        let lines: Vec<&str> = text.strip_prefix(HEAD).unwrap().lines().collect();
        assert_eq!(
            lines[..2],
            [
                "  n0 [label=\"Foo\"];",
                "  n1 [label=\"\\\"]; x \\\\N &amp;lt;\\\\n</script>\"];",
            ]
        );
        // A backslash at the end does not take the quote with it.
        graph.edges[0].callee = "Bar\\".to_owned();
        assert!(dot(&graph).contains("  n1 [label=\"Bar\\\\\"];\n"));
    }

    #[test]
    fn nothing_is_a_graph_too() {
        assert_eq!(dot(&Graph::default()), format!("{HEAD}}}\n"));
    }
}
