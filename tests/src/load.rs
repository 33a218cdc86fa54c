//! A load on a node: many warm connections, and every byte of every answer
//! checked.
//!
//! Each connection is a thread with a socket of its own that sends its next
//! request when the last is answered (a closed loop). Payloads are random and
//! differ; what the answer must be is a function of the request. Nothing is
//! ever repeated: a failure is counted and the connection made anew.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

use crate::client::{CallError, HttpClient};
use crate::fixtures;

/// Random numbers for payloads (xorshift64*): the same seed, the same load.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers that depend on `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n` (> 0).
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }
}

/// Makes a request's input.
pub type MakeInput = Arc<dyn Fn(&mut Random) -> Vec<u8> + Send + Sync>;
/// Says what the answer to an input must be.
pub type Expect = Arc<dyn Fn(&[u8]) -> Vec<u8> + Send + Sync>;

/// What load to make.
#[derive(Clone)]
pub struct LoadSpec {
    /// The gateway's port.
    pub port: u16,
    /// The function called.
    pub function: String,
    /// Connections, each with one request at a time.
    pub connections: usize,
    /// The load's seed.
    pub seed: u64,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Inputs.
    pub input: MakeInput,
    /// Answers.
    pub expect: Expect,
}

impl LoadSpec {
    /// `Foo` on `connections` connections: inputs of 5 to 300 random bytes, of
    /// which none is a command, and the answers that Foo and Bar must give.
    pub fn foo(port: u16, connections: usize) -> Self {
        Self {
            port,
            function: "Foo".into(),
            connections,
            seed: 1,
            timeout: Duration::from_secs(10),
            input: Arc::new(|random| {
                let length = 5 + random.below(296);
                random_input(random, length)
            }),
            expect: Arc::new(fixtures::foo),
        }
    }

    /// The same with inputs of one length (at least 1).
    #[must_use]
    pub fn payload(mut self, length: usize) -> Self {
        self.input = Arc::new(move |random| random_input(random, length));
        self
    }
}

/// Random bytes that no fixture takes for a command: the first is a digit.
pub fn random_input(random: &mut Random, length: usize) -> Vec<u8> {
    let mut input = vec![0; length];
    for piece in input.chunks_mut(8) {
        piece.copy_from_slice(&random.next_u64().to_le_bytes()[..piece.len()]);
    }
    if let Some(first) = input.first_mut() {
        *first = b'0' + *first % 10;
    }
    input
}

/// What a load has met so far.
#[derive(Clone)]
pub struct LoadReport {
    /// Requests answered as they must be.
    pub correct: u64,
    /// Requests answered with something else, and 200.
    pub wrong: u64,
    /// Requests with another status, no answer in time or a broken connection.
    pub failed: u64,
    /// The first few of those, told.
    pub complaints: Vec<String>,
    /// How long correct answers took, in ns.
    pub latency: Histogram<u64>,
    /// How long the load has been on.
    pub elapsed: Duration,
}

impl fmt::Debug for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} correct, {} wrong, {} failed in {:.1?}: {:.0}/s, p50 {:.1?}, p99 {:.1?}, max {:.1?}",
            self.correct,
            self.wrong,
            self.failed,
            self.elapsed,
            self.rate(),
            self.quantile(0.5),
            self.quantile(0.99),
            self.quantile(1.0)
        )?;
        self.complaints.iter().try_for_each(|c| write!(f, "; {c}"))
    }
}

impl LoadReport {
    fn new() -> Self {
        Self {
            correct: 0,
            wrong: 0,
            failed: 0,
            complaints: Vec::new(),
            // Three digits, and it grows as it must.
            latency: Histogram::new(3).unwrap_or_else(|_| unreachable!("3 digits are valid")),
            elapsed: Duration::ZERO,
        }
    }

    /// All requests.
    pub fn requests(&self) -> u64 {
        self.correct + self.wrong + self.failed
    }

    /// Correct answers per second.
    pub fn rate(&self) -> f64 {
        self.correct as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// The latency below which `q` (0 to 1) of the answers are.
    pub fn quantile(&self, q: f64) -> Duration {
        Duration::from_nanos(self.latency.value_at_quantile(q))
    }

    /// An error unless there were answers, and all of them correct.
    pub fn all_correct(&self) -> Result<()> {
        anyhow::ensure!(
            self.correct > 0 && self.wrong == 0 && self.failed == 0,
            "{self:?}"
        );
        Ok(())
    }

    fn complain(&mut self, what: impl FnOnce() -> String) {
        if self.complaints.len() < 5 {
            self.complaints.push(what());
        }
    }

    fn add(&mut self, other: &Self) {
        self.correct += other.correct;
        self.wrong += other.wrong;
        self.failed += other.failed;
        for c in &other.complaints {
            self.complain(|| c.clone());
        }
        // Cannot fail: ours grows as it must.
        let _ = self.latency.add(&other.latency);
    }
}

type Shared = Arc<Mutex<LoadReport>>;

/// A load that is on. Dropping it ends it.
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    reports: Vec<Shared>,
    since: Instant,
}

impl Load {
    /// Opens all connections, warms each with one request, and begins.
    pub fn start(spec: &LoadSpec) -> Result<Self> {
        let mut clients = Vec::new();
        for i in 0..spec.connections {
            let mut client = connect(spec).context("cannot connect to the gateway")?;
            let mut random = Random::new(spec.seed ^ (i as u64 + 1) << 32);
            let input = (spec.input)(&mut random);
            let answer = client
                .call(&spec.function, &input)
                .context("the first request")?;
            anyhow::ensure!(answer == (spec.expect)(&input), "the first answer is wrong");
            clients.push((client, random));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = Self {
            stop,
            threads: Vec::new(),
            reports: Vec::new(),
            since: Instant::now(),
        };
        for (client, random) in clients {
            let report = Arc::new(Mutex::new(LoadReport::new()));
            let connection = Connection {
                spec: spec.clone(),
                client: Some(client),
                random,
                report: report.clone(),
                stop: load.stop.clone(),
            };
            load.reports.push(report);
            load.threads.push(
                std::thread::Builder::new()
                    .name("load".into())
                    .stack_size(256 << 10)
                    .spawn(move || connection.run())?,
            );
        }
        Ok(load)
    }

    /// What it has met so far.
    pub fn snapshot(&self) -> LoadReport {
        let mut all = LoadReport::new();
        for report in &self.reports {
            all.add(&report.lock().unwrap_or_else(PoisonError::into_inner));
        }
        all.elapsed = self.since.elapsed();
        all
    }

    /// Ends it, once the requests under way are answered, and reports.
    pub fn stop(mut self) -> LoadReport {
        self.end();
        self.snapshot()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("load: a connection's thread panicked");
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

fn connect(spec: &LoadSpec) -> Result<HttpClient, CallError> {
    let client = HttpClient::connect(spec.port)?;
    client.set_timeout(spec.timeout)?;
    Ok(client)
}

struct Connection {
    spec: LoadSpec,
    client: Option<HttpClient>,
    random: Random,
    report: Shared,
    stop: Arc<AtomicBool>,
}

impl Connection {
    fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            let input = (self.spec.input)(&mut self.random);
            let started = Instant::now();
            let result = self.request(&input);
            let took = started.elapsed();
            let expected = (self.spec.expect)(&input);
            let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(answer) if answer == expected => {
                    report.correct += 1;
                    let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                    let _ = report.latency.record(ns.max(1));
                }
                Ok(answer) => {
                    report.wrong += 1;
                    report.complain(|| difference(&expected, &answer));
                }
                Err(e) => {
                    report.failed += 1;
                    report.complain(|| format!("after {took:?}: {e}"));
                    drop(report);
                    if !matches!(e, CallError::Status(_)) {
                        self.client = None;
                        // No storm of connections at a gateway that is gone.
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
            }
        }
    }

    fn request(&mut self, input: &[u8]) -> Result<Vec<u8>, CallError> {
        let client = match self.client.take() {
            Some(client) => self.client.insert(client),
            None => self.client.insert(connect(&self.spec)?),
        };
        client.call(&self.spec.function, input)
    }
}

/// Where two answers first differ.
fn difference(expected: &[u8], answer: &[u8]) -> String {
    let at = expected
        .iter()
        .zip(answer)
        .position(|(a, b)| a != b)
        .unwrap_or(expected.len().min(answer.len()));
    let piece = |of: &[u8]| {
        let bytes = &of[at.min(of.len())..(at + 16).min(of.len())];
        String::from_utf8_lossy(bytes).into_owned()
    };
    format!(
        "{} bytes for {}; at {at}: {:?} for {:?}",
        answer.len(),
        expected.len(),
        piece(answer),
        piece(expected)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_told() {
        assert_eq!(
            difference(b"abcd", b"abXd"),
            "4 bytes for 4; at 2: \"Xd\" for \"cd\""
        );
        assert_eq!(
            difference(b"abcd", b"ab"),
            "2 bytes for 4; at 2: \"\" for \"cd\""
        );
    }

    #[test]
    fn inputs_differ_and_are_no_commands() {
        let mut random = Random::new(7);
        let inputs: std::collections::HashSet<_> =
            (0..1000).map(|_| random_input(&mut random, 12)).collect();
        assert_eq!(inputs.len(), 1000);
        assert!(inputs.iter().all(|i| i[0].is_ascii_digit()));
    }

    #[test]
    fn a_report_with_an_error_is_no_success() {
        let mut r = LoadReport::new();
        assert!(r.all_correct().is_err(), "no request at all");
        r.correct = 10;
        r.all_correct().unwrap();
        r.wrong = 1;
        assert!(r.all_correct().is_err());
    }
}
