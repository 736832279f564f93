//! Tables and JSON on stdout.

use std::io;
use std::sync::OnceLock;

use serde_json::{json, Map, Value};

use crate::blocker::Blocker;
use crate::error::Error;
use crate::say::{one_line, printable};

/// Why stdout could not be written, the first time. The command goes on: a guest may have been changed.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Writes a line to stdout, [`printable`].
pub fn line(text: &str) {
    self::text(&format!("{text}\n"));
}

/// Writes text to stdout, [`printable`].
pub fn text(text: &str) {
    note(text_to(&mut io::stdout(), text));
}

/// Writes text to a terminal, [`printable`].
fn text_to(to: &mut impl io::Write, text: &str) -> io::Result<()> {
    bytes_to(to, printable(text).as_bytes())
}

/// Writes bytes to stdout as they are. [`lost`] says whether that failed.
pub fn bytes(bytes: &[u8]) {
    note(bytes_to(&mut io::stdout(), bytes));
}

fn bytes_to(to: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Notes how a write to stdout ended.
pub fn note(written: io::Result<()>) {
    if let Err(error) = written {
        let _ = LOST.set(error);
    }
}

/// Why something is missing on stdout, if so. A reader that has closed its end wanted no more: nothing is missing.
pub fn lost() -> Option<&'static io::Error> {
    let lost = LOST.get();
    lost.filter(|error| error.kind() != io::ErrorKind::BrokenPipe)
}

/// Writes an object to stdout, with `"schema": 1` in it.
pub fn object(mut value: Value) {
    if let Some(map) = value.as_object_mut() {
        map.insert("schema".into(), 1.into());
    }
    line(&serde_json::to_string_pretty(&value).unwrap_or_default());
}

/// Widest column, in characters. A longer cell moves the rest of its row: else one long cell would lengthen all rows, and a
/// guest may have many of both.
const WIDTH_MAX: usize = 120;

/// Writes rows under a heading, each column as wide as its widest cell. A cell is [`one_line`], whatever is in it.
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) {
    aligned(heading, rows, line);
}

/// The lines of such a table.
fn aligned<const N: usize>(heading: [&str; N], rows: &[[String; N]], mut show: impl FnMut(&str)) {
    let cells = |row: &'_ [String; N]| row.each_ref().map(|cell| one_line(cell).into_owned());
    let mut widths = heading.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(&cells(row)) {
            *width = (*width).max(cell.chars().count()).min(WIDTH_MAX);
        }
    }
    let mut padded = |cells: &[String]| {
        let cells = cells.iter().zip(widths);
        let cells = cells.map(|(cell, width)| format!("{cell:<width$}"));
        show(cells.collect::<Vec<_>>().join("  ").trim_end());
    };
    padded(&heading.map(str::to_owned));
    for row in rows {
        padded(&cells(row));
    }
}

/// An object with this list. `json!` would copy all of it.
#[must_use]
pub fn list(name: &str, all: Vec<Value>) -> Value {
    let mut object = Map::new();
    object.insert(name.to_owned(), Value::Array(all));
    Value::Object(object)
}

/// An address in JSON: hex with `0x`, because JSON numbers lose bits over 2^53.
#[must_use]
pub fn address(at: u64) -> Value {
    format!("{at:#x}").into()
}

/// A table of the threads in the way.
#[must_use]
pub fn blockers(all: &[Blocker]) -> String {
    let mut text = format!("  {:>7}  {:<16} {:<17} FUNCTION\n", "PID", "COMM", "REASON");
    for b in all {
        text.push_str(&format!(
            "  {:>7}  {:<16} {:<17} {}+{:#x}\n",
            b.pid,
            one_line(&b.comm),
            b.reason.to_string(),
            one_line(&b.function),
            b.offset
        ));
    }
    text
}

/// A failed action as JSON.
#[must_use]
pub fn failure(error: &Error) -> Value {
    let mut value = json!({ "result": error.result(), "message": error.to_string() });
    if let (Some(blocked), Some(map)) = (error.blocked(), value.as_object_mut()) {
        map.insert("attempts".into(), blocked.attempts.into());
        map.insert("blockers".into(), json!(blocked.blockers));
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocker::Reason;

    #[test]
    fn no_text_on_stdout_commands_a_terminal() {
        let mut shown = Vec::new();
        text_to(&mut shown, "web\u{1b}[2J\u{9b}1m: ready\n").unwrap();
        let shown = String::from_utf8(shown).unwrap();
        assert!(shown.ends_with(": ready\n"), "{shown:?}");
        let odd = |c: char| c.is_control() && c != '\n';
        assert!(!shown.contains(odd), "{shown:?}");
    }

    #[test]
    fn a_cell_is_one_line_of_one_column() {
        let rows = [
            ["web\n9\tdb".into(), "ready".into()],
            ["x".repeat(WIDTH_MAX + 5), "ready".into()],
            ["short".into(), "ready".into()],
        ];
        let mut lines = Vec::new();
        aligned(["Name", "Status"], &rows, |line| {
            lines.push(line.to_owned())
        });
        assert_eq!(lines.len(), 4);
        assert!(
            lines[1].starts_with("web\\u000a9\\u0009db  "),
            "{}",
            lines[1]
        );
        assert_eq!(lines[2], format!("{}  ready", "x".repeat(WIDTH_MAX + 5)));
        // A long cell does not lengthen the others.
        assert_eq!(lines[3].len(), WIDTH_MAX + 2 + "ready".len());
        let blocker = Blocker {
            pid: 7,
            comm: "a\n  8 b".into(),
            reason: Reason::Running,
            function: "f\tg".into(),
            offset: 1,
        };
        assert_eq!(blockers(&[blocker]).lines().count(), 2);
    }
}
