//! Where the thread-local storage of what a worker started with lies.
//!
//! ```text
//!   …  | libc.so.6 | libstdc++.so.6 | executable |  thread pointer
//!      ◄─ offset ───────────────────────────────┘
//! ```
//!
//! ld.so lays the blocks out below the thread pointer in the order of its list
//! (glibc's `_dl_determine_tlsoffset`, `elf/dl-tls.c`). Some offsets stand in
//! memory, because a relocation asked for them. The rest follow from the rule,
//! which is trusted only where it yields those that are known.

use super::Module;
use crate::elf::TlsSegment;

/// How many bytes below the thread pointer each block begins, in their order.
fn layout(blocks: &[TlsSegment]) -> Option<Vec<u64>> {
    let mut offset = 0_u64;
    // A gap that alignment has left: smaller blocks go there.
    let (mut free_top, mut free_bottom) = (0_u64, 0_u64);
    let mut offsets = Vec::with_capacity(blocks.len());
    for block in blocks {
        let mask = block.align - 1;
        let first = (block.vaddr & mask).wrapping_neg() & mask;
        let fit = |top: u64| {
            let end = top.checked_add(block.mem_size)?.saturating_sub(first);
            end.checked_next_multiple_of(block.align)?
                .checked_add(first)
        };
        if free_bottom - free_top >= block.mem_size {
            let at = fit(free_top)?;
            if at <= free_bottom {
                free_top = at;
                offsets.push(at);
                continue;
            }
        }
        let at = fit(offset)?;
        let gap = at.checked_sub(offset)?.saturating_sub(block.mem_size);
        if gap > free_bottom - free_top {
            free_top = offset;
            free_bottom = at - block.mem_size;
        }
        offset = at;
        offsets.push(at);
    }
    Some(offsets)
}

/// Fills in what is not known yet of the modules that a worker started with.
pub(super) fn complete(startup: &mut [Module]) {
    let with: Vec<(usize, TlsSegment)> = startup
        .iter()
        .enumerate()
        .filter_map(|(index, module)| Some((index, module.image.tls?)))
        .collect();
    let blocks: Vec<TlsSegment> = with.iter().map(|(_, block)| *block).collect();
    let Some(offsets) = layout(&blocks) else {
        return;
    };
    let known = |index: usize| startup[index].tls_offset;
    let right = with.iter().zip(&offsets);
    if !right
        .clone()
        .all(|((index, _), offset)| known(*index).is_none_or(|k| k == *offset))
    {
        return;
    }
    // One that is known has all blocks before it right, too.
    let Some(last) = with.iter().rposition(|(index, _)| known(*index).is_some()) else {
        return;
    };
    let found: Vec<(usize, u64)> = right
        .take(last)
        .map(|((i, _), offset)| (*i, *offset))
        .collect();
    for (index, offset) in found {
        startup[index].tls_offset = Some(offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(vaddr: u64, mem_size: u64, align: u64) -> TlsSegment {
        TlsSegment {
            vaddr,
            file_size: 0,
            mem_size,
            align,
        }
    }

    #[test]
    fn blocks_lie_below_each_other() {
        // libstdc++ and libc of Debian 12, as a process had them.
        let blocks = [block(0x20_98a8, 0x20, 8), block(0x1c_f8d0, 0x90, 8)];
        assert_eq!(layout(&blocks).unwrap(), [0x20, 0xb0]);
    }

    #[test]
    fn a_block_begins_as_its_address_is_aligned() {
        let offsets = layout(&[block(0, 4, 4), block(0x1010, 8, 64), block(0, 8, 8)]).unwrap();
        assert_eq!(offsets[0], 4);
        // The same distance from a multiple of 64 as the segment.
        assert_eq!(offsets[1].wrapping_neg() % 64, 0x10);
        assert!(offsets[1] >= 12);
        // Into the gap between the two.
        assert_eq!(offsets[2], 16);
    }

    #[test]
    fn sizes_that_do_not_fit_are_survived() {
        assert_eq!(
            layout(&[block(0, u64::MAX, 8), block(0, u64::MAX, 8)]),
            None
        );
    }
}
