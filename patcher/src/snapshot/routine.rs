//! The worker's own `invoke_func` routine.
//!
//! It has a symbol. Where the executable was stripped, the worker itself tells:
//! its executable passes the routine to `faas_create_func_worker`, and the
//! function's library keeps the address somewhere.

use super::{INVOKE_PREFIX, Map, Memory, Worker};
use crate::analyses::Analyses;
use crate::elf;

/// Read from memory at once, in bytes.
const CHUNK: u64 = 1 << 20;
/// Most memory that is looked through, in bytes.
const MOST: u64 = 1 << 30;

/// Live addresses of every function of the executable that may be the routine
/// (one, unless something is odd).
#[must_use]
pub fn invoke_routines(worker: &Worker, memory: &dyn Memory, analyses: &Analyses) -> Vec<u64> {
    let executable = worker.executable();
    let named = elf::symbol_by_prefix(&executable.image.bytes, INVOKE_PREFIX);
    if !named.is_empty() {
        let live = |address: u64| address.wrapping_add(executable.bias);
        return named.into_iter().map(live).collect();
    }
    let Ok(code) = analyses.executable(&executable.image.bytes) else {
        return Vec::new();
    };
    let mut found: Vec<u64> = code
        .passed_to_create()
        .into_iter()
        .map(|at| at.0.wrapping_add(executable.bias))
        .collect();
    if !found.is_empty() {
        let kept = kept(&found, &worker.maps, memory);
        found.retain(|at| kept.contains(at));
    }
    found
}

/// Those of `addresses` that some writable memory (but for the stack, where
/// arguments leave traces) holds in an aligned word.
fn kept(addresses: &[u64], maps: &[Map], memory: &dyn Memory) -> Vec<u64> {
    let mut found = Vec::new();
    let mut left = MOST;
    for map in maps.iter().filter(|m| m.writable && m.name != "[stack]") {
        let mut at = map.start;
        while at < map.end && left > 0 {
            let len = (map.end - at).min(CHUNK).min(left);
            let mut bytes = vec![0; len as usize];
            // What is gone meanwhile holds nothing.
            if memory.read(at, &mut bytes).is_ok() {
                for word in bytes.chunks_exact(8) {
                    let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
                    if addresses.contains(&word) && !found.contains(&word) {
                        found.push(word);
                    }
                }
            }
            left -= len;
            at += len;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::testing::FakeMemory;

    fn map(start: u64, writable: bool, name: &str) -> Map {
        Map {
            start,
            end: start + 0x40,
            writable,
            executable: false,
            name: name.into(),
        }
    }

    #[test]
    fn an_address_counts_where_it_is_kept_and_not_where_it_came_by() {
        let mut memory = FakeMemory::default();
        for start in [0x1000, 0x2000, 0x3000] {
            memory.put(start, &[0; 0x40]);
        }
        memory.put_u64(0x1008, 0x11);
        memory.put_u64(0x2010, 0x22);
        memory.put_u64(0x3018, 0x33);
        memory.put_u64(0x1021, 0x44); // not aligned
        let maps = [
            map(0x1000, true, "[heap]"),
            map(0x2000, false, "/lib"),
            map(0x3000, true, "[stack]"),
            map(0x9000, true, "gone"),
        ];
        assert_eq!(kept(&[0x11, 0x22, 0x33, 0x44], &maps, &memory), [0x11]);
    }
}
