//! The one place where this crate is unsafe.
//!
//! - [`abi`]: the worker_v1 interface to a function library: `dlopen`, the
//!   four entry points, and the two routines that the library calls back.
//! - [`mem`]: payload files mapped into memory.
//! - [`process`]: a child in namespaces of its own, and what a process gives
//!   up before it becomes another program.
//!
//! Everything else goes through `nix`, whose wrappers are safe.

pub mod abi;
mod mem;
pub mod process;

pub use mem::Region;
