//! The messages that pass between engine, launchers and workers, byte for
//! byte as nightcore lays them out.
//!
//! ```text
//!            0        4         8                16         24        28      32      64
//! Message    | head   | call_id | parent | delays | sent µs  | size    | flags | zeros | inline (960) |
//!            | type:4 func:8 method:6 client:14   |
//! ```
//!
//! A message is 1,024 bytes: shorter than `PIPE_BUF`, so a FIFO passes it
//! whole or not at all, and nobody has to put pieces together. What does not
//! fit into the 960 inline bytes goes through a file of the shared directory
//! (see [`crate::ipc`]), and `size` is then the length, negated.
//!
//! The gateway and the engine speak shorter messages over TCP: a header of 16
//! bytes and then the payload itself.

/// Bytes of a [`Message`].
pub const MESSAGE_SIZE: usize = 1024;
/// Offset of a message's inline payload: one cache line in.
pub const INLINE_OFFSET: usize = 64;
/// The largest payload, in bytes, that travels inside the message.
pub const INLINE_SIZE: usize = MESSAGE_SIZE - INLINE_OFFSET;
/// Handshake flag of the engine: nested calls answer through a FIFO of their own.
pub const FLAG_FIFO_FOR_NESTED_CALL: u32 = 2;
/// The largest function id that fits into a call's name.
pub const MAX_FUNC_ID: u16 = 255;
/// The largest worker number that fits into a call's name.
pub const MAX_CLIENT_ID: u16 = (1 << 14) - 1;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are the protocol's and say it all")]
pub enum Kind {
    EngineHandshake = 1,
    LauncherHandshake = 2,
    WorkerHandshake = 3,
    HandshakeResponse = 4,
    CreateWorker = 5,
    Invoke = 6,
    Dispatch = 7,
    Complete = 8,
    Failed = 9,
}

impl Kind {
    fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits {
            1 => Self::EngineHandshake,
            2 => Self::LauncherHandshake,
            3 => Self::WorkerHandshake,
            4 => Self::HandshakeResponse,
            5 => Self::CreateWorker,
            6 => Self::Invoke,
            7 => Self::Dispatch,
            8 => Self::Complete,
            9 => Self::Failed,
            _ => return None,
        })
    }
}

/// The name of one call: who is called, by which worker, and the caller's
/// count. `client` 0 is the gateway.
///
/// As a number it is also the name of the call's payload files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId(pub u64);

impl CallId {
    /// The call that worker `client` makes to function `func` as its `count`th.
    pub fn new(func: u16, client: u16, count: u32) -> Self {
        Self(u64::from(func & 0xff) | u64::from(client & 0x3fff) << 14 | u64::from(count) << 28)
    }

    /// The function called.
    pub fn func(self) -> u16 {
        (self.0 & 0xff) as u16
    }

    /// The calling worker, or 0 for the gateway.
    pub fn client(self) -> u16 {
        (self.0 >> 14 & 0x3fff) as u16
    }

    /// The caller's count of its calls.
    pub fn count(self) -> u32 {
        (self.0 >> 28) as u32
    }
}

fn head(kind: Kind, func: u16, client: u16) -> u32 {
    kind as u32 | u32::from(func & 0xff) << 4 | u32::from(client & 0x3fff) << 18
}

/// One message. Zero where nothing was written, and aligned as nightcore's
/// are: function libraries live on both.
#[derive(Clone)]
#[repr(align(64))]
pub struct Message(pub [u8; MESSAGE_SIZE]);

impl Message {
    /// A message of zeros, to be read into.
    pub fn zeroed() -> Self {
        Self([0; MESSAGE_SIZE])
    }

    fn build(kind: Kind, func: u16, client: u16, count: u32) -> Self {
        let mut m = Self::zeroed();
        m.put_u32(0, head(kind, func, client));
        m.put_u32(4, count);
        m
    }

    /// A message about a call.
    pub fn of_call(kind: Kind, call: CallId) -> Self {
        Self::build(kind, call.func(), call.client(), call.count())
    }

    /// A launcher introduces itself with the id of its container (64 digits).
    pub fn launcher_handshake(func: u16, container: &[u8]) -> Self {
        let mut m = Self::build(Kind::LauncherHandshake, func, 0, 0);
        m.set_inline(container);
        m
    }

    /// A worker introduces itself.
    pub fn worker_handshake(func: u16, client: u16) -> Self {
        Self::build(Kind::WorkerHandshake, func, client, 0)
    }

    /// The engine's welcome; `size` bytes follow the message.
    pub fn handshake_response(size: usize, flags: u32) -> Self {
        let mut m = Self::build(Kind::HandshakeResponse, 0, 0, 0);
        m.put_u32(24, size as u32);
        m.put_u32(28, flags);
        m
    }

    /// The engine asks a launcher for one more worker.
    pub fn create_worker(client: u16) -> Self {
        Self::build(Kind::CreateWorker, 0, client, 0)
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn put_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// The kind, if it is one.
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_bits(self.u32_at(0) & 0xf)
    }

    /// Makes this message one of another kind, about the same call.
    pub fn set_kind(&mut self, kind: Kind) {
        self.0[0] = self.0[0] & 0xf0 | kind as u8;
    }

    /// The function in the header.
    pub fn func(&self) -> u16 {
        (self.u32_at(0) >> 4 & 0xff) as u16
    }

    /// The worker in the header.
    pub fn client(&self) -> u16 {
        (self.u32_at(0) >> 18) as u16
    }

    /// The call that this message is about.
    pub fn call(&self) -> CallId {
        CallId::new(self.func(), self.client(), self.u32_at(4))
    }

    /// Bytes of payload; negative when they are in a file.
    pub fn payload_size(&self) -> i32 {
        self.u32_at(24) as i32
    }

    /// Sets the payload's size; negative when it is in a file.
    pub fn set_payload_size(&mut self, size: i32) {
        self.put_u32(24, size as u32);
    }

    /// The handshake's flags.
    pub fn flags(&self) -> u32 {
        self.u32_at(28)
    }

    /// Names the call in whose course this one is made.
    pub fn set_parent(&mut self, parent: CallId) {
        self.0[8..16].copy_from_slice(&parent.0.to_le_bytes());
    }

    /// Microseconds that the call waited for the worker, and that it ran.
    pub fn set_delays(&mut self, dispatch: i32, processing: i32) {
        self.put_u32(8, dispatch as u32);
        self.put_u32(12, processing as u32);
    }

    /// Microseconds that the callee ran.
    pub fn processing(&self) -> i32 {
        self.u32_at(12) as i32
    }

    /// When the message was sent: microseconds of the monotonic clock.
    pub fn sent_at(&self) -> i64 {
        i64::from(self.u32_at(16)) | i64::from(self.u32_at(20)) << 32
    }

    /// Stamps the message with the time.
    pub fn stamp(&mut self) {
        self.0[16..24].copy_from_slice(&now_us().to_le_bytes());
    }

    /// Puts a payload of at most [`INLINE_SIZE`] bytes into the message.
    pub fn set_inline(&mut self, data: &[u8]) {
        self.0[INLINE_OFFSET..INLINE_OFFSET + data.len()].copy_from_slice(data);
        self.set_payload_size(data.len() as i32);
    }

    /// The payload inside the message; empty when there is none, or when it
    /// is in a file. A size that no message can have counts as none.
    pub fn inline(&self) -> &[u8] {
        match usize::try_from(self.payload_size()) {
            Ok(n) if n <= INLINE_SIZE => &self.0[INLINE_OFFSET..INLINE_OFFSET + n],
            _ => &[],
        }
    }
}

/// Bytes of a [`GatewayHeader`].
pub const GATEWAY_HEADER_SIZE: usize = 16;

/// What precedes each payload between gateway and engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatewayHeader {
    /// What it is about.
    pub kind: Kind,
    /// The call; meaningless in a handshake.
    pub call: CallId,
    /// Microseconds of processing, a status, or the node's number.
    pub extra: u32,
    /// Bytes of payload that follow.
    pub payload: usize,
}

impl GatewayHeader {
    /// The header's bytes.
    pub fn to_bytes(self) -> [u8; GATEWAY_HEADER_SIZE] {
        let mut b = [0; GATEWAY_HEADER_SIZE];
        b[..4]
            .copy_from_slice(&head(self.kind, self.call.func(), self.call.client()).to_le_bytes());
        b[4..8].copy_from_slice(&self.call.count().to_le_bytes());
        b[8..12].copy_from_slice(&self.extra.to_le_bytes());
        b[12..].copy_from_slice(&(self.payload as i32).to_le_bytes());
        b
    }

    /// Reads a header; `None` if its kind is none.
    pub fn parse(b: &[u8; GATEWAY_HEADER_SIZE]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let head = word(0);
        Some(Self {
            kind: Kind::from_bits(head & 0xf)?,
            call: CallId::new((head >> 4 & 0xff) as u16, (head >> 18) as u16, word(4)),
            extra: word(8),
            payload: usize::try_from(word(12) as i32).unwrap_or(0),
        })
    }
}

/// Microseconds of the monotonic clock.
pub fn now_us() -> i64 {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC) {
        Ok(t) => t.tv_sec() * 1_000_000 + t.tv_nsec() / 1_000,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_laid_out_as_the_protocol_says() {
        let call = CallId::new(0x12, 0x2345, 0x89ab_cdef);
        let mut m = Message::of_call(Kind::Invoke, call);
        m.set_inline(b"hello");
        m.set_parent(CallId(0x0102_0304_0506_0708));
        // 6 | 0x12 << 4 | 0x2345 << 18
        assert_eq!(m.0[..8], [0x26, 0x01, 0x14, 0x8d, 0xef, 0xcd, 0xab, 0x89]);
        assert_eq!(m.0[8..16], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(m.0[24..28], [5, 0, 0, 0]);
        assert_eq!(&m.0[64..70], b"hello\0");
        assert_eq!(m.call(), call);
        assert_eq!(
            (call.func(), call.client(), call.count()),
            (0x12, 0x2345, 0x89ab_cdef)
        );
        m.set_kind(Kind::Dispatch);
        assert_eq!((m.kind(), m.call()), (Some(Kind::Dispatch), call));
    }

    #[test]
    fn a_call_is_sixty_bits_in_order() {
        assert_eq!(CallId::new(1, 2, 3).0, 1 | 2 << 14 | 3 << 28);
    }

    #[test]
    fn messages_are_aligned_to_a_cache_line() {
        assert_eq!(align_of::<Message>(), 64);
        assert_eq!(size_of::<Message>(), MESSAGE_SIZE);
    }

    #[test]
    fn an_impossible_size_is_no_payload() {
        let mut m = Message::of_call(Kind::Complete, CallId(0));
        m.set_payload_size(961);
        assert!(m.inline().is_empty());
        m.set_payload_size(-70_000);
        assert!(m.inline().is_empty());
    }

    #[test]
    fn gateway_headers_survive_the_wire() {
        let h = GatewayHeader {
            kind: Kind::Complete,
            call: CallId::new(7, 0, 41),
            extra: 9,
            payload: 8 << 20,
        };
        assert_eq!(GatewayHeader::parse(&h.to_bytes()), Some(h));
        assert_eq!(GatewayHeader::parse(&[0; 16]), None);
    }
}
