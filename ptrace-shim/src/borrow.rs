//! System calls of ours on a borrowed thread that heals itself.
//!
//! ```text
//!             write the frame              registers, then mask      PTRACE_SYSCALL
//!  as stopped ──────────────> as stopped ───────────────────────> at ──────> entry
//!      ^                                                       `syscall`       │
//!      │ mask, then registers                                      ^           v
//!      └────────── stopped again <── INTERRUPT, CONT ── between ───┴──────── exit
//!                                                     registers
//! ```
//!
//! If the tracer dies at any point of this, the kernel detaches and the thread
//! runs on from where it stands: untouched, or at a `syscall; ret` with the
//! frame of [`crate::frame`] on top of its stack, which puts everything back.
//! - The frame is written before any register changes and is not touched until
//!   the registers are given back.
//! - Signals are blocked while the registers are not the thread's own, so that
//!   no handler runs on them; the mask is set after the registers are ours and
//!   put back before they are not, so that it never outlives the frame. What
//!   arrives meanwhile stays pending. SIGSTOP can't be blocked; it stops the
//!   others, and this one when it is released. SIGSYS is let through and caught
//!   here: it is how a seccomp filter answers a call, and kills if blocked.
//! - The registers are given back at the kind of stop that they were taken at,
//!   so the kernel restarts the interrupted call (or interrupts it, if a signal
//!   came) as if it had been there all the time.

use crate::error::{Error, NotBorrowable, Result};
use crate::frame::{self, Layout};
use crate::gadgets::Gadgets;
use crate::registers::Interrupted;
use crate::stop_thread::StoppedThread;
use crate::sys::wait::{self, Event};
use crate::sys::{self, ptrace};
use crate::tracee::{Deadline, Settled};
use crate::{Address, Registers, Tid, borrowable, xstate};
use nix::errno::Errno;
use std::time::Duration;

/// All signals but SIGSYS. (SIGKILL and SIGSTOP are not blocked by this.)
const BLOCKED: u64 = !(1 << (libc::SIGSYS - 1));

/// The trap flag: a single step is a trap that would outlive the tracer.
const EFLAGS_TRAP: u64 = 1 << 8;

/// `si_code` of a SIGSYS from seccomp, and from syscall user dispatch.
const SYS_SECCOMP: i32 = 1;
const SYS_USER_DISPATCH: i32 = 2;

/// How long a call that overran its deadline may take to give up.
const GIVING_UP: Duration = Duration::from_secs(1);

/// A stopped thread that makes system calls of ours.
///
/// Bound to the OS thread that stopped it. Dropped, it is let go of and heals
/// itself; only [`Borrowed::give_back`] also has the kernel interrupt the call
/// that it was in, if a signal came meanwhile.
#[derive(Debug)]
#[must_use = "dropped, the thread is let go of"]
pub struct Borrowed {
    stopped: StoppedThread,
    layout: Layout,
    gadgets: Gadgets,
    mask: u64,
    stand: Stand,
    /// A SIGSYS that somebody sent meanwhile.
    owed_sigsys: bool,
}

/// The extended state of a thread, as its signal frame is to have it.
fn extended_state(stopped: &StoppedThread) -> Result<Vec<u8>> {
    let mut image = vec![0; xstate::MOST];
    match ptrace::extended_state(stopped.tid(), &mut image) {
        Ok(length) => {
            let image = &image[..length.min(xstate::MOST)];
            xstate::for_signal_frame(image, sys::xsave::component)
                .map_err(|what| stopped.not_borrowable(NotBorrowable::ExtendedState(what)))
        }
        // The processor has no XSAVE.
        Err(Errno::ENODEV) => ptrace::fxsave_state(stopped.tid())
            .map(|image| xstate::for_signal_frame_without_xsave(&image))
            .map_err(|cause| stopped.failed("reading the floating-point state", cause)),
        Err(cause) => Err(stopped.failed("reading the extended state", cause)),
    }
}

/// Where the borrowed thread stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// As it was stopped, registers and mask its own.
    Original,
    /// Stopped, at or behind the `syscall` of ours.
    Between,
    /// Running, in a call that did not end in time, or dead.
    Away,
}

impl Borrowed {
    /// Length of [`Borrowed::scratch`] in bytes.
    pub const SCRATCH_LENGTH: usize = frame::SCRATCH as usize;

    pub(crate) fn new(stopped: StoppedThread, gadgets: &Gadgets) -> Result<Borrowed> {
        let tid = stopped.tid();
        let healed = borrowable::check(&stopped)?;

        let fpstate = extended_state(&stopped)?;
        let layout = borrowable::find_room(&stopped, fpstate.len())?;
        gadgets.check(stopped.memory())?;
        let mask = ptrace::signal_mask(tid)
            .map_err(|cause| stopped.failed("reading the signal mask", cause))?;

        let frame = frame::build(&layout, &healed, mask, &fpstate, gadgets.restore_rt);
        stopped.memory().write(layout.frame, &frame)?;
        Ok(Borrowed {
            stopped,
            layout,
            gadgets: *gadgets,
            mask,
            stand: Stand::Original,
            owed_sigsys: false,
        })
    }

    /// The thread.
    #[must_use]
    pub fn tid(&self) -> Tid {
        self.stopped.tid()
    }

    /// Its registers as it was stopped.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        self.stopped.registers()
    }

    /// An area of [`Borrowed::SCRATCH_LENGTH`] bytes in the thread's stack, for
    /// strings and buffers of the calls. Aligned to 64 bytes, and keeps what
    /// is in it until the thread is given back.
    #[must_use]
    pub fn scratch(&self) -> Address {
        self.layout.scratch
    }

    /// Writes to the scratch area, `offset` bytes into it, and returns the
    /// address.
    ///
    /// # Errors
    /// As for [`crate::Memory::write`]; [`Error::Memory`] with EMSGSIZE if it
    /// does not fit.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) -> Result<Address> {
        let address = Address(self.layout.scratch.0.saturating_add(offset as u64));
        if offset
            .checked_add(bytes.len())
            .is_none_or(|end| end > Self::SCRATCH_LENGTH)
        {
            return Err(Error::Memory {
                operation: "writing",
                pid: self.stopped.process().pid(),
                address,
                length: bytes.len(),
                cause: Errno::EMSGSIZE,
            });
        }
        self.stopped.memory().write(address, bytes)?;
        Ok(address)
    }

    /// The stopped thread that this is, e.g. to write its process's memory.
    pub fn stopped(&self) -> &StoppedThread {
        &self.stopped
    }

    /// Makes the process do a system call, and returns what it returned.
    ///
    /// A call that the process's seccomp filter denies returns the errno that
    /// the filter gives. One that a filter answers by killing kills the
    /// process: it is up to the caller to know which calls it allows.
    ///
    /// # Errors
    /// [`Error::CallRefused`] for calls that are not made remotely;
    /// [`Error::CallTrapped`] if a filter answered with SIGSYS;
    /// [`Error::Timeout`] if it took longer than
    /// [`call_deadline`](crate::StopOptions::call_deadline): it was
    /// interrupted, and may or may not have had its effect;
    /// [`Error::ThreadGone`], [`Error::ProcessDied`].
    pub fn syscall(&mut self, nr: libc::c_long, arguments: [u64; 6]) -> Result<Result<u64, Errno>> {
        let number = nr.cast_unsigned();
        if is_refused(nr) {
            return Err(Error::CallRefused { nr: number });
        }
        self.stand_before(number, arguments)?;
        let outcome = self.run(number, self.stopped.call_deadline());
        if let Err(Error::Timeout { .. }) = outcome {
            self.abort_call(Deadline::after(GIVING_UP))?;
        }
        match outcome? {
            returned if (-4095..0).contains(&returned) => {
                Ok(Err(Errno::from_raw(-(returned as i32))))
            }
            returned => Ok(Ok(returned.cast_unsigned())),
        }
    }

    /// Puts everything of the thread back as it was.
    ///
    /// # Errors
    /// [`Error::ThreadGone`] or [`Error::ProcessDied`] if it was killed;
    /// [`Error::Timeout`] if a call of ours still runs: it is let go of as
    /// [`crate::tracer_thread`] describes, and heals itself.
    pub fn give_back(mut self) -> Result<StoppedThread> {
        self.put_back()?;
        Ok(self.stopped)
    }

    /// Sets the registers for a call; the mask as well if they were original.
    fn stand_before(&mut self, nr: u64, arguments: [u64; 6]) -> Result<()> {
        if self.stand == Stand::Away {
            return Err(self.away());
        }
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let original = *self.registers();
        let ours = Registers {
            rax: nr,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.at(self.gadgets.syscall_ret, &original)
        };
        self.set_registers(&ours)?;
        if self.stand == Stand::Original {
            self.stand = Stand::Between;
            ptrace::set_signal_mask(self.tid(), BLOCKED)
                .map_err(|cause| self.failed("blocking signals", cause))?;
        }
        Ok(())
    }

    /// Registers of ours at `address`, from which the thread would heal.
    fn at(&self, address: Address, original: &Registers) -> Registers {
        Registers {
            rip: address.0,
            rsp: self.layout.frame.0,
            orig_rax: u64::MAX,
            eflags: original.eflags & !EFLAGS_TRAP,
            ..*original
        }
    }

    /// From the `syscall` to the end of the call; what it returned.
    fn run(&mut self, nr: u64, deadline: Deadline) -> Result<i64> {
        const OPERATION: &str = "a remote system call";
        let tid = self.tid();
        let mut entered = false;
        let mut signal = 0;
        loop {
            self.stand = Stand::Away;
            ptrace::resume_to_syscall(tid, signal)
                .map_err(|cause| self.failed(OPERATION, cause))?;
            signal = 0;
            match self.wait(deadline, OPERATION)? {
                Event::Syscall if !entered => entered = true,
                Event::Syscall => {
                    let registers =
                        ptrace::registers(tid).map_err(|cause| self.failed(OPERATION, cause))?;
                    match registers.interrupted() {
                        // Only SIGSTOP does that. The kernel starts it again.
                        Interrupted::Restarting { .. }
                        | Interrupted::RestartingFromBlock { .. } => {
                            entered = false;
                        }
                        _ if registers.rax == nr && self.sigsys_is_pending() => {
                            self.stand = Stand::Between;
                            return self.swallow_trap(nr, deadline);
                        }
                        _ => {
                            self.stand = Stand::Between;
                            return Ok(registers.rax.cast_signed());
                        }
                    }
                }
                // A group-stop begins or ends. We go on; released, the thread
                // takes part in it.
                Event::Trap | Event::GroupStop => {}
                Event::Signal(libc::SIGSYS) => {
                    if self.take_sigsys() {
                        // Syscall user dispatch: it never got to the call.
                        self.stand = Stand::Between;
                        return Err(self.trapped(nr));
                    }
                }
                Event::Signal(other) => signal = other,
                Event::Exec | Event::Exit | Event::Dead | Event::NotOurs => {
                    return Err(self.gone(OPERATION));
                }
            }
        }
    }

    /// Whether a filter's SIGSYS is on its way: the call then "returned" its
    /// own number.
    fn sigsys_is_pending(&self) -> bool {
        ptrace::pending(self.tid())
            .is_ok_and(|pending| pending.iter().any(|signal| is_trap(*signal)))
    }

    /// Lets the SIGSYS that is on its way come, and go no further.
    fn swallow_trap(&mut self, nr: u64, deadline: Deadline) -> Result<i64> {
        const OPERATION: &str = "catching a SIGSYS";
        loop {
            ptrace::resume(self.tid(), 0).map_err(|cause| self.failed(OPERATION, cause))?;
            self.stand = Stand::Away;
            match self.wait(deadline, OPERATION)? {
                Event::Signal(libc::SIGSYS) => {
                    let trap = self.take_sigsys();
                    self.stand = Stand::Between;
                    if trap {
                        return Err(self.trapped(nr));
                    }
                }
                Event::Trap | Event::GroupStop | Event::Signal(_) | Event::Syscall => {
                    self.stand = Stand::Between;
                }
                Event::Exec | Event::Exit | Event::Dead | Event::NotOurs => {
                    return Err(self.gone(OPERATION));
                }
            }
        }
    }

    /// At a SIGSYS's delivery: keeps it from the thread. True if it is a
    /// filter's answer to us; another is sent again later.
    fn take_sigsys(&mut self) -> bool {
        let trap = ptrace::signal(self.tid()).is_ok_and(is_trap);
        // Consumed, so that it is not delivered if we die.
        let _ = wait::consume_stop(self.tid());
        self.owed_sigsys |= !trap;
        trap
    }

    /// Ends a call that took too long, if it can be interrupted.
    fn abort_call(&mut self, deadline: Deadline) -> Result<()> {
        const OPERATION: &str = "giving up a remote system call";
        let tid = self.tid();
        let _ = ptrace::interrupt(tid);
        loop {
            let event = self.wait(deadline, OPERATION)?;
            match event {
                Event::Dead | Event::NotOurs | Event::Exit | Event::Exec => {
                    return Err(self.gone(OPERATION));
                }
                Event::Trap | Event::GroupStop => break,
                Event::Signal(signal) => {
                    let signal = match signal {
                        libc::SIGSYS => {
                            self.take_sigsys();
                            0
                        }
                        other => other,
                    };
                    self.go_on_and_stop(signal, OPERATION)?;
                }
                Event::Syscall => {
                    let registers =
                        ptrace::registers(tid).map_err(|cause| self.failed(OPERATION, cause))?;
                    if registers.rax.cast_signed() != -i64::from(libc::ENOSYS) {
                        break;
                    }
                    // Perhaps only at its entry: a number of none skips it.
                    let skipped = Registers {
                        orig_rax: u64::MAX,
                        ..registers
                    };
                    self.set_registers(&skipped)?;
                    self.go_on_and_stop(0, OPERATION)?;
                }
            }
        }
        self.stand = Stand::Between;
        // Past the call: nothing of it is restarted.
        let past = self.gadgets.syscall_ret.0 + 2;
        let registers = self.at(Address(past), self.registers());
        self.set_registers(&registers)
    }

    fn put_back(&mut self) -> Result<()> {
        const OPERATION: &str = "giving a borrowed thread back";
        match self.stand {
            Stand::Original => return Ok(()),
            Stand::Between => {}
            Stand::Away => return Err(self.away()),
        }
        let tid = self.tid();
        // To the kind of stop at which the registers were taken. It stands
        // inside the kernel's way back to user code, and meets the request
        // before it gets there.
        self.stand = Stand::Away;
        self.go_on_and_stop(0, OPERATION)?;
        if self.stopped.settle(OPERATION)? == Settled::Gone {
            return Err(self.gone(OPERATION));
        }
        self.stand = Stand::Between;
        ptrace::set_signal_mask(tid, self.mask)
            .map_err(|cause| self.failed("restoring the signal mask", cause))?;
        self.set_registers(self.registers())?;
        self.stand = Stand::Original;
        if std::mem::take(&mut self.owed_sigsys) {
            let pid = self.stopped.process().pid().as_raw();
            if let Err(error) = sys::proc::tgkill(pid, tid.as_raw(), libc::SIGSYS) {
                tracing::warn!(%tid, %error, "a SIGSYS was lost");
            }
        }
        Ok(())
    }

    /// Resumes it to stop again before it runs an instruction of user code.
    /// (A request made earlier may have been met by another stop.)
    fn go_on_and_stop(&self, signal: i32, operation: &'static str) -> Result<()> {
        let tid = self.tid();
        ptrace::interrupt(tid)
            .and_then(|()| ptrace::resume(tid, signal))
            .map_err(|cause| self.failed(operation, cause))
    }

    fn wait(&mut self, deadline: Deadline, operation: &'static str) -> Result<Event> {
        self.stopped.wait(deadline, operation)
    }

    fn set_registers(&self, registers: &Registers) -> Result<()> {
        ptrace::set_registers(self.tid(), registers)
            .map_err(|cause| self.failed("setting registers", cause))
    }

    fn failed(&self, operation: &'static str, cause: Errno) -> Error {
        self.stopped.failed(operation, cause)
    }

    fn gone(&self, operation: &'static str) -> Error {
        self.failed(operation, Errno::ESRCH)
    }

    fn away(&self) -> Error {
        self.gone("using a borrowed thread")
    }

    fn trapped(&self, nr: u64) -> Error {
        Error::CallTrapped {
            pid: self.stopped.process().pid(),
            nr,
        }
    }
}

fn is_trap(signal: ptrace::Signal) -> bool {
    signal.number == libc::SIGSYS && matches!(signal.code, SYS_SECCOMP | SYS_USER_DISPATCH)
}

/// Calls that would not return here, or would return twice.
fn is_refused(nr: libc::c_long) -> bool {
    matches!(
        nr,
        libc::SYS_rt_sigreturn
            | libc::SYS_clone
            | libc::SYS_fork
            | libc::SYS_vfork
            | libc::SYS_execve
            | libc::SYS_exit
            | libc::SYS_restart_syscall
            | libc::SYS_exit_group
            | libc::SYS_execveat
            | libc::SYS_clone3
    ) || nr < 0
}
