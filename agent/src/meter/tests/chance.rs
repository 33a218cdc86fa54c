//! Workers that count, start, end, are observed and left alone, and are read
//! late and torn, all by chance; and in the end every count is right.

use std::collections::BTreeMap;
use std::time::Instant;

use super::*;
use crate::api::Latency;

const FUNCTIONS: [&str; 4] = ["Foo", "Bar", "Baz", "Qux"];

/// A worker as it really is.
struct Real {
    key: WorkerKey,
    now: Reading,
    /// As it was some readings ago.
    before: Reading,
}

/// `(caller, callee)`: RPCs, fused calls, errors, input bytes, samples.
type Sums = BTreeMap<(String, String), [u64; 5]>;

fn start(random: &mut Random, pid: i32, start_time: u64) -> Real {
    let at = random.below(4) as usize;
    let function = FUNCTIONS[at];
    let others: Vec<&str> = FUNCTIONS.into_iter().filter(|f| *f != function).collect();
    let mut now = reading(Vec::new(), Vec::new());
    for (n, callee) in (0..).zip(&others) {
        for site in 0..2 {
            now.rpcs.push(RpcSeries {
                site: format!("lib+{:#x}", n * 2 + site),
                ..rpc("", callee, Series::default())
            });
        }
    }
    let path = format!("{}/{}", others[0], others[1]);
    now.rpcs.push(rpc(&path, others[2], Series::default()));
    now.fused.push(fused(others[0], true, Series::default()));
    now.fused.push(fused(&path, true, Series::default()));
    Real {
        key: WorkerKey {
            engine: Some(100),
            function: function.to_owned(),
            pid,
            start_time,
        },
        before: now.clone(),
        now,
    }
}

impl Real {
    fn count(&mut self, random: &mut Random, sums: &mut Sums) {
        let rpcs = self.now.rpcs.len() as u64;
        let which = random.below(rpcs + 2) as usize;
        let bytes = random.below(1_000);
        let failed = random.below(10) == 0;
        let last = |path: &str| path.rsplit('/').next().unwrap().to_owned();
        let (caller, callee, is_rpc, series) = match self.now.rpcs.get_mut(which) {
            Some(rpc) if rpc.caller.is_empty() => {
                let caller = self.key.function.clone();
                (caller, rpc.callee.clone(), true, &mut rpc.calls)
            }
            Some(rpc) => (last(&rpc.caller), rpc.callee.clone(), true, &mut rpc.calls),
            None => {
                let fused = &mut self.now.fused[which - rpcs as usize];
                let caller = match fused.callee.split_once('/') {
                    Some((caller, _)) => caller.to_owned(),
                    None => self.key.function.clone(),
                };
                (caller, last(&fused.callee), false, &mut fused.calls)
            }
        };
        series.entered += 1;
        series.returned += 1;
        series.errors += u64::from(failed);
        series.bytes_in += bytes;
        measure(series, 100 + random.below(10_000));
        let sum = sums.entry((caller, callee)).or_default();
        sum[usize::from(!is_rpc)] += 1;
        sum[2] += u64::from(failed);
        sum[3] += bytes;
        sum[4] += 1;
    }

    /// A reading of it, perhaps not a good one.
    fn seen(&mut self, random: &mut Random) -> Reading {
        match random.below(5) {
            // Late.
            0 => self.before.clone(),
            // Torn: each counter of this moment or of the one before.
            1 => {
                let mut torn = self.now.clone();
                for (new, old) in torn.rpcs.iter_mut().zip(&self.before.rpcs) {
                    if random.below(2) == 0 {
                        new.calls.entered = old.calls.entered;
                        new.calls.latency.samples = old.calls.latency.samples;
                    }
                    if random.below(2) == 0 {
                        new.calls.bytes_in = old.calls.bytes_in;
                        new.calls
                            .latency
                            .buckets
                            .clone_from(&old.calls.latency.buckets);
                    }
                }
                torn
            }
            // Left alone: nothing but what is fused.
            2 => Reading {
                observing: false,
                own: None,
                rpcs: Vec::new(),
                ..self.now.clone()
            },
            // The rows in another order.
            3 => {
                let mut turned = self.now.clone();
                let by = random.below(turned.rpcs.len() as u64) as usize;
                turned.rpcs.rotate_left(by);
                turned
            }
            _ => {
                self.before = self.now.clone();
                self.now.clone()
            }
        }
    }
}

fn told(graph: &Graph) -> Sums {
    let edges = graph.edges.iter().map(|e| {
        let samples = |l: Option<Latency>| l.map_or(0, |l| l.samples);
        let samples = samples(e.rpc) + samples(e.fused);
        (
            (e.caller.clone(), e.callee.clone()),
            [e.rpc_calls, e.fused_calls, e.errors, e.bytes_in, samples],
        )
    });
    edges.collect()
}

#[test]
fn counts_are_exact_whatever_the_order_of_things() {
    for seed in 1..=20 {
        let mut random = Random(seed * 0x9e37_79b9);
        let mut meter = begun();
        let (mut sums, mut steps) = (Sums::new(), Sums::new());
        let mut add_step = |meter: &mut Meter| {
            for edge in meter.step().into_iter().flat_map(|step| step.edges) {
                let sum = steps.entry((edge.caller, edge.callee)).or_default();
                let samples = |l: Option<Latency>| l.map_or(0, |l| l.samples);
                sum[0] += edge.rpc_calls;
                sum[1] += edge.fused_calls;
                sum[2] += edge.errors;
                sum[4] += samples(edge.rpc) + samples(edge.fused);
            }
        };
        let mut workers: Vec<Real> = Vec::new();
        let mut at_ms = 0;
        let mut ended = 0;
        for round in 1..4_000 {
            let which = random.below(workers.len().max(1) as u64) as usize;
            match random.below(60) {
                // A pid is used again while the old worker's end is not told.
                0 if !workers.is_empty() => {
                    let old = workers.swap_remove(which);
                    meter.read(old.key.clone(), &old.now);
                    if random.below(2) == 0 {
                        meter.gone(old.key.pid, old.key.start_time);
                    }
                    ended += 1;
                    let new = start(&mut random, old.key.pid, round);
                    meter.read(new.key.clone(), &new.now);
                    meter.read(old.key, &old.now);
                    workers.push(new);
                }
                1 if workers.len() < 12 => {
                    workers.push(start(&mut random, 5_000 + round as i32, round));
                }
                2 => {
                    at_ms += random.below(3_000);
                    meter.tick(at_ms, PER_NS);
                }
                3 => add_step(&mut meter),
                4..40 if !workers.is_empty() => workers[which].count(&mut random, &mut sums),
                _ if !workers.is_empty() => {
                    let seen = workers[which].seen(&mut random);
                    meter.read(workers[which].key.clone(), &seen);
                }
                _ => {}
            }
        }
        for worker in &workers {
            meter.read(worker.key.clone(), &worker.now);
        }
        meter.tick(at_ms + 1_000, PER_NS);
        add_step(&mut meter);
        // Nothing in the window: latencies are of all time.
        meter.tick(at_ms + 1_000_000, PER_NS);
        let graph = meter.graph(&Node::default(), 0);
        assert_eq!(told(&graph), sums, "seed {seed}");
        for sum in sums.values_mut() {
            sum[3] = 0;
        }
        assert_eq!(steps, sums, "steps, seed {seed}");
        assert_eq!(meter.gone, ended, "seed {seed}");
        assert_eq!(meter.workers.len(), workers.len());
    }
}

#[test]
fn rows_of_one_name_are_followed_one_by_one() {
    let mut meter = begun();
    let row = |number| rpc("", "Bar", calls(number, 9));
    let read = |meter: &mut Meter, rows: Vec<RpcSeries>| {
        meter.read(key("Foo", 11), &reading(rows, Vec::new()));
        edge(&meter.graph(&node(), 0), "Foo", "Bar").rpc_calls
    };
    assert_eq!(read(&mut meter, vec![row(100), row(3)]), 103);
    let new = rpc("", "Baz", calls(1, 9));
    assert_eq!(read(&mut meter, vec![new, row(101), row(4)]), 105);
}

#[test]
fn a_worker_whose_engine_becomes_known_counts_on_under_it() {
    let mut meter = begun();
    let mut unknown = key("Foo", 11);
    unknown.engine = None;
    let row = |number| reading(vec![rpc("", "Bar", calls(number, 9))], Vec::new());
    meter.read(unknown, &row(10));
    meter.read(key("Foo", 11), &row(14));
    let graph = meter.graph(&node(), 0);
    let counted: Vec<_> = graph
        .edges
        .iter()
        .map(|e| (e.engine, e.rpc_calls))
        .collect();
    assert_eq!(counted, [(None, 10), (Some(100), 4)]);
}

#[test]
fn a_reading_of_the_dead_is_not_counted() {
    let mut meter = begun();
    let row = |number| reading(vec![rpc("", "Bar", calls(number, 9))], Vec::new());
    let start_time = native_worker(11).start_time;
    meter.read(key("Foo", 11), &row(5));
    meter.gone(11, start_time + 1);
    meter.read(key("Foo", 11), &row(6));
    meter.gone(11, start_time);
    meter.gone(11, start_time);
    meter.read(key("Foo", 11), &row(7));
    // Nor of one that was gone before it was ever read.
    meter.gone(12, native_worker(12).start_time);
    meter.read(key("Foo", 12), &row(9));
    let graph = meter.graph(&node(), 0);
    assert_eq!(edge(&graph, "Foo", "Bar").rpc_calls, 6);
    assert_eq!((meter.gone, meter.workers.len()), (1, 0));
}

/// A thousand workers with ten edges each, read every second. Some 10 ms where
/// the machine has nothing else to do; the limit is for those that have.
#[test]
fn a_large_node_costs_little() {
    let mut meter = begun();
    let mut readings: Vec<(WorkerKey, Reading)> = (0..1_000)
        .map(|n| {
            let rpcs = (0..10).map(|edge| rpc("", &format!("Callee{edge}"), calls(9, 5_000)));
            let function = format!("Caller{}", n % 50);
            (
                key(&function, 10_000 + n),
                reading(rpcs.collect(), Vec::new()),
            )
        })
        .collect();
    let mut best = u128::MAX;
    for second in 1..=10 {
        let begin = Instant::now();
        for (key, reading) in &readings {
            meter.read(key.clone(), reading);
        }
        meter.tick(second * 1_000, PER_NS);
        let graph = meter.graph(&Node::default(), 0);
        best = best.min(begin.elapsed().as_micros());
        assert_eq!(graph.edges.len(), 500);
        for (_, reading) in &mut readings {
            for rpc in &mut reading.rpcs {
                rpc.calls.entered += 1;
                measure(&mut rpc.calls, 3_000 * second);
            }
        }
    }
    eprintln!("{best} µs");
    assert!(best < 200_000, "{best} µs");
}
