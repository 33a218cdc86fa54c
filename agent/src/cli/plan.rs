//! `agentctl plan`, as text for people. Pure.

use std::fmt::Write;

use nightgraft_planner::{Decision, Plan, Proof, Verdict};

use super::format::{bytes, clean, nanos_f64, rate};
use super::render::{NOTHING, notes, table};
use crate::api::{Costs, EnginePlan, PlanReport};

/// What is said while nothing was counted.
const NOTHING_COUNTED: &str = "no calls were counted: agentctl observe on, and wait for some\n";

pub(super) fn plan(report: &PlanReport) -> String {
    let mut text = String::new();
    for EnginePlan { engine, plan } in &report.plans {
        if report.plans.len() > 1 {
            let pid = engine.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            let _ = writeln!(text, "engine {pid}:");
        }
        let _ = writeln!(text, "{}", summary(plan));
        if !plan.decisions.is_empty() {
            let header = [
                "PATH",
                "NOW",
                "TO DO",
                "CALLS/S",
                "SAVES/S",
                "COSTS/S",
                "PAYS AFTER",
                "MEMORY",
                "WHY",
            ];
            text.push_str(&table(header, plan.decisions.iter().map(row).collect()));
        }
        for complaint in &plan.complaints {
            let _ = writeln!(text, "the configuration: {}", clean(complaint));
        }
    }
    if report.plans.is_empty() {
        text.push_str(NOTHING_COUNTED);
    } else {
        let _ = writeln!(text, "{}", costs(&report.costs, report.window_s));
    }
    notes(&mut text, &report.notes);
    text
}

fn summary(plan: &Plan) -> String {
    let proof = match plan.proof {
        Proof::Optimal => "no set is better",
        Proof::Heuristic => "the best that was found",
    };
    format!(
        "{} of RPC overhead a second: {} are saved now, {} with this plan ({proof})",
        seconds(plan.overhead_per_s),
        seconds(plan.saved_now_per_s),
        seconds(plan.saved_per_s)
    )
}

fn costs(costs: &Costs, window_s: f64) -> String {
    let measured = match costs.patches {
        0 => "by the settings, as nothing was fused yet".to_owned(),
        1 => "as the one patch so far did".to_owned(),
        patches => format!("as {patches} patches did"),
    };
    format!(
        "rates of the last {window_s:.0} s; fusing costs {} and stops {} in a worker, un-fusing {}, {measured}",
        seconds(costs.inject_s),
        seconds(costs.stop_s),
        seconds(costs.revert_s)
    )
}

fn row(decision: &Decision) -> [String; 9] {
    let path: Vec<String> = decision.path.iter().map(|name| clean(name)).collect();
    let possible = decision.verdict != Verdict::NotPossible;
    let figure = |text: String| if possible { text } else { NOTHING.to_owned() };
    [
        path.join(" → "),
        if decision.fused { "fused" } else { "rpc" }.to_owned(),
        match decision.verdict {
            Verdict::Fuse => "fuse",
            Verdict::Keep => "keep",
            Verdict::Unfuse => "un-fuse",
            Verdict::NotPossible => "not possible",
        }
        .to_owned(),
        rate(decision.calls_per_s),
        figure(seconds(decision.saved_per_s)),
        figure(seconds(decision.cost_per_s)),
        decision
            .pays_after_s
            .map_or_else(|| NOTHING.to_owned(), seconds),
        figure(bytes(decision.memory)),
        clean(&decision.reason),
    ]
}

fn seconds(seconds: f64) -> String {
    nanos_f64(seconds * 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(path: &[&str], verdict: Verdict, fused: bool, reason: &str) -> Decision {
        Decision {
            path: path.iter().map(|name| (*name).to_owned()).collect(),
            verdict,
            fused,
            calls_per_s: 250.0,
            saved_per_s: 5e-3,
            cost_per_s: 40e-6,
            memory: 600 << 10,
            pays_after_s: (verdict == Verdict::Fuse).then_some(4.0),
            displaced: false,
            forced: false,
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn a_plan_shows_what_is_to_be_done_and_why() {
        let report = PlanReport {
            at_ms: 0,
            window_s: 10.0,
            plans: vec![EnginePlan {
                engine: Some(7),
                plan: Plan {
                    decisions: vec![
                        decision(&["Foo", "Bar"], Verdict::Fuse, false, "worth it"),
                        decision(
                            &["Foo", "\u{1b}[2J"],
                            Verdict::NotPossible,
                            false,
                            "effects",
                        ),
                        decision(&["Foo", "Bar", "Baz"], Verdict::Unfuse, true, "cold"),
                    ],
                    saved_per_s: 5e-3,
                    saved_now_per_s: 0.0,
                    cost_per_s: 40e-6,
                    overhead_per_s: 8e-3,
                    proof: Proof::Optimal,
                    complaints: vec!["Foo → Qux must be fused and is forbidden".to_owned()],
                },
            }],
            costs: Costs {
                inject_s: 0.05,
                stop_s: 400e-6,
                revert_s: 2e-3,
                patches: 3,
            },
            notes: vec!["Qux is not observed".to_owned()],
        };
        assert_eq!(
            plan(&report),
            "8 ms of RPC overhead a second: 0 ns are saved now, 5 ms with this plan (no set is better)\n\
             PATH             NOW    TO DO         CALLS/S  SAVES/S  COSTS/S  PAYS AFTER  MEMORY     WHY\n\
             Foo → Bar        rpc    fuse          250      5 ms     40 µs    4 s         600.0 KiB  worth it\n\
             Foo → \\u{1b}[2J  rpc    not possible  250      -        -        -           -          effects\n\
             Foo → Bar → Baz  fused  un-fuse       250      5 ms     40 µs    -           600.0 KiB  cold\n\
             the configuration: Foo → Qux must be fused and is forbidden\n\
             rates of the last 10 s; fusing costs 50 ms and stops 400 µs in a worker, un-fusing 2 ms, as 3 patches did\n\
             note: Qux is not observed\n"
        );
        assert_eq!(plan(&PlanReport::default()), NOTHING_COUNTED);
    }
}
