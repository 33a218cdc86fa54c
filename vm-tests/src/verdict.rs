//! What a trial says at its end, in one line.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Begins the line on the guest's console.
const MARK: &str = "VERDICT ";

/// What came of a trial.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// As `uname -r` says.
    pub kernel: String,
    /// Whether all was as it must be.
    pub passed: bool,
    /// What was not.
    pub error: Option<String>,
    /// What the kernel was found to have, and what was seen.
    pub seen: Value,
    /// Seconds that the trial took.
    pub seconds: u64,
}

impl Verdict {
    /// The line.
    pub fn line(&self) -> String {
        // Of strings and numbers: cannot fail.
        let json = serde_json::to_string(self).unwrap_or_default();
        format!("{MARK}{json}")
    }

    /// Finds the one line in what a console has shown. A console that was
    /// written to by the kernel at the same moment may have more before it.
    pub fn find(console: &str) -> Option<Self> {
        console.lines().rev().find_map(|line| {
            let (_, json) = line.split_once(MARK)?;
            serde_json::from_str(json.trim_end()).ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_on_a_console() {
        let verdict = Verdict {
            kernel: "6.1.0-56-cloud-amd64".into(),
            passed: false,
            error: Some("two\nlines".into()),
            seen: serde_json::json!({"yama": 1}),
            seconds: 3,
        };
        let line = verdict.line();
        assert!(!line.contains('\n'));
        let console = format!("[    0.0] Linux\r\n[ 1.0] x{line}\r\n[ 2.0] Power down\r\n");
        assert_eq!(Verdict::find(&console), Some(verdict));
        assert_eq!(Verdict::find("VERDICT {\"kernel\":"), None);
    }
}
