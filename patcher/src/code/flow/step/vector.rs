//! Pointers in vector registers.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Machine, Place};
use crate::code::flow::value::{Sets, State, Value};

impl Machine<'_> {
    /// Moves of pairs of pointers through vector registers, as compilers use
    /// them to copy and fill structures; `false` for all else.
    pub(super) fn vector(&mut self, state: &mut State, i: &Instruction) -> bool {
        use Mnemonic as M;
        let xmm = |r: Register| r.is_xmm().then(|| r.number()).filter(|&n| n < 16);
        let to = (i.op0_kind() == OpKind::Register)
            .then(|| xmm(i.op0_register()))
            .flatten();
        let Some(last) = i.op_count().checked_sub(1) else {
            return false;
        };
        let from = (i.op_kind(last) == OpKind::Register)
            .then(|| xmm(i.op_register(last)))
            .flatten();
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        let place = if memory {
            self.place(state, i)
        } else {
            Place::Unknown
        };
        match i.mnemonic() {
            M::Movq | M::Vmovq => {
                let value = match from {
                    Some(n) => state.vectors[n][0],
                    None => self.operand(state, i, last),
                };
                match to {
                    Some(n) => state.vectors[n] = [value, self.sets.one(0)],
                    None if memory => self.store(state, place, 8, value),
                    None => self.write(state, i.op0_register(), value, i.ip()),
                }
            }
            M::Movups
            | M::Movaps
            | M::Movdqu
            | M::Movdqa
            | M::Movupd
            | M::Movapd
            | M::Vmovups
            | M::Vmovaps
            | M::Vmovdqu
            | M::Vmovdqa
            | M::Vmovupd
            | M::Vmovapd => match (to, from) {
                (Some(to), Some(from)) => state.vectors[to] = state.vectors[from],
                (Some(to), None) => {
                    let low = self.load(state, place);
                    let high = beside(&mut self.sets, place);
                    state.vectors[to] = [low, self.load(state, high)];
                }
                (None, Some(from)) => {
                    let high = beside(&mut self.sets, place);
                    let [a, b] = state.vectors[from];
                    self.store(state, place, 8, a);
                    self.store(state, high, 8, b);
                }
                (None, None) => return false,
            },
            M::Punpcklqdq | M::Movlhps | M::Unpcklpd => {
                let (Some(to), Some(from)) = (to, from) else {
                    return false;
                };
                state.vectors[to][1] = state.vectors[from][0];
            }
            M::Vpunpcklqdq | M::Vmovlhps | M::Vunpcklpd => {
                let (Some(to), Some(from), Some(low)) = (to, from, xmm(i.op1_register())) else {
                    return false;
                };
                state.vectors[to] = [state.vectors[low][0], state.vectors[from][0]];
            }
            M::Movhps | M::Movhpd => {
                let Some(to) = to else { return false };
                state.vectors[to][1] = self.load(state, place);
            }
            M::Pinsrq => {
                let Some(to) = to else { return false };
                let value = self.operand(state, i, 1);
                state.vectors[to][usize::from(i.immediate8() & 1)] = value;
            }
            _ => return false,
        }
        true
    }
}

/// The eight bytes behind the first eight of `place`.
fn beside(sets: &mut Sets, place: Place) -> Place {
    match place {
        Place::Stack { region, offset } => Place::Stack {
            region,
            offset: offset.saturating_add(8),
        },
        Place::Field(offset) => Place::Field(offset.saturating_add(8)),
        Place::Image { set, indexed } => {
            let moved = sets.get(set).iter().map(|a| a.wrapping_add(8)).collect();
            match sets.of(moved, false) {
                Value::Constants { set, .. } => Place::Image { set, indexed },
                _ => Place::Unknown,
            }
        }
        Place::StackArray { .. } | Place::Unknown => Place::Unknown,
    }
}
