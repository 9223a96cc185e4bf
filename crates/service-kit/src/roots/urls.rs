//! Places that a request names by URL. What could be read in two ways is refused, never interpreted.

use super::{PathRefused, Roots, RootsError};
use std::fmt;
use std::path::{Path, PathBuf};

const S3: &str = "s3://";

/// A place below a root.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// On a disk, links resolved.
    Path(PathBuf),
    /// In a bucket; the prefix has no slash at either end and may be empty.
    S3 { bucket: String, prefix: String },
}

/// A root in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    bucket: String,
    prefix: String,
}

impl Bucket {
    /// Whether a place lies at or below this one.
    fn holds(&self, other: &Self) -> bool {
        self.bucket == other.bucket
            && (self.prefix.is_empty()
                || other
                    .prefix
                    .strip_prefix(self.prefix.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{S3}{}", self.bucket)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

enum Named {
    Path(PathBuf),
    Bucket(Bucket),
}

impl Roots {
    /// Where something lies that is to be read: a path, `file:///path` or `s3://bucket/prefix`. Looks at the file system
    /// for the first two, and nowhere for the last.
    ///
    /// # Errors
    /// As [`Roots::input`]; when a URL is not plain, or lies below no root.
    pub fn input_url(&self, text: &str) -> Result<Location, PathRefused> {
        self.located(text, |path| self.input(path))
    }

    /// Where something is to be written, as [`Roots::input_url`]; it need not exist.
    ///
    /// # Errors
    /// As [`Roots::output`]; when a URL is not plain, or lies below no root.
    pub fn output_url(&self, text: &str) -> Result<Location, PathRefused> {
        self.located(text, |path| self.output(path))
    }

    fn located(
        &self,
        text: &str,
        check: impl FnOnce(&Path) -> Result<PathBuf, PathRefused>,
    ) -> Result<Location, PathRefused> {
        match parse(text)? {
            Named::Path(path) => check(&path).map(Location::Path),
            Named::Bucket(named) if self.buckets.iter().any(|root| root.holds(&named)) => {
                let Bucket { bucket, prefix } = named;
                Ok(Location::S3 { bucket, prefix })
            }
            Named::Bucket(named) => {
                Err(PathRefused::OutsideUrl { url: named.to_string(), roots: self.listed() })
            }
        }
    }
}

/// Puts `s3` and `//bucket` together again, which the `:` between roots has parted.
pub(super) fn rejoined(roots: &[PathBuf]) -> Vec<PathBuf> {
    let mut joined: Vec<PathBuf> = Vec::new();
    for root in roots {
        match joined.last_mut() {
            Some(last)
                if last.as_os_str() == "s3" && root.as_os_str().as_encoded_bytes().starts_with(b"//") =>
            {
                let mut whole = last.as_os_str().to_owned();
                whole.push(":");
                whole.push(root);
                *last = whole.into();
            }
            Some(_) | None => joined.push(root.clone()),
        }
    }
    joined
}

/// Buckets and folders among roots.
pub(super) fn split(roots: &[PathBuf]) -> Result<(Vec<Bucket>, Vec<PathBuf>), RootsError> {
    let (mut buckets, mut folders) = (Vec::new(), Vec::new());
    for root in roots {
        match root.to_str().filter(|text| text.contains("://")) {
            None => folders.push(root.clone()),
            Some(text) => match parse(text).map_err(RootsError::Url)? {
                Named::Path(path) => folders.push(path),
                Named::Bucket(bucket) => buckets.push(bucket),
            },
        }
    }
    Ok((buckets, folders))
}

fn parse(text: &str) -> Result<Named, PathRefused> {
    let refuse = |problem| Err(PathRefused::Url { url: without_secrets(text), problem });
    if text.bytes().any(|byte| byte < 0x20 || byte == 0x7f) {
        return refuse("it has a control character");
    }
    if text.starts_with('/') {
        return Ok(Named::Path(text.into()));
    }
    let Some((scheme, rest)) = text.split_once(':') else { return Ok(Named::Path(text.into())) };
    // A relative path with a colon looks like this too, and is refused in any case.
    let Some(rest) = rest.strip_prefix("//") else {
        return refuse("it is neither an absolute path nor a URL");
    };
    if rest.contains(['%', '?', '#', '\\']) {
        return refuse("none of `%`, `?`, `#` and `\\` may be in a URL");
    }
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let parts = || path.strip_prefix('/').unwrap_or(path).split('/');
    if parts().any(|part| matches!(part, "." | "..")) {
        return refuse("it has a `.` or `..`");
    }
    let whole = path.strip_suffix('/').unwrap_or(path);
    if whole.contains("//") || whole.ends_with('/') {
        return refuse("it has a double slash");
    }
    match scheme {
        "file" if !authority.is_empty() => refuse("a file's URL has no host: file:///path"),
        "file" if path.is_empty() => refuse("it has no path"),
        "file" => Ok(Named::Path(path.into())),
        "s3" if is_bucket(authority) => Ok(Named::Bucket(Bucket {
            bucket: authority.to_owned(),
            prefix: path.trim_matches('/').to_owned(),
        })),
        "s3" => refuse("its bucket must be 3 to 63 lower-case letters, digits, `-` and `.`"),
        _ => refuse("its scheme must be `file` or `s3`, in lower case"),
    }
}

fn is_bucket(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (3..=63).contains(&name.len())
        && name.bytes().all(|byte| plain(byte) || matches!(byte, b'-' | b'.'))
        && name.bytes().next().is_some_and(plain)
        && name.bytes().next_back().is_some_and(plain)
        && !name.contains("..")
}

/// The text for a message: what stands before an `@` may be a password.
fn without_secrets(text: &str) -> String {
    match (text.split_once("://"), text.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://...@{rest}"),
        (_, Some((_, rest))) => format!("...@{rest}"),
        (_, None) => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_below_a_root_are_found_by_path_and_by_url() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("model")).unwrap();
        let roots = Roots::new(&[real.clone(), "s3://models/team".into(), "s3://everything".into()]).unwrap();
        let at = |name: &str| Location::Path(real.join(name));
        let s3 = |bucket: &str, prefix: &str| Location::S3 { bucket: bucket.into(), prefix: prefix.into() };
        for (text, expected) in [
            (format!("{}/model", real.display()), at("model")),
            (format!("file://{}/model", real.display()), at("model")),
            (format!("file://{}/model/", real.display()), at("model")),
            ("s3://models/team".into(), s3("models", "team")),
            ("s3://models/team/a/b/".into(), s3("models", "team/a/b")),
            ("s3://everything".into(), s3("everything", "")),
            ("s3://everything/x".into(), s3("everything", "x")),
        ] {
            assert_eq!(roots.input_url(&text).unwrap(), expected, "{text}");
            assert_eq!(roots.output_url(&text).unwrap(), expected, "{text}");
        }
        assert_eq!(roots.output_url(&format!("file://{}/new", real.display())).unwrap(), at("new"));
        assert!(matches!(
            roots.input_url(&format!("file://{}/new", real.display())),
            Err(PathRefused::Missing { .. })
        ));
    }

    #[test]
    fn tricks_with_urls_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        let roots = Roots::new(&[real.clone(), "s3://models/team".into()]).unwrap();
        let below = real.display().to_string();
        let texts = [
            format!("file://localhost{below}"),
            format!("file://host{below}"),
            format!("file:{below}"),
            format!("file:/{below}"),
            format!("FILE://{below}"),
            format!("File://{below}"),
            format!("http://{below}"),
            format!("file:///{below}"),
            format!("file://{below}//x"),
            format!("file://{below}/../x"),
            format!("file://{below}/./x"),
            format!("file://{below}/%2e%2e/x"),
            format!("file://{below}/..%2fx"),
            format!("file://{below}?x"),
            format!("file://{below}#x"),
            format!("file://{below}\\..\\x"),
            format!("file://{below}\0"),
            format!("{below}\0"),
            format!("{below}/../x"),
            format!("{below}/x\n"),
            "file://".into(),
            "file:///etc/passwd".into(),
            "s3://".into(),
            "s3:///team".into(),
            "s3:models/team".into(),
            "S3://models/team".into(),
            "s3://Models/team".into(),
            "s3://models/teams".into(),
            "s3://models".into(),
            "s3://models/".into(),
            "s3://models//team".into(),
            "s3://models/team//x".into(),
            "s3://models/team/../x".into(),
            "s3://models/team/..".into(),
            "s3://models/%74eam".into(),
            "s3://models/team?x".into(),
            "s3://models/team#x".into(),
            "s3://models/team\\x".into(),
            "s3://other/team".into(),
            "s3://models:80/team".into(),
            "s3://me:secret@models/team".into(),
            "s3://models@other/team".into(),
            "s3://-models/team".into(),
            String::new(),
            "model".into(),
        ];
        for text in texts {
            let refused = roots.input_url(&text).expect_err(&text);
            assert!(!refused.to_string().contains("secret"), "{refused}");
            assert!(roots.output_url(&text).is_err(), "{text:?} as output");
        }
    }

    #[test]
    fn roots_from_a_variable_may_be_buckets() {
        let parted = ["/models", "s3", "//models/team", "/out"].map(PathBuf::from);
        assert_eq!(rejoined(&parted), ["/models", "s3://models/team", "/out"].map(PathBuf::from));
        for root in ["s3://x", "http://models/x", "s3://models/../x"] {
            assert!(matches!(Roots::new(&[root.into()]), Err(RootsError::Url(_))), "{root}");
        }
    }
}
