//! The other end of the API.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::ErrorBody;

/// How long the agent may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers on {}: {cause}", .socket.display())]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// Why, in words.
        cause: String,
    },
    /// The socket is not for this user.
    #[error("may not talk to the agent on {}: permission denied", .socket.display())]
    NotAllowed {
        /// The socket.
        socket: PathBuf,
    },
    /// The agent said no.
    #[error("{}", .0.error.message)]
    Answer(Box<ErrorBody>),
    /// The conversation broke off, or was none.
    #[error("the agent on {} gave no proper answer: {cause}", .socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        cause: String,
    },
    /// The time is up.
    #[error("the agent on {} gave no answer within {} s", .socket.display(), .limit.as_secs())]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
}

/// An agent's address.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the agent on `socket`. Nothing is connected yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Asks with GET.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: Duration,
    ) -> Result<T, ClientError> {
        self.request(Method::GET, path, Bytes::new(), limit).await
    }

    /// Asks with POST and a JSON body.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
        limit: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(&error))?;
        self.request(Method::POST, path, Bytes::from(body), limit)
            .await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let timeout = |limit| {
            move |_| ClientError::Timeout {
                socket: self.socket.clone(),
                limit,
            }
        };
        let stream = tokio::time::timeout(CONNECT_LIMIT, UnixStream::connect(&self.socket))
            .await
            .map_err(timeout(CONNECT_LIMIT))?
            .map_err(|error| self.unconnected(&error))?;
        let (status, bytes) = tokio::time::timeout(limit, self.talk(stream, method, path, body))
            .await
            .map_err(timeout(limit))??;
        if status == StatusCode::OK {
            return serde_json::from_slice(&bytes).map_err(|error| self.broken(&error));
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => Err(ClientError::Answer(Box::new(body))),
            Err(_) => Err(self.broken(&format_args!("status {status} without a reason"))),
        }
    }

    async fn talk(
        &self,
        stream: UnixStream,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let broken = |error: hyper::Error| self.broken(&error);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        // It ends with the sender; what goes wrong shows in the answer.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "agent")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(&error))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await;
        let bytes = body.map_err(|error| self.broken(&error))?.to_bytes();
        Ok((status, bytes))
    }

    fn broken(&self, cause: &dyn std::fmt::Display) -> ClientError {
        ClientError::Broken {
            socket: self.socket.clone(),
            cause: cause.to_string(),
        }
    }

    fn unconnected(&self, error: &io::Error) -> ClientError {
        let socket = self.socket.clone();
        let cause = match error.kind() {
            io::ErrorKind::PermissionDenied => return ClientError::NotAllowed { socket },
            io::ErrorKind::NotFound => "there is no such socket".to_owned(),
            io::ErrorKind::ConnectionRefused => "nobody listens there (any more)".to_owned(),
            _ => error.to_string(),
        };
        ClientError::NoAgent { socket, cause }
    }
}
