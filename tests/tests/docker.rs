//! The same node in Docker's containers.
//!
//! Needs Docker's daemon, running or installed. Where there is neither, the
//! test says so and passes, unless `NIGHTGRAFT_REQUIRE_DOCKER` is set: then it
//! fails.

mod common;

use std::fs;
use std::path::Path;
use std::time::Duration;

use common::{ask, foo_bar_baz};
use nightgraft_testbed::fixtures;
use nightgraft_testbed::load::{Load, LoadSpec};
use nightgraft_testbed::{NestedMode, Node, RuntimeKind, until};

fn docker_is_here() -> bool {
    let installed = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|d| d.join("dockerd").exists()));
    let here = installed || Path::new("/var/run/docker.sock").exists();
    let required = std::env::var_os("NIGHTGRAFT_REQUIRE_DOCKER").is_some();
    assert!(
        here || !required,
        "docker is required, and neither running nor installed"
    );
    if !here {
        println!("SKIP: docker is neither running nor installed (package docker.io)");
    }
    here
}

#[test]
fn a_node_in_docker_is_the_same_node() {
    if !docker_is_here() {
        return;
    }
    for mode in NestedMode::BOTH {
        let spec = foo_bar_baz(2)
            .runtime(RuntimeKind::Docker)
            .nested_mode(mode);
        let node = Node::start(spec).unwrap();
        assert_eq!(ask(&node, "Foo", "hello"), "Foo:olleh|4f9f2cab|6c");
        assert_eq!(ask(&node, "Foo", "unknown x"), "Foo:rc=-1 out=null len=0");
        assert_eq!(ask(&node, "Foo", "nested abc"), "Foo:Bar:Baz<abc>");
        assert!(node.call("Foo", b"big 2097152").unwrap() == fixtures::foo_big(2 << 20));

        let container = node.container("Foo").unwrap();
        for w in node.workers("Foo").unwrap() {
            let proc = format!("/proc/{}", w.host_pid);
            let cgroup = fs::read_to_string(format!("{proc}/cgroup")).unwrap();
            assert!(
                cgroup.contains(&format!("/docker/{}", container.id)),
                "{cgroup}"
            );
            let cmdline = fs::read(format!("{proc}/cmdline")).unwrap();
            assert_eq!(
                cmdline,
                b"/nightcore/func_worker_v1\0/functions/libfoo.so\0"
            );
            assert_eq!(w.status("NSpid").unwrap().split_whitespace().count(), 2);
            assert_eq!(w.status("Seccomp").as_deref(), Some("2"));
            assert_eq!(w.status("PPid").unwrap(), container.init.to_string());
            assert!(w.waits_for_request());
        }
        let load = Load::start(&LoadSpec::foo(node.http_port(), 4)).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        load.stop().all_correct().unwrap();

        node.redeploy("Bar", None).unwrap();
        assert_eq!(ask(&node, "Foo", "count"), "Foo:1");

        let (dir, ipc, init) = (
            node.dir().to_owned(),
            node.ipc_root().to_owned(),
            container.init,
        );
        node.stop().unwrap();
        until("the container is gone", || {
            !Path::new(&format!("/proc/{init}")).exists()
        });
        assert!(!dir.exists() && !ipc.exists());
    }
}
