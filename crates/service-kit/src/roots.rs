//! Paths that a request may name: absolute, below an allowed root, and still there when every link is followed.

mod urls;

pub use urls::Location;

use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

/// The folders below which models, data and outputs may lie.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct RootArgs {
    /// Folder, or s3://bucket/prefix, below which models, data and outputs may lie; may be given more than once
    #[arg(long = "root", env = "ESPALIER_ROOTS", value_name = "DIR", value_delimiter = ':')]
    pub roots: Vec<PathBuf>,
}

impl RootArgs {
    /// The roots, checked.
    ///
    /// # Errors
    /// When there is none, or one is not a folder.
    pub fn open(&self) -> Result<Roots, RootsError> {
        Roots::new(&urls::rejoined(&self.roots))
    }
}

/// Why roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    #[error("no --root is given: name the folders below which models, data and outputs may lie")]
    None,
    #[error("--root `{root}` cannot be opened")]
    Unreadable {
        root: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("--root `{root}` is not a folder")]
    NotAFolder { root: PathBuf },
    #[error("a --root cannot be used")]
    Url(#[source] PathRefused),
}

/// Why a path is refused.
#[derive(Debug, thiserror::Error)]
pub enum PathRefused {
    #[error("`{path}` must be an absolute path")]
    Relative { path: PathBuf },
    #[error("`{path}` must not contain `..`")]
    Parent { path: PathBuf },
    #[error("`{path}` lies below none of the allowed roots ({roots})")]
    Outside { path: PathBuf, roots: String },
    #[error("`{path}` leads out of the allowed roots by a link")]
    Escapes { path: PathBuf },
    #[error("`{path}` does not exist")]
    Missing { path: PathBuf },
    #[error("`{path}` is a link that leads nowhere")]
    DanglingLink { path: PathBuf },
    #[error("`{path}` is not a folder")]
    NotAFolder { path: PathBuf },
    #[error("`{url}` is refused: {problem}; give an absolute path, file:///path or s3://bucket/prefix")]
    Url { url: String, problem: &'static str },
    #[error("`{url}` lies below none of the allowed roots ({roots})")]
    OutsideUrl { url: String, roots: String },
    #[error("`{path}` cannot be looked at")]
    Unreadable {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

/// Allowed roots, each as given and with its links resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    roots: Vec<Root>,
    buckets: Vec<urls::Bucket>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Root {
    given: PathBuf,
    real: PathBuf,
}

impl Roots {
    /// Roots that are folders or `s3://` URLs.
    ///
    /// # Errors
    /// When there is none, or one is neither a folder nor such a URL.
    pub fn new(folders: &[PathBuf]) -> Result<Self, RootsError> {
        if folders.is_empty() {
            return Err(RootsError::None);
        }
        let open = |folder: &PathBuf| {
            let unreadable = |cause| RootsError::Unreadable { root: folder.clone(), cause };
            let real = folder.canonicalize().map_err(unreadable)?;
            if !real.is_dir() {
                return Err(RootsError::NotAFolder { root: folder.clone() });
            }
            Ok(Root { given: std::path::absolute(folder).map_err(unreadable)?, real })
        };
        let (buckets, folders) = urls::split(folders)?;
        Ok(Self { roots: folders.iter().map(open).collect::<Result<_, _>>()?, buckets })
    }

    /// The real path of a file or folder that is to be read. Blocks on the file system.
    ///
    /// # Errors
    /// When the path is relative, has `..`, does not exist, or leads out of the roots.
    pub fn input(&self, path: impl AsRef<Path>) -> Result<PathBuf, PathRefused> {
        let path = path.as_ref();
        self.check_form(path)?;
        match path.canonicalize() {
            Ok(real) if self.hold(&real) => Ok(real),
            Ok(_) => Err(PathRefused::Escapes { path: path.to_owned() }),
            Err(cause) => Err(unreadable(path, cause)),
        }
    }

    /// The real path of a folder that is to be read, whose entries must not lead out of the roots either.
    ///
    /// # Errors
    /// As [`Roots::input`], for the folder and for each entry that is a link.
    pub fn input_folder(&self, path: impl AsRef<Path>) -> Result<PathBuf, PathRefused> {
        let path = path.as_ref();
        let folder = self.input(path)?;
        if !folder.is_dir() {
            return Err(PathRefused::NotAFolder { path: path.to_owned() });
        }
        for entry in folder.read_dir().map_err(|cause| unreadable(path, cause))? {
            let entry = entry.map_err(|cause| unreadable(path, cause))?;
            if entry.file_type().map_err(|cause| unreadable(&entry.path(), cause))?.is_symlink()
                && entry.path().canonicalize().is_ok_and(|real| !self.hold(&real))
            {
                return Err(PathRefused::Escapes { path: entry.path() });
            }
        }
        Ok(folder)
    }

    /// The real path of something that is to be written and need not exist: links are followed as far as it does.
    ///
    /// # Errors
    /// When the path is relative, has `..`, or leads out of the roots.
    pub fn output(&self, path: impl AsRef<Path>) -> Result<PathBuf, PathRefused> {
        let path = path.as_ref();
        self.check_form(path)?;
        for existing in path.ancestors() {
            match existing.symlink_metadata() {
                Ok(metadata) => {
                    let real = existing.canonicalize().map_err(|cause| {
                        if cause.kind() == ErrorKind::NotFound && metadata.is_symlink() {
                            PathRefused::DanglingLink { path: existing.to_owned() }
                        } else {
                            unreadable(existing, cause)
                        }
                    })?;
                    // `existing` is an ancestor of `path`, and the rest has neither links nor `..`.
                    let rest = path.strip_prefix(existing).unwrap_or(Path::new(""));
                    if !self.hold(&real) {
                        return Err(PathRefused::Escapes { path: path.to_owned() });
                    }
                    if rest.as_os_str().is_empty() {
                        return Ok(real);
                    }
                    if !real.is_dir() {
                        return Err(PathRefused::NotAFolder { path: existing.to_owned() });
                    }
                    return Ok(real.join(rest));
                }
                Err(cause) if cause.kind() == ErrorKind::NotFound => {}
                Err(cause) if cause.kind() == ErrorKind::NotADirectory => {}
                Err(cause) => return Err(unreadable(existing, cause)),
            }
        }
        Err(self.outside(path))
    }

    /// Absolute, without `..`, and below a root by its letters.
    fn check_form(&self, path: &Path) -> Result<(), PathRefused> {
        if !path.is_absolute() {
            return Err(PathRefused::Relative { path: path.to_owned() });
        }
        if path.components().any(|component| component == Component::ParentDir) {
            return Err(PathRefused::Parent { path: path.to_owned() });
        }
        if !self.roots.iter().any(|root| path.starts_with(&root.given) || path.starts_with(&root.real)) {
            return Err(self.outside(path));
        }
        Ok(())
    }

    fn hold(&self, real: &Path) -> bool {
        self.roots.iter().any(|root| real.starts_with(&root.real))
    }

    fn outside(&self, path: &Path) -> PathRefused {
        PathRefused::Outside { path: path.to_owned(), roots: self.listed() }
    }

    fn listed(&self) -> String {
        let folders = self.roots.iter().map(|root| root.given.display().to_string());
        folders.chain(self.buckets.iter().map(ToString::to_string)).collect::<Vec<_>>().join(", ")
    }
}

fn unreadable(path: &Path, cause: io::Error) -> PathRefused {
    let path = path.to_owned();
    if matches!(cause.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
        PathRefused::Missing { path }
    } else {
        PathRefused::Unreadable { path, cause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    struct Tree {
        _folder: tempfile::TempDir,
        inside: PathBuf,
        outside: PathBuf,
        roots: Roots,
    }

    fn tree() -> Tree {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        let (inside, outside) = (real.join("inside"), real.join("outside"));
        for path in [inside.join("model"), outside.join("secret")] {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("file"), "x").unwrap();
        }
        let roots = Roots::new(std::slice::from_ref(&inside)).unwrap();
        Tree { _folder: folder, inside, outside, roots }
    }

    #[test]
    fn what_lies_below_a_root_is_allowed() {
        let Tree { inside, roots, .. } = &tree();
        assert_eq!(roots.input(inside.join("model/file")).unwrap(), inside.join("model/file"));
        assert_eq!(roots.input_folder(inside.join("model")).unwrap(), inside.join("model"));
        assert_eq!(roots.output(inside.join("new/deep")).unwrap(), inside.join("new/deep"));
        assert_eq!(roots.output(inside.join("model")).unwrap(), inside.join("model"));
    }

    #[test]
    fn what_does_not_is_refused_whether_or_not_it_exists() {
        let Tree { inside, outside, roots, .. } = &tree();
        symlink(outside.join("secret"), inside.join("link")).unwrap();
        symlink(inside.join("nowhere"), inside.join("dangling")).unwrap();
        symlink(outside.join("new"), inside.join("dangling_out")).unwrap();
        let neighbour = PathBuf::from(format!("{}_other/file", inside.display()));
        for path in [
            PathBuf::from("model"),
            PathBuf::new(),
            inside.join("../outside/secret/file"),
            inside.join("model/../model/file"),
            outside.join("secret/file"),
            outside.join("missing"),
            neighbour,
            inside.join("link"),
            inside.join("link/file"),
            inside.join("link/missing"),
            inside.join("dangling"),
            inside.join("dangling_out"),
            inside.join("dangling_out/deeper"),
            inside.join("model/file/below_a_file"),
            PathBuf::from("/"),
        ] {
            assert!(roots.input(&path).is_err(), "{path:?} as input");
            assert!(roots.output(&path).is_err(), "{path:?} as output");
        }
        assert!(matches!(roots.input(inside.join("missing")), Err(PathRefused::Missing { .. })));
    }

    #[test]
    fn a_file_of_a_model_must_not_be_a_link_to_the_outside() {
        let Tree { inside, outside, roots, .. } = &tree();
        symlink(inside.join("model/file"), inside.join("model/fine")).unwrap();
        assert!(roots.input_folder(inside.join("model")).is_ok());
        symlink(outside.join("secret/file"), inside.join("model/config.json")).unwrap();
        let refused = roots.input_folder(inside.join("model")).unwrap_err();
        assert!(matches!(refused, PathRefused::Escapes { path } if path.ends_with("config.json")));
        assert!(matches!(roots.input_folder(inside.join("model/file")), Err(PathRefused::NotAFolder { .. })));
    }

    #[test]
    fn roots_must_be_there() {
        let Tree { inside, .. } = &tree();
        assert!(matches!(Roots::new(&[]), Err(RootsError::None)));
        assert!(matches!(Roots::new(&[inside.join("missing")]), Err(RootsError::Unreadable { .. })));
        assert!(matches!(Roots::new(&[inside.join("model/file")]), Err(RootsError::NotAFolder { .. })));
    }

    #[test]
    fn a_root_that_is_a_link_allows_paths_through_it() {
        let Tree { inside, outside, .. } = &tree();
        let link = outside.join("to_inside");
        symlink(inside, &link).unwrap();
        let roots = Roots::new(std::slice::from_ref(&link)).unwrap();
        assert_eq!(roots.input(link.join("model/file")).unwrap(), inside.join("model/file"));
        assert_eq!(roots.output(inside.join("new")).unwrap(), inside.join("new"));
    }
}
