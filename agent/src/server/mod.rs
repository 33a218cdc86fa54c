//! The API over HTTP: routes, limits, and the mapping of errors to statuses.
//!
//! Nothing is decided here. Peers are let in by their credentials
//! (SO_PEERCRED), bodies and times are limited, and every request that changes
//! something is logged with who asked for it.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::api::{
    EXPLAIN, EdgeRequest, ErrorBody, ExplainRequest, Explanation, GRAPH, Graph, HEALTH, HISTORY,
    Health, History, OBSERVE, ObserveReport, ObserveRequest, PATCH, PLAN, PS, PatchReport,
    PatchRequest, PlanReport, Ps, REVERT, RevertReport, STATUS, Status, UNQUARANTINE,
    UnquarantineReport,
};
use crate::canary::SystemClock;
use crate::discover::docker::{self, DockerSocket};
use crate::discover::{Node, ProcRoot, scan_within};
use crate::driver::DriverHandle;
use crate::error::AgentError;
use crate::grafter::{GraftError, Grafter};
use crate::observer::Observer;
use crate::ops::{self, Context, missing_capabilities};
use crate::planning;
use crate::policy::Policy;
use crate::recovery::Recovery;
use crate::watch::Watch;

/// Largest request body, in bytes.
const MAX_BODY: usize = 16 << 10;
/// How long a body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(5);
/// How long a request that only reads may take.
const READ_LIMIT: Duration = Duration::from_secs(30);
/// How long the search for workers may take; it takes milliseconds.
const SCAN_LIMIT: Duration = Duration::from_secs(20);
/// How long a request that changes workers may take, besides its watches.
const WRITE_LIMIT: Duration = Duration::from_secs(120);
/// How many requests read at the same time: /proc can hang on a hostile
/// process, and then it shall not take all threads.
const READERS: usize = 8;

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
struct Peer {
    /// `None` where the kernel does not say.
    uid: Option<u32>,
    pid: i32,
}

impl axum::extract::connect_info::Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let credentials = stream.io().peer_cred().ok();
        Self {
            uid: credentials.map(|c| c.uid()),
            pid: credentials.and_then(|c| c.pid()).unwrap_or(0),
        }
    }
}

/// What the handlers share.
#[derive(Clone)]
pub struct Agent {
    /// The patcher, for what only reads.
    pub grafter: Arc<dyn Grafter>,
    /// What changes workers.
    pub driver: DriverHandle,
    /// The proc file system.
    pub proc_root: ProcRoot,
    /// Where container names come from; `None` for no names.
    pub docker: Option<DockerSocket>,
    /// What edges are allowed.
    pub policy: Arc<Policy>,
    /// Who watches patched workers, and what is quarantined.
    pub watch: Arc<Watch>,
    /// Who reads counters, and what is to be observed.
    pub observer: Arc<Observer>,
    /// What was recovered when the agent started.
    pub recovery: Recovery,
    /// Users that may talk to the agent.
    pub allowed_uids: Vec<u32>,
    readers: Arc<Semaphore>,
    started: Instant,
}

impl Agent {
    /// An agent that root and the agent's own user may talk to.
    #[must_use]
    pub fn new(
        grafter: Arc<dyn Grafter>,
        driver: DriverHandle,
        proc_root: ProcRoot,
        docker: Option<DockerSocket>,
        policy: Arc<Policy>,
        (watch, observer): (Arc<Watch>, Arc<Observer>),
        recovery: Recovery,
    ) -> Self {
        Self {
            grafter,
            driver,
            proc_root,
            docker,
            policy,
            watch,
            observer,
            recovery,
            allowed_uids: vec![0, nix::unistd::geteuid().as_raw()],
            readers: Arc::new(Semaphore::new(READERS)),
            started: Instant::now(),
        }
    }

    /// Runs something that reads, off the async threads and within the limit.
    async fn read<T: Send + 'static>(
        &self,
        operation: &str,
        act: impl FnOnce(&Context<'_>, Node) -> Result<T, AgentError> + Send + 'static,
    ) -> Result<T, AgentError> {
        let timeout = || AgentError::Timeout {
            operation: operation.to_owned(),
            seconds: READ_LIMIT.as_secs(),
        };
        let work = async {
            let readers = Arc::clone(&self.readers);
            let permit = readers
                .acquire_owned()
                .await
                .map_err(|_| AgentError::Stopping)?;
            let agent = self.clone();
            let task = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let node = scan_within(&agent.proc_root, SCAN_LIMIT)?;
                let Agent {
                    grafter,
                    proc_root,
                    policy,
                    watch,
                    observer,
                    ..
                } = &agent;
                act(
                    &Context {
                        grafter: &**grafter,
                        clock: &SystemClock,
                        proc_root,
                        policy,
                        watch,
                        observer,
                    },
                    node,
                )
            });
            let failed = |error: tokio::task::JoinError| AgentError::Internal {
                detail: error.to_string(),
            };
            task.await.map_err(failed)?
        };
        tokio::time::timeout(READ_LIMIT, work)
            .await
            .map_err(|_| timeout())?
    }
}

/// Serves until `stop` completes, then lets running requests end.
///
/// # Errors
/// When the listener fails for good.
pub async fn serve(
    listener: UnixListener,
    agent: Agent,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let app = router(agent).into_make_service_with_connect_info::<Peer>();
    axum::serve(listener, app)
        .with_graceful_shutdown(stop)
        .await
}

fn router(agent: Agent) -> Router {
    Router::new()
        .route(HEALTH, get(health))
        .route(PS, get(ps))
        .route(STATUS, get(status))
        .route(EXPLAIN, post(explain))
        .route(PATCH, post(patch))
        .route(REVERT, post(revert))
        .route(UNQUARANTINE, post(unquarantine))
        .route(OBSERVE, post(observe))
        .route(GRAPH, get(graph))
        .route(PLAN, get(plan))
        .route(HISTORY, get(history))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_path)
        .layer(middleware::from_fn_with_state(
            agent.clone(),
            only_allowed_peers,
        ))
        .with_state(agent)
}

async fn only_allowed_peers(
    State(agent): State<Agent>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    match peer.uid {
        Some(uid) if agent.allowed_uids.contains(&uid) => next.run(request).await,
        uid => {
            tracing::warn!(?peer, "denied");
            Failure(AgentError::Denied {
                uid: uid.unwrap_or(u32::MAX),
                pid: peer.pid,
            })
            .into_response()
        }
    }
}

async fn no_such_path(request: Request) -> Failure {
    Failure(AgentError::NoSuchPath {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
    })
}

async fn health(State(agent): State<Agent>) -> Answer<Health> {
    Ok(Json(Health {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: nix::unistd::getpid().as_raw(),
        uptime_s: agent.started.elapsed().as_secs(),
        queued: agent.driver.waiting(),
        missing: missing_capabilities(&agent.proc_root),
        quarantined: agent.watch.quarantine.all(),
        recovering: agent.recovery.running(),
        journal: agent.recovery.journal(&*agent.grafter),
        recovered: agent.recovery.workers(),
    }))
}

async fn ps(State(agent): State<Agent>) -> Answer<Ps> {
    let (containers, note) = match &agent.docker {
        Some(socket) => docker::describe(socket).await,
        None => Default::default(),
    };
    let listed = agent
        .read("ps", move |context, node| {
            Ok(ops::ps(context, node, &containers, note))
        })
        .await?;
    Ok(Json(listed))
}

async fn status(State(agent): State<Agent>) -> Answer<Status> {
    let mut read = agent
        .read("status", |context, node| Ok(ops::status(context, node)))
        .await?;
    read.notes.extend(agent.recovery.complaints());
    Ok(Json(read))
}

async fn explain(State(agent): State<Agent>, request: Request) -> Answer<Explanation> {
    let request: ExplainRequest = body(request).await?;
    let plan = move |context: &Context<'_>, node| ops::explain(context, &node, &request);
    Ok(Json(agent.read("explain", plan).await?))
}

async fn patch(
    State(agent): State<Agent>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Answer<PatchReport> {
    let request: PatchRequest = body(request).await?;
    tracing::info!(?peer, ?request, "asked to patch");
    // The canary's watch, and the others'.
    let limit = WRITE_LIMIT + 2 * ops::canary_wait(request.canary_wait_ms);
    Ok(Json(
        within("patch", limit, agent.driver.patch(request)).await?,
    ))
}

async fn revert(
    State(agent): State<Agent>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Answer<RevertReport> {
    let request: EdgeRequest = body(request).await?;
    tracing::info!(?peer, ?request, "asked to revert");
    Ok(Json(
        within("revert", WRITE_LIMIT, agent.driver.revert(request)).await?,
    ))
}

async fn unquarantine(
    State(agent): State<Agent>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Answer<UnquarantineReport> {
    let request: EdgeRequest = body(request).await?;
    tracing::info!(?peer, ?request, "asked to unquarantine");
    let lift = move |context: &Context<'_>, node| ops::unquarantine(context, &node, &request);
    Ok(Json(agent.read("unquarantine", lift).await?))
}

async fn observe(
    State(agent): State<Agent>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Answer<ObserveReport> {
    let request: ObserveRequest = body(request).await?;
    tracing::info!(?peer, ?request, "asked to observe");
    let done = agent.driver.observe(request);
    Ok(Json(within("observe", WRITE_LIMIT, done).await?))
}

async fn graph(State(agent): State<Agent>) -> Answer<Graph> {
    let read = |context: &Context<'_>, node| Ok(context.observer.graph(context.grafter, &node));
    Ok(Json(agent.read("graph", read).await?))
}

async fn plan(State(agent): State<Agent>) -> Answer<PlanReport> {
    let (containers, note) = match (&agent.docker, &agent.policy.trust.label) {
        (Some(socket), Some(_)) => docker::describe(socket).await,
        _ => Default::default(),
    };
    let mut report = agent
        .read("plan", move |context, node| {
            planning::report(context, &node, &containers)
        })
        .await?;
    report.notes.extend(note);
    Ok(Json(report))
}

/// Steps of the history in one answer: a month of them.
const MAX_STEPS: usize = 20_000;

async fn history(State(agent): State<Agent>, request: Request) -> Answer<History> {
    let bad = |detail: String| AgentError::BadRequest { detail };
    let since_s = match request.uri().query() {
        None | Some("") => 0,
        Some(query) => query
            .strip_prefix("since=")
            .and_then(|seconds| seconds.parse::<u64>().ok())
            .ok_or_else(|| {
                bad(format!(
                    "?since=SECONDS (since 1970) is wanted, not ?{query}"
                ))
            })?,
    };
    let since_ms = since_s.saturating_mul(1000);
    let observer = Arc::clone(&agent.observer);
    let read = tokio::task::spawn_blocking(move || observer.history(since_ms, MAX_STEPS));
    let read = tokio::time::timeout(READ_LIMIT, read).await;
    let read = read.map_err(|_| AgentError::Timeout {
        operation: "history".to_owned(),
        seconds: READ_LIMIT.as_secs(),
    })?;
    let failed = |error: tokio::task::JoinError| AgentError::Internal {
        detail: error.to_string(),
    };
    Ok(Json(read.map_err(failed)?))
}

async fn within<T>(
    operation: &str,
    limit: Duration,
    work: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, AgentError> {
    let timeout = || AgentError::Timeout {
        operation: operation.to_owned(),
        seconds: limit.as_secs(),
    };
    tokio::time::timeout(limit, work)
        .await
        .map_err(|_| timeout())?
}

/// Reads a JSON body, whatever content type it came with: `curl -d` sends
/// another.
async fn body<T: DeserializeOwned>(request: Request) -> Result<T, AgentError> {
    let bad = |detail: String| AgentError::BadRequest { detail };
    let bytes = tokio::time::timeout(BODY_LIMIT, to_bytes(request.into_body(), MAX_BODY))
        .await
        .map_err(|_| bad(format!("the body did not arrive within {BODY_LIMIT:?}")))?
        .map_err(|_| {
            bad(format!(
                "the body is cut off or larger than {MAX_BODY} bytes"
            ))
        })?;
    serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))
}

/// A JSON answer.
struct Json<T>(T);

type Answer<T> = Result<Json<T>, Failure>;

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        json(StatusCode::OK, &self.0)
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(mut bytes) => {
            // For the eyes of who asked with curl.
            bytes.push(b'\n');
            (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "an answer does not serialise");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// An error on its way out.
struct Failure(AgentError);

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = http_status(&self.0);
        let report = match &self.0 {
            AgentError::CanaryFailed { report, .. }
            | AgentError::PatchIncomplete { report, .. } => serde_json::to_value(report).ok(),
            AgentError::RevertIncomplete { report, .. } => serde_json::to_value(report).ok(),
            _ => None,
        };
        json(
            status,
            &ErrorBody {
                error: self.0.info(),
                report,
            },
        )
    }
}

fn http_status(error: &AgentError) -> StatusCode {
    match error {
        AgentError::BadRequest { .. } => StatusCode::BAD_REQUEST,
        AgentError::UnknownFunction { .. } | AgentError::NoSuchPath { .. } => StatusCode::NOT_FOUND,
        AgentError::Denied { .. }
        | AgentError::Graft(GraftError::MissingCapability { .. } | GraftError::TracingForbidden) => {
            StatusCode::FORBIDDEN
        }
        AgentError::AmbiguousFunction { .. }
        | AgentError::Recursive { .. }
        | AgentError::NoWorkers { .. }
        | AgentError::NotNative { .. }
        | AgentError::Quarantined(_)
        | AgentError::Graft(
            GraftError::Refused(_)
            | GraftError::TracedBy { .. }
            | GraftError::WorkerGone { .. }
            | GraftError::Claimed { .. },
        )
        | AgentError::CanaryFailed { .. } => StatusCode::CONFLICT,
        AgentError::Busy { .. } | AgentError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        AgentError::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        AgentError::Graft(GraftError::Failed(_))
        | AgentError::PatchIncomplete { .. }
        | AgentError::RevertIncomplete { .. }
        | AgentError::Discovery { .. }
        | AgentError::NotKept { .. }
        | AgentError::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests;
