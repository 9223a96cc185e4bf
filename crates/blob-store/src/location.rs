use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use url::Url;

/// A folder of blobs: `file:///folder` or `s3://bucket/prefix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// Absolute and without `..`.
    Folder(PathBuf),
    S3 {
        bucket: String,
        /// Without slashes at its ends; empty for the whole bucket.
        prefix: String,
    },
}

/// Why a text is no location.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("is not the URL of a folder: {problem}; use file:///folder or s3://bucket/prefix")]
pub struct InvalidLocation {
    problem: String,
}

impl Location {
    /// Whether `other` is this place or below it.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Folder(root), Self::Folder(path)) => path.starts_with(root),
            (Self::S3 { bucket, prefix }, Self::S3 { bucket: other_bucket, prefix: other_prefix }) => {
                bucket == other_bucket && Path::new(other_prefix).starts_with(prefix)
            }
            (Self::Folder(_), Self::S3 { .. }) | (Self::S3 { .. }, Self::Folder(_)) => false,
        }
    }

    /// A place below this one. `name` has been checked.
    #[must_use]
    pub fn join(&self, name: &str) -> Self {
        match self {
            Self::Folder(path) => Self::Folder(path.join(name)),
            Self::S3 { bucket, prefix } => Self::S3 {
                bucket: bucket.clone(),
                prefix: if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") },
            },
        }
    }
}

impl FromStr for Location {
    type Err = InvalidLocation;

    fn from_str(text: &str) -> Result<Self, InvalidLocation> {
        let invalid = |problem: &str| InvalidLocation { problem: problem.to_owned() };
        // Looked at before the URL is parsed, which would resolve them.
        let rest = text.split_once("://").map(|(_, rest)| rest).ok_or_else(|| invalid("it has no scheme"))?;
        let odd = |byte: u8| byte < 0x20 || byte == 0x7f || matches!(byte, b'\\' | b'%' | b'?' | b'#');
        if rest.bytes().any(odd) {
            return Err(invalid("it has a character that is not allowed in it"));
        }
        if rest.split('/').any(|part| matches!(part, "." | "..")) {
            return Err(invalid("it has a `.` or `..`"));
        }
        if text.starts_with("file://") {
            if !rest.starts_with('/') {
                return Err(invalid("a file has no host"));
            }
            return Ok(Self::Folder(Path::new(rest).components().collect()));
        }
        if !text.starts_with("s3://") {
            return Err(invalid("its scheme is neither `file` nor `s3`"));
        }
        let url = Url::parse(text).map_err(|error| invalid(&error.to_string()))?;
        if url.username() != "" || url.password().is_some() || url.port().is_some() {
            return Err(invalid("credentials and ports do not belong in it"));
        }
        let bucket =
            url.host_str().filter(|host| !host.is_empty()).ok_or_else(|| invalid("it has no bucket"))?;
        let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        // Empty credentials are dropped by the parser, and letters beyond ASCII are escaped.
        if bucket != authority {
            return Err(invalid("what follows `s3://` is not a plain name of a bucket"));
        }
        let prefix = prefix.trim_end_matches('/');
        if prefix.split('/').any(str::is_empty) && !prefix.is_empty() {
            return Err(invalid("it has an empty part"));
        }
        Ok(Self::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "file://{}", path.display()),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

/// What is wrong with the name of a blob below a location.
pub(crate) fn name_problem(name: &str) -> Option<&'static str> {
    let path = Path::new(name);
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > 1024 {
        Some("it is longer than 1024 bytes")
    } else if name.bytes().any(|byte| byte < 0x20 || matches!(byte, 0x7f | b'\\' | b'%' | b'?' | b'#')) {
        Some("it has a character that is not allowed in it")
    } else if name.split('/').any(str::is_empty)
        || !path.components().all(|part| matches!(part, Component::Normal(_)))
        || name.split('/').any(|part| part == ".")
    {
        Some("it is not a plain relative path")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_read_and_shown() {
        for (text, shown) in [
            ("file:///data/runs/", "file:///data/runs"),
            ("file:///data//runs", "file:///data/runs"),
            ("s3://models", "s3://models"),
            ("s3://models/a/b/", "s3://models/a/b"),
        ] {
            assert_eq!(text.parse::<Location>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn tricks_are_refused() {
        for text in [
            "",
            "/data",
            "data",
            "file://host/data",
            "file:///data/../etc",
            "file:///data/%2e%2e/etc",
            "file:///data/./x",
            "file:///a?b",
            "file:///a#b",
            "file:///a\\b",
            "file:///a\0b",
            "FILE:///data",
            "s3://",
            "s3:///x",
            "s3://me:secret@models/x",
            "s3://models:80/x",
            "s3://@models/x",
            "s3://:@models/x",
            "s3://m\u{f6}dels/x",
            "s3://models/../other",
            "s3://models//x",
            "http://models/x",
            "s3://models/%2e%2e/x",
        ] {
            let refused = text.parse::<Location>();
            assert!(refused.is_err(), "{text:?} gave {refused:?}");
        }
    }

    #[test]
    fn a_location_holds_what_is_below_it() {
        let at = |text: &str| text.parse::<Location>().unwrap();
        for (root, below, holds) in [
            ("file:///a", "file:///a/b", true),
            ("file:///a", "file:///ab", false),
            ("s3://m/a", "s3://m/a/b", true),
            ("s3://m/a", "s3://m/ab", false),
            ("s3://m", "s3://m/x", true),
            ("s3://m/a", "s3://n/a/b", false),
            ("file:///", "s3://m", false),
        ] {
            assert_eq!(at(root).holds(&at(below)), holds, "{root} {below}");
        }
        assert_eq!(at("s3://m").join("a").to_string(), "s3://m/a");
        assert_eq!(at("s3://m/x").join("a/b").to_string(), "s3://m/x/a/b");
        assert_eq!(at("file:///x").join("a").to_string(), "file:///x/a");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", "/a", "a/../b", "..", ".", "a//b", "a/", "a\nb", "a\\b", "./a", "a%2e"] {
            assert!(name_problem(name).is_some(), "{name:?}");
        }
        for name in ["a", "a/b.safetensors", "..a", "00000020-1/manifest.json"] {
            assert_eq!(name_problem(name), None, "{name:?}");
        }
    }
}
