//! The engine's end of the connection to the gateway: calls in, answers out.
//!
//! Nothing here blocks. What the socket does not take is kept and sent when
//! epoll says that there is room.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::wire::{CallId, GATEWAY_HEADER_SIZE, GatewayHeader, Kind};

/// How long a gateway may take to listen.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

pub(super) struct GatewayLink {
    stream: TcpStream,
    received: Vec<u8>,
    /// Bytes of `received` that were handled.
    handled: usize,
    unsent: Vec<u8>,
    /// Whether epoll was told that we wait for room.
    waits: bool,
}

impl AsFd for GatewayLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl GatewayLink {
    pub(super) fn connect(host: &str, port: u16, node: u16) -> Result<Self> {
        let deadline = Instant::now() + CONNECT_WITHIN;
        let mut stream = loop {
            match TcpStream::connect((host, port)) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > deadline => {
                    return Err(e).with_context(|| format!("no gateway at {host}:{port}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_nodelay(true)?;
        let hello = GatewayHeader {
            kind: Kind::EngineHandshake,
            call: CallId(0),
            extra: node.into(),
            payload: 0,
        };
        stream.write_all(&hello.to_bytes())?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            received: Vec::new(),
            handled: 0,
            unsent: Vec::new(),
            waits: false,
        })
    }

    /// Reads what there is; false at the end.
    pub(super) fn fill(&mut self) -> Result<bool> {
        self.received.drain(..self.handled);
        self.handled = 0;
        loop {
            let old = self.received.len();
            self.received.resize(old + (64 << 10), 0);
            let got = self.stream.read(&mut self.received[old..]);
            self.received.truncate(old + *got.as_ref().unwrap_or(&0));
            match got {
                Ok(0) => return Ok(false),
                Ok(n) if n == 64 << 10 => {}
                Ok(_) => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(e) => return Err(e).context("reading from the gateway"),
            }
        }
    }

    /// The next complete call that was received.
    pub(super) fn next_call(&mut self) -> Result<Option<(CallId, Vec<u8>)>> {
        let rest = &self.received[self.handled..];
        let Some((header, rest)) = rest.split_first_chunk::<GATEWAY_HEADER_SIZE>() else {
            return Ok(None);
        };
        let header = match GatewayHeader::parse(header) {
            Some(h) if h.kind == Kind::Dispatch => h,
            other => bail!("an unexpected message from the gateway: {other:?}"),
        };
        let Some(payload) = rest.get(..header.payload) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.handled += GATEWAY_HEADER_SIZE + header.payload;
        Ok(Some((header.call, payload)))
    }

    /// Sends an answer, now or later.
    pub(super) fn send(&mut self, kind: Kind, call: CallId, extra: u32, payload: &[u8]) {
        let header = GatewayHeader {
            kind,
            call,
            extra,
            payload: payload.len(),
        }
        .to_bytes();
        let was_empty = self.unsent.is_empty();
        self.unsent.extend_from_slice(&header);
        self.unsent.extend_from_slice(payload);
        if was_empty && let Err(e) = self.flush() {
            // The end of the connection is seen, and acted upon, by reading.
            eprintln!("engine: {e:#}");
        }
    }

    /// Sends as much as the socket takes.
    pub(super) fn flush(&mut self) -> Result<()> {
        let mut sent = 0;
        let result = loop {
            if sent == self.unsent.len() {
                break Ok(());
            }
            match self.stream.write(&self.unsent[sent..]) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => break Err(e).context("writing to the gateway"),
            }
        };
        self.unsent.drain(..sent);
        result
    }

    /// Whether we wait for room, if that has changed since the last time.
    pub(super) fn changed_interest(&mut self) -> Option<bool> {
        let waits = !self.unsent.is_empty();
        (waits != self.waits).then(|| {
            self.waits = waits;
            waits
        })
    }
}
