//! Memory, code and moved threads.

use crate::child::{Subject, patient};
use crate::subject::hear;
use ptrace_shim::{Address, Error, Memory, PAGE_SIZE, WriteMethod, stop_all, stop_thread};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What the code returns: one of these two, never anything else.
const ONE: u32 = 0x1111_1111;
const OTHER: u32 = 0x2222_2222;

/// `mov eax, imm32; ret` at the page's begin.
const IMMEDIATE: u64 = 1;
/// `jmp $` (eb fe) at this offset, then `mov eax, imm32; ret`.
const LOOP: u64 = 64;

/// Role: some threads call code in a page of their own and look at what it
/// returns, one sits in a loop in it. Prints the page's address.
pub(crate) fn run_code() {
    static WRONG: AtomicU64 = AtomicU64::new(0);
    static CALLS: AtomicU64 = AtomicU64::new(0);
    static ENDED: AtomicBool = AtomicBool::new(false);
    // SAFETY: a new mapping, written, then made executable, and called as the
    // functions that its bytes are.
    let (code, endless) = unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            2 * PAGE_SIZE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
        .cast::<u8>();
        let mut bytes = vec![0xb8];
        bytes.extend_from_slice(&ONE.to_le_bytes());
        bytes.push(0xc3);
        bytes.resize(LOOP as usize, 0xcc);
        bytes.extend_from_slice(&[0xeb, 0xfe, 0xb8]);
        bytes.extend_from_slice(&OTHER.to_le_bytes());
        bytes.push(0xc3);
        page.copy_from(bytes.as_ptr(), bytes.len());
        libc::mprotect(
            page.cast(),
            2 * PAGE_SIZE as usize,
            libc::PROT_READ | libc::PROT_EXEC,
        );
        let function = |at: *mut u8| std::mem::transmute::<*mut u8, extern "C" fn() -> u32>(at);
        (function(page), function(page.add(LOOP as usize)))
    };
    let threads: Vec<_> = (0..2)
        .map(|_| {
            std::thread::spawn(move || {
                while !ENDED.load(Ordering::Relaxed) {
                    for _ in 0..1000 {
                        let result = code();
                        if result != ONE && result != OTHER {
                            WRONG.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    CALLS.fetch_add(1000, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let looping = std::thread::spawn(move || endless());
    println!("ready {}", code as usize);
    hear();
    ENDED.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(CALLS.load(Ordering::Relaxed) > 0);
    let left = looping.join().unwrap() == OTHER;
    println!("wrong {} left {left}", WRONG.load(Ordering::Relaxed));
}

fn code_subject() -> (Subject, Address) {
    let mut subject = Subject::start("code");
    let line = subject.line();
    let page = line.strip_prefix("ready ").unwrap().parse().unwrap();
    (subject, Address(page))
}

fn at(page: Address, offset: u64) -> Address {
    page.checked_add(offset).unwrap()
}

#[test]
fn code_is_exchanged_and_a_thread_moved_under_load() {
    for method in [WriteMethod::of_this_kernel(), WriteMethod::PokeData] {
        let (mut subject, page) = code_subject();
        let process = subject.process();
        for round in 0..150 {
            let mut stopped = stop_all(&process, patient()).unwrap();
            if method == WriteMethod::PokeData {
                stopped.use_poke_data().unwrap();
            }
            assert_eq!(stopped.write_method(), method);
            let value = if round % 2 == 0 { OTHER } else { ONE };
            stopped
                .write_code(at(page, IMMEDIATE), &value.to_le_bytes())
                .unwrap();
            stopped.resume().unwrap();
        }
        // The endless one, past its loop.
        loop {
            let mut stopped = stop_all(&process, patient()).unwrap();
            let caught = stopped
                .threads()
                .find(|(_, registers)| registers.rip == page.0 + LOOP)
                .map(|(tid, registers)| (tid, registers.stack_pointer()));
            // On a busy machine it may not have been run yet.
            if let Some((tid, stack)) = caught {
                stopped
                    .set_instruction_and_stack_pointer(tid, at(page, LOOP + 2), stack)
                    .unwrap();
                stopped.resume().unwrap();
                break;
            }
        }
        subject.tell("x");
        assert_eq!(subject.line(), "wrong 0 left true");
        assert!(subject.end().success());
    }
}

#[test]
fn code_is_written_in_one_piece_or_not_at_all() {
    let (subject, page) = code_subject();
    let process = subject.process();
    let memory = Memory::open(&process).unwrap();
    let before = memory.read_vec(page, 2 * PAGE_SIZE as usize).unwrap();
    let mut stopped = stop_all(&process, patient()).unwrap();
    let error = stopped
        .write_code(at(page, PAGE_SIZE - 2), &[0xc3; 3])
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "3 bytes of code at {:#x} do not lie within one page",
            page.0 + PAGE_SIZE - 2
        )
    );
    stopped.use_poke_data().unwrap();
    let error = stopped.write_code(at(page, 14), &[0xc3; 9]).unwrap_err();
    assert!(matches!(
        error,
        Error::CodeSpans {
            unit: "one word",
            ..
        }
    ));
    assert_eq!(memory.read_vec(page, before.len()).unwrap(), before);
    // In one word wherever it begins, at the end of the page as well.
    stopped.write_code(at(page, 13), &[0xc3; 8]).unwrap();
    stopped.write_code(at(page, 26), &[0x90]).unwrap();
    stopped
        .write_code(at(page, PAGE_SIZE - 5), &[0xcc; 5])
        .unwrap();
    let mut after = before.clone();
    after[13..21].fill(0xc3);
    after[26] = 0x90;
    after[PAGE_SIZE as usize - 5..PAGE_SIZE as usize].fill(0xcc);
    assert_eq!(memory.read_vec(page, before.len()).unwrap(), after);
}

#[test]
fn what_the_process_may_not_write_takes_a_stop_where_force_is_forbidden() {
    let (subject, page) = code_subject();
    let process = subject.process();
    let gentle = Memory::open_with(&process, WriteMethod::PokeData).unwrap();
    let error = gentle.write(at(page, 100), b"12345").unwrap_err();
    assert!(
        matches!(error, Error::ForcedWriteForbidden { length: 5, .. }),
        "{error}"
    );
    // Its own data is no matter.
    let maps = process.mappings().unwrap();
    let stack = maps.iter().find(|map| map.path == "[stack]").unwrap();
    let low = Address(stack.start.0 + 64);
    gentle.write(low, b"12345").unwrap();
    assert_eq!(gentle.read_vec(low, 5).unwrap(), b"12345");
}

#[test]
fn what_lies_behind_does_not_matter() {
    let page = PAGE_SIZE as usize;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, and of that the second page.
    let start = unsafe {
        let start = libc::mmap(std::ptr::null_mut(), 2 * page, protection, flags, -1, 0);
        assert_ne!(start, libc::MAP_FAILED);
        assert_eq!(
            libc::mprotect(start.byte_add(page), page, libc::PROT_READ),
            0
        );
        Address(start.addr() as u64)
    };
    let own = ptrace_shim::Process::open(std::process::id().cast_signed()).unwrap();
    let gentle = Memory::open_with(&own, WriteMethod::PokeData).unwrap();
    gentle.write(at(start, PAGE_SIZE - 5), b"12345").unwrap();
    assert_eq!(
        gentle.read_vec(at(start, PAGE_SIZE - 5), 5).unwrap(),
        b"12345"
    );
    let error = gentle
        .write(at(start, PAGE_SIZE - 4), b"12345")
        .unwrap_err();
    assert!(
        matches!(error, Error::ForcedWriteForbidden { .. }),
        "{error}"
    );
}

#[test]
fn memory_that_is_not_there_is_an_error_with_its_address() {
    let (mut subject, page) = code_subject();
    let process = subject.process();
    let memory = Memory::open(&process).unwrap();
    assert_eq!(memory.write_method(), WriteMethod::probe());
    for address in [Address(0), Address(u64::MAX - 4), Address(1 << 63)] {
        let error = memory.read_vec(address, 16).unwrap_err();
        assert!(
            matches!(error, Error::Memory { operation: "reading", address: at, .. } if at == address),
            "{error}"
        );
        assert!(memory.write(address, b"x").is_err());
    }
    // A length that nobody has is not allocated.
    assert!(memory.read_vec(page, usize::MAX).is_err());
    let end = at(page, 2 * PAGE_SIZE);
    let maps = process.mappings().unwrap();
    if !maps.iter().any(|map| map.contains(end)) {
        let error = memory
            .read_vec(at(page, 2 * PAGE_SIZE - 8), 16)
            .unwrap_err();
        assert!(
            matches!(error, Error::Memory { address, length: 8, .. } if address == end),
            "{error}"
        );
    }
    subject.kill(libc::SIGKILL);
    subject.end();
    let error = memory.read_vec(page, 1).unwrap_err();
    assert!(matches!(error, Error::AddressSpaceGone { .. }), "{error}");
}

#[test]
fn a_thread_in_a_call_is_not_moved() {
    let (mut subject, tid) = Subject::ready("patterns read");
    subject.until_in_call(tid, libc::SYS_read);
    let mut stopped = stop_all(&subject.process(), patient()).unwrap();
    let mut registers = *stopped.registers(tid).unwrap();
    registers.rip += 1;
    let nr = libc::SYS_read as u64;
    let error = stopped.set_registers(tid, &registers).unwrap_err();
    assert!(
        matches!(error, Error::InSystemCall { nr: n, .. } if n == nr),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        format!("thread {tid} is in system call 0 (read) and can't be moved")
    );
    let nobody = ptrace_shim::Tid::from_raw(1);
    let error = stopped.set_registers(nobody, &registers).unwrap_err();
    assert!(matches!(error, Error::NotStopped { .. }), "{error}");
    stopped.resume().unwrap();
    subject.tell("x");
    assert_eq!(subject.line(), "kept");
}

#[test]
fn a_stopped_thread_writes_where_its_process_may_not() {
    let (subject, page) = code_subject();
    let process = subject.process();
    let leader = process.pid().leader();
    let thread = stop_thread(&process, leader, patient()).unwrap();
    let text: Vec<u8> = (0..100).collect();
    thread.write_memory(at(page, 1001), &text).unwrap();
    assert_eq!(thread.memory().read_vec(at(page, 1001), 100).unwrap(), text);
    assert_eq!(thread.memory().read_vec(at(page, 1101), 1).unwrap(), [0]);
}
