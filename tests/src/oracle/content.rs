//! What an image has in memory: ours, or ld.so's.

use nightgraft_patcher::elf::Image;
use nightgraft_patcher::load::Loaded;
use nightgraft_patcher::snapshot::{Memory, SnapshotError};

/// The bytes of each segment, those that come from the file or, where it may
/// be written, those behind them too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    /// Live address, bytes; ascending.
    segments: Vec<(u64, Vec<u8>)>,
}

/// The places of an image's segments: live address and bytes.
fn places(image: &Image, bias: u64) -> impl Iterator<Item = (u64, usize)> {
    image.segments.iter().map(move |s| {
        let len = if s.writable() { s.mem_size } else { s.file_size };
        (s.vaddr.wrapping_add(bias), len as usize)
    })
}

impl Content {
    /// What our loader would write.
    pub(super) fn ours(image: &Image, loaded: &Loaded) -> Content {
        let segments = places(image, loaded.bias).zip(&loaded.segments);
        Content {
            segments: segments
                .map(|((start, len), segment)| {
                    let skip = (start - segment.start) as usize;
                    let bytes = segment.bytes.get(skip..).unwrap_or_default();
                    let mut bytes = bytes[..bytes.len().min(len)].to_vec();
                    bytes.resize(len, 0);
                    (start, bytes)
                })
                .collect(),
        }
    }

    /// What lies in memory.
    pub(super) fn live(
        memory: &dyn Memory,
        image: &Image,
        bias: u64,
    ) -> Result<Content, SnapshotError> {
        let segments = places(image, bias).map(|(start, len)| {
            let mut bytes = vec![0; len];
            memory.read(start, &mut bytes)?;
            Ok((start, bytes))
        });
        Ok(Content {
            segments: segments.collect::<Result<_, SnapshotError>>()?,
        })
    }

    fn find(&self, at: u64, len: usize) -> Option<(usize, usize)> {
        self.segments.iter().enumerate().find_map(|(index, s)| {
            let from = usize::try_from(at.checked_sub(s.0)?).ok()?;
            (from.checked_add(len)? <= s.1.len()).then_some((index, from))
        })
    }

    /// The word at a live address.
    pub(super) fn word(&self, at: u64) -> Option<u64> {
        let (index, from) = self.find(at, 8)?;
        let bytes = self.segments[index].1.get(from..from + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Takes `len` bytes over from `other`, whose segments are the same: they
    /// have been compared.
    pub(super) fn settle(&mut self, other: &Content, at: u64, len: usize) {
        if let Some((index, from)) = self.find(at, len) {
            let theirs = &other.segments[index].1[from..from + len];
            self.segments[index].1[from..from + len].copy_from_slice(theirs);
        }
    }

    /// Words in which they differ, as far as `most`: live address, ours, theirs.
    pub(super) fn differences(&self, other: &Content, most: usize) -> Vec<(u64, u64, u64)> {
        let mut found = Vec::new();
        for ((start, ours), (_, theirs)) in self.segments.iter().zip(&other.segments) {
            if ours == theirs {
                continue;
            }
            let words = ours.chunks(8).zip(theirs.chunks(8));
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
            segments: vec![(0x1000, bytes.to_vec())],
        };
        let mut ours = content(&[1; 20]);
        let theirs = content(&[[1; 8], [2; 8]].concat().into_iter().chain([3; 4]).collect::<Vec<_>>());
        let two = u64::from_le_bytes([2; 8]);
        let one = u64::from_le_bytes([1; 8]);
        assert_eq!(
            ours.differences(&theirs, 9),
            [(0x1008, one, two), (0x1010, 0x0101_0101, 0x0303_0303)]
        );
        assert_eq!(ours.differences(&theirs, 1).len(), 1);
        ours.settle(&theirs, 0x1008, 8);
        assert_eq!(ours.word(0x1008), Some(two));
        assert_eq!(ours.differences(&theirs, 9).len(), 1);
        ours.settle(&theirs, 0x1010, 8);
        assert_eq!(ours.word(0x1010), None);
        assert_eq!(ours.differences(&theirs, 9).len(), 1);
    }
}
