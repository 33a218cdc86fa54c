//! Names for numbers: a process, a thread, an address in the traced process.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An address in the traced process, never in ours.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Address(pub u64);

impl Address {
    /// The address `bytes` further up; `None` past the end of the address space.
    #[must_use]
    pub fn checked_add(self, bytes: u64) -> Option<Address> {
        self.0.checked_add(bytes).map(Address)
    }

    /// The address `bytes` further down; `None` below zero.
    #[must_use]
    pub fn checked_sub(self, bytes: u64) -> Option<Address> {
        self.0.checked_sub(bytes).map(Address)
    }

    /// The highest multiple of `alignment` (a power of two) not above this.
    #[must_use]
    pub fn align_down(self, alignment: u64) -> Address {
        debug_assert!(alignment.is_power_of_two());
        Address(self.0 & !(alignment - 1))
    }

    /// The page that the address lies in (4 KiB pages).
    #[must_use]
    pub fn page(self) -> Address {
        self.align_down(crate::PAGE_SIZE)
    }
}

impl From<u64> for Address {
    fn from(address: u64) -> Address {
        Address(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({:#x})", self.0)
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(i32);

        impl $name {
            /// Takes the kernel's number, as seen from this PID namespace.
            #[must_use]
            pub const fn from_raw(number: i32) -> $name {
                $name(number)
            }

            /// The kernel's number.
            #[must_use]
            pub const fn as_raw(self) -> i32 {
                self.0
            }
        }

        impl From<i32> for $name {
            fn from(number: i32) -> $name {
                $name(number)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A process, by the id of its thread group.
    Pid
}

id! {
    /// One thread of a process; the leader's equals the process's [`Pid`].
    Tid
}

impl Pid {
    /// The process's first thread.
    #[must_use]
    pub const fn leader(self) -> Tid {
        Tid(self.0)
    }
}
