use crate::mapped_file::MappedFile;
use crate::tensor_name::{LM_HEAD, required_tensors};
use crate::{Dtype, MapFileError, TensorView};
use model_spec::ModelSpec;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The weights of a model, mapped. A clone shares the maps and keeps them alive.
#[derive(Debug, Clone)]
pub struct Weights {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Location>,
}

#[derive(Debug)]
struct Location {
    file_index: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// Why the weights of a folder are not those of its `config.json`.
#[derive(Debug, thiserror::Error)]
pub enum OpenWeightsError {
    #[error("`{folder}` has no weights; expected `{SINGLE_FILE}`, or `{INDEX_FILE}` with its shards")]
    NoWeights { folder: PathBuf },
    #[error("`{folder}` holds shards such as `{shard}` but no `{INDEX_FILE}`; fetch the index too")]
    NoIndex { folder: PathBuf, shard: String },
    #[error(
        "`{path}` is a pickle, which can run code when it is read, so it is never opened; convert it to safetensors with `transformers` (`save_pretrained`)"
    )]
    OnlyPickle { path: PathBuf },
    #[error("`{path}` is GGUF, not safetensors; convert it first: `espalier import --gguf {path} --out DIR`")]
    OnlyGguf { path: PathBuf },
    #[error("failed to read `{path}`")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("`{path}` is not valid JSON at line {line}, column {column}; fetch it again")]
    BrokenIndex {
        path: PathBuf,
        line: usize,
        column: usize,
        #[source]
        cause: serde_json::Error,
    },
    #[error("`{path}`: {problem}; fetch it again")]
    WrongIndex { path: PathBuf, problem: String },
    #[error("shard `{path}` is missing, `{INDEX_FILE}` names it for tensor `{tensor}`; fetch it")]
    MissingShard { path: PathBuf, tensor: String },
    #[error(transparent)]
    File(#[from] MapFileError),
    #[error(
        "shard `{path}` lacks tensor `{tensor}`, which `{INDEX_FILE}` says it holds; fetch both files again"
    )]
    NotInShard { path: PathBuf, tensor: String },
    #[error(
        "shard `{path}` holds tensor `{tensor}`, which `{INDEX_FILE}` does not list; fetch both files again"
    )]
    NotInIndex { path: PathBuf, tensor: String },
    #[error("tensor `{tensor}` is in both `{first}` and `{second}`; remove one of them")]
    Duplicate { tensor: String, first: PathBuf, second: PathBuf },
    #[error("`{place}` lacks tensor `{tensor}` of shape {expected:?}, which `config.json` calls for{advice}")]
    MissingTensor { place: PathBuf, tensor: String, expected: Vec<usize>, advice: &'static str },
    #[error(
        "`{path}`: tensor `{tensor}` has shape {actual:?}, `config.json` says {expected:?}; the two files are not of the same model"
    )]
    ShapeMismatch { path: PathBuf, tensor: String, expected: Vec<usize>, actual: Vec<usize> },
    #[error(
        "`{path}`: tensor `{tensor}` has dtype {actual}, supported are F32, BF16, F16 and F64; convert the model to one of them"
    )]
    UnsupportedDtype { path: PathBuf, tensor: String, actual: String },
    #[error("`{path}` holds the bias `{tensor}`; models with biases are not supported")]
    UnexpectedBias { path: PathBuf, tensor: String },
    #[error(
        "`{path}` holds tensor `{tensor}`, which no model of this `config.json` has; the two files are not of the same model"
    )]
    UnexpectedTensor { path: PathBuf, tensor: String },
}

impl Weights {
    /// Maps the weights of `folder` and checks them against `spec`. No element is read; see [`crate::check_finite`].
    ///
    /// # Errors
    /// Names the file and tensor at fault, what was expected and what to do.
    pub fn open(folder: &Path, spec: &ModelSpec) -> Result<Self, OpenWeightsError> {
        let single = folder.join(SINGLE_FILE);
        let index = folder.join(INDEX_FILE);
        let (place, files) = if single.is_file() {
            (single.clone(), vec![MappedFile::open(&single)?])
        } else if index.is_file() {
            (index.clone(), open_shards(folder, &index)?)
        } else {
            return Err(no_weights(folder));
        };
        let mut inner = Inner { tensors: BTreeMap::new(), files };
        check_against(spec, &place, &mut inner)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A tensor of the spec, where it lies in its file; `None` for any other name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, location) = self.inner.tensors.get_key_value(name)?;
        let bytes = self.inner.files.get(location.file_index)?.map.get(location.start..location.end)?;
        Some(TensorView { name, dtype: location.dtype, shape: &location.shape, bytes })
    }

    /// Names of the tensors of the spec, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.inner.tensors.keys().map(String::as_str)
    }

    /// Paths of the mapped files.
    pub fn file_paths(&self) -> impl Iterator<Item = &Path> {
        self.inner.files.iter().map(|file| file.path.as_path())
    }

    /// Gives back the pages read so far, which count as this process's memory until then. What is needed again is read
    /// again, from the page cache while it lies there.
    ///
    /// # Errors
    /// When the system refuses; nothing is lost then but memory.
    pub fn release_pages(&self) -> io::Result<()> {
        self.inner.files.iter().try_for_each(MappedFile::release_pages)
    }

    /// Bytes of all tensors of the spec.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.inner.tensors.values().map(|location| (location.end - location.start) as u64).sum()
    }
}

/// Fills `inner.tensors` with the tensors of the spec, each checked.
fn check_against(spec: &ModelSpec, place: &Path, inner: &mut Inner) -> Result<(), OpenWeightsError> {
    let mut found = HashMap::new();
    for (file_index, file) in inner.files.iter().enumerate() {
        for (tensor, info) in file.metadata.tensors() {
            found.insert(tensor, (file_index, info));
        }
    }
    let mut names: Vec<&String> = found.keys().collect();
    names.sort_unstable();
    if let Some(bias) = names.iter().find(|name| name.ends_with(".bias")) {
        let path = inner.files[found[*bias].0].path.clone();
        return Err(OpenWeightsError::UnexpectedBias { path, tensor: (*bias).clone() });
    }
    let required: BTreeMap<String, Vec<usize>> = required_tensors(spec).into_iter().collect();
    for (tensor, expected) in &required {
        let Some(&(file_index, info)) = found.get(tensor) else {
            let advice = match tensor.as_str() {
                LM_HEAD => "; if the head is tied to the embedding, set `tie_word_embeddings` to true there",
                _ => "; fetch the complete model",
            };
            let (place, tensor, expected) = (place.to_owned(), tensor.clone(), expected.clone());
            return Err(OpenWeightsError::MissingTensor { place, tensor, expected, advice });
        };
        let file = &inner.files[file_index];
        let (path, tensor) = (file.path.clone(), tensor.clone());
        let Some(dtype) = Dtype::from_safetensors(info.dtype) else {
            let actual = info.dtype.to_string();
            return Err(OpenWeightsError::UnsupportedDtype { path, tensor, actual });
        };
        if info.shape != *expected {
            let (expected, actual) = (expected.clone(), info.shape.clone());
            return Err(OpenWeightsError::ShapeMismatch { path, tensor, expected, actual });
        }
        let (start, end) = info.data_offsets;
        let (start, end) = (file.data_start + start, file.data_start + end);
        inner.tensors.insert(tensor, Location { file_index, dtype, shape: info.shape.clone(), start, end });
    }
    for name in names {
        if !required.contains_key(name) && !is_harmless(name, spec) {
            let path = inner.files[found[name].0].path.clone();
            return Err(OpenWeightsError::UnexpectedTensor { path, tensor: name.clone() });
        }
    }
    Ok(())
}

/// Tensors that say nothing beyond `config.json`: rotary tables of old conversions, and a copy of a tied head.
fn is_harmless(name: &str, spec: &ModelSpec) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || name.ends_with("rotary_emb.cos_cached")
        || name.ends_with("rotary_emb.sin_cached")
        || (spec.tie_word_embeddings && name == LM_HEAD)
}

fn open_shards(folder: &Path, index: &Path) -> Result<Vec<MappedFile>, OpenWeightsError> {
    let weight_map = read_index(index)?;
    let mut shard_names: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in &weight_map {
        shard_names.entry(shard).or_default().insert(tensor);
    }
    let mut files: Vec<MappedFile> = Vec::new();
    for (shard, listed) in shard_names {
        let path = folder.join(shard);
        if let (false, Some(tensor)) = (path.exists(), listed.first()) {
            return Err(OpenWeightsError::MissingShard { path, tensor: (*tensor).to_owned() });
        }
        let file = MappedFile::open(&path)?;
        let held = file.metadata.tensors();
        if let Some(tensor) = listed.iter().find(|tensor| !held.contains_key(**tensor)) {
            return Err(OpenWeightsError::NotInShard { path, tensor: (*tensor).to_owned() });
        }
        let mut held: Vec<String> = held.into_keys().collect();
        held.sort_unstable();
        for tensor in held {
            if listed.contains(tensor.as_str()) {
                continue;
            }
            return Err(match weight_map.get(&tensor) {
                Some(other) => {
                    OpenWeightsError::Duplicate { tensor, first: path, second: folder.join(other) }
                }
                None => OpenWeightsError::NotInIndex { path, tensor },
            });
        }
        files.push(file);
    }
    Ok(files)
}

/// Tensor name to shard file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, OpenWeightsError> {
    let read_error = |cause| OpenWeightsError::Read { path: path.to_owned(), cause };
    let wrong = |problem: String| OpenWeightsError::WrongIndex { path: path.to_owned(), problem };
    let size_bytes = fs::metadata(path).map_err(read_error)?.len();
    if size_bytes > MAX_INDEX_BYTES {
        return Err(wrong(format!("it is {size_bytes} bytes long, expected at most {MAX_INDEX_BYTES}")));
    }
    let text = fs::read(path).map_err(read_error)?;
    let value: Value = serde_json::from_slice(&text).map_err(|cause| OpenWeightsError::BrokenIndex {
        path: path.to_owned(),
        line: cause.line(),
        column: cause.column(),
        cause,
    })?;
    let entries = value
        .get("weight_map")
        .and_then(Value::as_object)
        .filter(|entries| !entries.is_empty())
        .ok_or_else(|| {
            wrong("field `weight_map` is missing or empty, expected an object from tensor to file".to_owned())
        })?;
    entries
        .iter()
        .map(|(tensor, shard)| {
            let name = shard.as_str().ok_or_else(|| {
                wrong(format!("`weight_map` gives {shard} for tensor `{tensor}`, expected a file name"))
            })?;
            // Only plain names: an index must not lead out of its folder.
            if Path::new(name).file_name().is_none_or(|file_name| file_name != name) {
                return Err(wrong(format!(
                    "`weight_map` gives {name:?} for tensor `{tensor}`, expected a file name without folders"
                )));
            }
            if !name.ends_with(".safetensors") {
                return Err(wrong(format!(
                    "`weight_map` gives {name:?} for tensor `{tensor}`, expected a .safetensors file"
                )));
            }
            Ok((tensor.clone(), name.to_owned()))
        })
        .collect()
}

/// Says what is there instead.
fn no_weights(folder: &Path) -> OpenWeightsError {
    let mut names: Vec<String> = match fs::read_dir(folder) {
        Ok(entries) => {
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        }
        Err(cause) => return OpenWeightsError::Read { path: folder.to_owned(), cause },
    };
    names.sort_unstable();
    let with = |extensions: &[&str]| {
        names.iter().find(|name| {
            let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| extensions.contains(&extension))
        })
    };
    if let Some(shard) = with(&["safetensors"]) {
        return OpenWeightsError::NoIndex { folder: folder.to_owned(), shard: shard.clone() };
    }
    if let Some(name) = with(&["bin", "pt", "pth", "ckpt", "pkl"]) {
        return OpenWeightsError::OnlyPickle { path: folder.join(name) };
    }
    if let Some(name) = with(&["gguf"]) {
        return OpenWeightsError::OnlyGguf { path: folder.join(name) };
    }
    OpenWeightsError::NoWeights { folder: folder.to_owned() }
}
