//! The end-to-end tests on real kernels: the programs that were built here,
//! booted with Debian's kernels under one condition after the other.
//!
//! ```text
//! cargo xtask vm-test ─► vm_test                           here
//!   conditions (pairwise) × kernels ─► initramfs ─► QEMU
//!                                          │ console
//!   verdict ◄──────────────────────────────┤
//!                          vm_init (PID 1) ┘               in the guest
//!                            mounts, sysctls, modules
//!                            └─► vm_trial                  both
//!                                  node, load, agent: patch, revert,
//!                                  killed in between; ptrace-shim's tests
//! ```
//!
//! - [`conditions`], [`pairwise`]: what is tried with what.
//! - [`kernel`], [`initramfs`], [`machine`]: a guest and its end.
//! - [`guest`]: what PID 1 does there.
//! - [`trial`]: what is tried, the same natively; [`probes`]: what a kernel
//!   was found to have.
//! - [`verdict`]: the one line that comes back.

pub mod conditions;
pub mod guest;
pub mod initramfs;
pub mod kernel;
pub mod machine;
pub mod pairwise;
pub mod probes;
pub mod trial;
pub mod verdict;
