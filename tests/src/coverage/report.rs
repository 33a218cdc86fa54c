//! What all rows together say: the table, the document, the numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::directives::{Expectation, Role};
use super::trial::{Outcome, Sites};

/// One row of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// The fixture's group.
    pub kind: String,
    /// The fixture.
    pub fixture: String,
    /// What it shows.
    pub about: String,
    /// Which half it is.
    pub role: Role,
    /// How it was compiled.
    pub variant: String,
    /// What was expected.
    pub expect: Expectation,
    /// Why, if a refusal was.
    pub because: String,
    /// What became of it.
    pub outcome: Outcome,
    /// Its caller's sites.
    pub sites: Sites,
    /// Digest of the caller's library: sites of one caller count once.
    pub caller: u64,
    /// How long it took, in milliseconds.
    pub took_ms: u128,
}

/// How a row's outcome stands to what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Supported, as expected.
    Supported,
    /// Refused, with the code that was expected.
    Refused,
    /// Refused, where it should have been supported or with another code.
    UnexpectedlyRefused,
    /// Supported, where it should have been refused.
    UnexpectedlySupported,
    /// Wrong answers, a dead worker, a failure.
    Broken,
    /// Not run.
    Skipped,
}

impl Verdict {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Supported => "supported",
            Self::Refused => "refused",
            Self::UnexpectedlyRefused => "unexpectedly refused",
            Self::UnexpectedlySupported => "unexpectedly supported",
            Self::Broken => "broken",
            Self::Skipped => "skipped",
        }
    }

    /// Whether all is well.
    pub fn is_good(self) -> bool {
        matches!(self, Self::Supported | Self::Refused)
    }
}

impl Row {
    /// Its verdict.
    pub fn verdict(&self) -> Verdict {
        match (&self.outcome, &self.expect) {
            (Outcome::Supported, Expectation::Supported) => Verdict::Supported,
            (Outcome::Supported, Expectation::Refused(_)) => Verdict::UnexpectedlySupported,
            (Outcome::Refused { code, .. }, Expectation::Refused(expected)) if code == expected => {
                Verdict::Refused
            }
            (Outcome::Refused { .. }, _) => Verdict::UnexpectedlyRefused,
            (Outcome::Broken(_), _) => Verdict::Broken,
            (Outcome::Skipped(_), _) => Verdict::Skipped,
        }
    }

    /// The outcome in a few words, without what changes from run to run.
    fn outcome_text(&self) -> String {
        let verdict = self.verdict().text();
        match &self.outcome {
            Outcome::Refused { code, .. } => format!("{verdict}: {code}"),
            Outcome::Supported if self.role != Role::Callee => {
                format!("{verdict} ({})", self.sites)
            }
            _ => verdict.to_owned(),
        }
    }

    /// What a reader of a failed run must know.
    pub fn detail(&self) -> String {
        match &self.outcome {
            Outcome::Supported => String::new(),
            Outcome::Refused { why, .. } => why.clone(),
            Outcome::Broken(why) | Outcome::Skipped(why) => why.clone(),
        }
    }
}

/// All rows and where they were run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Sorted by kind, fixture and order of variants.
    pub rows: Vec<Row>,
    /// Kernel, compilers and tools, a line each.
    pub machine: Vec<String>,
    /// Whether it is the whole matrix.
    pub whole: bool,
    /// Whether only some fixtures were asked for.
    pub partial: bool,
    /// The oracle's numbers, or why there are none.
    pub oracle: Result<Value, String>,
}

/// Rows by verdict.
type Counts = BTreeMap<Verdict, usize>;

impl Report {
    /// Whether nothing is broken, skipped or otherwise than expected.
    pub fn is_good(&self) -> bool {
        self.rows.iter().all(|r| r.verdict().is_good())
            // Some fixtures alone come without the oracle, all of them don't.
            && self.oracle.as_ref().map_or(self.partial, |o| o["differ"] == 0)
    }

    fn counts(&self, which: impl Fn(&Row) -> bool) -> Counts {
        let mut counts = Counts::new();
        for row in self.rows.iter().filter(|r| which(r)) {
            *counts.entry(row.verdict()).or_default() += 1;
        }
        counts
    }

    /// Sites, those of one caller library counted once.
    fn sites(&self) -> (Sites, usize) {
        let mut seen = BTreeSet::new();
        let mut sum = Sites::default();
        let mut broken = 0;
        for row in &self.rows {
            let sited = row.sites != Sites::default();
            if !sited || !seen.insert(row.caller) {
                continue;
            }
            sum.in_place += row.sites.in_place;
            sum.entry += row.sites.entry;
            sum.refused += row.sites.refused;
            if row.role != Role::Callee && row.verdict() == Verdict::Broken {
                broken += 1;
            }
        }
        // A caller without a plan has a site all the same.
        for row in self.rows.iter().filter(|r| r.role != Role::Callee) {
            if let Outcome::Refused { code, .. } = &row.outcome
                && (code == "no-site" || code == "no-window")
                && row.sites == Sites::default()
            {
                sum.refused += 1;
            }
        }
        (sum, broken)
    }

    /// The numbers, as `--json` prints them last.
    pub fn json(&self) -> Value {
        let of = |counts: &Counts, which: &[Verdict]| -> usize {
            which.iter().filter_map(|v| counts.get(v)).sum()
        };
        let callees = self.counts(|r| r.role != Role::Caller);
        let (sites, broken) = self.sites();
        json!({
            "callees": {
                "supported": of(&callees, &[Verdict::Supported, Verdict::UnexpectedlySupported]),
                "refused": of(&callees, &[Verdict::Refused, Verdict::UnexpectedlyRefused]),
                "broken": of(&callees, &[Verdict::Broken]),
            },
            "sites": {
                "supported": sites.in_place + sites.entry,
                "refused": sites.refused,
                "broken": broken,
                "in_place": sites.in_place,
                "entry": sites.entry,
            },
            "oracle": self.oracle.as_ref().ok(),
        })
    }

    /// What is wrong, a paragraph each.
    pub fn complaints(&self) -> Vec<String> {
        self.rows
            .iter()
            .filter(|r| !r.verdict().is_good())
            .map(|r| {
                format!(
                    "{} ({}): {} (expected: {})\n    {}",
                    r.fixture,
                    r.variant,
                    r.outcome_text(),
                    r.expect,
                    r.detail().replace('\n', "\n    ")
                )
            })
            .collect()
    }

    /// The table for a terminal.
    pub fn table(&self) -> String {
        let width = |of: fn(&Row) -> usize| self.rows.iter().map(of).max().unwrap_or(0);
        let fixture = width(|r| r.fixture.len());
        let variant = width(|r| r.variant.len());
        let mut text = String::new();
        let mut kind = "";
        for row in &self.rows {
            if row.kind != kind {
                kind = &row.kind;
                let _ = writeln!(text, "{kind}");
            }
            let _ = writeln!(
                text,
                "  {:fixture$}  {:variant$}  {:>5} ms  {}",
                row.fixture,
                row.variant,
                row.took_ms,
                row.outcome_text()
            );
        }
        text
    }

    /// A summary of a line or two.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for (what, counts) in [
            ("callees", self.counts(|r| r.role != Role::Caller)),
            ("callers", self.counts(|r| r.role == Role::Caller)),
        ] {
            let parts: Vec<_> = counts
                .iter()
                .map(|(v, n)| format!("{n} {}", v.text()))
                .collect();
            let _ = writeln!(text, "{what}: {}", parts.join(", "));
        }
        let (sites, _) = self.sites();
        let _ = writeln!(
            text,
            "sites: {} in place, {} through the entry, {} refused",
            sites.in_place, sites.entry, sites.refused
        );
        match &self.oracle {
            Ok(numbers) => {
                let _ = writeln!(text, "oracle: {numbers}");
            }
            Err(why) => {
                let _ = writeln!(text, "oracle: NOT RUN ({why})");
            }
        }
        text
    }

    /// `docs/coverage.md`.
    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "# What is fused, and what is refused\n\n\
             Written by `cargo xtask coverage`: every fixture of `tests/fixtures` in containers, \
             called by RPC, fused, reverted and fused again, each answer compared with that of the \
             plainly loaded functions.\n\n",
        );
        let _ = writeln!(
            text,
            "{} matrix. A row is supported if all answers were right, the counters moved by just \
             the calls that were made and no worker changed; broken if not.\n",
            if self.whole { "Whole" } else { "Reduced" }
        );
        for line in &self.machine {
            let _ = writeln!(text, "- {line}");
        }
        let _ = writeln!(text, "\n```\n{}```\n", self.summary());
        let mut kind = "";
        for row in &self.rows {
            if row.kind != kind {
                kind = &row.kind;
                let _ = writeln!(
                    text,
                    "{}## {kind}\n\n| fixture | what it does | built by | outcome |\n|---|---|---|---|",
                    if text.ends_with("|\n") { "\n" } else { "" }
                );
            }
            let mut outcome = row.outcome_text();
            if row.verdict() == Verdict::Refused && !row.because.is_empty() {
                let _ = write!(outcome, " ({})", row.because);
            }
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} |",
                row.fixture,
                row.about.replace('|', "\\|"),
                row.variant,
                outcome
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(fixture: &str, role: Role, expect: Expectation, outcome: Outcome) -> Row {
        Row {
            kind: "k".into(),
            fixture: fixture.into(),
            about: "a".into(),
            role,
            variant: "gcc -O2".into(),
            expect,
            because: "so".into(),
            outcome,
            sites: Sites {
                in_place: 1,
                ..Sites::default()
            },
            caller: 7,
            took_ms: 1,
        }
    }

    fn refused(code: &str) -> Outcome {
        Outcome::Refused {
            code: code.into(),
            why: "it is".into(),
        }
    }

    fn report(rows: Vec<Row>) -> Report {
        Report {
            rows,
            machine: vec!["Linux".into()],
            whole: false,
            partial: true,
            oracle: Err("not there".into()),
        }
    }

    #[test]
    fn only_what_was_expected_is_good() {
        let tls = || Expectation::Refused("tls".into());
        for (expect, outcome, verdict) in [
            (
                Expectation::Supported,
                Outcome::Supported,
                Verdict::Supported,
            ),
            (tls(), refused("tls"), Verdict::Refused),
            (tls(), refused("no-site"), Verdict::UnexpectedlyRefused),
            (tls(), Outcome::Supported, Verdict::UnexpectedlySupported),
            (
                Expectation::Supported,
                refused("tls"),
                Verdict::UnexpectedlyRefused,
            ),
            (tls(), Outcome::Broken("x".into()), Verdict::Broken),
            (tls(), Outcome::Skipped("x".into()), Verdict::Skipped),
        ] {
            let row = row("f", Role::Callee, expect, outcome);
            assert_eq!(row.verdict(), verdict);
            let good = matches!(verdict, Verdict::Supported | Verdict::Refused);
            let mut report = report(vec![row]);
            assert_eq!(report.is_good(), good);
            report.partial = false;
            assert!(!report.is_good(), "the oracle was not run");
            assert_eq!(report.complaints().is_empty(), good);
        }
    }

    #[test]
    fn counts_callees_by_row_and_sites_by_caller() {
        let mut other = row(
            "c",
            Role::Caller,
            Expectation::Supported,
            refused("no-site"),
        );
        other.caller = 8;
        other.sites = Sites::default();
        let report = report(vec![
            row(
                "a",
                Role::Callee,
                Expectation::Supported,
                Outcome::Supported,
            ),
            row(
                "b",
                Role::Callee,
                Expectation::Supported,
                Outcome::Supported,
            ),
            other,
        ]);
        assert_eq!(
            report.rows[2].outcome_text(),
            "unexpectedly refused: no-site"
        );
        let json = report.json();
        assert_eq!(json["callees"]["supported"], 2);
        assert_eq!(
            json["sites"],
            json!({"supported": 1, "refused": 1, "broken": 0, "in_place": 1, "entry": 0})
        );
        assert_eq!(json["oracle"], Value::Null);
        assert!(report.summary().contains("oracle: NOT RUN"));
        assert!(
            report
                .markdown()
                .contains("| a | a | gcc -O2 | supported |")
        );
    }
}
