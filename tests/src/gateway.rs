//! The gateway: HTTP in, calls out to the engine.
//!
//! `POST /function/<Name>` runs a function on the request's body. 200 with
//! its output; 404 for a name that is not in the function config; 500 when
//! the function failed, or no engine is connected. A GET is a 404 as well,
//! unless the function allows it. A call that is never answered (its worker
//! died) leaves its client waiting: there is no time-out, as in nightcore.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use crate::func_config::FuncConfig;
use crate::wire::{CallId, GATEWAY_HEADER_SIZE, GatewayHeader, Kind};

/// A gateway's command line.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// `--func_config_file`.
    pub func_config_file: PathBuf,
    /// `--listen_addr`.
    pub address: String,
    /// `--http_port`; 0 is any free one.
    pub http_port: u16,
    /// `--engine_conn_port`; 0 is any free one.
    pub engine_port: u16,
}

impl GatewayOptions {
    /// Reads this process's command line.
    pub fn from_env() -> Result<Self> {
        let flags = crate::flags::Flags::from_env(
            &[
                "listen_addr",
                "engine_conn_port",
                "http_port",
                "grpc_port",
                "num_io_workers",
                "func_config_file",
                "v",
            ],
            &[],
        )?;
        ensure!(
            flags.positional.is_empty(),
            "no positional arguments are taken"
        );
        Ok(Self {
            func_config_file: flags
                .text("func_config_file")
                .context("--func_config_file is missing")?
                .into(),
            address: flags.text("listen_addr").unwrap_or("127.0.0.1").to_owned(),
            http_port: flags.get("http_port", 8080)?,
            engine_port: flags.get("engine_conn_port", 10007)?,
        })
    }
}

/// What a call ended with: its output, or that it failed.
type Outcome = Option<Bytes>;

struct Gateway {
    config: FuncConfig,
    /// Where messages to the engine go, while one is connected.
    engine: RefCell<Option<mpsc::UnboundedSender<Bytes>>>,
    waiting: RefCell<HashMap<CallId, oneshot::Sender<Outcome>>>,
    next_call: Cell<u32>,
}

/// Serves until the process is ended. Prints a line with both ports once it
/// listens.
pub fn run(options: &GatewayOptions) -> Result<()> {
    let config = FuncConfig::load(&options.func_config_file)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let bind = async |port| {
            let listener = TcpListener::bind((options.address.as_str(), port))
                .await
                .with_context(|| format!("cannot listen on {}:{port}", options.address))?;
            let address = listener.local_addr()?;
            anyhow::Ok((listener, address))
        };
        let (http, http_address) = bind(options.http_port).await?;
        let (engines, engine_address) = bind(options.engine_port).await?;
        println!("{}", listening_line(http_address, engine_address));
        let gateway = Rc::new(Gateway {
            config,
            engine: RefCell::new(None),
            waiting: RefCell::new(HashMap::new()),
            next_call: Cell::new(0),
        });
        tokio::task::spawn_local(accept_engines(engines, gateway.clone()));
        loop {
            let (stream, _) = http.accept().await.context("accept")?;
            let _ = stream.set_nodelay(true);
            tokio::task::spawn_local(serve_client(stream, gateway.clone()));
        }
    })
}

fn listening_line(http: SocketAddr, engine: SocketAddr) -> String {
    format!(
        "gateway: ready, http_port={} engine_conn_port={}",
        http.port(),
        engine.port()
    )
}

/// The two ports (HTTP, engines) out of what a gateway has printed, once it
/// has.
pub fn ports_in(log: &str) -> Option<(u16, u16)> {
    let line = log
        .lines()
        .find_map(|l| l.strip_prefix("gateway: ready, http_port="))?;
    let (http, engine) = line.split_once(" engine_conn_port=")?;
    Some((http.parse().ok()?, engine.parse().ok()?))
}

async fn serve_client(stream: TcpStream, gateway: Rc<Gateway>) {
    let service = service_fn(move |request| {
        let gateway = gateway.clone();
        async move { Ok::<_, Infallible>(gateway.answer(request).await) }
    });
    // A client that goes away is no news.
    let _ = http1::Builder::new()
        .pipeline_flush(true)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

impl Gateway {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, body) = match self.call(request).await {
            Ok(output) => (StatusCode::OK, output),
            Err(status) => (status, Bytes::new()),
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = status;
        let plain = hyper::header::HeaderValue::from_static("text/plain");
        response
            .headers_mut()
            .insert(hyper::header::CONTENT_TYPE, plain);
        response
    }

    async fn call(&self, request: Request<Incoming>) -> Result<Bytes, StatusCode> {
        let name = request.uri().path().strip_prefix("/function/");
        let entry = name
            .and_then(|n| self.config.by_name(n.as_bytes()))
            .filter(|e| match *request.method() {
                Method::POST => true,
                Method::GET => e.allow_http_get,
                _ => false,
            })
            .ok_or(StatusCode::NOT_FOUND)?;
        let func = entry.func_id;
        let input = request
            .into_body()
            .collect()
            .await
            .map_err(|_| StatusCode::BAD_REQUEST)?
            .to_bytes();
        let count = self.next_call.get();
        self.next_call.set(count.wrapping_add(1));
        let call = CallId::new(func, 0, count);
        let header = GatewayHeader {
            kind: Kind::Dispatch,
            call,
            extra: 0,
            payload: input.len(),
        };
        let mut message = BytesMut::with_capacity(GATEWAY_HEADER_SIZE + input.len());
        message.extend_from_slice(&header.to_bytes());
        message.extend_from_slice(&input);
        let (done, outcome) = oneshot::channel();
        self.waiting.borrow_mut().insert(call, done);
        let sent = self
            .engine
            .borrow()
            .as_ref()
            .is_some_and(|e| e.send(message.freeze()).is_ok());
        if !sent {
            self.waiting.borrow_mut().remove(&call);
            return Err(StatusCode::INTERNAL_SERVER_ERROR);
        }
        match outcome.await {
            Ok(Some(output)) => Ok(output),
            Ok(None) | Err(_) => Err(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }
}

async fn accept_engines(listener: TcpListener, gateway: Rc<Gateway>) {
    while let Ok((stream, _)) = listener.accept().await {
        let gateway = gateway.clone();
        tokio::task::spawn_local(async move {
            if let Err(e) = serve_engine(stream, &gateway).await {
                eprintln!("gateway: the engine is gone: {e:#}");
            }
            *gateway.engine.borrow_mut() = None;
            // Their senders dropped, all calls under way fail.
            gateway.waiting.borrow_mut().clear();
        });
    }
}

async fn serve_engine(stream: TcpStream, gateway: &Gateway) -> Result<()> {
    stream.set_nodelay(true)?;
    let (mut read, write) = stream.into_split();
    let hello = read_header(&mut read).await?;
    ensure!(
        hello.kind == Kind::EngineHandshake,
        "not an engine: {hello:?}"
    );
    ensure!(
        gateway.engine.borrow().is_none(),
        "there is an engine already"
    );
    let (sender, receiver) = mpsc::unbounded_channel();
    *gateway.engine.borrow_mut() = Some(sender);
    println!("gateway: engine {} connected", hello.extra & 0xffff);
    tokio::task::spawn_local(send_all(write, receiver));
    // Answers are read in as large pieces as they come.
    let mut buffer = BytesMut::with_capacity(256 << 10);
    loop {
        while let Some((header, rest)) = buffer.split_first_chunk::<GATEWAY_HEADER_SIZE>() {
            let Some(header) = GatewayHeader::parse(header) else {
                bail!("a message of an unexpected kind");
            };
            if rest.len() < header.payload {
                break;
            }
            let mut message = buffer.split_to(GATEWAY_HEADER_SIZE + header.payload);
            let output = message.split_off(GATEWAY_HEADER_SIZE).freeze();
            let outcome = (header.kind == Kind::Complete).then_some(output);
            if let Some(done) = gateway.waiting.borrow_mut().remove(&header.call) {
                // The client may have left.
                let _ = done.send(outcome);
            }
        }
        if buffer.capacity() - buffer.len() < 16 << 10 {
            buffer.reserve(256 << 10);
        }
        ensure!(
            read.read_buf(&mut buffer).await? > 0,
            "it closed the connection"
        );
    }
}

async fn read_header(read: &mut OwnedReadHalf) -> Result<GatewayHeader> {
    let mut bytes = [0; GATEWAY_HEADER_SIZE];
    read.read_exact(&mut bytes).await?;
    GatewayHeader::parse(&bytes).context("a message of an unexpected kind")
}

async fn send_all(mut write: OwnedWriteHalf, mut messages: mpsc::UnboundedReceiver<Bytes>) {
    while let Some(message) = messages.recv().await {
        if let Err(e) = write.write_all(&message).await {
            eprintln!("gateway: cannot write to the engine: {e}");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_first_line_tells_the_ports() {
        let line = listening_line(
            SocketAddr::from(([127, 0, 0, 1], 4711)),
            SocketAddr::from(([127, 0, 0, 1], 815)),
        );
        assert_eq!(ports_in(&format!("something\n{line}\n")), Some((4711, 815)));
        assert_eq!(ports_in("gateway: ready, http_port=47"), None);
    }
}
