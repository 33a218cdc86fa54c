//! Command lines in nightcore's manner: `--name=value`, `--name value`,
//! `--switch`, `--noswitch`, and anything after `--` or without dashes is
//! positional. An unknown flag is an error, not a surprise.

use std::collections::HashMap;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};

/// A parsed command line.
#[derive(Debug)]
pub struct Flags {
    values: HashMap<String, String>,
    /// What was no flag.
    pub positional: Vec<String>,
}

impl Flags {
    /// Parses this process's own command line.
    pub fn from_env(valued: &[&str], switches: &[&str]) -> Result<Self> {
        Self::parse(std::env::args().skip(1), valued, switches)
    }

    /// Parses `args`, in which `valued` flags have a value and `switches` are
    /// true or false.
    pub fn parse(
        args: impl IntoIterator<Item = String>,
        valued: &[&str],
        switches: &[&str],
    ) -> Result<Self> {
        let mut flags = Self {
            values: HashMap::new(),
            positional: Vec::new(),
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            if arg == "--" {
                flags.positional.extend(args);
                break;
            }
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                flags.positional.push(arg);
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if valued.contains(&name) {
                let value = match value {
                    Some(v) => v,
                    None => args
                        .next()
                        .ok_or_else(|| anyhow!("--{name} wants a value"))?,
                };
                flags.values.insert(name.to_owned(), value);
            } else if switches.contains(&name) {
                flags
                    .values
                    .insert(name.to_owned(), value.unwrap_or_else(|| "true".into()));
            } else if let Some(off) = name.strip_prefix("no").filter(|n| switches.contains(n)) {
                flags.values.insert(off.to_owned(), "false".into());
            } else {
                bail!("unknown flag --{name}");
            }
        }
        Ok(flags)
    }

    /// The text of a flag, if it was given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The value of a flag, or `default`.
    pub fn get<T: FromStr>(&self, name: &str, default: T) -> Result<T>
    where
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        match self.text(name) {
            None => Ok(default),
            Some(v) => v.parse().with_context(|| format!("--{name}={v}")),
        }
    }

    /// Whether a switch is on.
    pub fn is_on(&self, name: &str) -> Result<bool> {
        Ok(match self.text(name) {
            None | Some("false" | "f" | "no" | "n" | "0") => false,
            Some("true" | "t" | "yes" | "y" | "1") => true,
            Some(v) => bail!("--{name}={v} is neither true nor false"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Flags> {
        Flags::parse(
            args.iter().map(|&a| a.to_owned()),
            &["func_id", "fprocess"],
            &["use_fifo_for_nested_call"],
        )
    }

    #[test]
    fn takes_every_spelling() {
        let f = parse(&[
            "--func_id=3",
            "--fprocess",
            "a b",
            "--use_fifo_for_nested_call",
            "x",
        ])
        .unwrap();
        assert_eq!(f.get("func_id", 0).unwrap(), 3);
        assert_eq!(f.text("fprocess"), Some("a b"));
        assert!(f.is_on("use_fifo_for_nested_call").unwrap());
        assert_eq!(f.positional, ["x"]);
        let off = parse(&["--nouse_fifo_for_nested_call"]).unwrap();
        assert!(!off.is_on("use_fifo_for_nested_call").unwrap());
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert!(
            parse(&["--func=3"])
                .unwrap_err()
                .to_string()
                .contains("unknown flag --func")
        );
        assert!(
            parse(&["--func_id"])
                .unwrap_err()
                .to_string()
                .contains("wants a value")
        );
        assert!(parse(&["--func_id=x"]).unwrap().get("func_id", 0).is_err());
    }
}
