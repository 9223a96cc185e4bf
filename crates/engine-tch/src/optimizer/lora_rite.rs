//! LoRA-RITE (arXiv:2410.20625) on pairs of factors: the step of `Z = B A` is the same however `Z` is split into factors.
//!
//! ```text
//! X = B [m, r]   Y = A^T [n, r]   X = U_X R_X   Y = U_Y R_Y   (U orthonormal)          gX = dL/dX   gY = dL/dY
//! u_X = gX R_Y^+                    unmagnified gradient, clipped by its norm over all pairs
//! P_X = U_Y^T U_Y_old               the change of the basis that X's moments are in, which is Y's
//! V_X <- (1 - b2) u_X^T u_X / m + b2 P_X V_X P_X^T
//! rho_X <- b2 (rho_X + d)           d: mass that the projection has lost, where it counts on
//! M_X <- (1 - b1) u_X (V_X + rho_X)^(-1/2) + b1 M_X P_X^T
//! X <- X - lr (M_X R_Y^-T + wd X)   b1, b2: with the bias correction folded in, b (1 - b^(t-1)) / (1 - b^t)
//! ```
//!
//! and the same with X and Y changed places. Any root R of the Gram matrix gives the same steps of Z; `gram` has ours, with a
//! pseudo-inverse for factors of less than full rank, such as `B = 0` at the start. Everything of size r x r comes from Gram
//! matrices, for which all ranks meet once a step.

use crate::communicator::Communicator;
use crate::fault::{Fault, Result};
use crate::gram::{self, Stack, inverse_root, symmetric, transposed, with_eigenvalues};
use recipe::LoraRite;
use tch::{Device, Kind, Tensor};

/// Second moments `[pairs, 2, r, r]` and mass that escaped them `[pairs, 2]`, in f64, B before A; the same on all ranks.
pub(crate) struct PairMoments {
    pub(crate) second: Tensor,
    pub(crate) escaped: Tensor,
}

impl PairMoments {
    pub(crate) fn zeros(pair_count: i64, lora_rank: i64, device: Device) -> Result<Self> {
        Ok(Self {
            second: Tensor::f_zeros([pair_count, 2, lora_rank, lora_rank], (Kind::Double, device))?,
            escaped: Tensor::f_zeros([pair_count, 2], (Kind::Double, device))?,
        })
    }
}

impl PairMoments {
    /// By the names under which checkpoints keep them.
    pub(crate) fn named(&mut self) -> [(&'static str, &mut Tensor); 2] {
        [("rite_second", &mut self.second), ("rite_escaped", &mut self.escaped)]
    }
}

/// A factor, its gradient and what is remembered of it, as `[rows on this rank, r]`: views that the step writes to.
pub(crate) struct Side {
    pub(crate) factor: Tensor,
    pub(crate) gradient: Tensor,
    pub(crate) moment: Tensor,
    pub(crate) basis: Tensor,
    /// On all ranks together.
    pub(crate) rows: usize,
    /// Whether the rows are split over ranks.
    pub(crate) split: bool,
}

impl Side {
    fn stack(&self) -> Stack {
        let parts = [&self.factor, &self.basis, &self.gradient, &self.moment];
        Stack { parts: parts.map(Tensor::shallow_clone).into(), split: self.split }
    }
}

/// Where `B` and `A` are in arrays by side.
const X: usize = 0;
const Y: usize = 1;

/// `B` and the transpose of `A`.
pub(crate) type Pair = [Side; 2];

/// How a step is made.
pub(crate) struct Rule<'a> {
    pub(crate) choice: &'a LoraRite,
    pub(crate) escaped_mass: bool,
    pub(crate) learning_rate: f64,
    /// Bound on the norm of the unmagnified gradients.
    pub(crate) max_norm: Option<f64>,
    /// This step's number, from 1.
    pub(crate) update: u64,
}

/// What a step found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Taken {
    /// Norm of the unmagnified gradients before it was bounded.
    pub(crate) norm: f64,
    /// Factors that took no step for `max_rms`.
    pub(crate) left_out: usize,
}

/// Blocks of the Gram matrix of `[F U_old g M]` that every side needs, and those that the guard needs of X.
const NEEDED: [(usize, usize); 3] = [(0, 0), (0, 1), (2, 2)];
const GUARDED: [(usize, usize); 7] = [(0, 0), (0, 1), (2, 2), (0, 2), (0, 3), (2, 3), (3, 3)];

/// Takes one step of all pairs. All have the same LoRA rank.
pub(crate) fn step(
    pairs: &[Pair],
    moments: &mut PairMoments,
    rule: &Rule,
    communicator: &mut dyn Communicator,
) -> Result<Taken> {
    if pairs.is_empty() {
        return Ok(Taken { norm: 0.0, left_out: 0 });
    }
    let choice = rule.choice;
    let stacks: Vec<[Stack; 2]> = pairs.iter().map(|pair| [X, Y].map(|side| pair[side].stack())).collect();
    let of_x: &[_] = if choice.guard { &GUARDED } else { &NEEDED };
    let grams = gram::products(&stacks, [of_x, &NEEDED], communicator)?;
    drop(stacks);
    let inverse = [inverse_root(&grams[X][0])?, inverse_root(&grams[Y][0])?];
    let lora_rank = inverse[X].size()[1] as f64;
    let rows: [Tensor; 2] = [rows_of(pairs, X, &inverse[X])?, rows_of(pairs, Y, &inverse[X])?];

    let mut squares = Vec::new();
    let mut kept = Vec::new();
    let mut left_out = 0;
    let mut norm_square = 0.0;
    for side in [X, Y] {
        let other = &inverse[1 - side];
        let square = transposed(other)?.f_matmul(&grams[side][2])?.f_matmul(other)?.f_div(&rows[side])?;
        let trace = trace(&square)?;
        let keep = match choice.max_rms {
            Some(most) => trace.f_le(most * most * lora_rank)?.f_to_kind(Kind::Double)?,
            None => trace.f_ones_like()?,
        };
        left_out += keep.size1()? as usize - keep.f_sum(Kind::Double)?.f_double_value(&[])? as usize;
        let counted = trace.f_mul(&keep)?.f_mul(&rows[side].f_view([-1i64])?)?;
        norm_square += counted.f_sum(Kind::Double)?.f_double_value(&[])?;
        squares.push(square);
        kept.push(keep.f_view([-1i64, 1, 1])?);
    }
    let norm = norm_square.sqrt();
    if !norm.is_finite() {
        return Err(Fault::NotFinite {
            what: "norm of LoRA-RITE's unmagnified gradients".into(),
            step: rule.update,
            value: norm,
        });
    }
    let bound = rule.max_norm.map_or(1.0, |most| if norm > most { most / norm } else { 1.0 });

    let (beta1, beta2) = (corrected(choice.beta1, rule.update), corrected(choice.beta2, rule.update));
    // M <- g of_gradient + M of_moment, by side.
    let mut of_gradient = Vec::new();
    let mut of_moment = Vec::new();
    for side in [X, Y] {
        let other = 1 - side;
        let scale = kept[side].f_mul_scalar(bound)?;
        let square = squares[side].f_mul(&scale)?.f_mul(&scale)?;
        // P of this side: the other's basis, new against old.
        let change = transposed(&inverse[other])?.f_matmul(&grams[other][1])?;
        let mut second = moments.second.f_select(1, side as i64)?;
        let mut escaped = moments.escaped.f_select(1, side as i64)?;
        let moved = symmetric(&change.f_matmul(&second)?.f_matmul(&transposed(&change)?)?)?;
        if rule.escaped_mass {
            let lost = eigenvalues(&second)?.f_sub(&eigenvalues(&moved)?)?.f_amax([1i64], false)?;
            let lost_in_all = trace(&second)?.f_sub(&trace(&moved)?)?;
            let lost = lost.f_minimum(&lost_in_all)?.f_clamp_min(0.0)?;
            escaped.f_copy_(&escaped.f_add(&lost)?.f_mul_scalar(beta2)?)?;
        }
        second
            .f_copy_(&symmetric(&square.f_mul_scalar(1.0 - beta2)?.f_add(&moved.f_mul_scalar(beta2)?)?)?)?;
        let (values, vectors) = second.f_linalg_eigh("L")?;
        let roots = values.f_add(&escaped.f_unsqueeze(1)?)?.f_clamp_min(0.0)?.f_sqrt()?;
        let inverse_roots = roots.f_add_scalar(choice.eps)?.f_reciprocal()?;
        let conditioner = with_eigenvalues(&vectors, &inverse_roots)?;
        of_gradient.push(inverse[other].f_matmul(&conditioner)?.f_mul(&scale)?.f_mul_scalar(1.0 - beta1)?);
        of_moment.push(transposed(&change)?.f_mul_scalar(beta1)?);
    }
    let step_of_x = transposed(&inverse[Y])?;
    let step_of_y = if choice.guard {
        guarded_step(&grams[X], &inverse, [&of_gradient[X], &of_moment[X]], rule)?
    } else {
        transposed(&inverse[X])?
    };
    let steps = [step_of_x, step_of_y];

    for (place, pair) in pairs.iter().enumerate() {
        for (side, held) in pair.iter().enumerate() {
            let kind = held.factor.kind();
            let own =
                |small: &Tensor| -> Result<Tensor> { Ok(small.f_select(0, place as i64)?.f_to_kind(kind)?) };
            let moment = held
                .gradient
                .f_mm(&own(&of_gradient[side])?)?
                .f_addmm(&held.moment, &own(&of_moment[side])?)?;
            held.moment.shallow_clone().f_copy_(&moment)?;
            held.basis.shallow_clone().f_copy_(&held.factor.f_mm(&own(&inverse[side])?)?)?;
            let step = moment.f_mm(&own(&steps[side])?)?.f_mul_scalar(rule.learning_rate)?;
            let mut factor = held.factor.shallow_clone();
            if choice.weight_decay > 0.0 {
                let _ = factor.f_mul_scalar_(1.0 - rule.learning_rate * choice.weight_decay)?;
            }
            let _ = factor.f_sub_(&step)?;
        }
    }
    Ok(Taken { norm, left_out })
}

/// What M_Y is multiplied by for the step of Y where X has taken its own first: `(U_X'^T U_X)^T R_X'^-T`, from products with
/// `X' = X (1 - lr wd) - lr M R_Y^-T`, `M = gX of_gradient + M_X of_moment`. A step of Z is then at most lr (|M_X| + |M_Y|).
fn guarded_step(grams: &[Tensor], inverse: &[Tensor; 2], of: [&Tensor; 2], rule: &Rule) -> Result<Tensor> {
    let [xx, _, gg, xg, xm, gm, mm] = grams else {
        return Err(Fault::Refused("the guard of LoRA-RITE needs all products".into()));
    };
    let [of_gradient, of_moment] = of;
    let (lr, decay) = (rule.learning_rate, 1.0 - rule.learning_rate * rule.choice.weight_decay);
    // X^T M and M^T M of the new M.
    let x_new = xg.f_matmul(of_gradient)?.f_add(&xm.f_matmul(of_moment)?)?;
    let crossed = transposed(of_gradient)?.f_matmul(gm)?.f_matmul(of_moment)?;
    let new_new = transposed(of_gradient)?
        .f_matmul(gg)?
        .f_matmul(of_gradient)?
        .f_add(&crossed)?
        .f_add(&transposed(&crossed)?)?
        .f_add(&transposed(of_moment)?.f_matmul(mm)?.f_matmul(of_moment)?)?;
    let step = transposed(&inverse[Y])?.f_mul_scalar(lr)?;
    // X^T (M R^-T lr) and (M R^-T lr)^T (M R^-T lr).
    let x_step = x_new.f_matmul(&step)?;
    let step_step = transposed(&step)?.f_matmul(&new_new)?.f_matmul(&step)?;
    let then_then = xx
        .f_mul_scalar(decay * decay)?
        .f_sub(&x_step.f_add(&transposed(&x_step)?)?.f_mul_scalar(decay)?)?
        .f_add(&step_step)?;
    let then_now = xx.f_mul_scalar(decay)?.f_sub(&transposed(&x_step)?)?;
    let inverse_then = inverse_root(&symmetric(&then_then)?)?;
    let turn = transposed(&inverse_then)?.f_matmul(&then_now)?.f_matmul(&inverse[X])?;
    Ok(transposed(&turn)?.f_matmul(&transposed(&inverse_then)?)?)
}

/// In ascending order.
fn eigenvalues(matrices: &Tensor) -> Result<Tensor> {
    Ok(matrices.f_linalg_eigvalsh("L")?)
}

fn trace(matrices: &Tensor) -> Result<Tensor> {
    Ok(matrices.f_diagonal(0, 1, 2)?.f_sum_dim_intlist(&[1i64][..], false, Kind::Double)?)
}

/// Rows of a side, `[pairs, 1, 1]`; at least 1, for factors that have lost all.
fn rows_of(pairs: &[Pair], side: usize, like: &Tensor) -> Result<Tensor> {
    let rows: Vec<f64> = pairs.iter().map(|pair| pair[side].rows.max(1) as f64).collect();
    Ok(Tensor::f_from_slice(&rows)?.f_view([-1i64, 1, 1])?.f_to_device(like.device())?)
}

/// `b (1 - b^(t-1)) / (1 - b^t)`: an average from zero over t steps, without its bias.
fn corrected(beta: f64, update: u64) -> f64 {
    let power = |count: u64| beta.powf(count as f64);
    beta * (1.0 - power(update.saturating_sub(1))) / (1.0 - power(update))
}
