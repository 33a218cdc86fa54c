//! The fixtures: folders of `tests/fixtures`, each with a caller, a callee or
//! both, and whatever sources these need.
//!
//! A folder's main source (`callee.*`, or `caller.*` where the role says so)
//! carries the directives. `shared/` has the halves that others borrow, and
//! the headers lie above.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::directives::{Directives, Role};

/// The folder of the borrowed halves.
const SHARED: &str = "shared";
/// Endings that a source may have.
const ENDINGS: [&str; 3] = ["c", "cc", "rs"];

/// One fixture.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// Its folder's name.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// What it says about itself.
    pub directives: Directives,
    /// The caller's source.
    pub caller: PathBuf,
    /// The callee's source.
    pub callee: PathBuf,
}

impl Fixture {
    /// Reads the fixture in a folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let name = dir
            .file_name()
            .and_then(|n| n.to_str())
            .context("a folder without a name")?
            .to_owned();
        let caller = source(dir, "caller");
        let callee = source(dir, "callee");
        // A pair says it in the callee.
        let main = callee
            .as_ref()
            .or(caller.as_ref())
            .with_context(|| format!("{name} has neither caller.* nor callee.*"))?;
        let directives = Directives::parse(main, &fs::read_to_string(main)?)?;
        let shared = dir.with_file_name(SHARED);
        let (caller, callee) = match (directives.role, caller, callee) {
            (Role::Callee, None, Some(callee)) => (shared.join("caller.c"), callee),
            (Role::Caller, Some(caller), None) => (caller, shared.join("callee.c")),
            (Role::Pair, Some(caller), Some(callee)) => (caller, callee),
            (role, ..) => bail!("{name} has not the sources of a {role:?}"),
        };
        Ok(Self {
            name,
            dir: dir.to_owned(),
            directives,
            caller,
            callee,
        })
    }

    /// Every fixture of a folder of fixtures, by name.
    pub fn all(root: &Path) -> Result<Vec<Self>> {
        let mut dirs: Vec<_> = fs::read_dir(root)
            .with_context(|| root.display().to_string())?
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir() && !path.ends_with(SHARED))
            .collect();
        dirs.sort();
        let all: Vec<_> = dirs.iter().map(|d| Self::read(d)).collect::<Result<_>>()?;
        ensure!(!all.is_empty(), "{} has no fixtures", root.display());
        Ok(all)
    }
}

fn source(dir: &Path, stem: &str) -> Option<PathBuf> {
    ENDINGS
        .iter()
        .map(|ending| dir.join(format!("{stem}.{ending}")))
        .find(|path| path.is_file())
}
