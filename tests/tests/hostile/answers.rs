//! Questions to a Foo, and the right answers.

use anyhow::{Result, ensure};
use nightgraft_testbed::fixtures;

/// What brings a Foo through all of its windows.
pub(crate) const QUESTIONS: [&str; 3] = ["three a bb ccc", "time 1 hello", "hello"];

/// That an answer to one of the questions is right, however it came about.
pub(crate) fn check(question: &str, answer: &[u8]) -> Result<()> {
    let bar = |input: &str| fixtures::bar(input.as_bytes());
    let right = match question.split_once(' ') {
        Some(("three", words)) => {
            let all: Vec<_> = words.split(' ').map(bar).collect();
            answer == [b"Foo:", all.join(&b';').as_slice()].concat()
        }
        // "<nanoseconds> <answer>"
        Some(("time", rest)) => {
            let input = rest.split_once(' ').map_or("", |(_, input)| input);
            answer.splitn(2, |b| *b == b' ').nth(1) == Some(&bar(input))
        }
        _ => answer == fixtures::foo(question.as_bytes()),
    };
    ensure!(right, "{question:?}: {:?}", String::from_utf8_lossy(answer));
    Ok(())
}
