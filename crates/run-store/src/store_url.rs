use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use url::Url;

/// Where a store is: `sqlite:///folder/file.db` or `postgres://user@host/database`.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreUrl {
    Sqlite(PathBuf),
    Postgres(Url),
}

/// Why a text names no store. It does not repeat the text, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "is not the URL of a store: {problem}; use sqlite:///folder/file.db or postgres://user@host/database"
)]
pub struct InvalidStoreUrl {
    problem: String,
}

impl StoreUrl {
    /// A file of SQLite.
    #[must_use]
    pub fn file(path: impl AsRef<Path>) -> Self {
        Self::Sqlite(path.as_ref().to_owned())
    }

    pub(crate) fn is_sqlite(&self) -> bool {
        matches!(self, Self::Sqlite(_))
    }
}

impl FromStr for StoreUrl {
    type Err = InvalidStoreUrl;

    fn from_str(text: &str) -> Result<Self, InvalidStoreUrl> {
        let invalid = |problem: &str| InvalidStoreUrl { problem: problem.to_owned() };
        if let Some(path) = text.strip_prefix("sqlite://") {
            return match path {
                path if path.starts_with('/') && path.len() > 1 && !path.contains(['?', '#']) => {
                    Ok(Self::Sqlite(PathBuf::from(path)))
                }
                _ => Err(invalid("its path must be absolute and have no parameters")),
            };
        }
        let url = Url::parse(text).map_err(|error| invalid(&error.to_string()))?;
        match url.scheme() {
            "postgres" | "postgresql" if is_plain(&url) => Ok(Self::Postgres(url)),
            // Such as what follows a `#` or `/` in a password: it would be shown as something else than a password.
            "postgres" | "postgresql" => {
                Err(invalid("percent-encode the characters that have a meaning in it, such as # and /"))
            }
            other => Err(invalid(&format!("its scheme is `{other}`"))),
        }
    }
}

/// Whether all parts of a URL are what they seem.
fn is_plain(url: &Url) -> bool {
    !url.cannot_be_a_base() && url.fragment().is_none() && !url.path().contains(['@', ':'])
}

impl fmt::Display for StoreUrl {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite://{}", path.display()),
            Self::Postgres(url) => {
                let mut shown = url.clone();
                if shown.password().is_some() {
                    // Cannot fail for a URL with a host, which one with a password has.
                    let _ = shown.set_password(Some("***"));
                }
                shown.set_query(None);
                shown.fmt(f)
            }
        }
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_read_and_shown_without_its_password() {
        for (text, shown) in [
            ("sqlite:///data/espalier.db", "sqlite:///data/espalier.db"),
            ("postgres://me:secret@db:5432/runs?password=secret", "postgres://me:***@db:5432/runs"),
            ("postgresql://me@db/runs", "postgresql://me@db/runs"),
        ] {
            let url: StoreUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), shown);
        }
        for bad in [
            "",
            "runs.db",
            "sqlite://runs.db",
            "sqlite:///a?mode=ro",
            "mysql://x/y",
            "postgres//me:secret@x",
            "postgres:me:secret@x/runs",
            "postgres://me:1#secret@x/runs",
            "postgres://me:1/secret@x/runs",
        ] {
            let error = bad.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
