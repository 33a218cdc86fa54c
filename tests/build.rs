//! Makes the testbed's worker link what nightcore's links: it is a C++ program,
//! with the C++ library there from the start and copy relocations of its
//! streams.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for program in ["func_worker_v1", "reference_host"] {
        for argument in ["-Wl,--no-as-needed", "-lstdc++", "-lm", "-Wl,--as-needed"] {
            println!("cargo:rustc-link-arg-bin={program}={argument}");
        }
    }
}
