//! Paths of this machine, checked before anything is started.

use crate::failure::{Failure, OrBadInput};
use crate::run_file::TextFile;
use anyhow::Context;
use checkpoint::ModelFolder;
use model_spec::ModelSpec;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A model folder that can be opened, without links in its path.
///
/// # Errors
/// When it is not there or not a model that we read, named by file, field or tensor.
pub(crate) fn model(folder: &Path) -> Result<(PathBuf, ModelSpec), Failure> {
    let real = real_path(folder, "the model folder").or_bad_input()?;
    let opened = ModelFolder::open(&real).or_bad_input()?;
    // Headers alone are read here; what the weights hold is for the workers to judge.
    opened.open_weights().or_bad_input()?;
    let spec = opened.spec().clone();
    Ok((real, spec))
}

/// The same texts without links in their paths.
///
/// # Errors
/// When one is not a file or is empty.
pub(crate) fn texts(files: &mut [TextFile]) -> Result<(), Failure> {
    for file in files {
        let real = real_path(&file.path, "the text").or_bad_input()?;
        let about = std::fs::metadata(&real)
            .with_context(|| format!("failed to look at `{}`", real.display()))
            .or_bad_input()?;
        if !about.is_file() {
            return Err(Failure::bad_input(format!("the text `{}` is not a file", file.path.display())));
        }
        if about.len() == 0 {
            return Err(Failure::bad_input(format!("the text `{}` is empty", file.path.display())));
        }
        file.path = real;
    }
    Ok(())
}

/// The same task files without links in their paths.
///
/// # Errors
/// When one is not a file or is empty.
pub(crate) fn tasks(files: &mut [PathBuf]) -> Result<(), Failure> {
    for file in files {
        let mut one = [TextFile { path: file.clone(), field: None, format: None }];
        texts(&mut one)?;
        let [TextFile { path, .. }] = one;
        *file = path;
    }
    Ok(())
}

fn real_path(path: &Path, what: &str) -> anyhow::Result<PathBuf> {
    path.canonicalize().with_context(|| format!("{what} `{}` cannot be opened", path.display()))
}

/// Creates `folder`, which must not exist or be empty, and returns it without links.
///
/// # Errors
/// When it holds something, is no folder, or cannot be created.
pub(crate) fn new_folder(folder: &Path) -> Result<PathBuf, Failure> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                let message = format!(
                    "the output folder `{}` is not empty: name a new one, or remove what is in it",
                    folder.display()
                );
                return Err(Failure::bad_input(message));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("failed to create the output folder `{}`", folder.display()))
                .or_bad_input()?;
        }
        Err(error) => {
            let message = format!("the output folder `{}` cannot be used", folder.display());
            return Err(error).context(message).or_bad_input();
        }
    }
    real_path(folder, "the output folder").or_bad_input()
}

/// The folders that must be open to the services: those of the model, of files that it links to, and of texts and tasks.
#[must_use]
pub(crate) fn roots<'a>(model: &Path, texts: impl Iterator<Item = &'a Path>) -> BTreeSet<PathBuf> {
    let mut roots = BTreeSet::from([model.to_owned()]);
    // Download caches keep a model's files elsewhere and link to them.
    for entry in std::fs::read_dir(model).into_iter().flatten().flatten() {
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        if is_link && let Ok(real) = entry.path().canonicalize() {
            roots.extend(real.parent().map(Path::to_owned));
        }
    }
    roots.extend(texts.filter_map(|path| path.parent().map(Path::to_owned)));
    roots
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_folder_is_new_or_empty() {
        let folder = tempfile::tempdir().unwrap();
        let new = folder.path().join("a/b");
        assert!(new_folder(&new).unwrap().is_dir());
        assert!(new_folder(&new).is_ok(), "an empty folder serves");
        std::fs::write(new.join("file"), "x").unwrap();
        let full = new_folder(&new).unwrap_err();
        assert!(matches!(&full, Failure::BadInput(_)) && full.to_string().contains("not empty"), "{full}");
        assert!(new_folder(&new.join("file/below")).is_err());
        assert!(new_folder(&new.join("file")).is_err());
    }

    #[test]
    fn links_of_a_model_open_the_folder_they_lead_to() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        let (model, blobs) = (real.join("model"), real.join("blobs"));
        std::fs::create_dir_all(&model).unwrap();
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join("1"), "{}").unwrap();
        std::os::unix::fs::symlink(blobs.join("1"), model.join("config.json")).unwrap();
        let text = real.join("text/a.txt");
        assert_eq!(
            roots(&model, [text.as_path()].into_iter()),
            BTreeSet::from([blobs, model, real.join("text")])
        );
    }
}
