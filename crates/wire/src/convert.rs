//! Messages into domain types and back.
//!
//! `from_pb` takes the path of the message (empty for the outermost) and a collector of violations: it always returns a
//! value, and the collector's `finish` decides whether that value may be used. The functions without a collector do both.

pub mod data;
pub mod mask;
pub mod plan;
pub mod recipe;
pub mod run;
pub mod scores;
pub mod time;

use crate::fields::{Violations, below};
use crate::limits;

/// Reads an enum field: its default when absent, refused when unspecified or unknown.
///
/// `domain` maps a member to the domain, and zero to nothing.
fn enum_field<P, D>(
    value: Option<i32>,
    default: D,
    domain: impl FnOnce(P) -> Option<D>,
    path: &str,
    names: &str,
    found: &mut Violations,
) -> D
where
    P: TryFrom<i32>,
{
    let Some(number) = value else { return default };
    match P::try_from(number).ok().and_then(domain) {
        Some(member) => member,
        None => {
            let what =
                if number == 0 { "is unspecified".to_owned() } else { format!("has no member {number}") };
            found.reject(path, format!("{what}; leave it out for the default, or use {names}"));
            default
        }
    }
}

/// Reads a count that must lie in `1..=most`.
fn count_field(value: Option<u32>, default: usize, most: u32, path: &str, found: &mut Violations) -> usize {
    match value {
        None => default,
        Some(count) if (1..=most).contains(&count) => count as usize,
        Some(count) => {
            found.reject(path, format!("must lie in 1..={most}; got {count}"));
            default
        }
    }
}

/// Checks that a text is there and short enough to be a path or name.
fn required_text(text: &str, path: &str, what: &str, found: &mut Violations) {
    if text.is_empty() {
        found.reject(path, format!("is required: {what}"));
    } else {
        bounded_text(text, path, found);
    }
}

fn bounded_text(text: &str, path: &str, found: &mut Violations) {
    if text.len() > limits::MAX_TEXT_BYTES {
        found.reject(path, format!("must not exceed {} bytes; got {}", limits::MAX_TEXT_BYTES, text.len()));
    } else if text.contains('\0') {
        found.reject(path, "must not contain a zero byte");
    }
}

fn bounded_list(count: usize, path: &str, found: &mut Violations) -> bool {
    let fits = count <= limits::MAX_ENTRIES;
    if !fits {
        found.reject(path, format!("must not hold more than {} entries; got {count}", limits::MAX_ENTRIES));
    }
    fits
}
