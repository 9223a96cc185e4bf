//! Model folders in Hugging Face layout, GGUF files, and the files of a training run: read, checked, written.
//!
//! It maps, checks and moves bytes. It knows no tensor library, runs no model and never reads a pickle.
//! What it writes is complete or absent: everything goes to a temporary name first and is renamed when whole.

mod config;
mod digest;
mod dtype;
mod export_config;
mod fields;
mod gguf;
mod hf_dir;
mod manifest;
mod mapped_file;
mod safetensors_header;
mod shard_file;
mod staged_folder;
mod tensor_name;
mod tensor_view;
pub mod testing;
mod weights;
mod writer;

pub use config::{ConfigError, ModelConfig};
pub use digest::{FileDigest, InvalidDigest, Sha256Digest, digest_file};
pub use dtype::Dtype;
pub use export_config::{
    ExportForm, NotExportable, espalier_config, export_config, export_form, padded_spec,
};
pub use gguf::{GgufHeaderError, ImportError, ImportReport, ModelMetadataError, TokenizerError, import_gguf};
pub use hf_dir::{ModelFolder, OpenModelError};
pub use manifest::{
    ExportManifest, LayerKept, MANIFEST_FILE, MANIFEST_FORMAT_VERSION, ManifestError, SourceModel,
};
pub use mapped_file::MapFileError;
pub use shard_file::{
    OwnedTensor, ReadTensorsError, TensorFile, TensorRef, WriteTensorsError, read_tensors,
    read_tensors_metadata, write_tensors,
};
pub use staged_folder::StageError;
pub use tensor_name::{
    EMBEDDING, FINAL_NORM, LM_HEAD, input_norm, post_attention_norm, projection_weight, required_tensors,
};
pub use tensor_view::{NonFinite, TensorView, check_finite};
pub use weights::{OpenWeightsError, Weights};
pub use writer::{FolderWriter, TensorHeader, WriteFolderError};
