//! Hidden state of the C library, one per graft: where `strtok` is, the
//! sequences of `rand` and `drand48`, what `localtime` and `inet_ntoa` give.
//!
//! In its own worker the callee had all of that for itself; here it would take
//! it from the caller. The sequences are those of glibc (`stdlib/random_r.c`,
//! `stdlib/drand48*.c`), number for number.

use core::cell::{Cell, UnsafeCell};
use core::ffi::{c_char, c_double, c_int, c_long, c_uint, c_ushort, c_void};
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::abi::{Graft, Module};
use crate::imports::worker;

/// Words of the additive feedback generator: x³¹ + x³ + 1 (`TYPE_3`).
const DEGREE: usize = 31;
/// Distance of its two taps.
const SEPARATION: usize = 3;

/// A graft's own copy of what the C library has once per process. Zeros are
/// its state in a new process.
#[derive(Debug)]
#[repr(C)]
pub struct CLibrary {
    /// Held while a sequence or the environment changes; 0 for free.
    lock: AtomicU32,
    /// `random`: where the next number is added; meaningless until seeded.
    front: Cell<u32>,
    /// `random`: the words; `seeded` says whether they are there.
    words: UnsafeCell<[i32; DEGREE]>,
    seeded: Cell<u32>,
    /// `strtok`: where it goes on.
    token: Cell<u64>,
    /// `drand48`: the last number, 48 bits.
    x: Cell<u64>,
    /// `drand48`: multiplier and increment; 0 until they are set.
    multiplier: Cell<u64>,
    increment: Cell<u64>,
    /// What `seed48` gives.
    old: UnsafeCell<[c_ushort; 3]>,
    /// What `inet_ntoa` gives.
    address: UnsafeCell<[c_char; 18]>,
    /// What `gmtime` and `localtime` give: `struct tm`.
    broken_down: UnsafeCell<[u64; 7]>,
    /// `setenv`: the array that it made, and how many entries fit.
    pub(crate) environment: Cell<u64>,
    pub(crate) environment_room: Cell<u64>,
}

impl CLibrary {
    /// As in a new process.
    #[must_use]
    pub const fn new() -> CLibrary {
        CLibrary {
            lock: AtomicU32::new(0),
            front: Cell::new(0),
            words: UnsafeCell::new([0; DEGREE]),
            seeded: Cell::new(0),
            token: Cell::new(0),
            x: Cell::new(0),
            multiplier: Cell::new(0),
            increment: Cell::new(0),
            old: UnsafeCell::new([0; 3]),
            address: UnsafeCell::new([0; 18]),
            broken_down: UnsafeCell::new([0; 7]),
            environment: Cell::new(0),
            environment_room: Cell::new(0),
        }
    }

    /// Runs `act` while no other thread of the process does. Like the C
    /// library's own locks it is not for signal handlers.
    pub(crate) fn locked<T>(&self, act: impl FnOnce() -> T) -> T {
        let take = || {
            self.lock
                .compare_exchange_weak(0, 1, Ordering::Acquire, Ordering::Relaxed)
        };
        while take().is_err() {
            crate::sys::relax();
        }
        let result = act();
        self.lock.store(0, Ordering::Release);
        result
    }

    /// `srandom`. Under the lock.
    fn seed(&self, seed: u32) {
        // SAFETY: under the lock nobody else refers to the words.
        let words = unsafe { &mut *self.words.get() };
        // A seed of 0 would give zeros for ever.
        let mut word = if seed == 0 { 1 } else { seed.cast_signed() };
        for slot in words {
            *slot = word;
            // 16807 · word mod 2³¹ - 1, as Schrage has it.
            let (high, low) = (word / 127_773, word % 127_773);
            word = 16_807 * low - 2_836 * high;
            if word < 0 {
                word += 0x7fff_ffff;
            }
        }
        self.front.set(SEPARATION as u32);
        self.seeded.set(1);
        for _ in 0..10 * DEGREE {
            self.step();
        }
    }

    /// `random`. Under the lock.
    fn step(&self) -> u32 {
        // SAFETY: under the lock nobody else refers to the words.
        let words = unsafe { &mut *self.words.get() }.as_mut_ptr();
        let front = self.front.get() as usize;
        let rear = if front >= SEPARATION {
            front - SEPARATION
        } else {
            front + DEGREE - SEPARATION
        };
        // SAFETY: `front` is below DEGREE, and so is `rear`.
        let sum = unsafe {
            let slot = words.add(front);
            *slot = (*slot).wrapping_add(*words.add(rear));
            *slot
        };
        let next = front + 1;
        self.front.set(if next == DEGREE { 0 } else { next as u32 });
        sum.cast_unsigned() >> 1
    }

    fn random(&self) -> u32 {
        self.locked(|| {
            if self.seeded.get() == 0 {
                self.seed(1);
            }
            self.step()
        })
    }

    /// The number after `x`: x · a + c mod 2⁴⁸.
    fn after(&self, x: u64) -> u64 {
        if self.multiplier.get() == 0 && self.increment.get() == 0 {
            self.usual();
        }
        x.wrapping_mul(self.multiplier.get())
            .wrapping_add(self.increment.get())
            & MASK
    }

    fn usual(&self) {
        self.multiplier.set(0x5_deec_e66d);
        self.increment.set(0xb);
    }

    fn next(&self) -> u64 {
        self.locked(|| {
            self.x.set(self.after(self.x.get()));
            self.x.get()
        })
    }

    /// The same on a number of the callee's own.
    unsafe fn next_of(&self, x: *mut c_ushort) -> u64 {
        self.locked(|| {
            // SAFETY: the caller of `erand48` and its like passes three words.
            unsafe {
                let next = self.after(joined(x));
                split(next, x);
                next
            }
        })
    }
}

impl Default for CLibrary {
    fn default() -> CLibrary {
        CLibrary::new()
    }
}

const MASK: u64 = (1 << 48) - 1;

/// A number of 48 bits from three words, the lowest first.
unsafe fn joined(x: *const c_ushort) -> u64 {
    // SAFETY: three words, as the caller promises.
    unsafe { u64::from(*x) | u64::from(*x.add(1)) << 16 | u64::from(*x.add(2)) << 32 }
}

unsafe fn split(number: u64, x: *mut c_ushort) {
    // SAFETY: three words, as the caller promises.
    unsafe {
        *x = number as c_ushort;
        *x.add(1) = (number >> 16) as c_ushort;
        *x.add(2) = (number >> 32) as c_ushort;
    }
}

/// The graft's copy.
///
/// # Safety
/// `module` is a record of the patcher's.
pub(crate) unsafe fn of<'a>(module: *const Module) -> &'a CLibrary {
    // SAFETY: as the caller promises; the record is never unmapped.
    unsafe { &(*((*module).graft as *const Graft)).c_library }
}

fn fraction(number: u64) -> c_double {
    // Exact: 48 bits fit, and the divisor is a power of two.
    number as c_double / (1_u64 << 48) as c_double
}

fn nonnegative(number: u64) -> c_long {
    (number >> 17) as c_long
}

fn signed(number: u64) -> c_long {
    c_long::from((number >> 16) as i32)
}

/// Declares functions that images get, all of them called as the C library
/// says, with the image's record as one argument more.
macro_rules! given {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? = |$state:ident| $body:block)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// The C function's own conditions; `module` is the image's record.
            #[cfg_attr(bridge_image, unsafe(no_mangle))]
            pub unsafe extern "C" fn $name($($argument: $type,)* module: *const Module) $(-> $result)? {
                // SAFETY: as the caller promises.
                unsafe {
                    let $state = of(module);
                    $body
                }
            }
        )*
    };
}

given! {
    /// `random`.
    fn ng_random() -> c_long = |state| { c_long::from(state.random()) }
    /// `rand`.
    fn ng_rand() -> c_int = |state| { state.random().cast_signed() }
    /// `srandom`, `srand`.
    fn ng_srandom(seed: c_uint) = |state| { state.locked(|| state.seed(seed)) }
    /// `drand48`.
    fn ng_drand48() -> c_double = |state| { fraction(state.next()) }
    /// `lrand48`.
    fn ng_lrand48() -> c_long = |state| { nonnegative(state.next()) }
    /// `mrand48`.
    fn ng_mrand48() -> c_long = |state| { signed(state.next()) }
    /// `erand48`.
    fn ng_erand48(x: *mut c_ushort) -> c_double = |state| { fraction(state.next_of(x)) }
    /// `nrand48`.
    fn ng_nrand48(x: *mut c_ushort) -> c_long = |state| { nonnegative(state.next_of(x)) }
    /// `jrand48`.
    fn ng_jrand48(x: *mut c_ushort) -> c_long = |state| { signed(state.next_of(x)) }
    /// `srand48`.
    fn ng_srand48(seed: c_long) = |state| {
        state.locked(|| {
            state.x.set(u64::from(seed as u32) << 16 | 0x330e);
            state.usual();
        });
    }
    /// `seed48`.
    fn ng_seed48(seed: *const c_ushort) -> *mut c_ushort = |state| {
        state.locked(|| {
            let old = state.old.get().cast::<c_ushort>();
            let number = joined(seed);
            split(state.x.get(), old);
            state.x.set(number);
            state.usual();
            old
        })
    }
    /// `lcong48`.
    fn ng_lcong48(parameters: *const c_ushort) = |state| {
        state.locked(|| {
            state.x.set(joined(parameters));
            state.multiplier.set(joined(parameters.add(3)));
            state.increment.set(u64::from(*parameters.add(6)));
        });
    }
    /// `strtok`.
    fn ng_strtok(text: *mut c_char, delimiters: *const c_char) -> *mut c_char = |state| {
        let mut at = if text.is_null() { state.token.get() as *mut c_char } else { text };
        if at.is_null() {
            return ptr::null_mut();
        }
        while *at != 0 && is_one_of(*at, delimiters) {
            at = at.add(1);
        }
        let token = at;
        while *at != 0 && !is_one_of(*at, delimiters) {
            at = at.add(1);
        }
        let ended = *at == 0;
        if !ended {
            *at = 0;
            at = at.add(1);
        }
        state.token.set(at as u64);
        if ended && at == token { ptr::null_mut() } else { token }
    }
    /// `gmtime`.
    fn ng_gmtime(time: *const i64) -> *mut c_void = |state| {
        worker().gmtime_r(time, state.broken_down.get().cast())
    }
    /// `localtime`: unlike `localtime_r` it looks at `TZ` each time.
    fn ng_localtime(time: *const i64) -> *mut c_void = |state| {
        let worker = worker();
        worker.tzset();
        worker.localtime_r(time, state.broken_down.get().cast())
    }
    /// `inet_ntoa`: the address is in network order, a byte after the other.
    fn ng_inet_ntoa(address: u32) -> *const c_char = |state| {
        let mut out = state.address.get().cast::<c_char>();
        let mut left = address;
        for part in 0..4 {
            let byte = left & 0xff;
            left >>= 8;
            for (unit, least) in [(100, 100), (10, 10), (1, 0)] {
                if byte >= least {
                    *out = (b'0' + (byte / unit % 10) as u8) as c_char;
                    out = out.add(1);
                }
            }
            *out = if part == 3 { 0 } else { b'.' as c_char };
            out = out.add(1);
        }
        state.address.get().cast_const().cast()
    }
}

unsafe fn is_one_of(c: c_char, set: *const c_char) -> bool {
    let mut at = set;
    // SAFETY: the set ends in NUL.
    unsafe {
        while *at != 0 {
            if *at == c {
                return true;
            }
            at = at.add(1);
        }
    }
    false
}
