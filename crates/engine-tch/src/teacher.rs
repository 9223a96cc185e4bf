//! The unpruned model's likeliest next tokens, which distillation trains towards: read off its logits by chunks, kept in
//! host memory by window.
//!
//! The order is by logit in single precision, of equal ones the lower token id first. Both are packed into one number of
//! double precision whose order is that order: a single has 24 significant bits, a double 53, so 29 are free for the
//! id. Ranks merge what they found of their parts of the vocabulary by such numbers and all arrive at the same bits.

use crate::communicator::Communicator;
use crate::fault::{Fault, Result};
use crate::loss::VocabularyHead;
use crate::state_file::RankState;
use std::collections::{BTreeMap, HashSet};
use tch::{Device, Kind, Tensor};

/// The bits of a double below those of a single.
const ID_BITS: i64 = (1 << 29) - 1;
/// Logits held at a time, as a part of the loss's: where many are equal, packing takes several tensors of their size.
const CHUNK_SHARE: i64 = 2;

/// The likeliest tokens at some positions.
pub(crate) struct Likeliest {
    /// Token ids `[n, k]`, by falling probability. Int32.
    pub(crate) ids: Tensor,
    /// Softmax over these tokens alone `[n, k]`. Float.
    pub(crate) probabilities: Tensor,
}

/// What a loss trains towards beside the next tokens of the text.
pub(crate) struct SoftTargets {
    /// Share of the loss, in `[0, 1]`.
    pub(crate) weight: f64,
    /// At every position of the loss.
    pub(crate) likeliest: Likeliest,
}

/// What the unpruned model says at every predicted position of the windows that it has read.
#[derive(Default)]
pub(crate) struct Teacher {
    windows: BTreeMap<Box<[u32]>, Likeliest>,
}

/// Names of [`Teacher::tensors`].
const LENGTHS: &str = "teacher.lengths";
const TOKENS: &str = "teacher.tokens";
const IDS: &str = "teacher.ids";
const PROBABILITIES: &str = "teacher.probabilities";

impl Teacher {
    /// All that was read, for a checkpoint; nothing when nothing was. Whole numbers are in double precision, which holds
    /// them exactly.
    pub(crate) fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        if self.windows.is_empty() {
            return Ok(Vec::new());
        }
        let lengths: Vec<f64> = self.windows.keys().map(|window| window.len() as f64).collect();
        let tokens: Vec<f64> =
            self.windows.keys().flat_map(|window| window.iter().map(|id| f64::from(*id))).collect();
        let joined = |part: fn(&Likeliest) -> &Tensor| {
            Tensor::f_cat(&self.windows.values().map(part).collect::<Vec<_>>(), 0)
        };
        Ok(vec![
            (LENGTHS, Tensor::f_from_slice(&lengths)?),
            (TOKENS, Tensor::f_from_slice(&tokens)?),
            (IDS, joined(|one| &one.ids)?.f_to_kind(Kind::Double)?),
            (PROBABILITIES, joined(|one| &one.probabilities)?),
        ])
    }

    /// What [`Teacher::tensors`] gave, from a checkpoint.
    pub(crate) fn restored(state: &RankState) -> Result<Self> {
        let mut teacher = Self::default();
        if !state.has(LENGTHS) {
            return Ok(teacher);
        }
        let broken =
            || Fault::File("the checkpoint's tensors of the unpruned model do not fit together".into());
        let numbers = |name: &str| -> Result<Vec<f64>> {
            Vec::<f64>::try_from(state.tensor(name)?.f_view([-1i64])?).map_err(|_| broken())
        };
        let (lengths, tokens) = (numbers(LENGTHS)?, numbers(TOKENS)?);
        let (ids, probabilities) = (state.tensor(IDS)?.f_to_kind(Kind::Int)?, state.tensor(PROBABILITIES)?);
        let (mut first_token, mut first_position) = (0_usize, 0_i64);
        for length in lengths {
            let length = length as usize;
            let end = first_token.checked_add(length).ok_or_else(broken)?;
            let window = tokens.get(first_token..end).ok_or_else(broken)?;
            let window: Vec<u32> = window.iter().map(|id| *id as u32).collect();
            let positions = length.saturating_sub(1) as i64;
            let part = |of: &Tensor| -> Result<Tensor> {
                Ok(of.f_narrow(0, first_position, positions)?.f_contiguous()?.f_detach_copy()?)
            };
            let likeliest = Likeliest { ids: part(&ids)?, probabilities: part(&probabilities)? };
            teacher.windows.insert(window.into(), likeliest);
            first_token = end;
            first_position += positions;
        }
        Ok(teacher)
    }

    /// Those of `rows` that were not read yet, each once.
    pub(crate) fn unread<'a>(&self, rows: &[&'a [u32]]) -> Vec<&'a [u32]> {
        let mut seen = HashSet::new();
        rows.iter().copied().filter(|row| !self.windows.contains_key(*row) && seen.insert(*row)).collect()
    }

    /// Keeps what was read at the predicted positions of `rows`, one row after the other.
    pub(crate) fn keep(&mut self, rows: &[&[u32]], read: &Likeliest) -> Result<()> {
        let mut first = 0;
        for row in rows {
            let positions = row.len().saturating_sub(1) as i64;
            let part = |of: &Tensor| of.f_narrow(0, first, positions);
            let likeliest = Likeliest { ids: part(&read.ids)?, probabilities: part(&read.probabilities)? };
            self.windows.insert((*row).into(), likeliest);
            first += positions;
        }
        Ok(())
    }

    /// What was said at the predicted positions of `rows`, one row after the other.
    pub(crate) fn targets(&self, rows: &[&[u32]], weight: f64) -> Result<SoftTargets> {
        let read = rows.iter().map(|row| {
            self.windows.get(*row).ok_or_else(|| {
                Fault::Refused(
                    "a window was not read by the unpruned model; have it taught before the first mask"
                        .into(),
                )
            })
        });
        let read = read.collect::<Result<Vec<_>>>()?;
        let joined = |part: fn(&Likeliest) -> &Tensor| {
            Tensor::f_cat(&read.iter().map(|one| part(one)).collect::<Vec<_>>(), 0)
        };
        let likeliest =
            Likeliest { ids: joined(|one| &one.ids)?, probabilities: joined(|one| &one.probabilities)? };
        Ok(SoftTargets { weight, likeliest })
    }
}

impl VocabularyHead<'_> {
    /// The `top_k` likeliest tokens given each of `hidden` `[n, d]`, equal on all ranks, in host memory.
    pub(crate) fn likeliest(
        &self,
        hidden: &Tensor,
        top_k: usize,
        communicator: &mut dyn Communicator,
    ) -> Result<Likeliest> {
        let (positions, _) = hidden.size2()?;
        let weight = self.weight.f_to_kind(hidden.kind())?;
        let held = self.rows.end - self.rows.start;
        let chunk = (self.chunk_elements / CHUNK_SHARE / held.max(1)).clamp(1, positions.max(1));
        let (mut ids, mut probabilities) = (Vec::new(), Vec::new());
        let mut start = 0;
        while start < positions {
            let len = chunk.min(positions - start);
            let logits = hidden.f_narrow(0, start, len)?.f_mm(&weight.f_tr()?)?;
            let best = self.best(&logits.f_to_kind(Kind::Float)?, top_k as i64, communicator)?;
            let (best_ids, best_logits) = unpack(&best)?;
            if best_logits.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                let value = best_logits.f_sum(Kind::Double)?.f_double_value(&[])?;
                return Err(Fault::NotFinite {
                    what: "a logit of the unpruned model".into(),
                    step: 0,
                    value,
                });
            }
            ids.push(best_ids.f_to_kind(Kind::Int)?.f_to_device(Device::Cpu)?);
            let softmax = best_logits.f_softmax(1, Kind::Double)?;
            probabilities.push(softmax.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?);
            start += len;
        }
        Ok(Likeliest { ids: Tensor::f_cat(&ids, 0)?, probabilities: Tensor::f_cat(&probabilities, 0)? })
    }

    /// The `top_k` highest of all ranks' `logits` `[n, vocabulary on this rank]`, packed.
    fn best(&self, logits: &Tensor, top_k: i64, communicator: &mut dyn Communicator) -> Result<Tensor> {
        let (positions, held) = logits.size2()?;
        let own = highest(logits, self.rows.start, top_k.min(held))?;
        if communicator.tp_degree() == 1 {
            return Ok(own);
        }
        // Each rank adds its own to a place of zeros; where it has fewer, nothing may win.
        let degree = communicator.tp_degree() as i64;
        let mut all = Tensor::f_zeros([positions, degree, top_k], (Kind::Double, logits.device()))?;
        let mut place = all.f_select(1, communicator.tp_rank() as i64)?;
        let _ = place.f_fill_(f64::NEG_INFINITY)?;
        place.f_narrow(1, 0, own.size()[1])?.f_copy_(&own)?;
        communicator.all_reduce_sum(&mut all)?;
        Ok(all.f_view([positions, degree * top_k])?.f_topk(top_k, 1, true, true)?.0)
    }
}

/// The `count` highest of each row of `logits` `[n, v]` in single precision, packed; the tokens begin at `first_id`.
fn highest(logits: &Tensor, first_id: i64, count: i64) -> Result<Tensor> {
    let (values, places) = logits.f_topk(count, 1, true, true)?;
    let mut packed = pack(&values, &places.f_add_scalar(first_id)?)?;
    // Where more reach the lowest of these than were asked for, the choice among equals was not by id.
    let lowest = values.f_narrow(1, count - 1, 1)?;
    let reached = logits.f_ge_tensor(&lowest)?.f_sum_dim_intlist(&[1i64][..], false, Kind::Int64)?;
    let unsure = reached.f_ne(count)?.f_nonzero()?.f_view([-1i64])?;
    if unsure.numel() > 0 {
        let ids =
            Tensor::f_arange_start(first_id, first_id + logits.size()[1], (Kind::Int64, logits.device()))?;
        let all = pack(&logits.f_index_select(0, &unsure)?, &ids)?;
        let _ = packed.f_index_copy_(0, &unsure, &all.f_topk(count, 1, true, true)?.0)?;
    }
    Ok(packed.f_topk(count, 1, true, true)?.0)
}

/// `logits` in single precision, each with its token's id in the lowest bits.
fn pack(logits: &Tensor, ids: &Tensor) -> Result<Tensor> {
    // Adding zero makes -0 equal to 0.
    let packed = logits.f_to_kind(Kind::Double)?.f_add_scalar_(0.0)?;
    let mut bits = packed.f_view_dtype(Kind::Int64)?;
    // A lower id is a higher number: farther from zero above it, nearer to it below.
    let above = ids.f_neg()?.f_add_scalar(ID_BITS)?;
    let _ = bits.f_bitwise_or_tensor_(&above.f_where_self(&bits.f_ge(0)?, ids)?)?;
    Ok(packed)
}

/// Ids and logits of packed numbers.
fn unpack(packed: &Tensor) -> Result<(Tensor, Tensor)> {
    let bits = packed.f_view_dtype(Kind::Int64)?;
    let low = bits.f_bitwise_and(ID_BITS)?;
    let ids = low.f_neg()?.f_add_scalar(ID_BITS)?.f_where_self(&bits.f_ge(0)?, &low)?;
    Ok((ids, bits.f_bitwise_and(!ID_BITS)?.f_view_dtype(Kind::Double)?))
}
