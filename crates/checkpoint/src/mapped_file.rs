//! One safetensors file, mapped, its header checked against the file before anything is believed.

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, SafeTensorError};
use serde_json::Value;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The length field before the header.
const LENGTH_BYTES: usize = 8;
/// The limit of the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Why a safetensors file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MapFileError {
    #[error("failed to open `{path}`")]
    Open {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("`{path}` is not a regular file; replace it by the weights")]
    NotAFile { path: PathBuf },
    #[error("`{path}` is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")]
    LfsPointer { path: PathBuf },
    #[error("`{path}` is {actual_bytes} bytes long, expected at least {LENGTH_BYTES}; fetch the file again")]
    TooShort { path: PathBuf, actual_bytes: u64 },
    #[error(
        "`{path}` claims a header of {header_bytes} bytes, at most {limit_bytes} are possible in a file of {file_bytes}; it is truncated or no safetensors file, fetch it again"
    )]
    HeaderTooLong { path: PathBuf, header_bytes: u64, limit_bytes: u64, file_bytes: u64 },
    #[error(
        "`{path}` is {actual_bytes} bytes long, its header describes {expected_bytes}; the file is truncated or was appended to, fetch it again"
    )]
    WrongLength { path: PathBuf, expected_bytes: u64, actual_bytes: u64 },
    #[error(
        "`{path}`: tensor `{tensor}` has data offsets {actual}, which do not follow the tensor before it or do not match its shape; fetch the file again"
    )]
    WrongOffsets { path: PathBuf, tensor: String, actual: String },
    #[error("`{path}` has a broken safetensors header; fetch the file again")]
    Header {
        path: PathBuf,
        #[source]
        cause: SafeTensorError,
    },
}

/// A safetensors file in memory. Element data lies at `data_start` and after.
#[derive(Debug)]
pub(crate) struct MappedFile {
    pub(crate) path: PathBuf,
    pub(crate) map: Mmap,
    pub(crate) data_start: usize,
    pub(crate) metadata: Metadata,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, MapFileError> {
        let map = map_file(path)?;
        check_length_field(path, &map)?;
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(&map).map_err(|cause| explain(path, &map, cause))?;
        Ok(Self { path: path.to_owned(), data_start: LENGTH_BYTES + header_bytes, metadata, map })
    }

    pub(crate) fn release_pages(&self) -> io::Result<()> {
        // SAFETY: the map shares the file's pages and is never written, so that what is dropped is read again as it was.
        unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) }
    }
}

pub(crate) fn map_file(path: &Path) -> Result<Mmap, MapFileError> {
    let open_error = |cause| MapFileError::Open { path: path.to_owned(), cause };
    let file = File::open(path).map_err(open_error)?;
    if !file.metadata().map_err(open_error)?.is_file() {
        return Err(MapFileError::NotAFile { path: path.to_owned() });
    }
    // SAFETY: the map is only read, as bytes, in which any content is valid. A file cut short by another
    // process while it is mapped ends this one by SIGBUS; checkpoints are not edited in place while in use.
    unsafe { Mmap::map(&file) }.map_err(open_error)
}

/// The library checks this too, but says less.
fn check_length_field(path: &Path, bytes: &[u8]) -> Result<(), MapFileError> {
    let file_bytes = bytes.len() as u64;
    let Some(length_field) = bytes.first_chunk::<LENGTH_BYTES>() else {
        return Err(MapFileError::TooShort { path: path.to_owned(), actual_bytes: file_bytes });
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(MapFileError::LfsPointer { path: path.to_owned() });
    }
    let header_bytes = u64::from_le_bytes(*length_field);
    let limit_bytes = MAX_HEADER_BYTES.min(file_bytes - LENGTH_BYTES as u64);
    if header_bytes > limit_bytes {
        return Err(MapFileError::HeaderTooLong {
            path: path.to_owned(),
            header_bytes,
            limit_bytes,
            file_bytes,
        });
    }
    Ok(())
}

/// Adds to the library's error what it leaves out: the lengths and offsets at fault.
fn explain(path: &Path, bytes: &[u8], cause: SafeTensorError) -> MapFileError {
    let path = path.to_owned();
    let header = header_json(bytes);
    let offsets = |tensor: &str| header.as_ref().and_then(|header| header.get(tensor)?.get("data_offsets"));
    if let SafeTensorError::InvalidOffset(tensor) = cause {
        let actual = offsets(&tensor).map_or_else(|| "missing".to_owned(), Value::to_string);
        return MapFileError::WrongOffsets { path, tensor, actual };
    }
    if matches!(cause, SafeTensorError::MetadataIncompleteBuffer) {
        let data_end = header.as_ref().and_then(Value::as_object).and_then(|tensors| {
            tensors.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64()).max()
        });
        let expected_bytes =
            data_end.unwrap_or(0).saturating_add(LENGTH_BYTES as u64).saturating_add(header_length(bytes));
        return MapFileError::WrongLength { path, expected_bytes, actual_bytes: bytes.len() as u64 };
    }
    MapFileError::Header { path, cause }
}

fn header_length(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<LENGTH_BYTES>().map_or(0, |field| u64::from_le_bytes(*field))
}

fn header_json(bytes: &[u8]) -> Option<Value> {
    let length = usize::try_from(header_length(bytes)).ok()?;
    serde_json::from_slice(bytes.get(LENGTH_BYTES..)?.get(..length)?).ok()
}
