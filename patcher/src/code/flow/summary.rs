//! What calls of the library's own functions do to their callers.

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind};

use super::{Code, decode, number};
use crate::code::extents::index_of;

/// Longest function whose clobbered registers are worked out, in bytes.
const MAX_SUMMARY: u64 = 1 << 14;
/// rax, rcx, rdx, rsi, rdi and r8-r11, a bit each by encoding.
const CALLER_SAVED: u16 = 0b0000_1111_1100_0111;

/// What a call of a function of the library does to its caller.
#[derive(Debug, Clone, Copy)]
pub(super) struct Summary {
    /// Caller-saved registers that it may clobber, a bit each by encoding.
    pub(super) clobbers: u16,
    pub(super) returns: bool,
}

/// What any function may do.
pub(super) const ANYTHING: Summary = Summary {
    clobbers: CALLER_SAVED,
    returns: true,
};

impl Code<'_> {
    /// What a call of `to` does. Within a library compilers know which
    /// registers a function leaves alone, and whether it returns.
    pub(super) fn summary(&self, to: u64, depth: u32) -> Summary {
        if let Some(&known) = self.summaries.borrow().get(&to) {
            return known;
        }
        // Whoever recurses may do anything.
        self.summaries.borrow_mut().insert(to, ANYTHING);
        let summary = self.summarise(to, depth).unwrap_or(ANYTHING);
        self.summaries.borrow_mut().insert(to, summary);
        summary
    }

    fn summarise(&self, to: u64, depth: u32) -> Option<Summary> {
        let extent = &self.extents[index_of(self.extents, to)?];
        if self.labels.thunks.contains_key(&to) || depth == 4 {
            return None;
        }
        if extent.start != to || extent.end - to > MAX_SUMMARY || extent.lsda.is_some() {
            return self.plt_stub(to);
        }
        let mut info = InstructionInfoFactory::new();
        let mut summary = Summary {
            clobbers: 0,
            returns: false,
        };
        let code = self.decode(extent);
        let mut seen = vec![false; code.len()];
        // Only what is reached: in a stripped library more may follow.
        let mut work = vec![to];
        while let Some(at) = work.pop() {
            let mut index = code.binary_search_by_key(&at, Instruction::ip).ok()?;
            while let Some(instruction) = code.get(index)
                && !std::mem::replace(&mut seen[index], true)
            {
                for used in info.info(instruction).used_registers() {
                    if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
                        && let Some(number) = number(used.register())
                    {
                        summary.clobbers |= 1 << number;
                    }
                }
                let near = matches!(instruction.op0_kind(), OpKind::NearBranch64)
                    .then(|| instruction.near_branch_target());
                match (instruction.flow_control(), near) {
                    (FlowControl::Next, _) => {}
                    (FlowControl::Interrupt, _) if instruction.mnemonic() != Mnemonic::Int3 => {}
                    (FlowControl::Return, _) => {
                        summary.returns = true;
                        break;
                    }
                    (FlowControl::Exception | FlowControl::Interrupt, _) => break,
                    (FlowControl::Call, Some(target)) => {
                        let callee = self.summary(target, depth + 1);
                        summary.clobbers |= callee.clobbers;
                        if !callee.returns {
                            break;
                        }
                    }
                    (FlowControl::IndirectCall, _) => {
                        summary.clobbers = CALLER_SAVED;
                        if self.calls_noreturn(instruction) {
                            break;
                        }
                    }
                    (FlowControl::IndirectBranch, _) => {
                        summary.clobbers = CALLER_SAVED;
                        summary.returns |= !self.calls_noreturn(instruction);
                        break;
                    }
                    (FlowControl::ConditionalBranch, Some(target)) => work.push(target),
                    (FlowControl::UnconditionalBranch, Some(target)) => {
                        if (extent.start..extent.end).contains(&target) {
                            work.push(target);
                        } else {
                            let callee = self.summary(target, depth + 1);
                            summary.clobbers |= callee.clobbers;
                            summary.returns |= callee.returns;
                        }
                        break;
                    }
                    _ => return None,
                }
                index += 1;
            }
            // Off the end: into what is not known.
            summary.returns |= index == code.len();
        }
        summary.clobbers &= CALLER_SAVED;
        Some(summary)
    }

    /// The summary of a stub in the procedure linkage table.
    fn plt_stub(&self, at: u64) -> Option<Summary> {
        let code = decode(self.image, at, self.image.code_range(at)?.1.min(at + 16));
        let jump = code.iter().find(|i| i.mnemonic() != Mnemonic::Endbr64)?;
        let returns = jump.mnemonic() != Mnemonic::Jmp || !self.calls_noreturn(jump);
        Some(Summary {
            returns,
            ..ANYTHING
        })
    }

    /// Whether an indirect branch goes to an import that does not return.
    pub(super) fn calls_noreturn(&self, instruction: &Instruction) -> bool {
        instruction.op0_kind() == OpKind::Memory
            && instruction.is_ip_rel_memory_operand()
            && self.image.is_noreturn(instruction.ip_rel_memory_address())
    }
}
