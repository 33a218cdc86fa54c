//! The only place of this crate with `unsafe` code: one small file per family
//! of system calls, each a thin and total wrapper. Meaning is added above.

pub(crate) mod probe;
pub(crate) mod proc;
pub(crate) mod ptrace;
pub(crate) mod sched;
pub(crate) mod tick;
pub(crate) mod wait;
pub(crate) mod xsave;

pub use step::die_at_step;
pub(crate) use step::step;

/// A hook for tests: to die between any two requests to a traced thread.
mod step {
    use std::sync::atomic::{AtomicU64, Ordering};

    /// 0 is off; n > 0 dies at the n-th step from now.
    static LEFT: AtomicU64 = AtomicU64::new(0);

    /// Makes this process kill itself (SIGKILL) at the `n`-th request that it
    /// makes to a traced thread from now on, before it is made; 0 never does.
    ///
    /// Returns how many steps were left of the previous setting, so that a
    /// test learns how many steps an operation has.
    #[doc(hidden)]
    pub fn die_at_step(n: u64) -> u64 {
        LEFT.swap(n, Ordering::SeqCst)
    }

    /// Called before each request that changes or waits for a traced thread.
    #[inline]
    pub(crate) fn step() {
        if LEFT.load(Ordering::Relaxed) != 0 && LEFT.fetch_sub(1, Ordering::SeqCst) == 1 {
            // SAFETY: kill(2) with our own pid has no memory effects.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}
