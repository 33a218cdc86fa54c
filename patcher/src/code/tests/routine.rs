//! The entry of the worker's own routine, and sites that were seen there.

use super::elf::{TABLE, TEXT, library};
use crate::code::{
    Executable, ImageAddress, Live, NoWindow, NotASite, Seen, StubError, Tail, WindowKind, analyse,
};

const TAIL: Tail = Tail::Routine {
    record: 0x1234_5678_9abc,
    bridge_entry: 0x7f00_0000_0040,
};

#[rustfmt::skip]
const ROUTINE: [u8; 16] = [
    0xf3, 0x0f, 0x1e, 0xfa,       // endbr64
    0x55,                         // push rbp
    0x41, 0x57,                   // push r15
    0x48, 0x8b, 0x05, 0x00, 0x10, 0x00, 0x00, // mov rax, [rip+0x1000]
    0xc3,                         // ret
    0x90,
];

fn executable(code: &[u8], size: u64) -> Executable {
    Executable::parse(&library(code, &[("routine", 0, size)], &[])).unwrap()
}

#[test]
fn the_stub_keeps_r11_for_the_bridge_and_the_rpc_goes_on_at_the_copies() {
    let code = executable(&ROUTINE, 15);
    let window = code.window(ImageAddress(TEXT)).unwrap();
    assert_eq!(window.start, ImageAddress(TEXT + 4), "behind the endbr64");
    assert_eq!(window.before, ROUTINE[4..14]);
    assert_eq!((window.kind, window.branch), (WindowKind::Entry, 10));
    let (bias, at) = (0x5555_0000_0000, 0x5555_0000_1000);
    let stub = window.stub(bias, at, &TAIL).unwrap();
    let text: Vec<&str> = stub.listing.iter().map(|l| l.text.as_str()).collect();
    assert_eq!(text[0], "push r11");
    assert_eq!(text[1], "mov r11,123456789ABCh");
    assert_eq!(text[3], ".quad 0x7f0000000040");
    assert_eq!(text[4], "push rbp");
    assert_eq!(text[5], "push r15");
    assert_eq!(
        text[6],
        format!("mov rax,[{:X}h]", bias + TEXT + 14 + 0x1000)
    );
    assert_eq!(text[7], format!("jmp {:016X}h", bias + TEXT + 14));
    // The first copy is where the RPC goes on.
    assert_eq!(stub.boundaries[0], (0, stub.listing[4].offset));
    let after = window.after(bias, at).unwrap();
    assert_eq!(after.len(), 10);
    assert_eq!((after[0], &after[5..]), (0xe9, &[0xcc; 5][..]));
}

#[test]
fn the_tail_is_for_entries_alone() {
    let call = [0x49, 0x89, 0xe0, 0x90, 0x90, 0x90, 0xff, 0x55, 0x08, 0xc3];
    let file = library(&call, &[("f", 0, 10)], &[]);
    let map = analyse(&file).unwrap();
    let seen = Seen {
        return_address: TEXT + 9,
        registers: [0; 16],
    };
    let site = map.seen(&seen, 0, 0x77, &Nothing).unwrap();
    let window = map.seen_window(site, 0, &[]).unwrap();
    assert_eq!(
        window.stub(0, TEXT + 0x1000, &TAIL),
        Err(StubError::Mismatch)
    );
}

#[test]
fn a_routine_that_is_too_short_or_entered_in_its_first_bytes_has_no_window() {
    let short = executable(&[0x31, 0xc0, 0xc3, 0x55, 0xc3], 3);
    assert!(matches!(
        short.window(ImageAddress(TEXT)),
        Err(NoWindow::Short { .. })
    ));
    // push rbp; mov rbp, rsp; dec eax; jnz back behind the push
    let looped = [0x55, 0x48, 0x89, 0xe5, 0xff, 0xc8, 0x75, 0xf9, 0xc3];
    assert!(matches!(
        executable(&looped, 9).window(ImageAddress(TEXT)),
        Err(NoWindow::Entered { .. })
    ));
    // One to its start is none: who comes from there comes by the window.
    let again = [0x55, 0x48, 0x89, 0xe5, 0xff, 0xc8, 0x75, 0xf8, 0xc3];
    assert!(executable(&again, 9).window(ImageAddress(TEXT)).is_ok());
    assert!(
        matches!(
            executable(&ROUTINE, 15).window(ImageAddress(TEXT + 5)),
            Err(NoWindow::Undecodable { .. })
        ),
        "no function begins there"
    );
}

/// `main` that passes two functions to what a pointer leads to.
fn creating(second: i32) -> Executable {
    let mut code = vec![0x53, 0x48, 0x83, 0xec, 0x10]; // push rbx; sub rsp, 16
    let lea = |code: &mut Vec<u8>, register: u8, to: i32| {
        code.extend([0x48, 0x8d, register]);
        let end = code.len() as i32 + 4;
        code.extend((to - end).to_le_bytes());
    };
    lea(&mut code, 0x35, 0x40); // lea rsi, [invoke]
    lea(&mut code, 0x15, second); // lea rdx, [append]
    code.extend([0x48, 0x8d, 0x4c, 0x24, 0x08]); // lea rcx, [rsp+8]
    code.extend([0xff, 0x57, 0x10]); // call [rdi+10h]
    code.extend([0x48, 0x83, 0xc4, 0x10, 0x5b, 0xc3]); // add rsp, 16; pop rbx; ret
    code.resize(0x40, 0x90);
    code.extend([0x55, 0x5d, 0xc3]);
    code.resize(0x50, 0x90);
    code.extend([0x55, 0x5d, 0xc3]);
    let functions = [("main", 0, 0x30), ("invoke", 0x40, 3), ("append", 0x50, 3)];
    Executable::parse(&library(&code, &functions, &[])).unwrap()
}

#[test]
fn what_is_passed_to_create_is_told_by_the_call() {
    let invoke = ImageAddress(TEXT + 0x40);
    assert_eq!(creating(0x50).passed_to_create(), [invoke]);
    assert_eq!(
        creating(0x40).passed_to_create(),
        [],
        "the same function twice"
    );
    assert_eq!(
        creating(0x51).passed_to_create(),
        [],
        "no function begins there"
    );
    assert_eq!(
        creating((TABLE as i64 - TEXT as i64) as i32).passed_to_create(),
        [],
        "no function at all"
    );
}

struct Nothing;

impl Live for Nothing {
    fn word(&self, _: u64) -> Option<u64> {
        None
    }
    fn is_code(&self, _: u64) -> bool {
        false
    }
    fn is_stack(&self, _: u64) -> bool {
        false
    }
}

/// One word at one address.
struct Word(u64, u64);

impl Live for Word {
    fn word(&self, at: u64) -> Option<u64> {
        (at == self.0).then_some(self.1)
    }
    fn is_code(&self, at: u64) -> bool {
        (0x70_0000..0x80_0000).contains(&at)
    }
    fn is_stack(&self, at: u64) -> bool {
        at >= 0x7fff_0000
    }
}

const INVOKE: u64 = 0x70_0040;

#[derive(Debug)]
enum No {
    Site(NotASite),
    Window(NoWindow),
}

#[test]
fn a_call_that_was_seen_is_told_from_one_of_something_else() {
    #[rustfmt::skip]
    let code = [
        0x49, 0x89, 0xe0, 0x90, 0x90, 0x90, // mov r8, rsp; nops
        0xff, 0x55, 0x08,             // 6: call [rbp+8]
        0x4c, 0x8d, 0x4c, 0x24, 0x08, // 9: lea r9, [rsp+8]
        0x41, 0xff, 0xd2,             // 14: call r10
        0xe8, 0x00, 0x00, 0x00, 0x00, // 17: call the next
        0x50,                         // 22: push rax
        0xff, 0xd3,                   // 23: call rbx
        0xc3,
    ];
    let bias = 0x10_0000;
    let map = analyse(&library(&code, &[("f", 0, 26)], &[])).unwrap();
    let seen = |offset: u64| {
        let mut registers = [0; 16];
        registers[3] = INVOKE; // rbx
        registers[5] = 0x5000; // rbp
        registers[10] = INVOKE;
        Seen {
            return_address: bias + TEXT + offset,
            registers,
        }
    };
    let find = |seen: &Seen, live: &dyn Live, taken: &[(u64, u64)]| {
        let site = map.seen(seen, bias, INVOKE, live).map_err(No::Site)?;
        map.seen_window(site, bias, taken).map_err(No::Window)
    };
    let window = find(&seen(9), &Word(0x5008, INVOKE), &[]).unwrap();
    assert_eq!(window.before.last_chunk(), Some(&[0xff, 0x55, 0x08]));
    let elsewhere = find(&seen(9), &Word(0x5008, INVOKE + 8), &[]);
    assert!(
        matches!(elsewhere, Err(No::Site(NotASite::OtherTarget { .. }))),
        "another function is there"
    );
    assert!(
        find(&seen(9), &Word(0x5008, 7), &[]).is_ok(),
        "no code: used again since"
    );
    assert!(find(&seen(9), &Nothing, &[]).is_ok(), "unmapped since");
    let mut on_stack = seen(9);
    on_stack.registers[5] = 0x7fff_0100;
    assert!(
        find(&on_stack, &Word(0x7fff_0108, INVOKE + 8), &[]).is_ok(),
        "words there do not last"
    );

    assert!(find(&seen(17), &Nothing, &[]).is_ok());
    let mut other = seen(17);
    other.registers[10] = INVOKE + 16;
    assert!(matches!(
        find(&other, &Nothing, &[]),
        Err(No::Site(NotASite::OtherTarget { .. }))
    ));
    assert!(matches!(
        find(&seen(22), &Nothing, &[]),
        Err(No::Site(NotASite::Direct { .. }))
    ));
    assert!(matches!(
        find(&seen(25), &Nothing, &[]),
        Err(No::Window(NoWindow::Displaced { .. }))
    ));
    assert!(matches!(
        find(&seen(16), &Nothing, &[]),
        Err(No::Site(NotASite::NoCall { .. }))
    ));
    let far = find(&seen(0x9_0000), &Nothing, &[]);
    assert!(matches!(far, Err(No::Site(NotASite::NoCall { .. }))));

    let live = bias + TEXT;
    let taken = find(&seen(9), &Nothing, &[(live + 3, live + 9)]);
    assert!(
        matches!(taken, Err(No::Window(NoWindow::Overlap { .. }))),
        "{taken:?}"
    );
}

#[test]
fn the_jump_behind_a_direct_call_is_told_by_where_it_went() {
    #[rustfmt::skip]
    let code = [
        0xe8, 0x03, 0x00, 0x00, 0x00, // f: call g
        0x31, 0xc0,                   // 5: xor eax, eax
        0xc3,
        0x4c, 0x8b, 0x5f, 0x08,       // 8, g: mov r11, [rdi+8]
        0x48, 0x89, 0xc6,             // mov rsi, rax
        0x74, 0x03,                   // je behind the jump
        0x41, 0xff, 0xe3,             // 17: jmp r11
        0x48, 0x89, 0xd8,             // 20: mov rax, rbx
        0xff, 0xe0,                   // 23: jmp rax
        0x0f, 0x1f, 0x00,
    ];
    let functions = [("f", 0, 8), ("g", 8, 20)];
    let map = analyse(&library(&code, &functions, &[])).unwrap();
    let bias = 0x10_0000;
    let seen = |rax: u64, r11: u64| {
        let mut registers = [0; 16];
        (registers[0], registers[11]) = (rax, r11);
        let seen = Seen {
            return_address: bias + TEXT + 5,
            registers,
        };
        map.seen(&seen, bias, INVOKE, &Nothing)
    };
    let site = seen(1, INVOKE).unwrap();
    assert_eq!(site.at, ImageAddress(TEXT + 17));
    let window = map.seen_window(site, bias, &[]).unwrap_err();
    assert!(matches!(window, NoWindow::Displaced { .. }), "{window:?}");
    let site = seen(INVOKE, 1).unwrap();
    assert_eq!(site.at, ImageAddress(TEXT + 23));
    let window = map.seen_window(site, bias, &[]).unwrap();
    assert_eq!(window.kind, WindowKind::Jump);
    for (rax, r11) in [(1, 1), (INVOKE, INVOKE)] {
        assert!(
            matches!(seen(rax, r11), Err(NotASite::Direct { .. })),
            "none or more than one"
        );
    }
}

/// A function that is called directly and whose `jump` goes through rax, then
/// one that it goes on in, whose jump goes through r11. Which of them is taken
/// for the one that made the RPC, if it was through one of these registers.
fn seen_behind(jump: &[u8], table: &[i32], through: &[usize]) -> Option<u64> {
    #[rustfmt::skip]
    let mut code = vec![
        0xe8, 0x03, 0x00, 0x00, 0x00, // f: call g
        0x31, 0xc0,                   // 5: xor eax, eax
        0xc3,
        0x48, 0x83, 0xf9, 0x05,       // 8, g: cmp rcx, 5
        0x0f, 0x87, 0x2e, 0x00, 0x00, 0x00, // ja h
    ];
    code.extend(jump);
    code.resize(0x40, 0xcc);
    #[rustfmt::skip]
    code.extend([
        0x4c, 0x8b, 0x5f, 0x08,       // 64, h: mov r11, [rdi+8]
        0x48, 0x8b, 0x3f,             // mov rdi, [rdi]
        0x41, 0xff, 0xe3,             // 71: jmp r11
    ]);
    let functions = [("f", 0, 8), ("g", 8, 10 + jump.len() as u64), ("h", 64, 10)];
    let map = analyse(&library(&code, &functions, table)).unwrap();
    let mut registers = [0; 16];
    for register in through {
        registers[*register] = INVOKE;
    }
    let seen = Seen {
        return_address: TEXT + 5,
        registers,
    };
    match map.seen(&seen, 0, INVOKE, &Nothing) {
        Ok(site) => Some(site.at.0 - TEXT),
        Err(NotASite::Direct { .. }) => None,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_switch_is_not_taken_for_the_jump_that_made_the_rpc() {
    // lea rax, [TABLE]; movsxd r10, [rax+4*rcx]; add rax, r10; jmp rax; ret
    let switch = |behind: &[u8]| {
        let mut bytes = vec![0x48, 0x8d, 0x05];
        let end = TEXT + 18 + 7;
        bytes.extend((TABLE.wrapping_sub(end) as u32).to_le_bytes());
        bytes.extend([0x4c, 0x63, 0x14, 0x88, 0x4c, 0x01, 0xd0]);
        bytes.extend(behind);
        bytes.extend([0xff, 0xe0, 0xc3]);
        bytes
    };
    let to = |bytes: &[u8]| (TEXT + 18 + bytes.len() as u64 - 1).wrapping_sub(TABLE) as i32;
    let (rax, r11) = (0, 11);
    // not rax; not rax: that it comes from the table is lost.
    for (behind, told) in [
        (&[][..], true),
        (&[0x48, 0xf7, 0xd0, 0x48, 0xf7, 0xd0], false),
    ] {
        let jump = switch(behind);
        let table = [to(&jump); 6];
        assert_eq!(seen_behind(&jump, &table, &[rax]), None, "{told}");
        assert_eq!(seen_behind(&jump, &table, &[r11]), Some(71), "{told}");
        let both = seen_behind(&jump, &table, &[rax, r11]);
        assert_eq!(both, told.then_some(71));
    }
    // mov rax, rbx; lea rbx, [the ret]; jmp rax; ret: a computed goto.
    let goto = [
        0x48, 0x89, 0xd8, 0x48, 0x8d, 0x1d, 0x02, 0, 0, 0, 0xff, 0xe0, 0xc3,
    ];
    assert_eq!(seen_behind(&goto, &[], &[rax]), None);
    // push rbx; jmp rax: in mid-frame.
    assert_eq!(seen_behind(&[0x53, 0xff, 0xe0], &[], &[rax]), None);
    // notrack jmp rax
    assert_eq!(seen_behind(&[0x3e, 0xff, 0xe0], &[], &[rax]), None);
    // jmp rax: it, unless both went there.
    assert_eq!(seen_behind(&[0xff, 0xe0], &[], &[rax]), Some(18));
    assert_eq!(seen_behind(&[0xff, 0xe0], &[], &[rax, r11]), None);
}
