//! All registers at once: filled with patterns, kept while the thread spins or
//! blocks in a `read`, and compared.
//!
//! The red zone below the stack pointer is filled and compared as well.

use std::arch::global_asm;

/// In: what the registers are filled with; then out: what they came to.
#[repr(C, align(64))]
struct Board {
    ymm: [[u64; 4]; 16],
    /// rax, rbx, rcx, rdx, rsi, rbp, r8 to r15
    general: [u64; 14],
    red_zone: [u64; 16],
    _pad: [u64; 34],
    ymm_out: [[u64; 4]; 16],
    general_out: [u64; 14],
    red_zone_out: [u64; 16],
    _pad_out: [u64; 34],
    zmm: [[u64; 8]; 32],
    zmm_out: [[u64; 8]; 32],
    masks: [u64; 8],
    masks_out: [u64; 8],
    _pad_masks: [u64; 16],
    /// Set to end a spin.
    flag: u32,
    /// What the processor has: 1 for AVX-512, 2 for AVX.
    features: u32,
    byte: u64,
}

const _: () = {
    assert!(std::mem::offset_of!(Board, general) == 512);
    assert!(std::mem::offset_of!(Board, red_zone) == 624);
    assert!(std::mem::offset_of!(Board, ymm_out) == 1024);
    assert!(std::mem::offset_of!(Board, zmm) == 2048);
    assert!(std::mem::offset_of!(Board, zmm_out) == 4096);
    assert!(std::mem::offset_of!(Board, masks) == 6144);
    assert!(std::mem::offset_of!(Board, masks_out) == 6208);
    assert!(std::mem::offset_of!(Board, flag) == 6400);
    assert!(std::mem::offset_of!(Board, features) == 6404);
    assert!(std::mem::offset_of!(Board, byte) == 6408);
};

global_asm!(
    ".macro shim_enter",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "mov rax, [rdi + 624 + 8*\\i]",
    "mov [rsp - 8 - 8*\\i], rax",
    "movdqu xmm\\i, [rdi + 32*\\i]",
    ".endr",
    "test dword ptr [rdi + 6404], 2",
    "jz 7f",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu ymm\\i, [rdi + 32*\\i]",
    ".endr",
    "test dword ptr [rdi + 6404], 1",
    "jz 7f",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 zmm\\i, [rdi + 2048 + 64*\\i]",
    ".endr",
    ".irp i,1,2,3,4,5,6,7",
    "kmovq k\\i, [rdi + 6144 + 8*\\i]",
    ".endr",
    "7:",
    "mov rax, [rdi + 512]",
    "mov rbx, [rdi + 520]",
    "mov rcx, [rdi + 528]",
    "mov rdx, [rdi + 536]",
    "mov rsi, [rdi + 544]",
    "mov rbp, [rdi + 552]",
    ".irp i,8,9,10,11,12,13,14,15",
    "mov r\\i, [rdi + 496 + 8*\\i]",
    ".endr",
    ".endm",
    ".macro shim_leave",
    "mov [rdi + 1536], rax",
    "mov [rdi + 1544], rbx",
    "mov [rdi + 1552], rcx",
    "mov [rdi + 1560], rdx",
    "mov [rdi + 1568], rsi",
    "mov [rdi + 1576], rbp",
    ".irp i,8,9,10,11,12,13,14,15",
    "mov [rdi + 1520 + 8*\\i], r\\i",
    ".endr",
    "test dword ptr [rdi + 6404], 1",
    "jz 7f",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 [rdi + 4096 + 64*\\i], zmm\\i",
    ".endr",
    ".irp i,1,2,3,4,5,6,7",
    "kmovq [rdi + 6208 + 8*\\i], k\\i",
    ".endr",
    "7:",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "mov rax, [rsp - 8 - 8*\\i]",
    "mov [rdi + 1648 + 8*\\i], rax",
    "movdqu [rdi + 1024 + 32*\\i], xmm\\i",
    ".endr",
    "test dword ptr [rdi + 6404], 2",
    "jz 7f",
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu [rdi + 1024 + 32*\\i], ymm\\i",
    ".endr",
    "vzeroupper",
    "7:",
    "pop rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".endm",
    ".globl shim_test_spin",
    "shim_test_spin:",
    "shim_enter",
    "2:",
    "pause",
    "cmp dword ptr [rdi + 6400], 0",
    "je 2b",
    "shim_leave",
    ".globl shim_test_read",
    "shim_test_read:",
    "shim_enter",
    "xor edi, edi",
    "syscall",
    "mov rdi, [rsp]",
    "shim_leave",
    ".purgem shim_enter",
    ".purgem shim_leave",
);

unsafe extern "C" {
    /// Keeps the patterns until the flag is set.
    fn shim_test_spin(board: *mut Board);
    /// Keeps the patterns during `read(0, rsi, rdx)`, with rax = 0.
    fn shim_test_read(board: *mut Board);
}

fn board(seed: u64) -> Box<Board> {
    let mut next = seed;
    let mut pattern = || {
        next = next.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        next
    };
    let zmm: [[u64; 8]; 32] = std::array::from_fn(|_| std::array::from_fn(|_| pattern()));
    let avx = is_x86_feature_detected!("avx");
    // Without AVX the upper halves are neither loaded nor stored.
    let width = if avx { 4 } else { 2 };
    let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    Box::new(Board {
        // The lower halves, where there is more.
        ymm: std::array::from_fn(|i| {
            std::array::from_fn(|j| if j < width { zmm[i][j] } else { 0 })
        }),
        general: std::array::from_fn(|_| pattern()),
        red_zone: std::array::from_fn(|_| pattern()),
        _pad: [0; 34],
        ymm_out: [[0; 4]; 16],
        general_out: [0; 14],
        red_zone_out: [0; 16],
        _pad_out: [0; 34],
        zmm,
        zmm_out: [[0; 8]; 32],
        masks: std::array::from_fn(|_| pattern()),
        masks_out: [0; 8],
        _pad_masks: [0; 16],
        flag: 0,
        features: u32::from(avx512) | u32::from(avx) << 1,
        byte: 0,
    })
}

impl Board {
    fn compare(&self) -> Result<(), String> {
        fn same<T: PartialEq + std::fmt::Debug + ?Sized>(
            what: &str,
            is: &T,
            was: &T,
        ) -> Result<(), String> {
            if is == was {
                return Ok(());
            }
            Err(format!("{what}: {is:x?}, was {was:x?}").replace('\n', " "))
        }
        same("general registers", &self.general_out, &self.general)?;
        same("red zone", &self.red_zone_out, &self.red_zone)?;
        same("ymm", &self.ymm_out, &self.ymm)?;
        if self.features & 1 != 0 {
            same("zmm", &self.zmm_out, &self.zmm)?;
            same("masks", &self.masks_out[1..], &self.masks[1..])?;
        }
        Ok(())
    }
}

/// A spin that another thread can end.
#[derive(Clone, Copy)]
pub(crate) struct EndSpin(*mut u32);

// SAFETY: used for one volatile store of an aligned word that outlives all.
unsafe impl Send for EndSpin {}

impl EndSpin {
    pub(crate) fn end(self) {
        // SAFETY: the board is leaked, and the spin reads the word by itself.
        unsafe { self.0.write_volatile(1) };
    }
}

/// Spins with patterns in all registers, until ended through what `announce`
/// is given.
pub(crate) fn spin(seed: u64, announce: impl FnOnce(EndSpin)) -> Result<(), String> {
    let board = Box::into_raw(board(seed));
    // SAFETY: the board is valid and never freed; the assembly keeps to its
    // layout, and to the calling convention.
    unsafe {
        announce(EndSpin(&raw mut (*board).flag));
        shim_test_spin(board);
        (*board).compare()
    }
}

/// Reads one byte from standard input with patterns in all registers that a
/// system call keeps; `None` at its end.
pub(crate) fn read(seed: u64) -> Result<Option<u8>, String> {
    let board = Box::into_raw(board(seed));
    // SAFETY: as for `spin`; the read is of one byte into the board.
    unsafe {
        (*board).general[0] = 0;
        (*board).general[3] = 1;
        (*board).general[4] = (&raw mut (*board).byte) as u64;
        shim_test_read(board);
        let read = (*board).general_out[0];
        // rax, and rcx and r11, which `syscall` overwrites
        for index in [0, 2, 9] {
            (*board).general_out[index] = (*board).general[index];
        }
        (*board).compare()?;
        let byte = (*board).byte as u8;
        drop(Box::from_raw(board));
        match read {
            0 => Ok(None),
            1 => Ok(Some(byte)),
            other => Err(format!("read returned {}", other.cast_signed())),
        }
    }
}
