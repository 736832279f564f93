//! Messages on stderr, and their words.
//!
//! If one can't be written, because stderr is closed or on a full disk, that is no reason to end: a guest may have been
//! changed.

use std::borrow::Cow;
use std::fmt::{Display, Write as _};
use std::io::{self, Write as _};

/// Says text, [`printable`].
pub fn text(what: impl Display) {
    let text = what.to_string();
    let _ = io::stderr().lock().write_all(printable(&text).as_bytes());
}

/// Says [`one_line`]: who reads a log takes each line for a message of its own.
pub fn line(what: impl Display) {
    let line = what.to_string();
    text(format_args!("{}\n", one_line(&line)));
}

/// Says a line that has this program's name before it.
pub fn warn(what: impl Display) {
    line(format_args!("xen-locus: {what}"));
}

/// A number and its noun: `1 patch`, `2 patches`.
#[must_use]
pub fn count<N: Display + PartialEq + From<u8>>(n: N, one: &str, many: &str) -> String {
    let noun = if n == N::from(1) { one } else { many };
    format!("{n} {noun}")
}

/// Text that a terminal only shows: a guest may have put characters into it that move the cursor or turn the order of
/// letters. Instead of each stands its number, as JSON writes it.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    shown(text, commands)
}

/// The same for text that is one line of a message, one cell of a table or one node of XenStore: it has no line breaks and
/// no tabs either. So a name can't be taken for a line or a column that it is not.
#[must_use]
pub fn one_line(text: &str) -> Cow<'_, str> {
    shown(text, breaks)
}

/// `text` with the numbers of those characters that are `odd` in their place.
fn shown(text: &str, odd: fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(odd) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if odd(c) {
            let _ = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Whether it ends a line or a column, or is a command.
fn breaks(c: char) -> bool {
    commands(c) || matches!(c, '\n' | '\t' | '\u{2028}' | '\u{2029}')
}

/// Whether a terminal may take this for a command.
fn commands(c: char) -> bool {
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns || c.is_control() && c != '\n' && c != '\t'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_as_a_number() {
        assert_eq!(printable("web: one\ttwo\n\u{e4}"), "web: one\ttwo\n\u{e4}");
        assert_eq!(
            printable("a\x1b[2Jb\r\u{7f}\u{9b}\u{202e}"),
            "a\\u001b[2Jb\\u000d\\u007f\\u009b\\u202e"
        );
        assert_eq!(one_line("web \u{e4}"), "web \u{e4}");
        assert_eq!(
            one_line("a\x1b\n2  web2\tb\r\u{2028}\u{85}"),
            "a\\u001b\\u000a2  web2\\u0009b\\u000d\\u2028\\u0085"
        );
        // It stays JSON with the same meaning.
        let name = "x\u{9b}31m\u{202e}";
        let json = serde_json::to_string(name).unwrap();
        let shown = printable(&json);
        assert!(shown.is_ascii(), "{shown}");
        assert_eq!(serde_json::from_str::<String>(&shown).unwrap(), name);
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(0_u64, "patch", "patches"), "0 patches");
        assert_eq!(count(1_u64, "patch", "patches"), "1 patch");
        assert_eq!(count(2_usize, "patch", "patches"), "2 patches");
    }
}
