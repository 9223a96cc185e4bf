//! Bytes of numbers and of frozen matrices, as the engine holds them.

use model_spec::Split;
use recipe::{Compute, Precision, Storage};

/// Weights that share a scale in `nf4`.
const NF4_BLOCK: u64 = 64;
/// Scales are f32.
const SCALE_BYTES: u64 = 4;

/// Bytes of one number of the products.
pub(crate) fn compute_bytes(compute: Compute) -> u64 {
    match compute {
        Compute::F32 => 4,
        Compute::F64 => 8,
        Compute::Bf16 => 2,
    }
}

/// Bytes of one number of LoRA's master copy, its gradient and each of its moments.
pub(crate) fn master_bytes(compute: Compute) -> u64 {
    match compute {
        Compute::F32 | Compute::Bf16 => 4,
        Compute::F64 => 8,
    }
}

/// Bytes of one weight of the embedding and the head, which are never quantised.
pub(crate) fn vocabulary_bytes(precision: Precision) -> u64 {
    dense_bytes(precision.storage).unwrap_or(compute_bytes(precision.compute))
}

/// Bytes of a dense weight; none where weights are quantised.
pub(crate) fn dense_bytes(storage: Storage) -> Option<u64> {
    match storage {
        Storage::F32 => Some(4),
        Storage::F64 => Some(8),
        Storage::Bf16 => Some(2),
        Storage::Int8 | Storage::Nf4 => None,
    }
}

/// Bytes of a frozen matrix `[rows, columns]`, the part of a rank.
///
/// ```text
/// dense   rows columns w
/// int8    rows columns + 4 rows                                          a scale for each row
/// nf4     lines (ceil(len / 64) (32 + 4))                                half a byte a weight, a scale for 64
/// ```
///
/// The blocks of `nf4` lie along the dimension that is not split: a line is a row of a column-parallel matrix and a column of
/// a row-parallel one.
pub(crate) fn frozen_bytes(storage: Storage, split: Split, rows: u64, columns: u64) -> u64 {
    match storage {
        Storage::F32 | Storage::F64 | Storage::Bf16 => rows * columns * dense_bytes(storage).unwrap_or(4),
        Storage::Int8 => rows * columns + SCALE_BYTES * rows,
        Storage::Nf4 => {
            let (lines, len) = match split {
                Split::Column => (rows, columns),
                Split::Row => (columns, rows),
            };
            lines * len.div_ceil(NF4_BLOCK) * (NF4_BLOCK / 2 + SCALE_BYTES)
        }
    }
}

/// Bytes of a frozen matrix as a product reads it; 0 where it is read as it is held.
pub(crate) fn widened_bytes(precision: Precision, elements: u64) -> u64 {
    let wanted = compute_bytes(precision.compute);
    if dense_bytes(precision.storage) == Some(wanted) { 0 } else { elements * wanted }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen_matrices_cost_what_their_format_says() {
        for (storage, split, expected) in [
            (Storage::F32, Split::Column, 4 * 100 * 130),
            (Storage::Bf16, Split::Row, 2 * 100 * 130),
            (Storage::F64, Split::Row, 8 * 100 * 130),
            (Storage::Int8, Split::Row, 100 * 130 + 4 * 100),
            // Lines of 130 are three blocks, lines of 100 two.
            (Storage::Nf4, Split::Column, 100 * 3 * 36),
            (Storage::Nf4, Split::Row, 130 * 2 * 36),
        ] {
            assert_eq!(frozen_bytes(storage, split, 100, 130), expected, "{storage:?} {split:?}");
        }
    }

    #[test]
    fn what_is_held_as_it_is_read_is_not_widened() {
        let of = |storage, compute| widened_bytes(Precision { storage, compute }, 10);
        assert_eq!(of(Storage::F32, Compute::F32), 0);
        assert_eq!(of(Storage::Bf16, Compute::Bf16), 0);
        assert_eq!(of(Storage::Bf16, Compute::F32), 40);
        assert_eq!(of(Storage::Nf4, Compute::Bf16), 20);
    }
}
