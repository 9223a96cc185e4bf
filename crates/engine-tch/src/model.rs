//! The whole decoder on one rank: embedding, layers, norm and head.

use crate::communicator::Communicator;
use crate::dropout::Dropout;
use crate::factors::FactorLayout;
use crate::fault::{Fault, Result};
use crate::frozen::FrozenFormat;
use crate::layer::{LayerShard, Pass, Saved};
use crate::loss::{CHUNK_ELEMENTS, VocabularyHead};
use crate::observed::Observed;
use crate::ops::{self, RotaryTable};
use crate::source::Source;
use crate::teacher::{Likeliest, SoftTargets};
use engine::PhaseTimes;
use engine::Progress;
use model_spec::ModelSpec;
use recipe::{Lora, Recompute};
use sharding::RankLayer;
use std::ops::Range;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

mod continuation;

/// The frozen model, as far as this rank holds it.
pub(crate) struct Model {
    pub(crate) layers: Vec<LayerShard>,
    /// By layer: whether what comes in goes out, as if the layer were not there.
    pub(crate) passed_over: Vec<bool>,
    embedding: Tensor,
    /// Absent when tied to the embedding.
    head: Option<Tensor>,
    vocabulary: Range<i64>,
    final_norm: Tensor,
    rotary: Option<(i64, RotaryTable)>,
    hidden_features: Tensor,
    inverse_frequencies: Vec<f64>,
    head_dim: i64,
    norm_eps: f64,
    vocab_size: usize,
    max_positions: usize,
    compute: Kind,
}

/// The adapters of a pass.
pub(crate) struct Adapters<'a> {
    pub(crate) layout: &'a FactorLayout,
    /// In the format of the products.
    pub(crate) factors: &'a Tensor,
    /// Pairs that are frozen, likewise.
    pub(crate) ledger: &'a [Tensor],
    pub(crate) lora_rank: usize,
    pub(crate) scaling: f64,
    pub(crate) dropout: Dropout,
}

impl<'a> Adapters<'a> {
    /// Those of a pass that nothing is dropped from.
    pub(crate) fn evaluating(
        layout: &'a FactorLayout,
        factors: &'a Tensor,
        ledger: &'a [Tensor],
        lora: &Lora,
    ) -> Self {
        Self {
            layout,
            factors,
            ledger,
            lora_rank: lora.rank,
            scaling: lora.scaling(),
            dropout: Dropout::off(),
        }
    }
}

/// What training wants of a pass over a micro-batch.
pub(crate) struct Training<'a> {
    /// Sums to add to.
    pub(crate) gradients: &'a Tensor,
    /// By layer, where the criterion wants more than the factors' gradients.
    pub(crate) observed: Option<&'a mut [Observed]>,
    /// Factor on the summed loss: one over the step's predictions.
    pub(crate) loss_scale: f64,
    pub(crate) first_token: i64,
    pub(crate) recompute: Recompute,
    /// What the unpruned model says at the predicted positions; absent without distillation.
    pub(crate) soft_targets: Option<SoftTargets>,
    /// Times to add to.
    pub(crate) times: &'a mut PhaseTimes,
}

/// Windows of one pass, right-padded to the longest.
pub(crate) struct Rows {
    /// `[b * t]`
    ids: Tensor,
    /// Positions, of the `b * t`, whose next token is predicted, and those tokens.
    positions: Tensor,
    targets: Tensor,
    rows: i64,
    tokens: i64,
    predicted: u64,
}

impl Model {
    pub(crate) fn load(
        source: &Source,
        held: &[RankLayer],
        vocabulary: Range<usize>,
        storage: FrozenFormat,
        compute: Kind,
        device: Device,
        progress: &Progress,
    ) -> Result<Self> {
        let spec: &ModelSpec = source.spec();
        let vocabulary_kind = storage.of_vocabulary(compute);
        let layers = held
            .iter()
            .enumerate()
            .map(|(layer, held)| {
                let loaded = source.layer(layer, held, storage, compute, device);
                source.release_pages();
                progress.tick();
                loaded
            })
            .collect::<Result<_>>()?;
        let head = match spec.tie_word_embeddings {
            true => None,
            false => Some(source.vocabulary(checkpoint::LM_HEAD, &vocabulary, vocabulary_kind, device)?),
        };
        Ok(Self {
            passed_over: vec![false; held.len()],
            layers,
            embedding: source.vocabulary(checkpoint::EMBEDDING, &vocabulary, vocabulary_kind, device)?,
            head,
            vocabulary: vocabulary.start as i64..vocabulary.end as i64,
            final_norm: source.norm(checkpoint::FINAL_NORM, compute, device)?,
            rotary: None,
            hidden_features: Tensor::f_arange(spec.hidden_size as i64, (Kind::Int64, device))?,
            inverse_frequencies: spec.rope.inverse_frequencies(spec.head_dim),
            head_dim: spec.head_dim as i64,
            norm_eps: spec.rms_norm_eps,
            vocab_size: spec.vocab_size,
            max_positions: spec.max_position_embeddings,
            compute,
        })
    }

    fn device(&self) -> Device {
        self.embedding.device()
    }

    fn head(&self) -> VocabularyHead<'_> {
        VocabularyHead {
            weight: self.head.as_ref().unwrap_or(&self.embedding),
            rows: self.vocabulary.clone(),
            chunk_elements: CHUNK_ELEMENTS,
        }
    }

    /// Sum of negative log likelihoods over all tokens but the first of every row; with `training`, gradients too.
    pub(crate) fn negative_log_likelihood(
        &mut self,
        rows: &[&[u32]],
        adapters: &Adapters,
        training: Option<Training>,
        communicator: &mut dyn Communicator,
    ) -> Result<(f64, u64)> {
        let started = Instant::now();
        let rows = self.rows(rows)?;
        self.prepare_rotary(rows.tokens)?;
        let (recompute, first_token) = match &training {
            Some(training) => (training.recompute, training.first_token),
            None => (Recompute::Layer, 0),
        };
        let pass = self.pass(&rows, adapters, first_token)?;
        let (hidden, saved) =
            self.run_layers(&rows, &pass, training.is_some().then_some(recompute), communicator)?;
        let forward = started.elapsed();
        let (rstd, normed) = ops::rms_norm(&hidden, &self.final_norm, self.norm_eps)?;
        let wanted = normed.f_index_select(0, &rows.positions)?;
        drop(normed);
        let scale = training.as_ref().map(|training| training.loss_scale);
        let soft = training.as_ref().and_then(|training| training.soft_targets.as_ref());
        let (total, grad) =
            self.head().negative_log_likelihood(&wanted, &rows.targets, soft, scale, communicator)?;
        if let (Some(mut training), Some(grad)) = (training, grad) {
            let mut grad_normed = hidden.f_zeros_like()?;
            let _ = grad_normed.f_index_copy_(0, &rows.positions, &grad)?;
            drop((wanted, grad));
            let mut grad = hidden.f_zeros_like()?;
            ops::rms_norm_backward_add(&mut grad, &grad_normed, &hidden, &rstd, &self.final_norm)?;
            drop((grad_normed, hidden, rstd));
            training.times.forward += forward;
            let loss_end = started.elapsed();
            training.times.loss += loss_end - forward;
            self.backward_layers(grad, saved, &pass, &mut training, communicator)?;
            training.times.backward += started.elapsed() - loss_end;
        }
        Ok((total, rows.predicted))
    }

    /// The `top_k` likeliest next tokens at every position but the last of each row, one row after the other.
    pub(crate) fn likeliest(
        &mut self,
        rows: &[&[u32]],
        adapters: &Adapters,
        top_k: usize,
        communicator: &mut dyn Communicator,
    ) -> Result<Likeliest> {
        let rows = self.rows(rows)?;
        self.prepare_rotary(rows.tokens)?;
        let pass = self.pass(&rows, adapters, 0)?;
        let (hidden, _) = self.run_layers(&rows, &pass, None, communicator)?;
        let normed = ops::rms_norm(&hidden, &self.final_norm, self.norm_eps)?.1;
        self.head().likeliest(&normed.f_index_select(0, &rows.positions)?, top_k, communicator)
    }

    /// Logits `[b * t, vocabulary on this rank]` of rows of equal length.
    pub(crate) fn logits(
        &mut self,
        rows: &[&[u32]],
        adapters: &Adapters,
        communicator: &mut dyn Communicator,
    ) -> Result<Tensor> {
        let rows = self.rows(rows)?;
        self.prepare_rotary(rows.tokens)?;
        let pass = self.pass(&rows, adapters, 0)?;
        let (hidden, _) = self.run_layers(&rows, &pass, None, communicator)?;
        self.head().logits(&ops::rms_norm(&hidden, &self.final_norm, self.norm_eps)?.1)
    }

    fn run_layers(
        &self,
        rows: &Rows,
        pass: &Pass,
        save: Option<Recompute>,
        communicator: &mut dyn Communicator,
    ) -> Result<(Tensor, Vec<Saved>)> {
        let mut hidden =
            VocabularyHead::embed(&self.embedding, &self.vocabulary, &rows.ids, self.compute, communicator)?;
        let mut all = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if self.passed_over[index] {
                if save.is_some() {
                    all.push(Saved::Nothing);
                }
                continue;
            }
            let (out, saved) =
                layer.forward(index, hidden, pass, save.unwrap_or(Recompute::Layer), communicator)?;
            if save.is_some() {
                all.push(saved);
            }
            hidden = out;
        }
        Ok((hidden, all))
    }

    fn backward_layers(
        &self,
        mut grad: Tensor,
        mut saved: Vec<Saved>,
        pass: &Pass,
        training: &mut Training,
        communicator: &mut dyn Communicator,
    ) -> Result<()> {
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let Some(kept) = saved.pop() else {
                return Err(Fault::Refused(format!("layer {index} kept nothing for its backward pass")));
            };
            let observed = training.observed.as_deref_mut().map(|all| &mut all[index]);
            grad = layer.backward(index, grad, kept, pass, training.gradients, observed, communicator)?;
        }
        Ok(())
    }

    /// Windows made ready, and the first layer's input `[b * t, d]`.
    pub(crate) fn embed(
        &mut self,
        rows: &[&[u32]],
        communicator: &mut dyn Communicator,
    ) -> Result<(Rows, Tensor)> {
        let rows = self.rows(rows)?;
        self.prepare_rotary(rows.tokens)?;
        let hidden =
            VocabularyHead::embed(&self.embedding, &self.vocabulary, &rows.ids, self.compute, communicator)?;
        Ok((rows, hidden))
    }

    /// What a pass over `rows`, as long as those made ready last, is made of.
    pub(crate) fn pass<'a>(
        &'a self,
        rows: &Rows,
        adapters: &'a Adapters,
        first_token: i64,
    ) -> Result<Pass<'a>> {
        let Some((_, rotary)) = &self.rotary else {
            return Err(Fault::Refused("the rotary table was not prepared".into()));
        };
        Ok(self.pass_at(rows, adapters, first_token, rotary))
    }

    /// A pass whose tokens stand where `rotary` says.
    fn pass_at<'a>(
        &'a self,
        rows: &Rows,
        adapters: &'a Adapters,
        first_token: i64,
        rotary: &'a RotaryTable,
    ) -> Pass<'a> {
        Pass {
            rows: rows.rows,
            tokens: rows.tokens,
            head_dim: self.head_dim,
            norm_eps: self.norm_eps,
            rotary,
            layout: adapters.layout,
            factors: adapters.factors,
            ledger: adapters.ledger,
            lora_rank: adapters.lora_rank as i64,
            scaling: adapters.scaling,
            dropout: adapters.dropout,
            first_token,
            hidden_features: &self.hidden_features,
            compute: self.compute,
            sees: None,
        }
    }

    fn prepare_rotary(&mut self, tokens: i64) -> Result<()> {
        if self.rotary.as_ref().is_none_or(|(prepared, _)| *prepared != tokens) {
            let table = RotaryTable::new(&self.inverse_frequencies, tokens, &self.final_norm)?;
            self.rotary = Some((tokens, table));
        }
        Ok(())
    }

    fn check_token(&self, id: u32) -> Result<()> {
        if id as usize >= self.vocab_size {
            return Err(Fault::Refused(format!(
                "token id {id} is not below the model's vocabulary size {}",
                self.vocab_size
            )));
        }
        Ok(())
    }

    fn rows(&self, rows: &[&[u32]]) -> Result<Rows> {
        let tokens = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        if tokens == 0 {
            return Err(Fault::Refused("a pass needs at least one row of at least one token".into()));
        }
        if tokens > self.max_positions {
            return Err(Fault::Refused(format!(
                "a window of {tokens} tokens exceeds the model's {} positions",
                self.max_positions
            )));
        }
        let mut ids = vec![0i64; rows.len() * tokens];
        let (mut positions, mut targets) = (Vec::new(), Vec::new());
        for (index, row) in rows.iter().enumerate() {
            for (token, &id) in row.iter().enumerate() {
                self.check_token(id)?;
                ids[index * tokens + token] = i64::from(id);
                if token > 0 {
                    positions.push((index * tokens + token - 1) as i64);
                    targets.push(i64::from(id));
                }
            }
        }
        let place = |values: &[i64]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(values)?.f_to_device(self.device())?)
        };
        Ok(Rows {
            ids: place(&ids)?,
            positions: place(&positions)?,
            targets: place(&targets)?,
            rows: rows.len() as i64,
            tokens: tokens as i64,
            predicted: targets.len() as u64,
        })
    }
}
