//! Patched callers run: the same answers as before, every site passed as
//! often as its RPC is made, over the whole matrix of compilers and options.

#[path = "code/build.rs"]
mod build;
#[path = "code/live.rs"]
mod live;

use std::collections::BTreeMap;

use build::{Build, compile, matrix, matrix_of_exceptions};
use live::{ALONE, Answer, Live};
use nightgraft_patcher::code::{Site, SiteKind, analyse};
use tempfile::TempDir;

/// Every case of `caller.c` with arguments that lead down its branches, short
/// and long inputs, and inputs that make the RPC fail.
fn requests() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for case in b'a'..=b's' {
        for argument in *b"012345c!" {
            all.push(vec![case, argument]);
            let mut long = vec![case, argument];
            long.extend((0..150_u8).map(|i| i.wrapping_mul(7) | 0x80));
            all.push(long);
        }
    }
    all
}

/// How often each name was invoked.
fn invocations(answers: &[Answer], names: &[String]) -> u64 {
    answers
        .iter()
        .flat_map(|a| &a.invoked)
        .filter(|(name, _)| names.contains(name))
        .count() as u64
}

/// Builds, patches, calls and reverts one fixture over the matrix; how many
/// calls passed sites of each kind.
fn run(source: &str, builds: Vec<Build>, requests: &[Vec<u8>]) -> BTreeMap<String, u64> {
    let dir = TempDir::new().expect("a directory");
    let mut kinds = BTreeMap::new();
    for build in builds {
        let library = compile(&dir, source, &build);
        let map = analyse(&std::fs::read(&library).expect("the compiler wrote it"))
            .unwrap_or_else(|error| panic!("{build}: {error}"));
        let alone = ALONE
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut live = Live::load(&library);
        let before = live.serve(requests);
        assert!(before.iter().any(|a| a.code == -1) && before.iter().any(|a| a.code == 0));

        live.patch(&map);
        assert_eq!(live.serve(requests), before, "{build}: patched, flag off");
        assert_eq!(live.entries(), 0, "{build}: the flag was off");
        let sites = map.all_sites();
        let names_of =
            |site: &Site| -> Vec<String> { site.names.iter().map(|n| n.text.clone()).collect() };
        for site in &sites {
            // Compilers may have made several sites of one place.
            let names = names_of(site);
            let passed: u64 = (0..sites.len())
                .filter(|&other| names_of(&sites[other]) == names)
                .map(|other| live.count(other))
                .sum();
            let expected = invocations(&before, &names);
            assert!(
                expected > 0,
                "{build}: no request makes the RPC to {names:?}"
            );
            assert_eq!(passed, expected, "{build}: {} {names:?}", site.at);
            *kinds.entry(format!("{:?}", site.kind)).or_insert(0) += passed;
        }

        live.set_flag(true);
        assert_eq!(live.serve(requests), before, "{build}: patched, flag on");
        assert_eq!(live.entries(), requests.len() as u64, "{build}: the entry");
        assert!(live.returns_here(), "{build}: the return address");

        live.revert();
        let passed: Vec<u64> = (0..live.sites.len()).map(|i| live.count(i)).collect();
        assert_eq!(live.serve(requests), before, "{build}: reverted");
        let after: Vec<u64> = (0..live.sites.len()).map(|i| live.count(i)).collect();
        assert_eq!(after, passed, "{build}: no site leads to a stub any more");
        drop(alone);
    }
    kinds
}

#[test]
fn patched_callers_answer_as_before() {
    let kinds = run("caller.c", matrix("gcc", "clang"), &requests());
    for kind in [
        SiteKind::Call,
        SiteKind::TailJump,
        SiteKind::ThunkCall,
        SiteKind::ThunkJump,
    ] {
        assert!(
            kinds.contains_key(&format!("{kind:?}")),
            "no {kind:?} ran: {kinds:?}"
        );
    }
}

/// Exceptions pass through frames whose sites are patched.
#[test]
fn patched_callers_throw_and_catch_as_before() {
    let mut requests = Vec::new();
    for case in *b"abc" {
        for tail in ["", "x", "!", "xy!z", "0123456789", "!0123456789"] {
            let mut request = vec![case];
            request.extend_from_slice(tail.as_bytes());
            requests.push(request);
        }
    }
    run(
        "caller.cc",
        matrix_of_exceptions("g++", "clang++"),
        &requests,
    );
}
