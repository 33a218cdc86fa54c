//! The agent's socket: one agent per path, root only.
//!
//! ```text
//!  lock PATH.lock (flock) ──busy──► another agent serves: refuse
//!        │ ours
//!        ▼
//!  bind PATH.<pid>, mode 0600, rename onto PATH      (a dead agent's is replaced)
//! ```
//!
//! The lock is the truth: it ends with its process however that ends, and while
//! it is held nobody else touches the path. The lock file itself stays; to
//! remove it would let two agents hold locks on two files of one name.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Longest path of a socket: `sun_path` of unix(7) without its NUL.
const MAX_PATH: usize = 107;

/// Why the agent can't listen.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent holds the lock.
    #[error(
        "another agent (pid {pid}) already serves {}: stop it first, or give this one a \
         --socket of its own",
        .path.display()
    )]
    SecondAgent {
        /// The socket.
        path: PathBuf,
        /// The other agent's pid as it wrote it down; `?` where that can't be
        /// read.
        pid: String,
    },
    /// Something that is no socket is in the way.
    #[error("{} exists and is no socket: remove it, or give another --socket", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path does not fit into a socket's address.
    #[error("{} is longer than a socket's path may be ({MAX_PATH} bytes with the pid's suffix)", .path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The system refused something.
    #[error("can't {operation} {}: {cause}{}", .path.display(), root_text(.cause))]
    Io {
        /// What, completing "can't …".
        operation: &'static str,
        /// To which path.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

fn root_text(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::PermissionDenied => " (the agent needs root)",
        _ => "",
    }
}

/// A socket that this process serves; removed when dropped.
#[derive(Debug)]
pub struct AgentSocket {
    path: PathBuf,
    identity: (u64, u64),
    _lock: Flock<File>,
}

/// Takes the lock and binds the socket.
///
/// # Errors
/// [`SocketError`]; the path is then as it was.
pub fn bind(path: &Path) -> Result<(AgentSocket, UnixListener), SocketError> {
    let io = |operation, path: &Path| {
        let path = path.to_owned();
        move |cause| SocketError::Io {
            operation,
            path,
            cause,
        }
    };
    let own = with_suffix(path, &format!(".{}", std::process::id()));
    if own.as_os_str().len() > MAX_PATH {
        return Err(SocketError::TooLong {
            path: path.to_owned(),
        });
    }
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(io("create the directory", parent))?;
    }
    let lock = lock(path)?;
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => tracing::info!(path = %path.display(), "replacing the socket of a dead agent"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("look at", path)(error)),
    }
    // Under a name that nobody knows until its mode is right.
    let _ = fs::remove_file(&own);
    let listener = UnixListener::bind(&own).map_err(io("bind", &own))?;
    let ready = (|| {
        fs::set_permissions(&own, Permissions::from_mode(0o600))?;
        fs::rename(&own, path)?;
        listener.set_nonblocking(true)?;
        let metadata = fs::symlink_metadata(path)?;
        Ok((metadata.dev(), metadata.ino()))
    })();
    let identity = ready.map_err(|cause| {
        let _ = fs::remove_file(&own);
        io("set up", path)(cause)
    })?;
    Ok((
        AgentSocket {
            path: path.to_owned(),
            identity,
            _lock: lock,
        },
        listener,
    ))
}

fn lock(socket: &Path) -> Result<Flock<File>, SocketError> {
    let path = with_suffix(socket, ".lock");
    let io = |operation| {
        let path = path.clone();
        move |cause| SocketError::Io {
            operation,
            path,
            cause,
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(&path)
        .map_err(io("open"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let write = |file: &mut File| {
                file.set_len(0)?;
                file.rewind()?;
                writeln!(file, "{}", std::process::id())
            };
            write(&mut lock).map_err(io("write"))?;
            Ok(lock)
        }
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.take(32).read_to_string(&mut pid);
            let known = pid.trim().parse::<i32>().is_ok();
            let pid = if known {
                pid.trim().to_owned()
            } else {
                "?".to_owned()
            };
            Err(SocketError::SecondAgent {
                path: socket.to_owned(),
                pid,
            })
        }
        Err((_, errno)) => Err(io("lock")(errno.into())),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        // Only what is still ours: somebody may have moved things by hand.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_socket_is_for_its_owner_alone_and_goes_with_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/agent.sock");
        let (socket, _listener) = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
        let left: Vec<_> = fs::read_dir(dir.path().join("run")).unwrap().collect();
        assert_eq!(left.len(), 1, "the lock file alone: {left:?}");
    }

    #[test]
    fn a_second_agent_is_told_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let (_socket, _listener) = bind(&path).unwrap();
        let error = bind(&path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "another agent (pid {}) already serves {}: stop it first, or give this one a \
                 --socket of its own",
                std::process::id(),
                path.display()
            )
        );
        UnixStream::connect(&path).expect("the first one still serves");
    }

    #[test]
    fn a_dead_agent_s_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err(), "nobody listens");
        let (_socket, _listener) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        fs::write(&path, "precious").unwrap();
        let error = bind(&path).unwrap_err();
        assert!(
            error.to_string().contains("exists and is no socket"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_in_words() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        assert!(matches!(bind(&path), Err(SocketError::TooLong { .. })));
    }

    #[test]
    fn another_s_socket_survives_our_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let (socket, _listener) = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
