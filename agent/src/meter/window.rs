//! Time, cut into samples by [`super::Meter::tick`], and what was counted in
//! them.
//!
//! ```text
//!   first tick                                        last tick
//!       │    1    │    2    │ ... │    n-1   │     n     │ open
//!   ────┴─────────┴─────────┴─────┴──────────┴───────────┴──────►
//!                           └─ window: the fewest last samples
//!                              that are WINDOW_MS long together
//! ```

use std::collections::VecDeque;

use super::counts::Counts;

/// Milliseconds over which rates and latencies are taken.
pub const WINDOW_MS: u64 = 10_000;
/// A sample is no shorter: an earlier tick leaves it open. So there are at most
/// a hundred and one in the window.
pub const MIN_SAMPLE_MS: u64 = 100;

/// Where time is cut.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// The last tick that closed a sample, or the first.
    at_ms: Option<u64>,
    /// Number of the last sample closed.
    number: u64,
    /// Lengths of the samples of the window in milliseconds, oldest first.
    spans: VecDeque<u64>,
}

impl Clock {
    /// Whether there was a tick.
    pub(super) fn begun(&self) -> bool {
        self.at_ms.is_some()
    }

    /// When the last sample was closed.
    pub(super) fn at_ms(&self) -> Option<u64> {
        self.at_ms
    }

    /// Closes a sample, and gives its length; `None` where none is closed.
    ///
    /// The clock may have been set back. How long the sample was is not known
    /// then, and taken to be as long as the one before.
    pub(super) fn tick(&mut self, at_ms: u64) -> Option<u64> {
        let last = *self.at_ms.get_or_insert(at_ms);
        let span = if at_ms < last {
            self.at_ms = Some(at_ms);
            self.spans.back().copied().unwrap_or(0)
        } else {
            at_ms - last
        };
        if span < MIN_SAMPLE_MS {
            return None;
        }
        self.at_ms = Some(at_ms);
        self.number += 1;
        self.spans.push_back(span);
        while self.length_ms() - self.spans[0] >= WINDOW_MS {
            self.spans.pop_front();
        }
        Some(span)
    }

    fn length_ms(&self) -> u64 {
        self.spans
            .iter()
            .fold(0, |sum, span| sum.saturating_add(*span))
    }

    /// Length of the window in seconds; 0 before the first sample is closed.
    pub(super) fn seconds(&self) -> f64 {
        self.length_ms() as f64 / 1e3
    }

    /// Number of the last sample closed.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Number of the oldest sample in the window.
    fn oldest(&self) -> u64 {
        self.number + 1 - self.spans.len() as u64
    }

    /// A count as a rate.
    pub(super) fn per_second(&self, count: u64) -> f64 {
        if self.spans.is_empty() {
            return 0.0;
        }
        count as f64 / self.seconds()
    }
}

/// The counts of one kind of call, over all workers and all time.
#[derive(Debug, Default)]
pub(super) struct Track {
    /// Since the beginning.
    pub(super) total: Counts,
    /// Since the last sample was closed.
    open: Counts,
    /// In the samples closed since the last step.
    step: Counts,
    /// By sample, with its number, as far as the window goes; nothing where
    /// nothing was counted.
    samples: VecDeque<(u64, Counts)>,
}

impl Track {
    /// Counts what a reading has added.
    pub(super) fn add(&mut self, clock: &Clock, more: &Counts) {
        if more.is_zero() {
            return;
        }
        self.total.add(more);
        // When that which the first readings tell of was is not known.
        if clock.begun() {
            self.open.add(more);
        }
    }

    /// Closes a sample; called behind [`Clock::tick`].
    pub(super) fn close(&mut self, clock: &Clock) {
        while let Some(&(number, _)) = self.samples.front()
            && number < clock.oldest()
        {
            self.samples.pop_front();
        }
        if !self.open.is_zero() {
            let open = std::mem::take(&mut self.open);
            self.step.add(&open);
            self.samples.push_back((clock.number(), open));
        }
    }

    /// What was counted in the window.
    pub(super) fn window(&self) -> Counts {
        let mut sum = Counts::default();
        for (_, counts) in &self.samples {
            sum.add(counts);
        }
        sum
    }

    /// What was counted since this was last asked for, up to the last sample
    /// that was closed.
    pub(super) fn take_step(&mut self) -> Counts {
        std::mem::take(&mut self.step)
    }
}
