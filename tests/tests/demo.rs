//! The demo, run as it is shown, and the line that it ends with.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// It takes some ten seconds.
const WITHIN: Duration = Duration::from_secs(120);

#[test]
fn the_demo_patches_two_workers_and_loses_nothing() -> Result<()> {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_demo"))
        .args(["--json", "--seconds", "1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + WITHIN;
    while demo.try_wait()?.is_none() {
        if Instant::now() > deadline {
            demo.kill()?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = demo.wait_with_output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}:\n{stdout}\n{stderr}",
        output.status
    );

    for row in [
        "before (RPC)",
        "fused",
        "reverted",
        "requests per second",
        "wrong answers",
    ] {
        ensure!(stdout.contains(row), "no {row:?} in:\n{stdout}");
    }
    let last = stdout.lines().last().context("it printed nothing")?;
    let line: Value = serde_json::from_str(last).with_context(|| last.to_owned())?;
    assert_eq!(line["runtime"], "embedded");
    assert_eq!(line["workers_patched"], 2);
    assert_eq!(line["failed"], 0);
    assert_eq!(line["wrong"], 0);
    ensure!(line["requests"].as_u64() > Some(100), "{line}");
    for time in [
        "rpc_p50_us",
        "fused_p50_ns",
        "reverted_p50_us",
        "commit_stop_p50_us",
        "total_stop_p50_us",
    ] {
        ensure!(line[time].as_f64() > Some(0.0), "{time} in {line}");
    }
    // How fast is for the benchmark to say; that it is no RPC is not.
    let (rpc_us, fused_ns) = (line["rpc_p50_us"].as_f64(), line["fused_p50_ns"].as_f64());
    ensure!(
        fused_ns < rpc_us.map(|us| us * 1e3),
        "a fused call is not cheaper than an RPC: {line}"
    );
    Ok(())
}
