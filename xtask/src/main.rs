//! Everything that is done with this workspace, in one place: `cargo xtask help`.
fn main() {}
