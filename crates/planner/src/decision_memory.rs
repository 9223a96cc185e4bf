//! Memory while a decision is put into force: the least-squares compensation of o and down, and the slicing.

use crate::activations::Moment;
use crate::course::Course;
use crate::formats::{compute_bytes, master_bytes};
use crate::rank_shape::{RankShape, RankWidths};
use model_spec::LayerSpec;
use recipe::{Compensation, CompensationTarget, LeastSquares, Recipe};

/// Inputs of o and of down that stay after a decision, of all ranks, and this rank's widths before it.
struct Solve<'a> {
    recipe: &'a Recipe,
    choice: LeastSquares,
    hidden: u64,
    tp_degree: u64,
    /// Tokens of a pass.
    n: u64,
    /// Bytes of a number of the products.
    c: u64,
}

/// The fullest moment of any decision, beside weights, factors, gradients and moments; none where nothing is decided.
pub(crate) fn fullest_decision(
    shape_of: &dyn Fn(&[LayerSpec]) -> RankShape,
    course: &Course,
    recipe: &Recipe,
    tp_degree: usize,
) -> Option<Moment> {
    let pruning = recipe.pruning.as_ref()?;
    let mut fullest: Option<Moment> = None;
    for (before, after) in course.changes() {
        let held = shape_of(if course.shrinks { before } else { &course.dense });
        let mut moment = slicing(&held, recipe, course.shrinks);
        if let Compensation::LeastSquares(choice) = pruning.compensation {
            let solve = Solve::new(&held, recipe, choice, tp_degree);
            for ((layer, before), after) in held.layers.iter().zip(before).zip(after) {
                moment = larger(moment, solve.fullest(&held, layer, [before, after]));
            }
        }
        fullest = Some(fullest.map_or(moment, |fullest| larger(fullest, moment)));
    }
    fullest
}

fn larger(one: Moment, other: Moment) -> Moment {
    if other.activations + other.buffers > one.activations + one.buffers { other } else { one }
}

/// A layer's weights are sliced beside the old ones, one layer at a time; then factors and moments, all at once.
fn slicing(held: &RankShape, recipe: &Recipe, shrinks: bool) -> Moment {
    if !shrinks {
        return Moment::default();
    }
    let flats = (4 + recipe.frozen_pairs())
        * held.lora(recipe.lora.rank as u64)
        * master_bytes(recipe.precision.compute);
    let one = |layer: &RankWidths| RankShape { layers: vec![*layer], vocabulary_rows: 0, ..held.clone() };
    let layer = held.layers.iter().map(|layer| one(layer).frozen_bytes(recipe.precision)).max().unwrap_or(0);
    Moment { activations: 0, buffers: flats.max(layer) }
}

impl<'a> Solve<'a> {
    fn new(held: &RankShape, recipe: &'a Recipe, choice: LeastSquares, tp_degree: usize) -> Self {
        Self {
            recipe,
            choice,
            hidden: held.hidden,
            tp_degree: tp_degree as u64,
            n: recipe.batch.rows.min(choice.windows) as u64 * recipe.batch.window_tokens as u64,
            c: compute_bytes(recipe.precision.compute),
        }
    }

    fn fullest(&self, held: &RankShape, layer: &RankWidths, [before, after]: [&LayerSpec; 2]) -> Moment {
        let heads = |widths: &LayerSpec| widths.query_head_count as u64 * held.head_dim;
        let mut fullest = Moment::default();
        if heads(after) < heads(before) {
            // On the way to o's input: q, k and v, and the attention's output.
            let on_the_way = held.query(layer) + 2 * held.key(layer) + self.hidden;
            fullest = larger(fullest, self.of(heads(after), held.query(layer), on_the_way));
        }
        if after.intermediate_size < before.intermediate_size {
            let on_the_way = 2 * layer.channels + self.hidden;
            fullest = larger(fullest, self.of(after.intermediate_size as u64, layer.channels, on_the_way));
        }
        fullest
    }

    /// A matrix `[d, held]` of this rank, `stay` inputs of all ranks staying (`K` below).
    ///
    /// ```text
    /// streams     windows t d c, twice where the stream is the target
    /// sums        8 K^2 + 8 K d                                               f64
    /// add         + max(12 K^2, 12 K d) + n (2 held + K + d) c                a product in f32 and its copy in f64
    /// solve       + 16 K^2 + 8 K d                                            damped, its factor; both copied for LAPACK
    /// change      + 8 K d + 24 K/p d + d held c                               this rank's columns in f64, old, added, new
    /// ```
    fn of(&self, stay: u64, held: u64, on_the_way: u64) -> Moment {
        let (d, c, wide) = (self.hidden, self.c, self.n * self.c);
        let tokens = (self.choice.windows * self.recipe.batch.window_tokens) as u64;
        let streams = match self.choice.target {
            CompensationTarget::Layer => 1,
            CompensationTarget::Stream => 2,
        } * tokens
            * d
            * c;
        let sums = 8 * stay * stay + 8 * stay * d;
        let gathering = streams + wide * (held + on_the_way);
        let add = Moment {
            activations: streams + wide * (2 * held + stay + d),
            buffers: sums + (12 * stay * stay).max(12 * stay * d),
        };
        let solve = Moment { activations: streams, buffers: sums + 16 * stay * stay + 8 * stay * d };
        let columns = stay.div_ceil(self.tp_degree);
        let change =
            Moment { activations: streams, buffers: sums + 8 * stay * d + 24 * columns * d + d * held * c };
        let gather = Moment { activations: gathering, buffers: sums };
        [add, solve, change].into_iter().fold(gather, larger)
    }
}
