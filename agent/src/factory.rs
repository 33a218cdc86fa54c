//! Which [`Grafter`] the daemon runs with.

use std::sync::Arc;

use crate::grafter::Grafter;
use crate::live::Live;

/// The grafter of the daemon.
#[must_use]
pub fn grafter() -> Arc<dyn Grafter> {
    Arc::new(Live::default())
}
