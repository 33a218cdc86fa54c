//! What the functions answer where nobody fuses anything: each in a process of
//! its own, which loads the library by plain `dlopen` and plays its worker.
//!
//! ```text
//! runner ─pipes─ reference_host Foo ─pipes─ reference_host Bar ─pipes─ …
//! ```
//!
//! A host starts another for each function that its library invokes, at the
//! first invocation, and keeps it. Requests and answers are frames: a length
//! of 4 bytes and the bytes; an answer has the return code of 4 bytes first.
//! A host ends with its input, in the ordinary way (exit handlers run).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::sys::abi::{Handed, Host, Library};
use crate::sys::{Region, process};

/// How long one request may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// What follows an input or answer in memory: zeros, as in nightcore.
const TAIL: usize = 64;

/// One function, as a reference host runs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReferenceFunction {
    /// Its library.
    pub library: PathBuf,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// Its working directory.
    pub dir: PathBuf,
}

/// All functions, by name.
pub type ReferenceSpec = BTreeMap<String, ReferenceFunction>;

/// A function's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What `faas_func_call` returned.
    pub code: i32,
    /// What it appended.
    pub output: Vec<u8>,
}

/// The host of one function, and what that host starts.
pub struct Reference {
    process: Child,
    requests: Option<ChildStdin>,
    answers: Receiver<io::Result<Answer>>,
    log: PathBuf,
}

impl Reference {
    /// Starts the host of `function`. `dir` gets its files and log.
    pub fn start(dir: &Path, spec: &ReferenceSpec, function: &str) -> Result<Self> {
        let path = dir.join("functions.json");
        fs::write(&path, serde_json::to_vec(spec)?)?;
        let log = dir.join("reference.log");
        let mut process = host(&path, spec, function, Stdio::from(File::create(&log)?))?;
        let mut output = process.stdout.take().context("no pipe from the host")?;
        let (sender, answers) = channel();
        // Ends with the host's output, or with the receiver.
        std::thread::Builder::new()
            .name("reference".into())
            .spawn(move || {
                loop {
                    let answer = read_answer(&mut output);
                    let last = answer.is_err();
                    if sender.send(answer).is_err() || last {
                        return;
                    }
                }
            })?;
        Ok(Self {
            requests: process.stdin.take(),
            process,
            answers,
            log,
        })
    }

    /// Asks the function.
    pub fn ask(&mut self, input: &[u8]) -> Result<Answer> {
        let requests = self.requests.as_mut().context("the host was ended")?;
        let sent = write_frame(requests, input);
        let answer = match self.answers.recv_timeout(ANSWER_WITHIN) {
            Ok(Ok(answer)) => {
                sent?;
                return Ok(answer);
            }
            Ok(Err(e)) => format!("it ended ({e})"),
            Err(RecvTimeoutError::Timeout) => format!("no answer within {ANSWER_WITHIN:?}"),
            Err(RecvTimeoutError::Disconnected) => "it has ended".to_owned(),
        };
        let log = fs::read(&self.log).unwrap_or_default();
        bail!(
            "the plainly loaded function: {answer}; {}",
            String::from_utf8_lossy(&log).trim()
        )
    }

    /// Ends the host and waits for it, so that its exit handlers have run.
    pub fn finish(mut self) -> Result<()> {
        drop(self.requests.take());
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn host(spec_path: &Path, spec: &ReferenceSpec, function: &str, log: Stdio) -> Result<Child> {
    let about = spec
        .get(function)
        .with_context(|| format!("there is no function {function}"))?;
    let mut command = Command::new(crate::bin("reference_host")?);
    command
        .arg(spec_path)
        .arg(function)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .envs(about.env.iter().map(|(k, v)| (k, v)))
        .current_dir(&about.dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    process::kill_with_parent(&mut command);
    command.spawn().context("the reference host does not start")
}

/// The host's `main`: serves requests for one function until there are no more.
pub fn serve(spec_path: &OsStr, function: &str) -> Result<()> {
    let spec_path = PathBuf::from(spec_path);
    let spec: ReferenceSpec = serde_json::from_slice(&fs::read(&spec_path)?)?;
    let about = spec
        .get(function)
        .with_context(|| format!("there is no function {function}"))?;
    // What the library prints must not get among the frames.
    let mut answers = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    process::place_fd(io::stderr().as_fd(), 1)?;
    let library = Library::load(&about.library)?;
    let host: &'static Serving = Box::leak(Box::new(Serving {
        starter: starter(spec_path, spec.clone()),
        spec: spec.clone(),
        state: Mutex::default(),
    }));
    let mut worker = library.create(host)?;
    let mut requests = io::stdin().lock();
    while let Some(input) = read_frame(&mut requests)? {
        let (code, output) = {
            let region = zero_tailed(&input)?;
            let code = worker.call(&region.as_slice()[..input.len()]);
            let mut state = host.state();
            state.handed.clear();
            (code, std::mem::take(&mut state.output))
        };
        answers.write_all(&code.to_le_bytes())?;
        write_frame(&mut answers, &output)?;
    }
    Ok(())
}

/// A request to start the host of a function, and where the answer goes.
type Start = (String, mpsc::Sender<Result<Child>>);

/// Starts hosts from a thread that lives as long as this process: they are to
/// die with their parent, which for the kernel is the thread that started them,
/// and functions may invoke others from threads that end.
fn starter(spec_path: PathBuf, spec: ReferenceSpec) -> Mutex<mpsc::Sender<Start>> {
    let (requests, to_do) = channel::<Start>();
    std::thread::spawn(move || {
        for (name, answer) in to_do {
            // Who asked may be gone.
            let _ = answer.send(host(&spec_path, &spec, &name, Stdio::inherit()));
        }
    });
    Mutex::new(requests)
}

struct Serving {
    starter: Mutex<mpsc::Sender<Start>>,
    spec: ReferenceSpec,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    output: Vec<u8>,
    handed: Vec<Region>,
    /// Hosts of the functions that were invoked.
    others: BTreeMap<String, Child>,
}

impl Serving {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_other(&self, name: &str, input: &[u8]) -> Result<Option<Handed>> {
        if !self.spec.contains_key(name) {
            return Ok(None);
        }
        let mut state = self.state();
        if !state.others.contains_key(name) {
            let (answer, started) = channel();
            let starter = self.starter.lock().unwrap_or_else(PoisonError::into_inner);
            starter.send((name.to_owned(), answer))?;
            let child = started.recv()??;
            state.others.insert(name.to_owned(), child);
        }
        let other = state.others.get_mut(name).context("no host")?;
        write_frame(other.stdin.as_mut().context("no pipe")?, input)?;
        let answer = read_answer(other.stdout.as_mut().context("no pipe")?)
            .with_context(|| format!("the host of {name}"))?;
        if answer.code != 0 {
            return Ok(None);
        }
        let region = zero_tailed(&answer.output)?;
        let handed = Handed {
            data: if answer.output.is_empty() {
                std::ptr::null()
            } else {
                region.as_ptr()
            },
            len: answer.output.len(),
        };
        state.handed.push(region);
        Ok(Some(handed))
    }
}

impl Host for Serving {
    fn invoke(&self, name: &[u8], input: &[u8]) -> Option<Handed> {
        let name = String::from_utf8_lossy(name);
        self.ask_other(&name, input).unwrap_or_else(|e| {
            eprintln!("FATAL: invoking {name}: {e:#}");
            std::process::abort();
        })
    }

    fn append(&self, data: &[u8]) {
        self.state().output.extend_from_slice(data);
    }
}

/// The bytes at the start of pages of their own, zeros behind them.
fn zero_tailed(bytes: &[u8]) -> io::Result<Region> {
    let mut region = Region::zeroed(bytes.len() + TAIL)?;
    region.fill(0, bytes);
    Ok(region)
}

fn write_frame(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(bytes)?;
    to.flush()
}

/// `None` at the end of the input.
fn read_frame(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
    from.read_exact(&mut bytes)?;
    Ok(Some(bytes))
}

fn read_answer(from: &mut impl Read) -> io::Result<Answer> {
    let mut code = [0; 4];
    from.read_exact(&mut code)?;
    let output = read_frame(from)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(Answer {
        code: i32::from_le_bytes(code),
        output,
    })
}
