//! How this binary becomes a subject: before `main`, if it is told a role.

use crate::child::ROLE;
use crate::roles;

// SAFETY: the section holds pointers to functions that the C library calls
// before main, as this one may be.
#[used]
#[unsafe(link_section = ".init_array")]
static TAKE_ROLE: extern "C" fn() = take_role;

extern "C" fn take_role() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    // SAFETY: two numbers. Dies with the thread that started it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let words: Vec<&str> = role.split(' ').collect();
    // A panic must not unwind into the C library.
    let result = std::panic::catch_unwind(|| roles::play(&words));
    std::process::exit(i32::from(result.is_err()));
}

/// Prints that all is set up, and which thread is the one to look at.
pub(crate) fn say_ready() {
    println!("ready {}", nix::unistd::gettid());
}

/// Waits for one byte from the test; `None` at the end of input.
pub(crate) fn hear() -> Option<u8> {
    let mut byte = 0u8;
    loop {
        // SAFETY: one byte into ours.
        let read = unsafe { libc::read(0, (&raw mut byte).cast(), 1) };
        match read {
            1 => return Some(byte),
            0 => return None,
            _ => assert_eq!(nix::errno::Errno::last(), nix::errno::Errno::EINTR),
        }
    }
}
