//! The node agent of nightgraft: finds nightcore's workers, has the patcher
//! fuse and un-fuse them, and answers on a Unix socket.
//!
//! ```text
//!  agentctl ──HTTP/JSON──► server ──► ps, status, explain ──(read only)──┐
//!   (cli, client)            │                                           ▼
//!                            └─► driver (one thread) ─► ops ─► canary ─► Grafter
//!                                                        │
//!                                        discover ◄──────┘   (/proc, afresh each time)
//! ```
//!
//! A third thread watches fused workers to their end ([`watch`]), and quarantines
//! the edge whose callee ran when one died ([`quarantine`]).
//!
//! One thread changes workers; everything else queues for it or only reads. What
//! it changes it writes down first ([`journal`]), and what an agent that died has
//! left is put in order when the next one starts ([`recovery`]).

#![deny(unsafe_code)]

pub mod api;
pub mod canary;
pub mod claim;
pub mod cli;
pub mod client;
pub mod daemon;
pub mod discover;
pub mod driver;
pub mod error;
pub mod factory;
pub mod faults;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod grafter;
pub mod history;
pub mod journal;
pub mod live;
pub mod meter;
pub mod observer;
pub mod ops;
pub mod planning;
pub mod policy;
pub mod quarantine;
pub mod recovery;
pub mod select;
pub mod server;
pub mod socket;
pub mod state_dir;
pub mod watch;

#[cfg(all(fuzzing, not(test)))]
#[allow(dead_code, unused_imports, reason = "fuzzing needs a part of it")]
mod testing;
#[cfg(test)]
mod testing;
