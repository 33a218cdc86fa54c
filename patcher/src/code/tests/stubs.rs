use super::disassemble;
use crate::code::{Hop, ImageAddress, OutOfReach, StubError, Tail, Target, Window, WindowKind};

const BIAS: u64 = 0x7f00_0000_0000;
const STUB: u64 = BIAS - 0x10_0000;
const BRIDGE: Tail = Tail::Bridge {
    site_record: 0x1122_3344_5566_7788,
    bridge_entry: 0x7000_dead_0000,
};

fn window(kind: WindowKind, before: &[u8], branch: u8, target: Target) -> Window {
    Window {
        start: ImageAddress(0x11a0),
        before: before.to_vec(),
        kind,
        target,
        branch,
        hop: None,
    }
}

/// The disassembly of a stub for the bridge, without its two last lines,
/// which are always the same.
fn bridge_stub(window: &Window) -> Vec<String> {
    let stub = window.stub(BIAS, STUB, &BRIDGE).expect("in reach");
    let (code, quad) = stub.bytes.split_at(stub.bytes.len() - 8);
    assert_eq!(quad, 0x7000_dead_0000_u64.to_le_bytes());
    let mut lines = disassemble(code, STUB);
    let behind = STUB + code.len() as u64;
    assert_eq!(lines.pop(), Some(format!("jmp qword ptr [{behind:X}h]")));
    assert_eq!(lines.pop().as_deref(), Some("mov r11, 1122334455667788h"));
    // The listing says the same, byte for byte.
    let listed: Vec<u8> = stub.listing.iter().flat_map(|l| l.bytes.clone()).collect();
    assert_eq!(listed, stub.bytes);
    for line in &stub.listing {
        assert_eq!(
            stub.bytes[line.offset as usize..][..line.bytes.len()],
            line.bytes
        );
    }
    lines
}

#[test]
fn gcc_o2() {
    // mov r8, rsp; call [rbp+8]
    let w = window(
        WindowKind::Call,
        &[0x49, 0x89, 0xe0, 0xff, 0x55, 0x08],
        3,
        Target::Memory,
    );
    assert_eq!(
        bridge_stub(&w),
        ["lea r8, [rsp+8]", "push qword ptr [rbp+8]"]
    );
    let stub = w.stub(BIAS, STUB, &BRIDGE).expect("in reach");
    assert_eq!(stub.boundaries, [(0, 0), (3, 5)]);
    let after = w.after(BIAS, STUB).expect("in reach");
    assert_eq!(
        disassemble(&after, BIAS + 0x11a0),
        ["nop", "call 00007EFFFFF00000h"]
    );
    assert_eq!(after.len(), w.before.len());
}

#[test]
fn clang_o2() {
    // lea r9, [rsp+8]; call [rbx+8]
    let bytes = [0x4c, 0x8d, 0x4c, 0x24, 0x08, 0xff, 0x53, 0x08];
    let w = window(WindowKind::Call, &bytes, 5, Target::Memory);
    assert_eq!(
        bridge_stub(&w),
        ["lea r9, [rsp+10h]", "push qword ptr [rbx+8]"]
    );
}

#[test]
fn gcc_o0() {
    // mov rdi, rax; call r10
    let w = window(
        WindowKind::Call,
        &[0x48, 0x89, 0xc7, 0x41, 0xff, 0xd2],
        3,
        Target::Register(10),
    );
    assert_eq!(bridge_stub(&w), ["mov rdi, rax", "push r10"]);
}

#[test]
fn the_target_is_read_before_r11_is_lost() {
    let w = window(
        WindowKind::Call,
        &[0x48, 0x89, 0xc7, 0x41, 0xff, 0xd3],
        3,
        Target::Register(11),
    );
    assert_eq!(bridge_stub(&w), ["mov rdi, rax", "push r11"]);
    let w = window(
        WindowKind::Call,
        &[0x48, 0x89, 0xc7, 0x41, 0xff, 0x53, 0x10],
        3,
        Target::Memory,
    );
    assert_eq!(
        bridge_stub(&w),
        ["mov rdi, rax", "push qword ptr [r11+10h]"]
    );
}

#[test]
fn operands_on_the_stack_move_by_the_return_address() {
    // mov [rsp+78h], rax; call [rsp+78h]: the displacement outgrows a byte
    let bytes = [0x48, 0x89, 0x44, 0x24, 0x78, 0xff, 0x54, 0x24, 0x78];
    let w = window(WindowKind::Call, &bytes, 5, Target::Memory);
    assert_eq!(
        bridge_stub(&w),
        ["mov [rsp+80h], rax", "push qword ptr [rsp+80h]"]
    );
    // lea rdi, [rsp+rax*8-8]: an address, nothing is read there
    let bytes = [0x48, 0x8d, 0x7c, 0xc4, 0xf8, 0xff, 0x14, 0x24];
    let w = window(WindowKind::Call, &bytes, 5, Target::Memory);
    assert_eq!(
        bridge_stub(&w),
        ["lea rdi, [rsp+rax*8]", "push qword ptr [rsp+8]"]
    );
}

#[test]
fn tail_jumps_push_nothing() {
    // pop rbx; mov rax, [rsp-8]; jmp [rsp+20h]
    let bytes = [0x5b, 0x48, 0x8b, 0x44, 0x24, 0xf8, 0xff, 0x64, 0x24, 0x20];
    let w = window(WindowKind::Jump, &bytes, 6, Target::Memory);
    assert_eq!(
        bridge_stub(&w),
        ["pop rbx", "mov rax, [rsp-8]", "push qword ptr [rsp+20h]"]
    );
    let after = w.after(BIAS, STUB).expect("in reach");
    assert_eq!(
        disassemble(&after, BIAS + 0x11a0),
        [
            "jmp 00007EFFFFF00000h",
            "int3",
            "int3",
            "int3",
            "int3",
            "int3"
        ]
    );
}

#[test]
fn a_call_that_is_jumped_from_finds_its_return_address_pushed() {
    // push rbx; push r12; call [rsp+10h]
    let bytes = [0x53, 0x41, 0x54, 0xff, 0x54, 0x24, 0x10];
    let w = window(WindowKind::JumpedCall, &bytes, 3, Target::Memory);
    let stub = w.stub(BIAS, STUB, &BRIDGE).expect("in reach");
    let (code, back) = stub.bytes.split_at(stub.bytes.len() - 8);
    let behind = BIAS + 0x11a0 + bytes.len() as u64;
    assert_eq!(back, behind.to_le_bytes());
    let lines = disassemble(&code[..code.len() - 8], STUB);
    assert_eq!(
        lines[..4],
        [
            "push rbx".to_owned(),
            "push r12".to_owned(),
            format!("push qword ptr [{:X}h]", STUB + code.len() as u64),
            "push qword ptr [rsp+18h]".to_owned(),
        ]
    );
    assert_eq!(stub.boundaries, [(0, 0), (1, 1), (3, 3)]);
    let listed: Vec<u8> = stub.listing.iter().flat_map(|l| l.bytes.clone()).collect();
    assert_eq!(listed, stub.bytes);
    let after = w.after(BIAS, STUB).expect("in reach");
    assert_eq!(
        disassemble(&after, BIAS + 0x11a0),
        ["jmp 00007EFFFFF00000h", "int3", "int3"]
    );
}

#[test]
fn a_window_too_short_for_a_jump_hops_through_filler() {
    // call [rbx+8], and filler before or behind it
    for at in [0x11a0 - 126, 0x1240_u64] {
        let mut w = window(
            WindowKind::JumpedCall,
            &[0xff, 0x53, 0x08],
            0,
            Target::Memory,
        );
        w.hop = Some(Hop {
            at: ImageAddress(at),
            before: vec![0x90; 5],
        });
        let after = w.after(BIAS, STUB);
        if at == 0x1240 {
            let error = after.expect_err("too far");
            assert_eq!((error.to, error.by), (BIAS + at, 30));
            continue;
        }
        assert_eq!(
            disassemble(&after.expect("in reach"), BIAS + 0x11a0),
            [format!("jmp short {:016X}h", BIAS + at), "int3".to_owned()]
        );
        let hop = w.hop_after(BIAS, STUB).expect("in reach").expect("a hop");
        assert_eq!(disassemble(&hop, BIAS + at), ["jmp 00007EFFFFF00000h"]);
        let stub = w.stub(BIAS, STUB, &BRIDGE).expect("in reach");
        assert_eq!(stub.boundaries, [(0, 0)]);
    }
}

#[test]
fn rip_relative_operands_are_rebased() {
    // lea rsi, [rip+0e6fh]; call [rip+2e00h]
    let bytes = [
        0x48, 0x8d, 0x35, 0x6f, 0x0e, 0, 0, 0xff, 0x15, 0, 0x2e, 0, 0,
    ];
    let w = window(WindowKind::Call, &bytes, 7, Target::Memory);
    assert_eq!(
        bridge_stub(&w),
        ["lea rsi, [7F0000002016h]", "push qword ptr [7F0000003FADh]"]
    );
}

#[test]
fn retpolines_push_the_thunk_s_register() {
    let w = window(
        WindowKind::Call,
        &[0xe8, 0x69, 0, 0, 0],
        0,
        Target::Register(0),
    );
    assert_eq!(bridge_stub(&w), ["push rax"]);
    let w = window(
        WindowKind::Jump,
        &[0xe9, 0x69, 0, 0, 0],
        0,
        Target::Register(11),
    );
    assert_eq!(bridge_stub(&w), ["push r11"]);
}

#[test]
fn notrack_and_bnd_are_not_pushed() {
    // notrack bnd call [rbx+8]
    let w = window(
        WindowKind::Call,
        &[0x3e, 0xf2, 0xff, 0x53, 0x08],
        0,
        Target::Memory,
    );
    assert_eq!(bridge_stub(&w), ["push qword ptr [rbx+8]"]);
    // A segment that means something stays: call fs:[10h]
    let w = window(
        WindowKind::Call,
        &[0x64, 0xff, 0x14, 0x25, 0x10, 0, 0, 0],
        0,
        Target::Memory,
    );
    assert_eq!(bridge_stub(&w), ["push qword ptr fs:[10h]"]);
}

#[test]
fn every_filler_ends_where_the_call_ended() {
    for length in 5..=19_u8 {
        let mut bytes = vec![0x90; usize::from(length) - 2];
        bytes.extend([0xff, 0xd0]);
        let w = window(WindowKind::Call, &bytes, length - 2, Target::Register(0));
        let after = w.after(BIAS, STUB).expect("in reach");
        assert_eq!(after.len(), usize::from(length));
        let lines = disassemble(&after, BIAS + 0x11a0);
        let (call, filler) = lines.split_last().expect("not empty");
        assert_eq!(call, "call 00007EFFFFF00000h");
        assert!(
            filler
                .iter()
                .all(|l| l.contains("nop") || l == "xchg ax, ax"),
            "{filler:?}"
        );
        assert!(filler.len() <= 2, "{filler:?}");
    }
}

const CALLED: Tail = Tail::Called {
    flag: 0x1_2345_6789,
    record: 0x7000_0000_0000,
    bridge_entry: 0x7000_0000_1000,
};

#[test]
fn a_flag_decides_whether_an_entry_leads_to_the_bridge() {
    // push rbx; mov rbx, rdi; mov rcx, rdx
    let bytes = [0x53, 0x48, 0x89, 0xfb, 0x48, 0x89, 0xd1];
    let w = window(WindowKind::Entry, &bytes, 7, Target::Next);
    let stub = w.stub(BIAS, STUB, &CALLED).expect("in reach");
    let (code, quad) = stub.bytes.split_at(stub.bytes.len() - 8);
    assert_eq!(quad, 0x7000_0000_1000_u64.to_le_bytes());
    let slow = STUB + code.len() as u64 - 18;
    assert_eq!(
        disassemble(code, STUB),
        [
            "push r11",
            "mov r11, 123456789h",
            "cmp byte ptr [r11], 0",
            "pop r11",
            &format!("jne {slow:016X}h"),
            "push rbx",
            "mov rbx, rdi",
            "mov rcx, rdx",
            "jmp 00007F00000011A7h",
            "push r11",
            "mov r11, 700000000000h",
            &format!("jmp qword ptr [{:X}h]", STUB + code.len() as u64),
        ]
    );
    assert_eq!(
        stub.boundaries.iter().map(|b| b.0).collect::<Vec<_>>(),
        [0, 1, 4, 7]
    );
}

#[test]
fn branches_at_an_entry_are_widened() {
    // test edi, edi; je +10h; nop
    let w = window(
        WindowKind::Entry,
        &[0x85, 0xff, 0x74, 0x10, 0x90],
        5,
        Target::Next,
    );
    let stub = w.stub(BIAS, STUB, &CALLED).expect("in reach");
    let at = stub.boundaries[1].1 as usize;
    assert_eq!(
        disassemble(&stub.bytes[at..at + 6], STUB + at as u64),
        ["je 00007F00000011B4h"]
    );
}

#[test]
fn a_call_at_an_entry_returns_where_it_always_did() {
    // push rax; call +20h
    let w = window(
        WindowKind::Entry,
        &[0x50, 0xe8, 0x20, 0, 0, 0],
        6,
        Target::Next,
    );
    let stub = w.stub(BIAS, STUB, &CALLED).expect("in reach");
    assert_eq!(stub.boundaries.len(), 2, "nothing goes on behind the call");
    let (offset, at) = stub.boundaries[1];
    assert_eq!(offset, 1);
    let at = at as usize;
    let words = STUB + at as u64 + 12;
    assert_eq!(
        disassemble(&stub.bytes[at..at + 12], STUB + at as u64),
        [
            format!("push qword ptr [{:X}h]", words + 8),
            format!("jmp qword ptr [{words:X}h]"),
        ]
    );
    let end = BIAS + 0x11a6;
    let quads = [end + 0x20, end].map(u64::to_le_bytes).concat();
    assert_eq!(stub.bytes[at + 12..at + 28], quads);
    assert_eq!(w.after(BIAS, STUB).expect("in reach").len(), 6);
}

#[test]
fn what_is_out_of_reach_says_by_how_much() {
    let w = window(
        WindowKind::Call,
        &[0xe8, 0x69, 0, 0, 0],
        0,
        Target::Register(0),
    );
    let end = BIAS + 0x11a5;
    let far = end + (1 << 31);
    assert_eq!(
        w.after(BIAS, far),
        Err(OutOfReach {
            from: end,
            to: far,
            by: 1
        })
    );
    assert_eq!(
        OutOfReach {
            from: end,
            to: far,
            by: 1
        }
        .to_string(),
        "from 0x7f00000011a5 to 0x7f00800011a5 overruns rel32 by 0x1"
    );
    w.after(BIAS, far - 1).expect("the last byte in reach");
    w.after(BIAS, end - (1 << 31))
        .expect("the first byte in reach");
    // lea rsi, [rip+0e6fh] can't be re-based that far
    let bytes = [0x48, 0x8d, 0x35, 0x6f, 0x0e, 0, 0, 0xff, 0xd0];
    let w = window(WindowKind::Call, &bytes, 7, Target::Register(0));
    assert!(matches!(
        w.stub(BIAS, BIAS + (1 << 32), &BRIDGE),
        Err(StubError::Encode { .. })
    ));
}

#[test]
fn a_tail_of_another_kind_is_a_mismatch() {
    let call = window(
        WindowKind::Call,
        &[0xe8, 0x69, 0, 0, 0],
        0,
        Target::Register(0),
    );
    assert_eq!(call.stub(BIAS, STUB, &CALLED), Err(StubError::Mismatch));
    let entry = window(
        WindowKind::Entry,
        &[0x55, 0x48, 0x89, 0xe5, 0x53],
        5,
        Target::Next,
    );
    assert_eq!(entry.stub(BIAS, STUB, &BRIDGE), Err(StubError::Mismatch));
}

#[test]
fn windows_and_stubs_serialise() {
    let w = window(
        WindowKind::Call,
        &[0xe8, 0x69, 0, 0, 0],
        0,
        Target::Register(0),
    );
    let text = serde_json::to_string(&w).expect("serialises");
    assert_eq!(
        text,
        r#"{"start":4512,"before":[232,105,0,0,0],"kind":"call","target":{"register":0},"branch":0}"#
    );
    assert_eq!(serde_json::from_str::<Window>(&text).expect("parses"), w);
    let stub = w.stub(BIAS, STUB, &BRIDGE).expect("in reach");
    let text = serde_json::to_string(&stub).expect("serialises");
    assert_eq!(
        serde_json::from_str::<crate::code::Stub>(&text).expect("parses"),
        stub
    );
}
