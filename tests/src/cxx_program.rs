//! Copy relocations, as nightcore's workers have: a C++ program that is linked
//! to libstdc++ and refers to its streams by address has copies of them, and
//! every library must use these instead of the originals.

use std::arch::global_asm;

// Never run. `R` keeps the section, which nothing refers to, from being dropped.
global_asm!(
    ".section .text.copy_relocations, \"axR\", @progbits",
    "lea rax, [rip + _ZSt4cout]",
    "lea rax, [rip + _ZSt4cerr]",
    "mov rax, [rip + stdout]",
    "mov rax, [rip + stderr]",
    "mov rax, [rip + environ]",
    "ret",
    ".text",
);
