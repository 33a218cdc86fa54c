//! The contract between function and worker, line by line, on a real node, and
//! in both modes of nested calls.

mod common;

use std::time::{Duration, Instant};

use common::{ask, foo_bar_baz, library};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{CallError, FunctionSpec, NestedMode, Node, NodeSpec, until};

const FAILED: &str = "Foo:rc=-1 out=null len=0";

#[test]
fn a_call_is_answered() {
    for mode in NestedMode::BOTH {
        let node = Node::start(foo_bar_baz(1).nested_mode(mode)).unwrap();
        assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
        assert_eq!(ask(&node, "Bar", "hello"), "olleh|4f9f2cab|6c");
        assert_eq!(ask(&node, "Baz", "hello"), "Baz<hello>");
        // The callee's own call.
        assert_eq!(ask(&node, "Foo", "nested abc"), "Foo:Bar:Baz<abc>");
    }
}

#[test]
fn three_answers_are_readable_at_once() {
    for mode in NestedMode::BOTH {
        let node = Node::start(foo_bar_baz(1).nested_mode(mode)).unwrap();
        let bar = |input: &str| String::from_utf8(fixtures::bar(input.as_bytes())).unwrap();
        let long = "x".repeat(5000);
        let expected = format!("Foo:{};{};{}", bar("a"), bar(&long), bar("ccc"));
        assert_eq!(ask(&node, "Foo", &format!("three a {long} ccc")), expected);
    }
}

#[test]
fn failures_are_minus_one_with_null_and_zero() {
    for mode in NestedMode::BOTH {
        let node = Node::start(foo_bar_baz(1).nested_mode(mode)).unwrap();
        // The callee appended something, and then returned 1.
        assert_eq!(ask(&node, "Foo", "fail"), FAILED);
        // An unknown name: no message is sent, so Bar's count stays.
        assert_eq!(ask(&node, "Foo", "unknown x"), FAILED);
        assert_eq!(ask(&node, "Foo", "count"), "Foo:2");
        // The callee's callee fails: Bar gets -1 and returns it.
        assert_eq!(ask(&node, "Foo", "nested fail"), FAILED);
        let log = node.log("Foo_worker_0.stderr").unwrap();
        assert!(log.contains("there is no function NoSuchFunction"), "{log}");
        // None of it was the worker's end.
        assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    }
}

#[test]
fn empty_is_not_failure() {
    for mode in NestedMode::BOTH {
        let node = Node::start(foo_bar_baz(1).nested_mode(mode)).unwrap();
        assert_eq!(ask(&node, "Foo", "empty"), "Foo:rc=0 out=null len=0");
        assert_eq!(ask(&node, "Bar", "empty"), "");
        assert_eq!(ask(&node, "Foo", "zero"), "Foo:|811c9dc5|00");
        assert_eq!(ask(&node, "Bar", ""), "|811c9dc5|00");
    }
}

#[test]
fn every_size_goes_both_ways() {
    for mode in NestedMode::BOTH {
        let node = Node::start(foo_bar_baz(1).nested_mode(mode)).unwrap();
        // Bar adds 12 bytes. Inline are 960 bytes of a message, and 4092 of a
        // FIFO; beyond that are files, of less and more than whole pages.
        for n in [
            0,
            1,
            63,
            64,
            943,
            944,
            945,
            947,
            948,
            949,
            959,
            960,
            961,
            4079,
            4080,
            4081,
            4084,
            4096,
            65_536,
            2 << 20,
            8 << 20,
        ] {
            let answer = node.call("Foo", format!("big {n}").as_bytes()).unwrap();
            assert!(answer == fixtures::foo_big(n), "{n} bytes, {mode:?}");
        }
        // Input of the gateway's, likewise.
        for n in [959, 960, 961, 3 << 20] {
            let input: Vec<u8> = (0..n).map(|i| b'0' + (i % 77) as u8).collect();
            assert!(
                node.call("Foo", &input).unwrap() == fixtures::foo(&input),
                "{n}"
            );
        }
        // No payload's file outlives its call.
        let left: Vec<_> = std::fs::read_dir(node.ipc_root().join("shm"))
            .unwrap()
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn small_payloads_are_aligned_and_followed_by_zeros() {
    let text = r#"
        #include <stdint.h>
        #include <stdio.h>
        #include "lifecycle.h"
        static const char *describe(const char *data, size_t length, char *text) {
            size_t zeros = 0;
            while (length + zeros < 960 && data[length + zeros] == 0) zeros++;
            sprintf(text, "%zu+%zu@%zu", length, zeros, (size_t)((uintptr_t)data % 64));
            return text;
        }
        int faas_func_call(void *handle, const char *input, size_t length) {
            struct context *ctx = handle;
            char text[64];
            const char *out;
            size_t out_length;
            describe(input, length, text);
            ctx->append(ctx->caller_context, text, __builtin_strlen(text));
            if (ctx->invoke(ctx->caller_context, "Baz", "x", 1, &out, &out_length) != 0) return 1;
            describe(out, out_length, text);
            ctx->append(ctx->caller_context, text, __builtin_strlen(text));
            return 0;
        }"#;
    let asks = fixtures::compile_text("looker", text, Compiler::Gcc, &["-O2"]).unwrap();
    let node = Node::start(NodeSpec::new([
        FunctionSpec::new("Looker", 1, asks),
        FunctionSpec::new("Baz", 2, library("baz.c")),
    ]))
    .unwrap();
    // The second call's answer lies where the first one's was.
    for _ in 0..2 {
        assert_eq!(ask(&node, "Looker", "hello"), "5+955@06+954@0");
    }
}

#[test]
fn an_answers_lifetime_ends_with_the_outermost_call() {
    for mode in NestedMode::BOTH {
        // A small answer is overwritten,
        let node = Node::start(foo_bar_baz(1).nested_mode(mode)).unwrap();
        ask(&node, "Foo", "keep it");
        assert_eq!(ask(&node, "Foo", "peek"), "Foo:peek db", "{mode:?}");
        // a large one unmapped: reading it is the worker's end,
        ask(&node, "Foo", &format!("keep {}", "y".repeat(10_000)));
        assert_dies(&node, "peek");

        // and so is a small one, if the node is to be strict.
        let node = Node::start(foo_bar_baz(1).nested_mode(mode).strict_lifetime()).unwrap();
        ask(&node, "Foo", "keep it");
        assert_dies(&node, "peek");
    }
}

/// Foo's only worker dies of a request; nobody answers it, nobody replaces the
/// worker.
fn assert_dies(node: &Node, input: &str) {
    let worker = node.workers("Foo").expect("the node").remove(0);
    let mut client = node.client().expect("the node");
    client
        .set_timeout(Duration::from_millis(400))
        .expect("the node");
    let outcome = client.call("Foo", input.as_bytes());
    assert!(matches!(outcome, Err(CallError::Timeout)), "{outcome:?}");
    assert!(
        !worker.is_alive(),
        "{worker:?} should have died of {input:?}"
    );
    assert!(node.workers("Foo").expect("the node").is_empty());
    let log = node.log("launcher_Foo.log").expect("the node");
    assert!(log.contains("SIGSEGV"), "{log}");
}

#[test]
fn other_workers_go_on_when_one_dies() {
    let node = Node::start(foo_bar_baz(2)).unwrap();
    let before = node.workers("Foo").unwrap();
    assert_eq!(before.len(), 2);
    ask(&node, "Foo", &format!("keep {}", "y".repeat(10_000)));
    let mut client = node.client().unwrap();
    client.set_timeout(Duration::from_millis(300)).unwrap();
    assert!(matches!(
        client.call("Foo", b"peek"),
        Err(CallError::Timeout)
    ));
    let left = node.workers("Foo").unwrap();
    assert_eq!(left.len(), 1);
    let mut spec = LoadSpec::foo(node.http_port(), 3);
    spec.timeout = Duration::from_secs(5);
    let load = Load::start(&spec).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    load.stop().all_correct().unwrap();
    assert_eq!(
        node.workers("Foo").unwrap(),
        left,
        "a dead worker is not replaced"
    );
}

#[test]
fn a_callee_that_dies_leaves_its_caller_waiting() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    let mut client = node.client().unwrap();
    client.set_timeout(Duration::from_millis(300)).unwrap();
    assert!(matches!(
        client.call("Foo", b"crash"),
        Err(CallError::Timeout)
    ));
    let foo = node.workers("Foo").unwrap().remove(0);
    assert!(foo.is_alive() && foo.waits_for_request());
    assert!(node.workers("Bar").unwrap().is_empty());
}

#[test]
fn by_default_a_nested_call_waits_in_read_without_end() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    let foo = node.workers("Foo").unwrap().remove(0);
    std::thread::scope(|s| {
        let call = s.spawn(|| node.call("Foo", b"slow 400"));
        let bar = node.workers("Bar").unwrap().remove(0);
        until("Bar sleeps", || !bar.waits_for_request());
        // Inside an RPC, and yet in the very read of an idle worker.
        assert!(foo.waits_for_request() && !call.is_finished());
        assert_eq!(foo.status("Threads").as_deref(), Some("1"));
        assert_eq!(call.join().unwrap().unwrap(), fixtures::foo(b"slow 400"));
    });
}

#[test]
fn with_fifos_a_nested_call_gives_up_after_100_ms() {
    let node = Node::start(foo_bar_baz(1).nested_mode(NestedMode::Fifo)).unwrap();
    let started = Instant::now();
    assert_eq!(ask(&node, "Foo", "slow 400"), FAILED);
    let took = started.elapsed();
    assert!(
        took >= Duration::from_millis(100) && took < Duration::from_millis(380),
        "{took:?}"
    );
    // Bar is still busy, and then it is not; its late answer harms nobody.
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
    assert_eq!(
        ask(&node, "Foo", "slow 20"),
        String::from_utf8_lossy(&fixtures::foo(b"slow 20"))
    );
    let left: Vec<_> = std::fs::read_dir(node.ipc_root().join("shm"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn recursion_ends_while_there_are_workers() {
    for mode in NestedMode::BOTH {
        let node = Node::start(foo_bar_baz(3).nested_mode(mode)).unwrap();
        assert_eq!(ask(&node, "Foo", "cycle 1"), "Foo:Bar:Foo:end");
        assert_eq!(ask(&node, "Foo", "cycle 2"), "Foo:Bar:Foo:Bar:Foo:end");
    }
}

#[test]
fn recursion_deadlocks_when_workers_run_out() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    let mut client = node.client().unwrap();
    client.set_timeout(Duration::from_millis(300)).unwrap();
    assert!(matches!(
        client.call("Foo", b"cycle 1"),
        Err(CallError::Timeout)
    ));
    // With time-outs it is a failure instead.
    let node = Node::start(foo_bar_baz(1).nested_mode(NestedMode::Fifo)).unwrap();
    assert_eq!(ask(&node, "Foo", "cycle 1"), FAILED);
}

#[test]
fn the_gateway_speaks_http() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    assert!(matches!(
        node.call("Nope", b"x"),
        Err(CallError::Status(404))
    ));
    assert!(matches!(
        node.call("foo", b"x"),
        Err(CallError::Status(404))
    ));
    assert!(matches!(
        node.call("Bar", b"fail"),
        Err(CallError::Status(500))
    ));
    // One connection for many calls, failed ones between them.
    let mut client = node.client().unwrap();
    for i in 0..50 {
        let input: Vec<u8> = (0..=255).map(|b: u8| b.wrapping_add(i + 128)).collect();
        assert_eq!(client.call("Foo", &input).unwrap(), fixtures::foo(&input));
        assert!(matches!(
            client.call("Bar", b"fail"),
            Err(CallError::Status(500))
        ));
    }
    let status = std::process::Command::new("curl")
        .args(["-s", "-o", "/dev/null", "-w", "%{http_code}"])
        .arg(format!(
            "http://127.0.0.1:{}/function/Foo",
            node.http_port()
        ))
        .output()
        .expect("curl is installed");
    assert_eq!(
        status.stdout, b"404",
        "a GET is for functions that allow it"
    );
}

#[test]
fn compiled_in_is_the_same_function() {
    let fused = NodeSpec::new([
        FunctionSpec::new("Foo", 1, library("foobar_fused.c")),
        FunctionSpec::new("Baz", 3, library("baz.c")),
    ]);
    let fused = Node::start(fused).unwrap();
    let apart = Node::start(foo_bar_baz(1)).unwrap();
    for input in [
        "hello",
        "",
        "zero",
        "empty",
        "fail",
        "unknown x",
        "three a bb ccc",
        "nested x",
        "nested fail",
        "count",
        "big 0",
        "big 1000",
        "big 100000",
        "cycle 0",
    ] {
        assert_eq!(
            ask(&fused, "Foo", input),
            ask(&apart, "Foo", input),
            "{input:?}"
        );
    }
    let time = |node: &Node| {
        let answer = ask(node, "Foo", "time 1000 hello");
        let (ns, rest) = answer.split_once(' ').unwrap();
        assert_eq!(rest, "olleh|4f9f2cab|6c");
        ns.parse::<f64>().unwrap()
    };
    let (fused, apart) = (time(&fused), time(&apart));
    assert!(
        fused * 5.0 < apart,
        "compiled in {fused} ns, by RPC {apart} ns"
    );
}

#[test]
fn callers_are_alike_however_they_are_compiled() {
    let (gcc, clang) = (Compiler::Gcc, Compiler::Clang);
    let levels = ["-O0", "-O1", "-O2", "-O3", "-Os"];
    let mut builds = Vec::new();
    for level in levels {
        for extra in ["-fcf-protection=full", "-fno-plt", "-DTAIL"] {
            builds.push((gcc, vec![level, extra]));
            builds.push((clang, vec![level, extra]));
        }
        builds.push((
            gcc,
            vec![level, "-mindirect-branch=thunk", "-fcf-protection=none"],
        ));
    }
    let mut functions = vec![FunctionSpec::new("Bar", 200, library("bar.c"))];
    for (i, (compiler, flags)) in builds.iter().enumerate() {
        let library = fixtures::compile("foo.c", *compiler, flags).unwrap();
        functions.push(FunctionSpec::new(&format!("Foo{i}"), i as u16 + 1, library));
    }
    let node = Node::start(NodeSpec::new(functions)).unwrap();
    for (i, build) in builds.iter().enumerate() {
        let foo = format!("Foo{i}");
        assert_eq!(
            ask(&node, &foo, "hello"),
            "Foo:olleh|4f9f2cab|6c",
            "{build:?}"
        );
        assert_eq!(ask(&node, &foo, "unknown x"), FAILED, "{build:?}");
        assert_eq!(ask(&node, &foo, "fail"), FAILED, "{build:?}");
        let three = ask(&node, &foo, "three a bb ccc");
        assert_eq!(
            three, "Foo:a|e40c292c|61;bb|3f2bab85|62;ccc|e36fa7c0|63",
            "{build:?}"
        );
    }
}
