//! What lies in a CPU process's heap, where freed blocks stay and leave holes. Blocks of 32 MiB and more are mapped by
//! themselves and given back at once (`engine-tch`'s `memory.rs`), so that large models have next to none of this.

use crate::activations;
use crate::formats::frozen_bytes;
use crate::rank_shape::RankShape;
use model_spec::Projection;
use recipe::{Precision, Recipe, Storage};

const MAPPED_BLOCK: u64 = 32 << 20;

fn in_heap(block: u64) -> u64 {
    if block < MAPPED_BLOCK { block } else { 0 }
}

/// Frozen matrices in the heap. q, k and v are one block, and so are gate and up.
pub(crate) fn frozen_bytes_in_heap(shape: &RankShape, precision: Precision) -> u64 {
    let blocks = shape.layers.iter().flat_map(|layer| {
        let of = |projection: Projection| {
            let [rows, columns] = shape.matrix(layer, projection);
            frozen_bytes(precision.storage, projection.split(), rows, columns)
        };
        [
            of(Projection::Q) + of(Projection::K) + of(Projection::V),
            of(Projection::O),
            of(Projection::Gate) + of(Projection::Up),
            of(Projection::Down),
        ]
    });
    blocks.map(in_heap).sum()
}

/// What layers keep for their backward passes, in the heap.
pub(crate) fn kept_bytes(shape: &RankShape, recipe: &Recipe) -> u64 {
    activations::kept_tensors(shape, recipe).into_iter().map(in_heap).sum()
}

/// What quantising leaves behind in holes that no later block fits into: about three times
/// the temporaries of the largest matrix. Measured.
pub(crate) fn left_by_quantising(shape: &RankShape, precision: Precision) -> u64 {
    let each: &[u64] = match precision.storage {
        Storage::Nf4 => &[4, 4, 8, 8, 1],
        Storage::Int8 => &[4, 4, 4, 4, 1],
        Storage::F32 | Storage::F64 | Storage::Bf16 => &[],
    };
    let elements = |projection: Projection| {
        let of = shape.layers.iter().map(|layer| {
            let [rows, columns] = shape.matrix(layer, projection);
            rows * columns
        });
        of.max().unwrap_or(0)
    };
    let largest = Projection::ALL.into_iter().map(elements).max().unwrap_or(0);
    3 * each.iter().map(|bytes| in_heap(bytes * largest)).sum::<u64>()
}
