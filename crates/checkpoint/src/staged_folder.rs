//! A folder that appears under its name only when all of its files are written and on disk.

use crate::FileDigest;
use crate::digest::HashingWriter;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const BUFFER_BYTES: usize = 1 << 20;

/// Why a folder could not be written.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    #[error("`{path}` already exists and is not an empty folder; give another output folder or remove it")]
    Occupied { path: PathBuf },
    #[error("`{path}` is no name for a new folder; give a path that ends in a name")]
    NoName { path: PathBuf },
    #[error("failed to write `{path}`; check the free space and the permissions")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl StageError {
    pub(crate) fn write(path: &Path, cause: io::Error) -> Self {
        Self::Write { path: path.to_owned(), cause }
    }
}

/// Files gathered beside the place where they will be; removed again unless committed.
#[derive(Debug)]
pub(crate) struct StagedFolder {
    out: PathBuf,
    parent: PathBuf,
    staging: TempDir,
    files: Vec<FileDigest>,
}

/// A file of a [`StagedFolder`] that is being written.
pub(crate) struct StagedFile {
    name: String,
    path: PathBuf,
    writer: HashingWriter<BufWriter<File>>,
}

impl StagedFolder {
    /// Starts a folder that [`StagedFolder::commit`] will call `out`, which must not exist or be empty.
    pub(crate) fn create(out: &Path) -> Result<Self, StageError> {
        let no_name = || StageError::NoName { path: out.to_owned() };
        let name = out.file_name().ok_or_else(no_name)?;
        let parent = match out.parent().ok_or_else(no_name)? {
            parent if parent.as_os_str().is_empty() => Path::new("."),
            parent => parent,
        };
        refuse_occupied(out)?;
        fs::create_dir_all(parent).map_err(|cause| StageError::write(parent, cause))?;
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".{}.partial-", name.to_string_lossy());
        builder.prefix(&prefix);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // The finished folder is for whoever the umask lets read, not for this user alone.
            builder.permissions(fs::Permissions::from_mode(0o777));
        }
        let staging = builder.tempdir_in(parent).map_err(|cause| StageError::write(parent, cause))?;
        Ok(Self { out: out.to_owned(), parent: parent.to_owned(), staging, files: Vec::new() })
    }

    /// Where the files are until the commit.
    pub(crate) fn path(&self) -> &Path {
        self.staging.path()
    }

    /// The files finished so far, in the order in which they were.
    pub(crate) fn files(&self) -> &[FileDigest] {
        &self.files
    }

    pub(crate) fn start_file(&self, name: &str) -> Result<StagedFile, StageError> {
        let path = self.path().join(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|cause| StageError::write(&path, cause))?;
        let writer = HashingWriter::new(BufWriter::with_capacity(BUFFER_BYTES, file));
        Ok(StagedFile { name: name.to_owned(), path, writer })
    }

    pub(crate) fn finish_file(&mut self, file: StagedFile) -> Result<(), StageError> {
        let StagedFile { name, path, writer } = file;
        let (buffer, size_bytes, sha256) = writer.finish();
        let finish = || buffer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all();
        finish().map_err(|cause| StageError::write(&path, cause))?;
        self.files.push(FileDigest { name, size_bytes, sha256 });
        Ok(())
    }

    pub(crate) fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), StageError> {
        let mut file = self.start_file(name)?;
        file.append(bytes)?;
        self.finish_file(file)
    }

    /// Gives the folder its name. On an error nothing of it stays behind.
    pub(crate) fn commit(self) -> Result<Vec<FileDigest>, StageError> {
        refuse_occupied(&self.out)?;
        let write_error = |cause| StageError::write(&self.out, cause);
        sync_folder(self.staging.path()).map_err(write_error)?;
        // An empty folder of that name is replaced.
        fs::rename(self.staging.path(), &self.out).map_err(write_error)?;
        let _renamed = self.staging.keep();
        sync_folder(&self.parent).map_err(write_error)?;
        Ok(self.files)
    }
}

impl StagedFile {
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), StageError> {
        self.writer.write_all(bytes).map_err(|cause| StageError::write(&self.path, cause))
    }
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn refuse_occupied(out: &Path) -> Result<(), StageError> {
    let occupied = || StageError::Occupied { path: out.to_owned() };
    match fs::symlink_metadata(out) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(StageError::write(out, cause)),
        Ok(metadata) if !metadata.is_dir() => Err(occupied()),
        Ok(_) => match fs::read_dir(out).map_err(|cause| StageError::write(out, cause))?.next() {
            None => Ok(()),
            Some(_) => Err(occupied()),
        },
    }
}
