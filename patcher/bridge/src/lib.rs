//! The in-process runtime.
#![no_std]
