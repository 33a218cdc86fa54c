//! `agent` and `agentctl` as they are installed: exit codes, help, two agents,
//! sockets of dead agents, signals. What they answer in detail is tested in
//! the crate, with a patcher that touches nothing.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use assert_cmd::cargo::cargo_bin;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long something may take that takes milliseconds; only to end a test
/// that has failed anyway.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running agent.
struct Agent {
    child: Child,
    log: Receiver<String>,
    socket: PathBuf,
}

impl Agent {
    fn start(socket: &Path) -> Self {
        let mut child = Command::new(cargo_bin!("agent"))
            .arg("--socket")
            .arg(socket)
            .arg("--state-dir")
            .arg(state(socket))
            .env_remove("RUST_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, log) = channel();
        std::thread::spawn(move || {
            stderr
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| send.send(line))
                .ok();
        });
        let agent = Self {
            child,
            log,
            socket: socket.to_owned(),
        };
        agent.wait_for("serving");
        agent
    }

    /// Waits for a line of the log.
    fn wait_for(&self, what: &str) -> String {
        loop {
            let line = self
                .log
                .recv_timeout(PATIENCE)
                .expect("the agent says no more");
            if line.contains(what) {
                return line;
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    fn agentctl(&self, args: &[&str]) -> Ran {
        agentctl(&self.socket, args)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a program ended, and what it said.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn agentctl(socket: &Path, args: &[&str]) -> Ran {
    ran(Command::new(cargo_bin!("agentctl"))
        .arg("--socket")
        .arg(socket)
        .args(args))
}

/// The directory of the agent that serves a socket.
fn state(socket: &Path) -> PathBuf {
    socket.with_file_name("state")
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    (dir, socket)
}

#[test]
fn without_an_agent_agentctl_says_how_to_start_one_and_exits_3() {
    let (_dir, socket) = place();
    for command in [
        &["ps"][..],
        &["status"],
        &["health"],
        &["patch", "Foo", "Bar"],
    ] {
        let ran = agentctl(&socket, command);
        assert_eq!((ran.code, ran.out.as_str()), (Some(3), ""), "{command:?}");
        assert_eq!(
            ran.err,
            format!(
                "agentctl: no agent answers on {0}: there is no such socket [no-agent]\n  start \
                 one as root: agent --socket {0}   (in a container: --pid=host --cap-add \
                 SYS_PTRACE, and share the socket's directory)\n",
                socket.display()
            )
        );
    }
}

#[test]
fn a_socket_that_nobody_serves_is_no_agent_either() {
    let (_dir, socket) = place();
    drop(UnixListener::bind(&socket).unwrap());
    let ran = agentctl(&socket, &["ps", "--json"]);
    assert_eq!((ran.code, ran.err.as_str()), (Some(3), ""));
    let body: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(body["error"]["code"], "no-agent");
    assert!(
        body["error"]["message"]
            .as_str()
            .unwrap()
            .ends_with("nobody listens there (any more)")
    );
}

#[test]
fn the_socket_can_come_from_the_environment() {
    let (_dir, socket) = place();
    let ran = ran(Command::new(cargo_bin!("agentctl"))
        .env("NIGHTGRAFT_SOCKET", &socket)
        .arg("ps"));
    assert_eq!(ran.code, Some(3));
    assert!(ran.err.contains(socket.to_str().unwrap()), "{}", ran.err);
}

#[test]
fn what_can_not_be_understood_exits_2() {
    let (_dir, socket) = place();
    for (args, what) in [
        (&[][..], "Usage: agentctl"),
        (&["fuse", "Foo", "Bar"], "unrecognized subcommand 'fuse'"),
        (&["patch", "Foo"], "<CALLEE>"),
        (&["patch", "Foo", "Bar", "Baz"], "unexpected argument 'Baz'"),
        (
            &["patch", "Foo", "Bar", "--canary-wait", "soon"],
            "such as 500ms or 2s",
        ),
        (
            &["patch", "Foo", "Bar", "--canary-wait", "2h"],
            "such as 500ms or 2s",
        ),
        (
            &["patch", "Foo", "Bar", "--canary-wait", "61s"],
            "at most 60 s",
        ),
        (
            &["revert", "Foo", "Bar", "--engine", "x"],
            "invalid value 'x'",
        ),
    ] {
        let ran = agentctl(&socket, args);
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{args:?}");
        assert!(ran.err.contains(what), "{args:?}: {}", ran.err);
    }
}

#[test]
fn help_documents_exit_codes_and_flags() {
    for command in [&["--help"][..], &["ps", "--help"], &["patch", "--help"]] {
        let ran = ran(Command::new(cargo_bin!("agentctl")).args(command));
        assert_eq!(ran.code, Some(0));
        for what in [
            "0  done, or there was nothing to do",
            "1  refused or failed",
            "2  the command line can't be understood",
            "3  no agent answers on the socket",
            "--json",
            "--socket <PATH>",
            "NIGHTGRAFT_SOCKET",
            "/run/nightgraft/agent.sock",
        ] {
            assert!(
                ran.out.contains(what),
                "{command:?} lacks {what:?}:\n{}",
                ran.out
            );
        }
    }
    let ran = ran(Command::new(cargo_bin!("agentctl")).args(["patch", "--help"]));
    assert!(ran.out.contains("--canary-wait <TIME>") && ran.out.contains("[default: 2s]"));
}

#[test]
fn the_agent_s_help_says_what_it_needs() {
    let ran = ran(Command::new(cargo_bin!("agent")).arg("--help"));
    assert_eq!(ran.code, Some(0));
    for what in [
        "--socket <PATH>",
        "--docker-socket <PATH>",
        "--config <FILE>",
        "--state-dir <DIR>",
        "/var/lib/nightgraft",
        "--pid=host",
        "--cap-add SYS_PTRACE",
    ] {
        assert!(ran.out.contains(what), "lacks {what:?}:\n{}", ran.out);
    }
}

#[test]
fn an_agent_answers_and_ends_at_sigterm_and_sigint_without_a_trace() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (_dir, socket) = place();
        let mut agent = Agent::start(&socket);
        let health = agent.agentctl(&["health"]);
        assert_eq!(health.code, Some(0), "{}", health.err);
        assert!(
            health.out.contains(&format!("(pid {})", agent.child.id())),
            "{}",
            health.out
        );
        let json: serde_json::Value =
            serde_json::from_str(&agent.agentctl(&["ps", "--json"]).out).unwrap();
        assert!(json["functions"].is_array());
        kill(agent.pid(), signal).unwrap();
        assert_eq!(agent.child.wait().unwrap().code(), Some(0));
        assert!(!socket.exists());
        assert_eq!(agentctl(&socket, &["ps"]).code, Some(3));
    }
}

#[test]
fn an_unknown_function_exits_1_with_its_code() {
    let (_dir, socket) = place();
    let agent = Agent::start(&socket);
    for command in ["explain", "patch", "revert"] {
        let ran = agent.agentctl(&[command, "NoSuchFunction", "Neither"]);
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{command}");
        let first = ran.err.lines().next().unwrap();
        assert!(
            first.starts_with("agentctl: there is no function \"NoSuchFunction\" on this node"),
            "{first}"
        );
        assert!(first.ends_with("[unknown-function]"), "{first}");
    }
    agent.wait_for("asked to patch");
}

#[test]
fn a_second_agent_refuses_and_the_first_serves_on() {
    let (_dir, socket) = place();
    let agent = Agent::start(&socket);
    let second = ran(Command::new(cargo_bin!("agent"))
        .arg("--socket")
        .arg(&socket));
    assert_eq!(second.code, Some(1));
    assert_eq!(
        second.err,
        format!(
            "agent: another agent (pid {}) already serves {}: stop it first, or give this one a \
             --socket of its own\n",
            agent.child.id(),
            socket.display()
        )
    );
    assert_eq!(agent.agentctl(&["health"]).code, Some(0));
}

#[test]
fn a_second_agent_needs_a_directory_of_its_own() {
    let (_dir, socket) = place();
    let agent = Agent::start(&socket);
    let other = socket.with_file_name("other.sock");
    let second = ran(Command::new(cargo_bin!("agent"))
        .arg("--socket")
        .arg(&other)
        .env("NIGHTGRAFT_STATE_DIR", state(&socket)));
    assert_eq!(second.code, Some(1));
    assert_eq!(
        second.err,
        format!(
            "agent: another agent (pid {}) keeps its journal in {}: stop it first, or give this \
             one a --state-dir of its own\n",
            agent.child.id(),
            state(&socket).display()
        )
    );
    assert!(!other.exists());
}

#[test]
fn without_a_journal_the_agent_serves_and_says_so() {
    let (_dir, socket) = place();
    std::fs::write(state(&socket), "no directory").unwrap();
    let agent = Agent::start(&socket);
    let health = agent.agentctl(&["health"]);
    assert_eq!(health.code, Some(0));
    assert!(
        health
            .out
            .contains("the journal is away, nothing is patched until it is back: can't make"),
        "{}",
        health.out
    );
    assert_eq!(
        std::fs::read_to_string(state(&socket)).unwrap(),
        "no directory"
    );
}

#[test]
fn a_killed_agent_leaves_nothing_that_keeps_the_next_from_serving() {
    let (_dir, socket) = place();
    let mut first = Agent::start(&socket);
    kill(first.pid(), Signal::SIGKILL).unwrap();
    first.child.wait().unwrap();
    assert!(socket.exists(), "it had no time to clean up");
    assert_eq!(agentctl(&socket, &["ps"]).code, Some(3));
    let second = Agent::start(&socket);
    assert_eq!(second.agentctl(&["ps"]).code, Some(0));
}

#[test]
fn something_else_in_the_socket_s_place_is_left_alone() {
    let (_dir, socket) = place();
    std::fs::write(&socket, "precious").unwrap();
    let ran = ran(Command::new(cargo_bin!("agent"))
        .arg("--socket")
        .arg(&socket));
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("exists and is no socket"), "{}", ran.err);
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}

#[test]
fn a_server_that_is_no_agent_is_an_error_and_not_no_agent() {
    let (_dir, socket) = place();
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _): (UnixStream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    });
    let ran = agentctl(&socket, &["ps"]);
    server.join().unwrap();
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("gave no proper answer"), "{}", ran.err);
    assert!(ran.err.contains("[no-answer]"), "{}", ran.err);
}
