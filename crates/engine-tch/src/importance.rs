//! The score pass: raw group sums of every projection, from tiles that stay in the cache. Nothing of the size of a weight
//! is stored (but for `taylor`, whose gradients are).
//!
//! ```text
//! Ghat = dB A + B dA - dB dA = [dB | B] [A - dA ; dA]     rank 2r      (arXiv:2305.18403, eq. 9, eta = 1)
//! W    = W0 + s B A
//! code: sum |Ghat * W|      paper: sum (Ghat * W)^2      taylor: sum |G * W|      magnitude: sum |W|
//! tangent: as code, with the gradients of `tangent` and without dB dA
//! wanda: sum W^2 sum x^2, of o and down alone
//! ```
//!
//! In f32 the first two are one kernel of our own: on a CPU `ops::scores`, on a GPU `low_rank_scores` of `cuda/kernels.cu`.
//!
//! The sums run over a group's rows of q, k, v, gate and up and over its columns of o and down. `pruning::criterion` has
//! the plain references.

use crate::cuda::compiler::{Kernels, MOST_SCORED_RANK, kernels};
use crate::factors::{Factor, FactorLayout};
use crate::fault::{Fault, Result};
use crate::frozen::FrozenWeight;
use crate::layer::LayerShard;
use crate::observed::{Observed, WeightGradients};
use crate::ops::on_cuda::{self, ScoredWeight, SumsOf};
use crate::ops::scores::{self, GuidedFactors};
use engine::ProjectionScores;
use model_spec::{Projection, Split};
use recipe::{Criterion, LoraPruneForm};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Weights in a tile: 512 KiB of f32, which the second-level cache of today's cores holds with its temporaries.
pub(crate) const TILE_ELEMENTS: i64 = 1 << 17;
/// On a GPU each tile costs several launches: 128 MiB of f32.
const DEVICE_TILE_ELEMENTS: i64 = 1 << 25;

pub(crate) fn tile_elements(device: Device) -> i64 {
    if device.is_cuda() { DEVICE_TILE_ELEMENTS } else { TILE_ELEMENTS }
}

/// What the scores of one step are made from.
pub(crate) struct ScoreInputs<'a> {
    pub(crate) layout: &'a FactorLayout,
    pub(crate) factors: &'a Tensor,
    /// Pairs that are frozen, laid out like the factors.
    pub(crate) ledger: &'a [Tensor],
    /// Complete and clipped.
    pub(crate) gradients: &'a Tensor,
    pub(crate) observed: Option<&'a [Observed]>,
    pub(crate) scaling: f64,
    pub(crate) head_dim: i64,
    pub(crate) step: u64,
    /// Weights scored at a time; [`tile_elements`] but in tests.
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
    pub(crate) fn of(&self, projection: Projection) -> Option<&Tensor> {
        match projection {
            Projection::Q | Projection::O => self.query_heads.as_ref(),
            Projection::K | Projection::V => self.kv_heads.as_ref(),
            Projection::Gate | Projection::Up | Projection::Down => self.channels.as_ref(),
        }
    }
}

/// Sums along the unsplit dimension: one value for each feature along the split one.
pub(crate) fn projection_sums(
    criterion: Criterion,
    layer: usize,
    projection: Projection,
    shard: &LayerShard,
    inputs: &ScoreInputs,
) -> Result<Tensor> {
    let (weight, first_row, rows) = rows_of(shard, projection, inputs.head_dim);
    let factor = |flat: &Tensor, factor| inputs.layout.view(flat, layer, projection, factor);
    let (a, b) = (factor(inputs.factors, Factor::A)?, factor(inputs.factors, Factor::B)?);
    let kind = a.kind();
    let (_, columns) = weight.size2()?;
    let tile_rows = (inputs.tile_elements / columns.max(1)).clamp(1, rows.max(1));
    let form = match criterion {
        Criterion::LoraPrune { form } => Some(form),
        Criterion::Tangent => Some(LoraPruneForm::Code),
        Criterion::Taylor | Criterion::Magnitude | Criterion::Wanda | Criterion::Flap | Criterion::Random => {
            None
        }
    };
    // The kernels know one pair.
    if let Some(form) = form
        && inputs.ledger.is_empty()
        && scores::takes(&a)
    {
        let (grad_a, grad_b) = (factor(inputs.gradients, Factor::A)?, factor(inputs.gradients, Factor::B)?);
        let guided = GuidedFactors {
            a: &a,
            stepped_a: &stepped_a(criterion, &a, &grad_a)?,
            grad_a: &grad_a,
            b: &b,
            grad_b: &grad_b,
            scaling: inputs.scaling,
        };
        // What is held as it is read needs no tiles.
        let (tile_rows, held) = match weight {
            FrozenWeight::Dense(weight) => (rows, weight.kind()),
            FrozenWeight::Int8(_) | FrozenWeight::Nf4(_) => (tile_rows, kind),
        };
        let tile = |start, len| Ok(weight.dense_rows(first_row + start, len, held)?.f_contiguous()?);
        return scores::guided_sums(&guided, form, projection.split(), tile_rows, &tile);
    }
    if let Criterion::LoraPrune { form } = criterion
        && inputs.ledger.is_empty()
        && kind == Kind::Float
        && let Some(on) = scored_on(&a)
    {
        let (grad_a, grad_b) = (factor(inputs.gradients, Factor::A)?, factor(inputs.gradients, Factor::B)?);
        // Held in 16 bits or quantised: read in the format of the products.
        let read = match weight {
            FrozenWeight::Dense(weight) if weight.kind() == Kind::Float => Kind::Float,
            FrozenWeight::Dense(_) | FrozenWeight::Int8(_) | FrozenWeight::Nf4(_) => shard.input_norm.kind(),
        };
        let scored = ScoredWeight {
            weight: &weight.dense_rows(first_row, rows, read)?,
            a: &a,
            grad_a: &grad_a,
            b: &b,
            grad_b: &grad_b,
            scaling: inputs.scaling,
        };
        let sums = match projection.split() {
            Split::Column => SumsOf::Rows,
            Split::Row => SumsOf::Columns,
        };
        return on_cuda::low_rank_sums(on.as_ref(), &scored, sums, form == LoraPruneForm::Paper);
    }
    let guide = match criterion {
        Criterion::LoraPrune { .. } | Criterion::Tangent => {
            let (da, db) = (factor(inputs.gradients, Factor::A)?, factor(inputs.gradients, Factor::B)?);
            let stepped_a = stepped_a(criterion, &a, &da)?;
            Some((Tensor::f_cat(&[&db, &b], 1)?, Tensor::f_cat(&[&stepped_a, &da], 0)?))
        }
        Criterion::Taylor | Criterion::Magnitude | Criterion::Wanda | Criterion::Flap | Criterion::Random => {
            None
        }
    };
    // By which the tile is multiplied, and by which its columns are.
    let (gradient, squares) = match (criterion, inputs.observed.map(|all| &all[layer])) {
        (Criterion::Taylor, Some(Observed::WeightGradients(gradients))) => {
            (Some(gradient_rows(gradients, shard, projection, inputs.head_dim)?), None)
        }
        (Criterion::Wanda, Some(Observed::InputSquares(squares))) => {
            let Some(squares) = squares.of(projection) else {
                // Only the maps whose inputs go are scored.
                return Ok(Tensor::f_zeros([rows], (kind, weight.device()))?);
            };
            (None, Some(squares))
        }
        // The columns' squared lengths alone; `flap` has the rest.
        (Criterion::Flap, _) => (None, None),
        (Criterion::Taylor | Criterion::Wanda, _) => {
            return Err(Fault::Refused(format!(
                "the {criterion:?} criterion needs sums that the passes of this step did not keep"
            )));
        }
        (Criterion::LoraPrune { .. } | Criterion::Tangent | Criterion::Magnitude | Criterion::Random, _) => {
            (None, None)
        }
    };
    let scaled_b = b.f_mul_scalar(inputs.scaling)?;

    let mut row_sums = Vec::new();
    let mut column_sums = Tensor::f_zeros([columns], (kind, weight.device()))?;
    let mut start = 0;
    while start < rows {
        let len = tile_rows.min(rows - start);
        let tile = |tensor: &Tensor| tensor.f_narrow(0, start, len);
        let mut scores = weight.dense_rows(first_row + start, len, kind)?.f_addmm(&tile(&scaled_b)?, &a)?;
        for frozen in inputs.ledger {
            let (a, b) = (factor(frozen, Factor::A)?, factor(frozen, Factor::B)?);
            scores = scores.f_addmm(&tile(&b.f_mul_scalar(inputs.scaling)?)?, &a)?;
        }
        if let Some((left, right)) = &guide {
            let _ = scores.f_mul_(&tile(left)?.f_mm(right)?)?;
        }
        if let Some(gradient) = &gradient {
            let _ = scores.f_mul_(&tile(gradient)?)?;
        }
        let scores = match criterion {
            Criterion::LoraPrune { form: LoraPruneForm::Paper } | Criterion::Wanda | Criterion::Flap => {
                scores.f_square_()?
            }
            Criterion::LoraPrune { form: LoraPruneForm::Code }
            | Criterion::Tangent
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
        Split::Row => match squares {
            Some(squares) => Ok(column_sums.f_mul_(squares)?),
            None => Ok(column_sums),
        },
    }
}

/// What `dB` is multiplied by: `A - dA`, or `A` where there is no term of both gradients.
fn stepped_a(criterion: Criterion, a: &Tensor, grad_a: &Tensor) -> Result<Tensor> {
    Ok(if criterion == Criterion::Tangent { a.shallow_clone() } else { a.f_sub(grad_a)? })
}

/// The kernels of the device that holds `a` `[rank, columns]`, where its factors fit into a thread's registers.
fn scored_on(a: &Tensor) -> Option<Arc<Kernels>> {
    let lora_rank = usize::try_from(a.size()[0]).ok()?;
    (1..=MOST_SCORED_RANK).contains(&lora_rank).then(|| kernels(a.device(), lora_rank)).flatten()
}

/// The layer's fused weight that holds a projection, the projection's first row in it, and how many rows it has.
fn rows_of(shard: &LayerShard, projection: Projection, head_dim: i64) -> (&FrozenWeight, i64, i64) {
    let (query, key) = (shard.query_heads * head_dim, shard.kv_heads * head_dim);
    let hidden = shard.input_norm.size()[0];
    match projection {
        Projection::Q => (&shard.qkv, 0, query),
        Projection::K => (&shard.qkv, query, key),
        Projection::V => (&shard.qkv, query + key, key),
        Projection::O => (&shard.o, 0, hidden),
        Projection::Gate => (&shard.gate_up, 0, shard.channels),
        Projection::Up => (&shard.gate_up, shard.channels, shard.channels),
        Projection::Down => (&shard.down, 0, hidden),
    }
}

fn gradient_rows(
    gradients: &WeightGradients,
    shard: &LayerShard,
    projection: Projection,
    head_dim: i64,
) -> Result<Tensor> {
    let gradient = match projection {
        Projection::Q | Projection::K | Projection::V => &gradients.qkv,
        Projection::O => &gradients.o,
        Projection::Gate | Projection::Up => &gradients.gate_up,
        Projection::Down => &gradients.down,
    };
    let (_, first_row, rows) = rows_of(shard, projection, head_dim);
    Ok(gradient.f_narrow(0, first_row, rows)?)
}

pub(crate) fn to_f64(values: &Tensor) -> Result<Vec<f64>> {
    let values = values.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?.f_contiguous()?;
    let mut out = vec![0.0; values.numel()];
    values.f_copy_data(&mut out, values.numel())?;
    Ok(out)
}
