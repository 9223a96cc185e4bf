//! Single safetensors files for the state of a run: complete or absent, and known by their digest.

use crate::digest::HashingWriter;
use crate::mapped_file::MappedFile;
use crate::safetensors_header::{self, Entry};
use crate::staged_folder::sync_folder;
use crate::{Dtype, MapFileError, Sha256Digest};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A tensor to be written: row-major, little-endian.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// A tensor that was read: row-major, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The content of a file of [`write_tensors`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorFile {
    pub tensors: BTreeMap<String, OwnedTensor>,
    pub metadata: BTreeMap<String, String>,
    /// Digest of the file that was read.
    pub sha256: Sha256Digest,
}

/// Why a file of tensors could not be written. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum WriteTensorsError {
    #[error("tensor `{name}` is given twice")]
    GivenTwice { name: String },
    #[error("tensor `{name}` has {actual} bytes, its dtype {dtype} and shape {shape:?} say otherwise")]
    WrongSize { name: String, dtype: Dtype, shape: Vec<usize>, actual: usize },
    #[error("failed to write `{path}`; check the free space and the permissions")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

/// Why a file of tensors could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum ReadTensorsError {
    #[error(transparent)]
    File(#[from] MapFileError),
    #[error(
        "`{path}` has SHA-256 {actual}, expected {expected}; the file was changed or damaged, use another copy"
    )]
    WrongDigest { path: PathBuf, actual: Sha256Digest, expected: Sha256Digest },
    #[error(
        "`{path}`: tensor `{tensor}` has dtype {actual}, expected F32, BF16, F16 or F64; the file is not of our making"
    )]
    UnsupportedDtype { path: PathBuf, tensor: String, actual: String },
}

/// Writes `path` anew or in place of an older file, atomically and durably, and gives its digest.
///
/// The same tensors in the same order with the same metadata give the same bytes.
///
/// # Errors
/// When a tensor's bytes do not fit its shape, names repeat, or the file cannot be written.
pub fn write_tensors(
    path: &Path,
    tensors: &[TensorRef<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<Sha256Digest, WriteTensorsError> {
    let mut names = BTreeSet::new();
    for tensor in tensors {
        if !names.insert(tensor.name) {
            return Err(WriteTensorsError::GivenTwice { name: tensor.name.to_owned() });
        }
        if safetensors_header::data_bytes(tensor.dtype, tensor.shape) != Some(tensor.bytes.len() as u64) {
            return Err(WriteTensorsError::WrongSize {
                name: tensor.name.to_owned(),
                dtype: tensor.dtype,
                shape: tensor.shape.to_vec(),
                actual: tensor.bytes.len(),
            });
        }
    }
    write(path, tensors, metadata).map_err(|cause| WriteTensorsError::Write { path: path.to_owned(), cause })
}

fn write(
    path: &Path,
    tensors: &[TensorRef<'_>],
    metadata: &BTreeMap<String, String>,
) -> io::Result<Sha256Digest> {
    let entries =
        tensors.iter().map(|tensor| Entry { name: tensor.name, dtype: tensor.dtype, shape: tensor.shape });
    let header = safetensors_header::encode(metadata, entries);
    write_atomically(path, |file| {
        let mut writer = HashingWriter::new(file);
        writer.write_all(&header)?;
        for tensor in tensors {
            writer.write_all(tensor.bytes)?;
        }
        Ok(writer.finish().2)
    })
}

/// Writes to a temporary file beside `path`, makes it durable and renames it.
pub(crate) fn write_atomically<T>(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> io::Result<T>,
) -> io::Result<T> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".partial-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder)?;
    let result = content(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_folder(folder)?;
    Ok(result)
}

/// What a file of [`write_tensors`] says of itself, from its header alone.
///
/// # Errors
/// When the file cannot be read or its header is damaged.
pub fn read_tensors_metadata(path: &Path) -> Result<BTreeMap<String, String>, ReadTensorsError> {
    let file = MappedFile::open(path)?;
    let metadata = file.metadata.metadata().iter().flatten();
    Ok(metadata.map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// Reads a file of [`write_tensors`] whole, after checking it against `expected` if that is given.
///
/// # Errors
/// When the file cannot be read, is damaged, or is not the expected one.
pub fn read_tensors(path: &Path, expected: Option<&Sha256Digest>) -> Result<TensorFile, ReadTensorsError> {
    let file = MappedFile::open(path)?;
    let sha256 = Sha256Digest::of(&file.map);
    if let Some(&expected) = expected.filter(|expected| **expected != sha256) {
        return Err(ReadTensorsError::WrongDigest { path: path.to_owned(), actual: sha256, expected });
    }
    let mut tensors = BTreeMap::new();
    for (name, info) in file.metadata.tensors() {
        let Some(dtype) = Dtype::from_safetensors(info.dtype) else {
            let actual = info.dtype.to_string();
            return Err(ReadTensorsError::UnsupportedDtype { path: path.to_owned(), tensor: name, actual });
        };
        // The header has been checked against the length of the file.
        let (start, end) = info.data_offsets;
        let bytes = file.map[file.data_start + start..file.data_start + end].to_vec();
        tensors.insert(name, OwnedTensor { dtype, shape: info.shape.clone(), bytes });
    }
    let metadata = file.metadata.metadata().iter().flatten();
    let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
    Ok(TensorFile { tensors, metadata, sha256 })
}
