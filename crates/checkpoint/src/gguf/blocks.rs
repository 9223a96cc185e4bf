use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use std::borrow::Cow;

/// Element types of GGUF tensors that we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BlockType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl BlockType {
    pub(crate) const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The number that stands for the type in a file.
    pub(crate) fn tag(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        }
    }

    pub(super) fn from_tag(tag: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.tag() == tag)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    pub(crate) fn ggml(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q2K => GgmlDType::Q2K,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// Elements that share a scale.
    pub(super) fn block_elements(self) -> usize {
        self.ggml().block_size()
    }

    pub(super) fn block_bytes(self) -> usize {
        self.ggml().type_size()
    }

    /// Decodes whole blocks. `None` when `bytes` is not whole blocks or the library refuses them.
    pub(super) fn decode(self, bytes: &[u8]) -> Option<Vec<f32>> {
        if !bytes.len().is_multiple_of(self.block_bytes()) {
            return None;
        }
        match self {
            // The library wants these aligned to their width, which a file does not promise.
            Self::F32 => Some(bytes.as_chunks().0.iter().map(|&v| f32::from_le_bytes(v)).collect()),
            Self::F16 => Some(bytes.as_chunks().0.iter().map(|&v| f16::from_le_bytes(v).to_f32()).collect()),
            Self::Bf16 => {
                Some(bytes.as_chunks().0.iter().map(|&v| bf16::from_le_bytes(v).to_f32()).collect())
            }
            Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Q8_0
            | Self::Q2K
            | Self::Q3K
            | Self::Q4K
            | Self::Q5K
            | Self::Q6K => {
                // Blocks are made of bytes and 2-byte scales. The library panics on an odd address; in a file
                // there is none, since the alignment is at least 8 and every block has an even length.
                if !(bytes.as_ptr() as usize).is_multiple_of(align_of::<u16>()) {
                    return None;
                }
                let element_count = bytes.len() / self.block_bytes() * self.block_elements();
                match self.ggml().from_data(Cow::Borrowed(bytes)).dequantize(element_count) {
                    Ok(CpuStorage::F32(values)) => Some(values),
                    Ok(_) | Err(_) => None,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, quantized::QTensor};

    /// Bytes that are any valid block of their type: scales small and positive, codes arbitrary.
    fn arbitrary_bytes(count: usize, mut state: u64) -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        (0..count).map(|_| next()).collect()
    }

    fn set_scale(block: &mut [u8], at: usize, scale: f32) {
        block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    }

    fn scale(block: &[u8], at: usize) -> f32 {
        f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
    }

    /// The formats as ggml defines them, one element at a time.
    fn plain_element(kind: BlockType, block: &[u8], index: usize) -> Option<f32> {
        let nibble = |bytes: &[u8], index: usize, half: usize| match index < half {
            true => bytes[index] & 15,
            false => bytes[index - half] >> 4,
        };
        // Q4_K: 8 scales and 8 minima of 6 bits in 12 bytes.
        let six_bits = |packed: &[u8], j: usize| match j < 4 {
            true => (packed[j] & 63, packed[j + 4] & 63),
            false => (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4),
        };
        Some(match kind {
            BlockType::Q4_0 => (f32::from(nibble(&block[2..], index, 16)) - 8.0) * scale(block, 0),
            BlockType::Q4_1 => f32::from(nibble(&block[4..], index, 16)) * scale(block, 0) + scale(block, 2),
            BlockType::Q8_0 => f32::from(block[2 + index] as i8) * scale(block, 0),
            BlockType::Q4K => {
                let sub_block = index / 32;
                let (factor, minimum) = six_bits(&block[4..16], sub_block);
                let code = nibble(&block[16 + sub_block / 2 * 32..], index % 64, 32);
                scale(block, 0) * f32::from(factor) * f32::from(code) - scale(block, 2) * f32::from(minimum)
            }
            BlockType::Q6K => {
                let (half, within) = (index / 128, index % 128);
                let (quarter, lane) = (within / 32, within % 32);
                let low_byte = block[half * 64 + quarter % 2 * 32 + lane];
                let low = if quarter < 2 { low_byte & 15 } else { low_byte >> 4 };
                let high = block[128 + half * 32 + lane] >> (2 * quarter) & 3;
                let factor = block[192 + half * 8 + quarter * 2 + lane / 16] as i8;
                scale(block, 208) * f32::from(factor) * (f32::from(low | high << 4) - 32.0)
            }
            BlockType::F32
            | BlockType::F16
            | BlockType::Bf16
            | BlockType::Q5_0
            | BlockType::Q5_1
            | BlockType::Q2K
            | BlockType::Q3K
            | BlockType::Q5K => return None,
        })
    }

    #[test]
    fn blocks_decode_as_their_definition_says() {
        for (kind, scale_places) in [
            (BlockType::Q4_0, &[0][..]),
            (BlockType::Q4_1, &[0, 2]),
            (BlockType::Q8_0, &[0]),
            (BlockType::Q4K, &[0, 2]),
            (BlockType::Q6K, &[208]),
        ] {
            let mut bytes = arbitrary_bytes(7 * kind.block_bytes(), 5);
            for (number, block) in bytes.chunks_exact_mut(kind.block_bytes()).enumerate() {
                for &place in scale_places {
                    set_scale(block, place, 0.01 + 0.003 * number as f32);
                }
            }
            let decoded = kind.decode(&bytes).unwrap();
            assert_eq!(decoded.len(), 7 * kind.block_elements());
            for (index, &value) in decoded.iter().enumerate() {
                let block = &bytes[index / kind.block_elements() * kind.block_bytes()..];
                let expected = plain_element(kind, block, index % kind.block_elements()).unwrap();
                assert!(
                    (value - expected).abs() <= 1e-5 * expected.abs().max(1e-3),
                    "{kind:?} {index}: {value} {expected}"
                );
            }
        }
    }

    #[test]
    fn every_type_gives_back_nearly_what_was_quantised() {
        let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
        let tensor = candle_core::Tensor::from_slice(&values, (2, 256), &Device::Cpu).unwrap();
        for kind in BlockType::ALL {
            let quantised = QTensor::quantize(&tensor, kind.ggml()).unwrap();
            let decoded = kind.decode(&quantised.data().unwrap()).unwrap();
            let tolerance = match kind {
                BlockType::F32 => 0.0,
                BlockType::F16 => 1e-3,
                BlockType::Bf16 | BlockType::Q8_0 => 8e-3,
                BlockType::Q6K | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q5K => 0.08,
                BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q4K => 0.15,
                BlockType::Q3K => 0.3,
                BlockType::Q2K => 0.5,
            };
            for (value, decoded) in values.iter().zip(decoded) {
                assert!((value - decoded).abs() <= tolerance, "{kind:?}: {value} {decoded}");
            }
        }
    }

    #[test]
    fn a_broken_block_is_refused() {
        for kind in BlockType::ALL {
            assert_eq!(BlockType::from_tag(kind.tag()), Some(kind));
            assert_eq!(kind.decode(&vec![0; kind.block_bytes() + 1]), None, "{kind:?}");
        }
    }
}
