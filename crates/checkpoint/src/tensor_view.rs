use crate::Dtype;
use half::{bf16, f16};

/// A tensor where it lies in a mapped file: row-major, little-endian, not necessarily aligned to its element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// `product(shape) * dtype.byte_width()` bytes.
    pub bytes: &'a [u8],
}

/// A weight that is not a number, or infinite.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "tensor `{tensor}` holds {value} at flat index {flat_index}; the checkpoint is damaged, fetch it again"
)]
pub struct NonFinite {
    pub tensor: String,
    pub flat_index: usize,
    pub value: f64,
}

impl TensorView<'_> {
    #[must_use]
    pub fn element_count(&self) -> usize {
        self.bytes.len() / self.dtype.byte_width()
    }

    /// The elements in row-major order, rounded to nearest when they were `F64`.
    #[must_use]
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F64 => elements(self.bytes, f64::from_le_bytes).map(|v| v as f32).collect(),
            Dtype::F32 => elements(self.bytes, f32::from_le_bytes).collect(),
            Dtype::Bf16 => elements(self.bytes, bf16::from_le_bytes).map(f32::from).collect(),
            Dtype::F16 => elements(self.bytes, f16::from_le_bytes).map(f32::from).collect(),
        }
    }

    /// The elements in row-major order, exactly.
    #[must_use]
    pub fn to_f64_vec(&self) -> Vec<f64> {
        match self.dtype {
            Dtype::F64 => elements(self.bytes, f64::from_le_bytes).collect(),
            Dtype::F32 => elements(self.bytes, f32::from_le_bytes).map(f64::from).collect(),
            Dtype::Bf16 => elements(self.bytes, bf16::from_le_bytes).map(f64::from).collect(),
            Dtype::F16 => elements(self.bytes, f16::from_le_bytes).map(f64::from).collect(),
        }
    }
}

/// Reads every element once.
///
/// # Errors
/// Names the first element that is NaN or infinite.
pub fn check_finite(view: &TensorView<'_>) -> Result<(), NonFinite> {
    // An IEEE number is NaN or infinite exactly when all of its exponent bits are set.
    let bad = match view.dtype {
        Dtype::F64 => elements(view.bytes, u64::from_le_bytes).position(|v| v >> 52 & 0x7ff == 0x7ff),
        Dtype::F32 => elements(view.bytes, u32::from_le_bytes).position(|v| v >> 23 & 0xff == 0xff),
        Dtype::Bf16 => elements(view.bytes, u16::from_le_bytes).position(|v| v >> 7 & 0xff == 0xff),
        Dtype::F16 => elements(view.bytes, u16::from_le_bytes).position(|v| v >> 10 & 0x1f == 0x1f),
    };
    let Some(flat_index) = bad else { return Ok(()) };
    let width = view.dtype.byte_width();
    let bytes = &view.bytes[flat_index * width..][..width];
    let value = TensorView { bytes, shape: &[1], ..*view }.to_f64_vec()[0];
    Err(NonFinite { tensor: view.name.to_owned(), flat_index, value })
}

fn elements<const WIDTH: usize, T>(
    bytes: &[u8],
    decode: impl Fn([u8; WIDTH]) -> T,
) -> impl Iterator<Item = T> {
    bytes.as_chunks::<WIDTH>().0.iter().map(move |&chunk| decode(chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_non_finite_element_is_named_in_every_dtype() {
        for dtype in Dtype::ALL {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut bytes = Vec::new();
                dtype.encode(&[0.0, -1.5, 60_000.0, bad, f32::NAN, 1.0], &mut bytes);
                let view = TensorView { name: "w", dtype, shape: &[2, 3], bytes: &bytes };
                let error = check_finite(&view).unwrap_err();
                assert_eq!((error.tensor.as_str(), error.flat_index), ("w", 3));
                assert!(error.to_string().contains("tensor `w` holds"), "{error}");
                let good = TensorView { shape: &[3], bytes: &bytes[..3 * dtype.byte_width()], ..view };
                assert_eq!(check_finite(&good), Ok(()));
            }
        }
    }

    #[test]
    fn values_that_every_dtype_can_hold_come_back_unchanged() {
        let values = [0.0, -1.5, 2.0, 0.25, 1024.0];
        for dtype in Dtype::ALL {
            let mut bytes = Vec::new();
            dtype.encode(&values, &mut bytes);
            let view = TensorView { name: "w", dtype, shape: &[5], bytes: &bytes };
            assert_eq!(view.element_count(), 5);
            assert_eq!(view.to_f32_vec(), values);
            assert_eq!(view.to_f64_vec(), values.map(f64::from));
        }
    }
}
