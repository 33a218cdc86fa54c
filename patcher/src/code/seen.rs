//! A site seen at run time: an RPC came through the routine's entry, and its
//! return address says which call made it.
//!
//! After a tail jump it does not: the return address is the one of a call
//! further out, of another function. Such a call is direct, or goes through a
//! pointer to something else. The registers at the entry are those of the call
//! itself, so what it went through can be read again: a register exactly,
//! memory as it is now. Where the outer call is direct, the same tells which
//! jump made the RPC, of the function that it calls or of one that this goes on
//! in. A switch is none: what is led away loses r11, and what lies below the
//! stack pointer.

use iced_x86::{Code as Opcode, Instruction, OpKind, Register};

use super::extents::index_of;
use super::flow::{Code, number, register_target};
use super::image::Stored;
use super::sites::exits;
use super::window::{Hops, NoWindow, Window, of_site};
use super::{CodeMap, ImageAddress, SiteKind};

/// The worker, as it is read after the call.
pub trait Live {
    /// The word at an address, if it is mapped.
    fn word(&self, at: u64) -> Option<u64>;
    /// Whether code is mapped there.
    fn is_code(&self, at: u64) -> bool;
    /// Whether it lies on the stack, where words do not last.
    fn is_stack(&self, at: u64) -> bool;
}

/// A call that came through the routine's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its return address, live.
    pub return_address: u64,
    /// The general registers at the call, by their number in the encoding.
    pub registers: [u64; 16],
}

/// Why a return address does not lead to a site that can be rewritten.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotASite {
    /// No call through a pointer lies before it: the RPC was a tail jump of
    /// what was called there.
    #[error("the call that returns to {to} is direct: what it calls makes the RPC by a tail jump")]
    Direct {
        /// The return address.
        to: ImageAddress,
    },
    /// What lies before it is no call, as far as it can be told.
    #[error("no call returns to {to}")]
    NoCall {
        /// The return address.
        to: ImageAddress,
    },
    /// The call went to something else, which made the RPC by a tail jump.
    #[error("the call at {at} goes elsewhere: what it calls makes the RPC by a tail jump")]
    OtherTarget {
        /// The call.
        at: ImageAddress,
    },
}

/// A call or jump that made an RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenSite {
    /// The call or jump.
    pub at: ImageAddress,
    kind: SiteKind,
}

impl CodeMap {
    /// The window of a site that was seen, in this library loaded at `bias`.
    /// `taken` are live ranges of other windows.
    ///
    /// # Errors
    /// [`NoWindow`].
    pub fn seen_window(
        &self,
        site: SeenSite,
        bias: u64,
        taken: &[(u64, u64)],
    ) -> Result<Window, NoWindow> {
        let code = Code::new(&self.image, &self.extents, &self.labels);
        let mut others: Vec<(u64, u64)> = taken
            .iter()
            .map(|(start, end)| (start.wrapping_sub(bias), end.wrapping_sub(bias)))
            .collect();
        // A static site's own window is the one to be found here.
        let known = self.sites.iter().filter(|s| s.at != site.at);
        others.extend(known.flat_map(|s| s.window.iter().flat_map(Window::ranges)));
        others.extend(self.entry_window("faas_func_call").ok().map(|w| w.range()));
        of_site(&code, site.at.0, site.kind, Hops::Allowed, &others)
    }

    /// The site that made a call, in this library loaded at `bias`. `invoke`
    /// is the worker's routine.
    ///
    /// # Errors
    /// [`NotASite`].
    pub fn seen(
        &self,
        seen: &Seen,
        bias: u64,
        invoke: u64,
        live: &dyn Live,
    ) -> Result<SeenSite, NotASite> {
        let code = Code::new(&self.image, &self.extents, &self.labels);
        let to = seen.return_address.wrapping_sub(bias);
        let no_call = NotASite::NoCall {
            to: ImageAddress(to),
        };
        let extent = to
            .checked_sub(1)
            .and_then(|at| index_of(&self.extents, at))
            .ok_or(no_call.clone())?;
        let all = code.decode(&self.extents[extent]);
        let call = all
            .iter()
            .find(|i| i.next_ip() == to)
            .ok_or(no_call.clone())?;
        let at = ImageAddress(call.ip());
        let (kind, target) = match call.code() {
            Opcode::Call_rm64 => (SiteKind::Call, self.target(call, seen, bias, live)),
            Opcode::Call_rel32_64 => {
                let target = call.near_branch_target();
                let Some(register) = self.labels.thunks.get(&target) else {
                    let jump = self.tail_jump(&code, target, seen, bias, invoke, live);
                    return jump.ok_or(NotASite::Direct {
                        to: ImageAddress(to),
                    });
                };
                (SiteKind::ThunkCall, value(*register, seen))
            }
            _ => return Err(no_call),
        };
        // What is not known now may have been the routine.
        if target.is_some_and(|target| target != invoke) {
            return Err(NotASite::OtherTarget { at });
        }
        Ok(SeenSite { at, kind })
    }

    /// The only jump that can have gone to the routine when the function at
    /// `function` was called.
    fn tail_jump(
        &self,
        code: &Code<'_>,
        function: u64,
        seen: &Seen,
        bias: u64,
        invoke: u64,
        live: &dyn Live,
    ) -> Option<SeenSite> {
        let all = exits(code, function)?;
        let mut went = all.iter().filter(|exit| {
            let jump = &exit.jump;
            let target = match exit.kind {
                SiteKind::ThunkJump => {
                    let register = self.labels.thunks.get(&jump.near_branch_target());
                    register.and_then(|register| value(*register, seen))
                }
                _ => self.target(jump, seen, bias, live),
            };
            target == Some(invoke)
        });
        let only = went.next().filter(|_| went.next().is_none())?;
        only.sure.then_some(SeenSite {
            at: ImageAddress(only.jump.ip()),
            kind: only.kind,
        })
    }

    /// What the call went to, if that can still be told.
    fn target(&self, call: &Instruction, seen: &Seen, bias: u64, live: &dyn Live) -> Option<u64> {
        if let Some(register) = register_target(call) {
            return value(register, seen);
        }
        if call.op0_kind() != OpKind::Memory
            || matches!(call.segment_prefix(), Register::FS | Register::GS)
        {
            return None;
        }
        let place = if call.is_ip_rel_memory_operand() {
            let at = call.ip_rel_memory_address();
            if self.image.stored(at) == Some(Stored::Import) {
                // A function of another library.
                return Some(0);
            }
            at.wrapping_add(bias)
        } else {
            let part = |register| match register {
                Register::None => Some(0),
                register => value(register, seen),
            };
            let scale = u64::from(call.memory_index_scale());
            part(call.memory_base())?
                .wrapping_add(part(call.memory_index())?.wrapping_mul(scale))
                .wrapping_add(call.memory_displacement64())
        };
        if live.is_stack(place) {
            return None;
        }
        // What is no code was something else when the call was made.
        live.word(place).filter(|word| live.is_code(*word))
    }
}

fn value(register: Register, seen: &Seen) -> Option<u64> {
    let number = register.is_gpr64().then(|| number(register)).flatten()?;
    seen.registers.get(number).copied()
}
