//! A timer that keeps a blocking wait from being endless.
//!
//! `waitid` takes no timeout, and polling it either burns the CPU that the
//! traced thread needs to reach its stop, or sleeps too long. So a wait blocks,
//! and while a stop is being made or held a per-thread timer sends a signal,
//! with a handler that does nothing, every few milliseconds: the wait returns
//! EINTR and its deadline is looked at. A stop is usually over before the
//! first one.
//!
//! `PTRACE_SEIZE` needs more than that. While the process executes a program it
//! waits, and the kernel starts it again after a signal (ERESTARTNOINTR); the
//! program's start in turn waits for the death of threads that we have seized
//! already, and that wait for us. So the handler turns a `PTRACE_SEIZE` that is
//! about to be (re)started into a call of no such number: it fails with ENOSYS,
//! we look after the others and try again.
//!
//! The signal is the highest real-time one whose action is still the default
//! when it is first needed. It goes to the tracing thread only.

use nix::errno::Errno;
use std::cell::{Cell, OnceCell};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::OnceLock;

const PERIOD_NANOSECONDS: libc::c_long = 3_000_000;

thread_local! {
    static TIMER: OnceCell<Timer> = const { OnceCell::new() };
}

/// The ticks run while one of these lives in this OS thread.
#[derive(Debug)]
pub(crate) struct Tick(PhantomData<*const ()>);

impl Tick {
    /// Starts this thread's ticks, or joins them.
    pub(crate) fn start() -> Result<Tick, Errno> {
        TIMER.with(|cell| {
            let timer = match cell.get() {
                Some(timer) => timer,
                None => {
                    let timer = Timer::create()?;
                    cell.get_or_init(|| timer)
                }
            };
            let users = timer.users.get();
            if users == 0 {
                timer.set(PERIOD_NANOSECONDS)?;
            }
            timer.users.set(users + 1);
            Ok(Tick(PhantomData))
        })
    }
}

impl Drop for Tick {
    fn drop(&mut self) {
        // While the thread's locals are destroyed the timer goes by itself.
        let _ = TIMER.try_with(|cell| {
            if let Some(timer) = cell.get() {
                let users = timer.users.get() - 1;
                timer.users.set(users);
                if users == 0 && timer.set(0).is_err() {
                    tracing::debug!("the tick timer could not be disarmed");
                }
            }
        });
    }
}

struct Timer {
    id: libc::timer_t,
    users: Cell<u32>,
}

impl Timer {
    fn create() -> Result<Timer, Errno> {
        let signal = signal()?;
        // SAFETY: zeroed is a valid value of these plain structures, which are
        // filled in before use; the timer goes to the calling thread.
        let id = unsafe {
            let mut set = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, null_mut());
            let mut event = MaybeUninit::<libc::sigevent>::zeroed().assume_init();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut id: libc::timer_t = null_mut();
            Errno::result(libc::timer_create(
                libc::CLOCK_MONOTONIC,
                &mut event,
                &mut id,
            ))?;
            id
        };
        Ok(Timer {
            id,
            users: Cell::new(0),
        })
    }

    fn set(&self, period: libc::c_long) -> Result<(), Errno> {
        let time = libc::timespec {
            tv_sec: 0,
            tv_nsec: period,
        };
        let value = libc::itimerspec {
            it_interval: time,
            it_value: time,
        };
        // SAFETY: the timer is ours and alive; value is read only.
        Errno::result(unsafe { libc::timer_settime(self.id, 0, &value, null_mut()) }).map(drop)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and not used again.
        unsafe { libc::timer_delete(self.id) };
    }
}

/// The ticks' signal; its handler is installed at the first call.
fn signal() -> Result<i32, Errno> {
    static SIGNAL: OnceLock<Result<i32, Errno>> = OnceLock::new();
    *SIGNAL.get_or_init(|| {
        (libc::SIGRTMIN()..=libc::SIGRTMAX())
            .rev()
            .find_map(claim)
            .unwrap_or(Err(Errno::EBUSY))
    })
}

/// The ticks' handler: see above.
extern "C" fn skip_seize(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a ucontext_t to handlers with SA_SIGINFO, and
    // rip is where this very thread executes code, so it can be read.
    unsafe {
        let registers = &mut (*context).uc_mcontext.gregs;
        if registers[libc::REG_RAX as usize] == libc::SYS_ptrace
            && registers[libc::REG_RDI as usize] == i64::from(libc::PTRACE_SEIZE)
        {
            let code = registers[libc::REG_RIP as usize] as *const [u8; 2];
            if code.read_unaligned() == SYSCALL {
                registers[libc::REG_RAX as usize] = -1;
            }
        }
    }
}

/// Installs the handler for `signal` unless it has one.
fn claim(signal: i32) -> Option<Result<i32, Errno>> {
    // SAFETY: zeroed is a valid value of this plain structure; the handler
    // calls nothing and changes no state but the interrupted call's number, so
    // it is safe at any point of any thread.
    unsafe {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        if libc::sigaction(signal, std::ptr::null(), &mut old) != 0
            || old.sa_sigaction != libc::SIG_DFL
        {
            return None;
        }
        let mut new = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        let handler: extern "C" fn(_, _, _) = skip_seize;
        new.sa_sigaction = handler as libc::sighandler_t;
        new.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&mut new.sa_mask);
        // No SA_RESTART: interrupting is what it is for.
        Some(Errno::result(libc::sigaction(signal, &new, null_mut())).map(|_| signal))
    }
}
