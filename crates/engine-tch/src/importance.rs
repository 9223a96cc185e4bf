//! The score pass: raw group sums of every projection, from tiles that stay in the cache. Nothing of the size of a weight
//! is stored (but for `taylor`, whose gradients are).
//!
//! ```text
//! Ghat = dB A + B dA - dB dA = [dB | B] [A - dA ; dA]     rank 2r      (arXiv:2305.18403, eq. 9, eta = 1)
//! W    = W0 + s B A
//! code: sum |Ghat * W|      paper: sum (Ghat * W)^2      taylor: sum |G * W|      magnitude: sum |W|
//! ```
//!
//! The sums run over a group's rows of q, k, v, gate and up and over its columns of o and down. `pruning::criterion` has
//! the plain references.

use crate::factors::{Factor, FactorLayout};
use crate::fault::{Fault, Result};
use crate::layer::{LayerShard, WeightGradients};
use engine::ProjectionScores;
use model_spec::{Projection, Split};
use recipe::{Criterion, LoraPruneForm};
use tch::{Kind, Tensor};

/// Weights in a tile: 512 KiB of f32, which the second-level cache of today's cores holds with its temporaries.
pub(crate) const TILE_ELEMENTS: i64 = 1 << 17;

/// What the scores of one step are made from.
pub(crate) struct ScoreInputs<'a> {
    pub(crate) layout: &'a FactorLayout,
    pub(crate) factors: &'a Tensor,
    /// Complete and clipped.
    pub(crate) gradients: &'a Tensor,
    pub(crate) weight_gradients: Option<&'a [WeightGradients]>,
    pub(crate) scaling: f64,
    pub(crate) head_dim: i64,
    pub(crate) step: u64,
    /// Weights scored at a time; [`TILE_ELEMENTS`] but in tests.
    pub(crate) tile_elements: i64,
}

/// The scores of one layer's live groups on this rank; none for `random`, which needs none.
pub(crate) fn score_layer(
    criterion: Criterion,
    layer: usize,
    shard: &LayerShard,
    live: &LiveGroups,
    inputs: &ScoreInputs,
) -> Result<Vec<ProjectionScores>> {
    if criterion == Criterion::Random {
        return Ok(Vec::new());
    }
    Projection::ALL
        .iter()
        .map(|&projection| {
            let sums = projection_sums(criterion, layer, projection, shard, inputs)?;
            let groups = match projection {
                Projection::Q | Projection::K | Projection::V | Projection::O => {
                    sums.f_view([-1, inputs.head_dim])?.f_sum_dim_intlist(&[1i64][..], false, None)?
                }
                Projection::Gate | Projection::Up | Projection::Down => sums,
            };
            let groups = match live.of(projection) {
                Some(positions) => groups.f_index_select(0, positions)?,
                None => groups,
            };
            let values = to_f64(&groups)?;
            match values.iter().find(|value| !value.is_finite()) {
                Some(&value) => Err(Fault::NotFinite {
                    what: format!("score of layer {layer} {projection}"),
                    step: inputs.step,
                    value,
                }),
                None => Ok(ProjectionScores { layer, projection, values }),
            }
        })
        .collect()
}

/// Positions of the live groups among those held, where they differ (`shrink: never`).
#[derive(Default)]
pub(crate) struct LiveGroups {
    pub(crate) query_heads: Option<Tensor>,
    pub(crate) kv_heads: Option<Tensor>,
    pub(crate) channels: Option<Tensor>,
}

impl LiveGroups {
    fn of(&self, projection: Projection) -> Option<&Tensor> {
        match projection {
            Projection::Q | Projection::O => self.query_heads.as_ref(),
            Projection::K | Projection::V => self.kv_heads.as_ref(),
            Projection::Gate | Projection::Up | Projection::Down => self.channels.as_ref(),
        }
    }
}

/// Sums along the unsplit dimension: one value for each feature along the split one.
fn projection_sums(
    criterion: Criterion,
    layer: usize,
    projection: Projection,
    shard: &LayerShard,
    inputs: &ScoreInputs,
) -> Result<Tensor> {
    let weight = rows_of(shard, projection, inputs.head_dim)?;
    let factor = |flat: &Tensor, factor| inputs.layout.view(flat, layer, projection, factor);
    let (a, b) = (factor(inputs.factors, Factor::A)?, factor(inputs.factors, Factor::B)?);
    let kind = a.kind();
    let (rows, columns) = weight.size2()?;
    let guide = match criterion {
        Criterion::LoraPrune { .. } => {
            let (da, db) = (factor(inputs.gradients, Factor::A)?, factor(inputs.gradients, Factor::B)?);
            Some((Tensor::f_cat(&[&db, &b], 1)?, Tensor::f_cat(&[&a.f_sub(&da)?, &da], 0)?))
        }
        Criterion::Taylor | Criterion::Magnitude | Criterion::Random => None,
    };
    let gradient = match (criterion, inputs.weight_gradients) {
        (Criterion::Taylor, Some(gradients)) => {
            Some(gradient_rows(&gradients[layer], shard, projection, inputs.head_dim)?)
        }
        (Criterion::Taylor, None) => {
            return Err(Fault::Refused(
                "the `taylor` criterion needs weight gradients, which this pass did not keep".into(),
            ));
        }
        (Criterion::LoraPrune { .. } | Criterion::Magnitude | Criterion::Random, _) => None,
    };
    let scaled_b = b.f_mul_scalar(inputs.scaling)?;

    let tile_rows = (inputs.tile_elements / columns.max(1)).clamp(1, rows.max(1));
    let mut row_sums = Vec::new();
    let mut column_sums = Tensor::f_zeros([columns], (kind, weight.device()))?;
    let mut start = 0;
    while start < rows {
        let len = tile_rows.min(rows - start);
        let tile = |tensor: &Tensor| tensor.f_narrow(0, start, len);
        let mut scores = tile(&weight)?.f_to_kind(kind)?.f_addmm(&tile(&scaled_b)?, &a)?;
        if let Some((left, right)) = &guide {
            let _ = scores.f_mul_(&tile(left)?.f_mm(right)?)?;
        }
        if let Some(gradient) = &gradient {
            let _ = scores.f_mul_(&tile(gradient)?)?;
        }
        let scores = match criterion {
            Criterion::LoraPrune { form: LoraPruneForm::Paper } => scores.f_square_()?,
            Criterion::LoraPrune { form: LoraPruneForm::Code }
            | Criterion::Taylor
            | Criterion::Magnitude
            | Criterion::Random => scores.f_abs_()?,
        };
        match projection.split() {
            Split::Column => row_sums.push(scores.f_sum_dim_intlist(&[1i64][..], false, None)?),
            Split::Row => {
                let _ = column_sums.f_add_(&scores.f_sum_dim_intlist(&[0i64][..], false, None)?)?;
            }
        }
        start += len;
    }
    match projection.split() {
        Split::Column if row_sums.is_empty() => Ok(Tensor::f_zeros([0], (kind, weight.device()))?),
        Split::Column => Ok(Tensor::f_cat(&row_sums, 0)?),
        Split::Row => Ok(column_sums),
    }
}

/// One projection's rows of the layer's fused weights.
fn rows_of(shard: &LayerShard, projection: Projection, head_dim: i64) -> Result<Tensor> {
    slice(&shard.qkv, &shard.o, &shard.gate_up, &shard.down, shard, projection, head_dim)
}

fn gradient_rows(
    gradients: &WeightGradients,
    shard: &LayerShard,
    projection: Projection,
    head_dim: i64,
) -> Result<Tensor> {
    slice(&gradients.qkv, &gradients.o, &gradients.gate_up, &gradients.down, shard, projection, head_dim)
}

fn slice(
    qkv: &Tensor,
    o: &Tensor,
    gate_up: &Tensor,
    down: &Tensor,
    shard: &LayerShard,
    projection: Projection,
    head_dim: i64,
) -> Result<Tensor> {
    let (query, key) = (shard.query_heads * head_dim, shard.kv_heads * head_dim);
    Ok(match projection {
        Projection::Q => qkv.f_narrow(0, 0, query)?,
        Projection::K => qkv.f_narrow(0, query, key)?,
        Projection::V => qkv.f_narrow(0, query + key, key)?,
        Projection::O => o.shallow_clone(),
        Projection::Gate => gate_up.f_narrow(0, 0, shard.channels)?,
        Projection::Up => gate_up.f_narrow(0, shard.channels, shard.channels)?,
        Projection::Down => down.shallow_clone(),
    })
}

pub(crate) fn to_f64(values: &Tensor) -> Result<Vec<f64>> {
    let values = values.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?.f_contiguous()?;
    let mut out = vec![0.0; values.numel()];
    values.f_copy_data(&mut out, values.numel())?;
    Ok(out)
}
