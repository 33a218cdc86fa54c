//! An agent on a real socket.

use std::path::PathBuf;
use std::sync::Arc;

use super::{FakeGrafter, FakeProc};
use crate::server::{Agent, serve};

/// An agent on a real socket, with a patcher that touches nothing.
pub(crate) struct FakeServer {
    pub(crate) socket: PathBuf,
    pub(crate) grafter: Arc<FakeGrafter>,
    _proc: FakeProc,
    _dir: tempfile::TempDir,
    _socket: crate::socket::AgentSocket,
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl FakeServer {
    pub(crate) fn start(proc: FakeProc, grafter: FakeGrafter) -> Self {
        Self::start_for(proc, grafter, vec![nix::unistd::geteuid().as_raw()])
    }

    pub(crate) fn start_for(proc: FakeProc, grafter: FakeGrafter, allowed: Vec<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let (socket, listener) = crate::socket::bind(&path).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        let grafter = Arc::new(grafter);
        let observer: Arc<crate::observer::Observer> = Arc::default();
        let (driver, _thread) = crate::driver::start(
            grafter.clone(),
            proc.root(),
            Arc::default(),
            Arc::default(),
            observer.clone(),
            None,
        )
        .unwrap();
        let mut agent = Agent::new(
            grafter.clone(),
            driver,
            proc.root(),
            None,
            Arc::default(),
            (Arc::default(), observer),
            crate::recovery::Recovery::default(),
        );
        agent.allowed_uids = allowed;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        tokio::spawn(serve(listener, agent, async move {
            let _ = stopped.await;
        }));
        Self {
            socket: path,
            grafter,
            _proc: proc,
            _dir: dir,
            _socket: socket,
            _stop: stop,
        }
    }
}
