//! The code at the other end of a window: the displaced instructions, then a
//! tail that leads on.
//!
//! ```text
//!  Bridge: <displaced>                    Called: push r11
//!          push <original target>                 movabs r11, flag
//!          movabs r11, site_record                cmp byte ptr [r11], 0
//!          jmp [rip]                              pop r11
//!          .quad bridge_entry                     jne slow
//!                                         fast:   <displaced>
//!  The bridge finds                               jmp behind the window
//!    [rsp]   the target                   slow:   push r11
//!    [rsp+8] the return address                   movabs r11, record
//!                                                 jmp [rip] (the bridge's entry)
//! ```
//!
//! Where the window jumps in place of a call, the return address is pushed
//! before the target is.
//!
//! On the way to the bridge only r11 is lost (not even flags). The target is
//! read before r11 is: it may come from there. At an entry not even r11 is, but
//! flags, which nobody reads there.

use iced_x86::{
    Code as Opcode, Encoder, FlowControl, Instruction, MemoryOperand, OpKind, Register,
};
use serde::{Deserialize, Serialize};

use super::flow::gpr;
use super::window::{NEAR, Target, Window, WindowKind, is_copy_of_rsp, text};

/// A near branch can't get there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("from {from:#x} to {to:#x} overruns rel32 by {by:#x}")]
pub struct OutOfReach {
    /// End of the branch, from where it counts.
    pub from: u64,
    /// Where it should lead.
    pub to: u64,
    /// Bytes by which it is too far.
    pub by: u64,
}

/// Why a stub can't be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "code", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum StubError {
    /// The stub is too far from the window.
    #[error("jump back {0}")]
    OutOfReach(OutOfReach),
    /// A displaced instruction can't be encoded at its new place.
    #[error("`{text}` can't be moved to {at:#x}: {reason}")]
    Encode {
        /// The instruction.
        text: String,
        /// Its new place.
        at: u64,
        /// The encoder's words.
        reason: String,
    },
    /// The tail does not fit the window's kind.
    #[error("this tail does not fit this kind of window")]
    Mismatch,
}

/// Where a stub leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tail {
    /// From a call or jump window into the bridge.
    Bridge {
        /// Address of the site's record, handed over in r11.
        site_record: u64,
        /// Address of the bridge's entry.
        bridge_entry: u64,
    },
    /// From an entry window into the bridge, which goes on at the displaced
    /// code (the copy of the window's first instruction) or returns to the
    /// function's caller. Every register but r11 arrives as it was, r11 on the
    /// stack.
    Routine {
        /// Address of the routine's record, handed over in r11.
        record: u64,
        /// Address of the bridge's entry for it.
        bridge_entry: u64,
    },
    /// From an entry window back into the function; where the byte at `flag` is
    /// not zero, into the bridge as for [`Tail::Routine`].
    Called {
        /// Address of a byte.
        flag: u64,
        /// Address of the function's record, handed over in r11.
        record: u64,
        /// Address of the bridge's entry for it.
        bridge_entry: u64,
    },
}

/// A line of a stub's disassembly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Offset in the stub.
    pub offset: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The instruction, Intel syntax.
    pub text: String,
}

/// A stub's code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stub {
    /// To be written at the address that it was made for.
    pub bytes: Vec<u8>,
    /// For each original instruction its offset in the window, and the offset
    /// in the stub of what does its work. The call or jump itself is the last
    /// one, its work being the tail's; in an entry window the last one is the
    /// way back, for the code behind the displaced instructions.
    ///
    /// The copies in a call window's stub run with `rsp` 8 lower, the return
    /// address having been pushed.
    pub boundaries: Vec<(u8, u32)>,
    /// The disassembly, line by line.
    pub listing: Vec<Line>,
}

/// Multi-byte no-operations, as the manuals of Intel and AMD recommend them.
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// Length of `jmp rel8`.
const SHORT: u64 = 2;
/// `push [rip+…]`, without its displacement.
const PUSH: [u8; 2] = [0xff, 0x35];

/// The displacement of a near branch that ends at `from`.
fn rel32(from: u64, to: u64) -> Result<[u8; 4], OutOfReach> {
    let distance = to.wrapping_sub(from) as i64;
    match i32::try_from(distance) {
        Ok(near) => Ok(near.to_le_bytes()),
        Err(_) => {
            let limit = if distance < 0 {
                1 << 31
            } else {
                i32::MAX as u64
            };
            Err(OutOfReach {
                from,
                to,
                by: distance.unsigned_abs() - limit,
            })
        }
    }
}

impl Window {
    /// The bytes to write over [`Window::before`], for a library loaded at
    /// `bias` and a stub at the live address `stub`: no-operations and a call
    /// that ends where the original one did, or a jump and traps behind it.
    ///
    /// # Errors
    /// [`OutOfReach`] if the stub is more than 2 GiB away.
    pub fn after(&self, bias: u64, stub: u64) -> Result<Vec<u8>, OutOfReach> {
        let start = bias.wrapping_add(self.start.0);
        let length = self.before.len();
        let mut bytes = Vec::with_capacity(length);
        if let Some(hop) = &self.hop {
            let distance = hop.at.0.wrapping_sub(self.start.0 + SHORT) as i64;
            // It was chosen to be in reach.
            let near = i8::try_from(distance).map_err(|_| OutOfReach {
                from: start.wrapping_add(SHORT),
                to: bias.wrapping_add(hop.at.0),
                by: distance.unsigned_abs() - 128,
            })?;
            bytes.extend([0xeb, near.cast_unsigned()]);
            bytes.resize(length.max(bytes.len()), 0xcc);
        } else if self.kind == WindowKind::Call {
            let mut filler = length.saturating_sub(NEAR as usize);
            while filler > 0 {
                let nop = NOPS[filler.min(NOPS.len()) - 1];
                bytes.extend_from_slice(nop);
                filler -= nop.len();
            }
            bytes.push(0xe8);
            bytes.extend(rel32(start.wrapping_add(length as u64), stub)?);
        } else {
            bytes.push(0xe9);
            bytes.extend(rel32(start.wrapping_add(NEAR), stub)?);
            bytes.resize(length.max(bytes.len()), 0xcc);
        }
        Ok(bytes)
    }

    /// The bytes to write over the filler that the window jumps to, if it does.
    ///
    /// # Errors
    /// [`OutOfReach`] if the stub is more than 2 GiB away.
    pub fn hop_after(&self, bias: u64, stub: u64) -> Result<Option<Vec<u8>>, OutOfReach> {
        let Some(hop) = &self.hop else {
            return Ok(None);
        };
        let end = bias.wrapping_add(hop.at.0).wrapping_add(NEAR);
        let mut bytes = vec![0xe9];
        bytes.extend(rel32(end, stub)?);
        Ok(Some(bytes))
    }

    /// The stub to be written at the live address `at`, for a library loaded
    /// at `bias`.
    ///
    /// # Errors
    /// [`StubError`] if `at` is too far from the window or from what the
    /// displaced instructions refer to, or if `tail` is for another kind.
    pub fn stub(&self, bias: u64, at: u64, tail: &Tail) -> Result<Stub, StubError> {
        let mut writer = Writer {
            at,
            stub: Stub {
                bytes: Vec::new(),
                boundaries: Vec::new(),
                listing: Vec::new(),
            },
        };
        let originals = self.instructions(bias);
        match (*tail, originals.split_last()) {
            (
                Tail::Bridge {
                    site_record,
                    bridge_entry,
                },
                Some((branch, displaced)),
            ) if self.kind != WindowKind::Entry => {
                self.displace(displaced, bias, &mut writer)?;
                writer.boundary(self.branch);
                let pushed =
                    (self.kind == WindowKind::JumpedCall).then(|| writer.reserve(PUSH.len() + 4));
                writer.instruction(&self.push_target(branch)?)?;
                writer.instruction(&movabs(site_record)?)?;
                writer.quad_jump(bridge_entry)?;
                if let Some(place) = pushed {
                    let back = writer.here();
                    writer.quad(branch.next_ip());
                    writer.fill_branch(place, &PUSH, back)?;
                    writer.stub.listing.sort_by_key(|line| line.offset);
                }
            }
            (
                Tail::Routine {
                    record,
                    bridge_entry,
                },
                Some(_),
            ) if self.kind == WindowKind::Entry => {
                let push = Instruction::with1(Opcode::Push_r64, Register::R11)
                    .map_err(|e| cannot(&Instruction::default(), at, &e))?;
                writer.instruction(&push)?;
                writer.instruction(&movabs(record)?)?;
                writer.quad_jump(bridge_entry)?;
                self.displaced_entry(&originals, bias, &mut writer)?;
            }
            (
                Tail::Called {
                    flag,
                    record,
                    bridge_entry,
                },
                Some(_),
            ) if self.kind == WindowKind::Entry => {
                let tail = (flag, record, bridge_entry);
                self.called(&originals, bias, tail, &mut writer)?;
            }
            _ => return Err(StubError::Mismatch),
        }
        Ok(writer.stub)
    }

    fn displace(
        &self,
        originals: &[Instruction],
        bias: u64,
        writer: &mut Writer,
    ) -> Result<(), StubError> {
        let start = bias.wrapping_add(self.start.0);
        for original in originals {
            writer.boundary(original.ip().wrapping_sub(start) as u8);
            writer.instruction(&self.moved(original)?)?;
        }
        Ok(())
    }

    /// An entry window's displaced code, and the way back to behind it.
    fn displaced_entry(
        &self,
        originals: &[Instruction],
        bias: u64,
        writer: &mut Writer,
    ) -> Result<(), StubError> {
        if let Some((call, before)) = originals.split_last()
            && call.flow_control() == FlowControl::Call
        {
            self.displace(before, bias, writer)?;
            return self.displaced_call(call, bias, writer);
        }
        self.displace(originals, bias, writer)?;
        let falls = originals.last().is_some_and(|i| {
            matches!(
                i.flow_control(),
                FlowControl::Next | FlowControl::ConditionalBranch
            )
        });
        if falls {
            writer.boundary(self.branch);
            let back = bias
                .wrapping_add(self.start.0)
                .wrapping_add(self.branch.into());
            writer.branch(&[0xe9], back)?;
        }
        Ok(())
    }

    /// A call at the end of an entry window. It returns to where the original
    /// one does, behind the window: whoever looks at the stack, or restores
    /// the bytes, finds what was always there. No register is free here, as
    /// functions of one library may agree to spare even r11.
    fn displaced_call(
        &self,
        call: &Instruction,
        bias: u64,
        writer: &mut Writer,
    ) -> Result<(), StubError> {
        let start = bias.wrapping_add(self.start.0);
        writer.boundary(call.ip().wrapping_sub(start) as u8);
        // Behind the two instructions, which have six bytes each.
        let target = writer.here().wrapping_add(12);
        let back = target.wrapping_add(8);
        writer.branch(&PUSH, back)?;
        writer.branch(&[0xff, 0x25], target)?; // jmp [rip + ...]
        writer.quad(call.near_branch_target());
        writer.quad(call.next_ip());
        Ok(())
    }

    /// The instruction that does the work of `original` in the stub.
    fn moved(&self, original: &Instruction) -> Result<Instruction, StubError> {
        let mut moved = *original;
        if matches!(
            original.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        ) {
            moved.as_near_branch();
        }
        if self.kind != WindowKind::Call {
            return Ok(moved);
        }
        if is_copy_of_rsp(original) {
            let above = MemoryOperand::with_base_displ(Register::RSP, 8);
            return Instruction::with2(Opcode::Lea_r64_m, original.op0_register(), above)
                .map_err(|e| cannot(original, original.ip(), &e));
        }
        raise_rsp(&mut moved);
        Ok(moved)
    }

    /// `push` of what the call or jump would have taken as its target.
    fn push_target(&self, branch: &Instruction) -> Result<Instruction, StubError> {
        match self.target {
            Target::Register(number) => Instruction::with1(Opcode::Push_r64, gpr(number.into()))
                .map_err(|e| cannot(branch, branch.ip(), &e)),
            Target::Memory => {
                let mut push = *branch;
                push.set_code(Opcode::Push_rm64);
                push.set_has_repne_prefix(false);
                // `notrack`, which is DS in disguise.
                if push.segment_prefix() == Register::DS {
                    push.set_segment_prefix(Register::None);
                }
                // The return address is there already.
                if self.kind.is_call() {
                    raise_rsp(&mut push);
                }
                Ok(push)
            }
            Target::Next => Err(StubError::Mismatch),
        }
    }

    fn called(
        &self,
        originals: &[Instruction],
        bias: u64,
        tail: (u64, u64, u64),
        writer: &mut Writer,
    ) -> Result<(), StubError> {
        let (flag, record, bridge_entry) = tail;
        let at = writer.at;
        let one = |code, register| {
            Instruction::with1(code, register).map_err(|e| StubError::Encode {
                text: format!("{code:?} {register:?}"),
                at,
                reason: e.to_string(),
            })
        };
        let check = [
            one(Opcode::Push_r64, Register::R11)?,
            movabs(flag)?,
            Instruction::with2(
                Opcode::Cmp_rm8_imm8,
                MemoryOperand::with_base(Register::R11),
                0,
            )
            .map_err(|e| cannot(&Instruction::default(), at, &e))?,
            one(Opcode::Pop_r64, Register::R11)?,
        ];
        for i in &check {
            writer.instruction(i)?;
        }
        let to_slow = writer.reserve(6);
        self.displaced_entry(originals, bias, writer)?;
        let slow = writer.here();
        writer.fill_branch(to_slow, &[0x0f, 0x85], slow)?;
        writer.instruction(&one(Opcode::Push_r64, Register::R11)?)?;
        writer.instruction(&movabs(record)?)?;
        writer.quad_jump(bridge_entry)?;
        writer.stub.listing.sort_by_key(|line| line.offset);
        Ok(())
    }
}

fn movabs(value: u64) -> Result<Instruction, StubError> {
    Instruction::with2(Opcode::Mov_r64_imm64, Register::R11, value).map_err(|e| StubError::Encode {
        text: format!("mov r11, {value:#x}"),
        at: 0,
        reason: e.to_string(),
    })
}

/// Corrects an operand based on `rsp` for the return address that `call stub`
/// has pushed.
fn raise_rsp(i: &mut Instruction) {
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if memory && i.memory_base() == Register::RSP {
        i.set_memory_displacement64(i.memory_displacement64().wrapping_add(8));
        // The encoder shortens what fits a byte only if asked to.
        let short = i8::try_from(i.memory_displacement64() as i64).is_ok();
        i.set_memory_displ_size(if short { 1 } else { 8 });
    }
}

fn cannot(original: &Instruction, at: u64, error: &iced_x86::IcedError) -> StubError {
    StubError::Encode {
        text: text(original),
        at,
        reason: error.to_string(),
    }
}

struct Writer {
    at: u64,
    stub: Stub,
}

impl Writer {
    fn here(&self) -> u64 {
        self.at.wrapping_add(self.stub.bytes.len() as u64)
    }

    fn boundary(&mut self, offset: u8) {
        let copy = self.stub.bytes.len() as u32;
        self.stub.boundaries.push((offset, copy));
    }

    fn line(&mut self, offset: usize, text: String) {
        let bytes = self.stub.bytes[offset..].to_vec();
        self.stub.listing.push(Line {
            offset: offset as u32,
            bytes,
            text,
        });
    }

    fn instruction(&mut self, i: &Instruction) -> Result<(), StubError> {
        let at = self.here();
        let mut encoder = Encoder::new(64);
        encoder.encode(i, at).map_err(|e| cannot(i, at, &e))?;
        let offset = self.stub.bytes.len();
        self.stub.bytes.extend(encoder.take_buffer());
        let mut shown = *i;
        shown.set_ip(at);
        self.line(offset, text(&shown));
        Ok(())
    }

    fn quad(&mut self, value: u64) {
        let offset = self.stub.bytes.len();
        self.stub.bytes.extend(value.to_le_bytes());
        self.line(offset, format!(".quad {value:#x}"));
    }

    /// `jmp [rip]` and the address behind it: it may be anywhere.
    fn quad_jump(&mut self, to: u64) -> Result<(), StubError> {
        let behind = self.here().wrapping_add(6);
        self.branch(&[0xff, 0x25], behind)?;
        self.quad(to);
        Ok(())
    }

    /// An opcode and a 32-bit displacement to `to`.
    fn branch(&mut self, opcode: &[u8], to: u64) -> Result<(), StubError> {
        let place = self.reserve(opcode.len() + 4);
        self.fill_branch(place, opcode, to)
    }

    fn reserve(&mut self, size: usize) -> usize {
        let place = self.stub.bytes.len();
        self.stub.bytes.resize(place + size, 0);
        place
    }

    fn fill_branch(&mut self, place: usize, opcode: &[u8], to: u64) -> Result<(), StubError> {
        let end = place + opcode.len() + 4;
        let from = self.at.wrapping_add(end as u64);
        let displacement = rel32(from, to).map_err(StubError::OutOfReach)?;
        self.stub.bytes[place..end - 4].copy_from_slice(opcode);
        self.stub.bytes[end - 4..end].copy_from_slice(&displacement);
        let bytes = self.stub.bytes[place..end].to_vec();
        let ip = self.at.wrapping_add(place as u64);
        let shown =
            iced_x86::Decoder::with_ip(64, &bytes, ip, iced_x86::DecoderOptions::NONE).decode();
        self.stub.listing.push(Line {
            offset: place as u32,
            text: text(&shown),
            bytes,
        });
        Ok(())
    }
}
