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

use core::arch::naked_asm;
use core::ffi::c_void;
use core::mem::offset_of;

use crate::abi::{
    FAILURE_THREAD_KEY, Graft, IMPORTS, Import, Module, TLS_STATIC, TlsIndex, Worker,
};
use crate::{imports, sys};

/// A thread's blocks of one graft; [`Graft::tls_count`] entries follow.
#[repr(C)]
struct Table {
    graft: u64,
    /// Rounds of destruction that it has seen.
    round: u64,
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

const IMPORT_TLS_GET_ADDR: usize = offset_of!(Worker, imports) + 8 * Import::TlsGetAddr as usize;
const _: () = assert!(IMPORTS.len() > Import::TlsGetAddr as usize);

/// `__tls_get_addr` of images. Compilers used to call it with a misaligned
/// stack: all but the shortest ways align it.
///
/// # Safety
/// Called with the address of a [`TlsIndex`] that the patcher filled in.
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_tls_get_addr(index: *const TlsIndex) -> *mut u8 {
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "mov rax, [rdi]",
        "test rax, rax",
        "js 3f", // TLS_STATIC
        "mov rcx, [rip + {ng_worker}@GOTPCREL]",
        "mov rcx, [rcx]",
        "mov rdx, rax",
        "shr rdx, 32",
        "jz 4f", // one of the dynamic linker's
        "mov rdx, [rcx + {thread}]",
        "cmp rdx, fs:[0]",
        "jne 2f",
        "mov rax, [rax + {home}]",
        "test rax, rax",
        "jz 2f",
        "add rax, [rdi + 8]",
        "ret",
        "2:",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "and rsp, -16",
        "call {resolve}",
        "leave",
        ".cfi_def_cfa rsp, 8",
        ".cfi_restore rbp",
        "ret",
        "3:",
        "mov rax, fs:[0]",
        "add rax, [rdi + 8]",
        "ret",
        "4:",
        "jmp [rcx + {forward}]", // aligns the stack itself where it must
        ".cfi_endproc",
        ng_worker = sym imports::ng_worker,
        thread = const offset_of!(Worker, thread),
        home = const offset_of!(Module, home_block),
        forward = const IMPORT_TLS_GET_ADDR,
        resolve = sym resolve,
    );
}

/// Resolver of a TLS descriptor whose argument is a [`TlsIndex`]: `rax` is the
/// descriptor's address, and becomes the variable's offset from the thread
/// pointer. Everything else is kept but the flags (the TLS descriptor
/// convention): on the way that every request takes by using two registers,
/// elsewhere by saving all that C code may change.
///
/// # Safety
/// Called by compiled code through a TLS descriptor that the patcher filled.
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_tlsdesc_dynamic() {
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "push rdi",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset rdi, 0",
        "push rsi",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset rsi, 0",
        "mov rdi, [rax + 8]",
        "mov rsi, [rdi]",
        "test rsi, rsi",
        "js 3f", // TLS_STATIC
        "mov rax, rsi",
        "shr rax, 32",
        "jz 2f", // one of the dynamic linker's
        "mov rax, [rip + {ng_worker}@GOTPCREL]",
        "mov rax, [rax]",
        "mov rax, [rax + {thread}]",
        "cmp rax, fs:[0]",
        "jne 2f",
        "mov rax, [rsi + {home}]",
        "test rax, rax",
        "jz 2f",
        "add rax, [rdi + 8]",
        "sub rax, fs:[0]",
        "pop rsi",
        ".cfi_remember_state",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore rsi",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore rdi",
        "ret",
        "3:",
        ".cfi_restore_state",
        "mov rax, [rdi + 8]",
        "pop rsi",
        ".cfi_remember_state",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore rsi",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore rdi",
        "ret",
        "2:",
        ".cfi_restore_state",
        "push rbp",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset rbp, 0",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "push rbx",
        ".cfi_offset rbx, -40",
        "push rcx",
        ".cfi_offset rcx, -48",
        "push rdx",
        ".cfi_offset rdx, -56",
        "push r8",
        ".cfi_offset r8, -64",
        "push r9",
        ".cfi_offset r9, -72",
        "push r10",
        ".cfi_offset r10, -80",
        "push r11",
        ".cfi_offset r11, -88",
        "mov rcx, [rip + {ng_worker}@GOTPCREL]",
        "mov rcx, [rcx]",
        "mov rcx, [rcx + {xsave_len}]",
        "test rcx, rcx",
        "jz 5f",
        "sub rsp, rcx",
        "and rsp, -64",
        // The area's header: XSAVE leaves parts of it as they are.
        "xor eax, eax",
        "mov [rsp + 512], rax",
        "mov [rsp + 520], rax",
        "mov [rsp + 528], rax",
        "mov [rsp + 536], rax",
        "mov [rsp + 544], rax",
        "mov [rsp + 552], rax",
        "mov [rsp + 560], rax",
        "mov [rsp + 568], rax",
        "mov eax, {components}",
        "xor edx, edx",
        "xsave64 [rsp]",
        "call {resolve}",
        "mov rbx, rax",
        "mov eax, {components}",
        "xor edx, edx",
        "xrstor64 [rsp]",
        "jmp 6f",
        "5:",
        "sub rsp, 512",
        "and rsp, -64",
        "fxsave64 [rsp]",
        "call {resolve}",
        "mov rbx, rax",
        "fxrstor64 [rsp]",
        "6:",
        "mov rax, rbx",
        "sub rax, fs:[0]",
        "lea rsp, [rbp - 56]",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rdx",
        "pop rcx",
        "pop rbx",
        "pop rbp",
        ".cfi_def_cfa rsp, 24",
        "pop rsi",
        ".cfi_adjust_cfa_offset -8",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        "ret",
        ".cfi_endproc",
        ng_worker = sym imports::ng_worker,
        thread = const offset_of!(Worker, thread),
        home = const offset_of!(Module, home_block),
        xsave_len = const offset_of!(Worker, xsave_len),
        components = const sys::XSAVE_COMPONENTS,
        resolve = sym resolve,
    );
}

/// Resolver of a TLS descriptor whose argument is the offset from the thread
/// pointer itself.
///
/// # Safety
/// As for [`ng_tlsdesc_dynamic`].
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_tlsdesc_static() {
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "mov rax, [rax + 8]",
        "ret",
        ".cfi_endproc",
    );
}

/// Resolver of a TLS descriptor of a weak symbol that nobody defines; the
/// argument is the relocation's addend, and the variable's address becomes it.
///
/// # Safety
/// As for [`ng_tlsdesc_dynamic`].
#[unsafe(naked)]
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_tlsdesc_undefweak() {
    naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "mov rax, [rax + 8]",
        "sub rax, fs:[0]",
        "ret",
        ".cfi_endproc",
    );
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

#[cold]
#[inline(never)]
unsafe fn make(graft: &Graft, worker: &Worker, module: &Module, key: u32) -> Option<u64> {
    // SAFETY: as for `block`; what `malloc` gave is ours. A signal handler may
    // come in between and make the same: what is there then stays.
    unsafe {
        let mut table = worker.pthread_getspecific(key);
        if table <= GONE {
            let entries = graft.tls_count as usize * size_of::<Block>();
            let new = worker.malloc(size_of::<Table>() + entries);
            if new.is_null() {
                return None;
            }
            new.write_bytes(0, size_of::<Table>() + entries);
            new.cast::<Table>().write(Table {
                graft: module.graft,
                round: if table == GONE { LAST_ROUND } else { 0 },
            });
            table = worker.pthread_getspecific(key);
            if table > GONE {
                worker.free(new);
            } else {
                if worker.pthread_setspecific(key, new as u64) != 0 {
                    worker.free(new);
                    return None;
                }
                table = new as u64;
            }
        }
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
        let entry = (*(table as *mut Table)).block(tls.index);
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
    if graft.tls_count == 0 || graft.tls_key.get() != 0 {
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
        worker.free(table.cast());
    }
}
