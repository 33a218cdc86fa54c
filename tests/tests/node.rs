//! A node runs, and serves.
use nightgraft_testbed::{FunctionSpec, Node, NodeSpec, fixtures};
use nightgraft_testbed::fixtures::Compiler::Gcc;

#[test]
fn serves() {
    let foo = fixtures::compile("foo.c", Gcc, &["-O2"]).unwrap();
    let bar = fixtures::compile("bar.c", Gcc, &["-O2"]).unwrap();
    let t = std::time::Instant::now();
    let node = Node::start(NodeSpec::new([FunctionSpec::new("Foo", 1, foo), FunctionSpec::new("Bar", 2, bar)])).unwrap();
    eprintln!("start {:?}", t.elapsed());
    assert_eq!(node.call("Foo", b"hello").unwrap(), b"Foo:olleh|4f9f2cab|6c");
    eprintln!("{:?} {:?}", node.workers("Foo").unwrap(), node.container("Bar"));
    for _ in 0..6 { eprintln!("{}", String::from_utf8_lossy(&node.call("Foo", b"time 1000 hello").unwrap())); }
    let w = node.workers("Foo").unwrap()[0].host_pid;
    eprintln!("{}", std::fs::read_to_string(format!("/proc/{w}/cgroup")).unwrap());
    eprintln!("{}", std::fs::read_to_string(format!("/proc/{w}/status")).unwrap());
    eprintln!("{}", std::fs::read_to_string(format!("/proc/{w}/maps")).unwrap());
    eprintln!("{}", std::fs::read_to_string(format!("/proc/{w}/mountinfo")).unwrap());
    eprintln!("{}", node.all_logs());
    let t = std::time::Instant::now();
    node.stop().unwrap();
    eprintln!("stop {:?}", t.elapsed());
}
