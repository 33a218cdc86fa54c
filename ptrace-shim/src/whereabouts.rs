//! Where a process's threads are, without stopping any of them.

use crate::error::Result;
use crate::syscalls::{Answer, answer};
use crate::{Process, Tid};
use serde::{Deserialize, Serialize};

/// Where a running thread was when it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whereabouts {
    /// The thread.
    pub tid: Tid,
    /// Where it was.
    pub place: Place,
    /// Whether user code may see it if the thread is stopped there: its call
    /// returns EINTR, or early.
    pub may_see_stop: bool,
}

/// Where a thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On a CPU or about to be.
    Running,
    /// Blocked in a system call.
    Call {
        /// The call's number.
        nr: u64,
        /// Its first argument: often a file descriptor.
        first_argument: u64,
    },
    /// Blocked, but not in a system call (a page fault, its own exit).
    Elsewhere,
}

/// Looks at where each thread is (`/proc/PID/task/TID/syscall`), so that a
/// moment can be preferred in which a stop is seen by none. A snapshot without
/// a guarantee: they move on.
///
/// # Errors
/// [`crate::Error::NoSuchProcess`] if it is gone; [`crate::Error::Proc`] if we
/// are not permitted to know.
pub fn where_threads_are(process: &Process) -> Result<Vec<Whereabouts>> {
    let mut found = Vec::new();
    for tid in process.threads()? {
        let text = match process.read_text(&format!("task/{tid}/syscall")) {
            Ok(text) => text,
            // It exited since it was listed.
            Err(crate::Error::Proc {
                cause: nix::errno::Errno::ENOENT | nix::errno::Errno::ESRCH,
                ..
            }) => continue,
            Err(error) => return Err(error),
        };
        let place = parse(&text);
        let may_see_stop = match place {
            Place::Call { nr, first_argument } => match answer(nr) {
                Answer::Unseen => false,
                Answer::MaySee => true,
                Answer::DependsOnFile => file_may_see(process, first_argument),
            },
            Place::Running | Place::Elsewhere => false,
        };
        found.push(Whereabouts {
            tid,
            place,
            may_see_stop,
        });
    }
    Ok(found)
}

/// Whether a `read` of this descriptor may answer to a stop. Sockets may have
/// a timeout, which can't be seen from here.
fn file_may_see(process: &Process, fd: u64) -> bool {
    process.read_link(&format!("fd/{fd}")).is_some_and(|file| {
        file.starts_with("socket:") || file == "anon_inode:inotify" || file == "anon_inode:[aio]"
    })
}

/// `running`, or `NR ARG0 ... ARG5 SP PC` with NR decimal, or `-1 SP PC`.
pub(crate) fn parse(text: &str) -> Place {
    let mut fields = text.split_ascii_whitespace();
    let Some(Ok(nr)) = fields.next().map(str::parse::<i64>) else {
        return Place::Running;
    };
    let first = fields
        .next()
        .and_then(|field| u64::from_str_radix(field.trim_start_matches("0x"), 16).ok());
    match (u64::try_from(nr), first) {
        (Ok(nr), Some(first_argument)) => Place::Call { nr, first_argument },
        _ => Place::Elsewhere,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_understood() {
        let read = "0 0x5 0x7ffd 0x400 0x0 0x0 0x0 0x7ffd1000 0x7f001000\n";
        let nr = 0;
        let first_argument = 5;
        assert_eq!(parse(read), Place::Call { nr, first_argument });
        assert_eq!(parse("running\n"), Place::Running);
        assert_eq!(parse("-1 0x7ffd1000 0x7f001000\n"), Place::Elsewhere);
    }
}
