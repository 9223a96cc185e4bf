//! Lines on standard output and standard error. A reader that went away, as in `espalier list | head -1`, is no reason to
//! fail, least of all to leave workers behind.

use std::io::Write;

/// A line of the answer, on standard output.
pub(crate) fn say(line: impl AsRef<str>) {
    let _ = writeln!(std::io::stdout(), "{}", line.as_ref());
}

/// A line about what is going on, on standard error.
pub(crate) fn tell(line: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr(), "{}", line.as_ref());
}
