use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::World;
use crate::abi::{STATE_FAILED, TLS_STATIC, Tls, TlsIndex};
use crate::tls::{ng_tls_get_addr, ng_tlsdesc_dynamic, ng_tlsdesc_static, ng_tlsdesc_undefweak};
use crate::{abi, sys};

/// Initial values `[1, 2, … file]`, then zeros.
fn storage(file: u64, mem: u64, align: u64, skew: u64) -> Tls {
    let image: Vec<u8> = (1..=file).map(|i| i as u8).collect();
    Tls {
        image: Vec::leak(image).as_ptr() as u64,
        file_size: file,
        mem_size: mem,
        align,
        skew,
        index: 0,
    }
}

fn index(world: &World, module: usize, offset: u64) -> TlsIndex {
    TlsIndex {
        module: core::ptr::from_ref(&world.modules[module]) as u64,
        offset,
    }
}

fn address(index: &TlsIndex) -> u64 {
    // SAFETY: the index is one of the test's.
    unsafe { ng_tls_get_addr(index) as u64 }
}

fn bytes(at: u64, len: u64) -> &'static mut [u8] {
    // SAFETY: a block of this thread's, of at least `len` bytes.
    unsafe { core::slice::from_raw_parts_mut(at as *mut u8, len as usize) }
}

/// The same through a descriptor: what it says plus the thread pointer. Every
/// other register must hold what it held.
fn through_descriptor(index: &TlsIndex) -> u64 {
    let descriptor = [
        ng_tlsdesc_dynamic as *const () as u64,
        core::ptr::from_ref(index) as u64,
    ];
    kept_registers(&descriptor).wrapping_add(sys::thread_pointer())
}

/// Calls a descriptor with a pattern in every register that C may change,
/// from a misaligned stack.
fn kept_registers(descriptor: &[u64; 2]) -> u64 {
    let mut result: u64;
    // Eight registers, then the x87 stack's top afterwards and before.
    let mut general = [0_u64; 10];
    general[9] = (1.0_f64 / 3.0).to_bits();
    let mut vectors = [0_u128; 16];
    let pattern: [u128; 16] =
        core::array::from_fn(|i| 0x0123_4567_89ab_cdef_0000_0000_0000_0000 + i as u128);
    // SAFETY: the asm restores the stack pointer and declares what it changes;
    // the red zone is stepped over.
    unsafe {
        asm!(
            "mov r12, rsp",
            "sub rsp, 256",
            "and rsp, -16",
            "sub rsp, 8",
            "fninit",
            "fld qword ptr [r14 + 72]",
            "movups xmm0, [r13]", "movups xmm1, [r13 + 16]",
            "movups xmm2, [r13 + 32]", "movups xmm3, [r13 + 48]",
            "movups xmm4, [r13 + 64]", "movups xmm5, [r13 + 80]",
            "movups xmm6, [r13 + 96]", "movups xmm7, [r13 + 112]",
            "movups xmm8, [r13 + 128]", "movups xmm9, [r13 + 144]",
            "movups xmm10, [r13 + 160]", "movups xmm11, [r13 + 176]",
            "movups xmm12, [r13 + 192]", "movups xmm13, [r13 + 208]",
            "movups xmm14, [r13 + 224]", "movups xmm15, [r13 + 240]",
            "mov ecx, 11", "mov edx, 12", "mov esi, 13", "mov edi, 14",
            "mov r8d, 15", "mov r9d, 16", "mov r10d, 17", "mov r11d, 18",
            "call [rax]",
            "mov [r14], rcx", "mov [r14 + 8], rdx",
            "mov [r14 + 16], rsi", "mov [r14 + 24], rdi",
            "mov [r14 + 32], r8", "mov [r14 + 40], r9",
            "mov [r14 + 48], r10", "mov [r14 + 56], r11",
            "movups [r15], xmm0", "movups [r15 + 16], xmm1",
            "movups [r15 + 32], xmm2", "movups [r15 + 48], xmm3",
            "movups [r15 + 64], xmm4", "movups [r15 + 80], xmm5",
            "movups [r15 + 96], xmm6", "movups [r15 + 112], xmm7",
            "movups [r15 + 128], xmm8", "movups [r15 + 144], xmm9",
            "movups [r15 + 160], xmm10", "movups [r15 + 176], xmm11",
            "movups [r15 + 192], xmm12", "movups [r15 + 208], xmm13",
            "movups [r15 + 224], xmm14", "movups [r15 + 240], xmm15",
            "fstp qword ptr [r14 + 64]",
            "mov rsp, r12",
            inout("rax") descriptor.as_ptr() => result,
            in("r13") pattern.as_ptr(),
            in("r14") general.as_mut_ptr(),
            in("r15") vectors.as_mut_ptr(),
            out("r12") _,
            clobber_abi("C"),
        );
    }
    assert_eq!(general[..8], [11, 12, 13, 14, 15, 16, 17, 18]);
    assert_eq!(general[8], general[9]);
    assert_eq!(vectors, pattern);
    result
}

/// A `malloc` and `pthread_getspecific` that change all that C code may.
static REAL: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

fn scribble() {
    // SAFETY: everything is declared.
    unsafe {
        asm!(
            "xorps xmm0, xmm0",
            "xorps xmm1, xmm1",
            "xorps xmm7, xmm7",
            "xorps xmm15, xmm15",
            "xor ecx, ecx",
            "xor edx, edx",
            "xor esi, esi",
            "xor edi, edi",
            "xor r8d, r8d",
            "xor r9d, r9d",
            "xor r10d, r10d",
            "xor r11d, r11d",
            "fninit",
            "fldz",
            "fstp st(0)",
            clobber_abi("C"),
        );
    }
}

unsafe extern "C" fn scribbling_malloc(len: usize) -> *mut u8 {
    let real = REAL[0].load(SeqCst);
    // SAFETY: the C library's own.
    let block = unsafe {
        core::mem::transmute::<usize, extern "C" fn(usize) -> *mut u8>(real as usize)(len)
    };
    scribble();
    block
}

unsafe extern "C" fn scribbling_getspecific(key: u32) -> u64 {
    let real = REAL[1].load(SeqCst);
    // SAFETY: as above.
    let value =
        unsafe { core::mem::transmute::<usize, extern "C" fn(u32) -> u64>(real as usize)(key) };
    scribble();
    value
}

#[test]
fn blocks_hold_their_initial_values_aligned_and_each_thread_has_its_own() {
    let world = World::new(&[
        storage(5, 300, 8, 0),
        storage(0, 0, 0, 0),
        storage(64, 64, 4096, 24),
        storage(3, 7, 64, 63),
    ]);
    world.make_ready();
    let check = || {
        for (module, (file, mem, align, skew)) in [
            (0, (5, 300, 8, 0)),
            (2, (64, 64, 4096, 24)),
            (3, (3, 7, 64, 63)),
        ] {
            let at = address(&index(&world, module, 0));
            assert_eq!(at % align, skew, "module {module}");
            let block = bytes(at, mem);
            let fresh = (1..=file)
                .chain(core::iter::repeat(0))
                .map(|i: u64| i as u8);
            assert!(block.iter().copied().eq(fresh.take(mem as usize)));
            block.fill(0xff);
            assert_eq!(address(&index(&world, module, 2)), at + 2);
            assert_eq!(through_descriptor(&index(&world, module, 2)), at + 2);
        }
        address(&index(&world, 0, 0))
    };
    let mine = check();
    let module = &world.modules[0];
    assert_eq!(
        module.home_block.get(),
        mine,
        "no call for the worker's thread"
    );
    std::thread::scope(|scope| {
        // The key is found there, not the worker's own block.
        let other = scope.spawn(check).join().expect("checks");
        assert_ne!(other, mine);
    });
    assert_eq!(bytes(mine, 300), [0xff; 300]);
}

#[test]
fn descriptors_keep_every_register_on_the_slow_way_too() {
    let world = World::new(&[storage(5, 300, 8, 0)]);
    let imports = &mut world.worker.imports;
    for (real, import, ours) in [
        (
            &REAL[0],
            abi::Import::Malloc,
            scribbling_malloc as *const (),
        ),
        (
            &REAL[1],
            abi::Import::PthreadGetspecific,
            scribbling_getspecific as *const (),
        ),
    ] {
        let slot = &mut imports[import as usize];
        real.store(*slot, SeqCst);
        *slot = ours as u64;
    }
    world.make_ready();
    let index = index(&world, 0, 1);
    let len = world.worker.xsave_len.get();
    assert!(len > 576, "an XSAVE area of {len} bytes");
    // With XSAVE and, as on a processor without it, with FXSAVE.
    for len in [len, 0] {
        world.worker.xsave_len.set(len);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let first = through_descriptor(&index);
                assert_eq!(bytes(first, 2), [2, 3]);
                assert_eq!(through_descriptor(&index), first);
            });
        });
    }
}

#[test]
fn static_undefined_and_the_dynamic_linkers_own_are_told_apart() {
    let world = World::new(&[storage(5, 300, 8, 0)]);
    world.make_ready();
    let fixed = TlsIndex {
        module: TLS_STATIC,
        offset: 0_u64.wrapping_sub(64),
    };
    let tp = sys::thread_pointer();
    assert_eq!(address(&fixed), tp - 64);
    assert_eq!(through_descriptor(&fixed), tp - 64);
    let descriptor = [ng_tlsdesc_static as *const () as u64, 48];
    assert_eq!(kept_registers(&descriptor), 48);
    let descriptor = [ng_tlsdesc_undefweak as *const () as u64, 7];
    assert_eq!(kept_registers(&descriptor).wrapping_add(tp), 7);
    // Module 1 is the program, or its first library with thread-local storage.
    let theirs = TlsIndex {
        module: 1,
        offset: 8,
    };
    // SAFETY: that module is there in every Rust program.
    let expected = unsafe { world.worker.tls_get_addr(&theirs) } as u64;
    assert_eq!(address(&theirs), expected);
    assert_eq!(through_descriptor(&theirs), expected);
}

#[test]
fn a_misaligned_stack_does_no_harm() {
    let world = World::new(&[storage(5, 300, 8, 0)]);
    world.make_ready();
    let index = index(&world, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let result: u64;
            // SAFETY: the asm restores the stack pointer.
            unsafe {
                asm!(
                    "mov r12, rsp",
                    "sub rsp, 256",
                    "and rsp, -16",
                    "sub rsp, 8",
                    "call {get}",
                    "mov rsp, r12",
                    get = sym ng_tls_get_addr,
                    in("rdi") &raw const index,
                    lateout("rax") result,
                    out("r12") _,
                    clobber_abi("C"),
                );
            }
            assert_eq!(bytes(result, 5), [1, 2, 3, 4, 5]);
        });
    });
}

static TAKEN: AtomicU64 = AtomicU64::new(0);
static GIVEN: AtomicU64 = AtomicU64::new(0);
/// Calls of a key's destructor: what it found in the block.
static FOUND: AtomicU64 = AtomicU64::new(0);
static ROUNDS: AtomicU64 = AtomicU64::new(0);
static INDEX: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
static OTHER_KEY: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" fn counting_malloc(len: usize) -> *mut u8 {
    TAKEN.fetch_add(1, SeqCst);
    // SAFETY: passed on.
    unsafe { libc::malloc(len).cast() }
}

unsafe extern "C" fn counting_free(block: *mut u8) {
    GIVEN.fetch_add(1, SeqCst);
    // SAFETY: passed on.
    unsafe { libc::free(block.cast()) };
}

/// Uses thread-local storage in every round of destruction there is.
unsafe extern "C" fn late(value: *mut core::ffi::c_void) {
    let index = TlsIndex {
        module: INDEX[0].load(SeqCst),
        offset: 0,
    };
    let round = ROUNDS.fetch_add(1, SeqCst);
    FOUND.fetch_or(
        u64::from(bytes(address(&index), 1)[0]) << (8 * round),
        SeqCst,
    );
    if round < 2 {
        // SAFETY: the test's key.
        unsafe { libc::pthread_setspecific(OTHER_KEY.load(SeqCst) as u32, value) };
    }
}

#[test]
fn destructors_of_other_keys_find_the_blocks_and_nothing_leaks() {
    let world = World::new(&[storage(5, 300, 8, 0), storage(1, 1, 1, 0)]);
    world.worker.imports[abi::Import::Malloc as usize] = counting_malloc as *const () as u64;
    world.worker.imports[abi::Import::Free as usize] = counting_free as *const () as u64;
    world.make_ready();
    let index = index(&world, 0, 0);
    INDEX[0].store(index.module, SeqCst);
    let mut key = 0;
    // SAFETY: a key of the test's own, made after the graft's: within a round
    // its destructor comes after ours.
    unsafe { libc::pthread_key_create(&mut key, Some(late)) };
    OTHER_KEY.store(u64::from(key), SeqCst);
    let before = TAKEN.load(SeqCst) - GIVEN.load(SeqCst);
    std::thread::spawn(move || {
        bytes(address(&index), 1)[0] = 77;
        // SAFETY: as above.
        unsafe { libc::pthread_setspecific(key, 1 as _) };
    })
    .join()
    .expect("no panic");
    assert_eq!(ROUNDS.load(SeqCst), 3);
    // In the third round the table is gone already: a fresh block.
    assert_eq!(FOUND.load(SeqCst), 77 | 77 << 8 | 1 << 16);
    assert_eq!(TAKEN.load(SeqCst) - GIVEN.load(SeqCst), before);
}

#[test]
fn a_forked_child_has_its_copy() {
    let world = World::new(&[storage(5, 300, 8, 0)]);
    world.make_ready();
    let at = address(&index(&world, 0, 0));
    bytes(at, 1)[0] = 9;
    // SAFETY: the child only looks and exits.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            let same = address(&index(&world, 0, 0)) == at && bytes(at, 1)[0] == 9;
            bytes(at, 1)[0] = 10;
            libc::_exit(i32::from(!same));
        }
        let mut status = -1;
        libc::waitpid(child, &mut status, 0);
        assert_eq!(status, 0);
    }
    assert_eq!(bytes(at, 1), [9]);
}

unsafe extern "C" fn no_malloc(_: usize) -> *mut u8 {
    core::ptr::null_mut()
}

#[test]
fn no_memory_for_the_workers_blocks_fails_the_initialisation() {
    let world = World::new(&[storage(5, 300, 8, 0)]);
    world.worker.imports[abi::Import::Malloc as usize] = no_malloc as *const () as u64;
    assert_eq!(world.initialise(), STATE_FAILED);
    assert_eq!(world.graft.failure.get(), abi::FAILURE_MEMORY);
    assert_eq!(world.shared.gate.load(SeqCst), 0);
}
