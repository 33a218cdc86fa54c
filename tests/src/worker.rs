//! A worker: one process, one function library, one thread that serves.
//!
//! ```text
//!            ┌────────────── read(input FIFO, 1024) ◄─────────── engine
//!            ▼
//!   Dispatch: faas_func_call(input)
//!                │ invoke("Bar") ── Invoke ─► output FIFO ─────► engine
//!                │      └─ read(input FIFO, 1024) ◄── Complete ── engine
//!                │ append(…)
//!            ▼
//!   reclaim all that invoke handed out;  Complete ─► output FIFO ► engine
//! ```
//!
//! An idle worker and one inside an RPC wait in the same `read` of the same
//! descriptor, with no lock held; only their stacks differ. With
//! `--use_fifo_for_nested_call` a nested call has a FIFO of its own for the
//! answer and gives up after 100 ms.
//!
//! Descriptors fall into place by the order in which things are opened: 3 is
//! the launcher's pipe, 4 the engine's socket, 5 the input and 6 the output
//! FIFO.
//!
//! An answer's buffer is a slot of a pool, or a mapped payload file. When the
//! outermost call returns, files are unmapped, and slots are overwritten with
//! [`POISON`] before they are used again. With `FAAS_STRICT_LIFETIME=1` (ours,
//! not nightcore's) the pool is unmapped too: a read after the end is then a
//! SIGSEGV, at the price of two system calls and a page fault per request.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::func_config::FuncConfig;
use crate::ipc::{self, Ipc, Payload};
use crate::sys::abi::{FuncWorker, Handed, Host, Library};
use crate::sys::{Region, process};
use crate::wire::{
    CallId, FLAG_FIFO_FOR_NESTED_CALL, INLINE_OFFSET, INLINE_SIZE, Kind, MESSAGE_SIZE, Message,
    now_us,
};

/// What a buffer holds once its time is over.
pub const POISON: u8 = 0xdb;
/// How long a nested call waits with `--use_fifo_for_nested_call`, in ms.
pub const NESTED_TIMEOUT_MS: u16 = 100;
/// Linux guarantees that this much is written to a FIFO in one piece.
const PIPE_BUF: usize = 4096;
/// Slots of one chunk of answers.
const SLOTS: usize = 64;

/// What a worker's environment tells it.
#[derive(Clone, Debug)]
pub struct WorkerEnv {
    /// `FAAS_FUNC_ID`.
    pub func: u16,
    /// `FAAS_CLIENT_ID`.
    pub client: u16,
    /// `FAAS_MSG_PIPE_FD`.
    pub message_pipe: i32,
    /// `FAAS_ROOT_PATH_FOR_IPC`.
    pub ipc_root: PathBuf,
    /// `FAAS_STRICT_LIFETIME`.
    pub strict: bool,
}

impl WorkerEnv {
    /// Reads this process's environment.
    pub fn read() -> Result<Self> {
        fn number<T: std::str::FromStr>(name: &str) -> Result<T>
        where
            T::Err: std::error::Error + Send + Sync + 'static,
        {
            let text = std::env::var(name).with_context(|| format!("{name} is not set"))?;
            text.parse().with_context(|| format!("{name}={text}"))
        }
        for unsupported in ["FAAS_USE_ENGINE_SOCKET", "FAAS_ENGINE_TCP_PORT"] {
            if let Ok(v) = std::env::var(unsupported)
                && !matches!(v.as_str(), "" | "0" | "-1")
            {
                bail!("{unsupported}={v}: this node's workers speak through FIFOs only");
            }
        }
        let client = number("FAAS_CLIENT_ID")?;
        ensure!(client > 0, "FAAS_CLIENT_ID=0 is the gateway's");
        let root = std::env::var_os("FAAS_ROOT_PATH_FOR_IPC");
        Ok(Self {
            func: number("FAAS_FUNC_ID")?,
            client,
            message_pipe: number("FAAS_MSG_PIPE_FD")?,
            ipc_root: root.map_or_else(|| ipc::DEFAULT_ROOT.into(), Into::into),
            strict: std::env::var_os("FAAS_STRICT_LIFETIME").is_some_and(|v| v == "1"),
        })
    }
}

/// Serves until the engine is gone, which is an error as in nightcore.
pub fn serve(env: &WorkerEnv, library: &Path) -> Result<()> {
    let library = Library::load(library)?;
    let pipe = process::inherited_fd(env.message_pipe)
        .with_context(|| format!("FAAS_MSG_PIPE_FD={}", env.message_pipe))?;
    let config = receive_config(&pipe).context("cannot receive the function config")?;
    let ipc = Ipc::open(&env.ipc_root)?;
    let engine: OwnedFd = UnixStream::connect(ipc.socket())
        .with_context(|| format!("cannot connect to {}", ipc.socket().display()))?
        .into();
    let input = ipc::fifo_reader(&ipc.worker_input(env.client)).context("input FIFO")?;
    ipc::write_full(&engine, &Message::worker_handshake(env.func, env.client).0)?;
    let mut welcome = Message::zeroed();
    ipc::read_full(&engine, &mut welcome.0).context("no welcome from the engine")?;
    ensure!(
        welcome.kind() == Some(Kind::HandshakeResponse),
        "the engine's welcome is none"
    );
    let output = ipc::fifo_writer(&ipc.worker_output(env.client)).context("output FIFO")?;

    let fifo_for_nested_call = welcome.flags() & FLAG_FIFO_FOR_NESTED_CALL != 0;
    // Never freed: the library keeps a pointer to it.
    let worker: &'static Worker = Box::leak(Box::new(Worker {
        ipc,
        config,
        client: env.client,
        fifo_for_nested_call,
        strict: env.strict,
        input,
        output,
        next_call: AtomicU32::new(0),
        current: AtomicU64::new(0),
        waiting: AtomicBool::new(false),
        answer: Mutex::new(Vec::with_capacity(1024)),
        handed: Mutex::new(HandedOut {
            chunks: Vec::new(),
            slot: if fifo_for_nested_call {
                PIPE_BUF
            } else {
                MESSAGE_SIZE
            },
            used: 0,
            files: Vec::new(),
        }),
    }));
    let mut function = library.create(worker)?;
    ipc::set_blocking(&worker.input)?;
    worker.main_loop(&mut function)
}

fn receive_config(pipe: &OwnedFd) -> Result<FuncConfig> {
    let mut size = [0; 4];
    ipc::read_full(pipe, &mut size)?;
    let mut json = vec![0; u32::from_le_bytes(size) as usize];
    ipc::read_full(pipe, &mut json)?;
    FuncConfig::parse(String::from_utf8(json)?)
}

/// The buffers that the current call was given.
struct HandedOut {
    /// Each has [`SLOTS`] slots; used from the first on.
    chunks: Vec<Region>,
    slot: usize,
    used: usize,
    files: Vec<(CallId, Region)>,
}

struct Worker {
    ipc: Ipc,
    config: FuncConfig,
    client: u16,
    fifo_for_nested_call: bool,
    strict: bool,
    input: OwnedFd,
    output: OwnedFd,
    next_call: AtomicU32,
    /// The call being served: the parent of those that it makes.
    current: AtomicU64,
    /// Whether a nested call waits for its answer (default mode).
    waiting: AtomicBool,
    answer: Mutex<Vec<u8>>,
    handed: Mutex<HandedOut>,
}

/// A panic while a lock was held cannot happen twice: the worker aborts.
fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    #[inline(never)]
    fn main_loop(&self, function: &mut FuncWorker<'_>) -> Result<()> {
        loop {
            let mut message = Message::zeroed();
            ipc::read_full(&self.input, &mut message.0).context("the engine is gone")?;
            ensure!(
                message.kind() == Some(Kind::Dispatch),
                "a message of an unexpected kind"
            );
            self.serve_one(function, &message)?;
        }
    }

    fn serve_one(&self, function: &mut FuncWorker<'_>, message: &Message) -> Result<()> {
        let started = now_us();
        let call = message.call();
        let mapped;
        let input = if message.payload_size() < 0 {
            match self.ipc.map_payload(call, Payload::Input) {
                Ok(region) => {
                    mapped = region;
                    mapped.as_slice()
                }
                Err(e) => {
                    eprintln!("input of call {}: {e}", call.0);
                    return self.send(Message::of_call(Kind::Failed, call));
                }
            }
        } else {
            message.inline()
        };
        lock(&self.answer).clear();
        self.current.store(call.0, Ordering::Relaxed);
        let code = function.call(input);
        self.reclaim();
        let answer = lock(&self.answer);
        let mut reply = if code != 0 {
            self.report_failure(call)
        } else if self.fifo_for_nested_call && call.client() != 0 {
            self.answer_by_fifo(call, &answer)
        } else {
            self.answer_by_message(call, &answer)
        };
        drop(answer);
        let delay = |us: i64| i32::try_from(us).unwrap_or(i32::MAX);
        reply.set_delays(
            delay(started - message.sent_at()),
            delay(now_us() - started),
        );
        self.send(reply)
    }

    fn send(&self, mut message: Message) -> Result<()> {
        message.stamp();
        ipc::write_full(&self.output, &message.0).context("the engine is gone")
    }

    fn report_failure(&self, call: CallId) -> Message {
        if self.fifo_for_nested_call && call.client() != 0 {
            let failed = (-1i32).to_le_bytes();
            if let Err(e) = self.write_call_fifo(call, &failed) {
                eprintln!("answer of call {}: {e}", call.0);
            }
        }
        Message::of_call(Kind::Failed, call)
    }

    fn answer_by_message(&self, call: CallId, answer: &[u8]) -> Message {
        let mut reply = Message::of_call(Kind::Complete, call);
        if answer.len() <= INLINE_SIZE {
            reply.set_inline(answer);
            return reply;
        }
        match self.put_file(call, Payload::Output, answer) {
            Ok(size) => reply.set_payload_size(size),
            Err(e) => {
                eprintln!("answer of call {}: {e}", call.0);
                return Message::of_call(Kind::Failed, call);
            }
        }
        reply
    }

    fn answer_by_fifo(&self, call: CallId, answer: &[u8]) -> Message {
        let mut reply = Message::of_call(Kind::Complete, call);
        let sent = i32::try_from(answer.len())
            .map_err(io::Error::other)
            .and_then(|size| {
                let mut buf = [0; PIPE_BUF];
                buf[..4].copy_from_slice(&size.to_le_bytes());
                let mut len = 4;
                if answer.len() + 4 <= PIPE_BUF {
                    buf[4..4 + answer.len()].copy_from_slice(answer);
                    len += answer.len();
                } else {
                    self.ipc.write_payload(call, Payload::Output, answer)?;
                }
                self.write_call_fifo(call, &buf[..len])?;
                Ok(size)
            });
        match sent {
            Ok(size) => reply.set_payload_size(size),
            Err(e) => {
                // The caller gave up waiting; nobody else would remove the file.
                self.ipc.remove_payload(call, Payload::Output);
                eprintln!("answer of call {}: {e}", call.0);
                return Message::of_call(Kind::Failed, call);
            }
        }
        reply
    }

    fn write_call_fifo(&self, call: CallId, data: &[u8]) -> io::Result<()> {
        let fifo = ipc::fifo_writer(&self.ipc.call_fifo(call))?;
        ipc::write_full(&fifo, data)
    }

    fn put_file(&self, call: CallId, which: Payload, data: &[u8]) -> io::Result<i32> {
        let size = i32::try_from(data.len()).map_err(io::Error::other)?;
        self.ipc.write_payload(call, which, data)?;
        Ok(-size)
    }

    /// Ends the life of every buffer that the call was given.
    fn reclaim(&self) {
        let mut handed = lock(&self.handed);
        let handed = &mut *handed;
        for i in 0..handed.used {
            handed.chunks[i / SLOTS].fill(i % SLOTS * handed.slot, &[POISON; MESSAGE_SIZE]);
        }
        handed.used = 0;
        if self.strict {
            handed.chunks.clear();
        }
        for (call, region) in handed.files.drain(..) {
            drop(region);
            self.ipc.remove_payload(call, Payload::Output);
        }
    }

    /// A slot that begins with `data`, which must fit.
    fn slot_with(&self, data: &[u8]) -> io::Result<*const u8> {
        let mut handed = lock(&self.handed);
        let (chunk, offset) = (handed.used / SLOTS, handed.used % SLOTS * handed.slot);
        if chunk == handed.chunks.len() {
            let region = Region::zeroed(SLOTS * handed.slot)?;
            handed.chunks.push(region);
        }
        handed.used += 1;
        handed.chunks[chunk].fill(offset, data);
        Ok(handed.chunks[chunk].as_ptr().wrapping_add(offset))
    }

    fn file_of(&self, call: CallId, size: usize) -> Result<Handed> {
        let region = self.ipc.map_payload(call, Payload::Output)?;
        let answer = Handed {
            data: region.as_ptr(),
            len: region.len(),
        };
        lock(&self.handed).files.push((call, region));
        ensure!(
            answer.len == size,
            "{} bytes where {size} were announced",
            answer.len
        );
        Ok(answer)
    }

    fn call_other(&self, func: u16, input: &[u8]) -> Result<Option<Handed>> {
        let call = CallId::new(
            func,
            self.client,
            self.next_call.fetch_add(1, Ordering::Relaxed),
        );
        let mut message = Message::of_call(Kind::Invoke, call);
        message.set_parent(CallId(self.current.load(Ordering::Relaxed)));
        let by_file = input.len() > INLINE_SIZE;
        if by_file {
            let size = self
                .put_file(call, Payload::Input, input)
                .context("input file")?;
            message.set_payload_size(size);
        } else {
            message.set_inline(input);
        }
        let answer = if self.fifo_for_nested_call {
            self.wait_on_fifo(call, message)
        } else {
            self.wait_in_read(call, message)
        };
        if by_file {
            self.ipc.remove_payload(call, Payload::Input);
        }
        answer
    }

    fn wait_in_read(&self, call: CallId, message: Message) -> Result<Option<Handed>> {
        if self.waiting.swap(true, Ordering::Acquire) {
            // Two threads in one FIFO would steal each other's answers.
            eprintln!("FATAL: two nested calls at a time");
            std::process::abort();
        }
        self.send(message)?;
        let mut reply = Message::zeroed();
        if ipc::read_full(&self.input, &mut reply.0).is_err() {
            eprintln!("FATAL: the engine is gone");
            std::process::abort();
        }
        self.waiting.store(false, Ordering::Release);
        match reply.kind() {
            Some(Kind::Complete) if reply.payload_size() < 0 => self
                .file_of(call, reply.payload_size().unsigned_abs() as usize)
                .map(Some),
            Some(Kind::Complete) => {
                let len = reply.inline().len();
                if len == 0 {
                    return Ok(Some(Handed {
                        data: std::ptr::null(),
                        len: 0,
                    }));
                }
                let slot = self.slot_with(&reply.0)?;
                Ok(Some(Handed {
                    data: slot.wrapping_add(INLINE_OFFSET),
                    len,
                }))
            }
            Some(Kind::Failed) => Ok(None),
            _ => {
                eprintln!("FATAL: a message of an unexpected kind");
                std::process::abort();
            }
        }
    }

    fn wait_on_fifo(&self, call: CallId, message: Message) -> Result<Option<Handed>> {
        let path = self.ipc.call_fifo(call);
        ipc::make_fifo(&path).context("FIFO for the answer")?;
        let answer = self.wait_on(&path, call, message);
        let _ = std::fs::remove_file(&path);
        answer
    }

    fn wait_on(&self, path: &Path, call: CallId, message: Message) -> Result<Option<Handed>> {
        let fifo = ipc::fifo_both(path)?;
        self.send(message)?;
        // One poll, as in nightcore: a signal ends the wait and fails the call.
        let mut ready = [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)];
        ensure!(
            poll(&mut ready, PollTimeout::from(NESTED_TIMEOUT_MS))? == 1,
            "no answer within {NESTED_TIMEOUT_MS} ms"
        );
        let mut buf = [0; PIPE_BUF];
        let n = nix::unistd::read(&fifo, &mut buf)?;
        ensure!(n >= 4, "an answer of {n} bytes");
        let size = i32::from_le_bytes([buf[0], buf[1], buf[2], buf[3]]);
        let Ok(size) = usize::try_from(size) else {
            return Ok(None);
        };
        if size == 0 {
            Ok(Some(Handed {
                data: std::ptr::null(),
                len: 0,
            }))
        } else if size + 4 > PIPE_BUF {
            self.file_of(call, size).map(Some)
        } else {
            ensure!(n == size + 4, "{} bytes of an answer of {size}", n - 4);
            let slot = self.slot_with(&buf[..n])?;
            Ok(Some(Handed {
                data: slot.wrapping_add(4),
                len: size,
            }))
        }
    }
}

impl Host for Worker {
    fn invoke(&self, name: &[u8], input: &[u8]) -> Option<Handed> {
        let Some(func) = self.config.by_name(name) else {
            eprintln!("there is no function {}", String::from_utf8_lossy(name));
            return None;
        };
        match self.call_other(func.func_id, input) {
            Ok(answer) => answer,
            Err(e) => {
                eprintln!("call of {}: {e:#}", func.func_name);
                None
            }
        }
    }

    fn append(&self, data: &[u8]) {
        lock(&self.answer).extend_from_slice(data);
    }
}
