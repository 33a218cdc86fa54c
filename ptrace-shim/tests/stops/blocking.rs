//! Each kind of blocking system call through a stop, and through a loan.
//!
//! Role: `block CALL` makes the call in the leader and prints what it returned;
//! a helper thread releases it when told to.

use crate::child::{Subject, patient, until};
use crate::subject::{hear, say_ready};
use nix::errno::Errno;
use ptrace_shim::{
    Error, NotBorrowable, Place, Sees, stop_all, stop_thread, syscall_name, where_threads_are,
};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long `nanosleep` sleeps: longer than it takes to be found there, stopped
/// and borrowed on an emulated processor.
const NAP: Duration = Duration::from_secs(2);

/// What a stop does to a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    /// It returns EINTR at once.
    Eintr,
    /// It returns this, fewer than asked for, at once.
    Short(u64),
    /// Nothing; released, it returns this.
    Unseen(i64),
    /// As above, but the thread can't be borrowed: the kernel keeps what the
    /// call goes on from.
    UnseenNotLent(i64),
}

const EINTR: i64 = -(libc::EINTR as i64);

const CALLS: &[(&str, libc::c_long, Expect)] = &[
    ("epoll_wait", libc::SYS_epoll_wait, Expect::Eintr),
    ("epoll_pwait2", libc::SYS_epoll_pwait2, Expect::Eintr),
    ("recv-timeout", libc::SYS_recvfrom, Expect::Eintr),
    ("read-timeout", libc::SYS_read, Expect::Eintr),
    ("accept-timeout", libc::SYS_accept4, Expect::Eintr),
    ("sigtimedwait", libc::SYS_rt_sigtimedwait, Expect::Eintr),
    ("semop", libc::SYS_semop, Expect::Eintr),
    ("write", libc::SYS_write, Expect::Short(65536)),
    ("writev", libc::SYS_writev, Expect::Short(65536)),
    ("send", libc::SYS_sendto, Expect::Short(0)),
    ("sendmsg", libc::SYS_sendmsg, Expect::Short(0)),
    ("read", libc::SYS_read, Expect::Unseen(1)),
    ("recv", libc::SYS_recvfrom, Expect::Unseen(1)),
    (
        "accept",
        libc::SYS_accept4,
        Expect::Unseen(-(libc::EINVAL as i64)),
    ),
    ("ppoll", libc::SYS_ppoll, Expect::Unseen(1)),
    ("pselect", libc::SYS_pselect6, Expect::Unseen(1)),
    ("futex", libc::SYS_futex, Expect::Unseen(0)),
    ("pause", libc::SYS_pause, Expect::Unseen(EINTR)),
    ("sigsuspend", libc::SYS_rt_sigsuspend, Expect::Unseen(EINTR)),
    ("waitid", libc::SYS_waitid, Expect::Unseen(0)),
    ("flock", libc::SYS_flock, Expect::Unseen(0)),
    ("poll", libc::SYS_poll, Expect::UnseenNotLent(1)),
    ("futex-timeout", libc::SYS_futex, Expect::UnseenNotLent(0)),
    (
        "nanosleep",
        libc::SYS_clock_nanosleep,
        Expect::UnseenNotLent(0),
    ),
];

extern "C" fn ignore(_: libc::c_int) {}

/// Installs a handler that does nothing; with or without SA_RESTART.
pub(crate) fn handle(signal: i32, handler: extern "C" fn(libc::c_int), flags: i32) {
    // SAFETY: zeroed is a valid value, and the handler is a function.
    unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

/// A raw system call: its result, or -errno.
fn call(nr: libc::c_long, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: each caller below passes what the call takes, from buffers that
    // are never freed.
    let result = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    match result {
        -1 => -i64::from(Errno::last_raw()),
        result => result,
    }
}

fn leak<T>(value: T) -> u64 {
    Box::into_raw(Box::new(value)) as u64
}

fn with_timeout(socket: &impl AsRawFd) {
    let time = libc::timeval {
        tv_sec: 600,
        tv_usec: 0,
    };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        // SAFETY: the option takes a timeval of this size.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const time).cast(),
                size_of::<libc::timeval>() as u32,
            )
        };
        assert_eq!(result, 0);
    }
}

/// Makes the call and prints its result.
pub(crate) fn block(name: &str) {
    const SIGMASK_LENGTH: u64 = 8;
    let nr = CALLS.iter().find(|(known, ..)| *known == name).unwrap().1;
    let leader = nix::unistd::gettid().as_raw();
    let megabyte = leak([0u8; 1 << 20]);
    let (reader, writer) = std::io::pipe().unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    let [from, to, near, far] = [
        reader.as_raw_fd(),
        writer.as_raw_fd(),
        here.as_raw_fd(),
        there.as_raw_fd(),
    ];
    let word = leak(0u32);
    let minutes = leak(libc::timespec {
        tv_sec: 600,
        tv_nsec: 0,
    });
    let readable = |fd: i32| {
        leak(libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
    };
    let vector = leak([megabyte, 1 << 20]);
    let mut semaphores = None;
    let mut listener = 0;
    let fd = |fd: i32| u64::from(fd.cast_unsigned());
    let arguments = match name {
        "epoll_wait" | "epoll_pwait2" => {
            // SAFETY: a number.
            let epoll = unsafe { libc::epoll_create1(0) };
            let timeout = if name == "epoll_wait" {
                600_000
            } else {
                minutes
            };
            [fd(epoll), megabyte, 8, timeout, 0, SIGMASK_LENGTH]
        }
        "recv-timeout" | "recv" => {
            if name == "recv-timeout" {
                with_timeout(&here);
            }
            [fd(near), megabyte, 100, 0, 0, 0]
        }
        "read-timeout" => {
            with_timeout(&here);
            [fd(near), megabyte, 100, 0, 0, 0]
        }
        "accept-timeout" | "accept" => {
            let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            if name == "accept-timeout" {
                with_timeout(&socket);
            }
            listener = socket.as_raw_fd();
            std::mem::forget(socket);
            [fd(listener), 0, 0, 0, 0, 0]
        }
        "sigtimedwait" => [leak(1u64 << (libc::SIGUSR1 - 1)), 0, minutes, 8, 0, 0],
        "semop" => {
            // SAFETY: numbers.
            let id = unsafe { libc::semget(libc::IPC_PRIVATE, 1, 0o600) };
            semaphores = Some(id);
            let take = leak(libc::sembuf {
                sem_num: 0,
                sem_op: -1,
                sem_flg: 0,
            });
            [fd(id), take, 1, 0, 0, 0]
        }
        "write" => [fd(to), megabyte, 1 << 20, 0, 0, 0],
        "writev" => [fd(to), vector, 1, 0, 0, 0],
        "send" => [fd(near), megabyte, 1 << 20, 0, 0, 0],
        "sendmsg" => {
            let message = leak([0, 0, vector, 1, 0, 0, 0]);
            [fd(near), message, 0, 0, 0, 0]
        }
        "read" => [fd(from), megabyte, 100, 0, 0, 0],
        "poll" => [readable(from), 1, u64::from(u32::MAX), 0, 0, 0],
        "ppoll" => [readable(from), 1, minutes, 0, SIGMASK_LENGTH, 0],
        "pselect" => [
            fd(from) + 1,
            leak([1u64 << from, 0, 0, 0]),
            0,
            0,
            minutes,
            0,
        ],
        "futex" => [word, libc::FUTEX_WAIT as u64, 0, 0, 0, 0],
        "futex-timeout" => [word, libc::FUTEX_WAIT as u64, 0, minutes, 0, 0],
        "pause" => [0; 6],
        "sigsuspend" => {
            // Blocked but for the call.
            let blocked = leak(1u64 << (libc::SIGUSR1 - 1));
            call(libc::SYS_rt_sigprocmask, [0, blocked, 0, 8, 0, 0]);
            [leak(0u64), 8, 0, 0, 0, 0]
        }
        "waitid" => {
            // SAFETY: the child only waits for its input's end or its killing.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: as after any fork of a single thread.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                    libc::_exit(0);
                }
            }
            listener = child;
            let exited = libc::WEXITED as u64;
            [libc::P_PID.into(), fd(child), 0, exited, 0, 0]
        }
        "flock" => {
            let file = tempfile();
            call(
                libc::SYS_flock,
                [fd(file), libc::LOCK_EX as u64, 0, 0, 0, 0],
            );
            let path = format!("/proc/self/fd/{file}\0");
            // SAFETY: a string with its end.
            let other = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDWR) };
            listener = file;
            [fd(other), libc::LOCK_EX as u64, 0, 0, 0, 0]
        }
        "nanosleep" => {
            let time = leak(libc::timespec {
                tv_sec: NAP.as_secs().cast_signed(),
                tv_nsec: 0,
            });
            [libc::CLOCK_MONOTONIC as u64, 0, time, 0, 0, 0]
        }
        other => panic!("{other}"),
    };
    handle(libc::SIGUSR1, ignore, libc::SA_RESTART);
    let pid = std::process::id().cast_signed();
    let released = name.to_owned();
    std::thread::spawn(move || {
        if hear().is_none() {
            std::process::exit(0);
        }
        // SAFETY: numbers, and buffers that are never freed.
        unsafe {
            match released.as_str() {
                "read" | "poll" | "ppoll" | "pselect" => {
                    libc::write(to, b"x".as_ptr().cast(), 1);
                }
                "recv" => {
                    libc::write(far, b"x".as_ptr().cast(), 1);
                }
                "accept" => {
                    libc::shutdown(listener, libc::SHUT_RDWR);
                }
                "futex" | "futex-timeout" => {
                    libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, 1);
                }
                "pause" | "sigsuspend" => {
                    libc::syscall(libc::SYS_tgkill, pid, leader, libc::SIGUSR1);
                }
                "waitid" => {
                    libc::kill(listener, libc::SIGKILL);
                }
                "flock" => {
                    libc::flock(listener, libc::LOCK_UN);
                }
                _ => {}
            }
        }
    });
    say_ready();
    let start = std::time::Instant::now();
    let result = call(nr, arguments);
    if let Some(id) = semaphores {
        // SAFETY: numbers.
        unsafe { libc::semctl(id, 0, libc::IPC_RMID) };
    }
    if name == "nanosleep" {
        assert!(start.elapsed() >= NAP);
    }
    drop((reader, writer, here, there));
    println!("{result}");
}

fn tempfile() -> i32 {
    // SAFETY: a string with its end.
    let fd = unsafe { libc::memfd_create(c"lock".as_ptr(), 0) };
    assert!(fd >= 0);
    fd
}

/// Waits until the leader of `block NAME` is in its call.
fn blocked(name: &str, nr: libc::c_long) -> (Subject, ptrace_shim::Tid) {
    let (subject, tid) = Subject::ready(&format!("block {name}"));
    subject.until_in_call(tid, nr);
    until(
        || {
            let place = where_threads_are(&subject.process()).unwrap();
            place.iter().all(|thread| thread.place != Place::Running)
        },
        || subject.status(),
    );
    (subject, tid)
}

/// Lets the call return if the stop did not, and checks what it returned.
fn assert_result(subject: &mut Subject, name: &str, expect: Expect) {
    let early = subject.line_within(match expect {
        Expect::Eintr | Expect::Short(_) => crate::child::PATIENCE,
        Expect::Unseen(_) | Expect::UnseenNotLent(_) => Duration::from_millis(30),
    });
    match expect {
        Expect::Eintr => assert_eq!(early.unwrap(), EINTR.to_string(), "{name}"),
        Expect::Short(done) => {
            let returned = early.unwrap().parse::<u64>().unwrap();
            assert!(0 < returned && returned < 1 << 20, "{name}: {returned}");
            assert!(done == 0 || done == returned, "{name}: {returned}");
        }
        Expect::Unseen(result) | Expect::UnseenNotLent(result) => {
            assert_eq!(early, None, "{name} returned");
            subject.tell("x");
            assert_eq!(subject.line(), result.to_string(), "{name}");
        }
    }
    assert!(subject.end().success(), "{name}");
}

fn assert_disturbed(
    found: &[ptrace_shim::Disturbed],
    tid: ptrace_shim::Tid,
    nr: u64,
    expect: Expect,
) {
    match expect {
        Expect::Eintr | Expect::Short(_) => {
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!((found[0].tid, found[0].nr), (tid, nr));
            assert_eq!(found[0].name, syscall_name(nr));
            let eintr = found[0].sees == Sees::Eintr;
            assert_eq!(eintr, expect == Expect::Eintr, "{found:?}");
        }
        Expect::Unseen(_) | Expect::UnseenNotLent(_) => assert_eq!(found, []),
    }
}

#[test]
fn calls_answer_to_a_stop_of_all_as_is_said() {
    for &(name, nr, expect) in CALLS {
        let (mut subject, tid) = blocked(name, nr);
        let where_all_are = where_threads_are(&subject.process()).unwrap();
        let foreseen = where_all_are.iter().any(|thread| thread.may_see_stop);
        let stop = stop_all(&subject.process(), patient())
            .unwrap()
            .resume()
            .unwrap();
        assert_eq!(stop.threads, 2, "{name}");
        assert_disturbed(&stop.disturbed, tid, nr as u64, expect);
        // What may be seen is never missed; sockets are taken for such that
        // have a timeout.
        let seen = matches!(expect, Expect::Eintr | Expect::Short(_));
        assert!(foreseen || !seen, "{name} was not foreseen");
        if !matches!(name, "recv" | "accept") {
            assert_eq!(foreseen, seen, "{name}");
        }
        if name == "nanosleep" {
            assert_eq!(subject.line(), "0");
        } else {
            assert_result(&mut subject, name, expect);
        }
    }
}

#[test]
fn calls_go_on_after_their_thread_was_borrowed() {
    for &(name, nr, expect) in CALLS {
        let (mut subject, tid) = blocked(name, nr);
        let gadgets = subject.gadgets();
        let thread = stop_thread(&subject.process(), tid, patient()).unwrap();
        let seen: Vec<_> = thread.disturbed().into_iter().collect();
        assert_disturbed(&seen, tid, nr as u64, expect);
        let borrowed = thread.borrow(&gadgets);
        if matches!(expect, Expect::UnseenNotLent(_)) {
            let error = borrowed.unwrap_err();
            let Error::NotBorrowable { reason, .. } = &error else {
                panic!("{name}: {error}");
            };
            let nr = nr as u64;
            assert_eq!(*reason, NotBorrowable::RestartBlock { nr }, "{name}");
        } else {
            let mut borrowed = borrowed.unwrap_or_else(|error| panic!("{name}: {error}"));
            for _ in 0..3 {
                let pid = borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap();
                assert_eq!(pid, Ok(subject.pid() as u64), "{name}");
            }
            borrowed.give_back().unwrap().resume().unwrap();
        }
        if name == "nanosleep" {
            assert_eq!(subject.line(), "0");
        } else {
            assert_result(&mut subject, name, expect);
        }
    }
}

/// Dropped without being given back, the thread goes on by its frame alone, as
/// it would if we died.
#[test]
fn calls_go_on_after_their_thread_healed_itself() {
    for &(name, nr, expect) in CALLS {
        if matches!(expect, Expect::UnseenNotLent(_)) {
            continue;
        }
        let (mut subject, tid) = blocked(name, nr);
        let gadgets = subject.gadgets();
        let thread = stop_thread(&subject.process(), tid, patient()).unwrap();
        let mut borrowed = thread.borrow(&gadgets).unwrap();
        let pid = borrowed.syscall(libc::SYS_getpid, [0; 6]).unwrap();
        assert_eq!(pid, Ok(subject.pid() as u64), "{name}");
        drop(borrowed);
        assert_result(&mut subject, name, expect);
    }
}
