//! What a callee may touch that is the caller's once both share a process,
//! told from what it imports: what the process owns ([`effects`]), and hidden
//! variables of the C library ([`shared_cursor`]).
//!
//! An import shows that a callee can do a thing, not that it does; what it
//! does through a pointer, a system call of its own or a library that it
//! shares with the caller does not show.

use serde::{Deserialize, Serialize};

use crate::elf::Image;

/// One kind of effect and the imports that give it away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effect {
    /// `files`, `network`, `processes`, `threads`, `signals`, `credentials`,
    /// `working-directory`, `exit`, `time-zone`, `locale`, `descriptors`,
    /// `process-settings`, `random-numbers`, `static-results`, `databases`,
    /// `system-calls`.
    pub kind: String,
    /// The imports, sorted.
    pub imports: Vec<String>,
    /// What is the caller's now.
    pub means: String,
}

/// Kind, what it means, imports.
const KINDS: &[(&str, &str, &str)] = &[
    (
        "files",
        "opens the caller container's files",
        "open open64 openat openat64 creat creat64 fopen fopen64 freopen freopen64 opendir scandir scandir64 \
         mkdir mkdirat rmdir unlink unlinkat remove rename renameat renameat2 link linkat symlink symlinkat \
         mknod mknodat mkfifo __xmknod stat stat64 lstat lstat64 fstatat fstatat64 statx __xstat __xstat64 \
         __lxstat __lxstat64 __fxstatat __fxstatat64 access faccessat eaccess euidaccess readlink readlinkat \
         realpath canonicalize_file_name mkstemp mkstemp64 mkostemp mkostemp64 mkstemps mkdtemp tmpfile \
         tmpfile64 tempnam truncate truncate64 chmod fchmodat chown lchown fchownat utime utimes utimensat \
         glob glob64 ftw ftw64 nftw nftw64 fts_open inotify_init inotify_init1 shm_open shm_unlink mq_open \
         sem_open shmget msgget semget statfs statfs64 statvfs statvfs64 mount umount umount2",
    ),
    (
        "network",
        "connects from the caller's network namespace",
        "socket connect bind listen accept accept4 socketpair getaddrinfo getnameinfo gethostbyname \
         gethostbyname2 gethostbyname_r gethostbyaddr gethostbyaddr_r res_init res_query res_search \
         sethostname setdomainname",
    ),
    (
        "processes",
        "starts processes in the caller's container, with a copy of the caller's memory, or waits for the caller's",
        "fork vfork _Fork clone execve execv execvp execvpe execl execlp execle execveat fexecve posix_spawn \
         posix_spawnp system popen daemon forkpty wait wait3 wait4 waitpid waitid ptrace",
    ),
    (
        "threads",
        "its threads run in the caller's process",
        "pthread_create thrd_create",
    ),
    (
        "signals",
        "changes, awaits or sends the caller process's signals",
        "sigaction signal bsd_signal sysv_signal __sysv_signal sigset sigignore siginterrupt sigprocmask \
         pthread_sigmask raise gsignal kill killpg tgkill pthread_kill sigqueue alarm ualarm setitimer \
         timer_create sigaltstack sigwait sigwaitinfo sigtimedwait sigsuspend signalfd",
    ),
    (
        "credentials",
        "acts with the caller's user, groups and capabilities",
        "setuid setgid seteuid setegid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups \
         initgroups capset prctl chroot pivot_root unshare setns",
    ),
    (
        "working-directory",
        "changes or uses the caller's working directory",
        "chdir fchdir getcwd getwd get_current_dir_name",
    ),
    (
        "exit",
        "ends the caller's process or its thread",
        "exit _exit _Exit quick_exit abort __assert_fail __assert_perror_fail __assert err errx verr verrx \
         error pthread_exit thrd_exit",
    ),
    (
        "time-zone",
        "uses the caller's time zone",
        "localtime localtime_r mktime timelocal tzset strftime ctime ctime_r timezone daylight tzname \
         __timezone __daylight __tzname",
    ),
    (
        "locale",
        "uses the caller's locale",
        "setlocale newlocale uselocale localeconv nl_langinfo bindtextdomain textdomain",
    ),
    (
        "descriptors",
        "replaces or closes descriptors by number, which are the caller's",
        "dup2 dup3 close_range closefrom fcloseall",
    ),
    (
        "process-settings",
        "changes what holds for the caller's whole process",
        "umask setrlimit setrlimit64 prlimit prlimit64 nice setpriority sched_setaffinity sched_setscheduler \
         sched_setparam sched_setattr pthread_setaffinity_np pthread_setschedparam personality setpgid setpgrp \
         setsid mallopt mlockall munlockall feenableexcept fedisableexcept fesetenv fesetround clock_settime \
         settimeofday adjtime adjtimex openlog closelog setlogmask",
    ),
    (
        "random-numbers",
        "draws from the caller's sequence of random numbers, or starts it anew",
        "rand srand random srandom initstate setstate drand48 erand48 lrand48 nrand48 mrand48 jrand48 srand48 \
         seed48 lcong48",
    ),
    (
        "static-results",
        "overwrites a result of the C library that the caller may still look at",
        "localtime gmtime asctime ctime strerror strsignal getpwnam getpwuid getgrnam getgrgid getspnam \
         gethostbyname gethostbyname2 gethostbyaddr getservbyname getservbyport getprotobyname \
         getprotobynumber getnetbyname getnetbyaddr inet_ntoa ether_ntoa ether_aton ttyname ctermid cuserid \
         getlogin ptsname crypt l64a tmpnam readdir readdir64 setlocale localeconv getmntent fgetpwent \
         fgetgrent ecvt fcvt gcvt qecvt qfcvt signgam dlerror basename dirname hstrerror",
    ),
    (
        "databases",
        "moves the caller's position in the C library's lists of users, hosts and the like",
        "getpwent setpwent endpwent getgrent setgrent endgrent getspent setspent endspent gethostent \
         sethostent endhostent getnetent setnetent endnetent getprotoent setprotoent endprotoent getservent \
         setservent endservent getutent setutent endutent getutxent setutxent endutxent getusershell \
         setusershell endusershell getfsent setfsent endfsent getttyent setttyent endttyent setnetgrent \
         getnetgrent endnetgrent",
    ),
    (
        "system-calls",
        "makes system calls by number, which may be any of the above",
        "syscall",
    ),
];

/// Functions and variables that work on one hidden position, or return one
/// hidden table, per process. Someone who calls the function anew while
/// another is in the middle takes that other's place away.
const CURSORS: &[&str] = &[
    "strtok",
    "getopt getopt_long getopt_long_only __posix_getopt optind optarg optopt opterr argp_parse",
    "hcreate hsearch hdestroy",
    "ecvt fcvt qecvt qfcvt",
    "getpwent setpwent endpwent",
    "getgrent setgrent endgrent",
    "getspent setspent endspent",
    "gethostent sethostent endhostent",
    "getservent setservent endservent",
    "getprotoent setprotoent endprotoent",
    "getnetent setnetent endnetent",
    "setnetgrent getnetgrent endnetgrent",
    "getutent setutent endutent getutxent setutxent endutxent",
    "getusershell setusershell endusershell",
    "getfsent setfsent endfsent",
    "getttyent setttyent endttyent",
    "re_comp re_exec",
];

/// The effects of an image, in a fixed order; empty if none shows.
#[must_use]
pub fn effects(image: &Image) -> Vec<Effect> {
    KINDS
        .iter()
        .filter_map(|(kind, means, names)| {
            let mut imports: Vec<String> = imports(image)
                .filter(|import| is_one_of(import, names))
                .map(str::to_owned)
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

/// The first import of `callee` that works on a hidden position in the C
/// library that an import of `caller` works on too. A caller in the middle of
/// its own use, as with `strtok` in a loop that makes the call, would go on
/// with the callee's.
#[must_use]
pub fn shared_cursor<'a>(caller: &Image, callee: &'a Image) -> Option<&'a str> {
    let used: Vec<&str> = CURSORS
        .iter()
        .filter(|family| imports(caller).any(|import| is_one_of(import, family)))
        .copied()
        .collect();
    imports(callee).find(|import| used.iter().any(|family| is_one_of(import, family)))
}

fn imports(image: &Image) -> impl Iterator<Item = &str> {
    image
        .symbols
        .iter()
        .filter(|s| s.undefined())
        .map(|s| s.name.as_str())
}

/// Whether `import` is in a list of names, as itself or as the checked variant
/// that `_FORTIFY_SOURCE` makes of it (`__open_2`, `__getcwd_chk`).
fn is_one_of(import: &str, names: &str) -> bool {
    let checked = import.strip_prefix("__").and_then(|name| {
        name.strip_suffix("_2")
            .or_else(|| name.strip_suffix("_chk"))
    });
    names
        .split_ascii_whitespace()
        .any(|name| name == import || checked == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checked_variant_is_the_function_itself() {
        let files = KINDS[0].2;
        for import in ["open", "__open_2", "__openat64_2", "__realpath_chk"] {
            assert!(is_one_of(import, files), "{import}");
        }
        for import in ["pen", "__open", "open_2", "__read_chk", ""] {
            assert!(!is_one_of(import, files), "{import}");
        }
    }

    #[test]
    fn every_kind_and_name_is_there_once() {
        for (kind, _, names) in KINDS {
            let mut sorted: Vec<&str> = names.split_ascii_whitespace().collect();
            sorted.sort_unstable();
            let before = sorted.len();
            sorted.dedup();
            assert_eq!(before, sorted.len(), "{kind}");
            assert_eq!(KINDS.iter().filter(|(k, ..)| k == kind).count(), 1);
        }
    }
}
