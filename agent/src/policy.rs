//! What edges are allowed and how they are fused, from the agent's configuration
//! file.
//!
//! ```toml
//! [[edge]]
//! caller = "Foo"
//! callee = "*"                        # any function
//! allow-effects = ["files", "network"]
//! guard = true                        # as `patch --guard`, every time
//! fuse = "never"                      # what plans may do with it: never, may, must
//!
//! [trust]
//! label = "com.example.tenant"        # only functions of one value are planned for
//!
//! [limits]
//! memory-share = 0.5                  # of what a worker's limit leaves, for grafts
//!
//! [planner]                           # see docs/planner.md
//! horizon-s = 600
//! ```
//!
//! Names are compared as they are, case and all: functions may differ in
//! nothing else. All edges that fit add up, and nothing takes away what another
//! gives; of what they say of plans, `never` counts before `must`. The file is read once, when the agent starts; what is not understood
//! in it is an error, as a word that was meant to allow or forbid something must
//! not be passed over.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, de::Error as _};

use nightgraft_planner::Settings;

use crate::grafter::Allowance;

/// Stands for every function.
const ANY: &str = "*";

/// What edges are allowed, and whether they are guarded; nothing by default.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    #[serde(default)]
    edge: Vec<Edge>,
    /// Who trusts whom.
    #[serde(default)]
    pub trust: Trust,
    /// How much grafts may take.
    #[serde(default)]
    pub limits: Limits,
    /// The planner's settings.
    #[serde(default)]
    pub planner: Settings,
}

/// Which functions trust each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// The container label whose value names a function's trust domain; without
    /// it all functions of an engine are one.
    pub label: Option<String>,
}

/// How much grafts may take.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Limits {
    /// Share of the memory that a container's limit leaves, for the grafts in all
    /// of its workers; 0 to 1.
    pub memory_share: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory_share: 0.5 }
    }
}

/// What plans may do with an edge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fuse {
    /// Leave it an RPC.
    Never,
    /// Fuse it where that is worth it.
    #[default]
    May,
    /// Fuse it, whatever it saves.
    Must,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Edge {
    #[serde(deserialize_with = "name")]
    caller: String,
    #[serde(deserialize_with = "name")]
    callee: String,
    #[serde(default, deserialize_with = "allowance")]
    allow_effects: Allowance,
    #[serde(default)]
    guard: bool,
    #[serde(default)]
    fuse: Fuse,
}

impl Edge {
    fn fits(&self, caller: &str, callee: &str) -> bool {
        let fits = |pattern: &str, name: &str| pattern == ANY || pattern == name;
        fits(&self.caller, caller) && fits(&self.callee, callee)
    }
}

fn name<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let name = String::deserialize(input)?;
    if name.is_empty() || name != ANY && name.contains('*') {
        return Err(D::Error::custom(
            "a function's name, or \"*\" for every function, is wanted",
        ));
    }
    Ok(name)
}

fn allowance<'de, D: Deserializer<'de>>(input: D) -> Result<Allowance, D::Error> {
    let words = Vec::<String>::deserialize(input)?;
    Allowance::of(words.iter().map(String::as_str)).map_err(D::Error::custom)
}

/// Why a configuration file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It can't be read.
    #[error("can't read the configuration {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not as it should be.
    #[error("the configuration {} is wrong: {source}", .path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What, with line and column.
        source: Box<toml::de::Error>,
    },
    /// A number in it makes no sense.
    #[error("the configuration {} is wrong: {what}", .path.display())]
    Number {
        /// The file.
        path: PathBuf,
        /// Which, and what is wanted.
        what: String,
    },
}

impl Policy {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// It can't be read, or not understood: then with the line.
    pub fn read(path: &Path) -> Result<Policy, PolicyError> {
        let path = || path.to_owned();
        let text = std::fs::read_to_string(path()).map_err(|source| PolicyError::Read {
            path: path(),
            source,
        })?;
        let policy = Policy::parse(&text).map_err(|source| PolicyError::Wrong {
            path: path(),
            source: Box::new(source),
        })?;
        match policy.check() {
            Ok(()) => Ok(policy),
            Err(what) => Err(PolicyError::Number { path: path(), what }),
        }
    }

    fn check(&self) -> Result<(), String> {
        let settings = self.planner.check();
        settings.map_err(|wrong| format!("[planner] {wrong}"))?;
        let share = self.limits.memory_share;
        if !(0.0..=1.0).contains(&share) {
            return Err(format!(
                "[limits] memory-share is {share}: a number from 0 to 1 is wanted"
            ));
        }
        Ok(())
    }

    /// What the text of a configuration file says.
    pub(crate) fn parse(text: &str) -> Result<Policy, toml::de::Error> {
        toml::from_str(text)
    }

    /// What an edge is allowed.
    #[must_use]
    pub fn allowed(&self, caller: &str, callee: &str) -> Allowance {
        self.edge
            .iter()
            .filter(|edge| edge.fits(caller, callee))
            .fold(Allowance::NONE, |all, edge| all.and(edge.allow_effects))
    }

    /// What plans may do with an edge.
    #[must_use]
    pub fn fuse(&self, caller: &str, callee: &str) -> Fuse {
        let fitting = self.edge.iter().filter(|edge| edge.fits(caller, callee));
        let all: Vec<Fuse> = fitting.map(|edge| edge.fuse).collect();
        match () {
            () if all.contains(&Fuse::Never) => Fuse::Never,
            () if all.contains(&Fuse::Must) => Fuse::Must,
            () => Fuse::May,
        }
    }

    /// Whether an edge's calls are guarded although a patch does not ask for it.
    #[must_use]
    pub fn guards(&self, caller: &str, callee: &str) -> bool {
        let mut edges = self.edge.iter();
        edges.any(|edge| edge.guard && edge.fits(caller, callee))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Policy, PolicyError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        Policy::read(&path)
    }

    fn wrong(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn edges_that_fit_add_up() {
        let policy = read(
            r#"
            [[edge]]
            caller = "Foo"
            callee = "Bar"
            allow-effects = ["files"]
            [[edge]]
            caller = "*"
            callee = "Bar"
            allow-effects = ["network"]
            [[edge]]
            caller = "Admin"
            callee = "*"
            allow-effects = ["all"]
            "#,
        )
        .unwrap();
        let allowed = |caller: &str, callee: &str| policy.allowed(caller, callee).to_string();
        assert_eq!(allowed("Foo", "Bar"), "files,network");
        assert_eq!(allowed("Foo", "bar"), "");
        assert_eq!(allowed("foo", "Bar"), "network");
        assert_eq!(allowed("Foo", "Baz"), "");
        assert_eq!(allowed("Admin", "Baz"), "files,network,credentials");
    }

    #[test]
    fn edges_are_guarded_that_one_of_them_guards() {
        let policy = read(
            r#"
            [[edge]]
            caller = "*"
            callee = "Bar"
            guard = true
            [[edge]]
            caller = "Foo"
            callee = "*"
            guard = false
            "#,
        )
        .unwrap();
        assert!(policy.guards("Foo", "Bar") && policy.guards("Qux", "Bar"));
        assert!(!policy.guards("Foo", "bar") && !policy.guards("Foo", "Baz"));
        assert_eq!(policy.allowed("Foo", "Bar"), Allowance::NONE);
        let text = wrong("[[edge]]\ncaller = \"Foo\"\ncallee = \"Bar\"\nguard = \"yes\"\n");
        assert!(
            text.contains("line 4") && text.contains("boolean"),
            "{text}"
        );
    }

    #[test]
    fn never_counts_before_must_and_must_before_may() {
        let policy = read(
            r#"
            [[edge]]
            caller = "Foo"
            callee = "*"
            fuse = "must"
            [[edge]]
            caller = "*"
            callee = "Bar"
            fuse = "never"
            [[edge]]
            caller = "Foo"
            callee = "Baz"
            "#,
        )
        .unwrap();
        assert_eq!(policy.fuse("Foo", "Bar"), Fuse::Never);
        assert_eq!(policy.fuse("Foo", "Baz"), Fuse::Must);
        assert_eq!(policy.fuse("Qux", "Baz"), Fuse::May);
        let text = wrong("[[edge]]\ncaller = \"Foo\"\ncallee = \"Bar\"\nfuse = \"no\"\n");
        assert!(text.contains("line 4") && text.contains("never"), "{text}");
    }

    #[test]
    fn numbers_that_make_no_sense_are_told() {
        let policy = read("[planner]\nhorizon-s = 60\n[limits]\nmemory-share = 0.1\n").unwrap();
        assert_eq!((policy.planner.horizon_s, policy.planner.depth), (60.0, 4));
        assert_eq!(policy.limits.memory_share, 0.1);
        let text = wrong("[planner]\nhysteresis = 0.5\n");
        assert!(
            text.ends_with("[planner] hysteresis is 0.5: a number of at least 1 is wanted"),
            "{text}"
        );
        let text = wrong("[limits]\nmemory-share = 2\n");
        assert!(
            text.ends_with("memory-share is 2: a number from 0 to 1 is wanted"),
            "{text}"
        );
        assert!(wrong("[planner]\nhorizon = 60\n").contains("line 2"));
        let policy = read("[trust]\nlabel = \"tenant\"\n").unwrap();
        assert_eq!(policy.trust.label.as_deref(), Some("tenant"));
    }

    #[test]
    fn an_empty_file_allows_nothing() {
        assert_eq!(read("# nothing\n").unwrap(), Policy::default());
        assert_eq!(Policy::default().allowed("Foo", "Bar"), Allowance::NONE);
        assert!(!Policy::default().guards("Foo", "Bar"));
    }

    #[test]
    fn what_is_not_understood_is_told_with_its_line() {
        let edge = "[[edge]]\ncaller = \"Foo\"\ncallee = \"Bar\"\n";
        let text = wrong(&format!("{edge}allow-effects = [\"files\", \"tea\"]\n"));
        assert!(
            text.contains("line 4") && text.contains("\"tea\""),
            "{text}"
        );
        assert!(
            text.contains("known are files, network, credentials and all"),
            "{text}"
        );
        let text = wrong(&format!("{edge}allow_effects = [\"files\"]\n"));
        assert!(
            text.contains("line 4") && text.contains("unknown field"),
            "{text}"
        );
        let text = wrong("[[edge]]\ncaller = \"Foo\"\n");
        assert!(text.contains("missing field `callee`"), "{text}");
        let text = wrong("[[edge]]\ncaller = \"Fo*\"\ncallee = \"Bar\"\n");
        assert!(text.contains("line 2") && text.contains("\"*\""), "{text}");
        let text = wrong("[[edges]]\n");
        assert!(text.contains("line 1"), "{text}");
        assert!(wrong("caller").contains("line 1"));
    }

    #[test]
    fn a_file_that_is_not_there_is_told() {
        let error = Policy::read(Path::new("/nowhere/agent.toml")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "can't read the configuration /nowhere/agent.toml"
        );
    }

    #[test]
    fn the_example_that_is_shipped_is_understood() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/agent.toml");
        let policy = Policy::read(Path::new(path)).unwrap();
        assert_eq!(policy.allowed("Foo", "Bar").to_string(), "files");
        assert!(policy.guards("Foo", "Bar"));
    }
}
