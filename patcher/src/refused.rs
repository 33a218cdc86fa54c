//! Why an edge is not fused, as a value.

use serde::{Deserialize, Serialize};

/// A reason, found by reading alone, why an edge cannot be fused right.
///
/// A refusal leaves the worker byte for byte as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "code", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Refused {
    /// The caller's library never passes the callee's name to an RPC that
    /// the analysis can see.
    #[error("{library} has no call site that passes the name \"{callee}\" to the RPC")]
    NoSite {
        /// The caller's library, as its container names it.
        library: String,
        /// The callee's name.
        callee: String,
    },
}

impl Refused {
    /// The stable code of this refusal, in kebab case.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Refused::NoSite { .. } => "no-site",
        }
    }

    /// What would lift the refusal, as an imperative sentence.
    #[must_use]
    pub fn lift(&self) -> String {
        match self {
            Refused::NoSite { .. } => "call it with a constant name".to_owned(),
        }
    }
}
