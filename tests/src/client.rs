//! A client of the gateway: one keep-alive connection on a blocking socket.
//!
//! Small on purpose: it is in the way of what is measured. It speaks just the
//! HTTP that a gateway answers with: a status line, headers, a body of
//! `Content-Length` bytes.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

/// How long a call may take, unless something else is said.
pub const CALL_WITHIN: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug)]
pub enum CallError {
    /// The gateway answered with another status than 200.
    Status(u16),
    /// There was no answer in time. The connection is of no further use.
    Timeout,
    /// The connection failed. It is of no further use.
    Io(io::Error),
    /// What came is no HTTP that we know.
    Protocol(String),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(code) => write!(f, "status {code}"),
            Self::Timeout => write!(f, "no answer in time"),
            Self::Io(e) => write!(f, "connection: {e}"),
            Self::Protocol(what) => write!(f, "not HTTP as expected: {what}"),
        }
    }
}

impl std::error::Error for CallError {}

impl From<io::Error> for CallError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Io(e),
        }
    }
}

/// A connection to a gateway.
#[derive(Debug)]
pub struct HttpClient {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl HttpClient {
    /// Connects to a gateway on this machine.
    pub fn connect(port: u16) -> Result<Self, CallError> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_nodelay(true)?;
        let client = Self {
            stream,
            buffer: Vec::with_capacity(4096),
        };
        client.set_timeout(CALL_WITHIN)?;
        Ok(client)
    }

    /// Sets how long it waits for the network at a time; not zero.
    pub fn set_timeout(&self, timeout: Duration) -> Result<(), CallError> {
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.set_write_timeout(Some(timeout))?;
        Ok(())
    }

    /// Calls a function and returns its output.
    pub fn call(&mut self, function: &str, input: &[u8]) -> Result<Vec<u8>, CallError> {
        self.buffer.clear();
        write!(
            self.buffer,
            "POST /function/{function} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
            input.len()
        )?;
        self.buffer.extend_from_slice(input);
        self.stream.write_all(&self.buffer)?;
        self.buffer.clear();
        let (status, length, body_at) = self.head()?;
        let mut body = self.buffer.split_off(body_at);
        if body.len() > length {
            return Err(CallError::Protocol(format!(
                "{} bytes too many",
                body.len() - length
            )));
        }
        let had = body.len();
        body.resize(length, 0);
        self.stream.read_exact(&mut body[had..])?;
        if status == 200 {
            Ok(body)
        } else {
            Err(CallError::Status(status))
        }
    }

    /// Reads up to the end of the headers: status, length of the body, and
    /// where in the buffer it begins.
    fn head(&mut self) -> Result<(u16, usize, usize), CallError> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                let (status, length) = parse_head(&self.buffer[..end])?;
                return Ok((status, length, end + 4));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(CallError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

fn parse_head(head: &[u8]) -> Result<(u16, usize), CallError> {
    let wrong = || CallError::Protocol(String::from_utf8_lossy(head).into_owned());
    let text = std::str::from_utf8(head).map_err(|_| wrong())?;
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|l| l.strip_prefix("HTTP/1.1 "))
        .and_then(|l| l.get(..3))
        .and_then(|code| code.parse().ok())
        .ok_or_else(wrong)?;
    let length = lines
        .filter_map(|l| l.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .ok_or_else(wrong)?;
    Ok((status, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_head() {
        let head = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 12\r\nx: y";
        assert_eq!(parse_head(head).unwrap(), (500, 12));
        assert!(parse_head(b"HTTP/1.1 200 OK\r\nx: y").is_err());
        assert!(parse_head(b"SSH-2.0").is_err());
    }
}
