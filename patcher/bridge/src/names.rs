//! From a name, as a caller passes it, to the graft that it means.
//!
//! A name that is no constant has no address to be known by: a buffer is used
//! again for other names. So its bytes are hashed, eight at a time, and looked
//! up in a table that the patcher fills ([`fill`]); one comparison of all bytes
//! decides. The cost does not grow with the number of callees.

use core::sync::atomic::Ordering::Acquire;

use crate::abi::{Graft, MAX_GRAFTS, NAME_SLOTS, Worker};

const PAGE: usize = 4096;
/// Fractional part of the golden ratio: spreads what differs in few bits.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Eight bytes of a name, little-endian, zero from its end on; and whether it
/// ends among them.
fn cut(word: u64) -> (u64, bool) {
    // The lowest set bit is the top bit of the first zero byte.
    let zero = word.wrapping_sub(0x0101_0101_0101_0101) & !word & 0x8080_8080_8080_8080;
    if zero == 0 {
        return (word, false);
    }
    let below = (zero & zero.wrapping_neg()) >> 7;
    (word & below.wrapping_sub(1), true)
}

pub(crate) fn mix(hash: u64, word: u64) -> u64 {
    (hash.rotate_left(5) ^ word).wrapping_mul(SPREAD)
}

fn slot(hash: u64) -> usize {
    (hash >> 32) as usize % NAME_SLOTS
}

/// The hash of a name given without its terminator.
fn hash(name: &[u8]) -> u64 {
    let mut hash = 0;
    let mut ended = false;
    let mut rest = name;
    while !ended {
        let (part, behind) = rest.split_at(rest.len().min(8));
        let mut bytes = [0; 8];
        bytes[..part.len()].copy_from_slice(part);
        let (word, ends) = cut(u64::from_le_bytes(bytes));
        hash = mix(hash, word);
        (rest, ended) = (behind, ends);
    }
    hash
}

/// The same of the bytes at `name`, up to and without a NUL.
///
/// # Safety
/// A NUL-terminated string.
pub(crate) unsafe fn hash_at(mut name: *const u8) -> u64 {
    let mut hash = 0;
    loop {
        // SAFETY: as the caller promises; the string goes on.
        let (word, ends) = cut(unsafe { word_at(name) });
        hash = mix(hash, word);
        if ends {
            return hash;
        }
        name = name.wrapping_add(8);
    }
}

/// Eight bytes of a string; what lies behind its end may be anything.
///
/// # Safety
/// A NUL-terminated string.
#[inline(always)]
unsafe fn word_at(name: *const u8) -> u64 {
    // SAFETY: a whole word within the string's page is readable; at the page's
    // end only what belongs to the string is read.
    unsafe {
        if name as usize % PAGE <= PAGE - 8 {
            name.cast::<u64>().read_unaligned()
        } else {
            at_the_end_of_a_page(name)
        }
    }
}

#[cold]
unsafe fn at_the_end_of_a_page(name: *const u8) -> u64 {
    let mut bytes = [0; 8];
    for (index, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: nothing is read behind the NUL.
        *byte = unsafe { name.add(index).read() };
        if *byte == 0 {
            break;
        }
    }
    u64::from_le_bytes(bytes)
}

/// The table [`Worker::names`] for these names, each with its place in
/// [`Worker::grafts`]; places from [`MAX_GRAFTS`] on are left out.
#[must_use]
pub fn fill<'a>(names: impl IntoIterator<Item = (&'a [u8], usize)>) -> [u8; NAME_SLOTS] {
    let mut table = [0; NAME_SLOTS];
    for (name, place) in names.into_iter().filter(|(_, p)| *p < MAX_GRAFTS) {
        let mut at = slot(hash(name));
        // There are more slots than grafts.
        while table[at] != 0 {
            at = (at + 1) % NAME_SLOTS;
        }
        table[at] = place as u8 + 1;
    }
    table
}

/// The graft whose name equals the bytes at `name`, terminator included.
///
/// # Safety
/// `name` is 0 or the string that the RPC itself would read next; the patcher
/// has written what `worker` points at.
#[must_use]
pub unsafe fn find(worker: &Worker, name: u64) -> Option<u64> {
    if name == 0 {
        return None;
    }
    let name = name as *const u8;
    // SAFETY: as the caller promises.
    let mut at = slot(unsafe { hash_at(name) });
    for _ in 0..NAME_SLOTS {
        let place = usize::from(worker.names[at]);
        let graft = *worker.grafts.get(place.checked_sub(1)?)?;
        // SAFETY: as above; 0 where an entry is not there (yet).
        unsafe {
            if graft != 0 && same((*(graft as *const Graft)).name as *const u8, name) {
                return Some(graft);
            }
        }
        at = (at + 1) % NAME_SLOTS;
    }
    None
}

/// The graft of that name that a fused callee calls.
///
/// # Safety
/// As for [`find`].
#[must_use]
pub unsafe fn below(worker: &Worker, parent: &Graft, name: u64) -> Option<u64> {
    if name == 0 {
        return None;
    }
    let grafts = &worker.grafts[..usize::from(worker.count.load(Acquire)).min(MAX_GRAFTS)];
    grafts.iter().copied().find(|graft| {
        // SAFETY: as the caller promises; 0 where an entry is not there (yet).
        *graft != 0
            && unsafe {
                let graft = &*(*graft as *const Graft);
                graft.parent == core::ptr::from_ref(parent) as u64
                    && same(graft.name as *const u8, name as *const u8)
            }
    })
}

unsafe fn same(mut a: *const u8, mut b: *const u8) -> bool {
    loop {
        // SAFETY: both are NUL-terminated; the loop ends at the first
        // difference or at the common end.
        let ((left, ends), (right, _)) = unsafe { (cut(word_at(a)), cut(word_at(b))) };
        // Equal words end both or neither: only one that ends has a zero byte.
        if left != right {
            return false;
        }
        if ends {
            return true;
        }
        (a, b) = (a.wrapping_add(8), b.wrapping_add(8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::time::Instant;

    struct Bench {
        worker: Box<Worker>,
        _grafts: Vec<(Box<Graft>, CString)>,
    }

    fn bench(names: &[&str]) -> Bench {
        // SAFETY: every field is an integer, a cell or an array of them.
        let mut worker: Box<Worker> = unsafe { Box::new(core::mem::zeroed()) };
        let mut grafts = Vec::new();
        for (place, name) in names.iter().enumerate() {
            let text = CString::new(*name).unwrap();
            // SAFETY: as above.
            let mut graft: Box<Graft> = unsafe { Box::new(core::mem::zeroed()) };
            graft.name = text.as_ptr() as u64;
            worker.grafts[place] = core::ptr::from_ref(&*graft) as u64;
            grafts.push((graft, text));
        }
        worker.names = fill(names.iter().enumerate().map(|(p, n)| (n.as_bytes(), p)));
        Bench {
            worker,
            _grafts: grafts,
        }
    }

    fn place(bench: &Bench, name: &[u8]) -> Option<usize> {
        let text = CString::new(name).unwrap();
        // SAFETY: a C string, and structures made above.
        let graft = unsafe { find(&bench.worker, text.as_ptr() as u64) }?;
        bench.worker.grafts.iter().position(|g| *g == graft)
    }

    #[test]
    fn a_name_is_found_by_all_of_its_bytes_and_no_other() {
        let names = [
            "A",
            "Bar",
            "bar",
            "UserServ",
            "UserService",
            "UserService2",
            "UserServiceLongerYet",
            "12345678",
            "123456781234567",
            "1234567812345678",
        ];
        let bench = bench(&names);
        for (expected, name) in names.iter().enumerate() {
            assert_eq!(place(&bench, name.as_bytes()), Some(expected), "{name}");
        }
        for other in [
            "",
            "B",
            "Ba",
            "Barr",
            "BAR",
            "UserServicf",
            "12345678\u{1}",
            "\u{ff}",
        ] {
            assert_eq!(place(&bench, other.as_bytes()), None, "{other:?}");
        }
        // SAFETY: no string at all.
        assert_eq!(unsafe { find(&bench.worker, 0) }, None);
    }

    #[test]
    fn every_length_at_every_place_of_a_page_hashes_as_its_bytes() {
        let mut room = vec![0_u8; 3 * PAGE];
        let start = room.as_ptr() as usize;
        let edge = start.next_multiple_of(PAGE) + PAGE - start;
        for length in 0..40 {
            for before in 0..48 {
                room.fill(0xee);
                let at = edge - before;
                for (index, byte) in room[at..at + length].iter_mut().enumerate() {
                    *byte = (index * 37 + 1) as u8 | 0x80;
                }
                room[at + length] = 0;
                // SAFETY: NUL-terminated.
                let there = unsafe { hash_at(room[at..].as_ptr()) };
                assert_eq!(there, hash(&room[at..at + length]), "{length} at -{before}");
            }
        }
    }

    #[test]
    fn a_full_table_finds_all_and_ends_for_others() {
        let texts: Vec<String> = (0..MAX_GRAFTS).map(|i| format!("Function{i}")).collect();
        let names: Vec<&str> = texts.iter().map(String::as_str).collect();
        let bench = bench(&names);
        for (expected, name) in names.iter().enumerate() {
            assert_eq!(place(&bench, name.as_bytes()), Some(expected));
        }
        assert_eq!(place(&bench, b"Function64"), None);
    }

    /// `cargo test --release -p nightgraft-bridge -- --ignored --nocapture cost`
    #[test]
    #[ignore = "a measurement: it prints nanoseconds"]
    fn cost_of_a_look_up_with_1_and_with_64_callees() {
        const ROUNDS: u32 = 5_000_000;
        let texts: Vec<String> = (0..MAX_GRAFTS)
            .map(|i| format!("ComposePostService{i:02}"))
            .collect();
        let all: Vec<&str> = texts.iter().map(String::as_str).collect();
        for count in [1, 8, 64] {
            let bench = bench(&all[..count]);
            let strings: Vec<CString> = all[..count]
                .iter()
                .map(|n| CString::new(*n).unwrap())
                .collect();
            let mut best = f64::MAX;
            for _ in 0..5 {
                let since = Instant::now();
                for round in 0..ROUNDS as usize {
                    let name = &strings[round % count];
                    // SAFETY: a C string, and structures made above.
                    let graft = unsafe { find(&bench.worker, name.as_ptr() as u64) };
                    assert!(std::hint::black_box(graft).is_some());
                }
                best = best.min(since.elapsed().as_secs_f64() / f64::from(ROUNDS) * 1e9);
            }
            println!("{count:2} callees: {best:.2} ns");
        }
    }
}
