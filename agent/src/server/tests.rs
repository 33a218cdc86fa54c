//! The API over a real socket, with a patcher that touches nothing.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::testing::{FakeGrafter, FakeProc, FakeServer, IDLE, PROVEN, living};

/// What a client that knows nothing of ours sees: status and body.
async fn raw(socket: &PathBuf, request: &str) -> (u16, serde_json::Value) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (status, serde_json::from_str(body).unwrap())
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
}

fn post(path: &str, body: &str) -> String {
    // As `curl -d` sends it.
    format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: \
         application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn code(body: &serde_json::Value) -> &str {
    body["error"]["code"].as_str().unwrap()
}

fn server() -> FakeServer {
    let workers = [
        (11, living(&[PROVEN])),
        (12, living(&[PROVEN])),
        (21, living(&[])),
    ];
    FakeServer::start(FakeProc::example(), FakeGrafter::new(workers))
}

#[tokio::test]
async fn every_path_answers_with_its_type() {
    let server = server();
    let (status, body) = raw(&server.socket, &get("/v1/health")).await;
    assert_eq!(status, 200);
    serde_json::from_value::<Health>(body).unwrap();

    let (status, body) = raw(&server.socket, &get("/v1/ps")).await;
    assert_eq!(status, 200);
    let ps: Ps = serde_json::from_value(body).unwrap();
    assert_eq!(ps.functions.len(), 4);

    let edge = r#"{"caller":"foo","callee":"bar"}"#;
    let (status, body) = raw(&server.socket, &post("/v1/explain", edge)).await;
    assert_eq!(status, 200);
    assert_eq!(
        serde_json::from_value::<Explanation>(body).unwrap().caller,
        "Foo"
    );

    let (status, body) = raw(&server.socket, &post("/v1/patch", edge)).await;
    assert_eq!(status, 200);
    assert_eq!(
        serde_json::from_value::<PatchReport>(body)
            .unwrap()
            .not_fused(),
        0
    );

    let (status, body) = raw(&server.socket, &get("/v1/status")).await;
    assert_eq!(status, 200);
    assert_eq!(
        serde_json::from_value::<Status>(body).unwrap().edges[0]
            .workers
            .len(),
        2
    );

    let (status, body) = raw(&server.socket, &post("/v1/revert", edge)).await;
    assert_eq!(status, 200);
    assert!(
        !serde_json::from_value::<RevertReport>(body)
            .unwrap()
            .nothing
    );
}

#[tokio::test]
async fn errors_have_a_status_a_code_and_a_hint() {
    let server = server();
    let (status, body) = raw(
        &server.socket,
        &post("/v1/patch", r#"{"caller":"Fob","callee":"Bar"}"#),
    )
    .await;
    assert_eq!((status, code(&body)), (404, "unknown-function"));
    assert_eq!(
        body["error"]["message"],
        "there is no function \"Fob\" on this node (near: Foo)"
    );
    assert_eq!(body["error"]["hint"], "`agentctl ps` lists the functions");

    let (status, body) = raw(
        &server.socket,
        &post("/v1/patch", r#"{"caller":"Foo","callee":"Gopher"}"#),
    )
    .await;
    assert_eq!((status, code(&body)), (409, "not-native"));

    let (status, body) = raw(&server.socket, &get("/v2/ps")).await;
    assert_eq!((status, code(&body)), (404, "no-such-path"));
    let (status, body) = raw(&server.socket, &get("/v1/patch")).await;
    assert_eq!((status, code(&body)), (404, "no-such-path"));
    assert_eq!(body["error"]["message"], "the agent has no GET /v1/patch");
}

#[tokio::test]
async fn requests_that_are_none_are_told_so() {
    let server = server();
    for (body, what) in [
        ("", "EOF while parsing"),
        ("[]", "invalid length 0"),
        (r#"{"caller":"Foo"}"#, "missing field `callee`"),
        (
            r#"{"caller":"Foo","callee":"Bar","force":true}"#,
            "unknown field `force`",
        ),
    ] {
        let (status, answer) = raw(&server.socket, &post("/v1/patch", body)).await;
        assert_eq!((status, code(&answer)), (400, "bad-request"), "{body}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(what), "{message}");
    }
    assert_eq!(server.grafter.log(), Vec::<String>::new());
}

#[tokio::test]
async fn a_body_has_a_limit() {
    let server = server();
    let body = format!(r#"{{"caller":"{}","callee":"Bar"}}"#, "x".repeat(MAX_BODY));
    let (status, answer) = raw(&server.socket, &post("/v1/patch", &body)).await;
    assert_eq!((status, code(&answer)), (400, "bad-request"));
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("larger than 16384 bytes")
    );
}

#[tokio::test]
async fn what_was_done_comes_with_the_error() {
    let dying = crate::testing::FakeWorker {
        patch_error: Some(GraftError::Failed("out of room".to_owned())),
        ..living(&[])
    };
    let workers = [(11, living(&[PROVEN])), (12, dying), (21, living(&[]))];
    let server = FakeServer::start(FakeProc::example(), FakeGrafter::new(workers));
    let (status, body) = raw(
        &server.socket,
        &post("/v1/patch", r#"{"caller":"Foo","callee":"Bar"}"#),
    )
    .await;
    assert_eq!((status, code(&body)), (500, "graft-failed"));
    assert_eq!(body["report"]["workers"][0]["outcome"]["outcome"], "fused");
    assert_eq!(body["report"]["workers"][1]["outcome"]["outcome"], "failed");
}

#[tokio::test]
async fn requests_that_change_workers_queue_and_others_do_not() {
    let workers = [
        (11, living(&[IDLE])),
        (12, living(&[IDLE])),
        (21, living(&[])),
    ];
    let server = FakeServer::start(FakeProc::example(), FakeGrafter::new(workers));
    let edge = r#"{"caller":"Foo","callee":"Bar","canary_wait_ms":300}"#;
    let (first, second) = (
        post("/v1/patch", edge),
        post("/v1/revert", &edge.replace(r#","canary_wait_ms":300"#, "")),
    );
    let patching = tokio::spawn({
        let socket = server.socket.clone();
        async move { raw(&socket, &first).await }
    });
    // The canary is patched, and now it is watched.
    while server.grafter.log().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let reverting = tokio::spawn({
        let socket = server.socket.clone();
        async move { raw(&socket, &second).await }
    });
    let (status, _) = raw(&server.socket, &get("/v1/status")).await;
    assert_eq!(status, 200, "a reader does not wait for the driver");
    assert_eq!(patching.await.unwrap().0, 200);
    assert_eq!(reverting.await.unwrap().0, 200);
    assert_eq!(
        server.grafter.log(),
        [
            "patch 11 from 21",
            "patch 12 from 21",
            "revert 11",
            "revert 12"
        ],
        "one after the other"
    );
}

#[tokio::test]
async fn only_the_allowed_users_are_served() {
    let server = FakeServer::start_for(
        FakeProc::example(),
        FakeGrafter::default(),
        vec![nix::unistd::geteuid().as_raw() + 1],
    );
    let (status, body) = raw(&server.socket, &get("/v1/ps")).await;
    assert_eq!((status, code(&body)), (403, "denied"));
    let uid = nix::unistd::geteuid();
    let message = body["error"]["message"].as_str().unwrap();
    assert_eq!(
        message,
        format!(
            "user {uid} (pid {}) may not talk to the agent",
            std::process::id()
        )
    );
}

#[tokio::test]
async fn the_socket_is_the_owner_s() {
    let server = server();
    let mode = std::fs::metadata(&server.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_panic_fails_one_request_and_not_the_driver() {
    // The patcher's lock is poisoned by this, so the fake panics once more in
    // the reader; what counts is that both answer.
    let server = server();
    let grafter = Arc::clone(&server.grafter);
    let poisoned = std::thread::spawn(move || {
        let _guard = grafter.workers.lock().unwrap();
        panic!("poison");
    });
    assert!(poisoned.join().is_err());
    let edge = r#"{"caller":"Foo","callee":"Bar"}"#;
    for path in ["/v1/patch", "/v1/patch", "/v1/explain"] {
        let (status, body) = raw(&server.socket, &post(path, edge)).await;
        assert_eq!((status, code(&body)), (500, "internal"), "{path}");
    }
}
