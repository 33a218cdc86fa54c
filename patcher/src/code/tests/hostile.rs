//! Broken files: an error or a result, never a panic or an endless loop.

use super::elf::{BAR, TEXT, library};
use crate::code::{CodeError, analyse};

fn sample() -> Vec<u8> {
    let mut code = vec![
        0x53, 0x48, 0x83, 0xec, 0x10, 0x48, 0x89, 0xfb, 0x48, 0x8b, 0x3f, 0x48, 0x89, 0xd1, 0x48,
        0x89, 0xf2, 0x4c, 0x8d, 0x44, 0x24, 0x08, 0x49, 0x89, 0xe1, 0x48, 0x8d, 0x35,
    ];
    let end = TEXT + code.len() as u64 + 4;
    code.extend((BAR.wrapping_sub(end) as u32).to_le_bytes());
    code.extend([0xff, 0x53, 0x08, 0x48, 0x83, 0xc4, 0x10, 0x5b, 0xc3]);
    library(&code, &[("faas_func_call", 0, code.len() as u64)], &[])
}

#[test]
fn the_sample_is_good() {
    assert_eq!(
        analyse(&sample()).expect("well-formed").sites("Bar").len(),
        1
    );
}

#[test]
fn what_is_no_library_is_said() {
    let error = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = sample();
        change(&mut file);
        analyse(&file).err()
    };
    assert_eq!(error(&Vec::clear), Some(CodeError::NotElf));
    assert_eq!(error(&|f| f[4] = 1), Some(CodeError::NotElf));
    assert_eq!(error(&|f| f[18] = 183), Some(CodeError::NotX86_64));
    assert_eq!(error(&|f| f[16] = 2), Some(CodeError::NotSharedObject));
    assert_eq!(error(&|f| f[64 + 56 + 4] = 4), Some(CodeError::NoCode));
    assert_eq!(
        error(&|f| f.truncate(0x3100)),
        Some(CodeError::Malformed { what: "segment" })
    );
    // The code segment at the top of the address space.
    assert_eq!(
        error(&|f| f[64 + 56 + 16..64 + 56 + 24].fill(0xff)),
        Some(CodeError::Malformed { what: "segment" })
    );
    assert_eq!(
        error(&|f| f[64 + 56 + 16 + 6] = 1),
        Some(CodeError::Malformed { what: "segment" })
    );
    assert_eq!(
        CodeError::Malformed { what: "segment" }.to_string(),
        "malformed segment"
    );
}

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn every_truncation_is_survived() {
    let file = sample();
    for length in (0..file.len()).step_by(7) {
        let _ = analyse(&file[..length]);
    }
}

#[test]
fn random_changes_are_survived() {
    let file = sample();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    // Where something is: headers, symbols, names, code, dynamic section.
    let places = [
        (0, 0x140),
        (0x400, 0x440),
        (0x800, 0x820),
        (0xc00, 0xc10),
        (0x1000, 0x1020),
        (0x4000, 0x4028),
        (0x3000, 0x3040),
    ];
    for _ in 0..4000 {
        let mut broken = file.clone();
        for _ in 0..=random.next() % 4 {
            let (start, end) = places[(random.next() % places.len() as u64) as usize];
            let at = start + random.next() % (end - start);
            broken[at as usize] = match random.next() % 4 {
                0 => 0xff,
                1 => 0,
                2 => 0x7f,
                _ => random.next() as u8,
            };
        }
        if let Ok(map) = analyse(&broken) {
            let _ = map.entry_window("faas_func_call");
        }
    }
}

#[test]
fn code_of_random_bytes_is_survived() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..200 {
        let code: Vec<u8> = (0..0xf00).map(|_| random.next() as u8).collect();
        let functions = [
            ("faas_func_call", 0, 0x700),
            ("faas_create_func_worker", 0x700, 0x800),
        ];
        let map = analyse(&library(&code, &functions, &[])).expect("only its code is odd");
        for site in map.all_sites() {
            if let Ok(window) = site.window {
                window
                    .stub(
                        0,
                        0x10_0000,
                        &crate::code::Tail::Bridge {
                            site_record: 1,
                            bridge_entry: 2,
                        },
                    )
                    .expect("what has a window has a stub");
            }
        }
    }
}
