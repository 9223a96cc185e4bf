//! The head of a safetensors file: its length in 8 bytes, then JSON, padded so that the data starts at a multiple of 8.
//!
//! Same tensors and metadata, same bytes: entries keep the order given, metadata is sorted.

use crate::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const ALIGNMENT: usize = 8;

/// Name, type and shape of a tensor to be written; its data follows that of the tensor before it.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
}

/// Bytes of a tensor's data, if that is a number.
pub(crate) fn data_bytes(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(dtype.byte_width() as u64, |bytes, &width| bytes.checked_mul(width as u64))
}

/// The length field and the header. The sum of [`data_bytes`] must be a number.
pub(crate) fn encode<'a>(
    metadata: &BTreeMap<String, String>,
    entries: impl IntoIterator<Item = Entry<'a>>,
) -> Vec<u8> {
    let mut fields = Vec::new();
    if !metadata.is_empty() {
        fields.push(format!("\"__metadata__\":{}", json!(metadata)));
    }
    let mut start = 0_u64;
    for entry in entries {
        let end = start + data_bytes(entry.dtype, entry.shape).unwrap_or(0);
        fields.push(format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{start},{end}]}}",
            Value::from(entry.name),
            entry.dtype.safetensors_name(),
            json!(entry.shape),
        ));
        start = end;
    }
    let mut json = format!("{{{}}}", fields.join(","));
    json.extend(std::iter::repeat_n(' ', json.len().next_multiple_of(ALIGNMENT) - json.len()));
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes
}
