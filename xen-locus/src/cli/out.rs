//! Tables and JSON on stdout.

use std::io::{self, Write as _};

use serde_json::{json, Value};

use crate::blocker::Blocker;
use crate::error::Error;

/// Writes a line to stdout. A reader that went away is no error of ours.
pub fn line(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// Writes text to stdout as it is.
pub fn text(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// Writes bytes to stdout as they are.
pub fn bytes(bytes: &[u8]) {
    let mut stdout = io::stdout();
    let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
}

/// Writes an object to stdout, with `"schema": 1` in it.
pub fn object(mut value: Value) {
    if let Some(map) = value.as_object_mut() {
        map.insert("schema".into(), 1.into());
    }
    line(&serde_json::to_string_pretty(&value).unwrap_or_default());
}

/// Writes rows under a heading, each column as wide as it must be.
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

/// An address as JSON shows it.
#[must_use]
pub fn address(at: u64) -> Value {
    format!("{at:#x}").into()
}

/// Who is in the way, for people.
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

/// How a failed action is told to a program.
#[must_use]
pub fn failure(error: &Error) -> Value {
    let mut value = json!({ "result": error.result(), "message": error.to_string() });
    if let (Some(blocked), Some(map)) = (error.blocked(), value.as_object_mut()) {
        map.insert("attempts".into(), blocked.attempts.into());
        map.insert("blockers".into(), json!(blocked.blockers));
    }
    value
}
