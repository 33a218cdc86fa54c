//! Hostile workers: tests of their own, each with what is expected of it.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::Report;

/// Runs a program of tests, one at a time, and counts them.
pub(super) fn run(tests: &Path, report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
    let name = tests.file_name().unwrap_or_default().to_string_lossy();
    let output = Command::new(tests)
        .args(["--test-threads", "1"])
        .stdin(Stdio::null())
        .output()
        .with_context(|| tests.display().to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut cases = 0;
    for (case, verdict) in text.lines().filter_map(verdict) {
        cases += 1;
        if verdict != "ok" {
            report.unexpected += 1;
            report.complain(format!("{case} ({name}): {verdict}\n{text}"));
        }
    }
    say(&format!("{name}: {cases} cases"));
    report.hostile_cases += cases;
    ensure!(
        cases > 0 && (output.status.success() || report.unexpected > 0),
        "{name}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Of a line of the test harness: `test NAME ... VERDICT`.
fn verdict(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.split_once(" ... ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_s_lines_are_told_from_others() {
        let lines =
            "running 2 tests\ntest a_b ... ok\ntest c ... FAILED\n\ntest result: FAILED. 1 passed";
        let found: Vec<_> = lines.lines().filter_map(verdict).collect();
        assert_eq!(found, [("a_b", "ok"), ("c", "FAILED")]);
    }

    #[test]
    fn what_fails_is_unexpected_and_what_runs_nothing_no_program_of_tests() {
        let script = |text: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tests");
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            let mut report = Report::default();
            let done = run(&path, &mut report, &|_| {});
            (done.is_ok(), report.hostile_cases, report.unexpected)
        };
        assert_eq!(script("echo 'test a ... ok'"), (true, 1, 0));
        let failing = "echo 'test a ... FAILED'; echo 'test b ... ok'; exit 101";
        assert_eq!(script(failing), (true, 2, 1));
        assert_eq!(script("true"), (false, 0, 0));
        assert_eq!(script("echo 'test a ... ok'; exit 3"), (false, 1, 0));
    }
}
