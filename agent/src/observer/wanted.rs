//! Which functions are to be observed: what was asked for last, kept over the
//! agent's end.
//!
//! ```text
//!  on, all ─► off, Foo ─► on, Foo of engine 7        the last word that fits counts
//! ```
//!
//! Functions go by their names: an engine that is started again has another pid.
//! Who names an engine means that one.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// The file's name in the agent's directory.
const NAME: &str = "observe.json";

/// What is asked for, and the file that it is kept in.
#[derive(Debug, Default)]
pub struct Wanted {
    file: Option<PathBuf>,
    rules: Mutex<Vec<Rule>>,
}

/// One thing that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Whether to observe.
    pub on: bool,
    /// Which function; `None` for all.
    pub function: Option<String>,
    /// Of which engine; `None` for all.
    pub engine: Option<i32>,
}

impl Rule {
    fn fits(&self, function: &str, engine: Option<i32>) -> bool {
        self.function.as_deref().is_none_or(|name| name == function)
            && self.engine.is_none_or(|pid| engine == Some(pid))
    }

    /// Whether it says something about all that the other one does.
    fn covers(&self, other: &Rule) -> bool {
        (self.function.is_none() || self.function == other.function)
            && (self.engine.is_none() || self.engine == other.engine)
    }
}

impl Wanted {
    /// Reads the file; there need not be one, nor a directory. One that makes no
    /// sense is left behind under another name, and nothing is observed: that is
    /// safe, and is told.
    #[must_use]
    pub fn open(directory: Option<&Path>) -> Self {
        let file = directory.map(|directory| directory.join(NAME));
        let rules = file.as_deref().map_or_else(Vec::new, |file| {
            read(file).unwrap_or_else(|error| {
                let aside = file.with_extension("json.damaged");
                let kept = fs::rename(file, &aside).is_ok();
                tracing::warn!(
                    %error,
                    kept = kept.then(|| aside.display().to_string()),
                    "what was to be observed is not known any more: nothing is"
                );
                Vec::new()
            })
        });
        Self {
            file,
            rules: Mutex::new(rules),
        }
    }

    fn rules(&self) -> MutexGuard<'_, Vec<Rule>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a function is to be observed.
    #[must_use]
    pub fn wants(&self, function: &str, engine: Option<i32>) -> bool {
        let rules = self.rules();
        let last = rules.iter().rfind(|rule| rule.fits(function, engine));
        last.is_some_and(|rule| rule.on)
    }

    /// Whether any function may be.
    #[must_use]
    pub fn any(&self) -> bool {
        self.rules().iter().any(|rule| rule.on)
    }

    /// Adds what was asked for, on the disk first.
    ///
    /// # Errors
    /// It cannot be written: then it is as it was.
    pub fn change(&self, asked: &[Rule]) -> io::Result<()> {
        let mut rules = self.rules();
        let mut new = rules.clone();
        for rule in asked {
            new.retain(|known| !rule.covers(known));
            new.push(rule.clone());
        }
        // Before the first that is on there is nothing to be off.
        let first = new.iter().position(|rule| rule.on).unwrap_or(new.len());
        new.drain(..first);
        if new == *rules {
            return Ok(());
        }
        if let Some(file) = &self.file {
            write(file, &new)?;
        }
        *rules = new;
        Ok(())
    }
}

fn read(file: &Path) -> io::Result<Vec<Rule>> {
    match fs::read(file) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whole or not at all.
fn write(file: &Path, rules: &[Rule]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let new = file.with_extension("json.new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut opened = options.open(&new)?;
    opened.write_all(&serde_json::to_vec(rules)?)?;
    opened.sync_all()?;
    fs::rename(&new, file)?;
    match file.parent() {
        Some(directory) => fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(on: bool, function: &str, engine: Option<i32>) -> Rule {
        Rule {
            on,
            function: (!function.is_empty()).then(|| function.to_owned()),
            engine,
        }
    }

    #[test]
    fn the_last_word_about_a_function_counts_and_outlives_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Wanted::open(Some(dir.path()));
        let wanted = open();
        assert!(!wanted.any() && !wanted.wants("Foo", None));
        let both = [rule(true, "Foo", None), rule(true, "Bar", None)];
        wanted.change(&both).unwrap();
        wanted
            .change(&[rule(false, "Bar", None), rule(false, "Qux", None)])
            .unwrap();
        let wanted = open();
        assert!(wanted.wants("Foo", Some(7)) && wanted.wants("Foo", None));
        assert!(!wanted.wants("Bar", Some(7)) && !wanted.wants("Qux", None));
        wanted.change(&[rule(true, "", None)]).unwrap();
        wanted.change(&[rule(false, "Foo", None)]).unwrap();
        wanted.change(&[rule(true, "Foo", Some(7))]).unwrap();
        let wanted = open();
        assert!(wanted.wants("Foo", Some(7)) && !wanted.wants("Foo", Some(8)));
        assert!(wanted.wants("Bar", None) && wanted.any());
        wanted.change(&[rule(false, "", None)]).unwrap();
        assert!(!open().any());
        let text = fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert_eq!(text, "[]", "what says nothing is not kept");
    }

    #[test]
    fn one_engine_is_not_another() {
        let wanted = Wanted::default();
        wanted.change(&[rule(true, "", Some(7))]).unwrap();
        assert!(wanted.wants("Foo", Some(7)) && !wanted.wants("Foo", Some(8)));
        assert!(!wanted.wants("Foo", None), "an engine that is not known");
        wanted.change(&[rule(false, "", Some(8))]).unwrap();
        assert!(wanted.wants("Foo", Some(7)));
        wanted.change(&[rule(false, "", None)]).unwrap();
        assert!(!wanted.any());
    }

    #[test]
    fn what_cannot_be_written_does_not_take_effect() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = Wanted::open(Some(&dir.path().join("missing")));
        assert!(wanted.change(&[rule(true, "", None)]).is_err());
        assert!(!wanted.any());
        let nowhere = Wanted::open(None);
        nowhere.change(&[rule(true, "", None)]).unwrap();
        assert!(nowhere.wants("Foo", None));
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(NAME), "[{\"on\":true,").unwrap();
        let wanted = Wanted::open(Some(dir.path()));
        assert!(!wanted.any());
        assert!(dir.path().join("observe.json.damaged").exists());
        wanted.change(&[rule(true, "", None)]).unwrap();
        assert!(Wanted::open(Some(dir.path())).any());
    }
}
