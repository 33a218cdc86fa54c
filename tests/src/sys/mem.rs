//! Mapped memory that is unmapped when it is dropped.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::{self, NonNull};

use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A mapping that this process owns. An empty one has no address.
///
/// A function library holds plain pointers into it, for as long as the
/// contract lets it; whoever drops a `Region` ends that time, and a library
/// that reads on is answered by a SIGSEGV.
#[derive(Debug)]
pub struct Region {
    base: Option<NonNull<c_void>>,
    len: usize,
}

// SAFETY: a Region is an address and a length. It has no tie to the thread
// that mapped it, and its shared methods only read.
unsafe impl Send for Region {}
// SAFETY: as above; no method changes anything through a shared reference.
unsafe impl Sync for Region {}

impl Region {
    /// Maps all of a file, shared and read-only.
    pub fn of_file(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let Some(size) = NonZeroUsize::new(len) else {
            return Ok(Self { base: None, len: 0 });
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches
        // nothing that exists.
        let base = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                file,
                0,
            )
        }?;
        Ok(Self {
            base: Some(base),
            len,
        })
    }

    /// Maps `len` bytes of zeros, private and writable.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: as in `of_file`.
        let base = unsafe { mmap_anonymous(None, size, prot, MapFlags::MAP_PRIVATE) }?;
        Ok(Self {
            base: Some(base),
            len,
        })
    }

    /// Where it begins; null if it is empty.
    pub fn as_ptr(&self) -> *const u8 {
        self.base
            .map_or(ptr::null(), |b| b.as_ptr().cast_const().cast())
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its bytes. Another process that writes the file at the same time would
    /// be seen; on this node a payload is complete before it is announced.
    pub fn as_slice(&self) -> &[u8] {
        match self.base {
            None => &[],
            // SAFETY: `base` is a live mapping of `len` readable bytes until
            // self is dropped, which the borrow prevents.
            Some(b) => unsafe { std::slice::from_raw_parts(b.as_ptr().cast(), self.len) },
        }
    }

    /// Copies `data` to `offset`. Must be a region made by [`Region::zeroed`].
    ///
    /// # Panics
    /// If there is not that much room.
    pub fn fill(&mut self, offset: usize, data: &[u8]) {
        let fits = offset
            .checked_add(data.len())
            .is_some_and(|end| end <= self.len);
        assert!(fits, "{} bytes at {offset} of {}", data.len(), self.len);
        if let Some(b) = self.base {
            // SAFETY: the mapping has at least data.len() bytes from `offset`
            // on, checked above; it cannot overlap `data`, which no one could
            // have borrowed from it while we hold it exclusively. A function
            // library may still have a pointer into it, but may not use it.
            unsafe {
                ptr::copy_nonoverlapping(
                    data.as_ptr(),
                    b.as_ptr().cast::<u8>().add(offset),
                    data.len(),
                );
            }
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some(b) = self.base {
            // SAFETY: it is our own mapping, and nothing borrows it any more.
            if let Err(e) = unsafe { munmap(b, self.len) } {
                eprintln!("munmap of {} bytes at {b:p}: {e}", self.len);
            }
        }
    }
}
