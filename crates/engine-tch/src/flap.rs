//! FLAP's scores (arXiv:2312.11983): how much of the output would be lost with an input that is replaced by its mean.
//!
//! ```text
//! WIFV_j = Var(x_j) |W_:,j|^2          Var over the step's tokens; squared once more for o, as the published code has it
//! z_j    = (WIFV_j - mean) / std       over all live inputs of the layer's o, or down, on all ranks; std unbiased
//! ```
//!
//! A head's score is the mean of its inputs'. Scores of o are by query head; q, k, v, gate and up have none.

use crate::communicator::Communicator;
use crate::fault::{Fault, Result};
use crate::importance::{LiveGroups, ScoreInputs, projection_sums, to_f64};
use crate::layer::LayerShard;
use crate::observed::Observed;
use engine::ProjectionScores;
use model_spec::Projection;
use recipe::Criterion;
use tch::{Kind, Tensor};

/// Scores of all live groups of this rank.
pub(crate) fn scores(
    layers: &[LayerShard],
    live: &[LiveGroups],
    inputs: &ScoreInputs,
    communicator: &mut dyn Communicator,
) -> Result<Vec<ProjectionScores>> {
    let Some(observed) = inputs.observed else {
        return Err(Fault::Refused(
            "the flap criterion needs moments that the passes of this step did not keep".into(),
        ));
    };
    // By layer, of o and of down.
    let mut metrics: Vec<[Tensor; 2]> = Vec::with_capacity(layers.len());
    let mut sums = Vec::new();
    for (layer, (shard, live)) in layers.iter().zip(live).enumerate() {
        let Observed::InputMoments(moments) = &observed[layer] else {
            return Err(Fault::Refused("the flap criterion needs the moments of inputs".into()));
        };
        let fluctuation = |sums: &Tensor, projection| -> Result<Tensor> {
            let tokens = moments.tokens.max(1) as f64;
            let mean = sums.f_get(0)?.f_div_scalar(tokens)?;
            let variance = sums.f_get(1)?.f_div_scalar(tokens)?.f_sub(&mean.f_square()?)?.f_clamp_min(0.0)?;
            let lengths = projection_sums(Criterion::Flap, layer, projection, shard, inputs)?;
            Ok(variance.f_mul(&lengths.f_to_kind(Kind::Double)?)?)
        };
        let heads = fluctuation(&moments.o, Projection::O)?.f_square()?.f_view([-1, inputs.head_dim])?;
        let channels = fluctuation(&moments.down, Projection::Down)?;
        let picked = |values: Tensor, live: Option<&Tensor>| -> Result<Tensor> {
            Ok(match live {
                Some(places) => values.f_index_select(0, places)?,
                None => values,
            })
        };
        let of_layer = [picked(heads, live.of(Projection::O))?, picked(channels, live.of(Projection::Down))?];
        for values in &of_layer {
            let sum =
                |values: &Tensor| -> Result<f64> { Ok(values.f_sum(Kind::Double)?.f_double_value(&[])?) };
            sums.extend([values.numel() as f64, sum(values)?, sum(&values.f_square()?)?]);
        }
        metrics.push(of_layer);
    }
    let mut sums: Tensor = Tensor::f_from_slice::<f64>(&sums)?.f_to_device(metrics[0][0].device())?;
    communicator.all_reduce_sum(&mut sums)?;
    let sums = to_f64(&sums)?;
    let mut all = Vec::new();
    for (layer, of_layer) in metrics.iter().enumerate() {
        let standardised = |place: usize, values: &Tensor| -> Result<Tensor> {
            let at = 3 * (2 * layer + place);
            let (count, sum, squares) = (sums[at], sums[at + 1], sums[at + 2]);
            let mean = sum / count.max(1.0);
            let deviation = ((squares - count * mean * mean).max(0.0) / (count - 1.0).max(1.0)).sqrt();
            let scale = if deviation > 0.0 { 1.0 / deviation } else { 0.0 };
            Ok(values.f_sub_scalar(mean)?.f_mul_scalar(scale)?)
        };
        let heads = standardised(0, &of_layer[0])?.f_mean_dim(&[1i64][..], false, Kind::Double)?;
        let (heads, channels) = (to_f64(&heads)?, to_f64(&standardised(1, &of_layer[1])?)?);
        let kv_heads = match &live[layer].kv_heads {
            Some(places) => places.size1()?,
            None => layers[layer].kv_heads,
        };
        for projection in Projection::ALL {
            let values = match projection {
                Projection::O => heads.clone(),
                Projection::Down => channels.clone(),
                Projection::Q => vec![0.0; heads.len()],
                Projection::K | Projection::V => vec![0.0; kv_heads as usize],
                Projection::Gate | Projection::Up => vec![0.0; channels.len()],
            };
            if let Some(&value) = values.iter().find(|value| !value.is_finite()) {
                let what = format!("score of layer {layer} {projection}");
                return Err(Fault::NotFinite { what, step: inputs.step, value });
            }
            all.push(ProjectionScores { layer, projection, values });
        }
    }
    Ok(all)
}
