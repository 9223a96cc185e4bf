use crate::{ConfigError, FileDigest, ModelConfig, OpenWeightsError, Weights, digest_file};
use model_spec::ModelSpec;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

const CONFIG_FILE: &str = "config.json";
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// What goes along with a model unchanged when it is exported.
const COMPANION_FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// A model folder in Hugging Face layout whose `config.json` has been read.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    path: PathBuf,
    config: ModelConfig,
}

/// Why a path is no model folder of ours.
#[derive(Debug, thiserror::Error)]
pub enum OpenModelError {
    #[error("model folder `{path}` does not exist; give a folder in Hugging Face layout")]
    NotFound { path: PathBuf },
    #[error(
        "`{path}` is a GGUF file, not a model folder; convert it first: `espalier import --gguf {path} --out DIR`"
    )]
    IsGguf { path: PathBuf },
    #[error("`{path}` is not a folder; give the folder that holds `config.json`")]
    NotAFolder { path: PathBuf },
    #[error(
        "`{folder}` has no `config.json`; give a folder in Hugging Face layout (config.json, tokenizer.json, model.safetensors)"
    )]
    MissingConfig { folder: PathBuf },
    #[error("failed to read `{path}`")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "`{path}` is {size_bytes} bytes long, expected at most {MAX_CONFIG_BYTES}; it is no model configuration"
    )]
    TooLarge { path: PathBuf, size_bytes: u64 },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "`{folder}` has no `tokenizer.json`; save the tokenizer as a fast one with `transformers` and put it there"
    )]
    MissingTokenizer { folder: PathBuf },
}

impl ModelFolder {
    /// Reads and checks `config.json`. The weights are opened by [`ModelFolder::open_weights`].
    ///
    /// # Errors
    /// Names the file and field at fault and what to do about it.
    pub fn open(path: &Path) -> Result<Self, OpenModelError> {
        let path_of = |path: &Path| path.to_owned();
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                return Err(OpenModelError::NotFound { path: path_of(path) });
            }
            Err(cause) => return Err(OpenModelError::Read { path: path_of(path), cause }),
        };
        if !metadata.is_dir() {
            let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
            return Err(match is_gguf {
                true => OpenModelError::IsGguf { path: path_of(path) },
                false => OpenModelError::NotAFolder { path: path_of(path) },
            });
        }
        let config_path = path.join(CONFIG_FILE);
        let text = read_config(path, &config_path)?;
        Ok(Self { path: path.to_owned(), config: ModelConfig::parse(&config_path, &text)? })
    }

    /// Maps the weights and checks that every tensor of the spec is there in its shape.
    ///
    /// # Errors
    /// Names the file and tensor at fault and what to do about it.
    pub fn open_weights(&self) -> Result<Weights, OpenWeightsError> {
        Weights::open(&self.path, &self.config.spec)
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.config.spec
    }

    /// Path of `tokenizer.json`.
    ///
    /// # Errors
    /// When the folder has none.
    pub fn tokenizer_path(&self) -> Result<PathBuf, OpenModelError> {
        let path = self.path.join("tokenizer.json");
        match path.is_file() {
            true => Ok(path),
            false => Err(OpenModelError::MissingTokenizer { folder: self.path.clone() }),
        }
    }

    /// Paths of the tokenizer and generation files that are there; an export copies them as they are.
    #[must_use]
    pub fn companion_files(&self) -> Vec<PathBuf> {
        COMPANION_FILES.iter().map(|name| self.path.join(name)).filter(|path| path.is_file()).collect()
    }

    /// Reads `config.json`, the companion files and the given weight files once, for their digests.
    ///
    /// # Errors
    /// When one of the files cannot be read.
    pub fn digests(&self, weights: &Weights) -> Result<Vec<FileDigest>, OpenModelError> {
        let mut paths = vec![self.path.join(CONFIG_FILE)];
        paths.extend(self.companion_files());
        paths.extend(weights.file_paths().map(Path::to_owned));
        paths
            .into_iter()
            .map(|path| {
                let (size_bytes, sha256) =
                    digest_file(&path).map_err(|cause| OpenModelError::Read { path: path.clone(), cause })?;
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Ok(FileDigest { name, size_bytes, sha256 })
            })
            .collect()
    }
}

fn read_config(folder: &Path, path: &Path) -> Result<Vec<u8>, OpenModelError> {
    let read_error = |cause| OpenModelError::Read { path: path.to_owned(), cause };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return Err(OpenModelError::MissingConfig { folder: folder.to_owned() });
        }
        Err(cause) => return Err(read_error(cause)),
    };
    let size_bytes = file.metadata().map_err(read_error)?.len();
    if size_bytes > MAX_CONFIG_BYTES {
        return Err(OpenModelError::TooLarge { path: path.to_owned(), size_bytes });
    }
    let mut text = Vec::new();
    file.take(MAX_CONFIG_BYTES).read_to_end(&mut text).map_err(read_error)?;
    Ok(text)
}
