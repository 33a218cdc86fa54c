//! Containers made by Docker.
//!
//! A daemon that answers (`DOCKER_HOST`, or the usual socket) is used. Where
//! none does, one is started for this node alone, with a socket, a data root
//! and a mount namespace of its own, no network and no firewall rules, and it
//! ends with the node. Which version of the API is spoken is settled with the
//! daemon.
//!
//! An image is the very root file system that the embedded runtime uses,
//! imported as a tar archive: there is no registry and no build.
//!
//! If the keeper is killed outright, the launchers still end (their engine is
//! gone), and with them the containers; the daemon's shims may stay.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bollard::models::{ContainerCreateBody, HostConfig};
use bollard::query_parameters::{
    CreateImageOptionsBuilder, RemoveContainerOptionsBuilder, RemoveImageOptionsBuilder,
};
use bollard::{API_DEFAULT_VERSION, Docker as Client, body_full};
use futures_util::TryStreamExt;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::runtime::Runtime as Tokio;

use super::{Container, ContainerSpec, IPC_INSIDE, OUTPUTS_INSIDE, Runtime, rootfs};
use crate::sys::process;

/// The usual socket.
const SOCKET: &str = "/var/run/docker.sock";
/// How long a daemon of ours may take to listen.
const DAEMON_WITHIN: Duration = Duration::from_secs(30);
/// How long it may take to end.
const DAEMON_ENDS_WITHIN: Duration = Duration::from_secs(15);
/// How long it may take to answer a request, in seconds.
const REQUEST_SECONDS: u64 = 60;

/// The runtime. Dropping it ends a daemon that it started.
pub struct Docker {
    link: Rc<Link>,
    _daemon: Option<Daemon>,
}

/// A client, and what its requests run on.
struct Link {
    client: Client,
    tokio: Tokio,
}

struct Daemon {
    process: Child,
}

struct Running {
    link: Rc<Link>,
    id: String,
    image: String,
    init: Pid,
    ended: bool,
}

impl Docker {
    /// Uses a daemon that runs, or starts one that keeps its things in `dir`.
    pub fn connect(dir: &Path) -> Result<Self> {
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let usual = match std::env::var("DOCKER_HOST") {
            Ok(host) => host.strip_prefix("unix://").map(PathBuf::from),
            Err(_) => Some(PathBuf::from(SOCKET)),
        };
        if let Some(client) = usual.and_then(|s| answers(&tokio, &s)) {
            return Ok(Self {
                link: Rc::new(Link { client, tokio }),
                _daemon: None,
            });
        }
        let (daemon, client) = Daemon::start(&tokio, dir)?;
        Ok(Self {
            link: Rc::new(Link { client, tokio }),
            _daemon: Some(daemon),
        })
    }
}

/// A client for the daemon behind a socket, if one answers.
fn answers(tokio: &Tokio, socket: &Path) -> Option<Client> {
    let client =
        Client::connect_with_unix(socket.to_str()?, REQUEST_SECONDS, API_DEFAULT_VERSION).ok()?;
    tokio.block_on(client.negotiate_version()).ok()
}

impl Daemon {
    fn start(tokio: &Tokio, dir: &Path) -> Result<(Self, Client)> {
        let socket = dir.join("docker.sock");
        let log = dir.join("logs/dockerd.log");
        let out = File::create(&log)?;
        let mut command = Command::new("dockerd");
        command
            .arg(format!("--host=unix://{}", socket.display()))
            .arg(format!("--data-root={}", dir.join("docker-data").display()))
            .arg(format!("--exec-root={}", dir.join("docker-run").display()))
            .arg(format!("--pidfile={}", dir.join("docker.pid").display()))
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false"])
            .args(["--exec-opt", "native.cgroupdriver=cgroupfs"])
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        process::own_mounts(&mut command);
        process::kill_with_parent(&mut command);
        let process = command.spawn().context(
            "no Docker daemon answers, and dockerd cannot be started (is docker.io installed?)",
        )?;
        let mut daemon = Self { process };
        let deadline = Instant::now() + DAEMON_WITHIN;
        loop {
            if socket.exists()
                && let Some(client) = answers(tokio, &socket)
            {
                return Ok((daemon, client));
            }
            let said = || tail(&fs::read_to_string(&log).unwrap_or_default());
            if let Some(status) = daemon.process.try_wait()? {
                bail!("dockerd ended with {status}: {}", said());
            }
            ensure!(
                Instant::now() < deadline,
                "dockerd does not listen: {}",
                said()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Our own child, not yet waited for: the pid is surely it.
        let _ = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM);
        let deadline = Instant::now() + DAEMON_ENDS_WITHIN;
        while let Ok(None) = self.process.try_wait() {
            if Instant::now() > deadline {
                eprintln!("dockerd does not end and is killed");
                let _ = self.process.kill();
                let _ = self.process.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Runtime for Docker {
    fn start(&mut self, spec: &ContainerSpec) -> Result<Box<dyn Container>> {
        let root = spec.dir.join("root");
        fs::create_dir(&root)?;
        rootfs::build(&root, &spec.files)?;
        let archive = Command::new("tar")
            .args(["-c", "--numeric-owner", "-C"])
            .arg(&root)
            .arg(".")
            .output()
            .context("cannot run tar")?;
        ensure!(
            archive.status.success(),
            "tar: {}",
            String::from_utf8_lossy(&archive.stderr)
        );
        // What is mounted from here on is the image's copy.
        fs::remove_dir_all(&root)?;
        let image = format!("nightgraft-{}:testbed", &spec.id[..32]);
        let link = self.link.clone();
        let mut running = Running {
            link: link.clone(),
            id: String::new(),
            image: image.clone(),
            init: Pid::from_raw(0),
            ended: false,
        };
        link.tokio.block_on(async {
            import(&link.client, &image, archive.stdout).await?;
            let created = link
                .client
                .create_container(None, config(spec, &image))
                .await
                .context("create")?;
            running.id = created.id;
            link.client
                .start_container(&running.id, None)
                .await
                .context("start")?;
            let seen = link
                .client
                .inspect_container(&running.id, None)
                .await
                .context("inspect")?;
            let pid = seen.state.and_then(|s| s.pid).filter(|&pid| pid > 0);
            let pid = pid.context("the container ended at once")?;
            running.init = Pid::from_raw(i32::try_from(pid)?);
            anyhow::Ok(())
        })?;
        Ok(Box::new(running))
    }
}

async fn import(client: &Client, image: &str, archive: Vec<u8>) -> Result<()> {
    let (repo, tag) = image.split_once(':').unwrap_or((image, "latest"));
    let options = CreateImageOptionsBuilder::new()
        .from_src("-")
        .repo(repo)
        .tag(tag)
        .build();
    client
        .create_image(Some(options), Some(body_full(archive.into())), None)
        .try_collect::<Vec<_>>()
        .await
        .with_context(|| format!("import of {image}"))?;
    Ok(())
}

fn config(spec: &ContainerSpec, image: &str) -> ContainerCreateBody {
    let cpus: Vec<String> = spec.cpus.iter().map(usize::to_string).collect();
    ContainerCreateBody {
        image: Some(image.to_owned()),
        cmd: Some(spec.command.clone()),
        env: Some(spec.env.iter().map(|(k, v)| format!("{k}={v}")).collect()),
        host_config: Some(HostConfig {
            binds: Some(vec![
                format!("{}:{IPC_INSIDE}", spec.ipc.display()),
                format!("{}:{OUTPUTS_INSIDE}", spec.logs.display()),
            ]),
            network_mode: Some("none".into()),
            readonly_rootfs: Some(true),
            ipc_mode: Some("private".into()),
            memory: spec.memory_limit.and_then(|m| i64::try_from(m).ok()),
            cpuset_cpus: (!cpus.is_empty()).then(|| cpus.join(",")),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

impl Container for Running {
    fn id(&self) -> &str {
        &self.id
    }

    fn init(&self) -> Pid {
        self.init
    }

    fn stop(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let Link { client, tokio } = &*self.link;
        tokio.block_on(async {
            if !self.id.is_empty() {
                let force = RemoveContainerOptionsBuilder::new().force(true).build();
                client
                    .remove_container(&self.id, Some(force))
                    .await
                    .context("remove")?;
            }
            let force = RemoveImageOptionsBuilder::new().force(true).build();
            client
                .remove_image(&self.image, Some(force), None)
                .await
                .context("remove image")?;
            Ok(())
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("container {}: {e:#}", self.id);
        }
    }
}
