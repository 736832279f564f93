//! Tables and JSON on stdout.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::sync::OnceLock;

use serde_json::{json, Value};

use crate::blocker::Blocker;
use crate::error::Error;
use crate::say::printable;

/// Why stdout could not be written, the first time. The command goes on: a guest may have been changed.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Writes a line to stdout, [`printable`].
pub fn line(text: &str) {
    self::text(&format!("{text}\n"));
}

/// Writes text to stdout, [`printable`].
pub fn text(text: &str) {
    bytes(printable(text).as_bytes());
}

/// Writes bytes to stdout as they are. [`lost`] says whether that failed.
pub fn bytes(bytes: &[u8]) {
    let mut stdout = io::stdout();
    note(stdout.write_all(bytes).and_then(|()| stdout.flush()));
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

/// Writes rows under a heading, each column as wide as its widest cell.
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) {
    let mut widths = heading.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let show = |cells: &[&str]| {
        let padded: Vec<String> = cells
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        line(padded.join("  ").trim_end());
    };
    show(&heading);
    for row in rows {
        let cells: Vec<&str> = row.iter().map(String::as_str).collect();
        show(&cells);
    }
}

/// An address in JSON: hex with `0x`, because JSON numbers lose bits over 2^53.
#[must_use]
pub fn address(at: u64) -> Value {
    format!("{at:#x}").into()
}

/// A number and its noun: `1 patch`, `2 patches`.
#[must_use]
pub fn count<N: Display + PartialEq + From<u8>>(n: N, one: &str, many: &str) -> String {
    let noun = if n == N::from(1) { one } else { many };
    format!("{n} {noun}")
}

/// A table of the threads in the way.
#[must_use]
pub fn blockers(all: &[Blocker]) -> String {
    let mut text = format!("  {:>7}  {:<16} {:<17} FUNCTION\n", "PID", "COMM", "REASON");
    for b in all {
        text.push_str(&format!(
            "  {:>7}  {:<16} {:<17} {}+{:#x}\n",
            b.pid,
            b.comm,
            b.reason.to_string(),
            b.function,
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
    use super::count;

    #[test]
    fn one_is_singular() {
        assert_eq!(count(0_u64, "patch", "patches"), "0 patches");
        assert_eq!(count(1_u64, "patch", "patches"), "1 patch");
        assert_eq!(count(2_usize, "patch", "patches"), "2 patches");
    }
}
