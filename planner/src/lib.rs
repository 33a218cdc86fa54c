//! Decides which edges of the RPC graph are worth fusing, and when to act on it.
//!
//! ```text
//!  graph: rates, latencies, memory ─► forest: what can be fused
//!                                        │
//!            exact, where it is small ◄──┴──► ascent, where it is large
//!                                        │
//!                              plan: for every path, what and why
//!                                        │
//!          governor: averages, dwell, quiet, budgets ─► changes to make now
//! ```
//!
//! All of it is pure: a graph and a time in, a plan and changes out.
//! docs/planner.md has the cost model.

mod ascent;
mod exact;
mod flow;
mod forest;
mod governor;
mod graph;
mod plan;
mod settings;
pub mod sim;
#[cfg(test)]
mod testing;

pub use forest::Path;
pub use governor::{Change, Governor, Held, Kind};
pub use graph::{Edge, Function, Graph, GraphError};
pub use plan::{Decision, Plan, Proof, Search, Verdict, plan, plan_by};
pub use settings::{Settings, WrongSetting};
