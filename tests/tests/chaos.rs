//! `cargo xtask chaos` in the form that ends everything once.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

#[test]
fn nothing_is_lost_wherever_the_agent_dies() -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_chaos"))
        .arg("--json")
        .stdin(Stdio::null())
        .output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    println!("{stdout}");
    ensure!(
        output.status.success(),
        "{}:\n{stdout}\n{stderr}",
        output.status
    );
    let last = stdout.lines().last().context("it printed nothing")?;
    let line: Value = serde_json::from_str(last).with_context(|| last.to_owned())?;
    for none in ["failed", "wrong", "leaked", "unrecovered", "unexpected"] {
        assert_eq!(line[none], 0, "{line}");
    }
    assert_eq!(line["cycles"], 500, "{line}");
    // The lists of points in the sources have so many, and the workers' come
    // on top.
    ensure!(line["fault_points"].as_u64() >= Some(70), "{line}");
    ensure!(line["kills"].as_u64() >= Some(110), "{line}");
    Ok(())
}
