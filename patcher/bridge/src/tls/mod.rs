//! Thread-local storage of images.
//!
//! The dynamic linker knows nothing of our images, so their `__tls_get_addr`
//! and their TLS descriptors are ours. A thread has one table of blocks per
//! graft, the value of the graft's thread key; tables and blocks come with
//! their first use.
//!
//! ```text
//!  TlsIndex { module, offset }
//!    module < 2^32 ──────► the dynamic linker's own __tls_get_addr
//!    module = TLS_STATIC ► thread pointer + offset
//!    module = a Module ──► worker's thread: Module::home_block
//!                          else: key ─► Table ─► block
//!                          + offset
//! ```
//!
//! What the initialisers' thread had is adopted by the worker's thread
//! ([`crate::legacy`]). All its blocks are made before the first initialiser,
//! so a request never fails for want of memory for one. On another thread
//! there is no way to report that: as glibc does, the process ends (`ud2`).
//!
//! **A thread's end.** C++ destructors of thread-local objects run before
//! thread keys' destructors do, so they find their blocks. Destructors of
//! other keys may still use thread-local variables; the C library runs keys'
//! destructors up to four times over while some set their value again. A
//! table sets its own again for two rounds and goes in the third; what is made
//! after that goes in the fourth.

mod entry;

use core::ffi::c_void;

use crate::abi::{FAILURE_THREAD_KEY, Graft, Module, TLS_STATIC, TlsIndex, Worker};
pub use entry::{ng_tls_get_addr, ng_tlsdesc_dynamic, ng_tlsdesc_static, ng_tlsdesc_undefweak};

use crate::{imports, sys};

/// What a thread has of one graft; [`Graft::tls_count`] entries of blocks
/// follow.
#[repr(C)]
pub(crate) struct Table {
    graft: u64,
    /// Rounds of destruction that it has seen.
    round: u64,
    /// What `dlerror` gives next, 0 for nothing.
    pub(crate) error: u64,
    /// Memory of the last such text, 0 for none.
    pub(crate) error_text: u64,
}

/// An entry of a [`Table`].
#[repr(C)]
struct Block {
    /// Its first byte, 0 for none.
    start: u64,
    /// What `malloc` gave for it.
    allocation: u64,
}

/// The round in which a table goes.
const LAST_ROUND: u64 = 3;
/// The key's value once a thread's table is gone: one that is made now goes
/// in the next round.
const GONE: u64 = 1;

impl Table {
    unsafe fn block(&mut self, index: u64) -> *mut Block {
        // SAFETY: entries follow the header; the patcher's indices are in
        // range.
        unsafe {
            core::ptr::from_mut(self)
                .add(1)
                .cast::<Block>()
                .add(index as usize)
        }
    }
}

/// Address of the variable, whatever its index says.
pub(crate) unsafe extern "C" fn resolve(index: *const TlsIndex) -> *mut u8 {
    // SAFETY: the patcher filled the index in: it is one of the three kinds.
    unsafe {
        let TlsIndex { module, offset } = *index;
        if module & TLS_STATIC != 0 {
            return sys::thread_pointer().wrapping_add(offset) as *mut u8;
        }
        if module >> 32 == 0 {
            return imports::worker().tls_get_addr(index);
        }
        let module = &*(module as *const Module);
        match block(module) {
            Some(block) => block.wrapping_add(offset) as *mut u8,
            // No caller of a variable expects that there is none.
            None => sys::stop(),
        }
    }
}

/// The module's block on this thread, made if it is not there; `None` if there
/// is no memory for it.
///
/// # Safety
/// The graft has its key, and the module has thread-local storage.
pub(crate) unsafe fn block(module: &Module) -> Option<u64> {
    // SAFETY: as the caller promises; values of the key are ours alone.
    unsafe {
        let graft = &*(module.graft as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        let key = graft.tls_key.get().wrapping_sub(1) as u32;
        let table = worker.pthread_getspecific(key);
        if table > GONE {
            let start = (*(*(table as *mut Table)).block(module.tls.index)).start;
            if start != 0 {
                return Some(start);
            }
        }
        make(graft, worker, module, key)
    }
}

/// This thread's table, made if it is not there; `None` if there is no memory
/// for it.
unsafe fn table(graft: &Graft, worker: &Worker, key: u32) -> Option<*mut Table> {
    // SAFETY: as for `block`; what `malloc` gave is ours. A signal handler may
    // come in between and make the same: what is there then stays.
    unsafe {
        let before = worker.pthread_getspecific(key);
        if before > GONE {
            return Some(before as *mut Table);
        }
        let len = size_of::<Table>() + graft.tls_count as usize * size_of::<Block>();
        let new = worker.malloc(len);
        if new.is_null() {
            return None;
        }
        new.write_bytes(0, len);
        let table = new.cast::<Table>();
        (*table).graft = core::ptr::from_ref(graft) as u64;
        (*table).round = if before == GONE { LAST_ROUND } else { 0 };
        let now = worker.pthread_getspecific(key);
        if now > GONE {
            worker.free(new);
            return Some(now as *mut Table);
        }
        if worker.pthread_setspecific(key, new as u64) != 0 {
            worker.free(new);
            return None;
        }
        Some(table)
    }
}

/// This thread's table, for `dlerror`'s part in it. With `make`, it is made if
/// it is not there.
///
/// # Safety
/// The graft has its key.
pub(crate) unsafe fn errors(graft: &Graft, make: bool) -> Option<*mut Table> {
    // SAFETY: as the caller promises.
    unsafe {
        let worker = &*(graft.worker as *const Worker);
        let key = graft.tls_key.get().wrapping_sub(1) as u32;
        if make {
            return table(graft, worker, key);
        }
        let table = worker.pthread_getspecific(key);
        (table > GONE).then_some(table as *mut Table)
    }
}

/// The module's block on this thread, 0 if it has none.
///
/// # Safety
/// The graft has its key.
pub(crate) unsafe fn existing(module: &Module) -> u64 {
    // SAFETY: as the caller promises.
    unsafe {
        match errors(&*(module.graft as *const Graft), false) {
            Some(table) if module.tls.mem_size != 0 => (*(*table).block(module.tls.index)).start,
            _ => 0,
        }
    }
}

#[cold]
#[inline(never)]
unsafe fn make(graft: &Graft, worker: &Worker, module: &Module, key: u32) -> Option<u64> {
    // SAFETY: as for `block`; what `malloc` gave is ours. A signal handler may
    // come in between and make the same: what is there then stays.
    unsafe {
        let table = table(graft, worker, key)?;
        let tls = &module.tls;
        let align = tls.align.max(1);
        let size = tls.mem_size.checked_add(align)?;
        let allocation = worker.malloc(size as usize);
        if allocation.is_null() {
            return None;
        }
        let address = allocation as u64;
        let start = address + (tls.skew.wrapping_sub(address) & (align - 1));
        let (file, zero) = (tls.file_size.min(tls.mem_size) as usize, start as *mut u8);
        core::ptr::copy_nonoverlapping(tls.image as *const u8, zero, file);
        zero.add(file).write_bytes(0, tls.mem_size as usize - file);
        let entry = (*table).block(tls.index);
        if (*entry).start == 0 {
            entry.write(Block {
                start,
                allocation: address,
            });
        } else {
            worker.free(allocation);
        }
        Some((*entry).start)
    }
}

/// Makes the graft's key, once. Gives the failure and its code.
///
/// # Safety
/// On the initialisers' thread, before the first of them.
pub(crate) unsafe fn create_key(graft: &Graft, worker: &Worker) -> Result<(), (u32, i32)> {
    if graft.tls_key.get() != 0 {
        return Ok(());
    }
    let mut key = 0;
    // SAFETY: the key is a local.
    let error = unsafe { worker.pthread_key_create(&mut key, ng_tls_free) };
    if error != 0 {
        return Err((FAILURE_THREAD_KEY, error));
    }
    graft.tls_key.set(u64::from(key) + 1);
    Ok(())
}

/// Makes every block of this thread; false if there is no memory for one.
///
/// # Safety
/// As for [`create_key`], once the initial values are relocated.
pub(crate) unsafe fn make_all(graft: &Graft) -> bool {
    let modules = graft.modules as *const Module;
    let mut index = 0;
    while index < graft.module_count as usize {
        // SAFETY: the patcher wrote the modules.
        unsafe {
            let module = &*modules.add(index);
            if module.tls.mem_size != 0 && block(module).is_none() {
                return false;
            }
        }
        index += 1;
    }
    true
}

/// Takes the table away from this thread; 0 if it has none.
///
/// # Safety
/// Nothing on this thread uses the graft's thread-local storage any more.
pub(crate) unsafe fn give_up(graft: &Graft, worker: &Worker) -> u64 {
    if graft.tls_key.get() == 0 {
        return 0;
    }
    // SAFETY: the key is the graft's.
    unsafe {
        let key = (graft.tls_key.get() - 1) as u32;
        let table = worker.pthread_getspecific(key);
        if table != 0 {
            worker.pthread_setspecific(key, 0);
        }
        if table > GONE { table } else { 0 }
    }
}

/// Makes `table` this thread's, which is the worker's; gives 0 or an errno.
///
/// # Safety
/// `table` is what [`give_up`] gave, once.
pub(crate) unsafe fn adopt(graft: &Graft, worker: &Worker, table: u64) -> i32 {
    if table == 0 {
        return 0;
    }
    // SAFETY: the table is a whole one of this graft's.
    unsafe {
        let key = (graft.tls_key.get() - 1) as u32;
        let error = worker.pthread_setspecific(key, table);
        if error == 0 {
            set_home(graft, table);
        }
        error
    }
}

/// Sets where the worker's thread finds its blocks; `table` 0: nowhere.
unsafe fn set_home(graft: &Graft, table: u64) {
    let modules = graft.modules as *const Module;
    let mut index = 0;
    while index < graft.module_count as usize {
        // SAFETY: as the callers promise.
        unsafe {
            let module = &*modules.add(index);
            if module.tls.mem_size != 0 {
                module.home_block.set(match table {
                    0 => 0,
                    _ => (*(*(table as *mut Table)).block(module.tls.index)).start,
                });
            }
        }
        index += 1;
    }
}

/// The key's destructor; see the module for its rounds.
///
/// # Safety
/// Called by the C library alone.
pub unsafe extern "C" fn ng_tls_free(table: *mut c_void) {
    if table as u64 <= GONE {
        return;
    }
    // SAFETY: the value is a table of this thread's. Setting a value again
    // that was there a moment ago needs no memory.
    unsafe {
        let table = table.cast::<Table>();
        let graft = &*((*table).graft as *const Graft);
        let worker = &*(graft.worker as *const Worker);
        let key = (graft.tls_key.get() - 1) as u32;
        (*table).round += 1;
        if (*table).round < LAST_ROUND {
            worker.pthread_setspecific(key, table as u64);
            return;
        }
        if sys::thread_pointer() == worker.thread {
            set_home(graft, 0);
        }
        if (*table).round == LAST_ROUND {
            worker.pthread_setspecific(key, GONE);
        }
        let mut index = 0;
        while index < graft.tls_count {
            let allocation = (*(*table).block(index)).allocation;
            if allocation != 0 {
                worker.free(allocation as *mut u8);
            }
            index += 1;
        }
        if (*table).error_text != 0 {
            worker.free((*table).error_text as *mut u8);
        }
        worker.free(table.cast());
    }
}
