//! The engine: one thread, one epoll, all of the node's calls.
//!
//! ```text
//!  gateway ═TCP═╗                        ╔═ socket ═ launcher (one per function)
//!               ╠═ epoll loop, this file ╣
//!  worker ═FIFO═╝   │ dispatcher per    ╚═ socket ═ worker (only to see it die)
//!                   │ function: idle, busy, queue
//! ```
//!
//! A nested call passes here twice, and each time a process has to wake up:
//! that is what an RPC costs. So nothing happens between a message read and
//! the message written that must not: the caller's answer goes out before the
//! books are kept, and no message on the way is put on the heap.
//!
//! What nightcore does not do is not done here either: a worker that dies is
//! not replaced, and the call that it served is never answered.

mod books;
mod gateway;
mod options;

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::func_config::FuncConfig;
use crate::ipc::{self, Ipc, Payload};
use crate::wire::{
    CallId, FLAG_FIFO_FOR_NESTED_CALL, INLINE_SIZE, Kind, MAX_CLIENT_ID, Message, now_us,
};
use books::Function;
use gateway::GatewayLink;
pub use options::EngineOptions;

const LISTENER: u64 = 0;
const GATEWAY: u64 = 1;
/// Tokens from here on are sockets: launchers' and workers'.
const FIRST_SOCKET: u64 = 2;
/// Set in the token of a worker's output FIFO; the rest is its number.
const FIFO: u64 = 1 << 32;

/// Who is at the other end of a socket.
enum Peer {
    Stranger,
    Launcher { func: u16 },
    Worker { client: u16 },
}

struct Socket {
    stream: UnixStream,
    peer: Peer,
}

struct Worker {
    func: u16,
    input: OwnedFd,
    output: OwnedFd,
}

/// Runs until the gateway is gone.
pub fn run(options: &EngineOptions) -> Result<()> {
    let config = FuncConfig::load(&options.func_config_file)?;
    let ipc = Ipc::create(&options.ipc_root)
        .with_context(|| format!("cannot make {}", options.ipc_root.display()))?;
    let listener = UnixListener::bind(ipc.socket())
        .with_context(|| format!("cannot listen on {}", ipc.socket().display()))?;
    listener.set_nonblocking(true)?;
    let link = GatewayLink::connect(&options.gateway.0, options.gateway.1, options.node)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    epoll.add(&link, EpollEvent::new(EpollFlags::EPOLLIN, GATEWAY))?;
    let functions = config
        .entries()
        .iter()
        .map(|e| (e.func_id, Function::new(e)))
        .collect::<HashMap<_, _>>();
    println!("engine: ready, {} functions", functions.len());
    Engine {
        fifo_for_nested_call: options.fifo_for_nested_call,
        config,
        ipc,
        epoll,
        listener,
        link,
        functions,
        sockets: HashMap::new(),
        workers: HashMap::new(),
        launchers: HashMap::new(),
        external_inputs: HashSet::new(),
        next_socket: FIRST_SOCKET,
        next_client: 1,
    }
    .main_loop()
}

struct Engine {
    fifo_for_nested_call: bool,
    config: FuncConfig,
    ipc: Ipc,
    epoll: Epoll,
    listener: UnixListener,
    link: GatewayLink,
    functions: HashMap<u16, Function>,
    sockets: HashMap<u64, Socket>,
    workers: HashMap<u16, Worker>,
    /// The socket of each function's launcher.
    launchers: HashMap<u16, u64>,
    /// Calls of the gateway whose input is in a file that we have to remove.
    external_inputs: HashSet<CallId>,
    next_socket: u64,
    next_client: u16,
}

impl Engine {
    fn main_loop(mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let n = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(n) => n,
                Err(nix::Error::EINTR) => continue,
                Err(e) => return Err(e).context("epoll_wait"),
            };
            for event in &events[..n] {
                match event.data() {
                    LISTENER => self.accept()?,
                    GATEWAY => {
                        if !self.on_gateway(event.events())? {
                            println!("engine: the gateway is gone");
                            return Ok(());
                        }
                    }
                    token if token & FIFO != 0 => self.on_worker((token & 0xffff) as u16),
                    token => self.on_socket(token),
                }
            }
        }
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e).context("accept"),
            };
            let token = self.next_socket;
            self.next_socket += 1;
            self.epoll
                .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
            self.sockets.insert(
                token,
                Socket {
                    stream,
                    peer: Peer::Stranger,
                },
            );
        }
    }

    /// A socket has something to read: a handshake, or its end.
    fn on_socket(&mut self, token: u64) {
        let Some(socket) = self.sockets.get(&token) else {
            return;
        };
        let result = match socket.peer {
            Peer::Stranger => self.greet(token),
            // Nobody sends anything after the handshake: this is the end.
            Peer::Launcher { .. } | Peer::Worker { .. } => Err(io::ErrorKind::UnexpectedEof.into()),
        };
        if let Err(e) = result {
            self.close(token, &e);
        }
    }

    fn greet(&mut self, token: u64) -> io::Result<()> {
        let Some(socket) = self.sockets.get_mut(&token) else {
            return Ok(());
        };
        // All peers write their handshake in one piece, so this does not wait.
        let mut message = Message::zeroed();
        io::Read::read_exact(&mut socket.stream, &mut message.0)?;
        let func = message.func();
        let Some(entry) = self.config.by_id(func) else {
            return Err(io::Error::other(format!(
                "a handshake for function {func}, which is none"
            )));
        };
        match message.kind() {
            Some(Kind::LauncherHandshake) => {
                if self.launchers.contains_key(&func) {
                    return Err(io::Error::other(format!("{func} has a launcher already")));
                }
                socket.peer = Peer::Launcher { func };
                let json = self.config.json().as_bytes();
                socket
                    .stream
                    .write_all(&Message::handshake_response(json.len(), 0).0)?;
                socket.stream.write_all(json)?;
                self.launchers.insert(func, token);
                let wanted = entry.at_least();
                println!("engine: launcher of {} connected", entry.func_name);
                for _ in 0..wanted {
                    self.request_worker(func)?;
                }
                Ok(())
            }
            Some(Kind::WorkerHandshake) => {
                let client = message.client();
                if client == 0 || self.workers.contains_key(&client) {
                    return Err(io::Error::other(format!("a second worker {client}")));
                }
                // The worker reads its input before it greets, and can write
                // its output only once we read it.
                let worker = Worker {
                    func,
                    input: ipc::fifo_writer(&self.ipc.worker_input(client))?,
                    output: ipc::fifo_reader(&self.ipc.worker_output(client))?,
                };
                let flags = if self.fifo_for_nested_call {
                    FLAG_FIFO_FOR_NESTED_CALL
                } else {
                    0
                };
                socket.peer = Peer::Worker { client };
                socket
                    .stream
                    .write_all(&Message::handshake_response(0, flags).0)?;
                let event = EpollEvent::new(EpollFlags::EPOLLIN, FIFO | u64::from(client));
                self.epoll.add(&worker.output, event)?;
                println!("engine: worker {client} of {} connected", entry.func_name);
                self.workers.insert(client, worker);
                let next = self.functions.get_mut(&func).and_then(|f| f.joined(client));
                self.dispatch_next(client, next);
                Ok(())
            }
            _ => Err(io::Error::other("a first message that is no handshake")),
        }
    }

    fn close(&mut self, token: u64, why: &io::Error) {
        let Some(socket) = self.sockets.remove(&token) else {
            return;
        };
        let _ = self.epoll.delete(&socket.stream);
        match socket.peer {
            Peer::Stranger => eprintln!("engine: a connection failed: {why}"),
            Peer::Launcher { func } => {
                println!("engine: launcher of function {func} disconnected");
                self.launchers.remove(&func);
                if let Some(f) = self.functions.get_mut(&func) {
                    f.launcher_gone();
                }
            }
            Peer::Worker { client } => self.forget_worker(client),
        }
    }

    fn forget_worker(&mut self, client: u16) {
        let Some(worker) = self.workers.remove(&client) else {
            return;
        };
        println!(
            "engine: worker {client} of function {} disconnected",
            worker.func
        );
        let _ = self.epoll.delete(&worker.output);
        if let Some(f) = self.functions.get_mut(&worker.func) {
            f.left(client);
        }
        let _ = std::fs::remove_file(self.ipc.worker_input(client));
        let _ = std::fs::remove_file(self.ipc.worker_output(client));
    }

    /// Has a launcher start one more worker.
    fn request_worker(&mut self, func: u16) -> io::Result<()> {
        let Some(socket) = self
            .launchers
            .get(&func)
            .and_then(|t| self.sockets.get_mut(t))
        else {
            return Ok(());
        };
        let client = self.next_client;
        if client > MAX_CLIENT_ID {
            return Err(io::Error::other("all worker numbers are used up"));
        }
        self.next_client += 1;
        ipc::make_fifo(&self.ipc.worker_input(client))?;
        ipc::make_fifo(&self.ipc.worker_output(client))?;
        socket.stream.write_all(&Message::create_worker(client).0)?;
        if let Some(f) = self.functions.get_mut(&func) {
            f.requested();
        }
        Ok(())
    }

    /// A worker's output FIFO has a message, or its end.
    fn on_worker(&mut self, client: u16) {
        let Some(worker) = self.workers.get(&client) else {
            return;
        };
        let mut message = Message::zeroed();
        match nix::unistd::read(&worker.output, &mut message.0) {
            Ok(n) if n == message.0.len() => {}
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return,
            // Writes of a message are atomic: a piece of one is as bad as none.
            Ok(_) | Err(_) => return self.forget_worker(client),
        }
        match message.kind() {
            Some(Kind::Invoke) => {
                message.set_kind(Kind::Dispatch);
                self.new_call(message);
            }
            Some(Kind::Complete | Kind::Failed) => self.finished(client, message),
            _ => eprintln!("engine: worker {client} sent a message of an unexpected kind"),
        }
    }

    /// Gives a dispatch message to an idle worker, or queues it.
    fn new_call(&mut self, message: Message) {
        let call = message.call();
        let Some(function) = self.functions.get_mut(&call.func()) else {
            eprintln!("engine: a call of function {}, which is none", call.func());
            return;
        };
        if let Some(client) = function.take_idle(call) {
            self.send(client, message);
        } else {
            let wants_more = function.queue(message, now_us());
            if wants_more && let Err(e) = self.request_worker(call.func()) {
                eprintln!("engine: no further worker of function {}: {e}", call.func());
            }
        }
    }

    fn finished(&mut self, client: u16, message: Message) {
        let call = message.call();
        let Some(function) = self.functions.get(&call.func()) else {
            return;
        };
        // An answer to something that this worker was not asked is dropped.
        if !function.is_serving(client, call) {
            eprintln!(
                "engine: worker {client} answered call {}, not its own",
                call.0
            );
            return;
        }
        if call.client() == 0 {
            self.answer_gateway(call, &message);
        } else if !self.fifo_for_nested_call {
            self.send(call.client(), message);
        }
        let next = self
            .functions
            .get_mut(&call.func())
            .and_then(|f| f.freed(client));
        self.dispatch_next(client, next);
    }

    fn dispatch_next(&mut self, client: u16, next: Option<Box<Message>>) {
        if let Some(message) = next {
            self.send(client, *message);
        }
    }

    fn send(&self, client: u16, mut message: Message) {
        let Some(worker) = self.workers.get(&client) else {
            eprintln!("engine: worker {client} is gone, and with it a message to it");
            return;
        };
        message.stamp();
        // At most two messages are on their way to a worker, and a FIFO has
        // room for 64: this write neither blocks nor is cut.
        if let Err(e) = nix::unistd::write(&worker.input, &message.0) {
            eprintln!("engine: worker {client} takes no message: {e}");
        }
    }

    /// The gateway has something; false if that is its end.
    fn on_gateway(&mut self, events: EpollFlags) -> Result<bool> {
        if events.contains(EpollFlags::EPOLLOUT) {
            self.link.flush()?;
        }
        let mut open = true;
        if events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            open = self.link.fill()?;
            while let Some((call, input)) = self.link.next_call()? {
                self.external_call(call, &input);
            }
        }
        self.watch_gateway()?;
        Ok(open)
    }

    /// Waits for room towards the gateway only while something is left over.
    fn watch_gateway(&mut self) -> Result<()> {
        if let Some(waits) = self.link.changed_interest() {
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, waits);
            self.epoll
                .modify(self.link.as_fd(), &mut EpollEvent::new(flags, GATEWAY))?;
        }
        Ok(())
    }

    fn external_call(&mut self, call: CallId, input: &[u8]) {
        if !self.functions.contains_key(&call.func()) {
            return self.reply(Kind::Failed, call, 0, &[]);
        }
        let mut message = Message::of_call(Kind::Dispatch, call);
        if input.len() <= INLINE_SIZE {
            message.set_inline(input);
        } else {
            let put = i32::try_from(input.len())
                .map_err(io::Error::other)
                .and_then(|size| {
                    self.ipc
                        .write_payload(call, Payload::Input, input)
                        .map(|()| size)
                });
            match put {
                Ok(size) => message.set_payload_size(-size),
                Err(e) => {
                    eprintln!("engine: input of call {}: {e}", call.0);
                    return self.reply(Kind::Failed, call, 0, &[]);
                }
            }
            self.external_inputs.insert(call);
        }
        self.new_call(message);
    }

    fn answer_gateway(&mut self, call: CallId, message: &Message) {
        if self.external_inputs.remove(&call) {
            self.ipc.remove_payload(call, Payload::Input);
        }
        let extra = message.processing().unsigned_abs();
        if message.kind() == Some(Kind::Failed) {
            self.reply(Kind::Failed, call, 0, &[]);
        } else if message.payload_size() >= 0 {
            self.reply(Kind::Complete, call, extra, message.inline());
        } else {
            match self.ipc.map_payload(call, Payload::Output) {
                Ok(output) => self.reply(Kind::Complete, call, extra, output.as_slice()),
                Err(e) => {
                    eprintln!("engine: answer of call {}: {e}", call.0);
                    self.reply(Kind::Failed, call, 0, &[]);
                }
            }
            self.ipc.remove_payload(call, Payload::Output);
        }
    }

    fn reply(&mut self, kind: Kind, call: CallId, extra: u32, payload: &[u8]) {
        self.link.send(kind, call, extra, payload);
        if let Err(e) = self.watch_gateway() {
            eprintln!("engine: {e:#}");
        }
    }
}
