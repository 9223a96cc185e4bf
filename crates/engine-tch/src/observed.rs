//! What some criteria want of the passes beside the gradients of the factors.

use crate::dropout::DropoutSite;
use crate::fault::Result;
use crate::layer::LayerShard;
use crate::ops::low_rank::add_product;
use model_spec::Projection;
use recipe::Criterion;
use tch::{Kind, Tensor};

/// Sums over a step's tokens for one layer.
pub(crate) enum Observed {
    /// For `taylor`.
    WeightGradients(WeightGradients),
    /// For `wanda`.
    InputSquares(InputSquares),
    /// For `flap`.
    InputMoments(InputMoments),
}

/// Sums `[2, features]` in f64 of the inputs of o and of down and of their squares, and over how many tokens.
pub(crate) struct InputMoments {
    pub(crate) o: Tensor,
    pub(crate) down: Tensor,
    pub(crate) tokens: i64,
}

/// Gradients of the frozen weights themselves, shaped like them.
pub(crate) struct WeightGradients {
    pub(crate) qkv: Tensor,
    pub(crate) o: Tensor,
    pub(crate) gate_up: Tensor,
    pub(crate) down: Tensor,
}

/// Squares of the inputs of o `[h k]` and of down `[i]`.
pub(crate) struct InputSquares {
    pub(crate) o: Tensor,
    pub(crate) down: Tensor,
}

impl InputSquares {
    pub(crate) fn of(&self, projection: Projection) -> Option<&Tensor> {
        match projection {
            Projection::O => Some(&self.o),
            Projection::Down => Some(&self.down),
            Projection::Q | Projection::K | Projection::V | Projection::Gate | Projection::Up => None,
        }
    }
}

impl Observed {
    /// Zero sums of the `kind` for what `criterion` wants of `layer`; nothing where the factors' gradients are enough.
    pub(crate) fn zeros(criterion: Criterion, layer: &LayerShard, kind: Kind) -> Result<Option<Self>> {
        let device = layer.input_norm.device();
        let zeros = |shape: &[i64]| Ok::<_, crate::fault::Fault>(Tensor::f_zeros(shape, (kind, device))?);
        let like = |weight: &crate::frozen::FrozenWeight| {
            let (rows, columns) = weight.size2()?;
            zeros(&[rows, columns])
        };
        Ok(match criterion {
            Criterion::Taylor => Some(Self::WeightGradients(WeightGradients {
                qkv: like(&layer.qkv)?,
                o: like(&layer.o)?,
                gate_up: like(&layer.gate_up)?,
                down: like(&layer.down)?,
            })),
            Criterion::Wanda => Some(Self::InputSquares(InputSquares {
                o: zeros(&[layer.o.size2()?.1])?,
                down: zeros(&[layer.channels])?,
            })),
            Criterion::Flap => {
                let sums = |features| {
                    Ok::<_, crate::fault::Fault>(Tensor::f_zeros([2, features], (Kind::Double, device))?)
                };
                let (o, down) = (sums(layer.o.size2()?.1)?, sums(layer.channels)?);
                Some(Self::InputMoments(InputMoments { o, down, tokens: 0 }))
            }
            Criterion::LoraPrune { .. } | Criterion::Tangent | Criterion::Magnitude | Criterion::Random => {
                None
            }
        })
    }

    /// Adds what the backward pass sees at a product: its input `x` `[n, in]` and its output's gradient `[n, out]`.
    pub(crate) fn add(&mut self, site: DropoutSite, grad_y: &Tensor, x: &Tensor) -> Result<()> {
        match self {
            Self::WeightGradients(gradients) => {
                let gradient = match site {
                    DropoutSite::Qkv => &mut gradients.qkv,
                    DropoutSite::O => &mut gradients.o,
                    DropoutSite::GateUp => &mut gradients.gate_up,
                    DropoutSite::Down => &mut gradients.down,
                };
                add_product(gradient, &grad_y.f_tr()?, x)
            }
            Self::InputMoments(moments) => {
                let sums = match site {
                    DropoutSite::O => &moments.o,
                    DropoutSite::Down => &moments.down,
                    DropoutSite::Qkv | DropoutSite::GateUp => return Ok(()),
                };
                if let DropoutSite::Down = site {
                    moments.tokens += x.size()[0];
                }
                let of = |values: &Tensor| values.f_sum_dim_intlist(&[0i64][..], false, Kind::Double);
                let _ = sums.f_get(0)?.f_add_(&of(x)?)?;
                let _ = sums.f_get(1)?.f_add_(&of(&x.f_square()?)?)?;
                Ok(())
            }
            Self::InputSquares(squares) => {
                let sum = match site {
                    DropoutSite::O => &mut squares.o,
                    DropoutSite::Down => &mut squares.down,
                    DropoutSite::Qkv | DropoutSite::GateUp => return Ok(()),
                };
                let of_pass = x.f_square()?.f_sum_dim_intlist(&[0i64][..], false, sum.kind())?;
                let _ = sum.f_add_(&of_pass)?;
                Ok(())
            }
        }
    }
}
