//! Log likelihoods of continuations. The continuations of a context share one row of the pass:
//!
//! ```text
//! row        c0 c1 c2 | a0 a1 | b0 b1 b2      context, then each continuation without its last token
//! position    0  1  2    3  4    3  4  5      as if each stood alone behind the context
//! sees        the context up to itself; in a continuation also that continuation up to itself
//! ```
//!
//! So a context is computed once however many choices follow it.
//!
//! Shapes: b rows · t tokens of a row · n positions whose next token is judged · d hidden.

use super::{Adapters, Model, Rows};
use crate::communicator::{Communicator, ReduceOp};
use crate::fault::{Fault, Result};
use crate::layer::Pass;
use crate::loss::VocabularyHead;
use crate::ops::{self, RotaryTable};
use engine::Prompt;
use tch::{Kind, Tensor};

/// What a pass over prompts is made of, on the host.
struct Packed {
    rows: usize,
    tokens: usize,
    /// `[b * t]`
    ids: Vec<i64>,
    /// `[b * t]`
    rotary_positions: Vec<i64>,
    /// `[b, t, t]`: whether the first sees the second.
    sees: Vec<bool>,
    /// `[n]`: places, of the `b * t`, whose next token is judged, and those tokens.
    places: Vec<i64>,
    targets: Vec<i64>,
}

impl Packed {
    fn new(prompts: &[Prompt<'_>]) -> Self {
        let (rows, tokens) = (prompts.len(), prompts.iter().map(Prompt::pass_tokens).max().unwrap_or(0));
        let mut packed = Self {
            rows,
            tokens,
            ids: vec![0; rows * tokens],
            rotary_positions: vec![0; rows * tokens],
            sees: vec![false; rows * tokens * tokens],
            places: Vec::new(),
            targets: Vec::new(),
        };
        for (row, prompt) in prompts.iter().enumerate() {
            packed.put(row, prompt);
        }
        packed
    }

    fn put(&mut self, row: usize, prompt: &Prompt<'_>) {
        let (first, context_len) = (row * self.tokens, prompt.context.len());
        let mut place = 0;
        for (position, id) in prompt.context.iter().enumerate() {
            self.put_token(first, place, *id, position, 0..0);
            place += 1;
        }
        for continuation in &prompt.continuations {
            let start = place;
            self.places.push((first + context_len - 1) as i64);
            for (offset, id) in continuation.iter().take(continuation.len().saturating_sub(1)).enumerate() {
                self.put_token(first, place, *id, context_len + offset, start..place);
                self.sees_range(first, place, 0..context_len);
                self.places.push((first + place) as i64);
                place += 1;
            }
            self.targets.extend(continuation.iter().map(|id| i64::from(*id)));
        }
        // Padding sees itself, so that its softmax is over something.
        for padding in place..self.tokens {
            self.sees_range(first, padding, padding..padding + 1);
        }
        for context in 0..context_len {
            self.sees_range(first, context, 0..context + 1);
        }
    }

    /// A token at `place` of the row that starts at `first`; it sees itself and `before`.
    fn put_token(
        &mut self,
        first: usize,
        place: usize,
        id: u32,
        position: usize,
        before: std::ops::Range<usize>,
    ) {
        self.ids[first + place] = i64::from(id);
        self.rotary_positions[first + place] = position as i64;
        self.sees_range(first, place, before.start..before.end);
        self.sees_range(first, place, place..place + 1);
    }

    fn sees_range(&mut self, first: usize, place: usize, seen: std::ops::Range<usize>) {
        let start = (first + place) * self.tokens;
        self.sees[start + seen.start..start + seen.end].fill(true);
    }
}

impl Model {
    /// See [`engine::ShardEngine::continuation_log_likelihoods`].
    pub(crate) fn continuation_log_likelihoods(
        &mut self,
        prompts: &[Prompt<'_>],
        adapters: &Adapters,
        communicator: &mut dyn Communicator,
    ) -> Result<Vec<Vec<f64>>> {
        self.check_prompts(prompts)?;
        let packed = Packed::new(prompts);
        if packed.targets.is_empty() {
            return Ok(prompts.iter().map(|_| Vec::new()).collect());
        }
        let device = self.device();
        let on_device =
            |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_to_device(device)?) };
        let rows = Rows {
            ids: on_device(&packed.ids)?,
            positions: on_device(&packed.places)?,
            targets: on_device(&packed.targets)?,
            rows: packed.rows as i64,
            tokens: packed.tokens as i64,
            predicted: packed.targets.len() as u64,
        };
        let (b, t) = (rows.rows, rows.tokens);
        let sees_b1tt = Tensor::f_from_slice(&packed.sees)?.f_view([b, 1, t, t])?.f_to_device(device)?;
        let rotary = RotaryTable::at(&self.inverse_frequencies, &packed.rotary_positions, &self.final_norm)?;
        let pass = Pass { sees: Some(&sees_b1tt), ..self.pass_at(&rows, adapters, 0, &rotary) };
        let (hidden, _) = self.run_layers(&rows, &pass, None, communicator)?;
        let normed = ops::rms_norm(&hidden, &self.final_norm, self.norm_eps)?.1;
        drop(hidden);
        let judged_nd = normed.f_index_select(0, &rows.positions)?;
        drop(normed);
        let each = self.head().log_likelihoods(&judged_nd, &rows.targets, communicator)?;
        let mut each = each.into_iter();
        Ok(prompts
            .iter()
            .map(|prompt| {
                let sum = |tokens: &&[u32]| each.by_ref().take(tokens.len()).sum();
                prompt.continuations.iter().map(sum).collect()
            })
            .collect())
    }

    fn check_prompts(&self, prompts: &[Prompt<'_>]) -> Result<()> {
        for prompt in prompts {
            let longest = prompt.continuations.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
            if prompt.context.is_empty() || prompt.continuations.iter().any(|tokens| tokens.is_empty()) {
                return Err(Fault::Refused("a context or a continuation has no token".into()));
            }
            // The last token is only predicted.
            if prompt.context.len() + longest > self.max_positions + 1 {
                return Err(Fault::Refused(format!(
                    "a context of {} tokens and a continuation of {longest} exceed the model's {} positions",
                    prompt.context.len(),
                    self.max_positions
                )));
            }
            let ids = prompt.context.iter().chain(prompt.continuations.iter().copied().flatten());
            for id in ids {
                self.check_token(*id)?;
            }
        }
        Ok(())
    }
}

impl VocabularyHead<'_> {
    /// Log likelihoods `[n]`, in nats, of `targets` `[n]` (vocabulary indices) given `hidden` `[n, d]`.
    fn log_likelihoods(
        &self,
        hidden_nd: &Tensor,
        targets: &Tensor,
        communicator: &mut dyn Communicator,
    ) -> Result<Vec<f64>> {
        let (count, _) = hidden_nd.size2()?;
        let weight = self.weight.f_to_kind(hidden_nd.kind())?;
        let mut all = Vec::with_capacity(count as usize);
        let chunk = (self.chunk_elements / (self.rows.end - self.rows.start).max(1)).clamp(1, count.max(1));
        let mut start = 0;
        while start < count {
            let len = chunk.min(count - start);
            let mut logits = hidden_nd.f_narrow(0, start, len)?.f_mm(&weight.f_tr()?)?;
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
            let each = target_logit.f_sub(&sum.f_log()?)?.f_to_kind(Kind::Double)?;
            all.extend(Vec::<f64>::try_from(each.f_view([-1i64])?.f_to_device(tch::Device::Cpu)?)?);
            start += len;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_share_their_context_and_do_not_see_each_other() {
        let packed = Packed::new(&[
            Prompt { context: &[7, 8], continuations: vec![&[1, 2], &[3], &[4, 5, 6]] },
            Prompt { context: &[9], continuations: vec![&[1]] },
        ]);
        assert_eq!((packed.rows, packed.tokens), (2, 5));
        assert_eq!(packed.ids, [7, 8, 1, 4, 5, 9, 0, 0, 0, 0]);
        assert_eq!(packed.rotary_positions[..5], [0, 1, 2, 2, 3]);
        assert_eq!(packed.places, [1, 2, 1, 1, 3, 4, 5]);
        assert_eq!(packed.targets, [1, 2, 3, 4, 5, 6, 1]);
        let row = |place: usize| -> String {
            let start = place * 5;
            packed.sees[start..start + 5].iter().map(|sees| if *sees { 'x' } else { '.' }).collect()
        };
        let rows: Vec<String> = (0..10).map(row).collect();
        assert_eq!(
            rows,
            [
                "x....", "xx...", "xxx..", "xx.x.", "xx.xx", // the first row
                "x....", ".x...", "..x..", "...x.", "....x", // the second: padding sees itself
            ]
        );
    }
}
