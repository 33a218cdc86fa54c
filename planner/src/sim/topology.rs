//! The applications of `DeathStarBench`: which service calls which per request,
//! as their handlers and load scripts have it (state of 2024-06-27), without
//! databases and caches.
//!
//! Calls are facts of those sources. What a call takes and what a graft holds is
//! not in them: the same for all services here, with a little more for the
//! entries.

use crate::graph::{Edge, Function, Graph};

/// Requests per second of each application.
const REQUESTS: f64 = 2000.0;

/// Social Network, mixed workload: 60 % home timelines read, 30 % user timelines
/// read, 10 % posts composed.
const SOCIAL: &[(&str, &str, f64)] = &[
    ("frontend", "home-timeline", 0.6),
    ("frontend", "user-timeline", 0.3),
    ("frontend", "compose-post", 0.1),
    ("home-timeline", "post-storage", 0.6),
    ("home-timeline", "social-graph", 0.1),
    ("user-timeline", "post-storage", 0.3),
    ("compose-post", "text", 0.1),
    ("compose-post", "user", 0.1),
    ("compose-post", "media", 0.1),
    ("compose-post", "unique-id", 0.1),
    ("compose-post", "post-storage", 0.1),
    ("compose-post", "user-timeline", 0.1),
    ("compose-post", "home-timeline", 0.1),
    ("text", "url-shorten", 0.1),
    ("text", "user-mention", 0.1),
];

/// Media Microservices: reviews composed. Of the five calls of compose-review
/// per request only the last stores what came together.
const MEDIA: &[(&str, &str, f64)] = &[
    ("frontend", "user", 1.0),
    ("frontend", "movie-id", 1.0),
    ("frontend", "text", 1.0),
    ("frontend", "unique-id", 1.0),
    ("user", "compose-review", 1.0),
    ("movie-id", "compose-review", 1.0),
    ("movie-id", "rating", 1.0),
    ("text", "compose-review", 1.0),
    ("unique-id", "compose-review", 1.0),
    ("rating", "compose-review", 1.0),
    ("compose-review", "review-storage", 1.0),
    ("compose-review", "user-review", 1.0),
    ("compose-review", "movie-review", 1.0),
];

/// Hotel Reservation, mixed workload: 60 % searches, 39 % recommendations, 0.5 %
/// log-ins, 0.5 % reservations.
const HOTEL: &[(&str, &str, f64)] = &[
    ("frontend", "search", 0.6),
    ("frontend", "reservation", 0.605),
    ("frontend", "profile", 0.99),
    ("frontend", "recommendation", 0.39),
    ("frontend", "user", 0.01),
    ("search", "geo", 0.6),
    ("search", "rate", 0.6),
];

/// All of them, by name.
pub(super) fn all() -> Vec<(&'static str, Graph)> {
    vec![
        ("Social Network", graph(SOCIAL)),
        ("Media Microservices", graph(MEDIA)),
        ("Hotel Reservation", graph(HOTEL)),
    ]
}

/// From calls per request.
fn graph(calls: &[(&str, &str, f64)]) -> Graph {
    let mut graph = Graph::default();
    let find = |graph: &mut Graph, name: &str| {
        let found = graph.functions.iter().position(|f| f.name == name);
        found.unwrap_or_else(|| {
            let entry = graph.functions.is_empty();
            graph.functions.push(Function {
                name: name.to_owned(),
                arrivals: if entry { REQUESTS } else { 0.0 },
                own_s: if entry { 100e-6 } else { 40e-6 },
                workers: if entry { 4 } else { 2 },
                // Room for some of the services, not for all.
                memory_room: Some(1600 << 10),
                cores: Some(if entry { 2.0 } else { 1.0 }),
                graft_bytes: 300 << 10,
                domain: String::new(),
                unfusable: None,
            });
            graph.functions.len() - 1
        })
    };
    for (caller, callee, per_request) in calls {
        let (caller, callee) = (find(&mut graph, caller), find(&mut graph, callee));
        graph.edges.push(Edge {
            caller,
            callee,
            rate: REQUESTS * per_request,
            overhead_s: 20e-6,
            forbidden: None,
            required: false,
        });
    }
    graph
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_make_as_many_calls_as_is_known() {
        let per_request = |index: usize| {
            let (_, graph) = &all()[index];
            graph.check().unwrap();
            graph.edges.iter().map(|e| e.rate).sum::<f64>() / REQUESTS
        };
        for (index, calls) in [2.9, 13.0, 3.795].into_iter().enumerate() {
            let found = per_request(index);
            assert!((found - calls).abs() < 1e-9, "{index}: {found}");
        }
    }
}
