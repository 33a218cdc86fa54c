//! The dynamic linker's own list of what is loaded, read from memory.
//!
//! `DT_DEBUG` of the executable points to `r_debug`, that to a chain of
//! `link_map` (`<link.h>`, a stable interface for debuggers). The order is the
//! order in which things were loaded, which is the order of symbol look-up.

use super::{Memory, SnapshotError};

/// Longest chain that is followed.
const MOST: usize = 4096;
/// Longest file name that is read, in bytes.
const LONGEST: usize = 4096;
/// Most bytes of all names together.
const MOST_NAMES: usize = 256 << 10;

/// One entry of the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Difference between live addresses and those in the image.
    pub(super) bias: u64,
    /// File name, empty for the executable.
    pub(super) name: String,
    /// Live address of the dynamic section.
    pub(super) dynamic: u64,
}

/// Follows the chain from the value of `DT_DEBUG`, which lies at `slot`.
pub(super) fn read(memory: &dyn Memory, slot: u64) -> Result<Vec<Loaded>, SnapshotError> {
    let broken = |what: &str| SnapshotError::LinkMap {
        what: what.to_owned(),
    };
    let debug = memory.u64(slot)?;
    if debug == 0 {
        return Err(broken(
            "the executable has no r_debug (yet): it is static or still starting",
        ));
    }
    // r_debug: version (int), map, brk, state (int): RT_CONSISTENT is 0.
    if memory.u64(debug.wrapping_add(24))? as u32 != 0 {
        return Err(broken("a library is being loaded or unloaded just now"));
    }
    let mut at = memory.u64(debug.wrapping_add(8))?;
    let mut chain = Vec::new();
    let mut left = MOST_NAMES;
    while at != 0 {
        if chain.len() == MOST {
            return Err(broken("the chain does not end"));
        }
        let mut entry = [0_u8; 32];
        memory.read(at, &mut entry)?;
        let field =
            |i: usize| u64::from_le_bytes(entry[i * 8..][..8].try_into().unwrap_or_default());
        let name = memory.string(field(1), LONGEST.min(left))?;
        left = left.saturating_sub(name.len().max(1));
        if left == 0 {
            return Err(broken("its names are too long"));
        }
        chain.push(Loaded {
            bias: field(0),
            name,
            dynamic: field(2),
        });
        at = field(3);
    }
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::testing::FakeMemory;

    fn memory() -> FakeMemory {
        let mut m = FakeMemory::default();
        m.put_u64(0x1000, 0x2000); // DT_DEBUG's value
        m.put_u64(0x2000, 1);
        m.put_u64(0x2008, 0x3000);
        m.put_u64(0x2018, 0);
        for (at, fields) in [
            (0x3000, [0x5555_0000, 0x4000, 0x5555_3000, 0x3100]),
            (0x3100, [0x7fff_0000, 0x4010, 0x7fff_1000, 0]),
        ] {
            for (i, f) in fields.into_iter().enumerate() {
                m.put_u64(at + i as u64 * 8, f);
            }
        }
        m.put(0x4000, b"\0");
        m.put(0x4010, b"/lib/libc.so.6\0");
        m
    }

    #[test]
    fn the_chain_is_read_in_its_order() {
        let chain = read(&memory(), 0x1000).unwrap();
        let names: Vec<_> = chain.iter().map(|l| (l.bias, l.name.as_str())).collect();
        assert_eq!(names, [(0x5555_0000, ""), (0x7fff_0000, "/lib/libc.so.6")]);
    }

    #[test]
    fn a_chain_that_bites_its_tail_ends() {
        let mut m = memory();
        m.put_u64(0x3118, 0x3000);
        assert!(
            read(&m, 0x1000)
                .unwrap_err()
                .to_string()
                .contains("does not end")
        );
    }

    #[test]
    fn a_chain_in_change_is_not_trusted() {
        let mut m = memory();
        m.put_u64(0x2018, 1);
        assert!(
            read(&m, 0x1000)
                .unwrap_err()
                .to_string()
                .contains("just now")
        );
    }
}
