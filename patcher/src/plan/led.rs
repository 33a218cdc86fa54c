//! What is written where a window is led to a stub.

use crate::code::{OutOfReach, Window, WindowKind};
use crate::manifest::WindowRecord;

/// A window of a library loaded at `bias`, led to the stub at `stub`.
pub(super) struct Led<'a> {
    pub(super) window: &'a Window,
    pub(super) bias: u64,
    /// Live address.
    pub(super) stub: u64,
}

impl Led<'_> {
    /// The record with all that the window says filled in, behind that of the
    /// filler that it jumps to, if it does.
    pub(super) fn records(&self, window: WindowRecord) -> Result<Vec<WindowRecord>, OutOfReach> {
        let live = |at: u64| at.wrapping_add(self.bias);
        let of = self.window;
        let window = WindowRecord {
            address: live(of.start.0),
            before: of.before.clone(),
            after: of.after(self.bias, self.stub)?,
            call: of.kind == WindowKind::Call,
            jumped: of.kind == WindowKind::JumpedCall,
            ..window
        };
        let hop = of.hop.as_ref().zip(of.hop_after(self.bias, self.stub)?);
        let hop = hop.map(|(hop, after)| WindowRecord {
            address: live(hop.at.0),
            before: hop.before.clone(),
            after,
            call: false,
            jumped: false,
            returns: Vec::new(),
            hop_of: window.address,
            site: 0,
            copies: Vec::new(),
            cached: None,
            ..window.clone()
        });
        Ok(hop.into_iter().chain([window]).collect())
    }
}
