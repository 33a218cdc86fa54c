/// How the compiler makes the bridge's image of `src/lib.rs`.
const IMAGE_FLAGS: &[&str] = &[
    "--edition=2024",
    "--crate-name=nightgraft_bridge",
    "--crate-type=cdylib",
    "--cfg=bridge_image",
    "--target=x86_64-unknown-linux-gnu",
    "-Cpanic=abort",
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Coverflow-checks=off",
    "-Cdebug-assertions=off",
    "-Crelocation-model=pic",
    "-Cstrip=debuginfo",
    // The callee's stack is the caller's: no frame of ours hides from a
    // frame-pointer walk.
    "-Cforce-frame-pointers=yes",
    "-Cforce-unwind-tables=yes",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-Wl,--build-id=sha1",
    "-Clink-arg=-Wl,-z,now",
    "-Clink-arg=-Wl,-z,noexecstack",
    "-Clink-arg=-Wl,-z,separate-code",
];
