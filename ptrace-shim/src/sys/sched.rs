//! Scheduling of the calling OS thread: policy, priority, CPUs.

use nix::errno::Errno;
use std::mem::{MaybeUninit, size_of};

/// A policy with its priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) policy: i32,
    pub(crate) priority: i32,
}

/// The calling thread's policy (with SCHED_RESET_ON_FORK, if set).
pub(crate) fn policy_of(tid: i32) -> Result<Policy, Errno> {
    let mut parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a structure of ours.
    let policy = unsafe {
        Errno::result(libc::sched_getparam(tid, &mut parameters))?;
        Errno::result(libc::sched_getscheduler(tid))?
    };
    Ok(Policy {
        policy,
        priority: parameters.sched_priority,
    })
}

/// Sets the calling thread's policy.
pub(crate) fn set_policy(policy: Policy) -> Result<(), Errno> {
    let parameters = libc::sched_param {
        sched_priority: policy.priority,
    };
    // SAFETY: the structure is only read.
    Errno::result(unsafe { libc::sched_setscheduler(0, policy.policy, &parameters) }).map(drop)
}

/// The calling thread's CPUs.
pub(crate) fn affinity() -> Result<libc::cpu_set_t, Errno> {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: the pointer is to a set of ours of the given size; zeroed is a
    // valid value of it.
    unsafe {
        Errno::result(libc::sched_getaffinity(
            0,
            size_of::<libc::cpu_set_t>(),
            set.as_mut_ptr(),
        ))?;
        Ok(set.assume_init())
    }
}

/// Sets the calling thread's CPUs.
pub(crate) fn set_affinity(set: &libc::cpu_set_t) -> Result<(), Errno> {
    // SAFETY: the set is only read, and of the given size.
    Errno::result(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), set) })
        .map(drop)
}

/// The set of one CPU; `None` for one that a `cpu_set_t` can't hold.
pub(crate) fn only(cpu: usize) -> Option<libc::cpu_set_t> {
    if cpu >= 8 * size_of::<libc::cpu_set_t>() {
        return None;
    }
    // SAFETY: zeroed is the empty set, and the CPU is within it.
    unsafe {
        let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed().assume_init();
        libc::CPU_SET(cpu, &mut set);
        Some(set)
    }
}

/// Whether the set holds this CPU.
pub(crate) fn holds(set: &libc::cpu_set_t, cpu: usize) -> bool {
    // SAFETY: the CPU is within the set.
    cpu < 8 * size_of::<libc::cpu_set_t>() && unsafe { libc::CPU_ISSET(cpu, set) }
}

/// The calling thread's nice value.
pub(crate) fn nice() -> Result<i32, Errno> {
    Errno::clear();
    // SAFETY: two numbers. 0 is the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    match Errno::last() {
        errno if nice == -1 && errno != Errno::from_raw(0) => Err(errno),
        _ => Ok(nice),
    }
}

/// Sets the calling thread's nice value.
pub(crate) fn set_nice(nice: i32) -> Result<(), Errno> {
    // SAFETY: three numbers. 0 is the calling thread.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }).map(drop)
}
