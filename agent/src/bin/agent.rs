//! The node agent: finds nightcore's workers and fuses functions in them, as
//! `agentctl` asks.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use nightgraft_agent::api::DEFAULT_SOCKET;
use nightgraft_agent::discover::ProcRoot;
use nightgraft_agent::discover::docker::{self, DockerSocket};
use nightgraft_agent::policy::Policy;
use nightgraft_agent::quarantine::{self, Quarantine};
use nightgraft_agent::server::{Agent, serve};
use nightgraft_agent::watch::Watch;
use nightgraft_agent::{driver, factory, ops, socket};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

const NOTES: &str = "\
Exit codes:
  0  stopped by SIGTERM or SIGINT
  1  can't serve; the reason is on stderr
  2  the command line can't be understood

Environment:
  RUST_LOG  what is logged to stderr, such as info (the default) or debug

Files:
  SOCKET.quarantine.json  edges that are not fused again until they are
                          unquarantined

Needs root; in a container --pid=host and --cap-add SYS_PTRACE.";

/// How often memory is looked at that nobody may need any more.
const TIDY: Duration = Duration::from_secs(60);

/// How long running requests may take to end once the agent is to stop.
const GRACE: Duration = Duration::from_secs(10);

/// The node agent of nightgraft: serves agentctl on a Unix socket.
#[derive(Debug, Parser)]
#[command(name = "agent", version, after_help = NOTES)]
struct Args {
    /// Where to listen; for root only
    #[arg(
        long,
        value_name = "PATH",
        env = "NIGHTGRAFT_SOCKET",
        default_value = DEFAULT_SOCKET
    )]
    socket: PathBuf,

    /// Which edges are allowed what, as TOML (read once, at the start):
    /// [[edge]] caller = "Foo" callee = "*" allow-effects = ["files"]
    #[arg(long, value_name = "FILE", env = "NIGHTGRAFT_CONFIG")]
    config: Option<PathBuf>,

    /// Docker's socket, for the names of containers (used where it exists)
    #[arg(long, value_name = "PATH")]
    docker_socket: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let policy = match &args.config {
        Some(path) => Policy::read(path)?,
        None => Policy::default(),
    };
    let policy = Arc::new(policy);
    let (socket, listener) = socket::bind(&args.socket)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start")?;
    let proc_root = ProcRoot::default();
    for missing in ops::missing_capabilities(&proc_root) {
        tracing::warn!(
            "lacks {}, needed to {}: start it with {}",
            missing.capability,
            missing.purpose,
            missing.flag
        );
    }
    let docker = DockerSocket {
        explicit: args.docker_socket.is_some(),
        path: args
            .docker_socket
            .unwrap_or_else(|| PathBuf::from(docker::DEFAULT_SOCKET)),
    };
    let grafter = factory::grafter();
    let file = quarantine::file_beside(&args.socket);
    let quarantine = Quarantine::open(file.clone()).with_context(|| {
        let file = file.display();
        format!("can't read the quarantined edges in {file} (remove it to forget them)")
    })?;
    let watch = Watch::start(quarantine, grafter.clone(), proc_root.clone())
        .context("can't start the watch")?;
    let (handle, driver) = driver::start(
        grafter.clone(),
        proc_root.clone(),
        policy.clone(),
        watch.clone(),
    )
    .context("can't start the driver")?;
    let tidied = grafter.clone();
    let agent = Agent::new(grafter, handle, proc_root, Some(docker), policy, watch);
    let served = runtime.block_on(async {
        let listener = UnixListener::from_std(listener).context("can't listen")?;
        let mut terminate = signal(SignalKind::terminate()).context("can't catch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("can't catch SIGINT")?;
        tokio::spawn(async move {
            let mut now = tokio::time::interval(TIDY);
            loop {
                now.tick().await;
                tidied.tidy();
            }
        });
        tracing::info!(socket = %args.socket.display(), "serving");
        let (stopping, mut stopped) = tokio::sync::watch::channel(false);
        let stop = async move {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            tracing::info!("{name}: stopping");
            let _ = stopping.send(true);
        };
        let grace = async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
            tokio::time::sleep(GRACE).await;
        };
        tokio::select! {
            served = serve(listener, agent, stop) => served.context("can't serve"),
            () = grace => {
                tracing::warn!("requests were still running after {GRACE:?}");
                Ok(())
            }
        }
    });
    // What hangs in /proc is left behind.
    runtime.shutdown_timeout(Duration::from_millis(100));
    let deadline = Instant::now() + GRACE;
    while !driver.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    if driver.is_finished() {
        tracing::info!("stopped");
    } else {
        tracing::warn!("stopped; a request that was under way is left as it is");
    }
    // Last: the next agent shall not meet this one in a worker.
    drop(socket);
    served
}
