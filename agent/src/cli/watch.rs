//! The graph again and again: drawn over on a terminal, one table after another
//! elsewhere.

use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use terminal_size::{Height, Width, terminal_size_of};
use tokio::time::MissedTickBehavior;

use super::{READ_LIMIT, graph};
use crate::api::{self, Graph};
use crate::client::{Client, ClientError};

/// Moves home and clears to the end of the screen.
const REDRAW: &str = "\u{1b}[H\u{1b}[J";

/// Where frames are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Screen {
    /// A terminal of so many characters.
    Terminal {
        /// In a line.
        columns: usize,
        /// Lines.
        rows: usize,
    },
    /// A file or a pipe.
    Paper,
}

impl Screen {
    /// What stdout is now: a window may have been resized meanwhile.
    #[must_use]
    pub fn of_stdout() -> Self {
        let stdout = io::stdout();
        if !stdout.is_terminal() {
            return Self::Paper;
        }
        // A size of nothing is that of a line that does not tell its size.
        let size = terminal_size_of(stdout).filter(|(Width(w), Height(h))| *w > 0 && *h > 0);
        let (columns, rows) = size.map_or((usize::MAX, usize::MAX), |(Width(w), Height(h))| {
            (w.into(), h.into())
        });
        Self::Terminal { columns, rows }
    }
}

/// Shows the graph until nobody reads any more. An interrupt ends the program,
/// as it would without this.
pub(super) async fn watch(
    client: &Client,
    sites: bool,
    every: Duration,
    screen: impl Fn() -> Screen,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let mut looks = tokio::time::interval(every);
    // After a slow answer the next look is a whole interval away.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for first in std::iter::once(true).chain(std::iter::repeat(false)) {
        looks.tick().await;
        let now: Graph = client.get(api::GRAPH, READ_LIMIT).await?;
        let frame = frame(&graph::graph(&now, sites), first, screen());
        // A reader that has gone is no failure, as everywhere.
        let written = out.write_all(frame.as_bytes()).and_then(|()| out.flush());
        if written.is_err() {
            break;
        }
    }
    Ok(())
}

/// What is written to show a text: all of it in one piece, so that it does not
/// flicker.
fn frame(text: &str, first: bool, screen: Screen) -> String {
    match screen {
        Screen::Terminal { columns, rows } => REDRAW.to_owned() + &cut(text, columns, rows),
        Screen::Paper if first => text.to_owned(),
        Screen::Paper => format!("\n{text}"),
    }
}

/// What fits: a terminal that has to scroll keeps what should be drawn over.
fn cut(text: &str, columns: usize, rows: usize) -> String {
    // The cursor ends up in a line of its own.
    let room = rows.saturating_sub(1);
    let lines: Vec<&str> = text.lines().collect();
    let shown = if lines.len() > room {
        room.saturating_sub(1)
    } else {
        lines.len()
    };
    let mut frame = String::with_capacity(text.len());
    for line in &lines[..shown] {
        frame.extend(line.chars().take(columns));
        frame.push('\n');
    }
    if shown < lines.len() {
        let more = format!("… and {} more lines", lines.len() - shown);
        frame.extend(more.chars().take(columns));
        frame.push('\n');
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "A  B\n1  2\n3  4\n";

    #[test]
    fn on_paper_an_empty_line_is_between_tables() {
        assert_eq!(frame(TEXT, true, Screen::Paper), TEXT);
        assert_eq!(frame(TEXT, false, Screen::Paper), format!("\n{TEXT}"));
    }

    #[test]
    fn a_terminal_is_drawn_over() {
        let screen = Screen::Terminal {
            columns: 80,
            rows: 4,
        };
        for first in [true, false] {
            assert_eq!(
                frame(TEXT, first, screen),
                format!("\u{1b}[H\u{1b}[J{TEXT}")
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let on = |columns, rows| frame(TEXT, true, Screen::Terminal { columns, rows });
        assert_eq!(on(80, 3), "\u{1b}[H\u{1b}[JA  B\n… and 2 more lines\n");
        assert_eq!(on(3, 4), "\u{1b}[H\u{1b}[JA  \n1  \n3  \n");
        assert_eq!(on(3, 1), "\u{1b}[H\u{1b}[J… a\n");
    }
}
