//! Durations in time-stamp cycles, counted by size: four buckets to an octave,
//! so that a quantile is off by at most an eighth.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Buckets of a histogram.
pub const BUCKETS: usize = 128;
/// The first bucket holds everything below 2 to this power.
const FIRST: u32 = 5;
/// Buckets of one octave.
const PER_OCTAVE: usize = 4;

/// Counts by bucket. They wrap; who reads them takes differences.
#[derive(Debug)]
#[repr(transparent)]
pub struct Histogram(pub [AtomicU32; BUCKETS]);

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram([const { AtomicU32::new(0) }; BUCKETS])
    }
}

impl Histogram {
    /// Counts one duration. One thread counts, so no locked instruction.
    pub(crate) fn count(&self, cycles: u64) {
        if let Some(bucket) = self.0.get(bucket(cycles)) {
            bucket.store(bucket.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }
}

/// The bucket of a duration.
#[must_use]
pub fn bucket(cycles: u64) -> usize {
    let octave = 63 - (cycles | 1).leading_zeros();
    if octave < FIRST {
        return 0;
    }
    let part = (cycles >> (octave - 2)) as usize & (PER_OCTAVE - 1);
    let at = (octave - FIRST) as usize * PER_OCTAVE + part;
    if at < BUCKETS { at } else { BUCKETS - 1 }
}

/// The smallest duration in a bucket; that of the bucket behind the last is
/// what the last one would end at.
#[must_use]
pub fn lowest(bucket: usize) -> u64 {
    if bucket == 0 {
        return 0;
    }
    let octave = FIRST + (bucket / PER_OCTAVE) as u32;
    (PER_OCTAVE as u64 + (bucket % PER_OCTAVE) as u64) << (octave - 2)
}
