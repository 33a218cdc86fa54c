//! Workers, found in `/proc` as anybody on the host would find them.

use std::fs;

use anyhow::{Context, Result};

use crate::keeper::ContainerState;

/// A worker process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerInfo {
    /// The function that it serves.
    pub function: String,
    /// Its pid, as the host sees it.
    pub host_pid: i32,
    /// Its pid inside the container.
    pub container_pid: i32,
    /// `FAAS_CLIENT_ID`.
    pub client: u16,
    /// `FAAS_FPROCESS_ID`: its number within the function.
    pub number: u32,
    /// The container's id.
    pub container: String,
}

/// The workers of a container that live: the children of its PID 1 which run
/// `func_worker_v1`.
pub(crate) fn workers_of(container: &ContainerState) -> Result<Vec<WorkerInfo>> {
    let init = container.init;
    let path = format!("/proc/{init}/task/{init}/children");
    let children = fs::read_to_string(&path)
        .with_context(|| format!("the launcher of {} is gone ({path})", container.function))?;
    let mut workers: Vec<_> = children
        .split_whitespace()
        .filter_map(|pid| worker(pid, container))
        .collect();
    workers.sort_by_key(|w| w.number);
    Ok(workers)
}

/// `None` for what is not (or not yet, or no longer) a worker.
fn worker(pid: &str, container: &ContainerState) -> Option<WorkerInfo> {
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let program = cmdline.split(|&b| b == 0).next()?;
    if !program.ends_with(b"/func_worker_v1") {
        return None;
    }
    let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(WorkerInfo {
        function: container.function.clone(),
        host_pid: pid.parse().ok()?,
        container_pid: field(&status, "NSpid:")?
            .split_whitespace()
            .last()?
            .parse()
            .ok()?,
        client: variable(&environ, "FAAS_CLIENT_ID=")?.parse().ok()?,
        number: variable(&environ, "FAAS_FPROCESS_ID=")?.parse().ok()?,
        container: container.id.clone(),
    })
}

fn field<'t>(status: &'t str, name: &str) -> Option<&'t str> {
    status
        .lines()
        .find_map(|l| l.strip_prefix(name))
        .map(str::trim)
}

fn variable<'e>(environ: &'e [u8], name: &str) -> Option<&'e str> {
    environ
        .split(|&b| b == 0)
        .find_map(|v| v.strip_prefix(name.as_bytes()))
        .and_then(|v| std::str::from_utf8(v).ok())
}

impl WorkerInfo {
    /// Whether its main thread is blocked in `read(5, …, 1024)`: idle, or
    /// inside an RPC.
    pub fn waits_for_request(&self) -> bool {
        // "0 0x5 0x7ffc… 0x400 …": the call's number, then its arguments.
        let Ok(text) = fs::read_to_string(format!("/proc/{}/syscall", self.host_pid)) else {
            return false;
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        matches!(words[..], ["0", "0x5", _, "0x400", ..])
    }

    /// A line of `/proc/PID/status`, without its name.
    pub fn status(&self, name: &str) -> Option<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.host_pid)).ok()?;
        field(&status, &format!("{name}:")).map(str::to_owned)
    }

    /// Whether the process lives; a zombie does not.
    pub fn is_alive(&self) -> bool {
        self.status("State")
            .is_some_and(|s| !s.starts_with(['Z', 'X']))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_fields() {
        assert_eq!(
            field("Name:\tx\nNSpid:\t27287\t8\n", "NSpid:"),
            Some("27287\t8")
        );
        let environ = b"PATH=/bin\0FAAS_CLIENT_ID=12\0X_FAAS_CLIENT_ID=13\0";
        assert_eq!(variable(environ, "FAAS_CLIENT_ID="), Some("12"));
        assert_eq!(variable(environ, "FAAS_FUNC_ID="), None);
    }
}
