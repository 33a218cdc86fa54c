//! The tables: which import shows what.

use super::imports;
use crate::elf::Image;

/// Kind, what it means, imports.
pub(super) const KINDS: &[(&str, &str, &str)] = &[
    (
        "files",
        "opens, looks up or runs the caller container's files",
        "open open64 openat openat64 creat creat64 fopen fopen64 freopen freopen64 opendir scandir scandir64 \
         mkdir mkdirat rmdir unlink unlinkat remove rename renameat renameat2 link linkat symlink symlinkat \
         mknod mknodat mkfifo mkfifoat __xmknod __xmknodat stat stat64 lstat lstat64 fstatat fstatat64 statx \
         __xstat __xstat64 __lxstat __lxstat64 __fxstatat __fxstatat64 access faccessat eaccess euidaccess \
         readlink readlinkat realpath canonicalize_file_name mkstemp mkstemp64 mkostemp mkostemp64 mkstemps \
         mkstemps64 mkostemps mkostemps64 mkdtemp mktemp tmpfile tmpfile64 tempnam tmpnam truncate truncate64 \
         chmod fchmodat chown lchown fchownat utime utimes lutimes futimesat utimensat glob glob64 ftw ftw64 \
         nftw nftw64 fts_open fts64_open inotify_init inotify_init1 inotify_add_watch fanotify_init shm_open \
         shm_unlink mq_open mq_unlink sem_open sem_unlink shmget msgget semget ftok statfs statfs64 statvfs \
         statvfs64 pathconf mount umount umount2 getxattr lgetxattr setxattr lsetxattr listxattr llistxattr \
         removexattr lremovexattr name_to_handle_at open_by_handle_at posix_openpt getpt openpty forkpty \
         setmntent getfsent getfsspec getfsfile catopen syslog vsyslog openlog \
         execve execv execvp execvpe execl execlp execle execveat posix_spawn posix_spawnp system popen \
         getpwnam getpwnam_r getpwuid getpwuid_r getpwent getpwent_r getgrnam getgrnam_r getgrgid getgrgid_r \
         getgrent getgrent_r getgrouplist getspnam getspnam_r getspent getspent_r getservbyname \
         getservbyname_r getservbyport getservbyport_r getservent getprotobyname getprotobyname_r \
         getprotobynumber getprotobynumber_r getprotoent getutent getutxent getutid getutxid getusershell",
    ),
    (
        "network",
        "connects from the caller's network namespace",
        "socket connect bind listen accept accept4 getaddrinfo getaddrinfo_a getnameinfo gethostbyname \
         gethostbyname2 gethostbyname_r gethostbyname2_r gethostbyaddr gethostbyaddr_r gethostent res_init \
         res_query res_search res_nquery res_nsearch __res_init __res_ninit __res_query __res_search \
         __res_nquery __res_nsearch getifaddrs if_nametoindex if_indextoname if_nameindex rcmd rexec \
         sethostname setdomainname",
    ),
    (
        "environment",
        "reads and changes a copy of its own worker's environment, as that was when it started",
        "getenv secure_getenv environ __environ _environ setenv putenv unsetenv clearenv",
    ),
    (
        "processes",
        "starts processes in the caller's container, with a copy of the caller's memory, or waits for the caller's",
        "fork vfork _Fork clone execve execv execvp execvpe execl execlp execle execveat fexecve posix_spawn \
         posix_spawnp system popen daemon forkpty wait wait3 wait4 waitpid waitid ptrace",
    ),
    (
        "libraries",
        "opens only libraries that its own worker has loaded at the time of the patch; for others dlopen fails",
        "dlopen",
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
        "getuid geteuid getgid getegid getresuid getresgid getgroups getlogin getlogin_r cuserid capget setuid setgid seteuid setegid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups \
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
        "host-name",
        "sees the caller container's host name",
        "gethostname getdomainname gethostid uname",
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
        "static-results",
        "overwrites a result of the C library that the caller may still look at",
        "asctime ctime strerror strsignal getpwnam getpwuid getgrnam getgrgid getspnam \
         gethostbyname gethostbyname2 gethostbyaddr getservbyname getservbyport getprotobyname \
         getprotobynumber getnetbyname getnetbyaddr ether_ntoa ether_aton ttyname ctermid cuserid \
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

/// What begins the mangled names of C++'s library that show a kind, as
/// `libstdc++` has them. `std::cout` and its like are no files; a path as such
/// (`std::filesystem::__cxx11::path`) is a string.
const MANGLED: &[(&str, &[&str])] = &[
    (
        "files",
        &[
            // std::basic_filebuf, basic_ifstream, basic_ofstream, basic_fstream
            "13basic_filebufI",
            "14basic_ifstreamI",
            "14basic_ofstreamI",
            "13basic_fstreamI",
        ],
    ),
    ("threads", &["6thread15_M_start_thread"]),
    (
        "time-zone",
        &[
            "6chrono8get_tzdb",
            "6chrono12current_zone",
            "6chrono11locate_zone",
        ],
    ),
];

/// Functions of `std::filesystem`, and its classes that walk folders.
fn filesystem(rest: &str) -> bool {
    let Some(name) = rest.strip_prefix("10filesystem") else {
        return false;
    };
    match name.strip_prefix("7__cxx11") {
        Some(class) => {
            class.starts_with("18directory_iterator")
                || class.starts_with("28recursive_directory_iterator")
        }
        None => {
            name.starts_with(|c: char| c.is_ascii_digit())
                && !name.starts_with("16filesystem_error")
        }
    }
}

/// Whether `import` is a mangled name of namespace `std` that shows `kind`:
/// a function, constant member function, vtable, VTT or type information.
fn is_mangled(import: &str, kind: &str) -> bool {
    let rest = ["_ZNKSt", "_ZNSt", "_ZTVSt", "_ZTTSt", "_ZTISt"]
        .iter()
        .find_map(|prefix| import.strip_prefix(prefix));
    let Some(rest) = rest else { return false };
    let listed = MANGLED
        .iter()
        .filter(|(k, _)| *k == kind)
        .flat_map(|(_, names)| *names)
        .any(|name| rest.starts_with(name));
    listed || kind == "files" && filesystem(rest)
}

/// Whether `import` shows the kind that these names show.
pub(super) fn shows(import: &str, kind: &str, names: &str) -> bool {
    is_one_of(import, names) || is_mangled(import, kind)
}

/// Functions and variables that work on one hidden position, or return one
/// hidden table, per process. Someone who calls the function anew while
/// another is in the middle takes that other's place away.
const CURSORS: &[&str] = &[
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

    fn kinds_of(import: &str) -> Vec<&'static str> {
        let shown = KINDS.iter().filter(|(k, _, names)| shows(import, k, names));
        shown.map(|(k, ..)| *k).collect()
    }

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
        for (kind, _) in MANGLED {
            assert!(KINDS.iter().any(|(k, ..)| k == kind), "{kind}");
        }
    }

    #[test]
    fn file_streams_are_files_and_cout_is_none() {
        for import in [
            "_ZNSt14basic_ifstreamIcSt11char_traitsIcEEC1EPKcSt13_Ios_Openmode",
            "_ZNSt13basic_filebufIcSt11char_traitsIcEE4openEPKcSt13_Ios_Openmode",
            "_ZTTSt14basic_ofstreamIcSt11char_traitsIcEE",
            "_ZNKSt13basic_filebufIwSt11char_traitsIwEE7is_openEv",
            "_ZNSt10filesystem6statusERKNS_7__cxx114pathE",
            "_ZNSt10filesystem7__cxx1118directory_iteratorC1ERKNS0_4pathENS_17directory_optionsEPSt10error_code",
        ] {
            assert_eq!(kinds_of(import), ["files"], "{import}");
        }
        for import in [
            "_ZSt4cout",
            "_ZNSolsEi",
            "_ZNSt8ios_base4InitC1Ev",
            "_ZNSt10filesystem7__cxx114path14_M_split_cmptsEv",
            "_ZNSt10filesystem16filesystem_errorD1Ev",
            "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev",
            "_ZN3foo13basic_filebufIcE4openEv",
        ] {
            assert!(kinds_of(import).is_empty(), "{import}");
        }
        assert_eq!(
            kinds_of(
                "_ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE"
            ),
            ["threads"]
        );
    }

    #[test]
    fn pairs_and_pipes_are_no_network() {
        for import in [
            "socketpair",
            "pipe",
            "pipe2",
            "poll",
            "send",
            "recv",
            "read",
            "fstat",
        ] {
            assert!(kinds_of(import).is_empty(), "{import}");
        }
        assert_eq!(kinds_of("socket"), ["network"]);
    }
}
