use crate::safetensors_header::{self, Entry};
use crate::staged_folder::{StageError, StagedFile, StagedFolder};
use crate::{Dtype, FileDigest};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

/// Name, element type and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHeader {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// Why a model folder could not be written. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum WriteFolderError {
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error("failed to read `{path}` to copy it")]
    Copy {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("tensor `{name}` is announced twice")]
    AnnouncedTwice { name: String },
    #[error("tensor `{name}` of shape {shape:?} is too large to have a size in bytes")]
    TooLarge { name: String, shape: Vec<usize> },
    #[error("tensor `{actual}` was given, the next one announced is {expected}")]
    OutOfOrder { actual: String, expected: String },
    #[error("tensor `{name}` has {actual} bytes, its dtype and shape say {expected}")]
    WrongSize { name: String, actual: u64, expected: u64 },
    #[error("{missing} announced tensors were not given, `{first}` first")]
    Incomplete { missing: usize, first: String },
}

/// Writes a model folder tensor by tensor; it appears under its name only at [`FolderWriter::commit`].
///
/// Tensors are announced first because a safetensors header stands before the data; then each is given once,
/// in that order, whole or in pieces. No more than one piece is in memory.
pub struct FolderWriter {
    folder: StagedFolder,
    /// Shards not started yet.
    shards: VecDeque<Shard>,
    current: Option<OpenShard>,
}

struct Shard {
    file_name: String,
    tensors: VecDeque<TensorHeader>,
}

struct OpenShard {
    file: StagedFile,
    /// The first of them is being written.
    tensors: VecDeque<TensorHeader>,
    /// Bytes of the first of `tensors` that are written.
    written: u64,
}

impl FolderWriter {
    /// Starts a folder that will be `out`, which must not exist or be empty.
    ///
    /// A shard holds at most `max_shard_bytes` of tensor data, or one tensor if that alone is more. One shard is
    /// `model.safetensors`; several are `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.
    ///
    /// # Errors
    /// When `out` is occupied, cannot be written, or the tensors are not distinct.
    pub fn create(
        out: &Path,
        tensors: Vec<TensorHeader>,
        max_shard_bytes: u64,
    ) -> Result<Self, WriteFolderError> {
        let mut names = BTreeSet::new();
        let mut total_bytes = 0_u64;
        for tensor in &tensors {
            if !names.insert(tensor.name.as_str()) {
                return Err(WriteFolderError::AnnouncedTwice { name: tensor.name.clone() });
            }
            let bytes = safetensors_header::data_bytes(tensor.dtype, &tensor.shape);
            total_bytes = bytes.and_then(|bytes| bytes.checked_add(total_bytes)).ok_or_else(|| {
                WriteFolderError::TooLarge { name: tensor.name.clone(), shape: tensor.shape.clone() }
            })?;
        }
        let mut folder = StagedFolder::create(out)?;
        let shards = shards(tensors, max_shard_bytes);
        if shards.len() > 1 {
            folder.write_file("model.safetensors.index.json", index_json(&shards, total_bytes).as_bytes())?;
        }
        let mut writer = Self { folder, shards, current: None };
        writer.advance()?;
        Ok(writer)
    }

    /// Gives the next announced tensor whole.
    ///
    /// # Errors
    /// When it is not the next one, not of the announced size, or cannot be written.
    pub fn add_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteFolderError> {
        if let Some(header) = self.next_tensor().filter(|header| header.name == name) {
            let expected = byte_count(header);
            if bytes.len() as u64 != expected {
                let name = name.to_owned();
                return Err(WriteFolderError::WrongSize { name, actual: bytes.len() as u64, expected });
            }
        }
        self.append(name, bytes)
    }

    /// Gives the next piece of the next announced tensor; it is done when all of its bytes are given.
    ///
    /// # Errors
    /// When `name` is not the next one, the piece goes beyond its end, or it cannot be written.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteFolderError> {
        let expected = self.next_tensor().map(|header| format!("`{}`", header.name));
        let Some(shard) = self.current.as_mut() else { return Err(out_of_order(name, None)) };
        let Some(header) = shard.tensors.front().filter(|header| header.name == name) else {
            return Err(out_of_order(name, expected));
        };
        let size = byte_count(header);
        let written = shard.written + bytes.len() as u64;
        if written > size {
            return Err(WriteFolderError::WrongSize {
                name: name.to_owned(),
                actual: written,
                expected: size,
            });
        }
        shard.file.append(bytes)?;
        shard.written = written;
        if written == size {
            self.advance_tensor()?;
        }
        Ok(())
    }

    /// Adds a small file with this content.
    ///
    /// # Errors
    /// When it cannot be written or is there already.
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteFolderError> {
        Ok(self.folder.write_file(name, bytes)?)
    }

    /// Adds a small file with this object, indented.
    ///
    /// # Errors
    /// As [`FolderWriter::write_file`].
    pub fn write_json(&mut self, name: &str, object: &Map<String, Value>) -> Result<(), WriteFolderError> {
        self.write_file(name, pretty(object).as_bytes())
    }

    /// Adds a copy of a file under its own name.
    ///
    /// # Errors
    /// When it cannot be read or the copy cannot be written.
    pub fn copy_file(&mut self, source: &Path) -> Result<(), WriteFolderError> {
        let bytes =
            fs::read(source).map_err(|cause| WriteFolderError::Copy { path: source.to_owned(), cause })?;
        let name = source.file_name().unwrap_or_default().to_string_lossy();
        self.write_file(&name, &bytes)
    }

    /// Size and digest of every file finished so far. A shard is finished with its last tensor.
    #[must_use]
    pub fn files(&self) -> &[FileDigest] {
        self.folder.files()
    }

    /// Where the files are until the commit, so that they can be checked before they count.
    #[must_use]
    pub fn staging_path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes `config.json`, copies `companions` (see `ModelFolder::companion_files`) and commits.
    ///
    /// # Errors
    /// As [`FolderWriter::write_file`], [`FolderWriter::copy_file`] and [`FolderWriter::commit`].
    pub fn finish(
        mut self,
        config: &Map<String, Value>,
        companions: &[PathBuf],
    ) -> Result<Vec<FileDigest>, WriteFolderError> {
        self.write_json("config.json", config)?;
        for companion in companions {
            self.copy_file(companion)?;
        }
        self.commit()
    }

    /// Gives the folder its name, with all of its files on disk.
    ///
    /// # Errors
    /// When tensors are missing, or the name was taken meanwhile.
    pub fn commit(self) -> Result<Vec<FileDigest>, WriteFolderError> {
        let waiting = self.shards.iter().map(|shard| &shard.tensors);
        let mut missing = self.current.iter().map(|shard| &shard.tensors).chain(waiting).flatten();
        if let Some(first) = missing.next() {
            let first = first.name.clone();
            return Err(WriteFolderError::Incomplete { missing: 1 + missing.count(), first });
        }
        Ok(self.folder.commit()?)
    }

    fn next_tensor(&self) -> Option<&TensorHeader> {
        self.current.as_ref()?.tensors.front()
    }

    fn advance_tensor(&mut self) -> Result<(), WriteFolderError> {
        if let Some(shard) = self.current.as_mut() {
            shard.tensors.pop_front();
            shard.written = 0;
        }
        self.advance()
    }

    /// Passes over empty tensors, finishes a shard that is full and starts the next one.
    fn advance(&mut self) -> Result<(), WriteFolderError> {
        loop {
            if let Some(shard) = self.current.as_mut() {
                while shard.tensors.front().is_some_and(|header| byte_count(header) == 0) {
                    shard.tensors.pop_front();
                }
                if !shard.tensors.is_empty() {
                    return Ok(());
                }
            }
            if let Some(shard) = self.current.take() {
                self.folder.finish_file(shard.file)?;
            }
            let Some(Shard { file_name, tensors }) = self.shards.pop_front() else { return Ok(()) };
            let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
            let entries = tensors.iter().map(|header| Entry {
                name: &header.name,
                dtype: header.dtype,
                shape: &header.shape,
            });
            let mut file = self.folder.start_file(&file_name)?;
            file.append(&safetensors_header::encode(&metadata, entries))?;
            self.current = Some(OpenShard { file, tensors, written: 0 });
        }
    }
}

/// JSON as it stands in a file: indented, with a line end.
pub(crate) fn pretty(object: &Map<String, Value>) -> String {
    format!("{:#}\n", Value::Object(object.clone()))
}

fn out_of_order(actual: &str, expected: Option<String>) -> WriteFolderError {
    let expected = expected.unwrap_or_else(|| "none".to_owned());
    WriteFolderError::OutOfOrder { actual: actual.to_owned(), expected }
}

/// [`FolderWriter::create`] has checked that this is a number.
fn byte_count(header: &TensorHeader) -> u64 {
    safetensors_header::data_bytes(header.dtype, &header.shape).unwrap_or(0)
}

/// Fills shards in order. At least one, even when there is no tensor.
fn shards(tensors: Vec<TensorHeader>, max_shard_bytes: u64) -> VecDeque<Shard> {
    let mut parts: Vec<VecDeque<TensorHeader>> = vec![VecDeque::new()];
    let mut filled_bytes = 0;
    for tensor in tensors {
        let bytes = byte_count(&tensor);
        if filled_bytes > 0 && filled_bytes + bytes > max_shard_bytes {
            parts.push(VecDeque::new());
            filled_bytes = 0;
        }
        filled_bytes += bytes;
        if let Some(part) = parts.last_mut() {
            part.push_back(tensor);
        }
    }
    let count = parts.len();
    parts
        .into_iter()
        .enumerate()
        .map(|(index, tensors)| {
            let file_name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            Shard { file_name, tensors }
        })
        .collect()
}

fn index_json(shards: &VecDeque<Shard>, total_bytes: u64) -> String {
    let mut weight_map = Map::new();
    for shard in shards {
        for tensor in &shard.tensors {
            weight_map.insert(tensor.name.clone(), Value::from(shard.file_name.as_str()));
        }
    }
    format!("{:#}\n", json!({ "metadata": { "total_size": total_bytes }, "weight_map": weight_map }))
}
