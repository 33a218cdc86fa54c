//! What a worker's counters say: values, as they are read from its memory while
//! it runs. All of them only grow, for as long as the worker lives.

mod counters;

use nightgraft_bridge::histogram::{BUCKETS, lowest};
use serde::{Deserialize, Serialize};

pub use counters::Counters;
#[cfg(fuzzing)]
pub(crate) use counters::read_area;

/// Durations by size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Durations that were measured; a share of all calls.
    pub samples: u64,
    /// Their sum, in cycles of the time-stamp counter.
    pub cycles: u64,
    /// How many fell into each bucket (see [`Histogram::bounds`]).
    pub buckets: Vec<u64>,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            samples: 0,
            cycles: 0,
            buckets: vec![0; BUCKETS],
        }
    }
}

impl Histogram {
    /// Bucket `index` holds durations from the first number up to, and without,
    /// the second, in cycles. The last one holds all that are longer as well.
    #[must_use]
    pub fn bounds(index: usize) -> (u64, u64) {
        (lowest(index), lowest(index + 1))
    }
}

/// Calls of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// Calls begun.
    pub entered: u64,
    /// Calls that came back.
    pub returned: u64,
    /// Of them, those that gave anything but 0.
    pub errors: u64,
    /// Input bytes of the calls begun.
    pub bytes_in: u64,
    /// Output bytes of the calls that came back well.
    pub bytes_out: u64,
    /// How long they took.
    pub latency: Histogram,
}

/// RPCs from one place, with one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RpcSeries {
    /// Who calls: the fused callee whose code it is, with the way to it
    /// (`Bar/Baz`); empty for the worker's own function.
    pub caller: String,
    /// The name that is called, as it was passed; cut where it is longer than
    /// any function's.
    pub callee: String,
    /// Where: `libfoo.so+0x1234`, the address that the call returns to, or the
    /// bare address where nothing is known to be there.
    pub site: String,
    /// The calls.
    pub calls: Series,
}

/// Calls of a callee that ran fused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FusedSeries {
    /// The callee, with the way to it.
    pub callee: String,
    /// Calls run fused now, as far as the gate is concerned.
    pub fused: bool,
    /// The calls, of all images that this callee had in the worker.
    pub calls: Series,
}

/// All counters of one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// RPCs and the function's own calls are counted now.
    pub observing: bool,
    /// Calls of the worker's own function that its engine sent, with what they
    /// call in turn. No output bytes. `None` where they cannot be counted, as
    /// the function's entry cannot be rewritten.
    pub own: Option<Series>,
    /// RPCs of the worker's, by place and name.
    pub rpcs: Vec<RpcSeries>,
    /// RPCs that found no room in the worker's table, or had no name.
    pub unattributed: u64,
    /// Fused calls, which are counted whether it is observed or not.
    pub fused: Vec<FusedSeries>,
}
