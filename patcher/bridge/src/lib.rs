//! The bridge: our in-process runtime inside a worker.
//!
//! It is freestanding (no libc of its own, no allocation but `mmap`, no
//! writable static data) so that it can be mapped into any worker by the
//! same loader as a callee's image. All its state lies in the structures of
//! [`abi`], whose addresses reach it through the site records that stubs hand
//! over.
//!
//! ```text
//!  Foo:   call stub ──► stub: displaced code; push target; r11 = site
//!                         │
//!                         ▼
//!  bridge: ng_enter ──► prepare: gate, name, target, thread, ready, free,
//!            ▲   │              stack and memory in order?
//!            │   │                no ──► registers back, jump to target (RPC)
//!            │   └─ result        yes ─► input scratch ─► Bar's faas_func_call
//!            │                            ng_append ◄─────┘  (arena)
//!            └── returns to Foo as the RPC would have returned
//! ```
//!
//! The crate has two uses. As a library of the workspace it gives the patcher
//! the layouts in [`abi`] and lets tests run the logic in an ordinary process.
//! Compiled with `--cfg bridge_image` as a `cdylib` (by the patcher's build
//! script) it is the image itself, with the symbols that the loader looks up:
//! `ng_enter`, `ng_routine`, `ng_called`, `ng_guarded`, `ng_worker`, `ng_tls_get_addr`, the
//! resolvers `ng_tlsdesc_…`, and what images get instead of functions of the
//! worker's libraries (`ng_getenv`, `ng_setspecific`, …).
//!
//! What it leaves to others: placing, relocating, writing windows (patcher),
//! deciding what is fused (agent).

#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod arena;
pub mod call;
pub mod cells;
mod crash;
pub mod dl;
pub mod entry;
pub mod environment;
pub mod exit;
pub mod guard;
pub mod histogram;
pub mod imports;
mod input;
pub mod legacy;
pub mod names;
pub mod observe;
pub mod routine;
pub mod start;
pub mod state;
pub mod symbols;
mod sys;
pub mod tls;
pub mod unwind;

#[cfg(test)]
mod tests;

#[cfg(bridge_image)]
mod freestanding;
