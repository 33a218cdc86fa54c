//! Which effects a patch must be allowed to have, and which it is.

use std::fmt;
use std::str::FromStr;

/// A kind of effect that a patch needs to be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guarded {
    /// The caller container's files.
    Files,
    /// The caller's network namespace.
    Network,
    /// The caller's user, groups and capabilities.
    Credentials,
}

impl Guarded {
    /// All of them.
    pub const ALL: [Guarded; 3] = [Guarded::Files, Guarded::Network, Guarded::Credentials];

    /// Its name, as [`Effect::kind`](super::Effect::kind) has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Guarded::Files => "files",
            Guarded::Network => "network",
            Guarded::Credentials => "credentials",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Guarded> {
        Guarded::ALL.into_iter().find(|kind| kind.name() == name)
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// The guarded effects that are allowed; none by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Allowance(u8);

impl Allowance {
    /// Nothing.
    pub const NONE: Allowance = Allowance(0);

    /// Everything.
    #[must_use]
    pub fn all() -> Allowance {
        Guarded::ALL.into_iter().collect()
    }

    /// What either allows.
    #[must_use]
    pub fn and(self, other: Allowance) -> Allowance {
        Allowance(self.0 | other.0)
    }

    /// Whether this kind is allowed.
    #[must_use]
    pub fn has(self, kind: Guarded) -> bool {
        self.0 & kind.bit() != 0
    }

    /// What these words allow: kinds, or `all`.
    ///
    /// # Errors
    /// The first word that is neither.
    pub fn of<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Allowance, UnknownEffect> {
        let mut allowed = Allowance::NONE;
        for word in words {
            allowed = allowed.and(word.parse()?);
        }
        Ok(allowed)
    }
}

impl FromIterator<Guarded> for Allowance {
    fn from_iter<T: IntoIterator<Item = Guarded>>(kinds: T) -> Allowance {
        Allowance(kinds.into_iter().fold(0, |bits, kind| bits | kind.bit()))
    }
}

/// One word; [`Allowance::of`] takes several. A kind that needs no leave may be
/// named all the same.
impl FromStr for Allowance {
    type Err = UnknownEffect;

    fn from_str(word: &str) -> Result<Allowance, UnknownEffect> {
        match (word, Guarded::named(word)) {
            ("all", _) => Ok(Allowance::all()),
            (_, Some(kind)) => Ok([kind].into_iter().collect()),
            _ if super::KINDS.iter().any(|(kind, ..)| *kind == word) => Ok(Allowance::NONE),
            _ => Err(UnknownEffect(word.to_owned())),
        }
    }
}

/// Kinds with commas between; empty for none.
impl fmt::Display for Allowance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = Guarded::ALL.into_iter().filter(|kind| self.has(*kind));
        let names: Vec<&str> = kinds.map(Guarded::name).collect();
        f.write_str(&names.join(","))
    }
}

/// A word that is no kind of effect that needs to be allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no effect that can be allowed: known are files, network, credentials and all")]
pub struct UnknownEffect(
    /// The word.
    pub String,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_add_up() {
        let some = Allowance::of(["network", "files", "network"]).unwrap();
        assert_eq!(some.to_string(), "files,network");
        assert!(some.has(Guarded::Files) && !some.has(Guarded::Credentials));
        assert_eq!(
            some.and(Allowance::of(["credentials"]).unwrap()),
            Allowance::all()
        );
        assert_eq!(Allowance::of(["all"]).unwrap(), Allowance::all());
        assert_eq!(Allowance::of([]).unwrap(), Allowance::NONE);
    }

    #[test]
    fn what_needs_no_leave_may_be_named() {
        let some = Allowance::of(["processes", "files", "environment"]).unwrap();
        assert_eq!(some.to_string(), "files");
    }

    #[test]
    fn an_unknown_word_is_told_with_those_that_are_known() {
        for word in ["file", "Files", "thread", "", "files,network"] {
            let error = Allowance::of(["network", word]).unwrap_err();
            assert_eq!(error, UnknownEffect(word.to_owned()));
            let text = error.to_string();
            for kind in Guarded::ALL {
                assert!(text.contains(kind.name()), "{text}");
            }
        }
    }

    #[test]
    fn every_guarded_kind_is_a_kind() {
        for kind in Guarded::ALL {
            assert!(super::super::KINDS.iter().any(|(k, ..)| *k == kind.name()));
        }
    }
}
