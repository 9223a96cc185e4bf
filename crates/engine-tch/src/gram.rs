//! Products of size r x r of the factors of all projections: what a method needs that must not depend on how `B A` is split
//! into factors.
//!
//! A pair of factors is `X = B [m, r]` and `Y = A^T [n, r]`. One of the two is split over ranks by rows; its products are
//! added up in one all-reduce for all pairs. All ranks go on with the same sums.

use crate::communicator::Communicator;
use crate::fault::Result;
use tch::{Kind, Tensor};

/// Eigenvalues of a scaled Gram matrix below this share of the greatest are none: singular values below its root. Whatever is
/// divided by what stays, twice, keeps half of its digits.
const RANK_CUTOFF: f64 = 1e-8;

/// Tensors `[rows on this rank, r]` of one factor, and whether their rows are split over ranks.
pub(crate) struct Stack {
    pub(crate) parts: Vec<Tensor>,
    pub(crate) split: bool,
}

/// For `B` and for `A`, by block `(i, j)`: the products of part i with part j of all pairs, `[pairs, r, r]` in f64, over the
/// rows of all ranks.
pub(crate) fn products(
    pairs: &[[Stack; 2]],
    blocks: [&[(usize, usize)]; 2],
    communicator: &mut dyn Communicator,
) -> Result<[Vec<Tensor>; 2]> {
    let mut found = [Vec::new(), Vec::new()];
    let Some([first, _]) = pairs.first() else { return Ok(found) };
    let lora_rank = first.parts[0].size2()?.1;
    let device = first.parts[0].device();
    for side in 0..2 {
        let mut by_block: Vec<Vec<Tensor>> = blocks[side].iter().map(|_| Vec::new()).collect();
        for pair in pairs {
            let stacked = Tensor::f_cat(&pair[side].parts, 1)?.f_to_kind(Kind::Double)?;
            let gram = stacked.f_tr()?.f_mm(&stacked)?;
            for (block, (left, right)) in by_block.iter_mut().zip(blocks[side]) {
                let rows = gram.f_narrow(0, *left as i64 * lora_rank, lora_rank)?;
                block.push(rows.f_narrow(1, *right as i64 * lora_rank, lora_rank)?);
            }
        }
        found[side] = by_block.iter().map(|block| Ok(Tensor::f_stack(block, 0)?)).collect::<Result<_>>()?;
    }
    let mut split = Vec::new();
    for side in 0..2 {
        let places = pairs.iter().enumerate().filter(|(_, pair)| pair[side].split);
        let places: Vec<i64> = places.map(|(place, _)| place as i64).collect();
        split.push(Tensor::f_from_slice(&places)?.f_to_device(device)?);
    }
    // End to end, so that one sum does for all.
    let mut sent = Vec::new();
    for (blocks, places) in found.iter().zip(&split) {
        for block in blocks {
            sent.push(block.f_index_select(0, places)?.f_view([-1i64])?);
        }
    }
    let mut buffer = Tensor::f_cat(&sent, 0)?;
    communicator.all_reduce_sum(&mut buffer)?;
    let mut start = 0;
    for (blocks, places) in found.iter_mut().zip(&split) {
        let count = places.size1()?;
        for block in blocks {
            let whole = buffer.f_narrow(0, start, count * lora_rank * lora_rank)?;
            start += count * lora_rank * lora_rank;
            let _ = block.f_index_copy_(0, places, &whole.f_view([count, lora_rank, lora_rank])?)?;
        }
    }
    Ok(found)
}

/// `R^+` of Gram matrices `C = R^T R` `[pairs, r, r]`: `D^-1 (D^-1 C D^-1)^(-1/2)`, `D` being the lengths of the factor's
/// columns, which stands columns of very different size; a pseudo-inverse where the factor is of less than full rank.
pub(crate) fn inverse_root(gram: &Tensor) -> Result<Tensor> {
    let lengths = gram.f_diagonal(0, 1, 2)?.f_clamp_min(0.0)?.f_sqrt()?;
    let shrink = lengths.f_add(&lengths.f_eq(0.0)?.f_to_kind(Kind::Double)?)?.f_reciprocal()?;
    let shrink = shrink.f_mul(&lengths.f_gt(0.0)?.f_to_kind(Kind::Double)?)?;
    let scaled = gram.f_mul(&shrink.f_unsqueeze(1)?)?.f_mul(&shrink.f_unsqueeze(2)?)?;
    let (values, vectors) = symmetric(&scaled)?.f_linalg_eigh("L")?;
    let least = values.f_amax([1i64], true)?.f_mul_scalar(RANK_CUTOFF)?;
    let counts = values.f_gt_tensor(&least)?.f_to_kind(Kind::Double)?;
    // One where it does not count.
    let counted = values.f_mul(&counts)?.f_sub(&counts)?.f_add_scalar(1.0)?;
    let inverse = counted.f_rsqrt()?.f_mul(&counts)?;
    Ok(with_eigenvalues(&vectors, &inverse)?.f_mul(&shrink.f_unsqueeze(2)?)?)
}

/// `Q diag(values) Q^T`.
pub(crate) fn with_eigenvalues(vectors: &Tensor, values: &Tensor) -> Result<Tensor> {
    Ok(vectors.f_mul(&values.f_unsqueeze(1)?)?.f_matmul(&transposed(vectors)?)?)
}

pub(crate) fn symmetric(matrices: &Tensor) -> Result<Tensor> {
    Ok(matrices.f_add(&transposed(matrices)?)?.f_mul_scalar(0.5)?)
}

/// Of each matrix of a batch.
pub(crate) fn transposed(matrices: &Tensor) -> Result<Tensor> {
    Ok(matrices.f_transpose(1, 2)?)
}
