//! What can be set, with what it prevents.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of the planner and of the governor that acts on its plans.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Seconds within which a change must have saved what it costs. Prevents
    /// changes for load that is gone before they pay.
    pub horizon_s: f64,
    /// How many times over a change must pay: what is not fused yet must save so
    /// many times its price, what is fused may fall to a fraction of it.
    /// Prevents that what lies at the border is fused and un-fused in turns.
    pub hysteresis: f64,
    /// Seconds of latency that a MiB held for a graft must save per second.
    /// Prevents that edges which hardly anybody calls keep memory.
    pub memory_price_s: f64,
    /// Seconds of latency that fusing one path in one worker costs at once: its
    /// stops, and the agent's own work.
    pub inject_s: f64,
    /// The same of un-fusing.
    pub revert_s: f64,
    /// Share of a caller's processors that its own calls and those fused into it
    /// may keep busy. Prevents that a callee's work, moved into containers with
    /// fewer processors, queues there.
    pub busy_share: f64,
    /// What is fused is worth so much more than what would have to be fused in
    /// its place, and may keep its root's processors busier by as much. Prevents
    /// that two of nearly the same worth take turns.
    pub margin: f64,
    /// Functions on a path, the caller included.
    pub depth: usize,
    /// Candidates up to which the best set is searched for by the exact solver.
    pub exact_up_to: usize,
    /// How long the exact solver may search.
    pub exact_within_ms: u64,
    /// Seconds for which a change must be wanted before it is made. Prevents
    /// changes for a moment's load.
    pub confirm_s: f64,
    /// The same where something that is worth its place is to give it to
    /// something better.
    pub displace_s: f64,
    /// Seconds for which a function that was deployed is left alone. Prevents
    /// that workers are patched which the next step of a deployment replaces.
    pub quiet_s: f64,
    /// Seconds that a path that was fused stays so, and one that was un-fused.
    /// Prevents flapping, whatever the load does.
    pub dwell_s: f64,
    /// Changes per minute, of one path in all of its caller's workers. Prevents
    /// that a shift of load stops everyone at once.
    pub changes_per_minute: f64,
    /// Seconds of stops per minute, over all workers.
    pub stop_s_per_minute: f64,
    /// Seconds that one change stops one worker.
    pub stop_s: f64,
    /// Seconds over which rates are averaged.
    pub average_s: f64,
    /// How long a path is left alone that did worse than foretold, at first;
    /// twice as long each time.
    pub back_off_s: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            horizon_s: 600.0,
            hysteresis: 2.0,
            memory_price_s: 100e-6,
            inject_s: 10e-3,
            revert_s: 0.2e-3,
            busy_share: 0.8,
            margin: 0.5,
            depth: 4,
            exact_up_to: 24,
            exact_within_ms: 300,
            confirm_s: 30.0,
            displace_s: 300.0,
            quiet_s: 60.0,
            dwell_s: 300.0,
            changes_per_minute: 12.0,
            stop_s_per_minute: 50e-3,
            stop_s: 1e-3,
            average_s: 120.0,
            back_off_s: 600.0,
        }
    }
}

/// A setting that makes no sense.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {value}: {wanted} is wanted")]
pub struct WrongSetting {
    /// Which.
    pub name: &'static str,
    /// What it is.
    pub value: f64,
    /// What it may be.
    pub wanted: &'static str,
}

impl Settings {
    /// Looks whether all make sense.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self) -> Result<(), WrongSetting> {
        let over = "a number above 0";
        let least = "a number of at least 0";
        for (name, value, wanted, from) in [
            ("horizon-s", self.horizon_s, over, f64::MIN_POSITIVE),
            ("hysteresis", self.hysteresis, "a number of at least 1", 1.0),
            ("memory-price-s", self.memory_price_s, least, 0.0),
            ("inject-s", self.inject_s, least, 0.0),
            ("revert-s", self.revert_s, least, 0.0),
            ("busy-share", self.busy_share, over, f64::MIN_POSITIVE),
            ("margin", self.margin, least, 0.0),
            ("confirm-s", self.confirm_s, least, 0.0),
            ("displace-s", self.displace_s, least, 0.0),
            ("quiet-s", self.quiet_s, least, 0.0),
            ("dwell-s", self.dwell_s, least, 0.0),
            (
                "changes-per-minute",
                self.changes_per_minute,
                over,
                f64::MIN_POSITIVE,
            ),
            (
                "stop-s-per-minute",
                self.stop_s_per_minute,
                over,
                f64::MIN_POSITIVE,
            ),
            ("stop-s", self.stop_s, least, 0.0),
            ("average-s", self.average_s, over, f64::MIN_POSITIVE),
            ("back-off-s", self.back_off_s, least, 0.0),
        ] {
            if !(value.is_finite() && value >= from) {
                return Err(WrongSetting {
                    name,
                    value,
                    wanted,
                });
            }
        }
        if !(2..=16).contains(&self.depth) {
            #[expect(clippy::cast_precision_loss, reason = "to be shown")]
            return Err(WrongSetting {
                name: "depth",
                value: self.depth as f64,
                wanted: "2 to 16",
            });
        }
        Ok(())
    }

    /// The exact solver's time.
    #[must_use]
    pub fn exact_within(&self) -> Duration {
        Duration::from_millis(self.exact_within_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_told() {
        assert_eq!(Settings::default().check(), Ok(()));
        let told = |change: &dyn Fn(&mut Settings)| {
            let mut settings = Settings::default();
            change(&mut settings);
            settings.check().unwrap_err().to_string()
        };
        assert_eq!(
            told(&|s| s.hysteresis = 0.5),
            "hysteresis is 0.5: a number of at least 1 is wanted"
        );
        assert_eq!(
            told(&|s| s.changes_per_minute = f64::NAN),
            "changes-per-minute is NaN: a number above 0 is wanted"
        );
        assert_eq!(
            told(&|s| s.depth = 1_000_000),
            "depth is 1000000: 2 to 16 is wanted"
        );
        assert!(told(&|s| s.horizon_s = -1.0).starts_with("horizon-s is -1"));
        assert!(told(&|s| s.stop_s_per_minute = 0.0).contains("above 0"));
    }
}
