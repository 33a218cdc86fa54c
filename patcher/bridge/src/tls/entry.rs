//! Where compiled code arrives for thread-local variables, in assembly: a
//! stack may be misaligned, and TLS descriptors keep nearly every register.

use core::arch::naked_asm;
use core::mem::offset_of;

use super::resolve;
use crate::abi::{IMPORTS, Import, Module, TlsIndex, Worker};
use crate::{imports, sys};

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
