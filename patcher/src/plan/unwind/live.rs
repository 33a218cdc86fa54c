//! The tables with the unwinder that they are for: this process's libgcc takes
//! a trap at every instruction on the way through a stub, and unwinds from
//! there.
//!
//! What it must find is what it finds where the same code runs unchanged: at
//! the original instruction, in the same frame, and so on up.

use std::arch::global_asm;
use std::cell::RefCell;
use std::ffi::{c_int, c_void};

use super::{Led, eh_frames, frames};
use crate::code::{Hop, ImageAddress, Tail, Target, Window, WindowKind};

// Each function gets in rdi what to call. `.cfi` says to the assembler what
// compilers would; filler stands before a function that begins aligned.
global_asm!(
    ".text",
    ".globl unwind_test_called",
    ".hidden unwind_test_called",
    ".globl unwind_test_called_window",
    ".hidden unwind_test_called_window",
    ".globl unwind_test_called_end",
    ".hidden unwind_test_called_end",
    ".globl unwind_test_pushed",
    ".hidden unwind_test_pushed",
    ".globl unwind_test_pushed_window",
    ".hidden unwind_test_pushed_window",
    ".globl unwind_test_pushed_end",
    ".hidden unwind_test_pushed_end",
    ".globl unwind_test_hopped",
    ".hidden unwind_test_hopped",
    ".globl unwind_test_hopped_window",
    ".hidden unwind_test_hopped_window",
    ".globl unwind_test_hopped_end",
    ".hidden unwind_test_hopped_end",
    ".globl unwind_test_filler",
    ".hidden unwind_test_filler",
    ".globl unwind_test_jumped",
    ".hidden unwind_test_jumped",
    ".globl unwind_test_jumped_window",
    ".hidden unwind_test_jumped_window",
    ".globl unwind_test_jumped_end",
    ".hidden unwind_test_jumped_end",
    ".globl unwind_test_callee",
    ".hidden unwind_test_callee",
    ".globl unwind_test_enter",
    ".hidden unwind_test_enter",
    ".globl unwind_test_step",
    ".hidden unwind_test_step",
    ".globl unwind_test_step_end",
    ".hidden unwind_test_step_end",
    ".balign 4096, 0xcc",
    // The frame pointer is made in the window.
    "unwind_test_called:",
    ".cfi_startproc",
    "mov rax, rdi",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "unwind_test_called_window:",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "call rax",
    "unwind_test_called_end:",
    "pop rbp",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_endproc",
    // Arguments are pushed.
    ".balign 16",
    "unwind_test_pushed:",
    ".cfi_startproc",
    "push rbx",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbx, -16",
    "mov rbx, rdi",
    "unwind_test_pushed_window:",
    "push r12",
    ".cfi_def_cfa_offset 24",
    ".cfi_offset r12, -24",
    "push rbx",
    ".cfi_def_cfa_offset 32",
    "call [rsp]",
    "unwind_test_pushed_end:",
    "add rsp, 8",
    ".cfi_def_cfa_offset 24",
    "pop r12",
    ".cfi_def_cfa_offset 16",
    ".cfi_restore r12",
    "pop rbx",
    ".cfi_def_cfa_offset 8",
    "ret",
    ".cfi_endproc",
    // The call is a branch target.
    ".balign 16",
    "unwind_test_hopped:",
    ".cfi_startproc",
    "sub rsp, 24",
    ".cfi_def_cfa_offset 32",
    "cmp rdi, rsi",
    "jne 2f",
    "2:",
    "unwind_test_hopped_window:",
    "call rdi",
    "unwind_test_hopped_end:",
    "add rsp, 24",
    ".cfi_def_cfa_offset 8",
    "ret",
    ".cfi_endproc",
    "unwind_test_filler:",
    ".balign 16, 0xcc",
    "nop dword ptr [rax + 0]",
    ".balign 16",
    // A tail jump.
    "unwind_test_jumped:",
    ".cfi_startproc",
    "push rbx",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbx, -16",
    "mov rbx, rdi",
    "mov rax, rbx",
    "unwind_test_jumped_window:",
    "pop rbx",
    ".cfi_def_cfa_offset 8",
    ".cfi_restore rbx",
    "jmp rax",
    "nop",
    "nop",
    "unwind_test_jumped_end:",
    ".cfi_endproc",
    ".balign 16",
    "unwind_test_callee:",
    ".cfi_startproc",
    "ret",
    ".cfi_endproc",
    // Nobody else's code in what is made writable.
    ".balign 4096, 0xcc",
    // What a stub enters, where it takes the RPC.
    "unwind_test_enter:",
    ".cfi_startproc",
    ".cfi_def_cfa_offset 16",
    "pop r11",
    ".cfi_def_cfa_offset 8",
    "jmp r11",
    ".cfi_endproc",
    // Calls rdi with rsi, a trap after each instruction.
    "unwind_test_step:",
    ".cfi_startproc",
    "push rbx",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbx, -16",
    "mov rax, rdi",
    "mov rdi, rsi",
    "pushfq",
    ".cfi_def_cfa_offset 24",
    "or dword ptr [rsp], 0x100",
    "popfq",
    ".cfi_def_cfa_offset 16",
    "call rax",
    "pushfq",
    ".cfi_def_cfa_offset 24",
    "and dword ptr [rsp], ~0x100",
    "popfq",
    ".cfi_def_cfa_offset 16",
    "pop rbx",
    ".cfi_def_cfa_offset 8",
    "ret",
    ".cfi_endproc",
    "unwind_test_step_end:",
);

unsafe extern "C" {
    safe static unwind_test_called: u8;
    safe static unwind_test_called_window: u8;
    safe static unwind_test_called_end: u8;
    safe static unwind_test_pushed: u8;
    safe static unwind_test_pushed_window: u8;
    safe static unwind_test_pushed_end: u8;
    safe static unwind_test_hopped: u8;
    safe static unwind_test_hopped_window: u8;
    safe static unwind_test_hopped_end: u8;
    safe static unwind_test_filler: u8;
    safe static unwind_test_jumped: u8;
    safe static unwind_test_jumped_window: u8;
    safe static unwind_test_jumped_end: u8;
    safe static unwind_test_callee: u8;
    safe static unwind_test_enter: u8;
    safe static unwind_test_step_end: u8;
    fn unwind_test_step(function: u64, argument: u64);

    // libgcc's, which the standard library links.
    fn __register_frame(begin: *const u8);
    fn _Unwind_Backtrace(
        trace: extern "C" fn(*mut c_void, *mut c_void) -> c_int,
        argument: *mut c_void,
    ) -> c_int;
    fn _Unwind_GetIPInfo(context: *mut c_void, before: *mut c_int) -> u64;
    fn _Unwind_GetCFA(context: *mut c_void) -> u64;
}

fn at(symbol: &u8) -> u64 {
    std::ptr::from_ref(symbol) as u64
}

/// A frame: instruction, whether it is still to be run, stack pointer.
type Found = (u64, bool, u64);

/// A step: frames from the interrupted one up to the stepper's.
type Step = Vec<Found>;

thread_local! {
    static STEPS: RefCell<Vec<Step>> = const { RefCell::new(Vec::new()) };
}

extern "C" fn frame(context: *mut c_void, to: *mut c_void) -> c_int {
    // SAFETY: the context is the unwinder's, `to` what `trapped` gave.
    unsafe {
        let mut before = 0;
        let ip = _Unwind_GetIPInfo(context, &raw mut before);
        (*to.cast::<Step>()).push((ip, before != 0, _Unwind_GetCFA(context)));
    }
    0
}

/// The trap's handler. It interrupts only code of the tests' own.
extern "C" fn trapped(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    let mut all: Step = Vec::with_capacity(64);
    // SAFETY: the kernel's context; the frames end at the thread's start.
    let rip = unsafe {
        _Unwind_Backtrace(frame, (&raw mut all).cast());
        (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] as u64
    };
    let stepper = unwind_test_step as *const () as u64..at(&unwind_test_step_end);
    if stepper.contains(&rip) {
        return;
    }
    // Behind the handler and the kernel's frame.
    let interrupted = all.iter().position(|(ip, ..)| *ip == rip);
    let all = all.split_off(interrupted.unwrap_or(all.len()));
    let length = all.iter().position(|(ip, ..)| stepper.contains(ip));
    let length = length.map_or(all.len(), |index| index + 1);
    STEPS.with_borrow_mut(|steps| steps.push(all[..length].to_vec()));
}

/// Runs a function with a trap at each instruction.
fn steps(function: u64) -> Vec<Step> {
    STEPS.with_borrow_mut(|steps| {
        steps.clear();
        steps.reserve(256);
    });
    // SAFETY: the function calls the callee, and nothing else.
    unsafe { unwind_test_step(function, at(&unwind_test_callee)) };
    STEPS.with_borrow_mut(std::mem::take)
}

fn install() {
    // SAFETY: nobody else in this program uses the trap.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = trapped as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGTRAP, &raw const action, std::ptr::null_mut()),
            0
        );
    }
}

const PAGE: u64 = 4096;
/// `push rdi; call [rsp]; pop rdi; ret`: something that has a table of its own.
const IMAGE: [u8; 7] = [0x57, 0xff, 0x14, 0x24, 0x5f, 0xc3, 0xcc];

/// Makes code writable, writes, and makes it executable again.
fn write(to: u64, bytes: &[u8]) {
    let page = (to & !(PAGE - 1)) as *mut c_void;
    // SAFETY: pages of these tests' alone, run by nobody meanwhile.
    unsafe {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mprotect(page, PAGE as usize, rw), 0);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len());
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        assert_eq!(libc::mprotect(page, PAGE as usize, rx), 0);
    }
}

/// Pages below the code, in reach of it.
fn island() -> u64 {
    for step in 1..512_u64 {
        let hint = (at(&unwind_test_called) & !(PAGE - 1)) - (step << 21);
        // SAFETY: takes no memory that is in use.
        let mapped = unsafe {
            libc::mmap(
                hint as *mut c_void,
                4 * PAGE as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if mapped as u64 == hint {
            return hint;
        }
    }
    panic!("no room below the code");
}

fn read(from: u64, to: u64) -> Vec<u8> {
    // SAFETY: the tests' own code.
    unsafe { std::slice::from_raw_parts(from as *const u8, (to - from) as usize).to_vec() }
}

fn register(tables: Vec<u8>) {
    let tables = Vec::leak(tables);
    let mut at = 0;
    let length = |at: usize| u32::from_le_bytes(*tables[at..].first_chunk().unwrap()) as usize;
    while length(at) != 0 {
        // SAFETY: zero-terminated, and never freed.
        unsafe { __register_frame(tables[at..].as_ptr()) };
        let mut end = at;
        while length(end) != 0 {
            end += 4 + length(end);
        }
        at = end + 4;
    }
}

struct Case {
    function: u64,
    window: Window,
}

fn window(kind: WindowKind, target: Target, start: &u8, end: &u8, branch: u64) -> Window {
    Window {
        start: ImageAddress(at(start)),
        before: read(at(start), at(end)),
        kind,
        target,
        branch: branch as u8,
        hop: None,
    }
}

fn cases() -> [Case; 4] {
    let called = window(
        WindowKind::Call,
        Target::Register(0),
        &unwind_test_called_window,
        &unwind_test_called_end,
        3,
    );
    let pushed = window(
        WindowKind::JumpedCall,
        Target::Memory,
        &unwind_test_pushed_window,
        &unwind_test_pushed_end,
        3,
    );
    let mut hopped = window(
        WindowKind::JumpedCall,
        Target::Register(7),
        &unwind_test_hopped_window,
        &unwind_test_hopped_end,
        0,
    );
    let filler = at(&unwind_test_filler);
    hopped.hop = Some(Hop {
        at: ImageAddress(filler),
        before: read(filler, filler + 5),
    });
    let jumped = window(
        WindowKind::Jump,
        Target::Register(0),
        &unwind_test_jumped_window,
        &unwind_test_jumped_end,
        1,
    );
    let case = |function: &u8, window| Case {
        function: at(function),
        window,
    };
    [
        case(&unwind_test_called, called),
        case(&unwind_test_pushed, pushed),
        case(&unwind_test_hopped, hopped),
        case(&unwind_test_jumped, jumped),
    ]
}

#[test]
fn libgcc_finds_the_frame_of_the_original_at_every_instruction_of_a_stub() {
    install();
    let island = island();
    let cases = cases();
    let mut all_frames = Vec::new();
    let mut code = Vec::new();
    let mut ways = Vec::new();
    for case in &cases {
        let stub_at = island + 2 * PAGE + code.len() as u64;
        let tail = Tail::Bridge {
            site_record: 0,
            bridge_entry: at(&unwind_test_enter),
        };
        let stub = case.window.stub(0, stub_at, &tail).unwrap();
        let led = Led {
            window: &case.window,
            bias: 0,
            stub: stub_at,
        };
        all_frames.extend(frames(&led, &stub));
        code.extend(&stub.bytes);
        code.resize(code.len().next_multiple_of(16), 0xcc);
        ways.push((stub_at, stub));
    }
    // An image's code lies between the stubs and the library.
    let image = island + 3 * PAGE;
    write(image, &IMAGE);
    let original = at(&unwind_test_callee);
    register(eh_frames(&[super::StubFrame {
        start: image,
        len: IMAGE.len() as u64,
        rows: vec![(0, 0, original), (1, 8, original), (5, 0, original)],
        filler: false,
    }]));
    register(eh_frames(&all_frames));
    let of_image = steps(image);
    assert_eq!(of_image.len(), 5, "{of_image:x?}");
    for step in of_image.iter().filter(|step| step[0].0 != original) {
        let ips: Vec<u64> = step.iter().map(|(ip, ..)| *ip).collect();
        let stepper = unwind_test_step as *const () as u64..at(&unwind_test_step_end);
        assert_eq!(ips.len(), 3, "{ips:x?}");
        assert!(ips[1] == original && stepper.contains(&ips[2]), "{ips:x?}");
    }

    for (case, (stub_at, stub)) in cases.iter().zip(&ways) {
        let unchanged = steps(case.function);
        write(*stub_at, &stub.bytes);
        if let Some(hop) = &case.window.hop {
            write(
                hop.at.0,
                &case.window.hop_after(0, *stub_at).unwrap().unwrap(),
            );
        }
        write(
            case.window.start.0,
            &case.window.after(0, *stub_at).unwrap(),
        );
        let patched = steps(case.function);
        write(case.window.start.0, &case.window.before);
        if let Some(hop) = &case.window.hop {
            write(hop.at.0, &hop.before);
        }

        let start = case.window.start.0;
        let end = start + case.window.before.len() as u64;
        let stub_end = stub_at + stub.bytes.len() as u64;
        let at_original = |ip: u64| unchanged.iter().find(|step| step[0].0 == ip);
        let mut passed = 0;
        for step in &patched {
            let (ip, before, _) = step[0];
            assert!(before);
            let filler = case.window.hop.as_ref().is_some_and(|hop| hop.at.0 == ip);
            let rest = if (*stub_at..stub_end).contains(&ip) || filler {
                passed += 1;
                &step[1..]
            } else if (start..end).contains(&ip) {
                // No-operations before our call stand for the window's start.
                &step[..]
            } else {
                continue;
            };
            let offset = ip.wrapping_sub(*stub_at);
            let original = match ip {
                _ if filler => start + u64::from(case.window.branch),
                _ if ip >= start && ip < end => start,
                _ => {
                    let copies = stub.boundaries.iter().rev();
                    let mut copies = copies.filter(|(_, to)| u64::from(*to) <= offset);
                    start + u64::from(copies.next().unwrap().0)
                }
            };
            let mut expected = at_original(original).unwrap().clone();
            expected[0].0 = if rest.len() == step.len() {
                ip
            } else {
                original
            };
            assert_eq!(
                rest, expected,
                "{:?} at {ip:#x}, {offset:#x} in the stub, for {original:#x}",
                case.window.kind
            );
        }
        // Up to the jump into the bridge.
        let code = stub
            .listing
            .iter()
            .filter(|l| !l.text.starts_with('.'))
            .count();
        let hops = usize::from(case.window.hop.is_some());
        assert_eq!(passed, code + hops, "{:?}: {patched:x?}", case.window.kind);
        // Behind it everything is as it was.
        let callee = |steps: &[Step]| -> Vec<Step> {
            let at_callee = |step: &&Step| step[0].0 == at(&unwind_test_callee);
            steps.iter().filter(at_callee).cloned().collect()
        };
        assert_eq!(callee(&patched), callee(&unchanged));
    }
}
