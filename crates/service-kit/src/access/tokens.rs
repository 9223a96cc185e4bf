//! The file of tokens that a server accepts.
//!
//! It holds hashes, so that who reads it can call nothing. A token is 32 random bytes: there is nothing to guess, so one
//! round of SHA-256 protects it as well as a slow hash would, and costs nothing at each call.

use super::{Grant, Principal, Role};
use sha2::{Digest, Sha256};
use std::fmt::{self, Write};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use subtle::ConstantTimeEq;

const PREFIX: &str = "espalier_";
const HASH: &str = "sha256:";
const RANDOM_BYTES: usize = 32;
const HASH_BYTES: usize = 32;
const MOST_NAME_BYTES: usize = 64;

/// Why a token file cannot be used. No message holds a word of the file but names and roles.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    #[error("the token file `{path}` cannot be read")]
    Unreadable {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("line {line} of the token file `{path}` is not `name role sha256:hash`")]
    Form { path: PathBuf, line: usize },
    #[error("line {line} of the token file `{path}`: the role must be read, operate, admin or internal")]
    Role { path: PathBuf, line: usize },
    #[error(
        "line {line} of the token file `{path}`: the hash must be 64 hexadecimal digits, never the token itself"
    )]
    Hash { path: PathBuf, line: usize },
    #[error("the token file `{path}` has two lines of the name `{name}`")]
    Twice { path: PathBuf, name: String },
    #[error("a token's name must be 1 to 64 letters, digits and `.-_@`")]
    Name,
    #[error("the system gives no random bytes")]
    NoRandomness,
}

/// Tokens by their hashes.
#[derive(Default)]
pub struct TokenTable {
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    role: Role,
    hash: [u8; HASH_BYTES],
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|entry| (&entry.name, entry.role))).finish()
    }
}

impl TokenTable {
    /// Lines of `name role sha256:hash`; empty ones and those after `#` count for nothing.
    ///
    /// # Errors
    /// When it cannot be read or a line means nothing.
    pub fn read(path: &Path) -> Result<Self, TokenFileError> {
        let text = fs::read_to_string(path)
            .map_err(|cause| TokenFileError::Unreadable { path: path.to_owned(), cause })?;
        let mut entries: Vec<Entry> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let (path, number) = (path.to_owned(), index + 1);
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, role, hash) = match words.as_slice() {
                [] => continue,
                [first, ..] if first.starts_with('#') => continue,
                [name, role, hash] if is_name(name) => (*name, *role, *hash),
                _ => return Err(TokenFileError::Form { path, line: number }),
            };
            let Some(role) = Role::ALL.into_iter().find(|known| known.name() == role) else {
                return Err(TokenFileError::Role { path, line: number });
            };
            let Some(hash) = hash.strip_prefix(HASH).and_then(from_hex) else {
                return Err(TokenFileError::Hash { path, line: number });
            };
            if entries.iter().any(|entry| entry.name == name) {
                return Err(TokenFileError::Twice { path, name: name.to_owned() });
            }
            entries.push(Entry { name: name.to_owned(), role, hash });
        }
        Ok(Self { entries })
    }

    /// Whose token this is. Looks at every entry whole, so that time tells nothing.
    #[must_use]
    pub fn find(&self, token: &[u8]) -> Option<Principal> {
        let hash = Sha256::digest(token);
        let mut found = None;
        for entry in &self.entries {
            if bool::from(entry.hash.as_slice().ct_eq(hash.as_slice())) {
                found = Some(Principal { name: entry.name.clone(), grant: Grant::Role(entry.role) });
            }
        }
        found
    }
}

/// A new token: what its owner keeps, and what the server's file gets.
pub struct NewToken {
    /// Shown once and kept nowhere.
    pub token: String,
    /// The line of the token file.
    pub line: String,
}

impl fmt::Debug for NewToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewToken").field("line", &self.line).finish_non_exhaustive()
    }
}

/// Makes a token for `name`.
///
/// # Errors
/// When the name does not fit into a line, or there is no randomness.
pub fn create_token(name: &str, role: Role) -> Result<NewToken, TokenFileError> {
    if !is_name(name) {
        return Err(TokenFileError::Name);
    }
    let mut random = [0; RANDOM_BYTES];
    wire::tls::provider().secure_random.fill(&mut random).map_err(|_| TokenFileError::NoRandomness)?;
    let token = format!("{PREFIX}{}", hex(&random));
    let hash = hex(&Sha256::digest(token.as_bytes()));
    Ok(NewToken { line: format!("{name} {} {HASH}{hash}", role.name()), token })
}

fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b".-_@".contains(&byte);
    (1..=MOST_NAME_BYTES).contains(&name.len()) && name.bytes().all(fits)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<[u8; HASH_BYTES]> {
    if text.len() != 2 * HASH_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; HASH_BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Result<TokenTable, TokenFileError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        TokenTable::read(file.path())
    }

    #[test]
    fn a_new_token_is_found_by_its_line_alone() {
        let (anna, ben) =
            (create_token("anna", Role::Operate).unwrap(), create_token("ben", Role::Read).unwrap());
        assert_ne!(anna.token, ben.token);
        assert_eq!(anna.token.len(), PREFIX.len() + 2 * RANDOM_BYTES);
        let table = table(&format!("# people\n\n{}\n  {}\n", anna.line, ben.line)).unwrap();
        let found = table.find(anna.token.as_bytes()).unwrap();
        assert_eq!(found, Principal { name: "anna".into(), grant: Grant::Role(Role::Operate) });
        for wrong in
            ["", "espalier_", &anna.line, &anna.token[..anna.token.len() - 1], &format!("{} ", anna.token)]
        {
            assert_eq!(table.find(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn no_token_and_no_hash_is_shown() {
        let new = create_token("anna", Role::Admin).unwrap();
        let hash = new.line.split_once(HASH).unwrap().1;
        let table = table(&new.line).unwrap();
        for shown in [format!("{new:?}"), format!("{table:?}")] {
            assert!(!shown.contains(&new.token), "{shown}");
        }
        assert!(!format!("{table:?}").contains(hash));
        // Someone who puts the token itself into the file must not read it back in a log.
        let error = self::table(&format!("anna admin {}", new.token)).unwrap_err().to_string();
        assert!(error.contains("line 1") && !error.contains(&new.token), "{error}");
    }

    #[test]
    fn lines_that_mean_nothing_are_named() {
        let hash = "0".repeat(64);
        for (text, expected) in [
            (format!("anna read sha256:{hash}\nben read"), "line 2"),
            (format!("anna root sha256:{hash}"), "the role must be"),
            (format!("anna read md5:{hash}"), "the hash must be"),
            (format!("anna read sha256:{}", &hash[1..]), "the hash must be"),
            (format!("an,na read sha256:{hash}"), "line 1"),
            (format!("anna read sha256:{hash}\nanna admin sha256:{hash}"), "two lines of the name `anna`"),
        ] {
            let error = table(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(matches!(create_token("an na", Role::Read), Err(TokenFileError::Name)));
    }
}
