//! `agentctl`: what was typed → one request → text or JSON, and an exit code.
//!
//! The binary only calls [`run`], so that tests can too.

mod args;
mod dot;
mod format;
mod graph;
#[cfg(test)]
mod graph_tests;
mod page;
mod plan;
mod render;
#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;
mod watch;

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

pub use args::{Args, Command, GraphArgs, ObserveArgs, Switch};
pub use watch::Screen;

use crate::api::{
    self, EdgeRequest, ErrorBody, ErrorInfo, ExplainRequest, Explanation, Graph, Health, History,
    ObserveReport, ObserveRequest, PatchReport, PatchRequest, PlanReport, Ps, RevertReport, Status,
    UnquarantineReport,
};
use crate::client::{Client, ClientError};

/// How long a request that only reads may take: more than the agent's own
/// limit, so that its answer is the one that is seen.
const READ_LIMIT: Duration = Duration::from_secs(35);
/// The same for requests that change workers, besides what others have queued.
const WRITE_LIMIT: Duration = Duration::from_secs(150);

/// What `agentctl` exits with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, or there was nothing to do.
    Done = 0,
    /// Refused or failed.
    Refused = 1,
    /// The command line can't be understood.
    Usage = 2,
    /// No agent answers.
    NoAgent = 3,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What a command answers, for people and for programs.
#[derive(Default)]
struct Output {
    text: String,
    json: serde_json::Value,
    /// What could not be done, although the rest was: then the exit code is
    /// [`Exit::Refused`].
    failures: Vec<ErrorInfo>,
}

impl Output {
    fn new<T: Serialize>(value: &T, text: String) -> Result<Self, ClientError> {
        let json = serde_json::to_value(value).map_err(|error| unserialised(&error))?;
        Ok(Self {
            text,
            json,
            failures: Vec::new(),
        })
    }

    fn exit(&self) -> Exit {
        if self.failures.is_empty() {
            Exit::Done
        } else {
            Exit::Refused
        }
    }
}

/// Runs one command, writes its answer to `out` and what is wrong to `err`
/// (with `--json` both go to `out`). `screen` says what `out` is.
pub async fn run(
    args: &Args,
    screen: impl Fn() -> Screen,
    out: &mut impl Write,
    err: &mut impl Write,
) -> Exit {
    if let Some(error) = args.conflict() {
        let _ = write!(err, "{}", error.render());
        return Exit::Usage;
    }
    let client = Client::new(&args.socket);
    let answer = match &args.command {
        Command::Graph(GraphArgs {
            watch: Some(every),
            sites,
            ..
        }) => {
            let watched = watch::watch(&client, *sites, *every, screen, out).await;
            watched.map(|()| Output::default())
        }
        _ => ask(&client, args).await,
    };
    // A reader that has gone (`| head`) is no failure of the command's.
    match answer {
        Ok(output) if args.json => {
            let _ = writeln!(out, "{}", output.json);
            output.exit()
        }
        Ok(output) => {
            let _ = out.write_all(output.text.as_bytes());
            let _ = out.flush();
            for failure in &output.failures {
                let _ = err.write_all(render::error(failure).as_bytes());
            }
            output.exit()
        }
        Err(error) => {
            let exit = match error {
                ClientError::NoAgent { .. } => Exit::NoAgent,
                _ => Exit::Refused,
            };
            let body = error_body(error, args);
            let _ = if args.json {
                write_json(out, &body)
            } else {
                write_error(out, err, &body)
            };
            exit
        }
    }
}

async fn ask(client: &Client, args: &Args) -> Result<Output, ClientError> {
    match &args.command {
        Command::Ps => {
            let ps: Ps = client.get(api::PS, READ_LIMIT).await?;
            Output::new(&ps, render::ps(&ps))
        }
        Command::Status => {
            let status: Status = client.get(api::STATUS, READ_LIMIT).await?;
            Output::new(&status, render::status(&status))
        }
        Command::Health => {
            let health: Health = client.get(api::HEALTH, READ_LIMIT).await?;
            Output::new(&health, render::health(&health))
        }
        Command::Explain { edge, guard } => {
            let EdgeRequest {
                caller,
                callee,
                engine,
            } = EdgeRequest::from(edge);
            let request = ExplainRequest {
                caller,
                callee,
                engine,
                guard: *guard,
            };
            let plan: Explanation = client.post(api::EXPLAIN, &request, READ_LIMIT).await?;
            Output::new(&plan, render::explanation(&plan))
        }
        Command::Patch {
            edge,
            canary_wait,
            allow_effects,
            guard,
        } => {
            let EdgeRequest {
                caller,
                callee,
                engine,
            } = EdgeRequest::from(edge);
            let canary_wait_ms =
                u64::try_from(canary_wait.as_millis()).unwrap_or(api::MAX_CANARY_WAIT_MS);
            let request = PatchRequest {
                caller,
                callee,
                engine,
                canary_wait_ms,
                allow_effects: allow_effects.clone(),
                guard: *guard,
            };
            let limit = WRITE_LIMIT + 2 * *canary_wait;
            let report: PatchReport = client.post(api::PATCH, &request, limit).await?;
            Output::new(&report, render::patched(&report))
        }
        Command::Revert(edge) => {
            let request = EdgeRequest::from(edge);
            let report: RevertReport = client.post(api::REVERT, &request, WRITE_LIMIT).await?;
            Output::new(&report, render::reverted(&report))
        }
        Command::Unquarantine(edge) => {
            let request = EdgeRequest::from(edge);
            let report: UnquarantineReport =
                client.post(api::UNQUARANTINE, &request, READ_LIMIT).await?;
            Output::new(&report, render::unquarantined(&report))
        }
        Command::Observe(observe) => {
            let request = ObserveRequest::from(observe);
            let report: ObserveReport = client.post(api::OBSERVE, &request, WRITE_LIMIT).await?;
            let output = Output::new(&report, graph::observed(&report))?;
            Ok(Output {
                failures: graph::failures(&report),
                ..output
            })
        }
        Command::Graph(form) => show(client, form).await,
        Command::Plan => {
            let report: PlanReport = client.get(api::PLAN, READ_LIMIT).await?;
            Output::new(&report, plan::plan(&report))
        }
    }
}

/// The graph, once.
async fn show(client: &Client, form: &GraphArgs) -> Result<Output, ClientError> {
    let now: Graph = client.get(api::GRAPH, READ_LIMIT).await?;
    if let Some(file) = &form.html {
        let history: History = client.get(api::HISTORY, READ_LIMIT).await?;
        let page = page::page(&now, &history).map_err(|error| unserialised(&error))?;
        return Ok(written(file, page::write(file, &page), history.steps.len()));
    }
    let text = if form.dot {
        dot::dot(&now)
    } else {
        graph::graph(&now, form.sites)
    };
    Output::new(&now, text)
}

fn written(file: &Path, written: io::Result<()>, steps: usize) -> Output {
    let file = format::clean(&file.display().to_string());
    match written {
        Ok(()) => Output {
            text: format!(
                "wrote {file}, with {} of history\n",
                render::plural(steps, "step")
            ),
            ..Output::default()
        },
        Err(error) => Output {
            failures: vec![ErrorInfo {
                code: "not-written".to_owned(),
                message: format!("can't write {file}: {error}"),
                hint: None,
            }],
            ..Output::default()
        },
    }
}

fn unserialised(error: &serde_json::Error) -> ClientError {
    ClientError::Answer(Box::new(ErrorBody {
        error: ErrorInfo {
            code: "internal".to_owned(),
            message: format!("the answer does not serialise: {error}"),
            hint: None,
        },
        report: None,
    }))
}

fn error_body(error: ClientError, args: &Args) -> ErrorBody {
    let message = error.to_string();
    let (code, hint) = match error {
        ClientError::Answer(body) => return *body,
        ClientError::NoAgent { .. } => (
            "no-agent",
            format!(
                "start one as root: agent --socket {}   (in a container: --pid=host --cap-add \
                 SYS_PTRACE, and share the socket's directory)",
                args.socket.display()
            ),
        ),
        ClientError::NotAllowed { .. } => ("denied", "use agentctl as root".to_owned()),
        ClientError::Broken { .. } => (
            "no-answer",
            "see the agent's log; is it an agent of this version that listens there?".to_owned(),
        ),
        ClientError::Timeout { .. } => (
            "timeout",
            "what was begun goes on: see `agentctl status`".to_owned(),
        ),
    };
    let error = ErrorInfo {
        code: code.to_owned(),
        message,
        hint: Some(hint),
    };
    ErrorBody {
        error,
        report: None,
    }
}

fn write_json(out: &mut impl Write, body: &ErrorBody) -> io::Result<()> {
    let text = serde_json::to_string(body).map_err(io::Error::other)?;
    writeln!(out, "{text}")
}

/// The report of what was done all the same goes where it would have gone.
fn write_error(out: &mut impl Write, err: &mut impl Write, body: &ErrorBody) -> io::Result<()> {
    if let Some(report) = &body.report {
        let text = serde_json::from_value::<PatchReport>(report.clone())
            .map(|report| render::patched(&report))
            .or_else(|_| {
                serde_json::from_value::<RevertReport>(report.clone())
                    .map(|report| render::reverted(&report))
            });
        out.write_all(text.unwrap_or_default().as_bytes())?;
        out.flush()?;
    }
    err.write_all(render::error(&body.error).as_bytes())
}
