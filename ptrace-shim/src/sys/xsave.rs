//! Where XSAVE's standard format has its components, from CPUID.

use std::arch::x86_64::__cpuid_count;

/// Offset and size of component `index` (2 to 62) in bytes; both 0 if the CPU
/// does not have it. The traced thread runs on the same machine.
pub(crate) fn component(index: u32) -> (usize, usize) {
    const LEAF: u32 = 0xd;
    #[expect(
        unused_unsafe,
        reason = "CPUID's intrinsic became safe to call in Rust 1.94"
    )]
    // SAFETY: every x86-64 CPU has CPUID, and one whose kernel offers the
    // NT_X86_XSTATE register set has this leaf.
    let found = unsafe { __cpuid_count(LEAF, index) };
    (found.ebx as usize, found.eax as usize)
}
