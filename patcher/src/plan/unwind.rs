//! Unwind tables of the stubs, as `__register_frame` takes them.
//!
//! A signal may arrive in a stub, and who unwinds from there (a cancelled
//! thread, a profiler) must find the caller's frame. Of that nothing has
//! changed yet but what was pushed for the bridge, and the function's own
//! tables know it best: a stub is a signal frame, whose "interrupted" address
//! is that of the original instruction.
//!
//! An unwinder takes the addresses from a table's lowest to its highest for
//! its own and looks nowhere else for them. Filler lies in the library, the
//! stubs far from there, others' code between them: each gets a table.
//!
//! ```text
//!  the stubs' table │ table of one filler │ table of another │ an empty one
//! ```

use super::led::Led;
use crate::code::{Stub, Window, WindowKind};

/// `DW_CFA_advance_loc2`.
const ADVANCE: u8 = 0x03;
/// `DW_CFA_def_cfa_offset`.
const CFA_OFFSET: u8 = 0x0e;
/// `DW_CFA_val_expression`: a register has the value of an expression.
const VALUE: u8 = 0x16;
/// `DW_OP_addr`.
const ADDRESS: u8 = 0x03;
/// The return address's column.
const RETURN: u8 = 16;
/// Length of `push [rip+…]`, which pushes a return address.
const PUSH: u16 = 6;
/// Length of a jump in filler.
const HOP: u64 = 5;

/// Code of ours that a frame's owner may be interrupted in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StubFrame {
    /// Live address.
    start: u64,
    /// Bytes.
    len: u64,
    /// From an offset on: bytes that were pushed, and the original instruction
    /// that the code stands for.
    rows: Vec<(u16, u8, u64)>,
    /// It lies in the library, in filler.
    filler: bool,
}

/// The frames of a stub, and of the filler that leads there.
pub(super) fn frames(led: &Led<'_>, stub: &Stub) -> Vec<StubFrame> {
    let original = |offset: u8| {
        let start = led.bias.wrapping_add(led.window.start.0);
        start.wrapping_add(offset.into())
    };
    let (from, branch) = stub.boundaries.last().copied().unwrap_or_default();
    let branch = branch as u16;
    let length = |offset: u16| {
        let mut lines = stub.listing.iter();
        lines
            .find(|line| line.offset == u32::from(offset))
            .map_or(0, |line| line.bytes.len() as u16)
    };
    let called = match led.window.kind {
        WindowKind::Call => 8,
        _ => 0,
    };
    let copies = stub.boundaries.iter();
    let mut rows: Vec<(u16, u8, u64)> = copies
        .map(|(from, to)| (*to as u16, called, original(*from)))
        .collect();
    let (mut at, mut pushed) = (branch, called);
    if led.window.kind == WindowKind::JumpedCall {
        (at, pushed) = (at + PUSH, 8);
        rows.push((at, pushed, original(from)));
    }
    rows.push((at + length(at), pushed + 8, original(from)));
    let hop = led.window.hop.as_ref().map(|hop| StubFrame {
        start: led.bias.wrapping_add(hop.at.0),
        len: HOP,
        rows: vec![(0, 0, original(from))],
        filler: true,
    });
    let stub = StubFrame {
        start: led.stub,
        len: stub.bytes.len() as u64,
        rows,
        filler: false,
    };
    [stub].into_iter().chain(hop).collect()
}

/// `.eh_frame`s, one after another, and an empty one that ends them.
pub(super) fn eh_frames(frames: &[StubFrame]) -> Vec<u8> {
    let (filler, stubs): (Vec<&StubFrame>, Vec<&StubFrame>) =
        frames.iter().partition(|frame| frame.filler);
    let mut bytes = Vec::new();
    for table in [&stubs[..]].into_iter().chain(filler.chunks(1)) {
        if !table.is_empty() {
            bytes.extend(eh_frame(table));
        }
    }
    bytes.extend(0_u32.to_le_bytes());
    bytes
}

/// `.eh_frame`: a CIE, an FDE each, and the zero that ends it; a multiple of
/// eight bytes.
fn eh_frame(frames: &[&StubFrame]) -> Vec<u8> {
    let mut bytes = Vec::new();
    entry(&mut bytes, |out, _| {
        out.extend(0_u32.to_le_bytes()); // a CIE
        out.push(1); // version
        out.extend(b"zRS\0"); // S: a signal frame
        out.push(1); // code alignment factor
        out.push(0x78); // data alignment factor: -8
        out.push(RETURN);
        out.extend([1, 0x00]); // addresses are absolute
        out.extend([0x0c, 7, 0]); // DW_CFA_def_cfa rsp, 0
    });
    for frame in frames {
        entry(&mut bytes, |out, at| {
            out.extend((at + 4).to_le_bytes()); // back to the CIE
            out.extend(frame.start.to_le_bytes());
            out.extend(frame.len.to_le_bytes());
            out.push(0); // no augmentation data
            let mut last = 0;
            for (offset, pushed, original) in &frame.rows {
                out.push(ADVANCE);
                out.extend((offset - last).to_le_bytes());
                last = *offset;
                out.extend([CFA_OFFSET, *pushed]);
                out.extend([VALUE, RETURN, 9, ADDRESS]);
                out.extend(original.to_le_bytes());
            }
        });
    }
    bytes.extend(0_u32.to_le_bytes());
    bytes
}

/// Bytes of the tables of these windows' stubs.
pub(super) fn size<'a>(windows: impl Iterator<Item = &'a Window>) -> usize {
    let frame = |rows: usize, filler| StubFrame {
        start: 0,
        len: 0,
        rows: vec![(0, 0, 0); rows],
        filler,
    };
    let frames = windows.flat_map(|window| {
        let more = match window.kind {
            WindowKind::JumpedCall => 2,
            _ => 1,
        };
        let stub = frame(window.steps() + more, false);
        let hop = window.hop.as_ref().map(|_| frame(1, true));
        [stub].into_iter().chain(hop)
    });
    eh_frames(&frames.collect::<Vec<_>>()).len()
}

fn entry(bytes: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>, u32)) {
    let at = bytes.len();
    bytes.extend([0; 4]);
    body(bytes, at as u32);
    // DW_CFA_nop up to the next entry.
    bytes.resize(bytes.len().next_multiple_of(8) + 4, 0);
    let len = (bytes.len() - at - 4) as u32;
    bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
}

#[cfg(test)]
mod live;

#[cfg(test)]
mod tests {
    use gimli::{
        BaseAddresses, CfaRule, EhFrame, LittleEndian, Operation, RegisterRule, UnwindContext,
        UnwindSection,
    };

    use super::*;
    use crate::code::{Hop, ImageAddress, Tail, Target};

    const BIAS: u64 = 0x7000_0000_0000;
    const STUB: u64 = BIAS + 0x10_0000;
    const TAIL: Tail = Tail::Bridge {
        site_record: 0x1122_3344_5566,
        bridge_entry: 0x7000_dead_0000,
    };

    /// Offset of the CFA from rsp, and the original instruction that a signal
    /// frame names.
    fn row(tables: &[u8], address: u64) -> (i64, u64) {
        let mut rows = split(tables).into_iter().filter_map(|t| row_in(t, address));
        let row = rows.next().expect("a frame");
        assert!(rows.next().is_none(), "in one table");
        row
    }

    /// The tables, as the bridge goes through them.
    fn split(mut bytes: &[u8]) -> Vec<&[u8]> {
        let length = |bytes: &[u8]| u32::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let mut tables = Vec::new();
        while length(bytes) != 0 {
            let mut end = 0;
            while length(&bytes[end..]) != 0 {
                end += 4 + length(&bytes[end..]);
            }
            tables.push(&bytes[..end + 4]);
            bytes = &bytes[end + 4..];
        }
        assert_eq!(bytes.len(), 4);
        tables
    }

    fn row_in(bytes: &[u8], address: u64) -> Option<(i64, u64)> {
        let section = EhFrame::new(bytes, LittleEndian);
        let bases = BaseAddresses::default();
        let fde = section
            .fde_for_address(&bases, address, EhFrame::cie_from_offset)
            .ok()?;
        assert!(fde.cie().is_signal_trampoline());
        let mut context = UnwindContext::new();
        let row = fde
            .unwind_info_for_address(&section, &bases, &mut context, address)
            .unwrap();
        let CfaRule::RegisterAndOffset { register, offset } = row.cfa() else {
            panic!("{:?}", row.cfa());
        };
        assert_eq!(*register, gimli::X86_64::RSP);
        let Some(RegisterRule::ValExpression(expression)) = row.register(gimli::X86_64::RA) else {
            panic!("{:?}", row.register(gimli::X86_64::RA));
        };
        let expression = expression.get(&section).unwrap();
        let mut operations = expression.operations(fde.cie().encoding());
        let Some(Operation::Address { address }) = operations.next().unwrap() else {
            panic!("no address");
        };
        assert!(operations.next().unwrap().is_none());
        Some((*offset, address))
    }

    fn window(kind: WindowKind, before: &[u8], branch: u8) -> Window {
        Window {
            start: ImageAddress(0x1000),
            before: before.to_vec(),
            kind,
            target: Target::Register(0),
            branch,
            hop: None,
        }
    }

    fn tables(window: &Window) -> (Vec<u8>, Stub) {
        let led = Led {
            window,
            bias: BIAS,
            stub: STUB,
        };
        let stub = window.stub(BIAS, STUB, &TAIL).unwrap();
        let bytes = eh_frames(&frames(&led, &stub));
        assert_eq!(bytes.len(), size([window].into_iter()));
        (bytes, stub)
    }

    #[test]
    fn behind_a_call_the_return_address_was_pushed() {
        // mov rdi, rbx; call rax
        let call = window(WindowKind::Call, &[0x48, 0x89, 0xdf, 0xff, 0xd0], 3);
        let (bytes, stub) = tables(&call);
        let original = BIAS + 0x1000;
        assert_eq!(row(&bytes, STUB), (8, original));
        assert_eq!(row(&bytes, STUB + 3), (8, original + 3), "push rax");
        assert_eq!(row(&bytes, STUB + 4), (16, original + 3));
        let last = STUB + stub.bytes.len() as u64 - 1;
        assert_eq!(row(&bytes, last), (16, original + 3));
    }

    #[test]
    fn behind_a_jump_nothing_was() {
        // push rbx; push r12; call rax
        let call = window(WindowKind::JumpedCall, &[0x53, 0x41, 0x54, 0xff, 0xd0], 3);
        let (bytes, stub) = tables(&call);
        let original = BIAS + 0x1000;
        assert_eq!(row(&bytes, STUB), (0, original));
        assert_eq!(row(&bytes, STUB + 1), (0, original + 1));
        assert_eq!(row(&bytes, STUB + 2), (0, original + 1));
        assert_eq!(row(&bytes, STUB + 3), (0, original + 3));
        // push [rip+...]; push rax
        assert_eq!(row(&bytes, STUB + 9), (8, original + 3));
        assert_eq!(row(&bytes, STUB + 10), (16, original + 3));
        let last = STUB + stub.bytes.len() as u64 - 1;
        assert_eq!(row(&bytes, last), (16, original + 3));

        // pop rbx; jmp rax; filler
        let jump = window(WindowKind::Jump, &[0x5b, 0xff, 0xe0, 0x90, 0x90], 1);
        let (bytes, _) = tables(&jump);
        assert_eq!(row(&bytes, STUB), (0, original));
        assert_eq!(row(&bytes, STUB + 1), (0, original + 1));
        assert_eq!(row(&bytes, STUB + 2), (8, original + 1));
    }

    #[test]
    fn filler_belongs_to_the_call_that_jumps_there_and_has_a_table_of_its_own() {
        let mut call = window(WindowKind::JumpedCall, &[0xff, 0xd0], 0);
        call.hop = Some(Hop {
            at: ImageAddress(0x1060),
            before: vec![0x90; 5],
        });
        let (bytes, _) = tables(&call);
        assert_eq!(row(&bytes, BIAS + 0x1060), (0, BIAS + 0x1000));
        assert_eq!(row(&bytes, BIAS + 0x1064), (0, BIAS + 0x1000));
        assert_eq!(row(&bytes, STUB), (0, BIAS + 0x1000));
        let [stubs, filler] = split(&bytes).try_into().unwrap();
        assert!(row_in(stubs, STUB).is_some() && row_in(filler, STUB).is_none());
        assert!(row_in(stubs, BIAS + 0x1060).is_none());
    }

    #[test]
    fn nothing_makes_no_table() {
        assert_eq!(eh_frames(&[]), [0; 4]);
    }
}
