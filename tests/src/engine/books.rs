//! One function's books: who is idle, who serves what, what waits.
//!
//! The most recently idle worker is taken first, as in nightcore: under a
//! light load all calls meet the same warm worker.

use std::collections::{HashMap, VecDeque};

use crate::func_config::FuncEntry;
use crate::wire::{CallId, Message};

/// At least this long, in µs, between two requests for one more worker.
const SCALE_UP_EVERY_US: i64 = 20_000;

/// The books of one function.
pub(super) struct Function {
    max_workers: usize,
    /// Workers ever asked for from the present launcher. Those that died count,
    /// too: a worker that dies is not replaced.
    started: usize,
    idle: Vec<u16>,
    serving: HashMap<u16, CallId>,
    waiting: VecDeque<Box<Message>>,
    scaled_up_at: i64,
}

impl Function {
    pub(super) fn new(entry: &FuncEntry) -> Self {
        Self {
            max_workers: entry.at_most(),
            started: 0,
            idle: Vec::new(),
            serving: HashMap::new(),
            waiting: VecDeque::new(),
            scaled_up_at: 0,
        }
    }

    /// A worker was asked for.
    pub(super) fn requested(&mut self) {
        self.started += 1;
    }

    /// The launcher is gone; the next one starts afresh.
    pub(super) fn launcher_gone(&mut self) {
        self.started = 0;
    }

    /// A worker is there; returns what it should do at once.
    pub(super) fn joined(&mut self, client: u16) -> Option<Box<Message>> {
        self.freed(client)
    }

    /// A worker is gone. What it served is never answered.
    pub(super) fn left(&mut self, client: u16) {
        self.idle.retain(|&c| c != client);
        self.serving.remove(&client);
    }

    /// Takes an idle worker for a call.
    pub(super) fn take_idle(&mut self, call: CallId) -> Option<u16> {
        let client = self.idle.pop()?;
        self.serving.insert(client, call);
        Some(client)
    }

    /// Puts a call into the queue; true if another worker should be started.
    pub(super) fn queue(&mut self, message: Message, now: i64) -> bool {
        self.waiting.push_back(Box::new(message));
        let more = self.started < self.max_workers && now - self.scaled_up_at > SCALE_UP_EVERY_US;
        if more {
            self.scaled_up_at = now;
        }
        more
    }

    pub(super) fn is_serving(&self, client: u16, call: CallId) -> bool {
        self.serving.get(&client) == Some(&call)
    }

    /// A worker has nothing to do; returns what it should do next.
    pub(super) fn freed(&mut self, client: u16) -> Option<Box<Message>> {
        self.serving.remove(&client);
        match self.waiting.pop_front() {
            Some(message) => {
                self.serving.insert(client, message.call());
                Some(message)
            }
            None => {
                self.idle.push(client);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Kind;

    fn function(min: i32, max: i32) -> Function {
        Function::new(&FuncEntry {
            func_name: "F".into(),
            func_id: 1,
            min_workers: min,
            max_workers: max,
            allow_http_get: false,
        })
    }

    fn call(n: u32) -> CallId {
        CallId::new(1, 0, n)
    }

    #[test]
    fn takes_the_worker_that_was_idle_last() {
        let mut f = function(2, 2);
        assert!(f.joined(7).is_none() && f.joined(8).is_none());
        assert_eq!(f.take_idle(call(1)), Some(8));
        assert_eq!(f.take_idle(call(2)), Some(7));
        assert_eq!(f.take_idle(call(3)), None);
        assert!(f.is_serving(8, call(1)) && !f.is_serving(8, call(2)));
        assert!(f.freed(8).is_none());
        assert_eq!(f.take_idle(call(4)), Some(8));
    }

    #[test]
    fn what_waits_is_served_in_order() {
        let mut f = function(1, 1);
        f.requested();
        for n in 1..=2 {
            assert!(!f.queue(Message::of_call(Kind::Dispatch, call(n)), 1_000_000));
        }
        assert_eq!(f.joined(3).map(|m| m.call()), Some(call(1)));
        assert_eq!(f.freed(3).map(|m| m.call()), Some(call(2)));
        assert!(f.freed(3).is_none());
    }

    #[test]
    fn a_dead_worker_is_neither_used_nor_replaced() {
        let mut f = function(1, 1);
        f.requested();
        assert!(f.joined(3).is_none());
        f.left(3);
        assert_eq!(f.take_idle(call(1)), None);
        assert!(!f.queue(Message::of_call(Kind::Dispatch, call(1)), 1_000_000));
        // A new launcher starts afresh.
        f.launcher_gone();
        assert!(f.queue(Message::of_call(Kind::Dispatch, call(2)), 2_000_000));
    }

    #[test]
    fn grows_slowly_up_to_the_limit() {
        let mut f = function(1, 2);
        f.requested();
        let m = || Message::of_call(Kind::Dispatch, call(1));
        assert!(f.queue(m(), 1_000_000));
        f.requested();
        assert!(!f.queue(m(), 1_000_001), "too soon");
        assert!(!f.queue(m(), 9_000_000), "there may be two");
    }
}
