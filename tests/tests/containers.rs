//! What a worker looks like from the host and from inside.

mod common;

use std::collections::HashSet;
use std::fs;

use common::{ask, foo_bar_baz, library};
use nightgraft_testbed::fixtures::{self, Compiler};
use nightgraft_testbed::{FunctionSpec, Node, NodeSpec};
use object::{Object, ObjectSymbol};

const INVOKE: &str = "_ZN4faas9worker_v110FuncWorker17InvokeFuncWrapperEPvPKcS4_mPS4_Pm";

#[test]
fn every_function_has_namespaces_of_its_own() {
    let node = Node::start(foo_bar_baz(1)).unwrap();
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let mut seen = HashSet::new();
        let mut look = |pid: &str| {
            let link = fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert!(seen.insert(link), "{namespace} of {pid} is another's");
        };
        look("self");
        for function in ["Foo", "Bar", "Baz"] {
            look(&node.workers(function).unwrap()[0].host_pid.to_string());
        }
    }
    // The engine is reached through the host's own root.
    let engine = node.engine_pid();
    let cmdline = fs::read_to_string(format!("/proc/{engine}/cmdline")).unwrap();
    let config = cmdline
        .split('\0')
        .find_map(|a| a.strip_prefix("--func_config_file="))
        .unwrap();
    let config = fs::read_to_string(format!("/proc/{engine}/root{config}")).unwrap();
    assert!(config.contains("\"funcName\": \"Foo\""), "{config}");
}

#[test]
fn a_worker_looks_as_nightcores_does() {
    let node = Node::start(foo_bar_baz(2)).unwrap();
    let container = node.container("Foo").unwrap();
    let workers = node.workers("Foo").unwrap();
    assert_eq!(workers.iter().map(|w| w.number).collect::<Vec<_>>(), [0, 1]);
    assert_ne!(workers[0].client, workers[1].client);
    for w in &workers {
        let proc = format!("/proc/{}", w.host_pid);
        let read = |name: &str| fs::read(format!("{proc}/{name}")).unwrap();
        assert_eq!(
            read("cmdline"),
            b"/nightcore/func_worker_v1\0/functions/libfoo.so\0"
        );
        let cgroup = String::from_utf8(read("cgroup")).unwrap();
        let end = format!("/docker/{}", container.id);
        assert!(cgroup.lines().any(|l| l.ends_with(&end)), "{cgroup}");
        assert_eq!(container.id.len(), 64);
        let status = |name: &str| w.status(name).unwrap();
        assert_eq!(status("NSpid").split_whitespace().count(), 2);
        assert_eq!(
            status("PPid"),
            container.init.to_string(),
            "the launcher is PID 1"
        );
        assert_eq!(
            (status("Seccomp").as_str(), status("Threads").as_str()),
            ("2", "1")
        );
        assert_eq!(status("SigBlk"), "0000000000000000");
        let capabilities = u64::from_str_radix(&status("CapEff"), 16).unwrap();
        assert_eq!(
            capabilities, 0xa804_25fb,
            "Docker's default set: no SYS_PTRACE"
        );
        assert!(w.waits_for_request(), "idle is read(5, …, 1024)");
        let environ = String::from_utf8(read("environ")).unwrap();
        for name in [
            "FAAS_FUNC_ID=1\0",
            "FAAS_MSG_PIPE_FD=3\0",
            "FAAS_ROOT_PATH_FOR_IPC=/dev/shm/faas_ipc\0",
            &format!("FAAS_CLIENT_ID={}\0", w.client),
            &format!("FAAS_FPROCESS_ID={}\0", w.number),
        ] {
            assert!(environ.contains(name), "{name}: {environ}");
        }
        // Descriptors, by what they are.
        let link = |fd: u32| fs::read_link(format!("{proc}/fd/{fd}")).unwrap();
        assert!(link(3).to_string_lossy().starts_with("socket:"));
        assert!(link(4).to_string_lossy().starts_with("socket:"));
        assert!(link(5).ends_with(format!("fifo/worker_{}_input", w.client)));
        assert!(link(6).ends_with(format!("fifo/worker_{}_output", w.client)));
        assert!(fs::read_link(format!("{proc}/fd/7")).is_err());
        assert!(node.log(&format!("Foo_worker_{}.stdout", w.number)).is_ok());
        // The root is read-only, and has the function.
        let mounts = String::from_utf8(read("mountinfo")).unwrap();
        let root = mounts
            .lines()
            .find(|l| l.split(' ').nth(4) == Some("/"))
            .unwrap();
        assert!(root.split(' ').nth(5).unwrap().starts_with("ro,"), "{root}");
        assert!(fs::metadata(format!("{proc}/root/functions/libfoo.so")).is_ok());
    }
    let host = ask(&node, "Foo", "host");
    assert_eq!(
        host,
        format!("Foo:{}", &node.container("Bar").unwrap().id[..12])
    );
    assert_eq!(ask(&node, "Foo", "env FAAS_FUNC_ID"), "Foo:2");
}

#[test]
fn the_worker_is_a_dynamic_executable_with_nightcores_symbol() {
    let bytes = fs::read(nightgraft_testbed::bin("func_worker_v1").unwrap()).unwrap();
    let file = object::File::parse(&*bytes).unwrap();
    let invoke = file
        .symbols()
        .find(|s| s.name() == Ok(INVOKE))
        .expect("in .symtab");
    assert!(invoke.is_definition() && invoke.size() > 0);
    assert!(
        file.dynamic_symbols().all(|s| s.name() != Ok(INVOKE)),
        "not exported"
    );
    let imported = |name: &str| file.dynamic_symbols().any(|s| s.name() == Ok(name));
    assert!(imported("read"), "read comes from the C library");
    assert!(imported("dlopen"));
}

#[test]
fn the_filter_is_dockers() {
    let text = r#"
        #define _GNU_SOURCE
        #include <errno.h>
        #include <pthread.h>
        #include <stdio.h>
        #include <sys/ptrace.h>
        #include <sys/socket.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        #include "lifecycle.h"
        static long attempt(long number, long a) {
            errno = 0;
            return syscall(number, a, 0, 0, 0, 0) == -1 ? errno : 0;
        }
        static void *nothing(void *p) { return p; }
        int faas_func_call(void *handle, const char *input, size_t length) {
            struct context *ctx = handle;
            char text[200];
            pthread_t thread;
            (void)input; (void)length;
            int threads = pthread_create(&thread, 0, nothing, 0);
            if (threads == 0) pthread_join(thread, 0);
            int n = snprintf(text, sizeof text,
                "clone3 %ld ptrace %ld unshare %ld mount %ld bpf %ld clone-newuser %ld "
                "vsock %ld inet %d thread %d",
                attempt(SYS_clone3, 0), attempt(SYS_ptrace, PTRACE_TRACEME),
                attempt(SYS_unshare, 0), attempt(SYS_mount, 0), attempt(SYS_bpf, 0),
                attempt(SYS_clone, 0x10000000), attempt(SYS_socket, AF_VSOCK),
                socket(AF_INET, SOCK_DGRAM, 0) >= 0 ? 0 : errno, threads);
            ctx->append(ctx->caller_context, text, (size_t)n);
            return 0;
        }"#;
    let library =
        fixtures::compile_text("trier", text, Compiler::Gcc, &["-O1", "-pthread"]).unwrap();
    let node = Node::start(NodeSpec::new([FunctionSpec::new("Trier", 1, library)])).unwrap();
    // ENOSYS is 38, EPERM 1.
    assert_eq!(
        ask(&node, "Trier", ""),
        "clone3 38 ptrace 1 unshare 1 mount 1 bpf 1 clone-newuser 1 vsock 1 inet 0 thread 0"
    );
}

#[test]
fn a_limit_of_memory_is_kept() {
    let limit = 64 << 20;
    let node = Node::start(NodeSpec::new([FunctionSpec::new(
        "Baz",
        1,
        library("baz.c"),
    )
    .memory_limit(limit)]))
    .unwrap();
    assert_eq!(ask(&node, "Baz", "x"), "Baz<x>");
    let id = node.container("Baz").unwrap().id;
    let found = [
        format!("/sys/fs/cgroup/memory/docker/{id}/memory.limit_in_bytes"),
        format!("/sys/fs/cgroup/docker/{id}/memory.max"),
    ]
    .iter()
    .find_map(|path| fs::read_to_string(path).ok())
    .expect("a limit in one of the hierarchies");
    assert_eq!(found.trim(), limit.to_string());
}
