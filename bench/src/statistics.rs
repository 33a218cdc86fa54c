//! Medians with their spread.

use serde::Serialize;

/// The middle of some measurements.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Spread {
    /// First quartile.
    pub(crate) low: f64,
    /// Median.
    pub(crate) median: f64,
    /// Third quartile.
    pub(crate) high: f64,
}

impl Spread {
    /// Of at least one value.
    pub(crate) fn of(values: &[f64]) -> Spread {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |quarter: usize| {
            sorted
                .get((sorted.len() - 1) * quarter / 4)
                .copied()
                .unwrap_or(f64::NAN)
        };
        Spread {
            low: at(1),
            median: at(2),
            high: at(3),
        }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = if self.median < 10.0 { 3 } else { 1 };
        write!(
            f,
            "{:.digits$} ({:.digits$}–{:.digits$})",
            self.median, self.low, self.high
        )
    }
}
