//! Inputs, as a callee finds them in nightcore.

use core::arch::x86_64::__m128i;

use crate::abi::{Graft, INLINE_INPUT, Worker};
use crate::{arena, sys};

/// `memcpy`.
type Memcpy = unsafe extern "C" fn(*mut u8, *const u8, usize) -> *mut u8;

/// Copies the input to where it is aligned and followed by zeros, as in
/// nightcore's messages and shared-memory files: careless functions live on
/// that. `None` if there is no memory for it.
#[inline(always)]
pub(crate) unsafe fn hand_over(graft: &Graft, input: u64, len: u64) -> Option<u64> {
    if len > INLINE_INPUT as u64 {
        // SAFETY: as the caller promises.
        return unsafe { hand_over_large(graft, input, len) };
    }
    let scratch = graft.scratch.0.get().cast::<u8>();
    // SAFETY: the scratch is larger than INLINE_INPUT, the graft is not busy,
    // and the caller vouches for `len` bytes at `input`.
    unsafe {
        copy(scratch, input as *const u8, len as usize, graft);
        let used = graft.scratch_used.get();
        if u64::from(used) > len {
            core::ptr::write_bytes(
                scratch.add(len as usize),
                0,
                (u64::from(used) - len) as usize,
            );
        }
    }
    graft.scratch_used.set(len as u32);
    Some(scratch as u64)
}

/// The same for what is no inline message: page-aligned, and zero up to the
/// end of a page at least.
#[inline(never)]
unsafe fn hand_over_large(graft: &Graft, input: u64, len: u64) -> Option<u64> {
    const PAGE: u64 = 4096;
    let need = len.checked_add(1)?.checked_next_multiple_of(PAGE)?;
    // SAFETY: the block is the graft's own, and the graft is not busy.
    unsafe {
        let excess = graft.large_len.get() > arena::KEEP as u64 && need <= arena::KEEP as u64;
        if need > graft.large_len.get() || excess {
            let block = sys::map(usize::try_from(need).ok()?)?;
            if graft.large_len.get() != 0 {
                sys::unmap(graft.large.get() as *mut u8, graft.large_len.get() as usize);
            }
            graft.large.set(block as u64);
            graft.large_len.set(need);
            graft.large_used.set(0);
        }
        let block = graft.large.get() as *mut u8;
        copy(block, input as *const u8, len as usize, graft);
        let dirty = graft.large_used.get().min(need);
        if dirty > len {
            core::ptr::write_bytes(block.add(len as usize), 0, (dirty - len) as usize);
        }
        if graft.large_used.get() <= need {
            graft.large_used.set(len);
        }
        Some(block as u64)
    }
}

/// Copies short runs inline, longer ones by the C library.
#[inline(always)]
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, len: usize, graft: &Graft) {
    // SAFETY: the callers own `len` bytes at `to` and may read them at `from`;
    // the unaligned overlapping loads stay inside both.
    unsafe {
        // As wide as the copy allows: who reads it next, and likely as wide,
        // would wait for two narrow stores to reach the cache.
        if len >= 16 {
            if len <= 64 {
                let head = from.cast::<__m128i>().read_unaligned();
                let tail = from.add(len - 16).cast::<__m128i>().read_unaligned();
                if len > 32 {
                    let second = from.add(16).cast::<__m128i>().read_unaligned();
                    let third = from.add(len - 32).cast::<__m128i>().read_unaligned();
                    to.add(16).cast::<__m128i>().write_unaligned(second);
                    to.add(len - 32).cast::<__m128i>().write_unaligned(third);
                }
                to.cast::<__m128i>().write_unaligned(head);
                to.add(len - 16).cast::<__m128i>().write_unaligned(tail);
            } else {
                let memcpy: Memcpy =
                    core::mem::transmute((*(graft.worker as *const Worker)).memcpy.get() as usize);
                memcpy(to, from, len);
            }
        } else if len >= 8 {
            let head = from.cast::<u64>().read_unaligned();
            let tail = from.add(len - 8).cast::<u64>().read_unaligned();
            to.cast::<u64>().write_unaligned(head);
            to.add(len - 8).cast::<u64>().write_unaligned(tail);
        } else if len >= 4 {
            let head = from.cast::<u32>().read_unaligned();
            let tail = from.add(len - 4).cast::<u32>().read_unaligned();
            to.cast::<u32>().write_unaligned(head);
            to.add(len - 4).cast::<u32>().write_unaligned(tail);
        } else if len != 0 {
            let (first, middle, last) = (*from, *from.add(len / 2), *from.add(len - 1));
            *to = first;
            *to.add(len / 2) = middle;
            *to.add(len - 1) = last;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: `copy` passes its own promise on.
        unsafe { core::ptr::copy_nonoverlapping(from, to, len) };
        to
    }

    /// A graft and its worker, all zero but for `memcpy`.
    fn graft() -> (Box<Graft>, Box<Worker>) {
        // SAFETY: every field is an integer, a cell or an array of them.
        let (mut graft, worker): (Box<Graft>, Box<Worker>) =
            unsafe { (Box::new(core::mem::zeroed()), Box::new(core::mem::zeroed())) };
        worker.memcpy.set(memcpy as *const () as u64);
        graft.worker = core::ptr::from_ref(&*worker) as u64;
        (graft, worker)
    }

    #[test]
    fn copies_of_every_length_are_exact() {
        let (graft, _worker) = graft();
        let from: Vec<u8> = (0..300_u32).map(|i| (i * 7 + 1) as u8).collect();
        for len in 0..from.len() {
            let mut to = vec![0xee; len + 32];
            // SAFETY: both are long enough.
            unsafe { copy(to.as_mut_ptr().add(16), from.as_ptr(), len, &graft) };
            assert_eq!(to[16..16 + len], from[..len], "{len} bytes");
            assert!(
                to[..16].iter().chain(&to[16 + len..]).all(|b| *b == 0xee),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn inputs_are_handed_over_aligned_and_followed_by_zeros() {
        let (graft, _worker) = graft();
        let text: Vec<u8> = (0..20_001_u32).map(|i| (i % 255 + 1) as u8).collect();
        // Long and short in turn: nothing of an earlier one may show behind.
        for len in [
            500, 3, 960, 0, 961, 20_000, 5_000, 4_096, 962, 40, 8_191, 1_000,
        ] {
            // SAFETY: the graft is not busy, the input lives.
            let at = unsafe { hand_over(&graft, text[1..].as_ptr() as u64, len as u64) };
            let at = at.expect("there is memory");
            let page_end =
                (len + 1_usize).next_multiple_of(if len > INLINE_INPUT { 4096 } else { 64 });
            // SAFETY: the block is longer than its page's or line's end.
            let got = unsafe {
                core::slice::from_raw_parts(at as *const u8, page_end.min(len + 1 + 4096))
            };
            assert_eq!(at % 64, 0);
            assert_eq!(got[..len], text[1..=len]);
            assert!(
                got[len..].iter().all(|b| *b == 0),
                "{len} bytes are not followed by zeros"
            );
        }
    }
}
