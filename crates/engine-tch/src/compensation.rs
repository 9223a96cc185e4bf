//! Least-squares compensation: when a decision removes inputs of o and of down, the columns that stay change so that the
//! output stays as near as it can to what it was, over calibration windows (arXiv:2410.15567, with one set of removed
//! columns for all rows).
//!
//! ```text
//! dW_K^T = (S^T S + damping * mean(diag S^T S) I)^-1 S^T E
//!
//! layer:  E = S_P (W + s B A)_P^T                                     S of the pruned stream
//! stream: E = (h_d + S_d (W + s B A)^T) - (h_p + S (W + s B A)_K^T)   h_d, S_d of the stream before the decision
//! ```
//!
//! Layer after layer, o before down, each on the stream that the compensated layers before it give; without dropout. The
//! factors stay as they are: `dW` goes into the frozen weight, rounded once. Products are in f32 (f64 where the run
//! computes in it), their sums over passes and the solve in f64. Each rank sums over its share of the tokens; the sums
//! over ranks are equal on all, and so is what each solves.
//!
//! Shapes: n tokens of a pass · d hidden · K inputs that stay, on all ranks together, in ascending order.

use crate::communicator::Communicator;
use crate::factors::split_features;
use crate::fault::{Fault, Result};
use crate::frozen::FrozenWeight;
use crate::layer::Narrowing;
use crate::memory;
use crate::model::{Adapters, Model, Rows};
use crate::ops::low_rank::add_product;
use crate::shard::Shard;
use crate::source::compute_kind;
use pruning::KeepMask;
use recipe::{Compensation, CompensationTarget, LeastSquares};
use sharding::Placement;
use std::time::Instant;
use tch::{Device, Kind, TchError, Tensor};
use tracing::info;

/// How often the damping is raised tenfold when a matrix has no Cholesky factor.
const RAISES: i32 = 3;

impl Shard {
    /// Changes o and down of every layer from which `keep_mask` takes their inputs, before anything is sliced or masked.
    pub(crate) fn compensate(&mut self, keep_mask: &KeepMask, calibration: &[&[u32]]) -> Result<()> {
        let recipe = &self.setup.recipe;
        let choice = match recipe.pruning.as_ref().map(|pruning| pruning.compensation) {
            Some(Compensation::LeastSquares(choice)) => choice,
            Some(Compensation::None) | None => return Ok(()),
        };
        let takes = |layer: usize, which: Narrowing| {
            let (now, then) = (&self.keep_mask.layers[layer], &keep_mask.layers[layer]);
            match which {
                Narrowing::O => now.query_heads != then.query_heads,
                Narrowing::Down => now.channels != then.channels,
            }
        };
        let layers = self.keep_mask.layers.len();
        // Of a layer that goes as a whole nothing stays that could make up for it.
        let solves = |layer: usize| {
            !keep_mask.layers[layer].is_removed() && Narrowing::BOTH.iter().any(|which| takes(layer, *which))
        };
        let Some(last) = (0..layers).rev().find(|layer| solves(*layer)) else { return Ok(()) };
        let (factors, ledger) = (self.compute_factors()?, self.compute_ledger()?);
        let adapters = Adapters::evaluating(&self.layout, &factors, &ledger, &recipe.lora);
        let mut work = Work {
            choice,
            adapters: &adapters,
            tp_rank: self.setup.tp_rank,
            segments: segments(&mut self.model, calibration, recipe.batch.rows, self.communicator.as_mut())?,
            model: &mut self.model,
            communicator: self.communicator.as_mut(),
        };
        let then = self.placement.restricted_to(keep_mask);
        let compute = compute_kind(recipe.precision.compute);
        for layer in 0..=last {
            let started = Instant::now();
            for which in Narrowing::BOTH {
                let kept = if takes(layer, which) {
                    let place = Place { layer, which, tp_rank: self.setup.tp_rank };
                    let head_dim = self.source.spec().head_dim;
                    Some(Kept::new(&self.placement, &then, place, head_dim, compute, self.device)?)
                } else {
                    None
                };
                work.advance(layer, which, kept.as_ref())?;
            }
            info!(layer, last, seconds = started.elapsed().as_secs_f64(), "layer compensated");
        }
        drop(work);
        memory::give_back();
        Ok(())
    }
}

/// Windows of one pass and where they stand.
struct Segment {
    rows: Rows,
    /// The residual stream `[n, d]` with what has been removed and compensated so far.
    pruned: Tensor,
    /// The residual stream of the model before the decision, where it is wanted and another one.
    dense: Option<Tensor>,
}

fn segments(
    model: &mut Model,
    calibration: &[&[u32]],
    rows_per_pass: usize,
    communicator: &mut dyn Communicator,
) -> Result<Vec<Segment>> {
    let Some(first) = calibration.first() else {
        return Err(Fault::Refused(
            "`pruning.compensation` needs windows to calibrate on; there are none".into(),
        ));
    };
    if calibration.iter().any(|window| window.len() != first.len()) {
        return Err(Fault::Refused("windows to calibrate on must be of equal length".into()));
    }
    calibration
        .chunks(rows_per_pass.max(1))
        .map(|windows| {
            let (rows, pruned) = model.embed(windows, communicator)?;
            Ok(Segment { rows, pruned, dense: None })
        })
        .collect()
}

/// One of the two matrices of a layer, on a rank.
#[derive(Clone, Copy)]
struct Place {
    layer: usize,
    which: Narrowing,
    tp_rank: usize,
}

/// Inputs of o or down that stay.
struct Kept {
    /// Their positions among the columns that this rank holds.
    columns: Tensor,
    /// Positions of the same among those of all ranks.
    places: Tensor,
    /// How many stay, on all ranks.
    count: i64,
    /// `[columns held]`: one for each that stays.
    mask: Tensor,
}

impl Kept {
    fn new(
        now: &Placement,
        then: &Placement,
        place: Place,
        head_dim: usize,
        compute: Kind,
        device: Device,
    ) -> Result<Self> {
        let Place { layer, which, tp_rank } = place;
        let features = |placement: &Placement, rank: usize| {
            split_features(&placement.ranks[rank][layer], which.projection(), head_dim)
        };
        let (held, mine) = (features(now, tp_rank), features(then, tp_rank));
        let mut all: Vec<i64> = (0..then.ranks.len()).flat_map(|rank| features(then, rank)).collect();
        all.sort_unstable();
        let among = |whole: &[i64]| -> Result<Tensor> {
            let positions: Vec<i64> = mine
                .iter()
                .filter_map(|feature| whole.binary_search(feature).ok())
                .map(|at| at as i64)
                .collect();
            Ok(Tensor::f_from_slice(&positions)?.f_to_device(device)?)
        };
        let mask: Vec<f32> =
            held.iter().map(|feature| f32::from(mine.binary_search(feature).is_ok())).collect();
        Ok(Self {
            columns: among(&held)?,
            places: among(&all)?,
            count: all.len() as i64,
            mask: Tensor::f_from_slice(&mask)?.f_to_kind(compute)?.f_to_device(device)?,
        })
    }

    /// Columns that stay of `inputs` `[n, columns held]`, of all ranks: `[n, K]`.
    fn gather(&self, inputs: &Tensor, communicator: &mut dyn Communicator) -> Result<Tensor> {
        let mine = inputs.f_index_select(1, &self.columns)?;
        if communicator.tp_degree() == 1 {
            return Ok(mine);
        }
        let mut all = Tensor::f_zeros([inputs.size()[0], self.count], (inputs.kind(), inputs.device()))?;
        let _ = all.f_index_copy_(1, &self.places, &mine)?;
        communicator.all_reduce_sum(&mut all)?;
        Ok(all)
    }

    /// `weight` `[d, columns held]` with its rank's part of `delta` `[K, d]` added.
    fn changed(&self, weight: &FrozenWeight, delta: &Tensor) -> Result<FrozenWeight> {
        let weight = as_stored(weight)?;
        let mine = delta.f_index_select(0, &self.places)?.f_tr()?;
        let old = weight.f_index_select(1, &self.columns)?.f_to_kind(Kind::Double)?;
        let mut changed = weight.f_detach_copy()?;
        let _ = changed.f_index_copy_(1, &self.columns, &old.f_add(&mine)?.f_to_kind(weight.kind())?)?;
        Ok(FrozenWeight::Dense(changed))
    }
}

/// A weight whose values can be changed: those of a quantised one stand for the source's.
pub(crate) fn as_stored(weight: &FrozenWeight) -> Result<&Tensor> {
    match weight {
        FrozenWeight::Dense(weight) => Ok(weight),
        FrozenWeight::Int8(_) | FrozenWeight::Nf4(_) => {
            Err(Fault::Refused("a quantised weight cannot be compensated".into()))
        }
    }
}

struct Work<'a> {
    choice: LeastSquares,
    adapters: &'a Adapters<'a>,
    tp_rank: usize,
    segments: Vec<Segment>,
    model: &'a mut Model,
    communicator: &'a mut dyn Communicator,
}

impl Work<'_> {
    /// Takes the streams through o or down and adds what comes out; with `kept`, compensates it first.
    fn advance(&mut self, layer: usize, which: Narrowing, kept: Option<&Kept>) -> Result<()> {
        if let Some(kept) = kept.filter(|kept| kept.count > 0) {
            let statistics = self.statistics(layer, which, kept)?;
            let delta = statistics.solve(self.choice.damping).map_err(|error| match error {
                Unsolved::Fault(fault) => fault,
                Unsolved::NotPositive { damping } => Fault::Tensor(TchError::Torch(format!(
                    "the second moments of layer {layer}'s inputs of {} cannot be solved with, even with damping \
                     {damping}; calibrate on more windows or raise `pruning.compensation.damping`",
                    which.projection()
                ))),
            })?;
            info!(layer, projection = %which.projection(), left = statistics.share_left(&delta)?, "compensated");
            let weight = self.model.layers[layer].narrowing_mut(which);
            *weight = kept.changed(weight, &delta)?;
        } else {
            for segment in &mut self.segments {
                if kept.is_some()
                    && self.choice.target == CompensationTarget::Stream
                    && segment.dense.is_none()
                {
                    segment.dense = Some(segment.pruned.shallow_clone());
                }
                if let Some(dense) = &segment.dense {
                    let pass = self.model.pass(&segment.rows, self.adapters, 0)?;
                    let shard = &self.model.layers[layer];
                    let inputs = shard.inputs_of(layer, which, dense, &pass)?;
                    let out = shard.output_of(layer, which, &inputs, &pass, self.communicator)?;
                    segment.dense = Some(out.f_add(dense)?);
                }
            }
        }
        for segment in &mut self.segments {
            let pass = self.model.pass(&segment.rows, self.adapters, 0)?;
            let shard = &self.model.layers[layer];
            let mut inputs = shard.inputs_of(layer, which, &segment.pruned, &pass)?;
            if let Some(kept) = kept {
                inputs = inputs.f_mul(&kept.mask)?;
            }
            let out = shard.output_of(layer, which, &inputs, &pass, self.communicator)?;
            segment.pruned = out.f_add(&segment.pruned)?;
        }
        Ok(())
    }

    /// Sums over all windows; the dense stream is taken along.
    fn statistics(&mut self, layer: usize, which: Narrowing, kept: &Kept) -> Result<Statistics> {
        let mut sums: Option<Statistics> = None;
        for segment in &mut self.segments {
            let pass = self.model.pass(&segment.rows, self.adapters, 0)?;
            let shard = &self.model.layers[layer];
            let inputs = shard.inputs_of(layer, which, &segment.pruned, &pass)?;
            let stay = inputs.f_mul(&kept.mask)?;
            let missing = match self.choice.target {
                CompensationTarget::Layer => {
                    shard.output_of(layer, which, &inputs.f_sub(&stay)?, &pass, self.communicator)?
                }
                CompensationTarget::Stream => {
                    let dense = segment.dense.as_ref().unwrap_or(&segment.pruned);
                    let whole = shard.inputs_of(layer, which, dense, &pass)?;
                    let whole = shard.output_of(layer, which, &whole, &pass, self.communicator)?;
                    let dense = whole.f_add(dense)?;
                    let pruned = shard.output_of(layer, which, &stay, &pass, self.communicator)?;
                    let missing = dense.f_sub(&pruned.f_add(&segment.pruned)?)?;
                    segment.dense = Some(dense);
                    missing
                }
            };
            let inputs = kept.gather(&stay, self.communicator)?;
            let sums = match &mut sums {
                Some(sums) => sums,
                None => sums.insert(Statistics::zeros(inputs.size()[1], missing.size()[1], inputs.device())?),
            };
            let (start, len) = share(inputs.size()[0], self.tp_rank, self.communicator.tp_degree());
            sums.add(&inputs.f_narrow(0, start, len)?, &missing.f_narrow(0, start, len)?)?;
        }
        let mut sums = sums.ok_or_else(|| Fault::Refused("there are no windows to calibrate on".into()))?;
        sums.sum_over_ranks(self.communicator)?;
        Ok(sums)
    }
}

/// Tokens of a pass that a rank sums over: first and how many.
fn share(tokens: i64, tp_rank: usize, tp_degree: usize) -> (i64, i64) {
    let bound = |rank: usize| tokens * rank as i64 / tp_degree as i64;
    (bound(tp_rank), bound(tp_rank + 1) - bound(tp_rank))
}

/// What the solve needs, in f64.
pub(crate) struct Statistics {
    /// `S^T S` `[K, K]`
    pub(crate) gram: Tensor,
    /// `S^T E` `[K, d]`
    pub(crate) cross: Tensor,
    /// `sum E^2` `[1]`
    pub(crate) missing: Tensor,
}

/// Why there is no solution.
#[derive(Debug)]
pub(crate) enum Unsolved {
    Fault(Fault),
    NotPositive { damping: f64 },
}

impl From<TchError> for Unsolved {
    fn from(error: TchError) -> Self {
        Self::Fault(error.into())
    }
}

impl Statistics {
    pub(crate) fn zeros(inputs: i64, outputs: i64, device: Device) -> Result<Self> {
        let f64_on = (Kind::Double, device);
        Ok(Self {
            gram: Tensor::f_zeros([inputs, inputs], f64_on)?,
            cross: Tensor::f_zeros([inputs, outputs], f64_on)?,
            missing: Tensor::f_zeros([1], f64_on)?,
        })
    }

    /// Adds tokens: `inputs` `[n, K]`, and what is missing of their output `[n, d]`.
    pub(crate) fn add(&mut self, inputs: &Tensor, missing: &Tensor) -> Result<()> {
        let kind = if inputs.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let (inputs, missing) = (inputs.f_to_kind(kind)?, missing.f_to_kind(kind)?);
        add_product(&mut self.gram, &inputs.f_tr()?, &inputs)?;
        add_product(&mut self.cross, &inputs.f_tr()?, &missing)?;
        let _ = self.missing.f_add_(&missing.f_to_kind(Kind::Double)?.f_square()?.f_sum(None)?)?;
        Ok(())
    }

    fn sum_over_ranks(&mut self, communicator: &mut dyn Communicator) -> Result<()> {
        for sum in [&mut self.gram, &mut self.cross, &mut self.missing] {
            communicator.all_reduce_sum(sum)?;
        }
        Ok(())
    }

    /// `dW_K^T` `[K, d]`. An input that was always zero gets no change.
    pub(crate) fn solve(&self, damping: f64) -> std::result::Result<Tensor, Unsolved> {
        let mean = self.gram.f_diagonal(0, 0, 1)?.f_mean(None)?.f_double_value(&[])?;
        if mean == 0.0 || self.cross.numel() == 0 {
            return Ok(self.cross.f_zeros_like()?);
        }
        if !mean.is_finite() || self.cross.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            let what = "a sum over calibration windows for the compensation".into();
            return Err(Unsolved::Fault(Fault::NotFinite { what, step: 0, value: mean }));
        }
        let mut tried = damping;
        for raise in 0..=RAISES {
            tried = damping * 10f64.powi(raise);
            let damped = self.gram.f_detach_copy()?;
            let _ = damped.f_diagonal(0, 0, 1)?.f_add_scalar_(tried * mean)?;
            let (factor, info) = Tensor::f_linalg_cholesky_ex(&damped, false, false)?;
            drop(damped);
            if info.f_int64_value(&[])? == 0 {
                return Ok(self.cross.f_cholesky_solve(&factor, false)?);
            }
        }
        Err(Unsolved::NotPositive { damping: tried })
    }

    /// Share of the missing output's squared sum that is still missing with `delta`.
    pub(crate) fn share_left(&self, delta: &Tensor) -> Result<f64> {
        let value = |tensor: &Tensor| tensor.f_sum(None)?.f_double_value(&[]);
        let before = value(&self.missing)?;
        let explained = value(&delta.f_mul(&self.cross)?)?;
        let explained = 2.0 * explained - value(&delta.f_mul(&self.gram.f_mm(delta)?)?)?;
        Ok(if before == 0.0 { 0.0 } else { 1.0 - explained / before })
    }
}
