//! Which [`Grafter`] the daemon runs with.

use std::sync::Arc;

use crate::grafter::{
    Explained, GraftError, Grafter, PatchReceipt, RevertReceipt, Target, WorkerStatus,
};

/// The grafter of the daemon.
#[must_use]
pub fn grafter() -> Arc<dyn Grafter> {
    Arc::new(NotWired)
}

/// Stands where the patcher's implementation goes: every call fails.
struct NotWired;

impl NotWired {
    fn fail<T>() -> Result<T, GraftError> {
        Err(GraftError::Failed("not wired".to_owned()))
    }
}

impl Grafter for NotWired {
    fn explain(&self, _: &Target, _: &Target, _: &str) -> Result<Explained, GraftError> {
        Self::fail()
    }
    fn patch(&self, _: &Target, _: &Target, _: &str) -> Result<PatchReceipt, GraftError> {
        Self::fail()
    }
    fn revert(&self, _: &Target, _: &str) -> Result<RevertReceipt, GraftError> {
        Self::fail()
    }
    fn status(&self, _: &Target) -> Result<Option<WorkerStatus>, GraftError> {
        Self::fail()
    }
    fn build_id(&self, _: &Target) -> Result<Option<String>, GraftError> {
        Self::fail()
    }
    fn set_gate(&self, _: &Target, _: &str, _: bool) -> Result<(), GraftError> {
        Self::fail()
    }
}
