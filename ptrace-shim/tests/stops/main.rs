//! Real processes are stopped, borrowed, and left by tracers that die; and must
//! not notice.
//!
//! Each test starts *subjects*: this same binary again, which takes a role
//! before the test harness gets to run (see `subject`). A subject checks its
//! own state and reports on its standard output; a test asserts on that.
//! Tracers that are to be killed are subjects as well.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests are not seen as tests, and subjects report by panicking"
)]

mod blocking;
mod borrowing;
mod child;
mod ends;
mod killed;
mod memory;
mod patterns;
mod roles;
mod signals;
mod stopping;
mod subject;
