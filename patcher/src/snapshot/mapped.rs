//! Whether a file is what is mapped.
//!
//! ```text
//!  headers       the first page: in memory and in the file the same
//!  build-id      in memory and in the file the same; who has one is done
//!  code          else all segments that are not written, which no relocation
//!                changes (but in a library with text relocations, of which
//!                only the headers tell)
//! ```
//!
//! We change code ourselves: the windows in a caller's library. They are
//! known from the record in the worker, and their bytes count as what the
//! record says that they were before. A window's place and old bytes come from
//! the library that was mapped then, so another file still differs: in what
//! lies beside the windows or in the old bytes. Other changes (a debugger's
//! breakpoint) make a library without a build-id unrecognisable.

use super::{Map, Memory, SnapshotError};
use crate::elf::{Image, Segment};
use crate::manifest;

/// Read from memory at once, in bytes.
const CHUNK: usize = 1 << 20;

/// A process whose files are compared with its memory.
pub(super) struct Mapped<'a> {
    pub(super) pid: i32,
    pub(super) start_time: u64,
    pub(super) maps: &'a [Map],
    pub(super) memory: &'a dyn Memory,
}

impl Mapped<'_> {
    /// The file `path`, loaded at `bias`, must be what is mapped there.
    pub(super) fn check(&self, path: &str, image: &Image, bias: u64) -> Result<(), SnapshotError> {
        if same(self.memory, image, bias, &|| self.windows())? {
            return Ok(());
        }
        Err(SnapshotError::Replaced {
            pid: self.pid,
            path: path.to_owned(),
        })
    }

    /// Addresses of the windows in place, and their bytes before. None where
    /// the record cannot be read: then nothing is known to be ours.
    fn windows(&self) -> Vec<(u64, Vec<u8>)> {
        let found = manifest::find(self.pid, self.start_time, self.maps, self.memory);
        let Ok(Some(present)) = found else {
            return Vec::new();
        };
        let windows = present.manifest.windows.iter().enumerate();
        windows
            .filter(|(index, _)| present.in_place(*index))
            .map(|(_, window)| (window.address, window.before.clone()))
            .collect()
    }
}

/// Whether `image`, loaded at `bias`, is what `memory` holds, but for the
/// `windows` (which are asked for only where they matter).
fn same(
    memory: &dyn Memory,
    image: &Image,
    bias: u64,
    windows: &dyn Fn() -> Vec<(u64, Vec<u8>)>,
) -> Result<bool, SnapshotError> {
    let constant = |s: &&Segment| s.file_size > 0 && !s.writable();
    let Some(first) = image.segments.iter().find(constant) else {
        return Ok(false);
    };
    let head = image.at(first.vaddr, first.file_size.min(4096));
    if !holds(memory, head, first.vaddr.wrapping_add(bias))? {
        return Ok(false);
    }
    if let (Some(id), Some(vaddr)) = (&image.build_id, image.build_id_vaddr) {
        let there = image.read_only(vaddr) && image.at(vaddr, id.len() as u64) == Some(id);
        if there && !id.is_empty() {
            return holds(memory, Some(id), vaddr.wrapping_add(bias));
        }
    }
    let mut ours = None;
    if image.dynamic.text_relocations {
        return Ok(true);
    }
    for s in image.segments.iter().filter(constant) {
        let file = image.at(s.vaddr, s.file_size).unwrap_or_default();
        let mut at = s.vaddr.wrapping_add(bias);
        for part in file.chunks(CHUNK) {
            let mut live = vec![0; part.len()];
            memory.read(at, &mut live)?;
            if live != part {
                restore(&mut live, at, ours.get_or_insert_with(windows));
                if live != part {
                    return Ok(false);
                }
            }
            at = at.wrapping_add(part.len() as u64);
        }
    }
    Ok(true)
}

fn holds(memory: &dyn Memory, file: Option<&[u8]>, at: u64) -> Result<bool, SnapshotError> {
    let Some(file) = file else { return Ok(false) };
    let mut live = vec![0; file.len()];
    memory.read(at, &mut live)?;
    Ok(live == file)
}

/// Puts back what the windows took from `live`, which lies at `at`.
fn restore(live: &mut [u8], at: u64, windows: &[(u64, Vec<u8>)]) {
    for (address, before) in windows {
        for (index, byte) in before.iter().enumerate() {
            let offset = address
                .checked_add(index as u64)
                .and_then(|place| place.checked_sub(at))
                .and_then(|offset| usize::try_from(offset).ok());
            if let Some(live) = offset.and_then(|offset| live.get_mut(offset)) {
                *live = *byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::snapshot::testing::FakeMemory;

    #[test]
    fn windows_are_put_back_where_they_overlap() {
        let windows = [
            (98, vec![1, 2, 3, 4]),
            (105, vec![5, 6]),
            (108, vec![7, 8, 9]),
            (0, vec![10]),
            (u64::MAX, vec![11]),
        ];
        let mut live = [0; 10];
        restore(&mut live, 100, &windows);
        assert_eq!(live, [3, 4, 0, 0, 0, 5, 6, 0, 7, 8]);
    }

    /// Two libraries without a build-id that differ in a number in the code.
    fn builds() -> [Image; 2] {
        ["5", "7"].map(|number| build(&format!("int f(void) {{ return {number}; }}")))
    }

    fn build(text: &str) -> Image {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("a.c"), dir.path().join("a.so"));
        std::fs::write(&source, text).unwrap();
        let done = Command::new("gcc")
            .args(["-shared", "-fPIC", "-O1", "-nostdlib"])
            .args(["-Wl,--build-id=none", "-o"])
            .args([&out, &source])
            .status()
            .unwrap();
        assert!(done.success());
        Image::parse(std::fs::read(out).unwrap().into()).unwrap()
    }

    const BIAS: u64 = 0x7f00_0000_0000;

    fn map(image: &Image) -> FakeMemory {
        let mut memory = FakeMemory::default();
        for s in &image.segments {
            memory.put(s.vaddr + BIAS, image.at(s.vaddr, s.file_size).unwrap());
        }
        memory
    }

    #[test]
    fn a_rebuilt_library_of_equal_headers_is_another() {
        let [old, new] = builds();
        assert_eq!(old.at(0, 512), new.at(0, 512));
        let memory = map(&old);
        let is = |image| same(&memory, image, BIAS, &Vec::new).unwrap();
        assert!(is(&old) && !is(&new));
    }

    #[test]
    fn a_library_rebuilt_with_another_text_is_another() {
        let [old, new] =
            ["this", "that"].map(|s| build(&format!("char *f(void) {{ return \"{s}\"; }}")));
        assert_eq!(old.at(0, 512), new.at(0, 512));
        let memory = map(&old);
        let is = |image| same(&memory, image, BIAS, &Vec::new).unwrap();
        assert!(is(&old) && !is(&new));
    }

    #[test]
    fn a_window_of_ours_is_no_difference_but_hides_none() {
        let [old, new] = builds();
        let at = old.symbols[old.exports["f"][0]].value;
        let before = old.at(at, 5).unwrap().to_vec();
        let windows = || vec![(at + BIAS, before.clone())];
        let mut memory = map(&old);
        memory.put(at + BIAS, &[0xe8, 1, 2, 3, 4]);
        let is = |image, windows: &dyn Fn() -> _| same(&memory, image, BIAS, windows).unwrap();
        assert!(is(&old, &windows));
        assert!(!is(&old, &Vec::new));
        assert!(!is(&new, &windows));
    }
}
