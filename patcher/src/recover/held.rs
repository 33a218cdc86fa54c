//! Whether what lies at planned addresses is what an agent mapped there, or the
//! worker's own.
//!
//! A patch reserves its range as one private, anonymous, read-only mapping for
//! which no memory is set aside, then maps its parts anew in a known order. So
//! what a dead agent left is some prefix of that, page for page. Nothing else
//! in a worker looks like it: what `malloc`, threads and loaders map is
//! writable, has no access at all, or is a file. (Read-only, anonymous *and*
//! without memory set aside is what tells a mere reservation; where the kernel
//! sets memory aside in any case, `vm.overcommit_memory = 2`, the first two
//! must do.)
//!
//! Pure: mappings in, an answer out.

use ptrace_shim::Mapping;

use crate::journal::Planned;
use crate::manifest::{CONTROL_PATH, Region};
use crate::plan::Access;

/// What lies at planned addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Nothing at all.
    Nothing,
    /// Some prefix of what the plan maps, and nothing else.
    Ours,
    /// Something else.
    Other,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Part(Access),
    Control,
    Base,
}

/// What lies in the range of `planned`. `set_aside` says whether memory is set
/// aside for what is mapped at an address.
pub(super) fn held(
    planned: &Planned,
    maps: &[Mapping],
    set_aside: &mut dyn FnMut(u64) -> bool,
) -> Held {
    let whole = planned.reservation;
    let Some(end) = whole.start.checked_add(whole.len) else {
        return Held::Other;
    };
    let touching: Vec<&Mapping> = maps
        .iter()
        .filter(|m| m.start.0 < end && m.end.0 > whole.start)
        .collect();
    if touching.is_empty() {
        return Held::Nothing;
    }
    let is = |region: Region, kind: Kind| covered(region, &touching, kind);
    let parts = planned
        .parts
        .iter()
        .map(|(region, access)| (*region, Kind::Part(*access)))
        .chain(planned.control.map(|region| (region, Kind::Control)));
    let mut before_all = true;
    let mut only_base = true;
    for (region, kind) in parts {
        let mapped = is(region, kind);
        if mapped && !before_all || !mapped && !is(region, Kind::Base) {
            return Held::Other;
        }
        before_all &= mapped;
        only_base &= !mapped;
    }
    if !rest(planned)
        .into_iter()
        .all(|region| is(region, Kind::Base))
    {
        return Held::Other;
    }
    if only_base && touching.iter().any(|m| set_aside(m.start.0)) {
        return Held::Other;
    }
    Held::Ours
}

/// What stays as the reservation mapped it.
fn rest(planned: &Planned) -> Vec<Region> {
    let mut taken: Vec<Region> = planned.parts.iter().map(|(region, _)| *region).collect();
    taken.extend(planned.control);
    taken.sort_by_key(|region| region.start);
    let mut rest = Vec::new();
    let mut at = planned.reservation.start;
    for region in taken {
        if region.start > at {
            rest.push(Region {
                start: at,
                len: region.start - at,
            });
        }
        at = at.max(region.start.saturating_add(region.len));
    }
    let end = planned
        .reservation
        .start
        .saturating_add(planned.reservation.len);
    if end > at {
        rest.push(Region {
            start: at,
            len: end - at,
        });
    }
    rest
}

/// Whether every page of `region` is mapped in this way.
fn covered(region: Region, maps: &[&Mapping], kind: Kind) -> bool {
    let end = region.start.saturating_add(region.len);
    let mut at = region.start;
    for m in maps {
        if m.end.0 <= at || m.start.0 >= end {
            continue;
        }
        if m.start.0 > at || !looks(m, kind) {
            return false;
        }
        at = m.end.0;
    }
    at >= end
}

fn looks(m: &Mapping, kind: Kind) -> bool {
    let access = (m.readable, m.writable, m.executable);
    let anonymous = !m.shared && m.inode == 0 && m.path.is_empty();
    match kind {
        Kind::Base | Kind::Part(Access::Read) => anonymous && access == (true, false, false),
        Kind::Part(Access::ReadWrite) => anonymous && access == (true, true, false),
        Kind::Part(Access::ReadExecute) => anonymous && access == (true, false, true),
        Kind::Control => {
            let path = m.path.strip_suffix(" (deleted)").unwrap_or(&m.path);
            m.shared && access == (true, true, false) && path == CONTROL_PATH
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ptrace_shim::Address;

    const START: u64 = 0x7f00_0000_0000;

    fn region(page: u64, pages: u64) -> Region {
        Region {
            start: START + page * 0x1000,
            len: pages * 0x1000,
        }
    }

    /// Code, a guard, data, the control area, a guard.
    fn planned() -> Planned {
        Planned {
            reservation: region(0, 10),
            parts: vec![
                (region(0, 2), Access::ReadExecute),
                (region(3, 3), Access::ReadWrite),
            ],
            control: Some(region(6, 3)),
        }
    }

    fn map(page: u64, pages: u64, access: &str) -> Mapping {
        let Region { start, len } = region(page, pages);
        let shared = access.ends_with('s');
        Mapping {
            start: Address(start),
            end: Address(start + len),
            readable: access.starts_with('r'),
            writable: &access[1..2] == "w",
            executable: &access[2..3] == "x",
            shared,
            offset: 0,
            device: (0, 0),
            inode: u64::from(shared),
            path: if shared {
                "/memfd:nightgraft (deleted)".into()
            } else {
                String::new()
            },
        }
    }

    fn of(maps: &[Mapping]) -> Held {
        held(&planned(), maps, &mut |_| false)
    }

    #[test]
    fn every_prefix_of_the_plan_is_ours() {
        for maps in [
            vec![map(0, 10, "r--p")],
            vec![map(0, 2, "r-xp"), map(2, 8, "r--p")],
            vec![
                map(0, 2, "r-xp"),
                map(2, 1, "r--p"),
                map(3, 3, "rw-p"),
                map(6, 4, "r--p"),
            ],
            vec![
                map(0, 2, "r-xp"),
                map(2, 1, "r--p"),
                map(3, 3, "rw-p"),
                map(6, 3, "rw-s"),
                map(9, 1, "r--p"),
            ],
            // The kernel has merged it with a neighbour of the same kind.
            vec![map(0, 40, "r--p")],
        ] {
            assert_eq!(of(&maps), Held::Ours, "{maps:?}");
        }
    }

    #[test]
    fn nothing_and_the_worker_s_own_are_told_apart() {
        assert_eq!(of(&[]), Held::Nothing);
        assert_eq!(of(&[map(10, 4, "rw-p")]), Held::Nothing);
        for maps in [
            vec![map(0, 10, "rw-p")],
            vec![map(0, 10, "---p")],
            vec![map(2, 3, "r--p")],
            vec![map(0, 9, "r--p")],
            // In another order than the plan maps them.
            vec![map(0, 3, "r--p"), map(3, 3, "rw-p"), map(6, 4, "r--p")],
            vec![map(0, 2, "r-xp"), map(2, 4, "r--p"), map(6, 4, "rw-p")],
            vec![map(0, 10, "r--s")],
        ] {
            assert_eq!(of(&maps), Held::Other, "{maps:?}");
        }
    }

    #[test]
    fn a_read_only_mapping_with_memory_set_aside_is_the_worker_s() {
        let maps = [map(0, 10, "r--p")];
        assert_eq!(held(&planned(), &maps, &mut |_| true), Held::Other);
        let further = [map(0, 2, "r-xp"), map(2, 8, "r--p")];
        assert_eq!(held(&planned(), &further, &mut |_| true), Held::Ours);
    }

    #[test]
    fn a_range_that_wraps_is_not_ours() {
        let wraps = Planned {
            reservation: Region {
                start: u64::MAX - 0xfff,
                len: 0x2000,
            },
            parts: Vec::new(),
            control: None,
        };
        assert_eq!(held(&wraps, &[], &mut |_| false), Held::Other);
    }
}
