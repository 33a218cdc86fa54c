//! Where in a worker's address space there is room.

use crate::snapshot::Map;

/// How far a `call rel32` reaches, less a margin for the library's own size
/// and the stub area's.
const REACH: u64 = (1 << 31) - (64 << 20);
/// Kept free above the heap and below the stack, which grow.
const GROWTH: u64 = 64 << 20;
/// Lowest address used: as high as any distribution's `vm.mmap_min_addr`.
const LOWEST: u64 = 1 << 20;
/// First address that user space does not have (47 bits).
const HIGHEST: u64 = 1 << 47;

/// The same, but all of it below `low`: what lies behind an executable is its
/// heap's to grow into.
#[must_use]
pub(super) fn below(maps: &[Map], (low, high): (u64, u64), len: u64) -> Option<u64> {
    let above = Map {
        start: low,
        end: u64::MAX,
        writable: false,
        executable: false,
        name: String::new(),
    };
    let lower = maps.iter().filter(|m| m.start < low).cloned();
    near(&lower.chain([above]).collect::<Vec<_>>(), (low, high), len)
}

/// The highest free range of `len` bytes (a multiple of the page size) from
/// which every address of `[low, high)` can be reached by a near call, and
/// the other way round.
#[must_use]
pub(super) fn near(maps: &[Map], (low, high): (u64, u64), len: u64) -> Option<u64> {
    let floor = high.saturating_sub(REACH).max(LOWEST);
    let ceiling = low.saturating_add(REACH).min(HIGHEST);
    let mut best = None;
    let mut start = LOWEST;
    let bounds = maps
        .iter()
        .map(|m| (m.start, m.end, m.name.as_str()))
        .chain([(HIGHEST, HIGHEST, "")]);
    let mut below = "";
    for (next, end, name) in bounds {
        let gap_low = if below == "[heap]" {
            start.saturating_add(GROWTH)
        } else {
            start
        }
        .max(floor);
        let gap_high = if name == "[stack]" {
            next.saturating_sub(GROWTH)
        } else {
            next
        }
        .min(ceiling);
        if gap_high >= gap_low && gap_high - gap_low >= len {
            // From the top, as the kernel places mappings.
            best = Some((gap_high - len) & !0xfff)
                .filter(|at| *at >= gap_low)
                .or(best);
        }
        (start, below) = (end.max(start), name);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(start: u64, end: u64, name: &str) -> Map {
        Map {
            start,
            end,
            writable: false,
            executable: false,
            name: name.into(),
        }
    }

    const LIB: (u64, u64) = (0x7f00_0000_0000, 0x7f00_0001_0000);

    #[test]
    fn the_room_is_below_the_lowest_library_when_they_are_packed() {
        let maps = [
            map(0x5555_0000_0000, 0x5555_0001_0000, "/worker"),
            map(0x5555_0001_0000, 0x5555_0002_0000, "[heap]"),
            map(LIB.0, LIB.1, "/libfoo.so"),
            map(LIB.1, 0x7f00_4000_0000 + (2 << 30), "/big"),
            map(0x7fff_0000_0000, 0x7fff_0002_0000, "[stack]"),
        ];
        assert_eq!(near(&maps, LIB, 0x5000), Some(LIB.0 - 0x5000));
    }

    #[test]
    fn stack_and_heap_keep_room_to_grow() {
        let maps = [
            map(LIB.0 - 0x2000, LIB.0 - 0x1000, "[heap]"),
            map(LIB.0, LIB.1, "/libfoo.so"),
            map(LIB.1 + 0x10_0000, LIB.1 + 0x20_0000, "[stack]"),
        ];
        let at = near(&maps, LIB, 0x1000).unwrap();
        assert!(at > LIB.1 + 0x20_0000 || at < LIB.0 - 0x2000, "{at:#x}");
    }

    #[test]
    fn below_an_executable_is_not_behind_its_heap() {
        let exe = (0x40_0000, 0x50_0000);
        let maps = [
            map(exe.0, exe.1, "/worker"),
            map(exe.1, exe.1 + 0x10_0000, "[heap]"),
            map(LIB.0, LIB.1, "/libfoo.so"),
        ];
        assert_eq!(below(&maps, exe, 0x3000), Some(exe.0 - 0x3000));
        assert!(near(&maps, exe, 0x3000).unwrap() > exe.1);
        let low = (0x10_1000, 0x50_0000);
        assert_eq!(below(&[map(low.0, low.1, "/worker")], low, 0x3000), None);
    }

    #[test]
    fn nothing_is_found_where_nothing_is_free() {
        let maps = [
            map(LIB.0 - (4 << 30), LIB.0, "/a"),
            map(LIB.0, LIB.1, "/lib"),
            map(LIB.1, LIB.1 + (4 << 30), "/b"),
        ];
        assert_eq!(near(&maps, LIB, 0x1000), None);
    }

    #[test]
    fn both_ends_stay_within_reach() {
        for maps in [
            vec![map(LIB.0, LIB.1, "/lib")],
            vec![map(LIB.0 - (1 << 30), LIB.1 + (1 << 30), "/lib")],
        ] {
            let at = near(&maps, LIB, 0x10_0000).unwrap();
            assert!(at.abs_diff(LIB.0) < 1 << 31 && (at + 0x10_0000).abs_diff(LIB.1) < 1 << 31);
        }
    }
}
