//! What `observe` and `graph` print and exit with, for answers made by hand.

use axum::Json;
use axum::Router;
use axum::routing::{get, post};
use clap::Parser;

use super::sample::{self, HOSTILE};
use super::*;
use crate::api::{GraphNode, ObserveOutcome, ObservedWorker};

/// An agent that always answers the same.
struct Canned {
    dir: tempfile::TempDir,
}

impl Canned {
    fn start(graph: Graph, report: ObserveReport) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let router = Router::new()
            .route(api::GRAPH, get(async move || Json(graph)))
            .route(api::HISTORY, get(async || Json(sample::history())))
            .route(api::OBSERVE, post(async move || Json(report)));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { dir }
    }

    fn example() -> Self {
        Self::start(sample::graph(), report(true, vec![]))
    }

    async fn agentctl_to(&self, line: &str, out: &mut impl Write) -> (Exit, String) {
        let socket = self.dir.path().join("agent.sock");
        let args = ["agentctl", "--socket", socket.to_str().unwrap()]
            .into_iter()
            .chain(line.split(' '));
        let args = Args::try_parse_from(args).unwrap();
        let mut err = Vec::new();
        let exit = run(&args, || Screen::Paper, out, &mut err).await;
        (exit, String::from_utf8(err).unwrap())
    }

    async fn agentctl(&self, line: &str) -> (Exit, String, String) {
        let mut out = Vec::new();
        let (exit, err) = self.agentctl_to(line, &mut out).await;
        (exit, String::from_utf8(out).unwrap(), err)
    }
}

fn worker(pid: i32, outcome: ObserveOutcome) -> ObservedWorker {
    ObservedWorker {
        function: "Foo".to_owned(),
        engine: Some(5),
        pid,
        outcome,
        stops_ns: vec![],
    }
}

fn report(on: bool, workers: Vec<ObservedWorker>) -> ObserveReport {
    ObserveReport {
        on,
        workers,
        notes: vec![],
    }
}

fn failed() -> ObserveOutcome {
    ObserveOutcome::Failed {
        error: ErrorInfo {
            code: "traced".to_owned(),
            message: "gdb traces it".to_owned(),
            hint: Some("end gdb first".to_owned()),
        },
    }
}

#[test]
fn observing_says_per_worker_what_was_done() {
    let mut observed = worker(11, ObserveOutcome::Observed);
    observed.stops_ns = vec![40_000, 20_000];
    let mut report = report(
        true,
        vec![
            observed,
            worker(12, ObserveOutcome::Already),
            worker(13, ObserveOutcome::Gone),
            worker(14, failed()),
        ],
    );
    report.notes = vec!["Gopher is not native".to_owned()];
    let expected = "\
observed in 2 of 4 workers
FUNCTION  WORKER  OUTCOME           STOPS
Foo       11      observed          60 µs in 2
Foo       12      already observed  -
Foo       13      exited            -
Foo       14      failed            -
note: Gopher is not native
";
    assert_eq!(graph::observed(&report), expected);
}

#[test]
fn observing_no_more_says_what_stays() {
    let reason = "a call is under way".to_owned();
    let mut other = worker(21, ObserveOutcome::Already);
    other.engine = Some(6);
    let report = report(
        false,
        vec![
            worker(11, ObserveOutcome::Restored),
            worker(12, ObserveOutcome::Off { reason }),
            other,
        ],
    );
    let expected = "\
not observed any more in 3 of 3 workers
FUNCTION        WORKER  OUTCOME           STOPS
Foo (engine 5)  11      restored          -
Foo (engine 5)  12      off               -
Foo (engine 6)  21      was not observed  -
worker 12: nothing is counted, the bytes stay for now: a call is under way
";
    assert_eq!(graph::observed(&report), expected);
}

#[test]
fn where_there_is_nothing_to_do_that_is_said() {
    let already = |on| report(on, vec![worker(11, ObserveOutcome::Already)]);
    let first = |report| graph::observed(&report).lines().next().unwrap().to_owned();
    assert_eq!(
        first(already(true)),
        "already observed in 1 worker; nothing was done"
    );
    assert_eq!(
        first(already(false)),
        "not observed in 1 worker; nothing was done"
    );
    assert_eq!(
        graph::observed(&report(true, vec![])),
        "there are no workers; nothing was done\n"
    );
}

#[tokio::test]
async fn a_worker_that_failed_makes_the_command_fail() {
    let workers = vec![worker(11, ObserveOutcome::Observed), worker(12, failed())];
    let agent = Canned::start(Graph::default(), report(true, workers.clone()));
    let (exit, out, err) = agent.agentctl("observe on Foo").await;
    assert_eq!(exit, Exit::Refused);
    assert!(out.starts_with("observed in 1 of 2 workers\n"), "{out}");
    assert_eq!(
        err,
        "agentctl: Foo: worker 12: gdb traces it [traced]\n  end gdb first\n"
    );

    let (exit, out, err) = agent.agentctl("observe on Foo --json").await;
    assert_eq!((exit, err.as_str()), (Exit::Refused, ""));
    let answer: ObserveReport = serde_json::from_str(&out).unwrap();
    assert_eq!(answer, report(true, workers));
}

#[tokio::test]
async fn workers_that_exited_meanwhile_are_no_failure() {
    let workers = vec![
        worker(11, ObserveOutcome::Observed),
        worker(12, ObserveOutcome::Gone),
    ];
    let agent = Canned::start(Graph::default(), report(true, workers));
    let (exit, _, err) = agent.agentctl("observe on").await;
    assert_eq!((exit, err.as_str()), (Exit::Done, ""));
}

#[test]
fn the_graph_is_two_tables() {
    let expected = "\
rates and latencies: of the last 10 s; counts: since each worker was first observed

FUNCTION  OBSERVED  CALLS  CALLS/S  ARRIVALS/S  ERRORS  OWN MEAN  OWN P99
Bar       2/2       1,200  12.5     12.5        1       1.50 ms   4.50 ms
Baz       2/2       10     12.5     12.5        1       1.50 ms   4.50 ms
Foo       2/2       4,000  12.5     12.5        1       1.50 ms   4.50 ms
Gopher    0/1       0      0        -           0       -         -

EDGE       STATE  RPC CALLS  FUSED CALLS  CALLS/S  ERRORS  IN        OUT      RPC MEAN  RPC P50  RPC P99  FUSED MEAN  FUSED P99  CONCURRENCY
Foo → Bar  RPC    1,200      0            120      2       46.9 KiB  3.0 MiB  150 µs    135 µs   450 µs   -           -          0.42, 3 now
Foo → Baz  fused  10         9,000        1,000    0       46.9 KiB  3.0 MiB  -         -        -        80 ns       240 ns     -
Gopher can't be fused: not native (Go)
note: Gopher's calls are not seen
";
    assert_eq!(graph::graph(&sample::graph(), false), expected);
}

#[test]
fn sites_are_shown_when_asked_for() {
    let text = graph::graph(&sample::graph(), true);
    let expected = "

EDGE       SITE              RPC CALLS
Foo → Bar  libfoo.so+0x1234  1,200
Gopher can't be fused: not native (Go)
";
    assert!(text.contains(expected), "{text}");
    let text = graph::graph(
        &Graph {
            edges: vec![],
            ..sample::graph()
        },
        true,
    );
    assert!(
        text.contains(
            "\nno call from one function to another was seen yet\n\nno place that calls is known\n"
        ),
        "{text}"
    );
}

#[test]
fn nothing_observed_says_what_to_do() {
    let mut nothing = Graph {
        notes: vec!["no engine is visible".to_owned()],
        ..Graph::default()
    };
    let expected = "nothing is observed: agentctl observe on\nnote: no engine is visible\n";
    assert_eq!(graph::graph(&nothing, true), expected);
    nothing.nodes = sample::graph().nodes;
    for node in &mut nothing.nodes {
        (node.observed, node.calls) = (0, 0);
    }
    assert_eq!(graph::graph(&nothing, true), expected);
    // What was counted before, or runs fused, is shown all the same.
    nothing.edges = sample::graph().edges;
    let text = graph::graph(&nothing, false);
    assert!(text.contains("Foo → Baz"), "{text}");
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn engines_are_told_apart_and_names_are_shown_not_obeyed() {
    let mut graph = sample::graph();
    let other = GraphNode {
        function: HOSTILE.to_owned(),
        engine: None,
        ..graph.nodes[0].clone()
    };
    graph.nodes.push(other);
    let text = graph::graph(&graph, false);
    assert!(text.contains("Foo → Bar (engine 5)  RPC"), "{text}");
    assert!(text.contains("\\u{1b}[2J (engine ?)"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[tokio::test]
async fn the_graph_comes_in_each_form() {
    let agent = Canned::example();
    let (exit, out, _) = agent.agentctl("graph --json").await;
    assert_eq!((exit, out.lines().count()), (Exit::Done, 1));
    let graph: Graph = serde_json::from_str(&out).unwrap();
    assert_eq!(graph, sample::graph());

    let (exit, out, _) = agent.agentctl("graph --dot").await;
    assert_eq!((exit, out), (Exit::Done, dot::dot(&graph)));

    let file = agent.dir.path().join("graph.html");
    let line = format!("graph --html {}", file.display());
    let (exit, out, err) = agent.agentctl(&line).await;
    assert_eq!((exit, err.as_str()), (Exit::Done, ""));
    let expected = format!("wrote {}, with 2 steps of history\n", file.display());
    assert_eq!(out, expected);
    let page = page::page(&graph, &sample::history()).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), page);
}

#[tokio::test]
async fn a_page_that_can_not_be_written_is_a_failure() {
    let agent = Canned::example();
    let (exit, out, err) = agent.agentctl("graph --html /dev/null").await;
    assert_eq!((exit, out.as_str()), (Exit::Refused, ""));
    assert_eq!(
        err,
        "agentctl: can't write /dev/null: it is no ordinary file [not-written]\n"
    );
}

#[tokio::test]
async fn forms_that_exclude_each_other_are_a_usage_error() {
    let agent = Canned::example();
    let (exit, out, err) = agent.agentctl("--json graph --watch").await;
    assert_eq!((exit, out.as_str()), (Exit::Usage, ""));
    assert!(
        err.starts_with("error: the argument '--json' cannot be used with '--watch [<SECONDS>]'\n"),
        "{err}"
    );
}

/// Reads two frames and goes.
#[derive(Default)]
struct Reader {
    frames: Vec<String>,
}

impl Write for Reader {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.frames.len() == 2 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let text = String::from_utf8(bytes.to_vec()).map_err(io::Error::other)?;
        self.frames.push(text);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn watching_ends_with_its_reader() {
    let agent = Canned::example();
    let mut reader = Reader::default();
    let (exit, err) = agent.agentctl_to("graph --watch 100ms", &mut reader).await;
    assert_eq!((exit, err.as_str()), (Exit::Done, ""));
    let table = graph::graph(&sample::graph(), false);
    assert_eq!(reader.frames, [table.clone(), format!("\n{table}")]);
}

#[tokio::test]
async fn watching_without_an_agent_says_so() {
    let agent = Canned::example();
    std::fs::remove_file(agent.dir.path().join("agent.sock")).unwrap();
    let (exit, out, err) = agent.agentctl("graph --watch").await;
    assert_eq!((exit, out.as_str()), (Exit::NoAgent, ""));
    assert!(err.starts_with("agentctl: no agent answers on "), "{err}");
}
