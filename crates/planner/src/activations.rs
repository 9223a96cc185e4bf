//! Memory of one optimizer step beside what lasts: activations and the buffers of the moment, from the tensors that
//! `engine-tch` keeps alive while a micro-batch goes through.
//!
//! The peak is the greatest of a few moments: each stage of the last layer's forward pass, the loss, each stage of each
//! layer's backward pass, the update. A stage counts everything alive at its fullest point.
//!
//! Shapes: n tokens of a micro-batch · d hidden · q, k features of q's and of k's and v's output on this rank · i channels on
//! this rank · h query heads on this rank · r lora_rank · V vocabulary rows on this rank. Widths are in bytes of a number of
//! the products.

use crate::device::Platform;
use crate::formats::{compute_bytes, master_bytes, vocabulary_bytes, widened_bytes};
use crate::rank_shape::{RankShape, RankWidths};
use model_spec::Projection;
use recipe::{Criterion, Recipe, Recompute};

/// Logits held at a time.
const CHUNK_ELEMENTS: u64 = 16 << 20;
/// Weights scored at a time on a GPU, of f32, with what they are multiplied by.
const DEVICE_TILE_BYTES: u64 = 2 * (4 << 25);

/// What one moment of a step takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Moment {
    pub(crate) activations: u64,
    pub(crate) buffers: u64,
}

impl Moment {
    fn total(self) -> u64 {
        self.activations + self.buffers
    }

    fn max(self, other: Self) -> Self {
        if other.total() > self.total() { other } else { self }
    }
}

/// The fullest moment of an optimizer step.
pub(crate) fn fullest_moment(shape: &RankShape, recipe: &Recipe, platform: Platform) -> Moment {
    Step::new(shape, recipe, platform).fullest()
}

/// What a later step's loss maps on top of a heap that the step before has filled, beyond the fullest moment of one step:
/// the heap keeps what its fullest moment took, and the loss's logits are mapped beside it. `in_heap` is the share of the
/// activations that lie in the heap.
pub(crate) fn kept_by_heap(shape: &RankShape, recipe: &Recipe, in_heap: f64) -> u64 {
    let step = Step::new(shape, recipe, Platform::Cpu);
    let kept: u64 = shape.layers.iter().map(|layer| step.kept(layer)).sum();
    let (loss, [fullest, of_layers]) = (step.loss(), step.fullest_and_layers());
    let in_loss = kept + loss.activations;
    let retained = (of_layers.activations.saturating_sub(in_loss) as f64 * in_heap) as u64;
    let at_loss = in_loss + retained + loss.buffers + step.lasting_buffers();
    at_loss.saturating_sub(fullest.total())
}

/// Bytes that the forward pass leaves for the backward pass, of all layers.
pub(crate) fn kept_bytes(shape: &RankShape, recipe: &Recipe, platform: Platform) -> u64 {
    let step = Step::new(shape, recipe, platform);
    shape.layers.iter().map(|layer| step.kept(layer)).sum()
}

/// Bytes of a layer's kept tensors, one by one.
pub(crate) fn kept_tensors(shape: &RankShape, recipe: &Recipe) -> Vec<u64> {
    let step = Step::new(shape, recipe, Platform::Cpu);
    let all = shape.layers.iter().flat_map(|layer| {
        let (stream, query) = (step.stream(), step.wide(shape.query(layer)));
        match recipe.recompute {
            Recompute::None => {
                vec![stream, stream, step.qkv(layer), query, step.wide(2 * layer.channels)]
            }
            Recompute::Layer => vec![stream],
        }
    });
    all.collect()
}

struct Step<'a> {
    shape: &'a RankShape,
    recipe: &'a Recipe,
    platform: Platform,
    /// Tokens of a micro-batch, and how many of them are followed by one to predict.
    n: u64,
    predicted: u64,
    /// Bytes of a number.
    c: u64,
}

impl<'a> Step<'a> {
    fn new(shape: &'a RankShape, recipe: &'a Recipe, platform: Platform) -> Self {
        let (rows, window) = (recipe.batch.rows as u64, recipe.batch.window_tokens as u64);
        Self {
            shape,
            recipe,
            platform,
            n: rows * window,
            predicted: rows * window.saturating_sub(1),
            c: compute_bytes(recipe.precision.compute),
        }
    }

    /// A tensor `[n, width]`.
    fn wide(&self, width: u64) -> u64 {
        self.n * width * self.c
    }

    fn drops(&self) -> bool {
        self.recipe.lora.dropout > 0.0
    }

    fn observes_inputs(&self) -> bool {
        self.recipe
            .pruning
            .as_ref()
            .is_some_and(|pruning| matches!(pruning.criterion, Criterion::Wanda | Criterion::Flap))
    }

    fn widened(&self, layer: &RankWidths, projections: &[Projection]) -> u64 {
        let elements = projections.iter().map(|projection| {
            let [rows, columns] = self.shape.matrix(layer, *projection);
            rows * columns
        });
        widened_bytes(self.recipe.precision, elements.sum())
    }

    /// q, k and v side by side.
    fn qkv(&self, layer: &RankWidths) -> u64 {
        self.wide(self.shape.query(layer) + 2 * self.shape.key(layer))
    }

    /// `Activations` of `layer.rs` without `x`, up to what the attention has added to the stream:
    /// q, k, v; attention's output and the log of its sums; `x_mid`; a root mean square; `r` low-rank values for each of q, k,
    /// v and o.
    fn attention_kept(&self, layer: &RankWidths) -> u64 {
        let sums = match self.platform {
            Platform::Cpu => self.c,
            Platform::Cuda => self.c.max(4),
        };
        self.qkv(layer)
            + self.wide(self.shape.query(layer))
            + self.n * layer.query_heads * sums
            + self.wide(self.shape.hidden + 1 + 4 * self.recipe.lora.rank as u64)
    }

    /// The rest of it: gate and up, a root mean square, `r` low-rank values for each of gate, up and down.
    fn mlp_kept(&self, layer: &RankWidths) -> u64 {
        self.wide(2 * layer.channels + 1 + 3 * self.recipe.lora.rank as u64)
    }

    /// The layer's input.
    fn stream(&self) -> u64 {
        self.wide(self.shape.hidden)
    }

    /// What a layer leaves for its backward pass.
    fn kept(&self, layer: &RankWidths) -> u64 {
        match self.recipe.recompute {
            Recompute::None => self.stream() + self.attention_kept(layer) + self.mlp_kept(layer),
            Recompute::Layer => self.stream(),
        }
    }

    /// A layer's forward pass beside its input: the fullest of its four products, each with what the layer has left so far.
    ///
    /// A product has its input, its output and the widened weight; where inputs are dropped, a copy of the input after that.
    fn forward(&self, layer: &RankWidths) -> Moment {
        let (stream, query, act) =
            (self.stream(), self.wide(self.shape.query(layer)), self.wide(layer.channels));
        let copy_of = |input: u64| if self.drops() { input } else { 0 };
        let stage = |kept: u64, input: u64, output: u64, projections: &[Projection]| {
            let widened = self.widened(layer, projections);
            let copied = copy_of(input);
            // The widened weight is gone before the input is copied.
            Moment {
                activations: kept + input + output + copied.saturating_sub(widened),
                buffers: widened.max(copied) - copied.saturating_sub(widened),
            }
        };
        let (attention, mlp) = (self.attention_kept(layer), self.mlp_kept(layer));
        let qkv = stage(0, stream, self.qkv(layer), &[Projection::Q, Projection::K, Projection::V]);
        // What is read here is kept; what comes out is `x_mid`, which `attention` counts.
        let o = stage(attention - query, query, 0, &[Projection::O]);
        let gate_up = stage(attention + mlp, stream, 0, &[Projection::Gate, Projection::Up]);
        let down = stage(attention + mlp, act, stream, &[Projection::Down]);
        qkv.max(o).max(gate_up).max(down)
    }

    /// The backward pass of a product with the gradient of its input, beside input and output's gradient.
    ///
    /// Where inputs are dropped: the dropped input, the low-rank path's gradient before and after dropping it.
    fn product_backward(&self, layer: &RankWidths, input: u64, projections: &[Projection]) -> Moment {
        let observed = match projections {
            [Projection::O | Projection::Down] if self.observes_inputs() => input,
            _ => 0,
        };
        let after = if self.drops() { 3 * input } else { observed };
        let widened = self.widened(layer, projections);
        if widened > after {
            Moment { activations: input, buffers: widened }
        } else {
            Moment { activations: input + after, buffers: 0 }
        }
    }

    /// A layer's backward pass beside what it kept and the gradient of its output.
    fn backward(&self, layer: &RankWidths) -> Moment {
        let (stream, query, act, qkv) =
            (self.stream(), self.wide(self.shape.query(layer)), self.wide(layer.channels), self.qkv(layer));
        let plus = |activations: u64, moment: Moment| Moment {
            activations: activations + moment.activations,
            ..moment
        };
        let down = plus(act, self.product_backward(layer, act, &[Projection::Down]));
        let swiglu = Moment { activations: 4 * act, buffers: 0 };
        let gate_up =
            plus(2 * act + stream, self.product_backward(layer, stream, &[Projection::Gate, Projection::Up]));
        // From here on the gradient of the second norm's output stays.
        let o = plus(stream, self.product_backward(layer, query, &[Projection::O]));
        let attention = Moment {
            activations: stream
                + query
                + match self.platform {
                    Platform::Cpu => qkv,
                    // Gradients, turned back and put together, and the sum in f32 that the kernel adds q's to.
                    Platform::Cuda => {
                        3 * qkv + self.n * self.shape.query(layer) * 4 + self.repeated_heads(layer)
                    }
                },
            buffers: 0,
        };
        let qkv_product = plus(
            stream + query + qkv + stream,
            self.product_backward(layer, stream, &[Projection::Q, Projection::K, Projection::V]),
        );
        [down, swiglu, gate_up, o, attention, qkv_product].into_iter().fold(Moment::default(), Moment::max)
    }

    /// Key/value heads repeated for their query heads, and the gradients of both, which libtorch's operator wants.
    fn repeated_heads(&self, layer: &RankWidths) -> u64 {
        if layer.query_heads == layer.kv_heads { 0 } else { 4 * self.wide(self.shape.query(layer)) }
    }

    /// The loss, beside what all layers kept: final norm, head and cross-entropy by chunks of positions.
    fn loss(&self) -> Moment {
        let stream = self.stream();
        let wanted = self.predicted * self.shape.hidden * self.c;
        let norm = Moment { activations: 2 * stream + wanted, buffers: 0 };
        let after = Moment { activations: 2 * stream + 2 * wanted, buffers: 0 };
        let vocabulary = self.shape.vocabulary_rows.max(1);
        let most = (CHUNK_ELEMENTS / vocabulary).clamp(1, self.predicted.max(1));
        let chunks = self.predicted.div_ceil(most).max(1);
        let positions = self.predicted.div_ceil(chunks).max(1);
        // In 16 bits they are widened, and copied back for the product.
        let logit = if self.c < 4 { 4 + self.c } else { self.c };
        let head = if vocabulary_bytes(self.recipe.precision) == self.c {
            0
        } else {
            self.shape.vocabulary_weights() * self.c
        };
        let cross_entropy = Moment {
            activations: stream + 2 * wanted,
            buffers: positions * vocabulary * logit + head + self.soft_targets(positions),
        };
        norm.max(cross_entropy).max(after)
    }

    /// What distillation adds to a chunk: ids as 32 and 64 bits, places, probabilities.
    fn soft_targets(&self, positions: u64) -> u64 {
        let top_k = self.recipe.distillation.map_or(0, |distillation| distillation.top_k as u64);
        positions * top_k * (8 + 8 + 8 + 2 * self.c) + self.predicted * top_k * 8
    }

    /// After the passes: squares of the gradients in f64, and the tiles of the score pass.
    fn update(&self) -> Moment {
        let rank = self.recipe.lora.rank as u64;
        let squares = 16 * self.shape.replicated_lora(rank).max(self.shape.split_lora(rank));
        let tiles = match (self.platform, &self.recipe.pruning) {
            (Platform::Cuda, Some(_)) => DEVICE_TILE_BYTES,
            (Platform::Cuda, None) | (Platform::Cpu, _) => 0,
        };
        Moment { activations: 0, buffers: squares.max(tiles) }
    }

    /// The fullest moment, and that of the layers alone.
    fn fullest_and_layers(&self) -> [Moment; 2] {
        let layers = &self.shape.layers;
        let mut kept = 0;
        let mut fullest = Moment::default();
        let on_top = |kept: u64, moment: Moment| Moment { activations: kept + moment.activations, ..moment };
        for layer in layers {
            let forward = self.forward(layer);
            fullest = fullest.max(on_top(kept + self.stream(), forward));
            let again = match self.recipe.recompute {
                Recompute::None => Moment::default(),
                // With the gradient of the layer's output beside it.
                Recompute::Layer => on_top(kept + 2 * self.stream(), forward),
            };
            let whole = match self.recipe.recompute {
                Recompute::None => 0,
                Recompute::Layer => self.attention_kept(layer) + self.mlp_kept(layer),
            };
            kept += self.kept(layer);
            let backward = on_top(kept + whole + self.stream(), self.backward(layer));
            fullest = fullest.max(again).max(backward);
        }
        let all = fullest.max(on_top(kept, self.loss())).max(self.update());
        let lasting = self.lasting_buffers();
        [all, fullest].map(|moment| Moment { buffers: moment.buffers + lasting, ..moment })
    }

    fn fullest(&self) -> Moment {
        let [all, _] = self.fullest_and_layers();
        all
    }

    /// Cosines and sines of the positions, token ids, and what the criterion sums up over the step.
    fn lasting_buffers(&self) -> u64 {
        let rotary = self.recipe.batch.window_tokens as u64 * self.shape.head_dim * self.c;
        let master = master_bytes(self.recipe.precision.compute);
        let observed = match self.recipe.pruning.as_ref().map(|pruning| pruning.criterion) {
            Some(Criterion::Taylor) => self.shape.projection_weights() * master,
            // FLAP keeps sums and squares, both in f64.
            Some(Criterion::Flap) => {
                let inputs = self.shape.layers.iter();
                inputs.map(|layer| self.shape.query(layer) + layer.channels).sum::<u64>() * 16
            }
            Some(Criterion::Wanda) => {
                let inputs = self.shape.layers.iter();
                inputs.map(|layer| self.shape.query(layer) + layer.channels).sum::<u64>() * master
            }
            Some(
                Criterion::LoraPrune { .. } | Criterion::Tangent | Criterion::Magnitude | Criterion::Random,
            )
            | None => 0,
        };
        rotary + 24 * self.n + observed
    }
}

#[cfg(test)]
#[path = "activations_tests.rs"]
mod tests;
