//! GGUF files of LLaMA models, turned into folders in Hugging Face layout.
//!
//! The header is read here, because every count and length in it must be checked against the file before it is
//! believed; `candle-core` decodes the quantised blocks.

pub(crate) mod blocks;
#[cfg(test)]
mod fuzz_tests;
mod header;
mod import;
mod model;
mod rope_factors;
mod tokenizer;
mod values;

pub use header::GgufHeaderError;
pub use import::{ImportError, ImportReport, import_gguf};
pub use model::ModelMetadataError;
pub use tokenizer::TokenizerError;
