use super::disassemble;
use super::elf::{BAR, FAILED, TABLE, TEXT, library};
use crate::code::window::{Hops, of_site};
use crate::code::{
    CodeMap, ImageAddress, NoWindow, Obstacle, SiteKind, Target, WindowKind, analyse,
};

/// `lea rsi, [rip+to]` at `at`.
fn lea_rsi(at: u64, to: u64) -> Vec<u8> {
    let mut bytes = vec![0x48, 0x8d, 0x35];
    bytes.extend((to.wrapping_sub(at + 7) as u32).to_le_bytes());
    bytes
}

/// A function that begins with what an RPC needs, followed by `rest`.
fn rpc(rest: &[u8]) -> Vec<u8> {
    let mut code = vec![
        0x53, // push rbx
        0x48, 0x83, 0xec, 0x10, // sub rsp, 10h
        0x48, 0x89, 0xfb, // mov rbx, rdi
        0x48, 0x8b, 0x3f, // mov rdi, [rdi]
        0x48, 0x89, 0xd1, // mov rcx, rdx
        0x48, 0x89, 0xf2, // mov rdx, rsi
        0x4c, 0x8d, 0x44, 0x24, 0x08, // lea r8, [rsp+8]
        0x49, 0x89, 0xe1, // mov r9, rsp
    ];
    code.extend(lea_rsi(TEXT + code.len() as u64, BAR));
    code.extend_from_slice(rest);
    code
}

fn map(code: &[u8]) -> CodeMap {
    let functions = [("faas_func_call", 0, code.len() as u64)];
    analyse(&library(code, &functions, &[])).expect("a well-formed library")
}

fn window_of(rest: &[u8]) -> Result<crate::code::Window, NoWindow> {
    let map = map(&rpc(rest));
    let sites = map.sites("Bar");
    assert_eq!(sites.len(), 1, "{:?}", map.all_sites());
    sites[0].window.clone()
}

fn displaced(at: u64, text: &str, obstacle: Obstacle) -> NoWindow {
    NoWindow::Displaced {
        at: ImageAddress(TEXT + at),
        text: text.to_owned(),
        obstacle,
    }
}

/// Length of `rpc(&[])`.
const RPC: u64 = 32;
const RETURN: [u8; 6] = [0x48, 0x83, 0xc4, 0x10, 0x5b, 0xc3]; // add rsp, 10h; pop rbx; ret

#[test]
fn a_short_call_takes_whole_instructions_before_it() {
    let map = map(&rpc(&[
        0xff, 0x53, 0x08, 0x48, 0x83, 0xc4, 0x10, 0x5b, 0xc3,
    ]));
    let [site] = map.all_sites().try_into().expect("one site");
    assert_eq!(site.at, ImageAddress(TEXT + RPC));
    assert_eq!(site.function, ImageAddress(TEXT));
    assert_eq!(site.kind, SiteKind::Call);
    assert!(site.exhaustive);
    let window = site.window.expect("a window");
    assert_eq!(window.kind, WindowKind::Call);
    assert_eq!(window.target, Target::Memory);
    assert_eq!(
        disassemble(&window.before, window.start.0),
        ["lea rsi, [1000h]", "call qword ptr [rbx+8]"]
    );
    assert_eq!(u64::from(window.branch), RPC - (window.start.0 - TEXT));
}

#[test]
fn names_match_by_case() {
    let map = map(&rpc(&[&[0xff, 0x53, 0x08], &RETURN[..]].concat()));
    assert_eq!(map.sites("Bar").len(), 1);
    for other in ["bar", "BAR", "Ba", "Bar ", ""] {
        assert_eq!(map.sites(other), []);
    }
}

#[test]
fn what_can_not_be_displaced_is_named() {
    // endbr64; call rbx
    assert_eq!(
        window_of(&[0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0xff, 0xd2, 0xc3]),
        Err(displaced(RPC, "endbr64", Obstacle::Endbr))
    );
    // fxsave [rbx]; call r10
    assert_eq!(
        window_of(&[0x0f, 0xae, 0x03, 0x41, 0xff, 0xd2, 0xc3]),
        Err(displaced(RPC, "fxsave [rbx]", Obstacle::Exotic))
    );
    // mov ds, ax; call r10
    assert_eq!(
        window_of(&[0x8e, 0xd8, 0x41, 0xff, 0xd2, 0xc3]),
        Err(displaced(RPC, "mov ds,ax", Obstacle::Exotic))
    );
    // jne +0; call r10: nothing branches within a window
    assert!(matches!(
        window_of(&[0x75, 0x00, 0x41, 0xff, 0xd2, 0xc3]),
        Err(NoWindow::Entered { .. } | NoWindow::Displaced { .. })
    ));
}

#[test]
fn what_knows_rsp_is_displaced_by_a_jump() {
    for (text, rest) in [
        ("push rax", &[0x50, 0x41, 0xff, 0xd2][..]),
        ("add rsp, 8", &[0x48, 0x83, 0xc4, 0x08, 0x41, 0xff, 0xd2]),
        (
            "mov rax, [rsp-8]",
            &[0x48, 0x8b, 0x44, 0x24, 0xf8, 0x41, 0xff, 0xd2],
        ),
        ("mov [rbx], rsp", &[0x48, 0x89, 0x23, 0x41, 0xff, 0xd2]),
        ("mov eax, esp", &[0x89, 0xe0, 0x41, 0xff, 0xd2]),
    ] {
        let window = window_of(&[rest, &RETURN].concat()).expect(text);
        assert_eq!(window.kind, WindowKind::JumpedCall, "{text}");
        assert_eq!(window.hop, None, "{text}");
        let lines = disassemble(&window.before, window.start.0);
        assert_eq!(lines[lines.len() - 2..], [text, "call r10"]);
        assert_eq!(
            window.before[usize::from(window.branch)..],
            [0x41, 0xff, 0xd2]
        );
    }
}

/// `code`, and filler up to a function that is aligned.
fn followed(code: &[u8], filler: &[u8]) -> Result<crate::code::Window, NoWindow> {
    let mut code = code.to_vec();
    let size = code.len() as u64;
    code.extend_from_slice(filler);
    let other = code.len() as u64;
    code.push(0xc3);
    let functions = [("faas_func_call", 0, size), ("other", other, 1)];
    let map = analyse(&library(&code, &functions, &[])).expect("a well-formed library");
    window_at(&map, TEXT + RPC)
}

#[test]
fn a_call_that_is_a_branch_target_hops_through_filler() {
    // call [rbx+8]; and a jump to it behind the return
    let mut code = rpc(&[0xff, 0x53, 0x08]);
    code.extend_from_slice(&RETURN);
    let jump = code.len() as u64;
    code.extend([0xeb, (RPC as i64 - (jump as i64 + 2)) as u8]);
    let end = code.len() as u64;
    let room = 16 - end % 8;
    let nops = vec![0x90; room as usize];
    let window = followed(&code, &nops).expect("filler in reach");
    assert_eq!(window.kind, WindowKind::JumpedCall);
    assert_eq!(window.start, ImageAddress(TEXT + RPC));
    assert_eq!(window.before, [0xff, 0x53, 0x08]);
    let hop = window.hop.expect("a hop");
    assert_eq!(hop.at, ImageAddress(TEXT + end));
    assert_eq!(hop.before, [0x90; 5]);

    let entered = Err(NoWindow::Entered {
        start: ImageAddress(TEXT + RPC - 7),
        label: ImageAddress(TEXT + RPC),
    });
    assert_eq!(followed(&code, &[]), entered, "no filler");
    assert_eq!(followed(&code, &nops[..4]), entered, "too little");
    let odd = &nops[..nops.len() - 1];
    assert_eq!(followed(&code, odd), entered, "aligns nothing");
    // Code that is reached: a return in between that nothing leads over.
    let mut reached = code.clone();
    reached[end as usize - 2] = 0x74;
    assert_eq!(followed(&reached, &nops), entered, "je falls through");
    // Another branch into the filler.
    let mut entered_filler = code.clone();
    let into = [0x74, 0x02 + 2];
    entered_filler.splice(end as usize - 2..end as usize - 2, into);
    assert!(followed(&entered_filler, &nops).is_err(), "it is entered");
    // A slide: the filler's end less something, to which a jump leads.
    for (jump, slides) in [(&[0xff, 0xe1][..], true), (&[0xeb, 0xfe], false)] {
        let mut slide = code.clone();
        slide.extend(jump);
        slide.resize(slide.len().next_multiple_of(8) + 8, 0x90);
        slide.extend([0x31, 0xc0, 0xc3]);
        assert_eq!(followed(&slide, &[]).is_err(), slides);
    }
    // Bytes that are read: movups xmm0, [the filler], and others.
    for (before, is_read) in [(0, true), (32, false)] {
        let mut constant = code.clone();
        let load = [0x0f, 0x10, 0x05, 0, 0, 0, 0];
        constant.splice(end as usize - 2..end as usize - 2, load);
        let last = constant.len() - 1;
        constant[last] = (RPC as i64 - (last as i64 + 1)) as u8;
        let distance = constant.len() as i32 - before - (end as i32 - 2 + 7);
        constant[end as usize + 1..][..4].copy_from_slice(&distance.to_le_bytes());
        let filler = vec![0x90; 16 - constant.len() % 8];
        assert_eq!(followed(&constant, &filler).is_err(), is_read, "{before}");
    }
    // Out of reach.
    let mut far = code.clone();
    far.splice(end as usize..end as usize, [0xc3; 128]);
    assert_eq!(followed(&far, &nops), entered, "too far");
}

#[test]
fn what_is_relative_to_rsp_can_be_displaced() {
    // mov r10, [rsp+0]; call [r10+8]  and  call [rsp+10h]
    for rest in [
        &[0x4c, 0x8b, 0x14, 0x24, 0x41, 0xff, 0x52, 0x08, 0xc3][..],
        &[0xff, 0x54, 0x24, 0x10, 0xc3],
        &[0x49, 0x89, 0xe0, 0xff, 0x53, 0x08, 0xc3],
    ] {
        window_of(rest).expect("a window");
    }
}

#[test]
fn the_target_below_rsp_is_refused() {
    assert_eq!(
        window_of(&[0xff, 0x54, 0x24, 0xf8, 0xc3]),
        Err(NoWindow::Operand {
            at: ImageAddress(TEXT + RPC),
            text: "call qword ptr [rsp-8]".to_owned(),
        })
    );
}

#[test]
fn nothing_enters_a_window_but_at_its_start() {
    // A conditional jump in another function leads to the call itself.
    let mut code = rpc(&[0xff, 0x53, 0x08]);
    code.extend_from_slice(&RETURN);
    let other = code.len() as u64;
    code.extend([0x74, (RPC as i64 - (other as i64 + 2)) as u8, 0xc3]); // je; ret
    let functions = [("faas_func_call", 0, other), ("other", other, 3)];
    let map = analyse(&library(&code, &functions, &[])).expect("well-formed");
    // Its state at the call is not an RPC's on every path, so ask for the
    // window directly.
    let reason = window_at(&map, TEXT + RPC);
    assert_eq!(
        reason,
        Err(NoWindow::Entered {
            start: ImageAddress(TEXT + RPC - 7),
            label: ImageAddress(TEXT + RPC),
        })
    );
    // At the window's start it may be entered.
    code[other as usize + 1] = (RPC as i64 - 7 - (other as i64 + 2)) as u8;
    let map = analyse(&library(&code, &functions, &[])).expect("well-formed");
    window_at(&map, TEXT + RPC).expect("a window");
}

fn window_at(map: &CodeMap, at: u64) -> Result<crate::code::Window, NoWindow> {
    let code = crate::code::flow::Code::new(&map.image, &map.extents, &map.labels);
    of_site(&code, at, SiteKind::Call, Hops::Allowed, &[])
}

#[test]
fn what_a_cut_instruction_reads_as_leads_into_windows() {
    #[rustfmt::skip]
    let code = [
        0xe8, 0x04, 0x00, 0x00, 0x00, // a call of what lies behind the next bytes
        0x48, 0xb8, 0xeb, 0x05,       // mov rax, ...: cut short, a jump to 14
        0x48, 0x89, 0xf8,             // 9: mov rax, rdi
        0x48, 0x89, 0xfe,             // 12: mov rsi, rdi
        0xc3, 0x90, 0x90, 0x90,
    ];
    let map = analyse(&library(&code, &[("faas_func_call", 0, 5)], &[])).expect("well-formed");
    let parts = crate::code::flow::Code::new(&map.image, &map.extents, &map.labels);
    assert_eq!(
        crate::code::window::of_routine(&parts, TEXT + 9),
        Err(NoWindow::Entered {
            start: ImageAddress(TEXT + 9),
            label: ImageAddress(TEXT + 14),
        })
    );
}

#[test]
fn jump_tables_lead_into_windows() {
    let mut code = rpc(&[0xff, 0x53, 0x08]);
    code.extend_from_slice(&RETURN);
    let other = code.len() as u64;
    // lea rax, [rip+TABLE]; movsxd rcx, [rax+rdi*4]; add rax, rcx; jmp rax
    code.extend([0x48, 0x8d, 0x05]);
    code.extend((TABLE.wrapping_sub(TEXT + other + 7) as u32).to_le_bytes());
    code.extend([0x48, 0x63, 0x0c, 0xb8, 0x48, 0x01, 0xc8, 0xff, 0xe0]);
    let size = code.len() as u64 - other;
    let functions = [("faas_func_call", 0, other), ("other", other, size)];
    let to = |at: u64| (TEXT + at) as i32 - TABLE as i32;
    let map = analyse(&library(&code, &functions, &[to(0), to(RPC)])).expect("well-formed");
    assert!(matches!(
        window_at(&map, TEXT + RPC),
        Err(NoWindow::Entered { .. })
    ));
    // An entry into the middle of an instruction is none: the table has ended.
    let map = analyse(&library(&code, &functions, &[to(0), to(2), to(RPC)])).expect("well-formed");
    window_at(&map, TEXT + RPC).expect("a window");
}

#[test]
fn a_window_lies_within_one_page() {
    // How far the window's ten bytes reach into the next page.
    for over in 0..=10_u64 {
        let shift = 0x1000 - (RPC + 3) + over;
        let mut code = vec![0x90; shift as usize];
        code.extend(rpc(&[0xff, 0x53, 0x08]));
        code.extend_from_slice(&RETURN);
        // The name is further away by as much.
        let lea = (shift + RPC - 7) as usize;
        code.splice(lea..lea + 7, lea_rsi(TEXT + lea as u64, BAR));
        let functions = [("faas_func_call", shift, code.len() as u64 - shift)];
        let map = analyse(&library(&code, &functions, &[])).expect("well-formed");
        let window = map.sites("Bar")[0].window.clone();
        if over == 0 || over == 10 {
            window.expect("all of it in one page");
        } else {
            let start = ImageAddress(TEXT + lea as u64);
            let page = ImageAddress(TEXT + 0x1000);
            assert_eq!(window, Err(NoWindow::Page { start, page }));
        }
    }
}

#[test]
fn append_output_is_no_site() {
    // A first RPC, then append(context, "failed", 6) through the next slot.
    let mut code = rpc(&[0xff, 0x53, 0x08]);
    code.extend([0x48, 0x8b, 0x3b, 0xba, 6, 0, 0, 0]); // mov rdi, [rbx]; mov edx, 6
    code.extend(lea_rsi(TEXT + code.len() as u64, FAILED));
    code.extend([0xff, 0x53, 0x10]); // call [rbx+10h]
    code.extend_from_slice(&RETURN);
    let map = map(&code);
    assert_eq!(map.all_sites().len(), 1);
    assert_eq!(map.sites("failed"), []);
}

#[test]
fn entry_windows_start_behind_endbr64() {
    let code = [
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64
        0x55, // push rbp
        0x48, 0x89, 0xe5, // mov rbp, rsp
        0x41, 0x57, // push r15
        0x31, 0xc0, 0x41, 0x5f, 0x5d, 0xc3,
    ];
    let window = map(&code).entry_window("faas_func_call").expect("a window");
    assert_eq!(window.start, ImageAddress(TEXT + 4));
    assert_eq!(window.kind, WindowKind::Entry);
    assert_eq!(
        disassemble(&window.before, window.start.0),
        ["push rbp", "mov rbp, rsp", "push r15"]
    );
    assert_eq!(
        map(&code).entry_window("faas_func_cal"),
        Err(NoWindow::NoFunction {
            name: "faas_func_cal".to_owned()
        })
    );
}

#[test]
fn a_function_without_room_is_refused_unless_padding_follows() {
    let functions = [("faas_func_call", 0, 3), ("next", 16, 1)];
    let mut code = vec![0x31, 0xc0, 0xc3]; // xor eax, eax; ret
    code.extend([0xcc; 13]);
    code.push(0xc3);
    let map = analyse(&library(&code, &functions, &[])).expect("well-formed");
    let window = map
        .entry_window("faas_func_call")
        .expect("room in the padding");
    assert_eq!(window.before, [0x31, 0xc0, 0xc3, 0xcc, 0xcc]);
    assert_eq!(window.branch, 3);

    let functions = [("faas_func_call", 0, 3), ("next", 3, 14)];
    let map = analyse(&library(&code, &functions, &[])).expect("well-formed");
    assert_eq!(
        map.entry_window("faas_func_call"),
        Err(NoWindow::Short {
            at: ImageAddress(TEXT),
            room: 3
        })
    );
}

#[test]
fn filler_is_a_jump_s_own_before_it_is_another_call_s() {
    // A call that is a branch target, and a tail jump with the filler.
    let mut code = rpc(&[0xff, 0x53, 0x08]);
    code.extend_from_slice(&RETURN);
    let branch = code.len() as u64;
    code.extend([0xeb, (RPC as i64 - (branch as i64 + 2)) as u8]);
    // Behind it are five bytes of filler: room for one of them.
    while !(code.len() as u64 + 7 + 7 + 5).is_multiple_of(8) {
        code.push(0x90);
    }
    let other = code.len() as u64;
    code.extend(lea_rsi(TEXT + other, BAR));
    // xor ecx, ecx; jmp over nothing; jmp [rdi+8]
    code.extend([0x31, 0xc9, 0xeb, 0x00, 0xff, 0x67, 0x08]);
    let jump = code.len() as u64 - 3;
    code.extend([0xcc; 5]);
    let next = code.len() as u64;
    code.push(0xc3);
    let functions = [
        ("faas_func_call", 0, branch + 2),
        ("other", other, jump + 3 - other),
        ("next", next, 1),
    ];
    let map = analyse(&library(&code, &functions, &[])).expect("well-formed");
    let [call, tail] = map.all_sites().try_into().expect("two sites");
    assert!(
        matches!(call.window, Err(NoWindow::Entered { .. })),
        "{call:?}"
    );
    let window = tail.window.expect("a window");
    assert_eq!((window.hop, window.before.len()), (None, 5));
    // Alone the call would have it.
    assert!(window_at(&map, TEXT + RPC).is_ok());
}
