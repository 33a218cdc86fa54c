//! System calls that a worker cannot make, foreseen.
//!
//! What a seccomp filter of the worker denies can be denied by killing it, so
//! nothing is tried. All that the borrowed thread is to do, and what the bridge
//! and the C library do in the worker later on, must be allowed:
//!
//! | the filters | then |
//! |---|---|
//! | can be read | they are run on each call, with its arguments; the first call that is not allowed refuses the patch by its name |
//! | cannot be read (no CAP_SYS_ADMIN, or the agent has a filter itself), and are those of the container | allowed: the dynamic linker has mapped the worker's libraries under them, and container runtimes' filters fail calls, they don't kill. What fails is taken back |
//! | cannot be read, and the worker has added some of its own | refused: they may kill |
//! | strict mode | refused |
//!
//! Filters are not suspended (`PTRACE_O_SUSPEND_SECCOMP`), though an agent that
//! may read them could: an agent that dies at the wrong instruction would leave
//! the thread to make the call with its filter on; and what the filter denies to
//! our thread it denies to the bridge, which needs memory when nobody stops it.

use ptrace_shim::{
    Address, Errno, Gadgets, Process, SeccompAnswer, SeccompFilters, SeccompState, StoppedThread,
    syscall_name,
};

use crate::plan::PatchPlan;
use crate::refused::Refused;

use super::ApplyError;

/// One call, with arguments as it will have them where a filter could look at
/// them.
struct Call {
    nr: libc::c_long,
    arguments: [u64; 6],
    /// That it fails does no harm.
    may_fail: bool,
}

const NONE: u64 = u64::MAX; // no descriptor: -1
const PAGE: u64 = 4096;

/// All that is to be called in the worker, in this order: by the borrowed
/// thread, by the bridge, and by the C library for the bridge's thread.
fn calls(whole: (u64, u64), control: Option<(u64, u64)>) -> Vec<Call> {
    let flags = |flags: i32| u64::from(flags.cast_unsigned());
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let reserve = flags(private | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE);
    let fixed = flags(private | libc::MAP_FIXED);
    let (none, read) = (flags(libc::PROT_NONE), flags(libc::PROT_READ));
    let write = flags(libc::PROT_READ | libc::PROT_WRITE);
    let execute = flags(libc::PROT_READ | libc::PROT_EXEC);
    let stack = flags(private | libc::MAP_STACK);
    let (start, length) = whole;
    let needed = |nr, arguments| Call {
        nr,
        arguments,
        may_fail: false,
    };
    let tolerated = |nr, arguments| Call {
        nr,
        arguments,
        may_fail: true,
    };
    let mut all = vec![
        needed(libc::SYS_rt_sigreturn, [0; 6]),
        needed(libc::SYS_mmap, [start, length, read, reserve, NONE, 0]),
        needed(libc::SYS_mmap, [start, PAGE, execute, fixed, NONE, 0]),
        needed(libc::SYS_mmap, [start, PAGE, write, fixed, NONE, 0]),
        needed(libc::SYS_munmap, [start, length, 0, 0, 0, 0]),
    ];
    if let Some((start, length)) = control {
        let shared = flags(libc::MAP_SHARED | libc::MAP_FIXED);
        let close = u64::from(libc::MFD_CLOEXEC);
        // The lowest number that is free is not known; filters look at the
        // first three at most.
        let fd = 7;
        all.extend([
            needed(libc::SYS_memfd_create, [start, close, 0, 0, 0, 0]),
            needed(libc::SYS_ftruncate, [fd, length, 0, 0, 0, 0]),
            needed(libc::SYS_mmap, [start, length, write, shared, fd, 0]),
            needed(libc::SYS_close, [fd, 0, 0, 0, 0, 0]),
        ]);
    }
    all.extend([
        needed(
            libc::SYS_mmap,
            [0, 16 * PAGE, write, flags(private), NONE, 0],
        ),
        needed(libc::SYS_mremap, [start, PAGE, 2 * PAGE, 1, 0, 0]),
        needed(libc::SYS_mprotect, [start, PAGE, read, 0, 0, 0]),
        // pthread_create, and what a thread begins and ends with.
        needed(libc::SYS_mmap, [0, 2048 * PAGE, none, stack, NONE, 0]),
        needed(libc::SYS_mprotect, [start, 2047 * PAGE, write, 0, 0, 0]),
        needed(libc::SYS_rt_sigprocmask, [2, start, 0, 8, 0, 0]),
        needed(
            libc::SYS_clone,
            [0x003d_0f00, start, start, start, start, 0],
        ),
        tolerated(libc::SYS_set_robust_list, [start, 24, 0, 0, 0, 0]),
        tolerated(libc::SYS_rseq, [start, 32, 0, 0x5305_3053, 0, 0]),
        tolerated(libc::SYS_madvise, [start, PAGE, 4, 0, 0, 0]),
        tolerated(libc::SYS_sched_yield, [0; 6]),
        needed(libc::SYS_exit, [0; 6]),
    ]);
    all
}

/// What the guard calls in the worker, for itself and when it passes a signal on.
fn guard_calls(pid: i32) -> Vec<Call> {
    let (pid, page) = (u64::from(pid.cast_unsigned()), 0x1000);
    let mut all = Vec::new();
    for signal in nightgraft_bridge::abi::GUARDED_SIGNALS.map(u64::from) {
        all.push((libc::SYS_rt_sigaction, [signal, page, page, 8, 0, 0]));
        all.push((libc::SYS_rt_tgsigqueueinfo, [pid, pid, signal, page, 0, 0]));
        all.push((libc::SYS_tgkill, [pid, pid, signal, 0, 0, 0]));
    }
    all.extend([
        (libc::SYS_sigaltstack, [page, page, 0, 0, 0, 0]),
        (libc::SYS_rt_sigprocmask, [0, page, 0, 8, 0, 0]),
        (libc::SYS_rt_sigprocmask, [1, page, 0, 8, 0, 0]),
        (libc::SYS_mprotect, [page, PAGE, 0, 0, 0, 0]),
        (libc::SYS_getpid, [0; 6]),
        (libc::SYS_gettid, [0; 6]),
    ]);
    all.into_iter()
        .map(|(nr, arguments)| Call {
            nr,
            arguments,
            may_fail: false,
        })
        .collect()
}

/// Refuses what can be told without stopping anyone.
pub(crate) fn foresee(pid: i32) -> Result<(), Refused> {
    let Ok(process) = Process::open(pid) else {
        // It is gone, which is told by who needs it.
        return Ok(());
    };
    match process.seccomp() {
        Ok(SeccompState { mode: 1, .. }) => Err(denied(pid, libc::SYS_mmap, "strict mode kills")),
        Ok(SeccompState { mode: 2, .. }) if !may_read() => without_reading(&process),
        _ => Ok(()),
    }
}

/// Whether we may read filters at all.
fn may_read() -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let capabilities = field("CapEff:").and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    capabilities.is_some_and(|set| set & CAP_SYS_ADMIN != 0)
        && field("Seccomp:").is_some_and(|mode| mode.trim() == "0")
}

/// Only the container's own filters are trusted unread.
fn without_reading(process: &Process) -> Result<(), Refused> {
    let pid = process.pid().as_raw();
    let unknown = || {
        Err(Refused::FilterUnknown {
            pid,
            call: syscall_name(libc::SYS_mmap.cast_unsigned()).to_owned(),
        })
    };
    let parent = process
        .parent()
        .and_then(Process::open)
        .and_then(|parent| parent.seccomp());
    match (process.seccomp(), parent) {
        (Ok(own), Ok(parent)) if own == parent => Ok(()),
        // It is dying, or its launcher is: then so will it.
        (Err(_), _) => Ok(()),
        _ => unknown(),
    }
}

/// Checks all that the stopped thread, and the worker later on, will call.
pub(super) fn check(
    stopped: &StoppedThread,
    gadgets: &Gadgets,
    plan: &PatchPlan,
) -> Result<(), ApplyError> {
    let pid = plan.pid;
    if stopped.is_dispatched(gadgets.syscall_ret)? {
        let why = "syscall user dispatch may send SIGSYS";
        return Err(denied(pid, libc::SYS_mmap, why).into());
    }
    let Some(filters) = stopped.seccomp_filters()? else {
        return match stopped.process().seccomp()? {
            SeccompState { mode: 0, .. } => Ok(()),
            _ => Ok(without_reading(stopped.process())?),
        };
    };
    for mapping in plan.mappings() {
        let whole = (mapping.reservation.start, mapping.reservation.len);
        let control = mapping.control.map(|control| (control.start, control.len));
        allowed(&filters, &calls(whole, control), gadgets.syscall_ret)
            .map_err(|(nr, answer)| denied(pid, nr, &format!("a seccomp filter {answer}")))?;
    }
    if plan.guarded {
        // As the host numbers it: no filter knows the number.
        allowed(&filters, &guard_calls(pid), gadgets.syscall_ret)
            .map_err(|(nr, answer)| denied(pid, nr, &format!("a seccomp filter {answer}")))?;
    }
    Ok(())
}

fn allowed(
    filters: &SeccompFilters,
    calls: &[Call],
    at: Address,
) -> Result<(), (libc::c_long, SeccompAnswer)> {
    let answer = |nr, arguments| filters.answer(nr, arguments, at.0 + 2);
    for call in calls {
        match answer(call.nr, call.arguments) {
            SeccompAnswer::Allow => {}
            SeccompAnswer::Fail(_) | SeccompAnswer::Trace if call.may_fail => {}
            other => return Err((call.nr, other)),
        }
    }
    // The C library tries clone3 first, and clone where the kernel has none.
    match answer(libc::SYS_clone3, [0; 6]) {
        SeccompAnswer::Allow | SeccompAnswer::Trace | SeccompAnswer::Fail(Errno::ENOSYS) => Ok(()),
        other => Err((libc::SYS_clone3, other)),
    }
}

/// The refusal of a patch for a call that is answered otherwise.
pub(super) fn denied(pid: i32, nr: libc::c_long, why: &str) -> Refused {
    Refused::CallDenied {
        pid,
        call: syscall_name(nr.cast_unsigned()).to_owned(),
        why: why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_filters_everything_is_allowed() {
        let calls = calls((0x1000, 0x10_0000), Some((0x8000, 0x1000)));
        assert_eq!(
            allowed(&SeccompFilters::default(), &calls, Address(0x5000)),
            Ok(())
        );
        assert!(calls.iter().any(|c| c.nr == libc::SYS_memfd_create));
    }

    #[test]
    fn a_process_without_filters_has_nothing_to_foresee() {
        assert_eq!(foresee(std::process::id().cast_signed()), Ok(()));
    }

    #[test]
    fn the_refusal_names_the_call() {
        let refused = denied(7, libc::SYS_memfd_create, "a seccomp filter kills");
        assert_eq!(refused.code(), "call-denied");
        assert_eq!(
            refused.to_string(),
            "worker 7 cannot call memfd_create: a seccomp filter kills"
        );
    }
}
