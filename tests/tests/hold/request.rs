//! Requests that take a while.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nightgraft_testbed::{CallError, Node};

/// A request under way.
pub(crate) struct Request {
    thread: JoinHandle<Result<Vec<u8>, CallError>>,
    question: Arc<str>,
}

impl Request {
    pub(crate) fn send(node: &Node, function: &str, question: &str) -> Result<Self> {
        let question: Arc<str> = question.into();
        let mut client = node.client()?;
        client.set_timeout(Duration::from_secs(30))?;
        let (function, input) = (function.to_owned(), Arc::clone(&question));
        let thread = std::thread::spawn(move || client.call(&function, input.as_bytes()));
        Ok(Self { thread, question })
    }

    pub(crate) fn is_answered(&self) -> bool {
        self.thread.is_finished()
    }

    pub(crate) fn answer(self) -> Result<Vec<u8>> {
        match self.thread.join() {
            Ok(answer) => answer.with_context(|| format!("no answer to {:?}", self.question)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
