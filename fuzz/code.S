/* A library whose code is to be replaced: names to pass, a table of addresses,
 * and a function of nothing but traps. */
    .text
    .p2align 4
    .globl faas_func_call
    .type faas_func_call, @function
faas_func_call:
.Lcode:
    .cfi_startproc
    .ascii "NIGHTGRAFT CODE "
    .fill 4080, 1, 0xcc
    .cfi_endproc
    .size faas_func_call, . - faas_func_call

    .section .rodata, "a"
bar: .asciz "Bar"
baz: .asciz "Baz"
    .p2align 2
jumps:
    .long .Lcode - jumps
    .long .Lcode + 16 - jumps
    .long .Lcode + 32 - jumps

    .section .data.rel.ro, "aw"
    .quad bar, baz, .Lcode + 64

    .section .note.GNU-stack, "", @progbits
