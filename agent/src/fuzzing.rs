//! What comes from `/proc`, files and clients, read: entry points for fuzzing
//! alone.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::discover;
use crate::policy::Policy;
use crate::testing::{FakeGrafter, FakeProc, FakeServer};

/// Paths of the API and of nothing, with their methods.
const REQUESTS: [(&str, &str); 8] = [
    ("GET", "/v1/health"),
    ("GET", "/v1/ps"),
    ("GET", "/v1/status"),
    ("POST", "/v1/explain"),
    ("POST", "/v1/patch"),
    ("POST", "/v1/revert"),
    ("POST", "/v1/unquarantine"),
    ("PUT", "/v1/nothing"),
];
/// Far more than any answer takes here.
const LIMIT: Duration = Duration::from_secs(20);

/// An agent on a socket whose workers are all gone.
pub struct Server {
    runtime: Runtime,
    server: FakeServer,
}

impl Server {
    /// Starts it.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "a server is no value")]
    pub fn new() -> Server {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let server = runtime
            .block_on(async { FakeServer::start(FakeProc::example(), FakeGrafter::new([])) });
        Server { runtime, server }
    }

    /// Sends a request: the path that the first byte says with the rest as its
    /// body, or the rest as it is. It is answered, and never by an internal
    /// error.
    ///
    /// # Panics
    /// It is not.
    pub fn ask(&self, bytes: &[u8]) {
        let Some((first, rest)) = bytes.split_first() else {
            return;
        };
        let known = REQUESTS.get(usize::from(*first));
        let request = known.map_or_else(
            || rest.to_vec(),
            |(method, path)| {
                let head = format!(
                    "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                    rest.len()
                );
                [head.as_bytes(), rest].concat()
            },
        );
        let answer = self.runtime.block_on(async {
            let mut stream = UnixStream::connect(&self.server.socket).await?;
            // It may hang up before it has heard all of it.
            let _ = stream.write_all(&request).await;
            if known.is_none() {
                // There may be no end of a request in it. Otherwise who stops
                // talking is taken for gone.
                let _ = stream.shutdown().await;
            }
            let mut answer = Vec::new();
            let read = stream.read_to_end(&mut answer);
            let _ = tokio::time::timeout(LIMIT, read)
                .await
                .expect("an answer in time");
            std::io::Result::Ok(answer)
        });
        let answer = answer.expect("the agent listens");
        if known.is_none() {
            return;
        }
        let answer = String::from_utf8_lossy(&answer);
        let status = answer.split(' ').nth(1).expect("a status");
        assert!(status.starts_with(['2', '4']), "{answer}");
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
        if status.starts_with('4') {
            assert!(body["error"]["code"].is_string(), "{body}");
        }
    }
}

/// Reads bytes as each of the files that describe a process or a node.
pub fn proc_text(bytes: &[u8]) {
    discover::proc::read_bytes(bytes);
    discover::config::read_bytes(bytes);
    let text = String::from_utf8_lossy(bytes);
    let _ = discover::cgroup::container_id(&text);
    let _ = discover::cgroup::group_name(&text);
    let _ = discover::matching::name_in_log(Path::new(&*text), 3);
}

/// Reads a text as the agent's configuration.
pub fn policy(text: &str) {
    if let Ok(policy) = Policy::parse(text) {
        let _ = policy.allowed("Foo", "Bar");
    }
}
