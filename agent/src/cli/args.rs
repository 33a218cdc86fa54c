//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

use super::format::{interval, parse_duration};
use nightgraft_patcher::effects::{Allowance, UnknownEffect};

use crate::api::{DEFAULT_SOCKET, EdgeRequest, ObserveRequest};

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or there was nothing to do
  1  refused or failed; the reason is on stderr (with --json on stdout)
  2  the command line can't be understood
  3  no agent answers on the socket";

/// Fuses serverless functions while they run: a caller's RPCs to a callee
/// become calls within the caller's workers, and RPCs again at will.
#[derive(Debug, Parser)]
#[command(name = "agentctl", version, after_help = EXIT_CODES)]
pub struct Args {
    /// The agent's socket
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "NIGHTGRAFT_SOCKET",
        default_value = DEFAULT_SOCKET
    )]
    pub socket: PathBuf,

    /// Print one line of JSON, as the agent's API gives it
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List functions and workers, and what is fused in them
    #[command(after_help = EXIT_CODES)]
    Ps,
    /// Show what is fused: calls, errors, latencies
    #[command(after_help = EXIT_CODES)]
    Status,
    /// Show what patch would do, without touching anything
    #[command(after_help = EXIT_CODES)]
    Explain {
        /// The edge.
        #[command(flatten)]
        edge: EdgeArgs,
        /// What patch --guard would do
        #[arg(long)]
        guard: bool,
    },
    /// Fuse a callee into all workers of a caller
    ///
    /// One worker is patched and watched first; if it does not prove well it is
    /// reverted and the others are left alone.
    #[command(after_help = EXIT_CODES)]
    Patch {
        /// The edge.
        #[command(flatten)]
        edge: EdgeArgs,
        /// How long to watch a patched worker for its callee to get ready and
        /// its fused calls to count, such as 500ms or 2s (at most 60s; 0: not at all)
        #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
        canary_wait: Duration,
        /// What the callee may use of the caller's container, with commas
        /// between: files, network, credentials, or all
        ///
        /// Fused, a callee that opens files or connections, or acts by its user,
        /// does so in the caller's container: `explain` shows which of these it
        /// can. Without this, or the agent's configuration for the edge, such a
        /// patch is refused.
        #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = effect)]
        allow_effects: Vec<String>,
        /// Keep the caller's workers alive should the callee's own code crash
        ///
        /// A SIGSEGV, SIGBUS, SIGFPE or SIGILL that it raises, running out of
        /// stack included, becomes -1 for that call; the edge is quarantined and
        /// the worker lives on. Not where a shared library's code is in between
        /// or crashes itself, on threads of the callee's own, or in its
        /// initialisers: there it dies as without this. Refused (no-guard) for a
        /// callee that changes signals itself. Without it, and without a guard
        /// for the edge in the agent's configuration, a guarded edge's calls are
        /// guarded no more.
        #[arg(long)]
        guard: bool,
    },
    /// Turn a fused callee back into an RPC, in all workers of a caller
    #[command(after_help = EXIT_CODES)]
    Revert(EdgeArgs),
    /// Let an edge be fused again whose callee ran when a worker died, or that
    /// crashed in a guarded call
    ///
    /// The agent quarantines such an edge: its gates go off in all workers, and
    /// patch refuses it. This lifts that and fuses nothing.
    #[command(after_help = EXIT_CODES)]
    Unquarantine(EdgeArgs),
    /// Count the RPCs of functions where they are made, or stop that
    ///
    /// The workers go on as they are; what is counted is shown by `graph`.
    #[command(after_help = EXIT_CODES)]
    Observe(ObserveArgs),
    /// Show what the observed functions call: how often, and how long it takes
    #[command(after_help = EXIT_CODES)]
    Graph(GraphArgs),
    /// Show what is worth fusing, with the figures behind it, and change nothing
    ///
    /// By the calls of the last seconds: what would be saved (RPC overhead), what
    /// it would cost (on this node, and in memory), and what the configuration,
    /// the patcher and effects forbid. Only what is observed can be planned for.
    #[command(after_help = EXIT_CODES)]
    Plan,
    /// Show how the agent is, and what it lacks
    #[command(after_help = EXIT_CODES)]
    Health,
}

/// A word for `--allow-effects`.
fn effect(word: &str) -> Result<String, UnknownEffect> {
    word.parse::<Allowance>().map(|_| word.to_owned())
}

/// Names an edge.
#[derive(Debug, clap::Args)]
pub struct EdgeArgs {
    /// The function that invokes (case does not matter)
    pub caller: String,
    /// The function that is invoked (case does not matter)
    pub callee: String,
    /// Pid of the engine, where several engines have functions of these names
    #[arg(long, value_name = "PID")]
    pub engine: Option<i32>,
}

impl From<&EdgeArgs> for EdgeRequest {
    fn from(edge: &EdgeArgs) -> Self {
        Self {
            caller: edge.caller.clone(),
            callee: edge.callee.clone(),
            engine: edge.engine,
        }
    }
}

impl Args {
    /// What was typed and can not be had together. `--json` may stand before the
    /// command, where clap does not see it next to the command's own flags.
    pub(super) fn conflict(&self) -> Option<clap::Error> {
        let Command::Graph(graph) = &self.command else {
            return None;
        };
        let form = graph.form().filter(|_| self.json)?;
        let text = format!("the argument '--json' cannot be used with '{form}'");
        Some(Self::command().error(ErrorKind::ArgumentConflict, text))
    }
}

/// Whose calls are to be counted, or not any more.
#[derive(Debug, clap::Args)]
pub struct ObserveArgs {
    /// Begin, or end
    pub switch: Switch,
    /// The functions (case does not matter); none for all
    #[arg(value_name = "FUNCTION")]
    pub functions: Vec<String>,
    /// Pid of the engine, where several engines have functions of these names
    #[arg(long, value_name = "PID")]
    pub engine: Option<i32>,
}

/// Begin, or end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Count from now on
    On,
    /// Give the workers their own code back
    Off,
}

impl From<&ObserveArgs> for ObserveRequest {
    fn from(args: &ObserveArgs) -> Self {
        Self {
            on: args.switch == Switch::On,
            functions: args.functions.clone(),
            engine: args.engine,
        }
    }
}

/// How the graph is to be shown: as tables, unless told otherwise.
#[derive(Debug, Default, clap::Args)]
pub struct GraphArgs {
    /// Show the places in the callers' code, too
    #[arg(long, conflicts_with_all = ["dot", "html"])]
    pub sites: bool,
    /// Print it for Graphviz, as in `agentctl graph --dot | dot -Tsvg`
    #[arg(long, group = "form")]
    pub dot: bool,
    /// Write a page for the browser that shows the graph over time, and needs
    /// nothing but itself
    #[arg(long, value_name = "FILE", group = "form")]
    pub html: Option<PathBuf>,
    /// Show it again and again, every second unless told otherwise, until
    /// interrupted
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "1",
        value_parser = interval,
        group = "form"
    )]
    pub watch: Option<Duration>,
}

impl GraphArgs {
    /// The flag that asks for something else than tables.
    fn form(&self) -> Option<&'static str> {
        match (self.dot, &self.html, self.watch) {
            (true, ..) => Some("--dot"),
            (_, Some(_), _) => Some("--html <FILE>"),
            (.., Some(_)) => Some("--watch [<SECONDS>]"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_may_stand_on_either_side_of_the_command() {
        let args = Args::parse_from([
            "agentctl", "patch", "Foo", "Bar", "--json", "--socket", "/s",
        ]);
        assert!(args.json);
        assert_eq!(args.socket, PathBuf::from("/s"));
        let Command::Patch {
            edge,
            canary_wait,
            allow_effects,
            guard,
        } = args.command
        else {
            panic!("not a patch")
        };
        assert_eq!((edge.caller.as_str(), edge.callee.as_str()), ("Foo", "Bar"));
        assert_eq!(canary_wait, Duration::from_secs(2));
        assert!(allow_effects.is_empty());
        assert!(!guard);
    }

    #[test]
    fn effects_are_words_with_commas_and_unknown_ones_are_told() {
        let patch = |kinds: &str| {
            Args::try_parse_from(["agentctl", "patch", "Foo", "Bar", "--allow-effects", kinds])
        };
        let Command::Patch { allow_effects, .. } = patch("files,network").unwrap().command else {
            panic!("not a patch")
        };
        assert_eq!(allow_effects, ["files", "network"]);
        let error = patch("files,tea").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("\"tea\" is no effect that can be allowed: known are files, network, credentials and all"), "{error}");
    }

    #[test]
    fn observe_takes_a_switch_and_functions() {
        let request = |line: &str| {
            let args = Args::try_parse_from(line.split(' ')).map_err(|error| error.exit_code())?;
            let Command::Observe(observe) = args.command else {
                panic!("does not observe")
            };
            Ok::<_, i32>(ObserveRequest::from(&observe))
        };
        assert_eq!(
            request("agentctl observe on Foo Bar --engine 7"),
            Ok(ObserveRequest {
                on: true,
                functions: vec!["Foo".to_owned(), "Bar".to_owned()],
                engine: Some(7),
            })
        );
        assert_eq!(
            request("agentctl observe off"),
            Ok(ObserveRequest {
                on: false,
                functions: vec![],
                engine: None,
            })
        );
        assert_eq!(request("agentctl observe"), Err(2));
        assert_eq!(request("agentctl observe maybe"), Err(2));
    }

    #[test]
    fn the_graph_is_watched_every_second_unless_told_otherwise() {
        let every = |line: &str| {
            let args = Args::try_parse_from(line.split(' ')).map_err(|error| error.exit_code())?;
            let Command::Graph(graph) = args.command else {
                panic!("no graph")
            };
            Ok::<_, i32>(graph.watch.map(|every| every.as_millis()))
        };
        assert_eq!(every("agentctl graph"), Ok(None));
        assert_eq!(every("agentctl graph --watch"), Ok(Some(1_000)));
        assert_eq!(every("agentctl graph --watch --sites"), Ok(Some(1_000)));
        assert_eq!(every("agentctl graph --watch 0.5"), Ok(Some(500)));
        assert_eq!(every("agentctl graph --watch 0"), Err(2));
        assert_eq!(every("agentctl graph --watch soon"), Err(2));
    }

    #[test]
    fn a_graph_has_one_form() {
        let exit = |line: &str| {
            let parsed = Args::try_parse_from(line.split(' '));
            match parsed.map(|args| args.conflict()) {
                Ok(None) => 0,
                Ok(Some(error)) | Err(error) => error.exit_code(),
            }
        };
        for line in ["--dot", "--html f", "--watch", "--json", "--sites --json"] {
            assert_eq!(exit(&format!("agentctl graph {line}")), 0, "{line}");
        }
        for line in [
            "--dot --html f",
            "--dot --watch",
            "--html f --watch 2",
            "--dot --json",
            "--html f --json",
            "--watch --json",
            "--sites --dot",
            "--sites --html f",
        ] {
            assert_eq!(exit(&format!("agentctl graph {line}")), 2, "{line}");
        }
        assert_eq!(exit("agentctl --json graph --dot"), 2);
    }
}
