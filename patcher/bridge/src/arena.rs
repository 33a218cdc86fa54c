//! Where the outputs of fused calls live until the caller's outermost
//! `faas_func_call` is over.
//!
//! A bump allocator over chunks that `mmap` gave. An output grows in place
//! while it is the last thing in its chunk; a chunk that holds nothing else
//! grows with it (`mremap`), else the output moves to a chunk of its own. Every output starts on a 64-byte boundary and has a NUL behind it:
//! in nightcore outputs are parts of zero-filled messages or of pages, and
//! careless functions live on that.
//!
//! At the next outermost entry everything is dropped. What one outermost call
//! took is taken at once by the next one, in one chunk that is kept (up to
//! [`KEEP`] bytes): a steady load maps nothing.

use core::cell::Cell;

use crate::sys;

/// Size of the first chunk, in bytes.
const FIRST: usize = 64 * 1024;
/// The largest chunk that outlives a reset, in bytes.
pub const KEEP: usize = 16 << 20;
/// Alignment of outputs, in bytes.
pub const ALIGN: usize = 64;

/// The arena's state; all zero is an empty one.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Arena {
    /// Newest chunk, 0 for none. A chunk begins with a [`Chunk`].
    chunk: Cell<u64>,
    /// Next free address in the newest chunk.
    next: Cell<u64>,
    /// End of the newest chunk.
    end: Cell<u64>,
    /// Bytes mapped.
    mapped: Cell<u64>,
    /// What the last outermost call had mapped when it was over.
    last: Cell<u64>,
}

#[repr(C, align(64))]
struct Chunk {
    older: u64,
    len: u64,
}

impl Arena {
    /// Bytes mapped now.
    pub fn mapped(&self) -> u64 {
        self.mapped.get()
    }

    /// Makes room for `more` bytes (and a NUL) behind the `len` bytes at
    /// `out` (0: a new output). Gives the output's first byte, which is
    /// another one if it had to move; `None` if the kernel has no memory. What
    /// an output needs is not known before the callee runs, and then there is
    /// no way back to the RPC: so the arena itself knows no limit, and calls
    /// are not started while it holds much.
    ///
    /// # Safety
    /// `out` is 0 or came from this arena since its last reset, with `len`
    /// bytes in use, and no two threads use the arena.
    #[inline]
    pub unsafe fn grow(&self, out: u64, len: u64, more: u64) -> Option<u64> {
        let next = self.next.get();
        if out == 0 {
            // Aligned here, not at the end of the output before: a nested
            // call may begin one while another is still open.
            let start = align(next);
            if start <= self.end.get() && more < self.end.get() - start {
                self.next.set(start + more + 1);
                return Some(start);
            }
        } else if out + len + 1 == next && more <= self.end.get() - next {
            self.next.set(next + more);
            return Some(out);
        }
        // SAFETY: as the caller promises.
        unsafe { self.grow_cold(out, len, more) }
    }

    #[cold]
    #[inline(never)]
    unsafe fn grow_cold(&self, out: u64, len: u64, more: u64) -> Option<u64> {
        let need = len.checked_add(more)?.checked_add(1)?;
        if out != 0 {
            // It may sit behind a later output with room left in the chunk.
            let start = align(self.next.get());
            if start <= self.end.get() && need <= self.end.get() - start {
                self.next.set(start + need);
                // SAFETY: `start` has `need` free bytes, `out` has `len`.
                unsafe { copy(start, out, len) };
                return Some(start);
            }
        }
        let header = size_of::<Chunk>() as u64;
        let size = self.end.get() - self.chunk.get();
        if out != 0 && out == self.chunk.get() + header && out + len + 1 == self.next.get() {
            // Nothing else is in this chunk. Twice the size, so that many
            // appends cost amortised constant time; what is really needed
            // where that is too much.
            let exact = need.checked_add(header)?.checked_next_multiple_of(4096)?;
            for larger in [exact.checked_mul(2)?.max(size), exact] {
                // SAFETY: the chunk is ours; what refers to it is set below.
                let moved = unsafe {
                    sys::remap(self.chunk.get() as *mut u8, size as usize, larger as usize)
                };
                if let Some(chunk) = moved {
                    let chunk = chunk as u64;
                    // SAFETY: the chunk begins with its header.
                    unsafe { (*(chunk as *mut Chunk)).len = larger };
                    self.mapped.set(self.mapped.get() + larger - size);
                    self.chunk.set(chunk);
                    self.end.set(chunk + larger);
                    self.next.set(chunk + header + need);
                    return Some(chunk + header);
                }
            }
            return None;
        }
        let want = if out == 0 { need } else { need.checked_mul(2)? };
        let floor = if self.chunk.get() == 0 {
            (FIRST as u64).max(self.last.get())
        } else {
            size.min(1 << 20) * 2
        };
        let size = want
            .checked_add(header)?
            .max(floor)
            .checked_next_multiple_of(4096)?;
        let chunk = sys::map(usize::try_from(size).ok()?)? as u64;
        self.mapped.set(self.mapped.get() + size);
        // SAFETY: the mapping is new, writable and at least a header long.
        unsafe {
            (chunk as *mut Chunk).write(Chunk {
                older: self.chunk.get(),
                len: size,
            });
        }
        let start = chunk + header;
        self.chunk.set(chunk);
        self.end.set(chunk + size);
        self.next.set(start + need);
        if out != 0 {
            // SAFETY: `start` has `need` free bytes, `out` has `len`.
            unsafe { copy(start, out, len) };
        }
        Some(start)
    }

    /// Drops every output.
    ///
    /// # Safety
    /// Nobody reads an output any more.
    pub unsafe fn reset(&self) {
        let mut keep = 0_u64;
        let mut keep_len = 0_u64;
        let newest = self.chunk.get();
        let mut chunk = newest;
        while chunk != 0 {
            // SAFETY: chunks are linked by `grow_cold` alone.
            let Chunk { older, len } = unsafe { (chunk as *const Chunk).read() };
            if chunk == newest && older == 0 && len <= KEEP as u64 {
                (keep, keep_len) = (chunk, len);
            } else {
                // SAFETY: a chunk of ours whose outputs are dropped.
                unsafe { sys::unmap(chunk as *mut u8, len as usize) };
            }
            chunk = older;
        }
        self.last.set(self.mapped.get().min(KEEP as u64));
        self.chunk.set(keep);
        self.mapped.set(keep_len);
        if keep == 0 {
            self.next.set(0);
            self.end.set(0);
        } else {
            // SAFETY: the kept chunk is ours.
            unsafe { (*(keep as *mut Chunk)).older = 0 };
            self.next.set(keep + size_of::<Chunk>() as u64);
            self.end.set(keep + keep_len);
        }
    }
}

fn align(address: u64) -> u64 {
    (address + (ALIGN as u64 - 1)) & !(ALIGN as u64 - 1)
}

unsafe fn copy(to: u64, from: u64, len: u64) {
    // SAFETY: as the callers promise; the ranges are distinct allocations.
    unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len as usize) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(arena: &Arena, out: &mut (u64, u64), bytes: &[u8]) {
        // SAFETY: one thread, and `out` is what the arena gave.
        unsafe {
            let start = arena.grow(out.0, out.1, bytes.len() as u64).expect("room");
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (start + out.1) as *mut u8, bytes.len());
            *out = (start, out.1 + bytes.len() as u64);
        }
    }

    fn read(out: (u64, u64)) -> Vec<u8> {
        // SAFETY: the arena was not reset since.
        unsafe { std::slice::from_raw_parts(out.0 as *const u8, out.1 as usize) }.to_vec()
    }

    #[test]
    fn outputs_stay_apart_aligned_and_whole_while_they_grow() {
        let arena = Arena::default();
        let mut outs = Vec::new();
        for i in 0..200_usize {
            let mut out = (0, 0);
            let mut expected = Vec::new();
            for j in 0..(i % 7) + 1 {
                let piece = vec![(i * 31 + j) as u8; (i * 37 * (j + 1)) % 5000];
                append(&arena, &mut out, &piece);
                expected.extend(piece);
            }
            assert_eq!(out.0 % ALIGN as u64, 0);
            outs.push((out, expected));
        }
        for (out, expected) in &outs {
            assert_eq!(&read(*out), expected);
        }
        let before = arena.mapped();
        // SAFETY: `outs` is not read after this.
        unsafe { arena.reset() };
        assert_eq!(arena.mapped(), 0, "several chunks are given back");
        let mut out = (0, 0);
        append(&arena, &mut out, b"next");
        assert_eq!(arena.mapped(), before, "and taken at once the next time");
        // SAFETY: `out` is not read after this.
        unsafe { arena.reset() };
        assert_eq!(arena.mapped(), before, "one chunk is kept");
    }

    #[test]
    fn two_outputs_that_grow_in_turn_move_and_keep_their_bytes() {
        let arena = Arena::default();
        let (mut a, mut b) = ((0, 0), (0, 0));
        for i in 0..100_u8 {
            append(&arena, &mut a, &[i; 1000]);
            append(&arena, &mut b, &[!i; 900]);
        }
        assert!(read(a).chunks(1000).zip(0..).all(|(c, i)| c == [i; 1000]));
        assert!(read(b).chunks(900).zip(0..).all(|(c, i)| c == [!i; 900]));
    }

    #[test]
    fn a_large_output_is_given_back_at_the_reset() {
        let arena = Arena::default();
        let mut out = (0, 0);
        append(&arena, &mut out, &vec![7; 20 << 20]);
        assert!(arena.mapped() >= 20 << 20);
        // SAFETY: `out` is not read after this.
        unsafe { arena.reset() };
        assert!(arena.mapped() <= KEEP as u64);
        let mut out = (0, 0);
        append(&arena, &mut out, b"again");
        assert_eq!(read(out), b"again");
    }

    #[test]
    fn one_output_that_grows_is_alone_in_what_it_takes() {
        let arena = Arena::default();
        let mut small = (0, 0);
        append(&arena, &mut small, b"before");
        let mut out = (0, 0);
        let piece = vec![3; 4096];
        for _ in 0..16 << 10 {
            append(&arena, &mut out, &piece);
        }
        assert_eq!(read(small), b"before");
        assert!(read(out).iter().all(|b| *b == 3));
        assert!(
            arena.mapped() <= 160 << 20,
            "{} bytes for an output of 64 MiB",
            arena.mapped()
        );
    }

    #[test]
    fn what_the_kernel_does_not_give_is_refused_and_harms_nothing() {
        let arena = Arena::default();
        let mut out = (0, 0);
        append(&arena, &mut out, b"kept");
        // SAFETY: one thread, and `out` is what the arena gave.
        unsafe {
            assert_eq!(arena.grow(0, 0, u64::MAX), None);
            assert_eq!(arena.grow(out.0, out.1, 1 << 60), None);
        }
        assert_eq!(read(out), b"kept");
    }
}
