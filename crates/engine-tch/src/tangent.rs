//! What the gradients of the factors say of the gradient `G` of `W` whichever way `B A` is split into factors: its part in the
//! tangent space of the matrices of rank r at `B A` (with the projections of arXiv:2410.20625).
//!
//! ```text
//! Ghat = G P_A + P_B G - P_B G P_A        P_A, P_B: onto the rows of A and the columns of B
//!      = dB' A + B dA'                    dB' = dB (A A^T)^+     dA' = (B^T B)^+ (dA - B^T dB' A)
//! ```
//!
//! With `B = 0`, as at the start, `dA'` is zero.

use crate::communicator::Communicator;
use crate::factors::{Factor, FactorLayout, is_replicated};
use crate::fault::Result;
use crate::gram::{self, Stack, inverse_root, transposed};
use model_spec::Projection;
use tch::{Kind, Tensor};

/// `dA'` and `dB'`, flat like the factors.
pub(crate) fn gradients(
    layout: &FactorLayout,
    factors: &Tensor,
    gradients: &Tensor,
    communicator: &mut dyn Communicator,
) -> Result<Tensor> {
    let places: Vec<(usize, Projection)> = (0..layout.layer_count())
        .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
        .collect();
    let stacks: Vec<[Stack; 2]> = places
        .iter()
        .map(|&(layer, projection)| {
            let view = |flat, factor| layout.view(flat, layer, projection, factor);
            let split = |factor| !is_replicated(projection, factor);
            let of_b = vec![view(factors, Factor::B)?, view(gradients, Factor::B)?];
            let of_a = vec![view(factors, Factor::A)?.f_tr()?];
            Ok([
                Stack { parts: of_b, split: split(Factor::B) },
                Stack { parts: of_a, split: split(Factor::A) },
            ])
        })
        .collect::<Result<_>>()?;
    let [of_b, of_a] = gram::products(&stacks, [&[(0, 0), (0, 1)], &[(0, 0)]], communicator)?;
    let changed = gradients.f_zeros_like()?;
    let ([b_b, b_db], [a_a]) = (&of_b[..], &of_a[..]) else { return Ok(changed) };
    let pseudo_inverse = |gram: &Tensor| -> Result<Tensor> {
        let root = inverse_root(gram)?;
        Ok(root.f_matmul(&transposed(&root)?)?)
    };
    let (of_a, of_b) = (pseudo_inverse(a_a)?, pseudo_inverse(b_b)?);
    let taken = of_b.f_matmul(b_db)?.f_matmul(&of_a)?;
    for (place, &(layer, projection)) in places.iter().enumerate() {
        let view = |flat, factor| layout.view(flat, layer, projection, factor);
        let small = |all: &Tensor| -> Result<Tensor> {
            Ok(all.f_select(0, place as i64)?.f_to_kind(factors.kind())?)
        };
        view(&changed, Factor::B)?.f_copy_(&view(gradients, Factor::B)?.f_mm(&small(&of_a)?)?)?;
        let of_gradient = small(&of_b)?.f_mm(&view(gradients, Factor::A)?)?;
        let change = of_gradient.f_sub(&small(&taken)?.f_mm(&view(factors, Factor::A)?)?)?;
        view(&changed, Factor::A)?.f_copy_(&change)?;
    }
    debug_assert!(matches!(changed.kind(), Kind::Float | Kind::Double), "the factors are a master copy");
    Ok(changed)
}
