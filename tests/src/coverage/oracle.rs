//! The oracle: a program of its own that compares our loader with the
//! system's, library by library. It is run where it was built.

use std::process::{Command, Stdio};

use serde_json::Value;

/// Runs it and gives its numbers, or why there are none.
pub fn run() -> Result<Value, String> {
    let program = crate::bin("oracle").map_err(|_| "there is no program `oracle`".to_owned())?;
    let output = Command::new(program)
        .arg("--json")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("it cannot be started: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    let numbers: Value = serde_json::from_str(last)
        .map_err(|e| format!("it ended with {} and no numbers: {e}", output.status))?;
    Ok(numbers)
}
