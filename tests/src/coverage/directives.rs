//! What a fixture says about itself: lines `//# key: value` at the top of its
//! main source, among ordinary comments.
//!
//! | directive | value | meaning |
//! |---|---|---|
//! | `about` | text | what it shows (required) |
//! | `kind` | text | its group in the table (required) |
//! | `role` | `callee`, `caller`, `pair` | which half it is; the other half is the shared one (required) |
//! | `compilers` | `gcc clang` | who compiles it (that is the default) |
//! | `flags` | compiler flags | how; repeated: one variant each (default `-O2`) |
//! | `matrix` | `abi` | also with each of the matrix's flags |
//! | `link` | linker arguments | after the sources |
//! | `library` | `FILE [ARGUMENTS]` | a library of its own that it links, found by `$ORIGIN`; `{dir}` is the fixture's folder |
//! | `plugin` | `FILE [ARGUMENTS]` | the same for a library that it loads by itself |
//! | `linker` | `bfd gold lld` | one variant each (default: the compiler's) |
//! | `tools` | `bolt objcopy patchelf sections` | one variant more for each, processed by it |
//! | `dependency` | `in-callee-only in-caller-too` | where the libraries of `link` are; one variant each |
//! | `input` | text with `\n \t \\ \xNN` | one request; repeated |
//! | `input-repeat` | `N TEXT` | one request: the text N times |
//! | `fused-input` | `TEXT => ANSWER` | a request of fused passes only, and its answer: what would end the callee's own worker |
//! | `warm` | text | a request that makes a callee ready; must not change its state; repeated (default: the first input) |
//! | `expect` | `supported`, `refused CODE` | the outcome |
//! | `because` | text | why it is refused, for the table |
//! | `allow-effects` | `KIND,…` | what the patch is told to allow |
//! | `env`, `caller-env` | `NAME=VALUE` | environment of the callees' or the caller's worker |
//! | `file`, `callee-file` | `NAME=TEXT` | a file in the working directory of all workers, or of the callees' only |
//! | `function` | `NAME=FILE` | a further function, compiled like the main half, or `shared/callee.c` |
//! | `edges` | `Foo>Bar Foo>Baz` | what is fused, in this order (default `Foo>Bar`) |
//! | `fused-calls` | N | fused calls of the first edge per pass (default: one per input) |
//! | `idle` | `Baz …` | functions whose workers must not run in a fused pass |
//! | `ready` | `never` | the callee's initialisers do not end in the caller |
//! | `workers` | N | workers of each function (default 1) |
//! | `worker` | `stripped` | the worker program has no symbols |
//! | `act` | `replace-callee` | done before the patch |

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::fixtures::Compiler;

/// Which half a fixture is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Bar; the caller is the shared one.
    Callee,
    /// Foo; the callee is the shared one.
    Caller,
    /// Both.
    Pair,
}

/// What is to come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expectation {
    /// It is fused, and the answers are those of the RPC.
    Supported,
    /// It is refused with this code.
    Refused(String),
}

impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Supported => f.write_str("supported"),
            Self::Refused(code) => write!(f, "refused: {code}"),
        }
    }
}

/// Which linker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linker {
    /// GNU ld.
    Bfd,
    /// GNU gold.
    Gold,
    /// LLVM's.
    Lld,
}

impl Linker {
    /// As `-fuse-ld` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bfd => "bfd",
            Self::Gold => "gold",
            Self::Lld => "lld",
        }
    }
}

/// A tool that rewrites a finished library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// llvm-bolt: other order of functions and blocks, parts split off.
    Bolt,
    /// objcopy: sections added and removed.
    Objcopy,
    /// patchelf: the dynamic section and string table moved.
    Patchelf,
    /// llvm-strip: no section headers left.
    Sections,
}

impl Tool {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bolt => "bolt",
            Self::Objcopy => "objcopy",
            Self::Patchelf => "patchelf",
            Self::Sections => "sections",
        }
    }
}

/// Where the libraries are that a callee links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dependency {
    /// Only the callee's container has them.
    InCalleeOnly,
    /// The caller has them too: in its container, and loaded by its library.
    InCallerToo,
}

impl Dependency {
    /// As the directive names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::InCalleeOnly => "in-callee-only",
            Self::InCallerToo => "in-caller-too",
        }
    }
}

/// A name and what belongs to it.
pub type Pair = (String, String);

/// All directives of one fixture.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the module's table says it")]
pub struct Directives {
    pub about: String,
    pub kind: String,
    pub role: Role,
    pub compilers: Vec<Compiler>,
    pub flags: Vec<Vec<String>>,
    pub abi_matrix: bool,
    pub link: Vec<String>,
    /// Source file and its own arguments.
    pub libraries: Vec<(String, Vec<String>)>,
    pub plugins: Vec<(String, Vec<String>)>,
    pub linkers: Vec<Linker>,
    pub tools: Vec<Tool>,
    pub dependency: Vec<Dependency>,
    pub inputs: Vec<Vec<u8>>,
    pub fused_inputs: Vec<(Vec<u8>, Vec<u8>)>,
    pub warm: Vec<Vec<u8>>,
    pub expect: Expectation,
    pub because: String,
    pub allow_effects: Option<String>,
    pub env: Vec<Pair>,
    pub caller_env: Vec<Pair>,
    pub files: Vec<Pair>,
    pub callee_files: Vec<Pair>,
    pub functions: Vec<Pair>,
    pub edges: Vec<Pair>,
    pub fused_calls: Option<u64>,
    pub idle: Vec<String>,
    pub never_ready: bool,
    pub workers: u16,
    pub stripped_worker: bool,
    pub replace_callee: bool,
}

impl Directives {
    /// Reads the directives of a source file.
    ///
    /// # Errors
    /// An unknown directive, a value that is none of its kind, or a required
    /// directive that is missing; with file and line.
    pub fn parse(file: &Path, text: &str) -> Result<Self> {
        let mut parsed = Self {
            about: String::new(),
            kind: String::new(),
            role: Role::Callee,
            compilers: Vec::new(),
            flags: Vec::new(),
            abi_matrix: false,
            link: Vec::new(),
            libraries: Vec::new(),
            plugins: Vec::new(),
            linkers: Vec::new(),
            tools: Vec::new(),
            dependency: Vec::new(),
            inputs: Vec::new(),
            fused_inputs: Vec::new(),
            warm: Vec::new(),
            expect: Expectation::Supported,
            because: String::new(),
            allow_effects: None,
            env: Vec::new(),
            caller_env: Vec::new(),
            files: Vec::new(),
            callee_files: Vec::new(),
            functions: Vec::new(),
            edges: Vec::new(),
            fused_calls: None,
            idle: Vec::new(),
            never_ready: false,
            workers: 1,
            stripped_worker: false,
            replace_callee: false,
        };
        let mut role = None;
        for (number, line) in text.lines().enumerate() {
            let Some(directive) = line.trim_start().strip_prefix("//#") else {
                continue;
            };
            let at = || format!("{}:{}", file.display(), number + 1);
            let (key, value) = directive
                .split_once(':')
                .with_context(|| format!("{}: a directive is `//# key: value`", at()))?;
            let value = value.strip_prefix(' ').unwrap_or(value);
            parsed.take(key.trim(), value, &mut role).with_context(at)?;
        }
        let file = file.display();
        parsed.role = role.with_context(|| format!("{file}: no directive `role`"))?;
        ensure!(!parsed.about.is_empty(), "{file}: no directive `about`");
        ensure!(!parsed.kind.is_empty(), "{file}: no directive `kind`");
        ensure!(!parsed.inputs.is_empty(), "{file}: no directive `input`");
        if parsed.flags.is_empty() {
            parsed.flags.push(vec!["-O2".to_owned()]);
        }
        if parsed.compilers.is_empty() {
            parsed.compilers = vec![Compiler::Gcc, Compiler::Clang];
        }
        if parsed.edges.is_empty() {
            parsed.edges.push(("Foo".to_owned(), "Bar".to_owned()));
        }
        if parsed.warm.is_empty() {
            parsed.warm.push(parsed.inputs[0].clone());
        }
        Ok(parsed)
    }

    fn take(&mut self, key: &str, value: &str, role: &mut Option<Role>) -> Result<()> {
        match key {
            "about" => value.clone_into(&mut self.about),
            "kind" => value.clone_into(&mut self.kind),
            "role" => {
                *role = Some(match value {
                    "callee" => Role::Callee,
                    "caller" => Role::Caller,
                    "pair" => Role::Pair,
                    other => bail!("no role: {other}"),
                });
            }
            "compilers" => {
                self.compilers = each(value, |word| match word {
                    "gcc" => Some(Compiler::Gcc),
                    "clang" => Some(Compiler::Clang),
                    _ => None,
                })?;
            }
            "flags" => self.flags.push(words(value)),
            "matrix" => {
                ensure!(value == "abi", "no matrix: {value}");
                self.abi_matrix = true;
            }
            "link" => self.link.extend(words(value)),
            "library" => self.libraries.push(source_and_arguments(value)?),
            "plugin" => self.plugins.push(source_and_arguments(value)?),
            "linker" => {
                self.linkers = each(value, |word| match word {
                    "bfd" => Some(Linker::Bfd),
                    "gold" => Some(Linker::Gold),
                    "lld" => Some(Linker::Lld),
                    _ => None,
                })?;
            }
            "tools" => {
                self.tools = each(value, |word| match word {
                    "bolt" => Some(Tool::Bolt),
                    "objcopy" => Some(Tool::Objcopy),
                    "patchelf" => Some(Tool::Patchelf),
                    "sections" => Some(Tool::Sections),
                    _ => None,
                })?;
            }
            "dependency" => {
                self.dependency = each(value, |word| match word {
                    "in-callee-only" => Some(Dependency::InCalleeOnly),
                    "in-caller-too" => Some(Dependency::InCallerToo),
                    _ => None,
                })?;
            }
            "input" => self.inputs.push(unescape(value)?),
            "input-repeat" => {
                let (count, text) = value.split_once(' ').context("`N TEXT` is wanted")?;
                let count = count.parse().context("a number is wanted")?;
                self.inputs.push(unescape(text)?.repeat(count));
            }
            "fused-input" => {
                let (input, answer) = value
                    .split_once(" => ")
                    .context("`TEXT => ANSWER` is wanted")?;
                self.fused_inputs
                    .push((unescape(input)?, unescape(answer)?));
            }
            "warm" => self.warm.push(unescape(value)?),
            "expect" => {
                self.expect = match value.split_once(' ') {
                    None if value == "supported" => Expectation::Supported,
                    Some(("refused", code)) if !code.trim().is_empty() => {
                        Expectation::Refused(code.trim().to_owned())
                    }
                    _ => bail!("`supported` or `refused CODE` is wanted, not {value:?}"),
                };
            }
            "because" => value.clone_into(&mut self.because),
            "allow-effects" => self.allow_effects = Some(value.to_owned()),
            "env" => self.env.push(pair(value, '=')?),
            "caller-env" => self.caller_env.push(pair(value, '=')?),
            "file" => self.files.push(pair(value, '=')?),
            "callee-file" => self.callee_files.push(pair(value, '=')?),
            "function" => self.functions.push(pair(value, '=')?),
            "edges" => {
                self.edges = value
                    .split_whitespace()
                    .map(|edge| pair(edge, '>'))
                    .collect::<Result<_>>()?;
            }
            "fused-calls" => self.fused_calls = Some(value.parse().context("a number is wanted")?),
            "idle" => self.idle = words(value),
            "ready" => {
                ensure!(value == "never", "`never` is wanted, not {value:?}");
                self.never_ready = true;
            }
            "workers" => self.workers = value.parse().context("a number is wanted")?,
            "worker" => {
                ensure!(value == "stripped", "`stripped` is wanted, not {value:?}");
                self.stripped_worker = true;
            }
            "act" => {
                ensure!(value == "replace-callee", "no act: {value}");
                self.replace_callee = true;
            }
            other => bail!("there is no directive `{other}`"),
        }
        Ok(())
    }

    /// Fused calls of the first edge in one pass over the inputs.
    pub fn fused_calls_per_pass(&self) -> u64 {
        if self.never_ready {
            return 0;
        }
        let inputs = self.inputs.len() + self.fused_inputs.len();
        self.fused_calls.unwrap_or(inputs as u64)
    }
}

fn source_and_arguments(value: &str) -> Result<(String, Vec<String>)> {
    let mut words = words(value).into_iter();
    let source = words.next().context("a library's source file is wanted")?;
    Ok((source, words.collect()))
}

fn words(value: &str) -> Vec<String> {
    value.split_whitespace().map(str::to_owned).collect()
}

fn each<T>(value: &str, known: impl Fn(&str) -> Option<T>) -> Result<Vec<T>> {
    let all: Vec<T> = value
        .split_whitespace()
        .map(|word| known(word).with_context(|| format!("not known: {word}")))
        .collect::<Result<_>>()?;
    ensure!(!all.is_empty(), "a value is wanted");
    Ok(all)
}

fn pair(value: &str, separator: char) -> Result<Pair> {
    let (left, right) = value
        .split_once(separator)
        .with_context(|| format!("`A{separator}B` is wanted, not {value:?}"))?;
    ensure!(!left.is_empty(), "a name is wanted before {separator}");
    Ok((left.to_owned(), right.to_owned()))
}

fn unescape(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match rest.next() {
            Some(b'n') => b'\n',
            Some(b't') => b'\t',
            Some(b'\\') => b'\\',
            Some(b'x') => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                std::str::from_utf8(&digits)
                    .ok()
                    .filter(|d| d.len() == 2)
                    .and_then(|d| u8::from_str_radix(d, 16).ok())
                    .context("two hexadecimal digits are wanted after \\x")?
            }
            _ => bail!("an unknown escape in {text:?}"),
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "//# about: x\n//# kind: k\n//# role: callee\n";

    fn parse(text: &str) -> Result<Directives> {
        Directives::parse(Path::new("fixtures/x/callee.c"), text)
    }

    fn complaint(more: &str) -> String {
        format!("{:#}", parse(&format!("{HEAD}{more}")).unwrap_err())
    }

    #[test]
    fn reads_every_directive() {
        let d = parse(
            "/* A comment. */\n//# about: all of them\n//# kind: Test\n//# role: pair\n\
             //# compilers: clang\n//# flags: -O1 -g\n//# flags: -O3\n//# matrix: abi\n\
             //# link: -lz -lm\n//# library: a.cc -lm\n//# plugin: p.c\n//# linker: bfd lld\n\
             //# tools: bolt patchelf\n//# dependency: in-callee-only in-caller-too\n\
             // an ordinary comment\n//# input: a\\n\\x00\\\\\n//# input:\n\
             //# input-repeat: 3 ab\n//# fused-input: x => -1:\n//# warm: w\n//# expect: refused tls\n//# because: so\n\
             //# allow-effects: files,network\n//# env: A=1=2\n//# caller-env: B=\n\
             //# file: f=x\n//# callee-file: g=y\n//# function: Baz=baz.c\n\
             //# edges: Foo>Bar Bar>Baz\n//# fused-calls: 7\n//# idle: Bar Baz\n\
             //# ready: never\n//# workers: 2\n//# worker: stripped\n//# act: replace-callee\n\
             int x;\n",
        )
        .unwrap();
        assert_eq!((d.about.as_str(), d.role), ("all of them", Role::Pair));
        assert_eq!(d.compilers, [Compiler::Clang]);
        assert_eq!(d.flags, [vec!["-O1", "-g"], vec!["-O3"]]);
        assert_eq!(d.link, ["-lz", "-lm"]);
        assert_eq!(d.libraries, [("a.cc".to_owned(), vec!["-lm".to_owned()])]);
        assert_eq!(d.linkers, [Linker::Bfd, Linker::Lld]);
        assert_eq!(d.tools, [Tool::Bolt, Tool::Patchelf]);
        assert_eq!(d.dependency.len(), 2);
        assert_eq!(
            d.inputs,
            [b"a\n\0\\".to_vec(), Vec::new(), b"ababab".to_vec()]
        );
        assert_eq!(d.fused_inputs, [(b"x".to_vec(), b"-1:".to_vec())]);
        assert_eq!(d.warm, [b"w"]);
        assert_eq!(d.expect, Expectation::Refused("tls".into()));
        assert_eq!(d.allow_effects.as_deref(), Some("files,network"));
        assert_eq!(d.env, [("A".to_owned(), "1=2".to_owned())]);
        assert_eq!(d.edges[1], ("Bar".to_owned(), "Baz".to_owned()));
        assert_eq!((d.fused_calls, d.workers), (Some(7), 2));
        assert!(d.abi_matrix && d.never_ready && d.stripped_worker && d.replace_callee);
        assert_eq!(d.fused_calls_per_pass(), 0);
    }

    #[test]
    fn has_defaults() {
        let d = parse(&format!("{HEAD}//# input: a\n//# input: b\n")).unwrap();
        assert_eq!(d.compilers, [Compiler::Gcc, Compiler::Clang]);
        assert_eq!(d.flags, [vec!["-O2"]]);
        assert_eq!(d.expect, Expectation::Supported);
        assert_eq!(d.edges, [("Foo".to_owned(), "Bar".to_owned())]);
        assert_eq!(d.fused_calls_per_pass(), 2);
    }

    #[test]
    fn complains_with_file_and_line() {
        assert_eq!(
            complaint("//# speed: high\n"),
            "fixtures/x/callee.c:4: there is no directive `speed`"
        );
        for (text, why) in [
            ("//# compilers: icc", "callee.c:4: not known: icc"),
            ("\n//# matrix: all", "callee.c:5: no matrix: all"),
            ("//# expect: refused", "callee.c:4: `supported` or"),
            ("//# input: \\q", "callee.c:4: an unknown escape"),
            ("//# input: \\x1", "two hexadecimal digits"),
            ("//# env: A", "`A=B` is wanted"),
            ("//# input-repeat: x y", "a number is wanted"),
            ("//# ready", "a directive is `//# key: value`"),
        ] {
            let e = complaint(text);
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn misses_what_is_required() {
        for (text, missing) in [
            ("//# kind: k\n//# role: callee\n//# input: a", "about"),
            ("//# about: k\n//# role: callee\n//# input: a", "kind"),
            ("//# about: k\n//# kind: k\n//# input: a", "role"),
            (HEAD, "input"),
        ] {
            let e = parse(text).unwrap_err().to_string();
            assert!(e.contains(&format!("no directive `{missing}`")), "{e}");
        }
    }
}
