//! What an image has in memory: ours, or ld.so's.

use nightgraft_patcher::elf::Image;
use nightgraft_patcher::load::Loaded;
use nightgraft_patcher::snapshot::{Memory, SnapshotError};

/// The bytes of each segment, those that come from the file or, where it may
/// be written, those behind them too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    /// Ascending.
    segments: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// Live address.
    start: u64,
    bytes: Vec<u8>,
    writable: bool,
}

/// The segments of an image at their places, of zeros.
fn parts(image: &Image, bias: u64) -> impl Iterator<Item = Part> {
    image.segments.iter().map(move |s| {
        let len = if s.writable() {
            s.mem_size
        } else {
            s.file_size
        };
        Part {
            start: s.vaddr.wrapping_add(bias),
            bytes: vec![0; len as usize],
            writable: s.writable(),
        }
    })
}

impl Content {
    /// What our loader would write.
    pub(super) fn ours(image: &Image, loaded: &Loaded) -> Content {
        let mut segments: Vec<Part> = parts(image, loaded.bias).collect();
        for (part, segment) in segments.iter_mut().zip(&loaded.segments) {
            let skip = (part.start - segment.start) as usize;
            let made = segment.bytes.get(skip..).unwrap_or_default();
            let len = made.len().min(part.bytes.len());
            part.bytes[..len].copy_from_slice(&made[..len]);
        }
        Content { segments }
    }

    /// What lies in memory.
    pub(super) fn live(
        memory: &dyn Memory,
        image: &Image,
        bias: u64,
    ) -> Result<Content, SnapshotError> {
        let mut segments: Vec<Part> = parts(image, bias).collect();
        for part in &mut segments {
            memory.read(part.start, &mut part.bytes)?;
        }
        Ok(Content { segments })
    }

    fn find(&self, at: u64, len: usize) -> Option<(usize, usize)> {
        self.segments.iter().enumerate().find_map(|(index, s)| {
            let from = usize::try_from(at.checked_sub(s.start)?).ok()?;
            (from.checked_add(len)? <= s.bytes.len()).then_some((index, from))
        })
    }

    /// The word at a live address.
    pub(super) fn word(&self, at: u64) -> Option<u64> {
        let (index, from) = self.find(at, 8)?;
        let bytes = self.segments[index].bytes.get(from..from + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Takes `len` bytes over from `other`, whose segments are the same: they
    /// have been compared.
    pub(super) fn settle(&mut self, other: &Content, at: u64, len: usize) {
        if let Some((index, from)) = self.find(at, len) {
            let theirs = &other.segments[index].bytes[from..from + len];
            self.segments[index].bytes[from..from + len].copy_from_slice(theirs);
        }
    }

    /// Words in which they differ, those that may be written among them if
    /// `writable`, as far as `most`: live address, ours, theirs.
    pub(super) fn differences(
        &self,
        other: &Content,
        writable: bool,
        most: usize,
    ) -> Vec<(u64, u64, u64)> {
        let mut found = Vec::new();
        for (ours, theirs) in self.segments.iter().zip(&other.segments) {
            if ours == theirs || ours.writable && !writable {
                continue;
            }
            let start = ours.start;
            let words = ours.bytes.chunks(8).zip(theirs.bytes.chunks(8));
            for (index, (ours, theirs)) in words.enumerate().filter(|(_, (a, b))| a != b) {
                if found.len() == most {
                    return found;
                }
                found.push((start + index as u64 * 8, word(ours), word(theirs)));
            }
        }
        found
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_settled_is_no_difference() {
        let content = |bytes: &[u8]| Content {
            segments: vec![Part {
                start: 0x1000,
                bytes: bytes.to_vec(),
                writable: true,
            }],
        };
        let mut ours = content(&[1; 20]);
        let theirs = content(&[&[1; 8][..], &[2; 8], &[3; 4]].concat());
        let two = u64::from_le_bytes([2; 8]);
        let one = u64::from_le_bytes([1; 8]);
        assert_eq!(
            ours.differences(&theirs, true, 9),
            [(0x1008, one, two), (0x1010, 0x0101_0101, 0x0303_0303)]
        );
        assert_eq!(ours.differences(&theirs, true, 1).len(), 1);
        assert!(ours.differences(&theirs, false, 9).is_empty());
        ours.settle(&theirs, 0x1008, 8);
        assert_eq!(ours.word(0x1008), Some(two));
        assert_eq!(ours.differences(&theirs, true, 9).len(), 1);
        ours.settle(&theirs, 0x1010, 8);
        assert_eq!(ours.word(0x1010), None);
        assert_eq!(ours.differences(&theirs, true, 9).len(), 1);
    }
}
