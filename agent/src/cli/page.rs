//! The graph over time as one page for the browser, which needs nothing but
//! itself: `page.html` with the data put in.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use serde::Serialize;

use super::graph;
use crate::api::{Graph, History};

const PAGE: &str = include_str!("page.html");
/// Where the tables go that are shown where scripts are not run.
const TEXT: &str = "{{text}}";
/// Where the data goes, in a `script` element of type `application/json`.
const DATA: &str = "{{data}}";

#[derive(Serialize)]
struct Data<'a> {
    graph: &'a Graph,
    history: &'a History,
}

/// The page.
///
/// # Errors
/// The data does not serialise.
pub(super) fn page(graph: &Graph, history: &History) -> serde_json::Result<String> {
    let data = json(&serde_json::to_string(&Data { graph, history })?);
    let text = html(&graph::graph(graph, false));
    let mut page = String::with_capacity(PAGE.len() + text.len() + data.len());
    let mut rest = PAGE;
    // What was put in is not searched: a function may be called `{{data}}`.
    for (slot, value) in [(TEXT, text), (DATA, data)] {
        let (before, after) = rest.split_once(slot).unwrap_or((rest, ""));
        page.push_str(before);
        page.push_str(&value);
        rest = after;
    }
    page.push_str(rest);
    Ok(page)
}

/// JSON that means the same and can't end the element that it stands in. Such
/// characters occur in strings only.
fn json(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => escaped.push(c),
        }
    }
    escaped
}

fn html(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Writes a file as a whole or not at all.
///
/// # Errors
/// What the system says; or the file is no file that could be replaced.
pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    // A link stays one. Devices and pipes can't be replaced: root would
    // succeed with `/dev/null`.
    let target = match fs::metadata(path) {
        Ok(found) if found.is_file() => path.canonicalize()?,
        Ok(_) => return Err(io::Error::other("it is no ordinary file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(error),
    };
    let Some(name) = target.file_name() else {
        return Err(io::Error::other("it names no file"));
    };
    let mut new_name = std::ffi::OsString::from(".");
    new_name.push(name);
    new_name.push(format!(".{}.new", std::process::id()));
    let new = target.with_file_name(new_name);
    let mut file = OpenOptions::new().write(true).create_new(true).open(&new)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&new, &target));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::super::sample::{self, HOSTILE};
    use super::*;

    const OPEN: &str = "<script type=\"application/json\" id=\"data\">";

    /// The data as a browser finds it: up to whatever ends the element first.
    fn data(page: &str) -> &str {
        let (_, rest) = page.split_once(OPEN).unwrap();
        rest.split_once("</script").unwrap().0
    }

    fn parsed(page: &str) -> (Graph, History) {
        let mut value: serde_json::Value = serde_json::from_str(data(page)).unwrap();
        let mut part = |name: &str| value[name].take();
        (
            serde_json::from_value(part("graph")).unwrap(),
            serde_json::from_value(part("history")).unwrap(),
        )
    }

    #[test]
    fn the_data_can_be_read_out_again() {
        let (graph, history) = (sample::graph(), sample::history());
        let page = page(&graph, &history).unwrap();
        assert_eq!(parsed(&page), (graph, history));
    }

    #[test]
    fn a_name_can_not_break_out() {
        for name in [HOSTILE, "{{data}}", "{{text}}", "]]>", "&lt;", "</ScRiPt >"] {
            let mut graph = sample::graph();
            name.clone_into(&mut graph.nodes[0].function);
            name.clone_into(&mut graph.edges[0].caller);
            graph.notes.push(name.to_owned());
            let mut history = sample::history();
            name.clone_into(&mut history.steps[0].edges[0].callee);
            let page = page(&graph, &history).unwrap();
            for forbidden in ['<', '>', '&', '\u{2028}', '\u{2029}'] {
                assert!(!data(&page).contains(forbidden), "{forbidden:?} of {name}");
            }
            // No element more than the page itself has.
            for tag in ["<", "<!--", "<script", "</script"] {
                let expected = PAGE.matches(tag).count();
                assert_eq!(page.matches(tag).count(), expected, "{tag} of {name}");
            }
            assert_eq!(parsed(&page), (graph, history));
        }
    }

    #[test]
    fn the_page_needs_nothing_but_itself() {
        for outside in [
            "http:", "https:", "//www", " src=", "url(", "@import", "<link",
        ] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
        // Data becomes text, never markup or code.
        for inside in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!PAGE.contains(inside), "{inside}");
        }
        assert_eq!(PAGE.matches(TEXT).count(), 1);
        assert_eq!(PAGE.matches(DATA).count(), 1);
        assert!(PAGE.find(TEXT) < PAGE.find(DATA));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("graph.html");
        write(&file, "first").unwrap();
        let link = dir.path().join("link.html");
        std::os::unix::fs::symlink("graph.html", &link).unwrap();
        write(&link, "second").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "second");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_can_not_be_replaced_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let why = |path: &Path| write(path, "text").unwrap_err().to_string();
        assert_eq!(why(dir.path()), "it is no ordinary file");
        assert_eq!(why(Path::new("/dev/null")), "it is no ordinary file");
        assert!(why(&dir.path().join("none/graph.html")).starts_with("No such file"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
