//! Edges that must not be fused any more, until somebody says so.
//!
//! An edge comes here when a worker died while its callee's code ran
//! ([`crate::watch`]); it leaves by `agentctl unquarantine` alone. A crash takes
//! a worker with it that nightcore does not start again: a second try is nothing
//! that the agent, or a patch in a script, may decide on.
//!
//! The list is kept in a file beside the socket, so that an agent that is
//! started again knows it. An edge belongs to an engine's process: functions of
//! the same names on another engine are others.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::api::Quarantined;

/// The edges, and the file that they are kept in.
#[derive(Debug, Default)]
pub struct Quarantine {
    file: Option<PathBuf>,
    edges: Mutex<Vec<Quarantined>>,
}

/// The file's name, for a socket: another agent on another socket has another.
#[must_use]
pub fn file_beside(socket: &Path) -> PathBuf {
    let mut name = socket.file_name().unwrap_or_default().to_owned();
    name.push(".quarantine.json");
    socket.with_file_name(name)
}

impl Quarantine {
    /// Reads the file; there need not be one.
    ///
    /// # Errors
    /// It cannot be read, or makes no sense: an agent that took it for empty
    /// would fuse what must not be.
    pub fn open(file: PathBuf) -> io::Result<Self> {
        let edges = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(Self {
            file: Some(file),
            edges: Mutex::new(edges),
        })
    }

    fn edges(&self) -> MutexGuard<'_, Vec<Quarantined>> {
        self.edges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, in the order in which they came.
    #[must_use]
    pub fn all(&self) -> Vec<Quarantined> {
        self.edges().clone()
    }

    /// Whether an edge is among them, and why.
    #[must_use]
    pub fn find(&self, engine: Option<i32>, caller: &str, callee: &str) -> Option<Quarantined> {
        let edges = self.edges();
        edges
            .iter()
            .find(|e| is(e, engine, caller, callee))
            .cloned()
    }

    /// Adds an edge; one that is there already keeps its first reason.
    pub fn add(&self, edge: Quarantined) {
        let mut edges = self.edges();
        if edges
            .iter()
            .any(|e| is(e, edge.engine, &edge.caller, &edge.callee))
        {
            return;
        }
        edges.push(edge);
        self.keep(&edges);
    }

    /// Removes an edge; what it was there for, if it was.
    pub fn remove(&self, engine: Option<i32>, caller: &str, callee: &str) -> Option<Quarantined> {
        let mut edges = self.edges();
        let at = edges.iter().position(|e| is(e, engine, caller, callee))?;
        let edge = edges.remove(at);
        self.keep(&edges);
        Some(edge)
    }

    /// Writes the file anew, beside and over the old one. What cannot be written
    /// still holds for as long as this agent runs.
    fn keep(&self, edges: &[Quarantined]) {
        let Some(file) = &self.file else { return };
        if let Err(error) = replace(file, edges) {
            tracing::error!(file = %file.display(), %error, "the quarantine can't be kept: the next agent will not know it");
        }
    }
}

fn is(edge: &Quarantined, engine: Option<i32>, caller: &str, callee: &str) -> bool {
    edge.engine == engine && edge.caller == caller && edge.callee == callee
}

fn replace(file: &Path, edges: &[Quarantined]) -> io::Result<()> {
    let new = file.with_extension("new");
    let mut out = fs::File::create(&new)?;
    out.write_all(&serde_json::to_vec_pretty(edges)?)?;
    out.sync_all()?;
    fs::rename(&new, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(callee: &str, how: &str) -> Quarantined {
        Quarantined {
            caller: "Foo".to_owned(),
            callee: callee.to_owned(),
            engine: Some(7),
            pid: 11,
            how: how.to_owned(),
            in_flight: vec![callee.to_owned()],
            since: 1,
        }
    }

    #[test]
    fn what_is_quarantined_stays_so_in_the_next_agent() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_beside(&dir.path().join("agent.sock"));
        let one = Quarantine::open(file.clone()).unwrap();
        one.add(edge("Bar", "died of SIGSEGV"));
        one.add(edge("Bar", "died of SIGABRT"));
        one.add(edge("Baz", "exited with code 0"));
        assert_eq!(one.all().len(), 2);

        let two = Quarantine::open(file).unwrap();
        let found = two.find(Some(7), "Foo", "Bar").unwrap();
        assert_eq!(found.how, "died of SIGSEGV");
        assert_eq!(two.find(Some(8), "Foo", "Bar"), None);
        assert_eq!(two.find(Some(7), "Foo", "bar"), None);
        assert!(two.remove(Some(7), "Foo", "Bar").is_some());
        assert_eq!(two.remove(Some(7), "Foo", "Bar"), None);
        assert_eq!(two.all().len(), 1);
    }

    #[test]
    fn a_file_that_makes_no_sense_is_not_taken_for_empty() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.json");
        fs::write(&file, "[{").unwrap();
        assert!(Quarantine::open(file).is_err());
    }
}
