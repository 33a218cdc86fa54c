//! Compiles the bridge as the freestanding image that is mapped into workers.
//!
//! The compiler is called directly: the same sources are a library of the
//! workspace too, and a `cdylib` of a `no_std` crate needs its own panic
//! strategy and link arguments whatever profile the agent is built with.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    let manifest = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let rustc = env::var("RUSTC").expect("cargo sets RUSTC");
    let sources = Path::new(&manifest).join("bridge/src");
    println!("cargo::rerun-if-changed={}", sources.display());
    let image = Path::new(&out).join("libnightgraft_bridge.so");
    let status = Command::new(rustc)
        .args([
            "--edition=2024",
            "--crate-name=nightgraft_bridge",
            "--crate-type=cdylib",
            "--cfg=bridge_image",
        ])
        .args([
            "--target=x86_64-unknown-linux-gnu",
            "-Cpanic=abort",
            "-Copt-level=3",
            "-Ccodegen-units=1",
        ])
        .args([
            "-Coverflow-checks=off",
            "-Cdebug-assertions=off",
            "-Crelocation-model=pic",
            "-Cstrip=debuginfo",
        ])
        // The callee's stack is the caller's: no frame of ours hides from a
        // frame-pointer walk.
        .args(["-Cforce-frame-pointers=yes", "-Cforce-unwind-tables=yes"])
        .args([
            "-Clink-arg=-nostdlib",
            "-Clink-arg=-nostartfiles",
            "-Clink-arg=-Wl,--build-id=sha1",
        ])
        .args([
            "-Clink-arg=-Wl,-z,now",
            "-Clink-arg=-Wl,-z,noexecstack",
            "-Clink-arg=-Wl,-z,separate-code",
        ])
        .arg("-o")
        .arg(&image)
        .arg(sources.join("lib.rs"))
        .status()
        .expect("the compiler that cargo names can be run");
    assert!(status.success(), "the bridge image does not compile");
    let len = fs::metadata(&image).expect("the image was written").len();
    assert!(len > 0, "the bridge image is empty");
    println!(
        "cargo::rustc-env=NIGHTGRAFT_BRIDGE_IMAGE={}",
        image.display()
    );
}
