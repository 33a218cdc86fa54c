//! The engine's command line, as nightcore's engine has it.
//!
//! Flags that tune what this engine does not have (threads, its monitor) are
//! taken and have no effect.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::ipc;

/// An engine's command line.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// `--func_config_file`.
    pub func_config_file: PathBuf,
    /// `--root_path_for_ipc`.
    pub ipc_root: PathBuf,
    /// `--gateway_addr` and `--gateway_port`.
    pub gateway: (String, u16),
    /// `--use_fifo_for_nested_call`.
    pub fifo_for_nested_call: bool,
    /// `--node_id`.
    pub node: u16,
}

impl EngineOptions {
    /// Reads this process's command line.
    pub fn from_env() -> Result<Self> {
        let flags = crate::flags::Flags::from_env(
            &[
                "gateway_addr",
                "gateway_port",
                "num_io_workers",
                "gateway_conn_per_worker",
                "node_id",
                "root_path_for_ipc",
                "func_config_file",
                "v",
            ],
            &[
                "use_fifo_for_nested_call",
                "disable_monitor",
                "func_worker_pipe_direct_write",
            ],
        )?;
        ensure!(
            flags.positional.is_empty(),
            "no positional arguments are taken"
        );
        Ok(Self {
            func_config_file: flags
                .text("func_config_file")
                .context("--func_config_file is missing")?
                .into(),
            ipc_root: flags
                .text("root_path_for_ipc")
                .unwrap_or(ipc::DEFAULT_ROOT)
                .into(),
            gateway: (
                flags.text("gateway_addr").unwrap_or("127.0.0.1").to_owned(),
                flags.get("gateway_port", 10007)?,
            ),
            fifo_for_nested_call: flags.is_on("use_fifo_for_nested_call")?,
            node: flags.get("node_id", 0)?,
        })
    }
}
