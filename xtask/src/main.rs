//! Everything that is done with this workspace, in one place: `cargo xtask`.

mod fuzz;
mod run;
mod setup;

use std::ffi::OsString;

use anyhow::Result;
use clap::{Parser, Subcommand};

use run::{cargo, debug, debug_with_all_tests, debug_with_tests, released, released_of};

/// Everything that is done with this workspace.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    arg_required_else_help = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that the other tasks need and that are
    /// missing; says which.
    Setup,
    /// Fuse and revert Foo → Bar in running containers under load, and compare
    /// (`cargo xtask demo --help` lists its options).
    #[command(disable_help_flag = true)]
    Demo(PassedOn),
    /// Run all tests; without arguments for `cargo test`, a short time of
    /// `fuzz` and those on other kernels (`vm-test --quick`) as well.
    Test(PassedOn),
    /// Boot Debian's kernels in QEMU and patch under load in them, under many
    /// conditions (`cargo xtask vm-test --help`).
    #[command(disable_help_flag = true)]
    VmTest(PassedOn),
    /// Measure calls and stops side by side (`cargo xtask bench --help`).
    #[command(disable_help_flag = true)]
    Bench(PassedOn),
    /// Run every fixture as RPC and fused, and write docs/coverage.md
    /// (`cargo xtask coverage --help`).
    #[command(disable_help_flag = true)]
    Coverage(PassedOn),
    /// End the agent, workers and containers at every point under load, and
    /// check that nothing is lost (`cargo xtask chaos --help`).
    #[command(disable_help_flag = true)]
    Chaos(PassedOn),
    /// Give everything that reads files, workers, disks or requests what a
    /// fuzzer makes up, and check that it ends without harm.
    Fuzz(fuzz::Options),
    /// Run the planner on made-up graphs and published topologies, beside the
    /// best that there is (`cargo xtask plan-sim --help`).
    #[command(disable_help_flag = true)]
    PlanSim(PassedOn),
    /// Check formatting and lints, as CI does before the tests.
    Lint,
}

/// The tests with hostile workers.
const HOSTILE: [&str; 5] = [
    "hostile_callee",
    "hostile_code",
    "hostile_moments",
    "hostile_process",
    "hostile_threads",
];

/// Arguments that go on to the program behind the task.
#[derive(clap::Args)]
struct PassedOn {
    /// Passed on: to the demo, to the benchmark, or to `cargo test`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl PassedOn {
    fn asks_for_help(&self) -> bool {
        self.arguments.iter().any(|a| a == "--help" || a == "-h")
    }
}

fn vm_test(arguments: &[OsString]) -> Result<()> {
    debug_with_tests("vm_test", arguments, "--stops", "stops")
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Setup => setup::install(setup::Extent::All),
        Task::Demo(passed) => {
            if !passed.asks_for_help() {
                let docker = passed
                    .arguments
                    .iter()
                    .any(|a| a.to_string_lossy().contains("docker"));
                setup::install(if docker {
                    setup::Extent::Docker
                } else {
                    setup::Extent::Functions
                })?;
            }
            released("demo", &passed.arguments)
        }
        Task::Bench(passed) => {
            if !passed.asks_for_help() {
                setup::install(setup::Extent::Functions)?;
            }
            released("bench", &passed.arguments)
        }
        Task::Test(passed) => {
            setup::install(setup::Extent::All)?;
            // The end-to-end tests run the programs as they are installed.
            cargo(["build", "--workspace", "--bins"], [])?;
            run::faulty()?;
            cargo(
                ["test", "--workspace", "--no-fail-fast"],
                passed.arguments.iter().map(OsString::as_os_str),
            )?;
            // Last, and alone: emulated processors are slow enough.
            if passed.arguments.is_empty() {
                fuzz::fuzz(&fuzz::Options::brief())?;
                vm_test(&["--quick".into()])?;
            }
            Ok(())
        }
        Task::PlanSim(passed) => released_of("nightgraft-planner", "plan_sim", &passed.arguments),
        Task::VmTest(passed) => {
            if passed.asks_for_help() {
                return debug("vm_test", &passed.arguments);
            }
            setup::install(setup::Extent::Machines)?;
            vm_test(&passed.arguments)
        }
        Task::Coverage(passed) => {
            if !passed.asks_for_help() {
                setup::install(setup::Extent::Fixtures)?;
            }
            debug("coverage", &passed.arguments)
        }
        Task::Chaos(passed) => {
            if passed.asks_for_help() {
                return debug("chaos", &passed.arguments);
            }
            setup::install(setup::Extent::Functions)?;
            run::faulty()?;
            debug_with_all_tests("chaos", &passed.arguments, "--hostile", &HOSTILE)
        }
        Task::Fuzz(options) => {
            setup::install(setup::Extent::Functions)?;
            fuzz::fuzz(&options)
        }
        Task::Lint => {
            cargo(["fmt", "--all", "--check"], [])?;
            cargo(
                [
                    "clippy",
                    "--workspace",
                    "--all-targets",
                    "--",
                    "--deny",
                    "warnings",
                ],
                [],
            )
        }
    }
}
