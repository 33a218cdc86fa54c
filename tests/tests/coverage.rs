//! The table of what can be fused, in tests: the same code that
//! `cargo xtask coverage` runs.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use nightgraft_testbed::coverage::report::{Report, Verdict};
use nightgraft_testbed::coverage::{self, Options, fixture::Fixture};

fn fixtures() -> PathBuf {
    // As cargo sets it now: a checkout may have been moved since it was built.
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
        .join("fixtures")
}

fn run(only: Option<&str>) -> Result<Report> {
    let options = Options {
        fixtures: fixtures(),
        cache: nightgraft_testbed::bin_dir()?.join("coverage-fixtures"),
        whole: false,
        only: only.map(str::to_owned),
        jobs: 2,
    };
    coverage::run(&options, &|row| {
        eprintln!("{} {}: {}", row.fixture, row.variant, row.verdict().text());
    })
}

#[test]
fn every_fixture_can_be_read() -> Result<()> {
    for fixture in Fixture::all(&fixtures())? {
        let d = &fixture.directives;
        let refused = d.expect != coverage::directives::Expectation::Supported;
        assert_eq!(
            refused,
            d.kind == "Refused",
            "{}: refusals, and only these, are of the kind Refused",
            fixture.name
        );
        assert_eq!(
            refused,
            !d.because.is_empty(),
            "{}: a refusal has its reason",
            fixture.name
        );
    }
    Ok(())
}

#[test]
fn a_callee_with_state_is_supported() -> Result<()> {
    let report = run(Some("relro-tables"))?;
    ensure!(report.is_good(), "{}", report.complaints().join("\n"));
    ensure!(report.rows.len() == 5, "{} rows", report.rows.len());
    let sites = &report.json()["sites"];
    ensure!(sites["in_place"] == 1, "{sites}");
    Ok(())
}

#[test]
fn a_refusal_is_told_from_an_answer() -> Result<()> {
    let report = run(Some("executable-stack"))?;
    ensure!(report.is_good(), "{}", report.complaints().join("\n"));
    ensure!(
        report.rows.iter().all(|r| r.verdict() == Verdict::Refused),
        "{}",
        report.table()
    );
    Ok(())
}

#[test]
fn every_fixture_comes_to_what_it_says() -> Result<()> {
    let report = run(None)?;
    print!("{}", report.table());
    ensure!(report.is_good(), "{}", report.complaints().join("\n"));
    Ok(())
}
