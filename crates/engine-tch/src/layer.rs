//! One decoder layer on one rank: forward, and the backward pass written by hand.
//!
//! ```text
//! x_mid = x     + sum over ranks of o(attention(rope(q, k), v))    q, k, v of norm1(x)
//! x_out = x_mid + sum over ranks of down(silu(gate) * up)          gate, up of norm2(x_mid)
//! ```
//!
//! Every linear map is frozen and adapted: `y = x W^T + s (dropout(x) A^T) B^T`. Column-parallel maps that read the same
//! input are one product. Two all-reduces forward, two backward.
//!
//! Shapes: n tokens of all rows · b rows · t tokens of a row · d hidden · h, g query and key/value heads on this rank ·
//! k head_dim · i channels on this rank · r lora_rank.

use crate::communicator::Communicator;
use crate::dropout::{Dropout, DropoutSite};
use crate::factors::{Factor, FactorLayout};
use crate::fault::Result;
use crate::frozen::FrozenWeight;
use crate::observed::Observed;
use crate::ops::{self, Attended, RotaryTable, causal, low_rank, matmul};
use model_spec::Projection;
use recipe::Recompute;
use tch::{Kind, Tensor};

const QKV: [Projection; 3] = [Projection::Q, Projection::K, Projection::V];
const GATE_UP: [Projection; 2] = [Projection::Gate, Projection::Up];

/// The frozen part of a layer.
pub(crate) struct LayerShard {
    pub(crate) input_norm: Tensor,
    pub(crate) post_attention_norm: Tensor,
    /// `[(h + 2g) k, d]`: q, then k, then v.
    pub(crate) qkv: FrozenWeight,
    /// `[d, h k]`
    pub(crate) o: FrozenWeight,
    /// `[2i, d]`: gate, then up.
    pub(crate) gate_up: FrozenWeight,
    /// `[d, i]`
    pub(crate) down: FrozenWeight,
    pub(crate) query_heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) channels: i64,
    /// Indices into the unpruned model of o's and down's inputs, int64.
    pub(crate) head_features: Tensor,
    pub(crate) channel_features: Tensor,
    /// One for a kept feature and zero for a removed one, when nothing is sliced (`shrink: never`).
    pub(crate) head_keep: Option<Tensor>,
    pub(crate) channel_keep: Option<Tensor>,
}

/// The row-parallel maps, whose inputs a decision removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Narrowing {
    O,
    Down,
}

impl Narrowing {
    pub(crate) const BOTH: [Self; 2] = [Self::O, Self::Down];

    pub(crate) fn projection(self) -> Projection {
        match self {
            Self::O => Projection::O,
            Self::Down => Projection::Down,
        }
    }
}

/// What is the same for all layers of a pass.
pub(crate) struct Pass<'a> {
    pub(crate) rows: i64,
    pub(crate) tokens: i64,
    pub(crate) head_dim: i64,
    pub(crate) norm_eps: f64,
    pub(crate) rotary: &'a RotaryTable,
    pub(crate) layout: &'a FactorLayout,
    /// Factors in the format of the products.
    pub(crate) factors: &'a Tensor,
    /// Pairs that are frozen, laid out like the factors.
    pub(crate) ledger: &'a [Tensor],
    pub(crate) lora_rank: i64,
    pub(crate) scaling: f64,
    pub(crate) dropout: Dropout,
    /// Position of the pass's first token in the optimizer step.
    pub(crate) first_token: i64,
    pub(crate) hidden_features: &'a Tensor,
    pub(crate) compute: Kind,
    /// `[b, 1, t, t]`: which token sees which; absent: each row is causal. For passes without a backward one.
    pub(crate) sees: Option<&'a Tensor>,
}

/// What a layer's forward pass leaves for its backward pass.
pub(crate) enum Saved {
    /// Of a layer that passes its input on.
    Nothing,
    All(Box<Activations>),
    /// Only the input: everything else is computed again.
    Input(Tensor),
}

/// What attention computes on the way to o.
struct Attention {
    rstd: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Option<Attended>,
    low_qkv: Tensor,
}

pub(crate) struct Activations {
    x: Tensor,
    rstd_1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Option<Attended>,
    low_qkv: Tensor,
    low_o: Tensor,
    x_mid: Tensor,
    rstd_2: Tensor,
    gate_up: Tensor,
    low_gate_up: Tensor,
    low_down: Tensor,
}

/// One product of frozen weight and adapters that read the same input.
struct Adapted<'a> {
    layer: usize,
    site: DropoutSite,
    projections: &'a [Projection],
    /// Output widths of the projections.
    widths: &'a [i64],
    weight: &'a FrozenWeight,
    /// Indices of the input's features.
    features: &'a Tensor,
}

impl Adapted<'_> {
    /// `y` `[n, sum of widths]` and the scaled low-rank values `s dropout(x) A^T` `[n, projections * r]`.
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, Tensor)> {
        let y = matmul::product(x, &self.weight.dense(pass.compute)?.f_tr()?)?;
        let dropped = pass.dropout.apply(x, self.layer, self.site, pass.first_token, self.features)?;
        let a = pass.layout.stacked_a(pass.factors, self.layer, self.projections)?;
        let low = low_rank::project(&dropped, &a, pass.scaling)?;
        let mut column = 0;
        for (place, (projection, width)) in self.projections.iter().zip(self.widths).enumerate() {
            let b = pass.layout.view(pass.factors, self.layer, *projection, Factor::B)?;
            let low = low.f_narrow(1, place as i64 * pass.lora_rank, pass.lora_rank)?;
            low_rank::expand_add(&mut y.f_narrow(1, column, *width)?, &low, &b.f_tr()?)?;
            column += width;
        }
        for frozen in pass.ledger {
            let a = pass.layout.stacked_a(frozen, self.layer, self.projections)?;
            let low = low_rank::project(x, &a, pass.scaling)?;
            let mut column = 0;
            for (place, (projection, width)) in self.projections.iter().zip(self.widths).enumerate() {
                let b = pass.layout.view(frozen, self.layer, *projection, Factor::B)?;
                let low = low.f_narrow(1, place as i64 * pass.lora_rank, pass.lora_rank)?;
                low_rank::expand_add(&mut y.f_narrow(1, column, *width)?, &low, &b.f_tr()?)?;
                column += width;
            }
        }
        Ok((y, low))
    }

    /// Adds to the factors' gradients (and to what a criterion observes) and returns the input's gradient.
    ///
    /// ```text
    /// dx = dy W + dropout(u A)    u = s dy B    dA += u^T dropout(x)    dB += dy^T low
    /// ```
    fn backward(
        &self,
        grad_y: &Tensor,
        x: &Tensor,
        low: &Tensor,
        pass: &Pass,
        gradients: &Tensor,
        observed: Option<&mut Observed>,
    ) -> Result<Tensor> {
        let mut grad_x = matmul::product(grad_y, &self.weight.dense(pass.compute)?)?;
        let mut up = Vec::with_capacity(self.projections.len());
        let mut column = 0;
        for (place, (projection, width)) in self.projections.iter().zip(self.widths).enumerate() {
            let grad = grad_y.f_narrow(1, column, *width)?;
            let b = pass.layout.view(pass.factors, self.layer, *projection, Factor::B)?;
            up.push(low_rank::project(&grad, &b.f_tr()?, pass.scaling)?);
            let low = low.f_narrow(1, place as i64 * pass.lora_rank, pass.lora_rank)?;
            let grad_b = pass.layout.view(gradients, self.layer, *projection, Factor::B)?;
            low_rank::outer_add(&mut grad_b.f_tr()?, &low, &grad)?;
            column += width;
        }
        let up = Tensor::f_cat(&up, 1)?;
        let dropped = pass.dropout.apply(x, self.layer, self.site, pass.first_token, self.features)?;
        let mut grad_a = pass.layout.stacked_a(gradients, self.layer, self.projections)?;
        low_rank::outer_add(&mut grad_a, &up, &dropped)?;
        let a = pass.layout.stacked_a(pass.factors, self.layer, self.projections)?;
        if pass.dropout.probability == 0.0 {
            low_rank::expand_add(&mut grad_x, &up, &a)?;
        } else {
            let through = up.f_mm(&a)?;
            let _ = grad_x.f_add_(&pass.dropout.apply(
                &through,
                self.layer,
                self.site,
                pass.first_token,
                self.features,
            )?)?;
        }
        for frozen in pass.ledger {
            let mut up = Vec::with_capacity(self.projections.len());
            let mut column = 0;
            for (projection, width) in self.projections.iter().zip(self.widths) {
                let b = pass.layout.view(frozen, self.layer, *projection, Factor::B)?;
                let grad = grad_y.f_narrow(1, column, *width)?;
                up.push(low_rank::project(&grad, &b.f_tr()?, pass.scaling)?);
                column += width;
            }
            let a = pass.layout.stacked_a(frozen, self.layer, self.projections)?;
            low_rank::expand_add(&mut grad_x, &Tensor::f_cat(&up, 1)?, &a)?;
        }
        if let Some(observed) = observed {
            observed.add(self.site, grad_y, x)?;
        }
        Ok(grad_x)
    }
}

impl LayerShard {
    fn qkv_widths(&self, head_dim: i64) -> [i64; 3] {
        [self.query_heads * head_dim, self.kv_heads * head_dim, self.kv_heads * head_dim]
    }

    /// `x` `[n, d]` to the layer's output `[n, d]`, both equal on all ranks.
    pub(crate) fn forward(
        &self,
        layer: usize,
        x: Tensor,
        pass: &Pass,
        recompute: Recompute,
        communicator: &mut dyn Communicator,
    ) -> Result<(Tensor, Saved)> {
        let (out, activations) = self.run(layer, x, pass, communicator, true)?;
        let saved = match recompute {
            Recompute::None => Saved::All(Box::new(activations)),
            Recompute::Layer => Saved::Input(activations.x),
        };
        Ok((out, saved))
    }

    pub(crate) fn narrowing(&self, which: Narrowing) -> &FrozenWeight {
        match which {
            Narrowing::O => &self.o,
            Narrowing::Down => &self.down,
        }
    }

    pub(crate) fn narrowing_mut(&mut self, which: Narrowing) -> &mut FrozenWeight {
        match which {
            Narrowing::O => &mut self.o,
            Narrowing::Down => &mut self.down,
        }
    }

    /// o's input `[n, h k]` for the layer's input, or down's `[n, i]` for the residual stream behind attention.
    pub(crate) fn inputs_of(
        &self,
        layer: usize,
        which: Narrowing,
        x: &Tensor,
        pass: &Pass,
    ) -> Result<Tensor> {
        match which {
            Narrowing::O => {
                let attention = self.attend(layer, x, pass)?;
                self.heads_out(attention.attended.as_ref(), pass)
            }
            Narrowing::Down => {
                let (_, normed) = ops::rms_norm(x, &self.post_attention_norm, pass.norm_eps)?;
                let widths = [self.channels; 2];
                let (gate_up, _) = self.adapted_gate_up(layer, &widths, pass).forward(&normed, pass)?;
                self.act(&gate_up)
            }
        }
    }

    /// What o or down makes of its inputs on all ranks, `[n, d]`.
    pub(crate) fn output_of(
        &self,
        layer: usize,
        which: Narrowing,
        inputs: &Tensor,
        pass: &Pass,
        communicator: &mut dyn Communicator,
    ) -> Result<Tensor> {
        let hidden = [pass.hidden_features.size()[0]];
        let adapted = match which {
            Narrowing::O => self.adapted_o(layer, &hidden),
            Narrowing::Down => self.adapted_down(layer, &hidden),
        };
        let (mut out, _) = adapted.forward(inputs, pass)?;
        communicator.all_reduce_sum(&mut out)?;
        Ok(out)
    }

    /// Attention of the layer's input, up to o.
    fn attend(&self, layer: usize, x: &Tensor, pass: &Pass) -> Result<Attention> {
        let (rows, tokens, width) = (pass.rows, pass.tokens, pass.head_dim);
        let (rstd, normed) = ops::rms_norm(x, &self.input_norm, pass.norm_eps)?;
        let widths = self.qkv_widths(width);
        let (qkv, low_qkv) = self.adapted_qkv(layer, &widths, pass).forward(&normed, pass)?;
        drop(normed);
        let shape = [rows, tokens, self.query_heads, self.kv_heads, width];
        let [q, k, v] = causal::rotated_parts(&qkv, shape, pass.rotary)?;
        drop(qkv);
        let attended = match pass.sees {
            _ if self.query_heads == 0 => None,
            None => Some(ops::attention(&q, &k, &v)?),
            Some(sees) => Some(ops::attention_where(&q, &k, &v, sees)?),
        };
        Ok(Attention { rstd, q, k, v, attended, low_qkv })
    }

    /// Forward, without the last sum when only the activations are wanted again.
    fn run(
        &self,
        layer: usize,
        x: Tensor,
        pass: &Pass,
        communicator: &mut dyn Communicator,
        with_output: bool,
    ) -> Result<(Tensor, Activations)> {
        let Attention { rstd: rstd_1, q, k, v, attended, low_qkv } = self.attend(layer, &x, pass)?;
        let heads_out = self.heads_out(attended.as_ref(), pass)?;
        let (mut attention_out, low_o) = self.adapted_o(layer, &[x.size()[1]]).forward(&heads_out, pass)?;
        communicator.all_reduce_sum(&mut attention_out)?;
        let x_mid = attention_out.f_add_(&x)?;

        let (rstd_2, normed) = ops::rms_norm(&x_mid, &self.post_attention_norm, pass.norm_eps)?;
        let (gate_up, low_gate_up) =
            self.adapted_gate_up(layer, &[self.channels; 2], pass).forward(&normed, pass)?;
        drop(normed);
        let act = self.act(&gate_up)?;
        let (out, low_down) = self.adapted_down(layer, &[x.size()[1]]).forward(&act, pass)?;
        let out = if with_output {
            let mut out = out;
            communicator.all_reduce_sum(&mut out)?;
            out.f_add_(&x_mid)?
        } else {
            out
        };
        let activations = Activations {
            x,
            rstd_1,
            q,
            k,
            v,
            attended,
            low_qkv,
            low_o,
            x_mid,
            rstd_2,
            gate_up,
            low_gate_up,
            low_down,
        };
        Ok((out, activations))
    }

    /// The gradient of the layer's input from that of its output, both `[n, d]` and equal on all ranks. Gradients of the
    /// factors are added to `gradients`; those of replicated factors are this rank's part only.
    #[allow(
        clippy::too_many_arguments,
        reason = "a backward pass reads what the forward pass read and wrote"
    )]
    pub(crate) fn backward(
        &self,
        layer: usize,
        mut grad: Tensor,
        saved: Saved,
        pass: &Pass,
        gradients: &Tensor,
        mut observed: Option<&mut Observed>,
        communicator: &mut dyn Communicator,
    ) -> Result<Tensor> {
        let kept = match saved {
            Saved::Nothing => return Ok(grad),
            Saved::All(activations) => *activations,
            Saved::Input(x) => self.run(layer, x, pass, communicator, false)?.1,
        };
        let hidden = kept.x.size()[1];

        let act = self.act(&kept.gate_up)?;
        let mut grad_act = self.adapted_down(layer, &[hidden]).backward(
            &grad,
            &act,
            &kept.low_down,
            pass,
            gradients,
            observed.as_deref_mut(),
        )?;
        if let Some(keep) = &self.channel_keep {
            let _ = grad_act.f_mul_(keep)?;
        }
        let grad_gate_up = ops::swiglu_backward(&grad_act, &kept.gate_up)?;
        drop((act, grad_act));
        let normed = ops::rms_norm_apply(&kept.x_mid, &kept.rstd_2, &self.post_attention_norm)?;
        let mut grad_normed = self.adapted_gate_up(layer, &[self.channels; 2], pass).backward(
            &grad_gate_up,
            &normed,
            &kept.low_gate_up,
            pass,
            gradients,
            observed.as_deref_mut(),
        )?;
        drop((normed, grad_gate_up));
        communicator.all_reduce_sum(&mut grad_normed)?;
        ops::rms_norm_backward_add(
            &mut grad,
            &grad_normed,
            &kept.x_mid,
            &kept.rstd_2,
            &self.post_attention_norm,
        )?;

        let heads_out = self.heads_out(kept.attended.as_ref(), pass)?;
        let mut grad_heads = self.adapted_o(layer, &[hidden]).backward(
            &grad,
            &heads_out,
            &kept.low_o,
            pass,
            gradients,
            observed.as_deref_mut(),
        )?;
        drop(heads_out);
        if let Some(keep) = &self.head_keep {
            let _ = grad_heads.f_mul_(keep)?;
        }
        let tokens = kept.x.size()[0];
        let grad_qkv = match &kept.attended {
            Some(attended) => {
                let shape = [pass.rows, pass.tokens, self.query_heads, pass.head_dim];
                let grad_heads = grad_heads.f_view(shape)?;
                let inputs = [&kept.q, &kept.k, &kept.v];
                causal::unrotated_gradient(&grad_heads, inputs, attended, pass.rotary)?
            }
            None => Tensor::f_zeros([tokens, 0], (pass.compute, grad.device()))?,
        };
        let normed = ops::rms_norm_apply(&kept.x, &kept.rstd_1, &self.input_norm)?;
        let mut grad_normed = self.adapted_qkv(layer, &self.qkv_widths(pass.head_dim), pass).backward(
            &grad_qkv,
            &normed,
            &kept.low_qkv,
            pass,
            gradients,
            observed,
        )?;
        communicator.all_reduce_sum(&mut grad_normed)?;
        ops::rms_norm_backward_add(&mut grad, &grad_normed, &kept.x, &kept.rstd_1, &self.input_norm)?;
        Ok(grad)
    }

    /// o's input `[n, h k]`: attention's output, removed heads zero.
    fn heads_out(&self, attended: Option<&Attended>, pass: &Pass) -> Result<Tensor> {
        let tokens = pass.rows * pass.tokens;
        let Some(attended) = attended else {
            return Ok(Tensor::f_zeros([tokens, 0], (pass.compute, self.input_norm.device()))?);
        };
        let heads = attended.out.f_view([tokens, self.query_heads * pass.head_dim])?;
        Ok(match &self.head_keep {
            Some(keep) => heads.f_mul(keep)?,
            None => heads,
        })
    }

    /// down's input `[n, i]`, removed channels zero.
    fn act(&self, gate_up: &Tensor) -> Result<Tensor> {
        let act = ops::swiglu(gate_up)?;
        Ok(match &self.channel_keep {
            Some(keep) => act.f_mul(keep)?,
            None => act,
        })
    }

    fn adapted_qkv<'a>(&'a self, layer: usize, widths: &'a [i64], pass: &'a Pass) -> Adapted<'a> {
        let features = pass.hidden_features;
        Adapted { layer, site: DropoutSite::Qkv, projections: &QKV, widths, weight: &self.qkv, features }
    }

    fn adapted_o<'a>(&'a self, layer: usize, widths: &'a [i64]) -> Adapted<'a> {
        let features = &self.head_features;
        Adapted {
            layer,
            site: DropoutSite::O,
            projections: &[Projection::O],
            widths,
            weight: &self.o,
            features,
        }
    }

    fn adapted_gate_up<'a>(&'a self, layer: usize, widths: &'a [i64], pass: &'a Pass) -> Adapted<'a> {
        let (projections, features) = (&GATE_UP, pass.hidden_features);
        Adapted { layer, site: DropoutSite::GateUp, projections, widths, weight: &self.gate_up, features }
    }

    fn adapted_down<'a>(&'a self, layer: usize, widths: &'a [i64]) -> Adapted<'a> {
        let (projections, features) = (&[Projection::Down], &self.channel_features);
        Adapted { layer, site: DropoutSite::Down, projections, widths, weight: &self.down, features }
    }
}
