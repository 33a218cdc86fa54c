//! `launcher --func_id=1 --fprocess_mode=cpp --fprocess="func_worker_v1 lib.so"`:
//! starts the workers of one function.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nightgraft_testbed::flags::Flags;
use nightgraft_testbed::ipc::DEFAULT_ROOT;
use nightgraft_testbed::launcher::{LauncherOptions, run};

fn main_result() -> Result<()> {
    let flags = Flags::from_env(
        &[
            "root_path_for_ipc",
            "func_id",
            "fprocess",
            "fprocess_working_dir",
            "fprocess_output_dir",
            "fprocess_mode",
            "v",
        ],
        &[],
    )?;
    ensure!(
        flags.positional.is_empty(),
        "no positional arguments are taken"
    );
    let mode = flags.text("fprocess_mode").unwrap_or("cpp");
    ensure!(
        mode == "cpp",
        "--fprocess_mode={mode}: this node runs C and C++ functions only"
    );
    run(&LauncherOptions {
        func: flags
            .text("func_id")
            .context("--func_id is missing")?
            .parse()
            .context("--func_id")?,
        fprocess: flags
            .text("fprocess")
            .context("--fprocess is missing")?
            .to_owned(),
        working_dir: flags.text("fprocess_working_dir").map(Into::into),
        output_dir: flags.text("fprocess_output_dir").map(Into::into),
        ipc_root: flags
            .text("root_path_for_ipc")
            .unwrap_or(DEFAULT_ROOT)
            .into(),
    })
}

fn main() -> ExitCode {
    match main_result() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("FATAL: {e:#}");
            ExitCode::FAILURE
        }
    }
}
