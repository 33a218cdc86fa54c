//! What can be displaced into a stub, and what can't.

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::{NEAR, Obstacle, WindowKind};

/// Why a memory operand can't be displaced.
pub(super) fn operand_obstacle(i: &Instruction, window: WindowKind) -> Option<Obstacle> {
    let (base, index) = (i.memory_base(), i.memory_index());
    let narrow = |r: Register| r.is_gpr32() || r == Register::EIP;
    if narrow(base) || narrow(index) {
        return Some(Obstacle::Exotic);
    }
    let address_only = i.mnemonic() == Mnemonic::Lea;
    let below = (i.memory_displacement64() as i64) < 0;
    (window == WindowKind::Call && base == Register::RSP && below && !address_only)
        .then_some(Obstacle::Stack)
}

/// Why `i` can't be displaced into a stub of this kind, if it can't.
pub(super) fn obstacle(
    factory: &mut InstructionInfoFactory,
    i: &Instruction,
    window: WindowKind,
) -> Option<Obstacle> {
    use Mnemonic as M;
    match i.flow_control() {
        FlowControl::Next => {}
        // At a function's entry what leaves it can leave it from elsewhere.
        FlowControl::Return if window == WindowKind::Entry && i.mnemonic() == M::Ret => {}
        FlowControl::IndirectBranch if window == WindowKind::Entry => {}
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
            if window == WindowKind::Entry
                && i.op0_kind() == OpKind::NearBranch64
                && (i.is_jmp_short_or_near() || i.is_jcc_short_or_near()) =>
        {
            return None;
        }
        // A near call has the five bytes of a window: it ends it, and returns
        // behind it.
        FlowControl::Call
            if window == WindowKind::Entry
                && i.op0_kind() == OpKind::NearBranch64
                && i.len() == NEAR as usize =>
        {
            return None;
        }
        _ => return Some(Obstacle::Branch),
    }
    if matches!(i.mnemonic(), M::Endbr64 | M::Endbr32) {
        return Some(Obstacle::Endbr);
    }
    let segment = |n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register();
    let exotic = i.is_privileged()
        || i.is_save_restore_instruction()
        || (0..i.op_count()).any(segment)
        || i.has_lock_prefix() && i.memory_base() == Register::RSP
        || matches!(
            i.mnemonic(),
            M::Syscall
                | M::Xend
                | M::Xtest
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Wrpkru
                | M::Rdpkru
                | M::Incsspd
                | M::Incsspq
                | M::Rdsspd
                | M::Rdsspq
                | M::Saveprevssp
                | M::Rstorssp
                | M::Popfq
                | M::Popf
                | M::Enter
                | M::Insb
                | M::Insw
                | M::Insd
                | M::Outsb
                | M::Outsw
                | M::Outsd
                | M::Lss
                | M::Lfs
                | M::Lgs
        );
    if exotic {
        return Some(Obstacle::Exotic);
    }
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
        && let Some(obstacle) = operand_obstacle(i, window)
    {
        return Some(obstacle);
    }
    if window != WindowKind::Call || is_copy_of_rsp(i) {
        return None;
    }
    stack_use(factory, i).then_some(Obstacle::Stack)
}

/// `mov r64, rsp`, which a stub does as `lea r64, [rsp+8]`.
pub(in crate::code) fn is_copy_of_rsp(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Mov
        && i.op0_kind() == OpKind::Register
        && i.op0_register().is_gpr64()
        && i.op0_register() != Register::RSP
        && i.op1_kind() == OpKind::Register
        && i.op1_register() == Register::RSP
}

/// Whether `rsp` is used other than as the base of the memory operand.
fn stack_use(factory: &mut InstructionInfoFactory, i: &Instruction) -> bool {
    if i.is_stack_instruction() {
        return true;
    }
    let named =
        |n| i.op_kind(n) == OpKind::Register && i.op_register(n).full_register() == Register::RSP;
    if (0..i.op_count()).any(named) || i.memory_index().full_register() == Register::RSP {
        return true;
    }
    // Once as a base is what the operand's correction is for.
    let uses = factory
        .info(i)
        .used_registers()
        .iter()
        .filter(|r| r.register().full_register() == Register::RSP)
        .count();
    let as_base = i.memory_base() == Register::RSP
        && (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    uses > usize::from(as_base)
}
