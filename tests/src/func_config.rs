//! `func_config.json`: which functions there are.
//!
//! Gateway and engine read the file, and the engine hands its text on to
//! launchers and workers, so that every process resolves names alike.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::wire::MAX_FUNC_ID;

/// One function of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FuncEntry {
    /// Its name: letters and digits.
    pub func_name: String,
    /// Its number: 1 to 255.
    pub func_id: u16,
    /// Workers that are started at once. Absent or -1: nightcore's default of 1.
    #[serde(default = "unset")]
    pub min_workers: i32,
    /// Workers that there may be. Absent or -1: any number.
    #[serde(default = "unset")]
    pub max_workers: i32,
    /// Whether a GET calls it as well.
    #[serde(default)]
    pub allow_http_get: bool,
}

fn unset() -> i32 {
    -1
}

impl FuncEntry {
    /// Workers to be started at once.
    pub fn at_least(&self) -> usize {
        usize::try_from(self.min_workers).unwrap_or(1)
    }

    /// Workers that there may be.
    pub fn at_most(&self) -> usize {
        match usize::try_from(self.max_workers) {
            Ok(n) if n > 0 => n.max(self.at_least()),
            _ => usize::MAX,
        }
    }
}

/// The file, indexed.
#[derive(Debug)]
pub struct FuncConfig {
    json: String,
    entries: Vec<FuncEntry>,
    by_name: HashMap<Vec<u8>, usize>,
    by_id: HashMap<u16, usize>,
}

impl FuncConfig {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self> {
        let json = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the function config {}", path.display()))?;
        Self::parse(json).with_context(|| format!("in {}", path.display()))
    }

    /// Checks the file's text.
    pub fn parse(json: String) -> Result<Self> {
        let entries: Vec<FuncEntry> =
            serde_json::from_str(&json).context("not a function config")?;
        let (mut by_name, mut by_id) = (HashMap::new(), HashMap::new());
        for (i, e) in entries.iter().enumerate() {
            ensure!(
                !e.func_name.is_empty() && e.func_name.bytes().all(|b| b.is_ascii_alphanumeric()),
                "invalid function name {:?}: only letters and digits may be in it",
                e.func_name
            );
            ensure!(
                (1..=MAX_FUNC_ID).contains(&e.func_id),
                "invalid id {} of function {}: it must be 1 to {MAX_FUNC_ID}",
                e.func_id,
                e.func_name
            );
            if by_name
                .insert(e.func_name.clone().into_bytes(), i)
                .is_some()
            {
                bail!("the name {} is there twice", e.func_name);
            }
            if by_id.insert(e.func_id, i).is_some() {
                bail!("the id {} is there twice", e.func_id);
            }
        }
        Ok(Self {
            json,
            entries,
            by_name,
            by_id,
        })
    }

    /// The file's text, as it was.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// All functions.
    pub fn entries(&self) -> &[FuncEntry] {
        &self.entries
    }

    /// The function of that name, compared byte by byte.
    pub fn by_name(&self, name: &[u8]) -> Option<&FuncEntry> {
        self.by_name.get(name).map(|&i| &self.entries[i])
    }

    /// The function of that id.
    pub fn by_id(&self, id: u16) -> Option<&FuncEntry> {
        self.by_id.get(&id).map(|&i| &self.entries[i])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_nightcore_reads() {
        let c = FuncConfig::parse(
            r#"[{"funcName":"Foo","funcId":1,"minWorkers":2,"maxWorkers":4},
                {"funcName":"Bar","funcId":2}]"#
                .into(),
        )
        .unwrap();
        let foo = c.by_name(b"Foo").unwrap();
        assert_eq!((foo.func_id, foo.at_least(), foo.at_most()), (1, 2, 4));
        let bar = c.by_id(2).unwrap();
        assert_eq!((bar.at_least(), bar.at_most()), (1, usize::MAX));
        assert!(c.by_name(b"foo").is_none(), "names are case-sensitive");
    }

    #[test]
    fn refuses_what_nightcore_refuses() {
        for (json, why) in [
            (
                r#"[{"funcName":"a-b","funcId":1}]"#,
                "invalid function name",
            ),
            (r#"[{"funcName":"A","funcId":0}]"#, "invalid id 0"),
            (
                r#"[{"funcName":"A","funcId":1},{"funcName":"A","funcId":2}]"#,
                "A is there twice",
            ),
            (
                r#"[{"funcName":"A","funcId":1},{"funcName":"B","funcId":1}]"#,
                "1 is there twice",
            ),
            ("{}", "not a function config"),
        ] {
            let e = FuncConfig::parse(json.into()).unwrap_err().to_string();
            assert!(e.contains(why), "{json}: {e}");
        }
    }
}
