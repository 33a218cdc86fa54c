//! The program `agent`: from its arguments to its end.
//!
//! ```text
//!  arguments ─► policy ─► socket (one per path) ─► directory (one agent each)
//!     ─► journal ─► driver: recovery, then requests ─► serve ─► grace ─► end
//! ```
//!
//! In a library, because the program with fault points is made of it as well.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use nightgraft_patcher::journal::Journal as _;

use crate::api::DEFAULT_SOCKET;
use crate::discover::ProcRoot;
use crate::discover::docker::{self, DockerSocket};
use crate::faults::{self, hit};
use crate::grafter::Target;
use crate::journal::{Disk, Epoch, Opening};
use crate::observer::Observer;
use crate::policy::Policy;
use crate::quarantine::{self, Quarantine};
use crate::recovery::Recovery;
use crate::server::{Agent, serve};
use crate::state_dir::{self, StateDir, StateDirError};
use crate::watch::Watch;
use crate::{driver, factory, ops, socket};

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
  STATE_DIR/journal.redb  what was done to workers
  STATE_DIR/observe.json  which functions are observed
  STATE_DIR/history.redb  what they called

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

    /// Where the agent keeps its journal; for root only, and for one agent
    ///
    /// What is done to workers is written down there first, so that the next
    /// agent can put in order what one that died has left. Without it (no
    /// room, read-only) nothing is patched; reverts work. Made where missing.
    #[arg(
        long,
        value_name = "DIR",
        env = "NIGHTGRAFT_STATE_DIR",
        default_value = state_dir::DEFAULT
    )]
    state_dir: PathBuf,

    /// Docker's socket, for the names of containers (used where it exists)
    #[arg(long, value_name = "PATH")]
    docker_socket: Option<PathBuf>,

    /// List the points at which this build can be made to end
    #[cfg(feature = "fault-points")]
    #[arg(long)]
    list_fault_points: bool,
}

/// What the program does.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    #[cfg(feature = "fault-points")]
    if args.list_fault_points {
        use std::io::Write as _;
        for point in faults::all() {
            // A reader that has gone is no failure.
            let _ = writeln!(std::io::stdout(), "{point}");
        }
        return ExitCode::SUCCESS;
    }
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
    raise_descriptors();
    #[cfg(feature = "fault-points")]
    faults::arm().context("the fault points can't be armed")?;
    let (socket, listener) = socket::bind(&args.socket)?;
    let (state, journal, opening) = journal(&args.state_dir)?;
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
    let known = known(&journal, &opening);
    let recovery = Recovery::due(opening.notes);
    let grafter = factory::grafter(journal);
    let file = quarantine::file_beside(&args.socket);
    let quarantine = Quarantine::open(file.clone()).with_context(|| {
        let file = file.display();
        format!("can't read the quarantined edges in {file} (remove it to forget them)")
    })?;
    let watch = Watch::start(quarantine, grafter.clone(), proc_root.clone())
        .context("can't start the watch")?;
    let observer = Observer::open(state.as_ref().map(StateDir::path));
    let (handle, driver) = driver::start(
        grafter.clone(),
        proc_root.clone(),
        policy.clone(),
        watch.clone(),
        observer.clone(),
        Some((recovery.clone(), known)),
    )
    .context("can't start the driver")?;
    observer
        .start(grafter.clone(), proc_root.clone(), handle.weak())
        .context("can't start the observer")?;
    let tidied = grafter.clone();
    let agent = Agent::new(
        grafter,
        handle,
        proc_root,
        Some(docker),
        policy,
        (watch, observer.clone()),
        recovery,
    );
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
    observer.stop();
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
    drop(state);
    drop(socket);
    served
}

/// Each worker takes some descriptors: as many are allowed as may be.
fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Takes the directory and opens the journal. A directory that another agent
/// has, or that is not ours, ends us; one that cannot be used does not: what
/// is fused can still be reverted.
fn journal(directory: &Path) -> anyhow::Result<(Option<StateDir>, Arc<Disk>, Opening)> {
    let epoch = Epoch::present().context("can't tell which boot this is")?;
    let (state, disk, opening) = match StateDir::take(directory) {
        Ok(state) => {
            hit(faults::STATE_LOCKED);
            let (disk, opening) = Disk::open(state.path(), epoch);
            (Some(state), disk, opening)
        }
        Err(error @ StateDirError::Unusable { .. }) => {
            let disk = Disk::without(directory, epoch, error.to_string());
            (None, disk, Opening::default())
        }
        Err(error) => return Err(error.into()),
    };
    for note in &opening.notes {
        tracing::warn!("{note}");
    }
    if let Some(why) = disk.away() {
        tracing::warn!(
            why,
            "the journal is away: nothing is patched until it is back"
        );
    }
    if opening.dropped > 0 {
        tracing::info!(
            dropped = opening.dropped,
            "journal: dropped entries of the dead"
        );
    }
    Ok((state, Arc::new(disk), opening))
}

/// Workers that the journal knows: they are recovered even if a scan of the
/// node does not find them.
fn known(journal: &Disk, opening: &Opening) -> Vec<Target> {
    let target = |&(pid, start_time): &(i32, u64)| {
        let entry = journal.entry(pid, start_time).ok().flatten();
        let record = entry.and_then(|entry| entry.record);
        Target {
            pid,
            start_time,
            library: record
                .map(|record| record.library.into())
                .unwrap_or_default(),
        }
    };
    opening.living.iter().map(target).collect()
}
