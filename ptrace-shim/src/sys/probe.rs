//! A child that is traced, for finding out what a tracer may do.

use nix::errno::Errno;
use std::io;

/// Ended and reaped when dropped.
struct Child(i32);

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: two numbers; the child has not been reaped.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        let mut status = 0;
        // SAFETY: `status` is ours. Fails with ECHILD if somebody was faster.
        while unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL) } == -1
            && Errno::last() == Errno::EINTR
        {}
    }
}

/// Calls `work` with the pid of a child of this process that is a copy of it,
/// does nothing, and is traced by this thread.
pub(crate) fn with_traced_child(work: impl FnOnce(i32) -> io::Result<()>) -> io::Result<()> {
    let parent = std::process::id().cast_signed();
    // SAFETY: the child makes nothing but system calls, which is all that the
    // copy of a process with several threads may do.
    let child = unsafe {
        match libc::fork() {
            -1 => return Err(io::Error::last_os_error()),
            0 => {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // It may have died before that.
                while libc::getppid() == parent {
                    libc::pause();
                }
                libc::_exit(0)
            }
            pid => Child(pid),
        }
    };
    super::ptrace::seize(crate::Tid::from_raw(child.0))?;
    work(child.0)
}
