//! A node comes, changes and goes, and leaves nothing behind.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{ask, foo_bar_baz, library};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{FunctionSpec, NestedMode, Node, NodeSpec, until};

/// All that a node has outside of its starter's memory.
struct Traces {
    pids: Vec<i32>,
    paths: Vec<PathBuf>,
}

impl Traces {
    fn of(node: &Node, functions: &[&str]) -> Self {
        let mut pids = vec![node.engine_pid(), node.gateway_pid(), node.keeper_pid()];
        let mut paths = vec![node.dir().to_owned(), node.ipc_root().to_owned()];
        for f in functions {
            let container = node.container(f).expect("a container");
            pids.push(container.init);
            pids.extend(node.workers(f).expect("workers").iter().map(|w| w.host_pid));
            for hierarchy in fs::read_dir("/sys/fs/cgroup")
                .into_iter()
                .flatten()
                .flatten()
            {
                paths.push(hierarchy.path().join("docker").join(&container.id));
            }
            paths.push(Path::new("/sys/fs/cgroup/docker").join(&container.id));
        }
        Self { pids, paths }
    }

    fn living(&self) -> Vec<i32> {
        let lives = |pid: &i32| match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => !stat
                .rsplit(") ")
                .next()
                .unwrap_or("Z")
                .starts_with(['Z', 'X']),
            Err(_) => false,
        };
        self.pids.iter().copied().filter(lives).collect()
    }

    fn present(&self) -> Vec<&PathBuf> {
        self.paths.iter().filter(|p| p.exists()).collect()
    }
}

#[test]
fn a_stopped_node_leaves_nothing() {
    let node = Node::start(foo_bar_baz(2)).unwrap();
    let traces = Traces::of(&node, &["Foo", "Bar", "Baz"]);
    assert_eq!(traces.living().len(), 3 + 3 + 5);
    assert!(traces.present().len() > 2);
    node.stop().unwrap();
    assert_eq!(traces.living(), Vec::<i32>::new());
    assert_eq!(traces.present(), Vec::<&PathBuf>::new());
}

#[test]
fn a_killed_keeper_takes_all_processes_along() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    let traces = Traces::of(&node, &["Foo", "Bar", "Baz"]);
    kill(node.keeper_pid());
    until("all are dead", || traces.living().is_empty());
    // Directories are the starter's to remove, since it lives.
    assert!(node.call("Foo", b"hello").is_err());
    drop(node);
    assert_eq!(traces.present(), Vec::<&PathBuf>::new());
}

#[test]
fn a_killed_starter_leaves_nothing() {
    let mut starter = Command::new(env!("CARGO_BIN_EXE_nightnode"))
        .arg(format!("Foo={}", library("foo.c").display()))
        .arg(format!("Bar={}", library("bar.c").display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(starter.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let said: serde_json::Value = serde_json::from_str(&line).unwrap();
    let pids: Vec<i32> = serde_json::from_value(said["pids"].clone()).unwrap();
    let paths: Vec<PathBuf> = serde_json::from_value(said["paths"].clone()).unwrap();
    let traces = Traces { pids, paths };
    assert_eq!(traces.living().len(), 3 + 2 + 2, "{line}");
    kill(starter.id() as i32);
    starter.wait().unwrap();
    until("all are dead", || traces.living().is_empty());
    until("directories are gone", || traces.present().is_empty());
}

fn kill(pid: i32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("kill");
}

#[test]
fn nodes_do_not_meet() {
    let one = Node::start(foo_bar_baz(1)).unwrap();
    let two = Node::start(foo_bar_baz(1)).unwrap();
    for _ in 0..3 {
        ask(&one, "Foo", "hello");
    }
    assert_eq!(ask(&one, "Foo", "count"), "Foo:4");
    assert_eq!(ask(&two, "Foo", "count"), "Foo:1");
    drop(one);
    assert_eq!(ask(&two, "Foo", "count"), "Foo:2");
}

#[test]
fn a_function_can_be_deployed_again() {
    let node = Node::start(foo_bar_baz(2)).unwrap();
    let old = node.container("Bar").unwrap();
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    let text = r#"
        #include "lifecycle.h"
        int faas_func_call(void *handle, const char *input, size_t length) {
            struct context *ctx = handle;
            (void)input; (void)length;
            ctx->append(ctx->caller_context, "new", 3);
            return 0;
        }"#;
    let new = fixtures::compile_text("newbar", text, Compiler::Clang, &["-O2"]).unwrap();
    node.redeploy("Bar", Some(&new)).unwrap();
    assert_ne!(node.container("Bar").unwrap().id, old.id);
    for _ in 0..4 {
        assert_eq!(ask(&node, "Foo", "hello"), "Foo:new");
    }
    node.redeploy("Bar", Some(&library("bar.c"))).unwrap();
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    assert_eq!(node.workers("Bar").unwrap().len(), 2);
}

#[test]
fn load_is_answered_correctly_and_workers_are_added() {
    for mode in NestedMode::BOTH {
        let spec = NodeSpec::new([
            FunctionSpec::new("Foo", 1, library("foo.c")).workers(1, 3),
            FunctionSpec::new("Bar", 2, library("bar.c")).workers(1, 2),
        ]);
        let node = Node::start(spec.nested_mode(mode)).unwrap();
        assert_eq!(node.workers("Foo").unwrap().len(), 1);
        let load = Load::start(&LoadSpec::foo(node.http_port(), 6)).unwrap();
        until("Foo has three workers", || {
            node.workers("Foo").unwrap().len() == 3
        });
        std::thread::sleep(Duration::from_millis(700));
        let report = load.stop();
        report.all_correct().unwrap();
        assert!(
            report.correct > 500,
            "{} requests in {:?}",
            report.correct,
            report.elapsed
        );
        assert_eq!(report.latency.len(), report.correct);
        assert_eq!(node.workers("Foo").unwrap().len(), 3);
        assert!(node.workers("Bar").unwrap().len() <= 2);
    }
}

#[test]
fn a_load_knows_a_wrong_answer_and_a_lost_one() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    let mut spec = LoadSpec::foo(node.http_port(), 2);
    spec.function = "Bar".into();
    assert!(
        Load::start(&spec).is_err(),
        "the first answers are checked as well"
    );
    spec.expect = Arc::new(fixtures::bar);
    spec.timeout = Duration::from_millis(300);
    let load = Load::start(&spec).unwrap();
    until("there are answers", || load.snapshot().correct > 100);
    load.snapshot().all_correct().unwrap();
    // Bar is another function from here on, and the request that it is just
    // serving is lost.
    let (now, then) = (
        "bar_handle(worker_handle, input, input_length)",
        "bar_handle(worker_handle, input, input_length - 1)",
    );
    let text = include_str!("../fixtures/bar.c");
    assert!(text.contains(now));
    let text = text.replace(now, then);
    let other = fixtures::compile_text("otherbar", &text, Compiler::Gcc, &["-O2"]).unwrap();
    node.redeploy("Bar", Some(&other)).unwrap();
    until("wrong answers are seen", || load.snapshot().wrong > 100);
    let report = load.stop();
    assert!(report.all_correct().is_err());
    assert!(!report.complaints.is_empty(), "{report:?}");
    // A worker that dies with a request.
    spec.input = Arc::new(|_| b"crash it".to_vec());
    spec.expect = Arc::new(|_| Vec::new());
    let error = Load::start(&spec).err().expect("no first answer");
    let error = format!("{error:#}");
    assert!(error.contains("no answer in time"), "{error}");
}

#[test]
fn a_function_that_does_not_start_is_told() {
    let text = r#"
        #include "worker_v1.h"
        int faas_init(void) { return 7; }
        int faas_create_func_worker(void *c, invoke_func_fn i, append_output_fn a, void **h) {
            (void)c; (void)i; (void)a; *h = 0; return 0;
        }
        int faas_destroy_func_worker(void *h) { (void)h; return 0; }
        int faas_func_call(void *h, const char *i, size_t n) { (void)h; (void)i; (void)n; return 0; }
        "#;
    let broken = fixtures::compile_text("broken", text, Compiler::Gcc, &["-O1"]).unwrap();
    let mut spec = NodeSpec::new([FunctionSpec::new("Broken", 1, broken)]);
    spec.start_within = Duration::from_millis(700);
    let started = Instant::now();
    let error = format!("{:#}", Node::start(spec).err().expect("it cannot start"));
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(error.contains("Broken has 0 ready workers of 1"), "{error}");
    assert!(
        error.contains("faas_init of /functions/libbroken.so returned 7"),
        "{error}"
    );

    let missing = NodeSpec::new([FunctionSpec::new("Foo", 1, "/nowhere/libfoo.so")]);
    let error = Node::start(missing)
        .err()
        .expect("it cannot start")
        .to_string();
    assert_eq!(error, "Foo: no library /nowhere/libfoo.so");

    let twice = ["a.c", "b.c"].map(|_| FunctionSpec::new("Baz", 3, library("baz.c")));
    let error = format!(
        "{:#}",
        Node::start(NodeSpec::new(twice))
            .err()
            .expect("it cannot start")
    );
    assert!(error.contains("the name Baz is there twice"), "{error}");
}

#[test]
fn an_rpc_takes_microseconds() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    let mut runs: Vec<f64> = (0..15)
        .map(|_| {
            let answer = ask(&node, "Foo", "time 500 hello");
            answer.split_once(' ').unwrap().0.parse().unwrap()
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    println!(
        "RPC: best {:.1} µs, median {:.1} µs",
        runs[0] / 1e3,
        runs[7] / 1e3
    );
    // Generous: machines with loaded processors run this test as well.
    assert!(
        runs[0] < 400_000.0,
        "the best of 15 runs: {} ns a call",
        runs[0]
    );
}
