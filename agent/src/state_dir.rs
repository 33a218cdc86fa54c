//! The agent's own directory: made for root alone, and for one agent at a time.
//!
//! The lock is a `flock` on the directory itself: it needs no file, so that it
//! works on a read-only disk too, and ends with its process however that ends.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Where the agent keeps its journal unless told otherwise.
pub const DEFAULT: &str = "/var/lib/nightgraft";

/// Why a directory is not ours.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// Another agent has it.
    #[error(
        "another agent{} keeps its journal in {}: stop it first, or give this one a --state-dir \
         of its own", holder_text(.holder), .path.display()
    )]
    SecondAgent {
        /// The directory.
        path: PathBuf,
        /// The other agent's pid, where the kernel tells.
        holder: Option<i32>,
    },
    /// It is somebody else's, or not for us alone.
    #[error("{} is not the agent's own ({what}): give another --state-dir, or set it right by hand", .path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// It cannot be used: the journal is away.
    #[error("can't {operation} {}: {cause}", .path.display())]
    Unusable {
        /// What, completing "can't …".
        operation: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

fn holder_text(holder: &Option<i32>) -> String {
    holder.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// A directory that this process has for itself while this lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Takes the directory, and makes it (mode 0700) where it is missing.
    ///
    /// # Errors
    /// See [`StateDirError`].
    pub fn take(path: &Path) -> Result<StateDir, StateDirError> {
        let unusable = |operation| {
            move |cause| StateDirError::Unusable {
                operation,
                path: path.to_owned(),
                cause,
            }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(unusable("make"))?;
        let directory = File::open(path).map_err(unusable("open"))?;
        let metadata = directory.metadata().map_err(unusable("look at"))?;
        let not_ours = |what: String| StateDirError::NotOurs {
            path: path.to_owned(),
            what,
        };
        let uid = nix::unistd::geteuid().as_raw();
        if metadata.uid() != uid {
            return Err(not_ours(format!(
                "it belongs to user {}, and we are {uid}",
                metadata.uid()
            )));
        }
        // Others could put a journal there.
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o022 != 0 {
            return Err(not_ours(format!(
                "its mode is {mode:o}: others may write to it"
            )));
        }
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(StateDir {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err((directory, nix::errno::Errno::EWOULDBLOCK)) => Err(StateDirError::SecondAgent {
                path: path.to_owned(),
                holder: crate::claim::holder(&directory),
            }),
            Err((_, errno)) => Err(unusable("lock")(errno.into())),
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_for_its_owner_alone_and_for_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib/nightgraft");
        let taken = StateDir::take(&path).unwrap();
        let mode = fs::metadata(taken.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        let error = StateDir::take(&path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "another agent (pid {}) keeps its journal in {}: stop it first, or give this one \
                 a --state-dir of its own",
                std::process::id(),
                path.display()
            )
        );
        drop(taken);
        StateDir::take(&path).unwrap();
    }

    #[test]
    fn one_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = StateDir::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains("others may write to it"), "{error}");
    }

    #[test]
    fn one_that_cannot_be_made_is_told() {
        let error = StateDir::take(Path::new("/proc/nightgraft")).unwrap_err();
        assert!(matches!(error, StateDirError::Unusable { .. }), "{error}");
    }
}
