//! Names and labels of containers, from Docker where there is one.
//!
//! Only decoration: what is fused does not depend on it, so it has a second
//! in all and its failure is a note.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::query_parameters::ListContainersOptions;
use bollard::{API_DEFAULT_VERSION, Docker};

/// Where Docker listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/docker.sock";
/// How long Docker may take, all in all.
const LIMIT: Duration = Duration::from_secs(1);

/// Where to ask for names.
#[derive(Debug, Clone)]
pub struct DockerSocket {
    /// The socket's path.
    pub path: PathBuf,
    /// Whether somebody asked for it: then its absence is worth a note.
    pub explicit: bool,
}

/// What Docker says of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Description {
    /// Its name, without the leading slash.
    pub name: Option<String>,
    /// Its image, as it was started.
    pub image: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Descriptions of the running containers by id, and a note where they could
/// not be had.
pub async fn describe(socket: &DockerSocket) -> (HashMap<String, Description>, Option<String>) {
    if !socket.explicit && !socket.path.exists() {
        return (HashMap::new(), None);
    }
    let note = |cause: &dyn std::fmt::Display| {
        format!(
            "no container names: Docker at {}: {cause}",
            socket.path.display()
        )
    };
    match tokio::time::timeout(LIMIT, list(&socket.path)).await {
        Ok(Ok(found)) => (found, None),
        Ok(Err(error)) => (HashMap::new(), Some(note(&error))),
        Err(_) => (
            HashMap::new(),
            Some(note(&format_args!("no answer within {LIMIT:?}"))),
        ),
    }
}

async fn list(path: &Path) -> Result<HashMap<String, Description>, bollard::errors::Error> {
    let path = path.to_string_lossy();
    let docker = Docker::connect_with_unix(&path, LIMIT.as_secs(), API_DEFAULT_VERSION)?;
    let containers = docker
        .list_containers(None::<ListContainersOptions>)
        .await?;
    let described = containers.into_iter().filter_map(|container| {
        let name = container.names.and_then(|names| names.into_iter().next());
        let description = Description {
            name: name.map(|name| name.trim_start_matches('/').to_owned()),
            image: container.image,
            labels: container.labels.unwrap_or_default().into_iter().collect(),
        };
        Some((container.id?, description))
    });
    Ok(described.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_docker_is_no_news_unless_it_was_asked_for() {
        let path = PathBuf::from("/nonexistent/docker.sock");
        let (found, note) = describe(&DockerSocket {
            path: path.clone(),
            explicit: false,
        })
        .await;
        assert!(found.is_empty() && note.is_none());
        let (found, note) = describe(&DockerSocket {
            path,
            explicit: true,
        })
        .await;
        assert!(found.is_empty());
        assert!(
            note.unwrap()
                .starts_with("no container names: Docker at /nonexistent/docker.sock")
        );
    }

    /// Something that answers every request on a socket like Docker would.
    async fn docker(body: &'static str) -> (tempfile::TempDir, DockerSocket) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let app = axum::Router::new().fallback(move |uri: axum::http::Uri| async move {
            let json = [(axum::http::header::CONTENT_TYPE, "application/json")];
            match uri.path().ends_with("/containers/json") {
                true => Ok((json, body)),
                false => Err(axum::http::StatusCode::NOT_FOUND),
            }
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        (
            dir,
            DockerSocket {
                path,
                explicit: false,
            },
        )
    }

    #[tokio::test]
    async fn containers_are_described() {
        let body = r#"[{"Id":"abc","Names":["/foo-1"],"Image":"foo:3","Labels":{"team":"a"}},
                       {"Id":"def"}]"#;
        let (_dir, socket) = docker(body).await;
        let (found, note) = describe(&socket).await;
        assert_eq!(note, None);
        let foo = &found["abc"];
        assert_eq!(
            (foo.name.as_deref(), foo.image.as_deref()),
            (Some("foo-1"), Some("foo:3"))
        );
        assert_eq!(foo.labels["team"], "a");
        assert_eq!(found["def"], Description::default());
    }

    #[tokio::test]
    async fn nonsense_from_docker_is_a_note() {
        let (_dir, socket) = docker("[{").await;
        let (found, note) = describe(&socket).await;
        assert!(found.is_empty());
        assert!(note.unwrap().starts_with("no container names: Docker at "));
    }

    #[tokio::test]
    async fn a_docker_that_hangs_is_a_note() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        // Connections are taken by the backlog, and nobody ever answers.
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (found, note) = describe(&DockerSocket {
            path,
            explicit: false,
        })
        .await;
        assert!(found.is_empty());
        assert!(note.unwrap().starts_with("no container names: Docker at "));
    }
}
