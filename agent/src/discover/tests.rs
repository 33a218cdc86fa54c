//! Scans of proc file systems laid out on disk.

use std::fs;
use std::path::Path;

use super::{Node, ProcRoot, scan, tracer_of};
use crate::api::{Tracer, WorkerKind};
use crate::testing::{FakeProc, FakeProcess};

const ENV: &[&str] = &[
    "FAAS_FUNC_ID=1",
    "FAAS_FPROCESS_ID=0",
    "FAAS_CLIENT_ID=5",
    "FAAS_FUNC_ID=99",
];
const NATIVE: &[&str] = &["/nightcore/func_worker_v1", "/functions/libfoo.so"];

fn worker(pid: i32, ppid: i32) -> FakeProcess<'static> {
    FakeProcess {
        pid,
        ppid,
        argv: NATIVE,
        env: ENV,
        ..FakeProcess::default()
    }
}

fn pids(node: &Node) -> Vec<i32> {
    node.functions
        .iter()
        .flat_map(|f| &f.workers)
        .map(|worker| worker.pid)
        .collect()
}

#[test]
fn a_node_is_put_together() {
    let fake = FakeProc::example();
    let node = scan(&fake.root()).unwrap();
    assert_eq!(node.notes, Vec::<String>::new());
    let labels: Vec<_> = node
        .functions
        .iter()
        .map(|f| (f.label(), f.id, f.engine, f.workers.len()))
        .collect();
    let row = |name: &str, id, workers| (name.to_owned(), id, Some(100), workers);
    assert_eq!(
        labels,
        [
            row("Foo", 1, 2),
            row("Bar", 2, 1),
            row("Baz", 3, 0),
            row("Gopher", 4, 1)
        ]
    );
    assert_eq!(node.functions[0].max_workers, Some(4));
    let foo = &node.functions[0].workers[0];
    assert_eq!(
        (foo.pid, foo.pid_inside, foo.threads, foo.start_time),
        (11, Some(8), 2, 1_000)
    );
    assert_eq!(foo.container_short().as_deref(), Some("cccccccccccc"));
    assert_eq!(
        foo.library.as_deref(),
        Some(Path::new("/functions/libfoo.so"))
    );
    assert_eq!((foo.fprocess_id, foo.client_id), (0, Some(11)));
    let go = &node.functions[3].workers[0];
    assert_eq!(
        go.kind,
        WorkerKind::NotNative {
            language: "Go".to_owned()
        }
    );
    assert_eq!(go.target(), None);
}

#[test]
fn what_a_worker_forked_is_no_worker() {
    let fake = FakeProc::new();
    fake.add(&worker(11, 1));
    fake.add(&worker(12, 11));
    fake.add(&FakeProcess {
        argv: &["/bin/convert", "x"],
        ..worker(13, 11)
    });
    fake.add(&FakeProcess {
        start_time: 2_000,
        ..worker(10, 1)
    });
    assert_eq!(
        pids(&scan(&fake.root()).unwrap()),
        [11],
        "the eldest of its launcher"
    );
}

#[test]
fn the_shell_that_a_launcher_went_through_is_no_worker() {
    let shell = &[
        "/bin/sh",
        "-c",
        "/nightcore/func_worker_v1 /functions/libfoo.so",
    ];
    let fake = FakeProc::new();
    fake.add(&FakeProcess {
        argv: shell,
        ..worker(11, 1)
    });
    fake.add(&worker(12, 11));
    assert_eq!(pids(&scan(&fake.root()).unwrap()), [12]);

    let fake = FakeProc::new();
    fake.add(&FakeProcess {
        argv: &["sh", "-c", "node main.js"],
        ..worker(11, 1)
    });
    fake.add(&FakeProcess {
        argv: &["node", "main.js"],
        ..worker(12, 11)
    });
    fake.add(&FakeProcess {
        argv: &["node", "helper.js"],
        ..worker(13, 12)
    });
    assert_eq!(pids(&scan(&fake.root()).unwrap()), [12]);
}

#[test]
fn a_process_that_vanishes_midway_is_skipped() {
    let fake = FakeProc::example();
    fs::remove_file(fake.path(11).join("status")).unwrap();
    fs::remove_file(fake.path(12).join("environ")).unwrap();
    fs::remove_file(fake.path(21).join("stat")).unwrap();
    fs::create_dir(fake.path(500)).unwrap();
    let node = scan(&fake.root()).unwrap();
    assert_eq!(pids(&node), [31]);
    assert_eq!(node.notes, Vec::<String>::new());
}

#[test]
fn garbage_is_left_out_and_said() {
    let fake = FakeProc::example();
    fs::write(fake.path(11).join("stat"), "nonsense").unwrap();
    let node = scan(&fake.root()).unwrap();
    assert_eq!(pids(&node), [12, 21, 31]);
    assert_eq!(
        node.notes,
        ["process 11 was left out: stat is not as in proc(5)"]
    );
}

#[test]
fn zombies_and_kernel_threads_are_no_workers() {
    let fake = FakeProc::example();
    fs::write(fake.path(11).join("cmdline"), "").unwrap();
    let stat = fs::read_to_string(fake.path(12).join("stat")).unwrap();
    fs::write(fake.path(12).join("stat"), stat.replace(") S ", ") Z ")).unwrap();
    assert_eq!(pids(&scan(&fake.root()).unwrap()), [21, 31]);
}

#[test]
fn a_relative_configuration_is_found_from_the_engine_s_directory() {
    let fake = FakeProc::example();
    fake.add(&FakeProcess {
        pid: 100,
        argv: &["engine", "--func_config_file", "./conf/../func_config.json"],
        ..FakeProcess::default()
    });
    fake.link(100, "cwd", "/srv/app");
    fake.write(100, "/srv/app/conf/keep", "");
    fake.write(
        100,
        "/srv/app/func_config.json",
        r#"[{"funcName":"Moved","funcId":1}]"#,
    );
    let node = scan(&fake.root()).unwrap();
    assert_eq!(node.functions[0].label(), "Moved");
}

#[test]
fn a_relative_library_is_told_as_the_container_sees_it() {
    let fake = FakeProc::new();
    let argv = &["func_worker_v1", "./libfoo.so"];
    fake.add(&FakeProcess {
        argv,
        ..worker(11, 1)
    });
    fake.link(11, "cwd", "/functions");
    let node = scan(&fake.root()).unwrap();
    let library = node.functions[0].workers[0].library.clone().unwrap();
    assert_eq!(
        library,
        Path::new("/functions/libfoo.so"),
        "components compare alike"
    );
}

#[test]
fn an_unreadable_configuration_leaves_workers_with_their_log_s_name() {
    let fake = FakeProc::example();
    fake.write(100, "/etc/func_config.json", "[{");
    fake.link(11, "fd/1", "/out/Foo_worker_0.stdout");
    let node = scan(&fake.root()).unwrap();
    assert!(
        node.notes[0]
            .starts_with("can't read /etc/func_config.json of process 100: EOF while parsing")
    );
    let foo = node
        .functions
        .iter()
        .find(|f| f.name.as_deref() == Some("Foo"))
        .unwrap();
    assert_eq!((foo.engine, foo.workers[0].pid), (Some(100), 11));
}

#[test]
fn the_gateway_stands_in_for_an_engine_that_can_not_be_read() {
    let fake = FakeProc::example();
    fake.write(100, "/etc/func_config.json", "[{");
    fake.add(&FakeProcess {
        pid: 90,
        argv: &["gateway", "--func_config_file=/c.json"],
        ..FakeProcess::default()
    });
    fake.write(90, "/c.json", r#"[{"funcName":"Foo","funcId":1}]"#);
    let node = scan(&fake.root()).unwrap();
    assert_eq!(node.functions[0].label(), "Foo");
    assert_eq!(node.functions[0].engine, Some(100));
}

#[test]
fn two_engines_keep_their_workers_apart() {
    let fake = FakeProc::new();
    for (pid, name) in [(100, "Foo"), (200, "Other")] {
        let ipc = format!("--root_path_for_ipc=/dev/shm/{pid}");
        let argv: &[&str] = &["engine", "--func_config_file=/c.json", &ipc];
        fake.add(&FakeProcess {
            pid,
            argv,
            ..FakeProcess::default()
        });
        fake.write(
            pid,
            "/c.json",
            &format!(r#"[{{"funcName":"{name}","funcId":1}}]"#),
        );
    }
    let mut env = ENV.to_vec();
    env.push("FAAS_ROOT_PATH_FOR_IPC=/dev/shm/200");
    fake.add(&FakeProcess {
        env: &env,
        ..worker(11, 1)
    });
    let node = scan(&fake.root()).unwrap();
    let with_worker: Vec<_> = node
        .functions
        .iter()
        .filter(|f| !f.workers.is_empty())
        .map(|f| (f.label(), f.engine))
        .collect();
    assert_eq!(with_worker, [("Other".to_owned(), Some(200))]);
}

#[test]
fn an_unclear_engine_is_noted_with_the_worker() {
    let fake = FakeProc::new();
    for (pid, name) in [(100, "Foo"), (200, "Other")] {
        let ipc = format!("--root_path_for_ipc=/dev/shm/{pid}");
        let argv: &[&str] = &["engine", "--func_config_file=/c.json", &ipc];
        fake.add(&FakeProcess {
            pid,
            argv,
            ..FakeProcess::default()
        });
        fake.write(
            pid,
            "/c.json",
            &format!(r#"[{{"funcName":"{name}","funcId":1}}]"#),
        );
    }
    fake.add(&worker(11, 1));
    let node = scan(&fake.root()).unwrap();
    assert_eq!(
        node.notes,
        [
            "worker 11: its engine is not clear, and function 1 is Foo (engine 100) or Other \
          (engine 200)"
        ]
    );
}

#[test]
fn the_tracer_is_named() {
    let fake = FakeProc::example();
    fake.add(&FakeProcess {
        tracer: 77,
        ..worker(11, 1)
    });
    fake.add(&FakeProcess {
        pid: 77,
        argv: &["gdb"],
        ..FakeProcess::default()
    });
    let stat = fs::read_to_string(fake.path(77).join("stat")).unwrap();
    fs::write(
        fake.path(77).join("stat"),
        stat.replace("(worker)", "(gdb)"),
    )
    .unwrap();
    let expected = Some(Tracer {
        pid: 77,
        name: "gdb".to_owned(),
    });
    assert_eq!(tracer_of(&fake.root(), 11), expected);
    let node = scan(&fake.root()).unwrap();
    assert_eq!(node.functions[0].workers[0].tracer, expected);
    assert_eq!(tracer_of(&fake.root(), 12), None);
}

#[test]
fn a_proc_that_is_not_there_is_an_error_that_says_so() {
    let error = scan(&ProcRoot::at("/nonexistent")).unwrap_err();
    assert_eq!(error.code(), "discovery-failed");
    assert!(
        error
            .to_string()
            .starts_with("can't look for workers in /nonexistent: No such")
    );
}

#[test]
fn this_machine_can_be_scanned() {
    scan(&ProcRoot::default()).unwrap();
}

#[test]
fn a_file_that_would_hang_a_careless_reader_does_not() {
    let fake = FakeProc::example();
    fs::remove_file(fake.path(11).join("cmdline")).unwrap();
    // Without a writer, to open it for reading waits for one.
    let mode = nix::sys::stat::Mode::S_IRWXU;
    nix::unistd::mkfifo(&fake.path(11).join("cmdline"), mode).unwrap();
    let node = scan(&fake.root()).unwrap();
    assert_eq!(pids(&node), [12, 21, 31]);
}
