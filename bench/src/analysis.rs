//! What it costs to analyse a library: time, and memory at most, in a process
//! of its own for each.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nightgraft_patcher::code;
use nightgraft_patcher::elf::Image;
use nightgraft_testbed::fixtures::{self, Compiler};
use serde::{Deserialize, Serialize};

use crate::statistics::Spread;

/// Libraries in C and C++ that come with the compilers, from small to large.
const LIBRARIES: [&str; 5] = [
    "/lib/x86_64-linux-gnu/libz.so.1",
    "/lib/x86_64-linux-gnu/libstdc++.so.6",
    "/lib/x86_64-linux-gnu/libcrypto.so.3",
    "/lib/x86_64-linux-gnu/libz3.so.4",
    "/lib/x86_64-linux-gnu/libclang-14.so.1",
];

/// What one run saw.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Milliseconds for what the loader reads: headers, symbols, relocations.
    image_ms: f64,
    /// Milliseconds for what the rewriting of calls needs to know of the code.
    code_ms: f64,
    /// Largest resident memory of the process, in MB, less what it had before
    /// it read the file.
    peak_mb: f64,
}

/// A library's figures.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    library: String,
    /// Bytes of the file.
    bytes: u64,
    image_ms: Spread,
    code_ms: Spread,
    peak_mb: Spread,
}

/// Analyses one file in this process.
pub(crate) fn sample(file: &Path) -> Result<Sample> {
    let before = resident("VmRSS:")?;
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    let started = Instant::now();
    let image = Image::parse(bytes.into())?;
    let image_ms = started.elapsed().as_secs_f64() * 1e3;
    let started = Instant::now();
    let map = code::analyse(&image.bytes)?;
    let code_ms = started.elapsed().as_secs_f64() * 1e3;
    std::hint::black_box(&map);
    Ok(Sample {
        image_ms,
        code_ms,
        peak_mb: (resident("VmHWM:")? - before) / 1024.0,
    })
}

/// A line of this process's status, in KiB.
fn resident(key: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    Ok(number
        .context("no such line in /proc/self/status")?
        .parse()?)
}

/// Analyses each library `rounds` times, in turn.
pub(crate) fn measure(rounds: usize) -> Result<Vec<Row>> {
    let mut libraries = vec![fixtures::compile("foo.c", Compiler::Gcc, &["-O2"])?];
    libraries.extend(LIBRARIES.iter().map(PathBuf::from).filter(|l| l.exists()));
    let mut samples = vec![Vec::new(); libraries.len()];
    for _ in 0..rounds {
        for (library, samples) in libraries.iter().zip(&mut samples) {
            samples.push(in_a_process(library)?);
        }
    }
    let rows = libraries.iter().zip(&samples).map(|(library, samples)| {
        let of =
            |part: fn(&Sample) -> f64| Spread::of(&samples.iter().map(part).collect::<Vec<_>>());
        Ok(Row {
            library: library.display().to_string(),
            bytes: std::fs::metadata(library)?.len(),
            image_ms: of(|s| s.image_ms),
            code_ms: of(|s| s.code_ms),
            peak_mb: of(|s| s.peak_mb),
        })
    });
    rows.collect()
}

fn in_a_process(library: &Path) -> Result<Sample> {
    let output = Command::new(std::env::current_exe()?)
        .arg("--analyse")
        .arg(library)
        .output()?;
    ensure!(
        output.status.success(),
        "{}: {}",
        library.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A table for people.
pub(crate) fn print(rows: &[Row]) {
    println!("\nanalysis of a library: median (quartiles)");
    println!(
        "{:<24}{:>9}{:>24}{:>24}{:>24}",
        "", "MB", "image, ms", "code, ms", "memory at most, MB"
    );
    for row in rows {
        let name = Path::new(&row.library).file_name().unwrap_or_default();
        println!(
            "{:<24}{:>9.2}{:>24}{:>24}{:>24}",
            name.to_string_lossy(),
            row.bytes as f64 / 1e6,
            row.image_ms.to_string(),
            row.code_ms.to_string(),
            row.peak_mb.to_string(),
        );
    }
}
