//! Windows of real libraries, held against what another decoder sees there:
//! GNU objdump's linear sweep.
//!
//! Nothing that objdump takes for a direct branch leads into a window but at
//! its start, nor to filler that a window jumps to or down into it; windows
//! begin and end where its instructions do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nightgraft_patcher::code::{
    Hop, ImageAddress, NoWindow, SiteKind, Target, Window, WindowKind, analyse,
};

/// Libraries that every machine has on which these tests run.
const ALWAYS: [&str; 4] = ["libgcc_s.so.1", "libm.so.6", "libc.so.6", "libstdc++.so.6"];
/// Others, of all kinds: by hand in assembly, C, C++, interpreters.
const IF_THERE: [&str; 12] = [
    "libcrypto.so.3",
    "libthrift-0.17.0.so",
    "libgmp.so.10",
    "libsqlite3.so.0",
    "libssl.so.3",
    "libjpeg.so.62",
    "libpcre2-8.so.0",
    "libz.so.1",
    "libxml2.so.2",
    "libglib-2.0.so.0",
    "libgnutls.so.30",
    "libpython3.11.so.1.0",
];
const FOLDERS: [&str; 3] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
];
/// Those that are there are left out when it has taken so long.
const ENOUGH: Duration = Duration::from_secs(20);

fn find(name: &str) -> Option<PathBuf> {
    let paths = FOLDERS.iter().map(|folder| Path::new(folder).join(name));
    paths.into_iter().find(|path| path.is_file())
}

/// What objdump sees.
#[derive(Default)]
struct Sweep {
    /// Where instructions begin, and what they are.
    instructions: BTreeMap<u64, Kind>,
    /// Calls through a pointer that is no import's.
    calls: BTreeSet<u64>,
    /// Where direct branches lead.
    targets: BTreeSet<u64>,
    /// Symbols.
    symbols: BTreeSet<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Filler,
    /// Nothing falls through behind it.
    Leaves,
    Other,
}

impl Sweep {
    fn of(library: &Path) -> Sweep {
        let output = Command::new("objdump")
            .args(["--disassemble", "--disassemble-zeroes", "--wide"])
            .arg("--no-show-raw-insn")
            .arg(library)
            .env("LC_ALL", "C")
            .output()
            .expect("objdump (binutils)");
        assert!(output.status.success(), "{}", library.display());
        let mut sweep = Sweep::default();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            sweep.read(line);
        }
        assert!(sweep.instructions.len() > 1000, "{}", library.display());
        sweep
    }

    fn read(&mut self, line: &str) {
        // `0000000000026e90 <name>:`, or with a distance where nothing is named.
        if let Some((address, name)) = line.split_once(" <")
            && let Ok(at) = u64::from_str_radix(address, 16)
            && name.ends_with(">:")
            && !name.contains("-0x")
            && !name.contains("+0x")
        {
            self.symbols.insert(at);
        }
        // `   26ec0:\tjmp    26ed0 <name+0x10>`
        let Some((address, text)) = line.split_once(":\t") else {
            return;
        };
        let Ok(at) = u64::from_str_radix(address.trim(), 16) else {
            return;
        };
        const PREFIXES: [&str; 16] = [
            "bnd", "notrack", "rep", "repz", "repnz", "data16", "addr32", "lock", "cs", "ds", "es",
            "ss", "fs", "gs", "rex.W", "rex",
        ];
        let words: Vec<&str> = text.split_whitespace().collect();
        let first = words.iter().position(|word| !PREFIXES.contains(word));
        let (mnemonic, operand) = match first {
            Some(index) => (words[index], words.get(index + 1).copied().unwrap_or("")),
            None => ("", ""),
        };
        let branches = mnemonic.starts_with('j')
            || mnemonic.starts_with("call")
            || mnemonic.starts_with("loop")
            || mnemonic == "xbegin";
        if branches && let Ok(target) = u64::from_str_radix(operand, 16) {
            self.targets.insert(target);
        }
        if mnemonic.starts_with("call") && operand.starts_with('*') && !operand.ends_with("(%rip)")
        {
            self.calls.insert(at);
        }
        let kind = match mnemonic {
            "int3" => Kind::Filler,
            "xchg" if operand == "%ax,%ax" => Kind::Filler,
            _ if mnemonic.starts_with("nop") => Kind::Filler,
            "ret" | "retq" | "jmp" | "jmpq" => Kind::Leaves,
            _ => Kind::Other,
        };
        self.instructions.insert(at, kind);
    }

    /// The instruction that `at` lies in.
    fn around(&self, at: u64) -> Option<(u64, Kind)> {
        let (start, kind) = self.instructions.range(..=at).next_back()?;
        Some((*start, *kind))
    }

    /// Whether every byte of `start..end` is filler's.
    fn is_filler(&self, start: u64, end: u64) -> bool {
        (start..end).all(|at| {
            self.around(at)
                .is_some_and(|(_, kind)| kind == Kind::Filler)
        })
    }

    /// Branches and symbols that lead into `start..end`.
    fn entered(&self, start: u64, end: u64) -> Option<u64> {
        let targets = self.targets.range(start..end);
        targets
            .chain(self.symbols.range(start..end))
            .next()
            .copied()
    }

    /// What is wrong with a window.
    fn complaint(&self, window: &Window) -> Option<String> {
        let start = window.start.0;
        let end = start + window.before.len() as u64;
        let branch = start + u64::from(window.branch);
        for at in [start, branch] {
            if !self.instructions.contains_key(&at) {
                return Some(format!("no instruction begins at {at:#x}"));
            }
        }
        let behind = self.instructions.range(branch + 1..).next();
        let behind = *behind.map_or(&end, |(at, _)| at);
        let jumps = window.kind == WindowKind::Jump;
        if behind != end && !(jumps && behind < end && self.is_filler(behind, end)) {
            return Some(format!(
                "the branch ends at {behind:#x}, the window at {end:#x}"
            ));
        }
        if let Some(to) = self.entered(start + 1, end) {
            return Some(format!("{to:#x} is entered"));
        }
        let hop = window.hop.as_ref()?;
        let (hop, end) = (hop.at.0, hop.at.0 + hop.before.len() as u64);
        if !self.is_filler(hop, end) {
            return Some(format!("{hop:#x} is no filler"));
        }
        // Down from what does not fall through.
        let mut before = self.instructions.range(..hop).rev();
        let mut run = hop;
        let last = loop {
            match before.next() {
                Some((at, Kind::Filler)) => run = *at,
                Some((_, other)) => break *other,
                None => break Kind::Other,
            }
        };
        let (first, _) = self.around(hop)?;
        let run = run.min(first);
        if last != Kind::Leaves {
            return Some(format!(
                "{run:#x} is fallen into, above the filler at {hop:#x}"
            ));
        }
        let entered = self.entered(run, end)?;
        Some(format!(
            "{entered:#x} is entered, above the filler at {hop:#x}"
        ))
    }
}

#[derive(Default)]
struct Counts(BTreeMap<String, usize>);

impl Counts {
    fn add(&mut self, what: impl Into<String>) {
        *self.0.entry(what.into()).or_insert(0) += 1;
    }

    fn of(&self, what: &str) -> usize {
        self.0.get(what).copied().unwrap_or(0)
    }

    fn note(&mut self, kind: SiteKind, window: &Result<Window, NoWindow>) {
        match window {
            Ok(window) => {
                self.add(format!("{:?}", window.kind));
                if window.hop.is_some() {
                    self.add(format!("{:?} through filler", window.kind));
                }
            }
            Err(reason) => {
                let what = match kind {
                    SiteKind::Call | SiteKind::ThunkCall => "call",
                    SiteKind::TailJump | SiteKind::ThunkJump => "jump",
                };
                self.add(format!("no window for a {what}: {}", reason.code()));
            }
        }
    }
}

#[test]
fn no_branch_that_another_decoder_sees_leads_into_a_window() {
    let since = Instant::now();
    let mut all = Counts::default();
    let mut complaints = String::new();
    let paths = ALWAYS.into_iter().chain(IF_THERE).filter_map(|name| {
        let path = find(name);
        assert!(path.is_some() || IF_THERE.contains(&name), "no {name}");
        path
    });
    for path in paths {
        if since.elapsed() > ENOUGH {
            println!("{}: left out", path.display());
            continue;
        }
        let began = Instant::now();
        let map = analyse(&std::fs::read(&path).expect("a file")).expect("a library");
        let survey = map.survey();
        let surveyed = began.elapsed();
        let sweep = Sweep::of(&path);
        let mut counts = Counts::default();
        // But for `_init`, and data that objdump takes for code.
        let ours: BTreeSet<u64> = survey.iter().map(|(at, ..)| at.0).collect();
        let missed: Vec<_> = sweep.calls.difference(&ours).collect();
        assert!(missed.len() <= 4, "{}: {missed:x?}", path.display());
        for (at, kind, window) in &survey {
            counts.note(*kind, window);
            all.note(*kind, window);
            if let Ok(window) = window
                && let Some(complaint) = sweep.complaint(window)
            {
                complaints += &format!("{} {at}: {complaint}\n", path.display());
            }
        }
        println!(
            "{}: {:?} {:?}, {:?}",
            path.display(),
            counts.0,
            surveyed,
            began.elapsed()
        );
    }
    println!("all: {:?} in {:?}", all.0, since.elapsed());
    assert!(complaints.is_empty(), "{complaints}");
    for (what, least) in [
        ("Call", 2000),
        ("JumpedCall", 20),
        ("JumpedCall through filler", 5),
        ("Jump", 20),
    ] {
        assert!(all.of(what) >= least, "{what}: {:?}", all.0);
    }
}

const LISTING: &str = "\
0000000000001000 <f>:
    1000:\tpush   %rbx
    1001:\tcall   *%rax
    1003:\tpop    %rbx
    1004:\tret
    1005:\tdata16 cs nopw 0x0(%rax,%rax,1)
    100c:\tnopl   0x0(%rax)

0000000000001010 <g>:
    1010:\tje     1000 <f>
    1012:\tcall   1010 <g>
    1017:\tret
";

/// What is wrong with a window of [`LISTING`], in which a text was replaced.
fn complaint(old: &str, new: &str, (start, end, hop): (u64, u64, Option<u64>)) -> String {
    assert!(LISTING.contains(old), "{old}");
    let mut sweep = Sweep::default();
    LISTING
        .replace(old, new)
        .lines()
        .for_each(|l| sweep.read(l));
    let window = Window {
        start: ImageAddress(start),
        before: vec![0; (end - start) as usize],
        kind: WindowKind::JumpedCall,
        target: Target::Register(0),
        branch: (0x1001_u64.saturating_sub(start)) as u8,
        hop: hop.map(|at| Hop {
            at: ImageAddress(at),
            before: vec![0; 5],
        }),
    };
    sweep.complaint(&window).unwrap_or_default()
}

#[test]
fn what_is_wrong_with_a_window_is_seen() {
    let plain = (0x1000, 0x1003, None);
    let hops = (0x1001, 0x1003, Some(0x1008));
    for window in [plain, hops] {
        assert_eq!(complaint("", "", window), "");
    }
    let to = |at: u64| format!("je     {at:x}");
    let je = &to(0x1000);
    assert_eq!(complaint(je, &to(0x1001), plain), "0x1001 is entered");
    assert_eq!(complaint(je, &to(0x1002), hops), "0x1002 is entered");
    assert_eq!(complaint(je, &to(0x1001), hops), "", "at its start");
    let symbol = complaint("1010 <g>", "1001 <g>", plain);
    assert_eq!(symbol, "0x1001 is entered");
    for window in [(0x1002, 0x1003, None), (0x1000, 0x1004, None)] {
        assert_ne!(complaint("", "", window), "");
    }
    for at in [0x1005, 0x1008, 0x100c] {
        let entered = format!("{at:#x} is entered, above the filler at 0x1008");
        assert_eq!(complaint(je, &to(at), hops), entered);
    }
    assert_eq!(complaint(je, &to(0x100d), hops), "", "behind it");
    let fallen = "0x1005 is fallen into, above the filler at 0x1008";
    assert_eq!(complaint("1004:\tret", "1004:\tpush   %rbx", hops), fallen);
    let code = complaint("nopl   0x0(%rax)", "mov    %rax,0x0(%rax)", hops);
    assert_eq!(code, "0x1008 is no filler");
}
