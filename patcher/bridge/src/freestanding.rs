//! What the compiler expects of a platform, for the image only.

use core::arch::{asm, global_asm};

/// There is no code path to it (no indexing, no arithmetic check, no unwrap
/// in the bridge); if there were one, stopping here is all that is left.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: ends the process by SIGILL.
        unsafe { asm!("ud2", options(noreturn)) }
    }
}

// The compiler may turn loops and copies into calls of these.
global_asm!(
    ".globl memcpy",
    ".hidden memcpy",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    ".globl memset",
    ".hidden memset",
    "memset:",
    "mov r8, rdi",
    "movzx eax, sil",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    ".globl memmove",
    ".hidden memmove",
    "memmove:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "mov r8, rdi",
    "sub r8, rsi",
    "cmp r8, rdx",
    "jb 1f",
    "rep movsb",
    "ret",
    "1:",
    "lea rdi, [rdi + rdx - 1]",
    "lea rsi, [rsi + rdx - 1]",
    "std",
    "rep movsb",
    "cld",
    "ret",
    ".globl strlen",
    ".hidden strlen",
    "strlen:",
    "xor eax, eax",
    "cmp byte ptr [rdi], 0",
    "je 3f",
    "2:",
    "inc rax",
    "cmp byte ptr [rdi + rax], 0",
    "jne 2b",
    "3:",
    "ret",
);
