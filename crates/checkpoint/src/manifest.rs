use crate::FileDigest;
use crate::shard_file::write_atomically;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Name of the manifest inside an exported folder.
pub const MANIFEST_FILE: &str = "espalier_manifest.json";
/// Raised when a field changes its meaning; a reader refuses other values.
pub const MANIFEST_FORMAT_VERSION: u32 = 1;
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// Where an exported model came from and what was removed on the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportManifest {
    /// [`MANIFEST_FORMAT_VERSION`].
    pub format_version: u32,
    pub source_model: SourceModel,
    /// The run's recipe as it was given.
    pub recipe: Value,
    /// What each layer kept, in layer order.
    pub layers: Vec<LayerKept>,
    pub parameters_before: u64,
    pub parameters_after: u64,
    /// The other files of the folder.
    pub files: Vec<FileDigest>,
    /// Versions of what took part, such as `espalier` and `libtorch`.
    pub versions: BTreeMap<String, String>,
    /// Outcome of the comparison of the exported model with the run's; null when it was not made.
    pub verification: Value,
}

/// The checkpoint that was pruned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceModel {
    /// Name of its folder, without the path.
    pub name: String,
    pub files: Vec<FileDigest>,
}

/// Index maps of one layer: entry `i` is the index that the new head or channel `i` had in the source model.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LayerKept {
    pub kept_query_heads: Vec<u32>,
    pub kept_kv_heads: Vec<u32>,
    pub kept_channels: Vec<u32>,
}

/// Why a manifest could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("failed to write `{path}`; check the free space and the permissions")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("failed to read `{path}`")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("`{path}` is no manifest: line {line}, column {column}; export the model again")]
    Broken {
        path: PathBuf,
        line: usize,
        column: usize,
        #[source]
        cause: serde_json::Error,
    },
    #[error(
        "`{path}`: field `format_version` is {actual}, expected {MANIFEST_FORMAT_VERSION}; use the version of espalier that wrote it"
    )]
    UnknownVersion { path: PathBuf, actual: u32 },
}

impl ExportManifest {
    /// The text of the file.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Every field is a number, a string, or a list or map of them, which JSON can always say.
        let value = serde_json::to_value(self).unwrap_or(Value::Null);
        format!("{value:#}\n")
    }

    /// Writes the manifest into a finished folder, in place of an older one, atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), ManifestError> {
        let path = folder.join(MANIFEST_FILE);
        write_atomically(&path, |file| file.write_all(self.to_json().as_bytes()))
            .map_err(|cause| ManifestError::Write { path, cause })
    }

    /// Reads the manifest of an exported folder.
    ///
    /// # Errors
    /// When there is none, or it is damaged or of another version.
    pub fn read(folder: &Path) -> Result<Self, ManifestError> {
        let path = folder.join(MANIFEST_FILE);
        let read_error = |cause| ManifestError::Read { path: path.clone(), cause };
        if fs::metadata(&path).map_err(read_error)?.len() > MAX_MANIFEST_BYTES {
            return Err(read_error(io::Error::other("the file is too large for a manifest")));
        }
        Self::from_json(&path, &fs::read(&path).map_err(read_error)?)
    }

    /// Reads the text of a manifest that is at `path`.
    ///
    /// # Errors
    /// When it is damaged or of another version.
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = serde_json::from_slice(text).map_err(|cause| ManifestError::Broken {
            path: path.to_owned(),
            line: cause.line(),
            column: cause.column(),
            cause,
        })?;
        match manifest.format_version {
            MANIFEST_FORMAT_VERSION => Ok(manifest),
            actual => Err(ManifestError::UnknownVersion { path: path.to_owned(), actual }),
        }
    }
}
