//! The fingerprint of what a run was given to read.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// SHA-256, in hexadecimal, over the options in the order of their names and over every row of
/// token ids with its length (little-endian). File names and formats do not enter it: the same
/// tokens in the same rows have the same digest.
pub(crate) fn digest<'a>(options: &BTreeMap<&str, String>, rows: impl Iterator<Item = &'a [u32]>) -> String {
    let mut hasher = Sha256::new();
    hasher.update(b"espalier token rows 1\n");
    for (name, value) in options {
        hasher.update(format!("{name}={value}\n"));
    }
    for row in rows {
        let mut bytes = Vec::with_capacity(8 + row.len() * 4);
        bytes.extend_from_slice(&(row.len() as u64).to_le_bytes());
        for token_id in row {
            bytes.extend_from_slice(&token_id.to_le_bytes());
        }
        hasher.update(&bytes);
    }
    let mut text = String::with_capacity(64);
    for byte in hasher.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
