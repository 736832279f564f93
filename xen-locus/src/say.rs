//! Messages on stderr.
//!
//! That nobody can hear one, for stderr is closed or on a full disk, is no reason to end: a guest may have been changed.

use std::fmt::Display;
use std::io::{self, Write as _};

/// Says text as it is.
pub fn text(what: impl Display) {
    let _ = write!(io::stderr().lock(), "{what}");
}

/// Says a line.
pub fn line(what: impl Display) {
    text(format_args!("{what}\n"));
}

/// Says a line that has this program's name before it.
pub fn warn(what: impl Display) {
    line(format_args!("xen-locus: {what}"));
}
