//! Fusing a callee's code into a caller's worker: reading, planning, applying.
//!
//! Data flows one way. [`snapshot`] reads two workers without stopping them,
//! [`plan`] is a pure function of the two snapshots and yields a [`PatchPlan`]
//! or a [`Refused`]; [`apply`] is the only part that touches a worker, and it
//! does nothing that is not in the plan. [`status`] reads back what is there.
//! Before anything takes effect it is written down ([`journal`]); what an agent
//! that died has left is put in order from that and the worker's own record
//! ([`recover`]).
//!
//! ```text
//!  snapshot(Foo) ─┐
//!                 ├─► plan (pure) ─► PatchPlan ─► apply: prepare ─► commit
//!  snapshot(Bar) ─┘        │
//!                          └─► Refused { code, reason, lift }
//! ```

pub mod analyses;
pub mod apply;
pub mod code;
pub mod effects;
pub mod elf;
pub mod faults;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod held;
pub mod journal;
pub mod load;
pub mod manifest;
pub mod observed;
pub mod plan;
pub mod recover;
pub mod refused;
pub mod report;
pub mod room;
pub mod session;
pub mod snapshot;
pub mod status;

pub use refused::Refused;
