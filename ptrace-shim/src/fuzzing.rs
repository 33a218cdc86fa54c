//! What the kernel and workers say, read: entry points for fuzzing alone.

use crate::Address;
use crate::seccomp::{Instruction, SeccompAnswer, SeccompFilters};

/// Reads a text as each of the files of `/proc`.
pub fn proc_text(text: &str) {
    if let Ok(mappings) = crate::maps::parse(text) {
        for mapping in mappings {
            let start = mapping.start;
            assert!(mapping.contains(start) || mapping.length() == 0);
            let _ = mapping.contains(Address(start.0.wrapping_add(mapping.length())));
            let _ = mapping.is_code_of_a_file();
        }
    }
    let _ = crate::process::parse_stat(text);
    let _ = crate::whereabouts::parse(text);
}

/// Runs bytes as the program of a filter: it ends, with an answer, and the same
/// each time.
pub fn filter(bytes: &[u8]) {
    let (call, program) = bytes.split_at(bytes.len().min(16));
    let number = |at: usize| call.get(at).copied().unwrap_or(0);
    let program = program
        .chunks_exact(8)
        .map(|c| Instruction {
            code: u16::from_le_bytes([c[0], c[1]]),
            if_true: c[2],
            if_false: c[3],
            k: u32::from_le_bytes([c[4], c[5], c[6], c[7]]),
        })
        .collect();
    let filters = SeccompFilters {
        programs: vec![program],
    };
    let arguments = [1, 2, 3, 4, 5, 6].map(|at| u64::from(number(at)) << (at * 8));
    let run = || filters.answer(number(0).into(), arguments, 0x40_0000);
    let answer: SeccompAnswer = run();
    assert_eq!(answer, run());
}
