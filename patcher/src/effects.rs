//! What a callee may touch that is the caller's once both share a process,
//! told from what it imports.

use serde::{Deserialize, Serialize};

use crate::elf::Image;

/// One kind of effect and the imports that give it away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effect {
    /// `files`, `network`, `processes`, `threads`, `signals`, `credentials`,
    /// `working-directory`, `exit`, `time-zone`, `locale`.
    pub kind: String,
    /// The imports, sorted.
    pub imports: Vec<String>,
    /// What is the caller's now.
    pub means: String,
}

const KINDS: &[(&str, &str, &[&str])] = &[
    (
        "files",
        "opens the caller container's files",
        &[
            "open", "open64", "openat", "openat64", "creat", "fopen", "fopen64", "freopen",
            "opendir", "mkdir", "rmdir", "unlink", "unlinkat", "rename", "stat", "stat64", "lstat",
            "access", "readlink", "mkstemp", "tmpfile", "truncate", "chmod", "chown", "symlink",
            "link",
        ],
    ),
    (
        "network",
        "connects from the caller's network namespace",
        &[
            "socket",
            "connect",
            "bind",
            "listen",
            "accept",
            "accept4",
            "getaddrinfo",
            "gethostbyname",
            "socketpair",
        ],
    ),
    (
        "processes",
        "starts processes in the caller's container, with a copy of the caller's memory",
        &[
            "fork",
            "vfork",
            "clone",
            "execve",
            "execv",
            "execvp",
            "execl",
            "execlp",
            "posix_spawn",
            "posix_spawnp",
            "system",
            "popen",
        ],
    ),
    (
        "threads",
        "its threads run in the caller's process",
        &["pthread_create", "thrd_create"],
    ),
    (
        "signals",
        "changes or sends the caller process's signals",
        &[
            "sigaction",
            "signal",
            "sigprocmask",
            "pthread_sigmask",
            "raise",
            "kill",
            "alarm",
            "setitimer",
            "timer_create",
            "sigaltstack",
        ],
    ),
    (
        "credentials",
        "acts with the caller's user, groups and capabilities",
        &[
            "setuid",
            "setgid",
            "seteuid",
            "setegid",
            "setgroups",
            "capset",
            "prctl",
            "chroot",
            "unshare",
            "setns",
        ],
    ),
    (
        "working-directory",
        "changes or uses the caller's working directory",
        &["chdir", "fchdir", "getcwd"],
    ),
    (
        "exit",
        "ends the caller's process",
        &["exit", "_exit", "_Exit", "quick_exit", "abort"],
    ),
    (
        "time-zone",
        "uses the caller's time zone",
        &["localtime", "localtime_r", "mktime", "tzset", "strftime"],
    ),
    (
        "locale",
        "uses the caller's locale",
        &["setlocale", "newlocale", "uselocale"],
    ),
];

/// The effects of an image, in a fixed order; empty if none shows.
#[must_use]
pub fn effects(image: &Image) -> Vec<Effect> {
    KINDS
        .iter()
        .filter_map(|(kind, means, names)| {
            let mut imports: Vec<String> = image
                .symbols
                .iter()
                .filter(|s| s.undefined() && names.contains(&s.name.as_str()))
                .map(|s| s.name.clone())
                .collect();
            imports.sort();
            imports.dedup();
            (!imports.is_empty()).then(|| Effect {
                kind: (*kind).into(),
                imports,
                means: (*means).into(),
            })
        })
        .collect()
}
