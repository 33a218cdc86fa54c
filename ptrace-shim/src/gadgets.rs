//! Two runs of instructions that every process has mapped already.
//!
//! ```text
//!   0f 05                   syscall            makes the call
//!   c3                      ret                returns into:
//!
//!   48 c7 c0 0f 00 00 00    mov  rax, 15       __restore_rt of the C library:
//!   0f 05                   syscall            rt_sigreturn
//! ```
//!
//! They are looked for in executable mappings of files and in the vdso, at any
//! offset: what the bytes were meant to be does not matter.

use crate::error::{Error, Result};
use crate::maps::Mapping;
use crate::{Address, Memory};
use serde::{Deserialize, Serialize};

const SYSCALL_RET: (&[u8], &str) = (&[0x0f, 0x05, 0xc3], "syscall; ret");
const RESTORE_RT: (&[u8], &str) = (
    &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05],
    "mov rax, 15; syscall",
);

/// Where a process has the instructions that remote system calls take.
///
/// Found once, while the process runs; good for as long as it keeps the
/// library mapped (checked before each borrow).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gadgets {
    /// A `syscall; ret`.
    pub syscall_ret: Address,
    /// A `mov rax, 15; syscall`.
    pub restore_rt: Address,
}

impl Gadgets {
    /// Looks for them in what the process has mapped executable from files:
    /// the C library first, then the dynamic linker, then anything.
    ///
    /// # Errors
    /// [`Error::NoGadget`] if one of them is nowhere; those of reading memory.
    pub fn find(memory: &Memory) -> Result<Gadgets> {
        let mut mappings = memory.process().mappings()?;
        mappings.retain(Mapping::is_code_of_a_file);
        mappings.sort_by_key(|mapping| preference(&mapping.path));
        let (mut syscall_ret, mut restore_rt) = (None, None);
        for mapping in &mappings {
            let missing = [
                (&mut syscall_ret, SYSCALL_RET.0),
                (&mut restore_rt, RESTORE_RT.0),
            ];
            for (found, bytes) in missing {
                if found.is_none() {
                    *found = search(memory, mapping, bytes)?;
                }
            }
            if let (Some(syscall_ret), Some(restore_rt)) = (syscall_ret, restore_rt) {
                return Ok(Gadgets {
                    syscall_ret,
                    restore_rt,
                });
            }
        }
        let (_, instructions) = if syscall_ret.is_none() {
            SYSCALL_RET
        } else {
            RESTORE_RT
        };
        Err(Error::NoGadget {
            pid: memory.process().pid(),
            instructions,
        })
    }

    /// Makes sure that the instructions are still where they were.
    pub(crate) fn check(&self, memory: &Memory) -> Result<()> {
        for (address, (bytes, instructions)) in [
            (self.syscall_ret, SYSCALL_RET),
            (self.restore_rt, RESTORE_RT),
        ] {
            let mut there = [0; 16];
            let there = &mut there[..bytes.len()];
            let gone = Error::GadgetGone {
                pid: memory.process().pid(),
                instructions,
                address,
            };
            match memory.read(address, there) {
                Ok(()) if there == bytes => {}
                Ok(()) | Err(Error::Memory { .. }) => return Err(gone),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The C library never goes away; others may be unloaded.
fn preference(path: &str) -> u8 {
    let name = path.rsplit('/').next().unwrap_or(path);
    if name.starts_with("libc.") || name.starts_with("libc-") || name.starts_with("ld-") {
        0
    } else if path == "[vdso]" {
        1
    } else {
        2
    }
}

/// The first place in a mapping that holds `bytes`. A mapping that went away
/// meanwhile, or whose file was cut short, holds none.
fn search(memory: &Memory, mapping: &Mapping, bytes: &[u8]) -> Result<Option<Address>> {
    const PIECE: u64 = 256 * 1024;
    let mut start = mapping.start;
    while start < mapping.end {
        let left = mapping.end.0 - start.0;
        // Pieces overlap, so that nothing is missed where they meet.
        let length = left.min(PIECE + bytes.len() as u64 - 1);
        let mut piece = vec![0; length as usize];
        match memory.read(start, &mut piece) {
            Ok(()) => {}
            Err(Error::Memory { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        if let Some(at) = piece.windows(bytes.len()).position(|at| at == bytes) {
            return Ok(start.checked_add(at as u64));
        }
        start = Address(start.0 + left.min(PIECE));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Process;

    #[test]
    fn this_process_has_them() {
        let process = Process::open(std::process::id().cast_signed()).unwrap();
        let memory = Memory::open(&process).unwrap();
        let gadgets = Gadgets::find(&memory).unwrap();
        gadgets.check(&memory).unwrap();
        let maps = process.mappings().unwrap();
        for address in [gadgets.syscall_ret, gadgets.restore_rt] {
            let mapping = maps.iter().find(|m| m.contains(address)).unwrap();
            assert!(mapping.is_code_of_a_file(), "{mapping:?}");
        }
        let moved = Gadgets {
            syscall_ret: Address(gadgets.syscall_ret.0 + 1),
            ..gadgets
        };
        let error = moved.check(&memory).unwrap_err();
        assert!(matches!(error, Error::GadgetGone { .. }), "{error}");
    }

    #[test]
    fn the_c_library_comes_first() {
        assert_eq!(preference("/usr/lib/x86_64-linux-gnu/libc.so.6"), 0);
        assert_eq!(preference("/lib/ld-musl-x86_64.so.1"), 0);
        assert_eq!(preference("[vdso]"), 1);
        assert_eq!(preference("/functions/libfoo.so"), 2);
    }
}
