//! The plan, as it goes over the socket.

use nightgraft_planner::Plan;
use serde::{Deserialize, Serialize};

/// What is worth fusing, by what was measured within the graph's window.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanReport {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Seconds over which calls were counted.
    pub window_s: f64,
    /// One plan for each engine that has functions with calls.
    pub plans: Vec<EnginePlan>,
    /// What fusing costs on this node.
    pub costs: Costs,
    /// What is not known, in sentences.
    pub notes: Vec<String>,
}

/// What is worth fusing among the functions of one engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnginePlan {
    /// Pid of the engine.
    pub engine: Option<i32>,
    /// The plan: its fields beside `engine`.
    #[serde(flatten)]
    pub plan: Plan,
}

/// What changes cost on this node, in one worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Seconds that fusing an edge takes.
    pub inject_s: f64,
    /// Seconds of that for which the worker stands still.
    pub stop_s: f64,
    /// Seconds that un-fusing one takes.
    pub revert_s: f64,
    /// Patches that these are the means of, the last weighing most; 0 where they
    /// are the settings' own.
    pub patches: u64,
}
