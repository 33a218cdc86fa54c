//! Filler in reach of a short jump.

use iced_x86::{FlowControl, Instruction, Mnemonic};

use super::{Hop, ImageAddress, NEAR, check_range};
use crate::code::extents::index_of;
use crate::code::flow::Code;

/// Length of `jmp rel8`.
const SHORT: u64 = 2;
/// What filler aligns is aligned to so much at least.
const ALIGNED: u64 = 8;

/// Room for a near jump where no code ever runs, that a `jmp rel8` at `from`
/// can reach: no-operations and traps behind a return or jump, up to something
/// that is aligned.
pub(super) fn hop(code: &Code<'_>, from: u64, taken: &[(u64, u64)]) -> Option<Hop> {
    let behind = from + SHORT;
    let reach = behind.saturating_sub(128)..=behind + 127;
    let own = index_of(code.extents, from)?;
    let near = code.extents[..own].iter().rev();
    // One more: what fell through to nothing may lie out of reach.
    let first = own.saturating_sub(near.take_while(|e| e.end > *reach.start()).count() + 1);
    let mut run = Run::default();
    for extent in &code.extents[first..] {
        if extent.start > *reach.end() {
            break;
        }
        if extent.function {
            // What begins a function runs, filler or not.
            if let Some(at) = room(code, &run, &reach, taken) {
                return Some(at);
            }
            run = Run::default();
        }
        for i in code.decode(extent).iter() {
            if run.takes(i) {
                continue;
            }
            // The same function goes on.
            let slide = run.computed && extent.function;
            if let Some(at) = room(code, &run, &reach, taken).filter(|_| !slide) {
                return Some(at);
            }
            run = Run {
                start: i.next_ip(),
                end: i.next_ip(),
                dead: leaves(i) && (extent.function || run.dead && run.end == i.ip()),
                computed: i.flow_control() == FlowControl::IndirectBranch,
            };
        }
    }
    room(code, &run, &reach, taken)
}

/// Whether nothing falls through to what is behind it.
fn leaves(i: &Instruction) -> bool {
    matches!(
        i.flow_control(),
        FlowControl::Return | FlowControl::UnconditionalBranch | FlowControl::IndirectBranch
    )
}

/// Filler found so far.
#[derive(Default)]
struct Run {
    start: u64,
    end: u64,
    /// Nothing falls through to it.
    dead: bool,
    /// It follows a jump through a pointer, which may lead anywhere into it
    /// where it is a slide.
    computed: bool,
}

impl Run {
    fn takes(&mut self, i: &Instruction) -> bool {
        let filler = matches!(i.mnemonic(), Mnemonic::Nop | Mnemonic::Int3);
        let more = self.dead && filler && i.ip() == self.end;
        if more {
            self.end = i.next_ip();
        }
        more
    }
}

fn room(
    code: &Code<'_>,
    run: &Run,
    reach: &std::ops::RangeInclusive<u64>,
    taken: &[(u64, u64)],
) -> Option<Hop> {
    if !run.dead || run.end - run.start < NEAR || !run.end.is_multiple_of(ALIGNED) {
        return None;
    }
    let mut places = run.start..=run.end - NEAR;
    let at = places.find(|&at| {
        let end = at + NEAR;
        reach.contains(&at)
            // What is entered above runs down into it.
            && code.labels.within(run.start, end).is_empty()
            && check_range(code, at, end, taken).is_ok()
    })?;
    Some(Hop {
        at: ImageAddress(at),
        before: code.image.bytes(at, at + NEAR)?.to_vec(),
    })
}
