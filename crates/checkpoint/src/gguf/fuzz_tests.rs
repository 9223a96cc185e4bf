//! Files that lie: no cut and no changed byte of a small GGUF file may panic, hang or ask for memory it cannot justify.

use super::header::Header;
use super::import::convert;
use super::model::read_model;
use super::tokenizer::read_tokenizer;
use crate::Dtype;
use crate::testing::{tiny_gguf, tiny_spec};
use model_spec::{LayerSpec, ModelSpec};
use std::path::Path;

fn smallest_spec() -> ModelSpec {
    let layer = LayerSpec { query_head_count: 2, kv_head_count: 1, intermediate_size: 32 };
    ModelSpec { hidden_size: 32, head_dim: 16, vocab_size: 10, layers: vec![layer], ..tiny_spec() }
}

/// All of an import but the writing. `Ok` holds the number of bytes that would have been written.
fn import(file: &[u8]) -> Result<usize, String> {
    let path = Path::new("model.gguf");
    let header = Header::parse(file).map_err(|error| error.to_string())?;
    let model = read_model(path, &header, Dtype::Bf16).map_err(|error| error.to_string())?;
    read_tokenizer(&header, model.config.spec.vocab_size).map_err(|error| error.to_string())?;
    let mut byte_count = 0;
    for tensor in &model.tensors {
        convert(path, tensor, model.config.spec.head_dim, Dtype::Bf16, |bytes| {
            byte_count += bytes.len();
            Ok(())
        })
        .map_err(|error| error.to_string())?;
    }
    Ok(byte_count)
}

/// Where the tensor data begin: the first byte that no header field can depend on.
fn header_length(file: &[u8], data_bytes: usize) -> usize {
    file.len() - data_bytes
}

fn data_bytes(builder: &crate::testing::GgufBuilder) -> usize {
    builder.tensors.iter().map(|tensor| tensor.bytes.len().next_multiple_of(32)).sum()
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let file = tiny_gguf(&smallest_spec(), "Q8_0", 1).build();
    let expected_bytes = smallest_spec().parameter_count() as usize * 2;
    assert_eq!(import(&file), Ok(expected_bytes));
    // The last tensor fills its alignment, so every byte is needed.
    for length in 0..file.len() {
        assert!(import(&file[..length]).is_err(), "cut at {length} of {}", file.len());
    }
}

#[test]
fn a_changed_byte_of_the_header_never_panics_and_never_adds_output() {
    let builder = tiny_gguf(&smallest_spec(), "Q8_0", 1);
    let file = builder.build();
    let expected_bytes = smallest_spec().parameter_count() as usize * 2;
    let mut refused = 0;
    for position in 0..header_length(&file, data_bytes(&builder)) {
        for change in [0x01, 0x80, 0xff] {
            let mut mutated = file.clone();
            mutated[position] ^= change;
            match import(&mutated) {
                Ok(byte_count) => assert!(byte_count <= expected_bytes, "{change:#x} at {position}"),
                Err(message) => {
                    assert!(!message.is_empty());
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn counts_and_lengths_at_their_limits_are_refused() {
    let builder = tiny_gguf(&smallest_spec(), "Q8_0", 1);
    let file = builder.build();
    for position in (0..header_length(&file, data_bytes(&builder)) - 8).filter(|position| *position != 0) {
        for value in [u64::MAX, i64::MAX as u64, 1 << 40, u64::MAX - 7, 1 << 31] {
            let mut mutated = file.clone();
            mutated[position..position + 8].copy_from_slice(&value.to_le_bytes());
            if let Ok(byte_count) = import(&mutated) {
                assert!(byte_count <= file.len() * 2, "{value:#x} at {position}");
            }
        }
    }
}
