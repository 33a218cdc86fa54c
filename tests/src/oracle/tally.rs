//! What came out for all libraries.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Outcome, Verdict};

/// Libraries by what became of them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tally {
    /// All.
    pub libraries: usize,
    /// In which everything is as ld.so made it.
    pub agree: usize,
    /// Refused.
    pub refused: usize,
    /// In which something differs.
    pub differ: usize,
    /// Which ld.so does not load.
    pub unloadable: usize,
    /// Loadable, but in want of static thread-local storage of their own.
    pub static_tls: usize,
    /// Loadable, and in want of none.
    pub without_static_tls: usize,
    /// Of those, how many agree …
    pub agree_without: usize,
    /// … and in how many every word is as ld.so made it, whether or not what
    /// they import is refused.
    pub equal_without: usize,
    /// The refused, by code.
    pub refused_by_code: BTreeMap<String, usize>,
    /// The unloadable, by reason.
    pub unloadable_by_reason: BTreeMap<String, usize>,
    /// Relocated words compared.
    pub words: usize,
    /// The longest analysis, and what of.
    pub slowest: (Duration, String),
}

impl Tally {
    /// Counts one.
    pub fn add(&mut self, outcome: &Outcome) {
        self.libraries += 1;
        self.words += outcome.words;
        if outcome.analysis > self.slowest.0 {
            let (library, images) = (outcome.library.display(), outcome.images);
            let what = format!("{library} ({images} images, {} bytes)", outcome.bytes);
            self.slowest = (outcome.analysis, what);
        }
        let agrees = matches!(outcome.verdict, Verdict::Agree);
        match &outcome.verdict {
            Verdict::Agree => self.agree += 1,
            Verdict::Differ(_) => self.differ += 1,
            Verdict::Refused { code, .. } => {
                self.refused += 1;
                *self.refused_by_code.entry(code.clone()).or_default() += 1;
            }
            Verdict::Unloadable(why) => {
                self.unloadable += 1;
                let reasons = &mut self.unloadable_by_reason;
                *reasons.entry(why.kind().to_owned()).or_default() += 1;
                return;
            }
        }
        if outcome.static_tls {
            self.static_tls += 1;
        } else {
            self.without_static_tls += 1;
            self.agree_without += usize::from(agrees);
            self.equal_without += usize::from(outcome.equal);
        }
    }

    /// Of the libraries that ld.so loads and that want no static thread-local
    /// storage of their own: the share that agrees, 0-1; 1 where there is none.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.of_those_without(self.agree_without)
    }

    /// Of the same: the share in which every word is as ld.so made it.
    #[must_use]
    pub fn equal_share(&self) -> f64 {
        self.of_those_without(self.equal_without)
    }

    fn of_those_without(&self, count: usize) -> f64 {
        match self.without_static_tls {
            0 => 1.0,
            all => count as f64 / all as f64,
        }
    }

    /// As an object of numbers.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "libraries": self.libraries,
            "agree": self.agree,
            "refused": self.refused,
            "differ": self.differ,
            "unloadable": self.unloadable,
            "refused_by_code": self.refused_by_code,
            "static_tls": self.static_tls,
            "unloadable_by_reason": self.unloadable_by_reason,
            "without_static_tls": self.without_static_tls,
            "agree_without_static_tls": self.agree_without,
            "equal_without_static_tls": self.equal_without,
            "words": self.words,
        })
    }

    /// As a table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut lines = vec![
            format!(
                "{:7} libraries, {} relocated words",
                self.libraries, self.words
            ),
            format!("{:7} agree", self.agree),
            format!("{:7} differ", self.differ),
            format!("{:7} refused", self.refused),
        ];
        let rows = |of: &BTreeMap<String, usize>| -> Vec<String> {
            let mut rows: Vec<_> = of.iter().collect();
            rows.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), name.as_str()));
            rows.into_iter()
                .map(|(name, count)| format!("        {count:7} {name}"))
                .collect()
        };
        lines.extend(rows(&self.refused_by_code));
        lines.push(format!("{:7} unloadable", self.unloadable));
        lines.extend(rows(&self.unloadable_by_reason));
        lines.push(format!(
            "{:7} with static TLS of their own",
            self.static_tls
        ));
        let all = self.without_static_tls;
        for (share, count, what) in [
            (self.share(), self.agree_without, "agree"),
            (
                self.equal_share(),
                self.equal_without,
                "are equal, if not allowed",
            ),
        ] {
            let share = share * 100.0;
            lines.push(format!(
                "{share:6.1} % of the rest {what} ({count} of {all})"
            ));
        }
        let (longest, what) = &self.slowest;
        lines.push(format!("longest analysis: {longest:.2?} of {what}"));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Unloadable;
    use super::*;

    #[test]
    fn every_library_counts_once() {
        let outcome = |verdict| Outcome::new(Path::new("/a.so"), verdict);
        let refused = || Verdict::Refused {
            code: "tls".into(),
            reason: String::new(),
        };
        let agree = || Outcome {
            equal: true,
            ..outcome(Verdict::Agree)
        };
        let mut tally = Tally::default();
        assert!((tally.share() - 1.0).abs() < 1e-9);
        let mut fixed = outcome(refused());
        fixed.static_tls = true;
        for outcome in [
            agree(),
            agree(),
            outcome(Verdict::Differ(Vec::new())),
            outcome(refused()),
            fixed,
            outcome(Verdict::Unloadable(Unloadable::Timeout)),
        ] {
            tally.add(&outcome);
        }
        assert!((tally.share() - 0.5).abs() < 1e-9);
        let json = tally.json();
        for (name, count) in [
            ("libraries", 6),
            ("agree", 2),
            ("refused", 2),
            ("differ", 1),
            ("unloadable", 1),
            ("static_tls", 1),
        ] {
            assert_eq!(json[name], count, "{name}");
        }
        assert_eq!(json["refused_by_code"]["tls"], 2);
        assert_eq!(json["unloadable_by_reason"]["timeout"], 1);
        assert!(tally.table().contains("50.0 % of the rest agree (2 of 4)"));
    }
}
