//! Which [`Grafter`] the daemon runs with.

use std::sync::Arc;

use crate::grafter::Grafter;
use crate::journal::Disk;
use crate::live::Live;

/// The grafter of the daemon, with its journal.
#[must_use]
pub fn grafter(journal: Arc<Disk>) -> Arc<dyn Grafter> {
    Arc::new(Live::new(journal))
}
