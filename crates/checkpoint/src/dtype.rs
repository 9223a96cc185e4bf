use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Element types that weights and training state are stored in. Bytes are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

impl Dtype {
    pub const ALL: [Self; 4] = [Self::F64, Self::F32, Self::Bf16, Self::F16];

    /// Bytes of one element.
    #[must_use]
    pub fn byte_width(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name in a safetensors header, such as `BF16`.
    #[must_use]
    pub fn safetensors_name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// The name in `config.json`, such as `bfloat16`.
    #[must_use]
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The type that `config.json` means by `name`, with or without `torch.` before it.
    #[must_use]
    pub fn from_torch_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        Self::ALL.into_iter().find(|dtype| dtype.torch_name() == name)
    }

    /// `None` for the integer, boolean and 8-bit types, which no weight of a LLaMA has.
    #[must_use]
    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        let pairs = [
            (safetensors::Dtype::F64, Self::F64),
            (safetensors::Dtype::F32, Self::F32),
            (safetensors::Dtype::BF16, Self::Bf16),
            (safetensors::Dtype::F16, Self::F16),
        ];
        pairs.into_iter().find(|(theirs, _)| *theirs == dtype).map(|(_, ours)| ours)
    }

    /// Appends `values`, rounded to nearest even, to `bytes`.
    pub fn encode(self, values: &[f32], bytes: &mut Vec<u8>) {
        bytes.reserve(values.len() * self.byte_width());
        match self {
            Self::F64 => values.iter().for_each(|&v| bytes.extend(f64::from(v).to_le_bytes())),
            Self::F32 => values.iter().for_each(|v| bytes.extend(v.to_le_bytes())),
            Self::Bf16 => values.iter().for_each(|&v| bytes.extend(bf16::from_f32(v).to_le_bytes())),
            Self::F16 => values.iter().for_each(|&v| bytes.extend(f16::from_f32(v).to_le_bytes())),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.safetensors_name())
    }
}
