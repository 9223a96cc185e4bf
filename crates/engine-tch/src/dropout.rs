//! Dropout whose mask is a pure function of where an element stands in the unpruned, undivided model, so that it depends
//! neither on the tensor-parallel degree nor on what has been pruned, and need not be stored for the backward pass.

use crate::fault::Result;
use crate::ops;
use tch::{Kind, Tensor};

/// Inputs of low-rank paths that have a mask of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DropoutSite {
    Qkv,
    O,
    GateUp,
    Down,
}

/// The dropout of one optimizer step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    pub(crate) probability: f64,
    pub(crate) seed: u64,
    pub(crate) step: u64,
}

const LOW_32: i64 = 0xFFFF_FFFF;

impl Dropout {
    /// No element is ever dropped.
    pub(crate) fn off() -> Self {
        Self { probability: 0.0, seed: 0, step: 0 }
    }

    /// `x [n, width]` with dropped elements zero and the others divided by the chance to stay. Row `j` is token
    /// `first_token + j` of the step; column `c` is feature `features[c]` of the unpruned input.
    pub(crate) fn apply(
        &self,
        x: &Tensor,
        layer: usize,
        site: DropoutSite,
        first_token: i64,
        features: &Tensor,
    ) -> Result<Tensor> {
        if self.probability == 0.0 {
            return Ok(x.shallow_clone());
        }
        if ops::fused_takes(x) {
            let (key, first_token, threshold) = self.kernel_arguments(layer, site, first_token);
            let scale = 1.0 / (1.0 - self.probability);
            let x = x.f_contiguous()?;
            return ops::fused_dropout(&x, features, key, first_token, threshold, scale);
        }
        let keep = self.keep_mask(layer, site, first_token, x.size()[0], features)?;
        Ok(x.f_mul(&keep.f_to_kind(x.kind())?)?.f_mul_scalar_(1.0 / (1.0 - self.probability))?)
    }

    /// Boolean `[tokens, width]`: `mix(mix(key ^ token) + feature) >= probability * 2^32`.
    pub(crate) fn keep_mask(
        &self,
        layer: usize,
        site: DropoutSite,
        first_token: i64,
        tokens: i64,
        features: &Tensor,
    ) -> Result<Tensor> {
        let key = self.key(layer, site);
        let options = (Kind::Int64, features.device());
        let tokens = Tensor::f_arange_start(first_token, first_token + tokens, options)?;
        let rows = mix(&tokens.f_bitwise_xor(i64::from(key))?)?.f_unsqueeze(1)?;
        let hashed = mix(&rows.f_add(&features.f_mul_scalar(0x9E37_79B1)?)?.f_bitwise_and(LOW_32)?)?;
        Ok(hashed.f_ge(self.threshold())?)
    }

    /// Key, first token and threshold of the kernels' hash.
    pub(crate) fn kernel_arguments(
        &self,
        layer: usize,
        site: DropoutSite,
        first_token: i64,
    ) -> (u32, u32, u64) {
        (self.key(layer, site), first_token as u32, self.threshold() as u64)
    }

    fn threshold(&self) -> i64 {
        (self.probability * (LOW_32 as f64 + 1.0)).round() as i64
    }

    fn key(&self, layer: usize, site: DropoutSite) -> u32 {
        let mut state = self.seed;
        for part in [self.step, layer as u64, site as u64] {
            state = splitmix(state ^ part);
        }
        (state >> 32) as u32
    }
}

/// A 32-bit finaliser (two rounds of xor-shift and multiply) on the low halves of int64 elements.
fn mix(x: &Tensor) -> Result<Tensor> {
    let shifted = |x: &Tensor, bits: i64| -> Result<Tensor> {
        Ok(x.f_bitwise_xor_tensor(&x.f_bitwise_right_shift_tensor_scalar(bits)?)?)
    };
    let x = shifted(x, 16)?.f_mul_scalar(0x7FEB_352D)?.f_bitwise_and(LOW_32)?;
    let x = shifted(&x, 15)?.f_mul_scalar(0x846C_A68Bu32 as i64)?.f_bitwise_and(LOW_32)?;
    shifted(&x, 16)
}

/// One step of SplitMix64: a bijection that spreads every input bit.
pub(crate) fn splitmix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
