//! Our loader beside the machine's own: what it makes of libraries must be
//! what ld.so makes of them.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: to panic is their verdict"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nightgraft_testbed::oracle::{self, Outcome, Program, Verdict};

const PATIENCE: Duration = Duration::from_secs(20);

/// Compiles `source` to `name` in `folder`.
fn compile(folder: &Path, name: &str, source: &str, with: &[&str]) -> PathBuf {
    let file = folder.join(format!("{name}.cc"));
    std::fs::write(&file, source).unwrap();
    let library = folder.join(name);
    let status = Command::new("g++")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&library, &file])
        .args(with)
        .status()
        .unwrap();
    assert!(status.success(), "{name} {with:?}");
    library
}

fn judge(library: &Path) -> Outcome {
    let program = Program::compile().unwrap();
    oracle::judge(&program, library, PATIENCE).unwrap()
}

#[test]
fn libraries_of_this_machine_are_relocated_as_by_ld_so() {
    let libraries = oracle::sample(oracle::standard(), 150);
    assert!(libraries.len() > 50, "{}", libraries.len());
    let program = Program::compile().unwrap();
    let tally = oracle::judge_all(&program, &libraries, 2, PATIENCE, &|outcome| {
        if matches!(outcome.verdict, Verdict::Differ(_)) {
            eprintln!("{outcome}");
        }
    })
    .unwrap();
    println!("{}", tally.table());
    assert_eq!(tally.differ, 0);
    assert!(tally.equal_share() >= 0.95, "{}", tally.table());
}

/// Two libraries that define one inline variable each, under versions of
/// their own: ld.so gives both the one that it relocates first.
#[test]
fn unique_symbols_are_one_whatever_their_versions() {
    let folder = tempfile::tempdir().unwrap();
    let source = "struct S { static int next() { static int number; return ++number; } };";
    let script = |version: &str| {
        let path = folder.path().join(version);
        std::fs::write(&path, format!("{version} {{ *; }};")).unwrap();
        format!("-Wl,--version-script={}", path.display())
    };
    for options in [&[][..], &["-Wl,-Bsymbolic"]] {
        let first = compile(
            folder.path(),
            "liba.so",
            &format!("{source} int a() {{ return S::next(); }}"),
            &[&[&*script("A")][..], options].concat(),
        );
        let second = compile(
            folder.path(),
            "libb.so",
            &format!("{source} int a(); int b() {{ return S::next() + a(); }}"),
            &[
                &[&*script("B"), first.to_str().unwrap()][..],
                &["-Wl,-rpath,$ORIGIN"],
                options,
            ]
            .concat(),
        );
        let outcome = judge(&second);
        assert!(matches!(outcome.verdict, Verdict::Agree), "{outcome}");
        assert_eq!(outcome.images, 2);
    }
}

/// References of all kinds to a library's own variables, to another's and to
/// those of the C and C++ libraries, of which the executable has copies.
const REFERENCES: &str = r#"
    #include <cerrno>
    #include <iostream>
    #include <stdexcept>
    #include <cstring>
    #include <unistd.h>
    extern thread_local int theirs; extern int count; int more();
    thread_local int own = 5; static thread_local char buffer[100]; thread_local std::string text;
    extern "C" void nowhere() __attribute__((weak)); void (*weak)() = nowhere;
    static int one() { return 1; }
    extern "C" { static int (*resolve())() { return one; } int chosen() __attribute__((ifunc("resolve"))); }
    int (*choices[])() = { chosen, more, getpagesize };
    std::ostream *streams[] = { &std::cout, &std::cerr }; int *counts[] = { &count, &count + 1 };
    int *f() { std::cout << text << getpagesize(); buffer[1]++; own += theirs; return own ? &own : &errno; }
    char *g(char *s) { memcpy(s, s + 1, 3); if (!environ) throw std::runtime_error(s); return buffer; }
"#;

#[test]
fn references_of_all_kinds_agree() {
    let folder = tempfile::tempdir().unwrap();
    let other = compile(
        folder.path(),
        "libother.so",
        "thread_local int theirs = 4; int count = 2; int more() { return count; }",
        &["-Wl,--build-id=none"],
    );
    for (options, words) in [
        (&["-Wl,-z,now"][..], 30),
        (&["-mtls-dialect=gnu2", "-Wl,-z,lazy"], 30),
        (&["-fno-plt", "-Wl,-z,pack-relative-relocs"], 30),
        (&["-Wl,-Bsymbolic", "-Wl,--hash-style=sysv"], 30),
        (&["-fvisibility=protected", "-Wl,-z,norelro"], 20),
    ] {
        let all = [options, &[other.to_str().unwrap(), "-Wl,-rpath,$ORIGIN"]].concat();
        let library = compile(folder.path(), "libreferences.so", REFERENCES, &all);
        let outcome = judge(&library);
        assert!(matches!(outcome.verdict, Verdict::Agree), "{outcome}");
        assert!(outcome.words > words, "{options:?}: {}", outcome.words);
        assert_eq!((outcome.images, outcome.static_tls), (2, false));
    }
}

#[test]
fn static_thread_local_storage_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let source = "static thread_local int own; int *f() { return &own; }";
    let library = compile(
        folder.path(),
        "libfixed.so",
        source,
        &["-ftls-model=initial-exec"],
    );
    let outcome = judge(&library);
    assert!(outcome.static_tls, "{outcome}");
    assert!(
        matches!(outcome.verdict, Verdict::Refused { .. }),
        "{outcome}"
    );
}

#[test]
fn the_program_prints_json_last() {
    let oracle = nightgraft_testbed::bin("oracle").unwrap();
    let output = Command::new(oracle)
        .args(["--json", "--only", "libstdc++.so", "--limit", "1"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let json: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&json["libraries"], &json["differ"]),
        (&1.into(), &0.into())
    );
    assert_eq!(json["unloadable_by_reason"]["part of every worker"], 1);
}
