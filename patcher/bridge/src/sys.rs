//! The few instructions and system calls that have no name in Rust.

use core::arch::asm;

use crate::abi::Action;

/// `mmap` of `len` private, zeroed, read-write bytes.
pub(crate) fn map(len: usize) -> Option<*mut u8> {
    let result: isize;
    // SAFETY: a new anonymous mapping without MAP_FIXED touches nothing that
    // exists; the kernel clobbers only rax, rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 9_isize => result, // mmap
            in("rdi") 0_usize,
            in("rsi") len,
            in("rdx") 3_usize,    // PROT_READ | PROT_WRITE
            in("r10") 0x22_usize, // MAP_PRIVATE | MAP_ANONYMOUS
            in("r8") -1_isize,
            in("r9") 0_usize,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    (result > 0).then_some(result as *mut u8)
}

/// `munmap`.
///
/// # Safety
/// The range was given by [`map`] and nothing refers to it any more.
pub(crate) unsafe fn unmap(start: *mut u8, len: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 11_isize => _, // munmap
            in("rdi") start,
            in("rsi") len,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
}

/// `mremap` with `MREMAP_MAYMOVE`.
///
/// # Safety
/// The range was given by [`map`] or this, and everything that refers to it
/// is corrected.
pub(crate) unsafe fn remap(start: *mut u8, len: usize, new_len: usize) -> Option<*mut u8> {
    let result: isize;
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 25_isize => result, // mremap
            in("rdi") start,
            in("rsi") len,
            in("rdx") new_len,
            in("r10") 1_usize, // MREMAP_MAYMOVE
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    (result > 0).then_some(result as *mut u8)
}

/// `mprotect(start, len, PROT_READ)`; gives 0 or an errno.
///
/// # Safety
/// Nothing writes to the range from here on.
pub(crate) unsafe fn seal(start: u64, len: u64) -> i32 {
    let result: isize;
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 10_isize => result, // mprotect
            in("rdi") start,
            in("rsi") len,
            in("rdx") 1_usize, // PROT_READ
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    -result as i32
}

/// A system call of up to four arguments: its result, negative for an errno.
///
/// # Safety
/// The call's own conditions; it does not touch the stack.
unsafe fn call(number: isize, arguments: [u64; 4]) -> isize {
    let [first, second, third, fourth] = arguments;
    let result: isize;
    // SAFETY: as the caller promises; the kernel clobbers only rax, rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            in("r10") fourth,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// `getpid`.
pub(crate) fn process() -> u32 {
    // SAFETY: touches nothing.
    unsafe { call(39, [0; 4]) as u32 }
}

/// `gettid`.
fn thread() -> u32 {
    // SAFETY: touches nothing.
    unsafe { call(186, [0; 4]) as u32 }
}

/// `rt_sigaction`; whether it was done.
pub(crate) fn action(signal: u32, new: Option<&Action>, old: Option<&Action>) -> bool {
    let address = |action: Option<&Action>| action.map_or(0, |a| core::ptr::from_ref(a) as u64);
    let arguments = [u64::from(signal), address(new), address(old), 8];
    // SAFETY: actions are as the kernel has them, in cells.
    unsafe { call(13, arguments) == 0 }
}

/// Gives this thread an alternate stack for signals, unless it has one
/// (`sigaltstack`); whether it has one then.
///
/// # Safety
/// The range is the thread's from here on.
pub(crate) unsafe fn alternate_stack(start: u64, len: u64) -> bool {
    const DISABLED: u64 = 2; // SS_DISABLE
    let mut now = [0_u64; 3];
    let new = [start, 0, len];
    // SAFETY: `stack_t` is an address, flags and a length.
    unsafe {
        call(131, [0, now.as_mut_ptr() as u64, 0, 0]) == 0
            && (now[1] & DISABLED == 0 || call(131, [new.as_ptr() as u64, 0, 0, 0]) == 0)
    }
}

/// No alternate stack, as [`exchange_alternate_stack`] takes it.
pub(crate) const NO_STACK: [u64; 3] = [0, 2, 0];

/// `sigaltstack`; whether it was done.
///
/// # Safety
/// The new one is the thread's to use.
pub(crate) unsafe fn exchange_alternate_stack(new: &[u64; 3], old: &mut [u64; 3]) -> bool {
    // SAFETY: `stack_t` is an address, flags and a length.
    unsafe { call(131, [new.as_ptr() as u64, old.as_mut_ptr() as u64, 0, 0]) == 0 }
}

/// `rt_sigprocmask(SIG_BLOCK)`.
pub(crate) fn block(mask: u64) {
    // SAFETY: reads the mask.
    unsafe { call(14, [0, &raw const mask as u64, 0, 8]) };
}

/// `rt_sigprocmask(SIG_UNBLOCK)`.
pub(crate) fn unblock(mask: u64) {
    // SAFETY: as above.
    unsafe { call(14, [1, &raw const mask as u64, 0, 8]) };
}

/// `mprotect(start, len, PROT_NONE)`.
///
/// # Safety
/// Nothing touches the range from here on.
pub(crate) unsafe fn forbid(start: u64, len: u64) {
    // SAFETY: as the caller promises.
    unsafe { call(10, [start, len, 0, 0]) };
}

/// Sends a signal to this thread with what came with it
/// (`rt_tgsigqueueinfo`); whether it was sent.
///
/// # Safety
/// `info` is a `siginfo_t`.
pub(crate) unsafe fn send_again(signal: u32, info: *const u8) -> bool {
    let (process, thread) = (u64::from(process()), u64::from(thread()));
    // SAFETY: as the caller promises.
    unsafe { call(297, [process, thread, u64::from(signal), info as u64]) == 0 }
}

/// Sends a signal to this thread (`tgkill`).
pub(crate) fn send(signal: u32) {
    let (process, thread) = (u64::from(process()), u64::from(thread()));
    // SAFETY: touches nothing.
    unsafe { call(234, [process, thread, u64::from(signal), 0]) };
}

/// `sched_yield`.
pub(crate) fn relax() {
    // SAFETY: touches no memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 24_isize => _, // sched_yield
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
}

/// The thread pointer: the C library keeps a pointer to the thread control
/// block at its own start (System V ABI, x86-64 TLS variant II).
#[inline(always)]
pub(crate) fn thread_pointer() -> u64 {
    let tp: u64;
    // SAFETY: reads the word that the TLS ABI guarantees.
    unsafe {
        asm!("mov {}, fs:[0]", out(reg) tp, options(nostack, readonly, preserves_flags, pure));
    };
    tp
}

/// Time-stamp counter, in cycles.
#[inline(always)]
pub(crate) fn cycles() -> u64 {
    // SAFETY: RDTSC is unprivileged unless prctl(PR_SET_TSC) forbids it,
    // which would fault the worker's own C library as well.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Floating-point modes of a new process (System V ABI, x86-64: register
/// conventions): MXCSR, and in the upper half the x87 control word.
pub(crate) const DEFAULT_MODES: u64 = 0x1f80 | 0x37f << 32;
/// What is no mode: MXCSR's sticky exception flags, volatile across calls.
pub(crate) const EXCEPTION_FLAGS: u64 = 0x3f;

/// Floating-point modes of this thread, as [`DEFAULT_MODES`]; `fixed` says
/// that MXCSR has the default ones for sure.
#[inline(always)]
pub(crate) fn modes(fixed: bool) -> u64 {
    let mut mxcsr = DEFAULT_MODES as u32;
    let mut fpucw = 0_u16;
    // SAFETY: each only stores into the local.
    unsafe {
        if !fixed {
            asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags));
        }
        asm!("fnstcw [{}]", in(reg) &raw mut fpucw, options(nostack, preserves_flags));
    }
    u64::from(mxcsr) | u64::from(fpucw) << 32
}

/// Sets the floating-point modes of this thread.
pub(crate) fn set_modes(modes: u64) {
    let (mxcsr, fpucw) = (modes as u32, (modes >> 32) as u16);
    // SAFETY: callers pass values that were read from a thread, or the
    // defaults: no reserved bit is set.
    unsafe {
        asm!("ldmxcsr [{}]", "fldcw [{}]", in(reg) &raw const mxcsr, in(reg) &raw const fpucw, options(nostack, preserves_flags, readonly));
    }
}

/// Whether two are different modes.
#[inline(always)]
pub(crate) fn differ(a: u64, b: u64) -> bool {
    (a ^ b) & !EXCEPTION_FLAGS != 0
}

/// State components that code called by a TLS descriptor may change: x87,
/// SSE, AVX, MPX, AVX-512 and the extended general registers (Intel SDM,
/// volume 1, chapter 13). Not AMX: no C library code uses its tiles.
pub(crate) const XSAVE_COMPONENTS: u32 = 0x8_00ff;

/// Bytes of an XSAVE area (standard form) for [`XSAVE_COMPONENTS`]; 0 if there
/// is no XSAVE.
pub(crate) fn xsave_len() -> u64 {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    // OSXSAVE: the system has enabled it.
    if __cpuid(1).ecx & 1 << 27 == 0 {
        return 0;
    }
    // The legacy area and the header.
    let mut len = 512 + 64;
    let enabled = __cpuid_count(0xd, 0).eax & XSAVE_COMPONENTS;
    let mut component = 2;
    while component < 32 {
        if enabled & 1 << component != 0 {
            let place = __cpuid_count(0xd, component);
            len = len.max(u64::from(place.eax) + u64::from(place.ebx));
        }
        component += 1;
    }
    len
}

/// Ends the process (SIGILL): what was promised can't be kept.
#[cold]
pub(crate) fn stop() -> ! {
    // SAFETY: no instruction comes after it.
    unsafe { asm!("ud2", options(noreturn, nomem, nostack)) }
}
