//! Points at which a test may end this process: between any two things that it
//! does to others.
//!
//! With the feature `fault-points` each is a fail point of the crate `fail`,
//! named by its text here; without it [`hit`] is an empty function, and nothing
//! of this is in the program. Crates above this one name theirs with
//! [`fault_points!`](crate::fault_points).

/// Passes a point.
#[cfg(feature = "fault-points")]
pub fn hit(name: &'static str) {
    fail::fail_point!(name);
}

/// Passes a point: nothing, in this build.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub const fn hit(_name: &'static str) {}

/// Defines points as constants, and `ALL`, the list of them.
#[macro_export]
macro_rules! fault_points {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        $($(#[$doc])* pub const $name: &str = $text;)*
        /// All of them.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

/// The points around one kind of request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Around {
    pub(crate) before: &'static str,
    pub(crate) after: &'static str,
}

macro_rules! around {
    ($($name:ident = $text:literal;)*) => {
        $(pub(crate) const $name: Around = Around {
            before: concat!($text, "#before"),
            after: concat!($text, "#after"),
        };)*
        /// All points of this crate: before and after each kind of request.
        pub const ALL: &[&str] = &[$($name.before, $name.after),*];
    };
}

around! {
    SEIZE = "ptrace::seize";
    INTERRUPT = "ptrace::interrupt";
    CONT = "ptrace::cont";
    SYSCALL = "ptrace::syscall";
    DETACH = "ptrace::detach";
    GET_REGISTERS = "ptrace::get-registers";
    SET_REGISTERS = "ptrace::set-registers";
    GET_MASK = "ptrace::get-mask";
    SET_MASK = "ptrace::set-mask";
    RSEQ = "ptrace::rseq";
    PEEK = "ptrace::peek";
    POKE = "ptrace::poke";
    EVENT = "ptrace::event-message";
    SIGNAL = "ptrace::signal";
    PENDING = "ptrace::pending";
    WAIT = "ptrace::wait";
    WRITE = "memory::write";
}
