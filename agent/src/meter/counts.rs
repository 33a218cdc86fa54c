//! Counts, what was added to a worker's since it was last read, and durations
//! out of them.

use nightgraft_patcher::observed::{Histogram, Series};

use crate::api::Latency;

/// What was counted of calls of one kind.
///
/// Of the buckets only those that hold something are kept: what a second adds
/// falls into a few, and there is one of these for every second of the window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) entered: u64,
    pub(super) returned: u64,
    pub(super) errors: u64,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    samples: u64,
    cycles: u64,
    /// `(bucket, how many)`, by bucket.
    buckets: Vec<(u16, u64)>,
}

impl Counts {
    pub(super) fn is_zero(&self) -> bool {
        *self == Counts::default()
    }

    pub(super) fn add(&mut self, other: &Counts) {
        // Saturating, as a worker may claim anything.
        let sums = [
            (&mut self.entered, other.entered),
            (&mut self.returned, other.returned),
            (&mut self.errors, other.errors),
            (&mut self.bytes_in, other.bytes_in),
            (&mut self.bytes_out, other.bytes_out),
            (&mut self.samples, other.samples),
            (&mut self.cycles, other.cycles),
        ];
        for (sum, more) in sums {
            *sum = sum.saturating_add(more);
        }
        for &(bucket, count) in &other.buckets {
            match self.buckets.binary_search_by_key(&bucket, |&(b, _)| b) {
                Ok(at) => self.buckets[at].1 = self.buckets[at].1.saturating_add(count),
                Err(at) => self.buckets.insert(at, (bucket, count)),
            }
        }
    }

    /// How long these calls took; `None` where none of them was measured.
    pub(super) fn latency(&self, cycles_per_ns: f64) -> Option<Latency> {
        if self.samples == 0 {
            return None;
        }
        let mean = self.cycles as f64 / self.samples as f64;
        // A duration may be in the sum and not in a bucket yet.
        let quantile = |q| self.quantile(q).unwrap_or(mean) / cycles_per_ns;
        Some(Latency {
            samples: self.samples,
            mean_ns: mean / cycles_per_ns,
            p50_ns: quantile(0.5),
            p90_ns: quantile(0.9),
            p99_ns: quantile(0.99),
        })
    }

    /// In cycles.
    fn quantile(&self, q: f64) -> Option<f64> {
        let all: u64 = self
            .buckets
            .iter()
            .fold(0, |sum, &(_, n)| sum.saturating_add(n));
        let rank = q * all as f64;
        let mut below = 0.0;
        let mut last = None;
        for &(bucket, count) in &self.buckets {
            let count = count as f64;
            last = Some(within(usize::from(bucket), (rank - below) / count));
            below += count;
            if rank <= below {
                break;
            }
        }
        last
    }
}

/// The duration that this share of a bucket's does not exceed, were they spread
/// evenly. Kept to where it is off by no more than an eighth wherever in the
/// bucket they lie; in the first bucket, which begins at zero, nothing can be.
fn within(bucket: usize, share: f64) -> f64 {
    let (low, high) = Histogram::bounds(bucket);
    let (low, high) = (low as f64, high as f64);
    let even = low + (high - low) * share.clamp(0.0, 1.0);
    if bucket == 0 {
        even
    } else {
        even.clamp(high * 0.875, low * 1.125)
    }
}

/// The counters of one series as they were last read.
///
/// They are read while they are written, each by itself: one may be there
/// already when another is not yet, and one read late may be older than what is
/// known. So each goes its own way, and only forward.
#[derive(Debug, Default)]
pub(super) struct Last {
    entered: u64,
    returned: u64,
    errors: u64,
    bytes_in: u64,
    bytes_out: u64,
    samples: u64,
    cycles: u64,
    /// Modulo 2^32, as the worker counts them; empty before the first reading.
    buckets: Vec<u32>,
}

impl Last {
    /// Takes a reading, and gives what it adds to those before.
    pub(super) fn advance(&mut self, now: &Series) -> Counts {
        let forward = |last: &mut u64, now: u64| {
            let more = now.saturating_sub(*last);
            *last = now.max(*last);
            more
        };
        Counts {
            entered: forward(&mut self.entered, now.entered),
            returned: forward(&mut self.returned, now.returned),
            errors: forward(&mut self.errors, now.errors),
            bytes_in: forward(&mut self.bytes_in, now.bytes_in),
            bytes_out: forward(&mut self.bytes_out, now.bytes_out),
            samples: forward(&mut self.samples, now.latency.samples),
            cycles: forward(&mut self.cycles, now.latency.cycles),
            buckets: self.advance_buckets(&now.latency.buckets),
        }
    }

    fn advance_buckets(&mut self, now: &[u64]) -> Vec<(u16, u64)> {
        let mut more = Vec::new();
        if self.buckets.is_empty() {
            self.buckets = now.iter().map(|&count| count as u32).collect();
            let counts = (0..).zip(now);
            more.extend(counts.filter(|&(_, &n)| n > 0).map(|(at, &n)| (at, n)));
            return more;
        }
        for (at, (last, &now)) in (0..).zip(self.buckets.iter_mut().zip(now)) {
            let now = now as u32;
            let ahead = now.wrapping_sub(*last);
            // More than half way round is a step back.
            if ahead != 0 && i32::try_from(ahead).is_ok() {
                more.push((at, u64::from(ahead)));
                *last = now;
            }
        }
        more
    }

    /// Calls that have begun and did not come back.
    pub(super) fn in_flight(&self) -> u64 {
        self.entered.saturating_sub(self.returned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(entered: u64, bucket: usize, count: u64) -> Series {
        let mut series = Series {
            entered,
            ..Series::default()
        };
        series.latency.buckets[bucket] = count;
        series
    }

    #[test]
    fn buckets_wrap_as_the_worker_counts_them() {
        let mut last = Last::default();
        let top = u64::from(u32::MAX);
        assert_eq!(last.advance(&series(1, 9, top - 1)).buckets, [(9, top - 1)]);
        // Widened, so that the wrap shows as a fall.
        assert_eq!(last.advance(&series(5, 9, 2)).buckets, [(9, 4)]);
        // Summed over images before it was narrowed: no fall, and the same.
        assert_eq!(last.advance(&series(6, 9, (1 << 32) + 3)).buckets, [(9, 1)]);
        assert_eq!(last.advance(&series(6, 9, 3)).buckets, []);
    }

    #[test]
    fn a_late_reading_takes_nothing_back_and_counts_nothing_twice() {
        let mut last = Last::default();
        last.advance(&series(10, 9, 7));
        assert!(last.advance(&series(8, 9, 5)).is_zero());
        let more = last.advance(&series(11, 9, 8));
        assert_eq!((more.entered, more.buckets), (1, vec![(9, 1)]));
    }

    #[test]
    fn sums_do_not_overflow_whatever_a_worker_says() {
        let mut sum = Counts::default();
        for _ in 0..3 {
            sum.add(&Last::default().advance(&series(u64::MAX, 3, u64::MAX)));
        }
        assert_eq!(sum.entered, u64::MAX);
        assert_eq!(sum.latency(1.0), None, "no samples");
    }

    /// Durations of one shape each; what is told of them is off by no more than
    /// an eighth of what it is.
    #[test]
    fn quantiles_are_off_by_no_more_than_an_eighth() {
        let mut random = crate::meter::tests::Random(0x5eed);
        let shapes: [&dyn Fn(&mut crate::meter::tests::Random) -> u64; 5] = [
            // All in one place, at either end of a bucket.
            &|_| 4_096,
            &|_| 5_119,
            &|r| 1_000 + r.below(200_000),
            // Over many octaves.
            &|r| 40 << r.below(30),
            // A few slow ones.
            &|r| {
                if r.below(50) == 0 {
                    9_000_000
                } else {
                    30_000 + r.below(3_000)
                }
            },
        ];
        for (shape, draw) in shapes.iter().enumerate() {
            for many in [1, 2, 10, 999, 20_000] {
                let mut all: Vec<u64> = (0..many).map(|_| draw(&mut random)).collect();
                let mut series = Series::default();
                for &duration in &all {
                    crate::meter::tests::measure(&mut series, duration);
                }
                all.sort_unstable();
                let counts = Last::default().advance(&series);
                let latency = counts.latency(2.0).unwrap();
                let mean = all.iter().sum::<u64>() as f64 / many as f64;
                assert!((latency.mean_ns * 2.0 / mean - 1.0).abs() < 1e-9);
                assert_eq!(latency.samples, many);
                for (q, told) in [
                    (0.5, latency.p50_ns),
                    (0.9, latency.p90_ns),
                    (0.99, latency.p99_ns),
                ] {
                    let rank = (q * many as f64).ceil() as usize;
                    let right = all[rank - 1] as f64;
                    let off = (told * 2.0 - right).abs() / right;
                    assert!(
                        off <= 0.125,
                        "shape {shape}, {many}: {q} {right} {told} {off}"
                    );
                }
            }
        }
    }

    #[test]
    fn short_and_overlong_durations_have_a_place() {
        let mut series = Series::default();
        series.latency.samples = 2;
        series.latency.cycles = 10;
        series.latency.buckets[0] = 2;
        let latency = Last::default().advance(&series).latency(1.0).unwrap();
        let (_, end) = Histogram::bounds(0);
        assert_eq!((latency.p50_ns, latency.mean_ns), (end as f64 / 2.0, 5.0));
        let last = series.latency.buckets.len() - 1;
        series.latency.buckets[0] = 0;
        series.latency.buckets[last] = 1;
        let latency = Last::default().advance(&series).latency(1.0).unwrap();
        let (low, high) = Histogram::bounds(last);
        assert!((low as f64..=high as f64).contains(&latency.p99_ns));
    }

    #[test]
    fn a_sum_without_its_bucket_gives_the_mean() {
        let mut series = Series::default();
        (series.latency.samples, series.latency.cycles) = (1, 600);
        let latency = Last::default().advance(&series).latency(3.0).unwrap();
        assert_eq!((latency.p50_ns, latency.p99_ns), (200.0, 200.0));
    }
}
