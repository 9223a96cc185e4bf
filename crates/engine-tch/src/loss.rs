//! Next-token cross-entropy over a vocabulary that is split between ranks, by chunks of positions, so that no tensor of
//! positions times vocabulary is ever whole.

use crate::communicator::{Communicator, ReduceOp};
use crate::fault::Result;
use crate::ops::{self, matmul};
use crate::teacher::SoftTargets;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Logits held at a time.
pub(crate) const CHUNK_ELEMENTS: i64 = 16 << 20;

/// The head's rows on this rank.
pub(crate) struct VocabularyHead<'a> {
    /// `[vocabulary on this rank, d]`
    pub(crate) weight: &'a Tensor,
    pub(crate) rows: Range<i64>,
    /// Logits held at a time; [`CHUNK_ELEMENTS`] but in tests.
    pub(crate) chunk_elements: i64,
}

fn ceil_div(count: i64, by: i64) -> i64 {
    (count + by - 1) / by
}

impl VocabularyHead<'_> {
    /// Sum of negative log likelihoods, in nats, of `targets` `[n]` (vocabulary indices) given `hidden` `[n, d]`.
    ///
    /// With `grad_scale`, also the gradient `[n, d]` of `grad_scale * sum`, equal on all ranks; with `soft` targets, of
    /// `grad_scale * ((1 - weight) * sum + weight * cross-entropy to them)`. The sum returned is that of `targets`.
    pub(crate) fn negative_log_likelihood(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        soft: Option<&SoftTargets>,
        grad_scale: Option<f64>,
        communicator: &mut dyn Communicator,
    ) -> Result<(f64, Option<Tensor>)> {
        let (positions, width) = hidden.size2()?;
        let weight = self.weight.f_to_kind(hidden.kind())?;
        let mut grad = match grad_scale {
            Some(_) => Some(Tensor::f_empty([positions, width], (hidden.kind(), hidden.device()))?),
            None => None,
        };
        let mut total = 0.0;
        let most =
            (self.chunk_elements / (self.rows.end - self.rows.start).max(1)).clamp(1, positions.max(1));
        // As many chunks as that takes, and all alike.
        let chunk = ceil_div(positions, ceil_div(positions, most).max(1)).max(1);
        // One for all chunks: a CPU's allocator would map its pages anew for each.
        let buffer = match hidden.device() {
            Device::Cpu => {
                Some(Tensor::f_empty([chunk, weight.size()[0]], (hidden.kind(), hidden.device()))?)
            }
            Device::Cuda(_) | Device::Mps | Device::Vulkan => None,
        };
        let mut start = 0;
        while start < positions {
            let len = chunk.min(positions - start);
            let part = hidden.f_narrow(0, start, len)?;
            let mut logits = match &buffer {
                Some(buffer) => {
                    let logits = buffer.f_narrow(0, 0, len)?;
                    matmul::product_into(&part, &weight.f_tr()?, &logits)?;
                    logits
                }
                None => part.f_mm(&weight.f_tr()?)?,
            };
            if matches!(logits.kind(), Kind::BFloat16 | Kind::Half) {
                logits = logits.f_to_kind(Kind::Float)?;
            }
            let (local, is_local) = self.localise(&targets.f_narrow(0, start, len)?)?;
            let mut highest = ops::row_max(&logits)?;
            communicator.all_reduce(&mut highest, ReduceOp::Max)?;
            let target_logit = logits.f_gather(1, &local, false)?.f_sub_(&highest)?;
            let target_logit = target_logit.f_mul(&is_local.f_to_kind(logits.kind())?)?;
            let sum = ops::exp_sum(&mut logits, &highest)?;
            let mut sums = Tensor::f_cat(&[&sum, &target_logit], 1)?;
            communicator.all_reduce_sum(&mut sums)?;
            let (sum, target_logit) = (sums.f_narrow(1, 0, 1)?, sums.f_narrow(1, 1, 1)?);
            let nll = sum.f_log()?.f_sub_(&target_logit)?.f_sum(Kind::Double)?;
            total += nll.f_double_value(&[])?;
            if let (Some(scale), Some(grad)) = (grad_scale, &mut grad) {
                // d(loss)/d(logits) = softmax - (1 - weight) one_hot(target) - weight p
                ops::scale_rows(&mut logits, &sum.f_contiguous()?, scale)?;
                let hard = soft.map_or(scale, |soft| scale * (1.0 - soft.weight));
                let one_hot = is_local.f_to_kind(logits.kind())?.f_mul_scalar_(-hard)?;
                let mut likelihoods = logits.f_scatter_add_(1, &local, &one_hot)?;
                if let Some(soft) = soft {
                    self.subtract_soft(&mut likelihoods, soft, start, scale * soft.weight)?;
                }
                let likelihoods = likelihoods.f_to_kind(hidden.kind())?;
                let rows = grad.f_narrow(0, start, len)?;
                matmul::product_into(&likelihoods, &weight, &rows)?;
            }
            start += len;
        }
        if let Some(grad) = &mut grad {
            communicator.all_reduce_sum(grad)?;
        }
        Ok((total, grad))
    }

    /// Subtracts `scale p` from the rows of a chunk that begins at position `start`.
    fn subtract_soft(&self, chunk: &mut Tensor, soft: &SoftTargets, start: i64, scale: f64) -> Result<()> {
        let (len, _) = chunk.size2()?;
        let ids = soft.likeliest.ids.f_narrow(0, start, len)?.f_to_device(chunk.device())?;
        let p = soft.likeliest.probabilities.f_narrow(0, start, len)?.f_to_device(chunk.device())?;
        let (local, is_local) = self.localise_each(&ids.f_to_kind(Kind::Int64)?)?;
        // What another rank holds adds zero to row 0.
        let p =
            p.f_to_kind(chunk.kind())?.f_mul_scalar(-scale)?.f_mul_(&is_local.f_to_kind(chunk.kind())?)?;
        let _ = chunk.f_scatter_add_(1, &local, &p)?;
        Ok(())
    }

    /// Targets as rows of this rank's part (0 where another rank holds them) and which of them it holds, both `[n, 1]`.
    pub(crate) fn localise(&self, targets: &Tensor) -> Result<(Tensor, Tensor)> {
        let (local, is_local) = self.localise_each(targets)?;
        Ok((local.f_unsqueeze(1)?, is_local.f_unsqueeze(1)?))
    }

    /// The same in the shape of `targets`.
    fn localise_each(&self, targets: &Tensor) -> Result<(Tensor, Tensor)> {
        let is_local = targets.f_ge(self.rows.start)?.f_logical_and(&targets.f_lt(self.rows.end)?)?;
        let local = targets.f_sub_scalar(self.rows.start)?.f_mul_(&is_local.f_to_kind(Kind::Int64)?)?;
        Ok((local, is_local))
    }

    /// Logits `[n, vocabulary on this rank]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        matmul::product(hidden, &self.weight.f_to_kind(hidden.kind())?.f_tr()?)
    }

    /// Rows of an embedding `[vocabulary on this rank, d]` for `ids` `[n]`, completed over the ranks.
    pub(crate) fn embed(
        embedding: &Tensor,
        rows: &Range<i64>,
        ids: &Tensor,
        kind: Kind,
        communicator: &mut dyn Communicator,
    ) -> Result<Tensor> {
        let head = VocabularyHead { weight: embedding, rows: rows.clone(), chunk_elements: CHUNK_ELEMENTS };
        let (local, is_local) = head.localise(ids)?;
        let mut hidden =
            embedding.f_index_select(0, &local.f_squeeze()?.f_view([-1i64])?)?.f_to_kind(kind)?;
        if communicator.tp_degree() > 1 {
            let _ = hidden.f_mul_(&is_local.f_to_kind(kind)?)?;
            communicator.all_reduce_sum(&mut hidden)?;
        }
        Ok(hidden)
    }
}
