//! Windows of everything that could be a site: for fuzzing alone.

use iced_x86::{Code as Opcode, FlowControl, OpKind};

use super::flow::Code;
use super::window::{Hops, NEAR, of_routine, of_site};
use super::{CodeMap, SiteKind, Tail, Window, WindowKind};

/// Where the library is loaded.
const BIAS: u64 = 0x7f00_0000_0000;
/// Functions and calls that are tried; more would be the same again.
const MOST: usize = 256;

impl CodeMap {
    /// Looks for a window at every indirect call and jump, and at every
    /// function. None may be entered but at its start, by any direct branch of
    /// the plain instruction stream.
    pub fn try_all_windows(&self) {
        let code = Code::new(&self.image, &self.extents, &self.labels);
        let mut branches = Vec::new();
        let mut windows = Vec::new();
        for extent in &self.extents {
            for i in code.decode(extent) {
                let near = i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch64;
                // Behind a call that does not return other code may follow.
                if near && i.flow_control() != FlowControl::Call {
                    branches.push(i.near_branch_target());
                }
                let kind = match i.code() {
                    Opcode::Call_rm64 => SiteKind::Call,
                    Opcode::Jmp_rm64 => SiteKind::TailJump,
                    _ => continue,
                };
                if windows.len() < MOST {
                    windows.extend(of_site(&code, i.ip(), kind, Hops::Allowed, &[]));
                }
            }
        }
        for extent in self.extents.iter().filter(|e| e.function).take(MOST) {
            windows.extend(of_routine(&code, extent.start));
        }
        branches.sort_unstable();
        for window in &windows {
            self.is_sound(window, &branches);
        }
    }

    fn is_sound(&self, window: &Window, branches: &[u64]) {
        for (start, end) in window.ranges() {
            let before = self.image.bytes(start, end).expect("bytes of the image");
            assert_eq!(before.len() as u64, end - start);
            assert_eq!(start >> 12, (end - 1) >> 12, "two pages");
            let inside = branches.partition_point(|&b| b <= start);
            if let Some(&branch) = branches.get(inside) {
                assert!(branch >= end, "{branch:#x} is inside of {start:#x}");
            }
        }
        if let Some(hop) = &window.hop {
            assert!(!branches.contains(&hop.at.0), "filler that is entered");
        }
        // In reach of the window, whatever address the file gives to it.
        let stub = BIAS.wrapping_add(window.start.0).wrapping_sub(0x10_0000);
        let after = window.after(BIAS, stub).expect("a stub in reach");
        assert_eq!(after.len(), window.before.len());
        assert!(after.len() as u64 >= NEAR || window.hop.is_some());
        let tail = match window.kind {
            WindowKind::Entry => Tail::Routine {
                record: 1,
                bridge_entry: 2,
            },
            _ => Tail::Bridge {
                site_record: 1,
                bridge_entry: 2,
            },
        };
        // What a displaced instruction refers to may be out of reach.
        if let Ok(stub) = window.stub(BIAS, stub, &tail) {
            assert!(stub.bytes.len() < 512, "a stub of any length");
            let offsets = stub.boundaries.iter().map(|(from, _)| *from);
            assert!(offsets.is_sorted_by(|a, b| a < b));
            assert_eq!(stub.boundaries.first().map(|(from, _)| *from), Some(0));
        }
    }
}
