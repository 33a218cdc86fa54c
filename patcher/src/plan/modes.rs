//! Whether the floating-point modes of MXCSR can be anything but the default.
//!
//! Reading MXCSR before and after a fused call is a third of the call. Where no
//! code of the caller's process and none of the callee's can change it, it
//! need not be read. The proof looks for the instructions at *every* offset of
//! the executable segments, aligned with instructions or not, and for imports
//! of the C library's functions that change modes; the C library itself
//! changes them only in those, and otherwise restores what it found.
//!
//! What code that is generated at run time does cannot be seen: a module that
//! can load or map code later counts as one that changes modes.

use crate::elf::Image;
use crate::load::Scope;
use crate::snapshot::{Module, Worker};

/// Functions of the C library that change modes (`<fenv.h>` and its kin).
const CHANGERS: &[&str] = &[
    "fesetround",
    "fesetenv",
    "feupdateenv",
    "feholdexcept",
    "fesetmode",
    "feenableexcept",
    "fedisableexcept",
    "setcontext",
    "swapcontext",
];
/// Functions by which other code may come in.
const LOADERS: &[&str] = &[
    "dlopen",
    "dlmopen",
    "mprotect",
    "mmap",
    "mmap64",
    "pkey_mprotect",
    "syscall",
];
/// Modules of the C library: what they hold runs as its functions do.
const C_LIBRARY: &[&str] = &[
    "libc.so.6",
    "libm.so.6",
    "ld-linux-x86-64.so.2",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
];

/// Whether MXCSR has its default modes whenever the caller calls the callee
/// and whenever that returns.
pub(super) fn mxcsr_is_fixed(caller: &Worker, callee: &Scope) -> bool {
    let loads = |image: &Image| imports(image, LOADERS);
    let brought_along = &caller.modules[caller.library..];
    let mut images = callee.images().iter();
    images.all(|i| !loads(&i.image) && !changes(&i.image))
        && !brought_along.iter().any(|m| loads(&m.image))
        && caller
            .modules
            .iter()
            .filter(|m| !is_c_library(m))
            .all(|m| !changes(&m.image))
}

fn is_c_library(module: &Module) -> bool {
    C_LIBRARY.contains(&module.short_name())
}

fn imports(image: &Image, names: &[&str]) -> bool {
    image
        .symbols
        .iter()
        .any(|s| s.undefined() && names.contains(&s.name.as_str()))
}

fn changes(image: &Image) -> bool {
    imports(image, CHANGERS)
        || image.segments.iter().filter(|s| s.executable()).any(|s| {
            // A segment that cannot be read is not proven anything about.
            image.at(s.vaddr, s.file_size).is_none_or(holds_a_load)
        })
}

/// Whether any offset of `code` reads as `ldmxcsr`, `fxrstor` or `xrstor` and
/// their kin: 0f ae or 0f c7 (or VEX's form of the former) with a memory
/// operand and the right extension of the opcode.
fn holds_a_load(code: &[u8]) -> bool {
    let extension = |modrm: u8| (modrm >> 6 != 3).then_some(modrm >> 3 & 7);
    code.windows(2).enumerate().any(|(at, pair)| {
        let before = |n: usize| at.checked_sub(n).and_then(|i| code.get(i)).copied();
        match (pair[0], extension(pair[1])) {
            // ldmxcsr is /2, fxrstor /1, xrstor /5.
            (0xae, Some(1 | 2 | 5)) => {
                before(1) == Some(0x0f) || before(2) == Some(0xc5) || before(3) == Some(0xc4)
            }
            // xrstors is /3.
            (0xc7, Some(3)) => before(1) == Some(0x0f),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_found_at_any_offset_and_stores_and_fences_are_not() {
        let found =
            |bytes: &[u8]| holds_a_load(&[&[0x90, 0x90, 0x90], bytes, &[0x90, 0x90]].concat());
        assert!(found(&[0x0f, 0xae, 0x14, 0x24]), "ldmxcsr [rsp]");
        assert!(found(&[0x41, 0x0f, 0xae, 0x55, 0xf8]), "ldmxcsr [r13-8]");
        assert!(found(&[0xc5, 0xf8, 0xae, 0x10]), "vldmxcsr [rax]");
        assert!(found(&[0xc4, 0xc1, 0x78, 0xae, 0x10]), "vldmxcsr [r8]");
        assert!(found(&[0x0f, 0xae, 0x0f]), "fxrstor [rdi]");
        assert!(found(&[0x48, 0x0f, 0xae, 0x2f]), "xrstor64 [rdi]");
        assert!(found(&[0x0f, 0xc7, 0x1f]), "xrstors [rdi]");
        assert!(!found(&[0x0f, 0xae, 0x1c, 0x24]), "stmxcsr [rsp]");
        assert!(!found(&[0x0f, 0xae, 0xe8]), "lfence");
        assert!(!found(&[0x0f, 0xae, 0xf0]), "mfence");
        assert!(!found(&[0x0f, 0xae, 0x38]), "clflush [rax]");
    }
}
