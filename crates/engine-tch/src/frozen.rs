//! Frozen weights as they are held: dense, or quantised and widened where a product needs them.
//!
//! What a quantised weight stands for depends neither on the tensor-parallel degree nor on what has been pruned, so ranks
//! agree exactly and slicing is exact:
//!
//! - `int8`: one scale for each output row, from the *whole* row of the unpruned model, also where a rank holds some of
//!   its columns. `w = q absmax / 127`.
//! - `nf4` (QLoRA, arXiv:2305.14314): blocks of 64 along the dimension that is neither split nor pruned, which is the
//!   input of q, k, v, gate and up, and the *output* of o and down. `w = code[q] absmax`. Blocks along o's and down's input, as
//!   bitsandbytes has them, would be torn by every mask.
//!
//! Widening multiplies in f32 and rounds once to the wanted format.

use crate::cuda::compiler::{Kernels, elementwise};
use crate::fault::{Fault, Result};
use crate::ops::on_cuda;
use crate::source::select;
use model_spec::Split;
use recipe::Storage;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// What frozen weights are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrozenFormat {
    Dense(Kind),
    Int8,
    Nf4,
}

impl FrozenFormat {
    pub(crate) fn of(storage: Storage) -> Self {
        match storage {
            Storage::F32 => Self::Dense(Kind::Float),
            Storage::F64 => Self::Dense(Kind::Double),
            Storage::Bf16 => Self::Dense(Kind::BFloat16),
            Storage::Int8 => Self::Int8,
            Storage::Nf4 => Self::Nf4,
        }
    }

    /// What embedding and head are held in: they are not quantised.
    pub(crate) fn of_vocabulary(self, compute: Kind) -> Kind {
        match self {
            Self::Dense(kind) => kind,
            Self::Int8 | Self::Nf4 => compute,
        }
    }
}

/// Weights that share a scale in `nf4`.
pub(crate) const NF4_BLOCK: i64 = 64;

/// The 4-bit NormalFloat values (arXiv:2305.14314, appendix E): quantiles of a normal distribution, scaled to -1 … 1.
pub(crate) const NF4_CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Weights widened at a time: what the temporaries hold.
const CPU_TILE: i64 = 1 << 18;
const DEVICE_TILE: i64 = 1 << 24;

/// A frozen matrix `[rows, columns]`.
#[derive(Debug)]
pub(crate) enum FrozenWeight {
    Dense(Tensor),
    Int8(Int8),
    Nf4(Nf4),
}

/// `q` int8 `[rows, columns]`, `scale` f32 `[rows, 1]`.
#[derive(Debug)]
pub(crate) struct Int8 {
    q: Tensor,
    scale: Tensor,
}

/// Lines of weights, cut into blocks; a line is a row, or a column where blocks lie along the output.
#[derive(Debug)]
pub(crate) struct Nf4 {
    /// Two codes a byte, the first in the high half: u8 `[lines, blocks * 32]`; the last block of a line may be padded.
    codes: Tensor,
    /// f32 `[lines, blocks]`
    scale: Tensor,
    line_len: i64,
    lines_are_columns: bool,
    /// f32 `[256, 2]`: the two values of a byte.
    table: Tensor,
}

impl FrozenWeight {
    /// The part `features` (along the split dimension) of `whole`, a projection of the unpruned model, held as `format`.
    pub(crate) fn quantise(
        whole: &Tensor,
        split: Split,
        features: &[i64],
        format: FrozenFormat,
        device: Device,
    ) -> Result<Self> {
        let dim = match split {
            Split::Column => 0,
            Split::Row => 1,
        };
        let place = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_to_device(device)?) };
        match format {
            FrozenFormat::Dense(kind) => {
                Ok(Self::Dense(place(&select(whole, dim, features)?)?.f_to_kind(kind)?.f_contiguous()?))
            }
            FrozenFormat::Int8 => match split {
                Split::Column => Int8::new(&place(&select(whole, dim, features)?)?, None),
                Split::Row => {
                    let whole = place(whole)?;
                    let largest = largest_of_rows(&whole.f_to_kind(Kind::Float)?)?;
                    Int8::new(&select(&whole, dim, features)?, Some(largest))
                }
            },
            FrozenFormat::Nf4 => {
                let part = place(&select(whole, dim, features)?)?;
                match split {
                    Split::Column => Nf4::new(&part, false),
                    Split::Row => Nf4::new(&part.f_tr()?, true),
                }
            }
        }
    }

    /// Rows and columns.
    pub(crate) fn size2(&self) -> Result<(i64, i64)> {
        match self {
            Self::Dense(weight) => Ok(weight.size2()?),
            Self::Int8(weight) => Ok(weight.q.size2()?),
            Self::Nf4(weight) => {
                let lines = weight.codes.size()[0];
                Ok(if weight.lines_are_columns { (weight.line_len, lines) } else { (lines, weight.line_len) })
            }
        }
    }

    pub(crate) fn device(&self) -> Device {
        match self {
            Self::Dense(weight) => weight.device(),
            Self::Int8(weight) => weight.q.device(),
            Self::Nf4(weight) => weight.codes.device(),
        }
    }

    /// The matrix in the format `kind`: itself where it is held so. It may be a transposed view.
    pub(crate) fn dense(&self, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.f_to_kind(kind)?),
            Self::Int8(weight) => weight.widen(0, weight.q.size()[0], kind),
            Self::Nf4(weight) => {
                let lines =
                    weight.widen(&weight.codes, &weight.scale, kind)?.f_narrow(1, 0, weight.line_len)?;
                Ok(if weight.lines_are_columns { lines.f_tr()? } else { lines })
            }
        }
    }

    /// `len` rows from row `start` on, in the format `kind`.
    pub(crate) fn dense_rows(&self, start: i64, len: i64, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.f_narrow(0, start, len)?.f_to_kind(kind)?),
            Self::Int8(weight) => weight.widen(start, len, kind),
            Self::Nf4(weight) if weight.lines_are_columns => {
                let first = start / NF4_BLOCK;
                let blocks = (start + len + NF4_BLOCK - 1) / NF4_BLOCK - first;
                let codes = weight.codes.f_narrow(1, first * NF4_BLOCK / 2, blocks * NF4_BLOCK / 2)?;
                let lines = weight.widen(&codes, &weight.scale.f_narrow(1, first, blocks)?, kind)?;
                Ok(lines.f_narrow(1, start - first * NF4_BLOCK, len)?.f_tr()?.f_contiguous()?)
            }
            Self::Nf4(weight) => {
                let (codes, scale) =
                    (weight.codes.f_narrow(0, start, len)?, weight.scale.f_narrow(0, start, len)?);
                Ok(weight.widen(&codes, &scale, kind)?.f_narrow(1, 0, weight.line_len)?)
            }
        }
    }

    /// The given features along the split dimension, in storage of their own. Quantised weights stay as they are.
    pub(crate) fn sliced(&self, split: Split, features: &[i64]) -> Result<Self> {
        let owned = |tensor: &Tensor, dim| -> Result<Tensor> {
            let part = select(tensor, dim, features)?.f_contiguous()?;
            Ok(if part.data_ptr() == tensor.data_ptr() { part.f_detach_copy()? } else { part })
        };
        let dim = match split {
            Split::Column => 0,
            Split::Row => 1,
        };
        Ok(match self {
            Self::Dense(weight) => Self::Dense(owned(weight, dim)?),
            Self::Int8(weight) => Self::Int8(Int8 {
                q: owned(&weight.q, dim)?,
                scale: match split {
                    Split::Column => owned(&weight.scale, 0)?,
                    Split::Row => weight.scale.shallow_clone(),
                },
            }),
            Self::Nf4(weight) if weight.lines_are_columns == (split == Split::Row) => Self::Nf4(Nf4 {
                codes: owned(&weight.codes, 0)?,
                scale: owned(&weight.scale, 0)?,
                line_len: weight.line_len,
                lines_are_columns: weight.lines_are_columns,
                table: weight.table.shallow_clone(),
            }),
            Self::Nf4(_) => return Err(Fault::Refused("an nf4 weight is not cut across its blocks".into())),
        })
    }

    /// [`Self::dense`] of a quantised weight by the kernels of a device.
    #[cfg(test)]
    pub(crate) fn widened_by(&self, on: &dyn crate::cuda::launch::Launcher, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.f_to_kind(kind)?),
            Self::Int8(weight) => on_cuda::widen_int8(on, &weight.q, &weight.scale, kind),
            Self::Nf4(weight) => {
                let lines = on_cuda::widen_nf4(on, &weight.codes, &weight.scale, &weight.table, kind)?;
                let lines = lines.f_narrow(1, 0, weight.line_len)?;
                Ok(if weight.lines_are_columns { lines.f_tr()? } else { lines })
            }
        }
    }

    /// Matrices of one format and width below each other.
    pub(crate) fn stack(parts: Vec<Self>) -> Result<Self> {
        let mixed = || Fault::Refused("weights of different formats cannot be one matrix".into());
        let mut dense = Vec::new();
        let mut int8 = Vec::new();
        let mut nf4 = Vec::new();
        let count = parts.len();
        for part in parts {
            match part {
                Self::Dense(weight) => dense.push(weight),
                Self::Int8(weight) => int8.push(weight),
                Self::Nf4(weight) => nf4.push(weight),
            }
        }
        if !dense.is_empty() && dense.len() == count {
            return Ok(Self::Dense(Tensor::f_cat(&dense, 0)?));
        }
        if !int8.is_empty() && int8.len() == count {
            let q: Vec<&Tensor> = int8.iter().map(|weight| &weight.q).collect();
            let scale: Vec<&Tensor> = int8.iter().map(|weight| &weight.scale).collect();
            return Ok(Self::Int8(Int8 { q: Tensor::f_cat(&q, 0)?, scale: Tensor::f_cat(&scale, 0)? }));
        }
        match nf4.first() {
            Some(first) if nf4.len() == count && nf4.iter().all(|weight| !weight.lines_are_columns) => {
                let codes: Vec<&Tensor> = nf4.iter().map(|weight| &weight.codes).collect();
                let scale: Vec<&Tensor> = nf4.iter().map(|weight| &weight.scale).collect();
                Ok(Self::Nf4(Nf4 {
                    codes: Tensor::f_cat(&codes, 0)?,
                    scale: Tensor::f_cat(&scale, 0)?,
                    line_len: first.line_len,
                    lines_are_columns: false,
                    table: first.table.shallow_clone(),
                }))
            }
            Some(_) | None => Err(mixed()),
        }
    }

    /// Bytes held, scales included.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> u64 {
        let of = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        match self {
            Self::Dense(weight) => of(weight),
            Self::Int8(weight) => of(&weight.q) + of(&weight.scale),
            Self::Nf4(weight) => of(&weight.codes) + of(&weight.scale),
        }
    }

    /// Whether every weight is a finite number.
    pub(crate) fn is_finite(&self) -> Result<bool> {
        let decides = match self {
            Self::Dense(weight) => weight,
            Self::Int8(weight) => &weight.scale,
            Self::Nf4(weight) => &weight.scale,
        };
        Ok(decides.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
    }
}

/// `[rows, 1]`
fn largest_of_rows(rows: &Tensor) -> Result<Tensor> {
    if rows.size()[1] == 0 {
        return Ok(Tensor::f_zeros([rows.size()[0], 1], (rows.kind(), rows.device()))?);
    }
    Ok(rows.f_abs()?.f_amax([1i64], true)?)
}

impl Int8 {
    /// `largest` `[rows, 1]` is the largest magnitude of each whole row, where `part` is not whole rows.
    #[allow(clippy::new_ret_no_self, reason = "always wanted as a frozen weight")]
    fn new(part: &Tensor, largest: Option<Tensor>) -> Result<FrozenWeight> {
        let part = part.f_to_kind(Kind::Float)?;
        let largest = match largest {
            Some(largest) => largest,
            None => largest_of_rows(&part)?,
        };
        let scale = largest.f_div_scalar(127.0)?;
        // A row of zeros has scale 0 and any divisor will do.
        let divisor = scale.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
        let q =
            part.f_div(&divisor)?.f_round()?.f_clamp(-127.0, 127.0)?.f_to_kind(Kind::Int8)?.f_contiguous()?;
        Ok(FrozenWeight::Int8(Self { q, scale }))
    }

    fn widen(&self, start: i64, len: i64, kind: Kind) -> Result<Tensor> {
        if let Some(on) = kernels_for(&self.q, kind) {
            let (q, scale) = (self.q.f_narrow(0, start, len)?, self.scale.f_narrow(0, start, len)?);
            return on_cuda::widen_int8(on.as_ref(), &q, &scale, kind);
        }
        let columns = self.q.size()[1];
        tiled(len, columns, kind, self.q.device(), &|tile, count| {
            let q = self.q.f_narrow(0, start + tile, count)?.f_to_kind(Kind::Float)?;
            Ok(q.f_mul(&self.scale.f_narrow(0, start + tile, count)?)?)
        })
    }
}

impl Nf4 {
    /// Cuts every line of `lines` `[lines, line_len]` into blocks.
    #[allow(clippy::new_ret_no_self, reason = "always wanted as a frozen weight")]
    fn new(lines: &Tensor, lines_are_columns: bool) -> Result<FrozenWeight> {
        let device = lines.device();
        let (count, line_len) = lines.size2()?;
        let blocks = (line_len + NF4_BLOCK - 1) / NF4_BLOCK;
        let padded = lines.f_to_kind(Kind::Float)?.f_constant_pad_nd([0, blocks * NF4_BLOCK - line_len])?;
        let in_blocks = padded.f_contiguous()?.f_view([count * blocks, NF4_BLOCK])?;
        let largest = largest_of_rows(&in_blocks)?;
        let normal = in_blocks.f_div(&largest.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?;
        let middles: Vec<f32> = NF4_CODE.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        let middles = Tensor::f_from_slice(&middles)?.f_to_device(device)?;
        let nearest = normal.f_bucketize(&middles, true, false)?.f_view([-1, 2])?;
        let (high, low) = (nearest.f_select(1, 0)?, nearest.f_select(1, 1)?);
        let bytes = high.f_mul_scalar(16)?.f_add(&low)?.f_to_kind(Kind::Uint8)?;
        let pairs: Vec<f32> =
            (0..256usize).flat_map(|byte| [NF4_CODE[byte >> 4], NF4_CODE[byte & 15]]).collect();
        Ok(FrozenWeight::Nf4(Self {
            codes: bytes.f_view([count, blocks * NF4_BLOCK / 2])?,
            scale: largest.f_view([count, blocks])?,
            line_len,
            lines_are_columns,
            table: Tensor::f_from_slice(&pairs)?.f_view([256, 2])?.f_to_device(device)?,
        }))
    }

    /// Lines of whole blocks: `codes` `[lines, blocks * 32]`, `scale` `[lines, blocks]`.
    fn widen(&self, codes: &Tensor, scale: &Tensor, kind: Kind) -> Result<Tensor> {
        if let Some(on) = kernels_for(codes, kind) {
            return on_cuda::widen_nf4(on.as_ref(), codes, scale, &self.table, kind);
        }
        let (lines, bytes) = codes.size2()?;
        tiled(lines, bytes * 2, kind, codes.device(), &|tile, count| {
            let codes = codes.f_narrow(0, tile, count)?.f_to_kind(Kind::Int)?.f_reshape([-1i64])?;
            let values = self.table.f_index_select(0, &codes)?.f_view([-1, NF4_BLOCK])?;
            let scale = scale.f_narrow(0, tile, count)?.f_reshape([-1, 1])?;
            Ok(values.f_mul(&scale)?.f_view([count, bytes * 2])?)
        })
    }
}

fn kernels_for(codes: &Tensor, kind: Kind) -> Option<Arc<Kernels>> {
    matches!(kind, Kind::Float | Kind::BFloat16).then(|| elementwise(codes.device())).flatten()
}

/// A new `[rows, columns]` of `kind` from f32 tiles `make(first row, rows)`.
fn tiled(
    rows: i64,
    columns: i64,
    kind: Kind,
    device: Device,
    make: &dyn Fn(i64, i64) -> Result<Tensor>,
) -> Result<Tensor> {
    let out = Tensor::f_empty([rows, columns], (kind, device))?;
    if columns == 0 {
        return Ok(out);
    }
    let elements = if device == Device::Cpu { CPU_TILE } else { DEVICE_TILE };
    let per_tile = (elements / columns).max(1);
    let mut start = 0;
    while start < rows {
        let count = per_tile.min(rows - start);
        out.f_narrow(0, start, count)?.f_copy_(&make(start, count)?)?;
        start += count;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
    const FORMATS: [FrozenFormat; 2] = [FrozenFormat::Int8, FrozenFormat::Nf4];

    /// Values that look normal, some rows larger, one row and one column of zeros.
    fn weight(rows: i64, columns: i64) -> Tensor {
        let count = rows * columns;
        let uniform = ((Tensor::arange(count, F32) * 0.618_034 + 0.123).frac() * 0.998 + 0.001) * 2.0 - 1.0;
        let weight = uniform.erfinv().view([rows, columns]);
        let weight = weight * (Tensor::arange(rows, F32).remainder(3.0) + 0.5).unsqueeze(1);
        let _ = weight.narrow(0, 2, 1).zero_();
        let _ = weight.narrow(1, 1, 1).zero_();
        weight
    }

    fn held(whole: &Tensor, split: Split, features: &[i64], format: FrozenFormat) -> FrozenWeight {
        FrozenWeight::quantise(whole, split, features, format, Device::Cpu).unwrap()
    }

    fn all(count: i64) -> Vec<i64> {
        (0..count).collect()
    }

    fn size_along(whole: &Tensor, split: Split) -> i64 {
        whole.size()[usize::from(split == Split::Row)]
    }

    #[test]
    fn the_nf4_code_is_the_published_one_and_made_of_normal_quantiles() {
        // The values that the paper prints, to its digits.
        let published = [
            -1.0,
            -0.696_192_800_998_687_7,
            -0.525_073_051_452_636_7,
            -0.394_917_488_098_144_53,
            -0.284_441_381_692_886_35,
            -0.184_773_430_228_233_34,
            -0.091_050_036_251_544_95,
            0.0,
            0.079_580_299_556_255_34,
            0.160_930_201_411_247_25,
            0.246_112_301_945_686_34,
            0.337_915_241_718_292_24,
            0.440_709_829_330_444_34,
            0.562_617_003_917_694_1,
            0.722_956_836_223_602_3,
            1.0,
        ];
        for (ours, published) in NF4_CODE.iter().zip(published) {
            assert!((f64::from(*ours) - published).abs() < 6e-8, "{ours} {published}");
        }
        // Eight positive and seven negative quantiles, evenly spaced in probability from `offset` to one half.
        let offset = (1.0 - 1.0 / 32.0 + 1.0 - 1.0 / 30.0) / 2.0;
        let quantiles = |count: i64| {
            let p = Tensor::linspace(offset, 0.5, count, (Kind::Double, Device::Cpu)).narrow(0, 0, count - 1);
            crate::importance::to_f64(&p.special_ndtri()).unwrap()
        };
        let largest = quantiles(9)[0];
        let mut made: Vec<f64> = quantiles(9).iter().map(|value| value / largest).collect();
        made.extend(quantiles(8).iter().map(|value| -value / largest));
        made.push(0.0);
        made.sort_by(f64::total_cmp);
        for (made, ours) in made.iter().zip(NF4_CODE) {
            assert!((made - f64::from(ours)).abs() < 2e-6, "{made} {ours}");
        }
    }

    #[test]
    fn a_quantised_weight_is_within_half_a_step_of_the_true_one() {
        for split in [Split::Column, Split::Row] {
            // 100 and 70 leave a last block that is not full.
            for (rows, columns) in [(100, 70), (64, 128), (5, 3)] {
                let whole = weight(rows, columns);
                let int8 = held(&whole, split, &all(size_along(&whole, split)), FrozenFormat::Int8);
                let error = (int8.dense(Kind::Float).unwrap() - &whole).abs();
                let step = whole.abs().amax([1i64], true) / 127.0;
                assert_eq!((error - step * 0.500_01).clamp_min(0.0).sum(Kind::Float).double_value(&[]), 0.0);

                let nf4 = held(&whole, split, &all(size_along(&whole, split)), FrozenFormat::Nf4);
                let dense = nf4.dense(Kind::Float).unwrap();
                assert_eq!(dense.size(), [rows, columns]);
                // The widest gap of the code is 0.304, between -1 and -0.696.
                let (error, lines) = match split {
                    Split::Column => ((&dense - &whole).abs(), whole.shallow_clone()),
                    Split::Row => ((&dense - &whole).abs().tr(), whole.tr()),
                };
                for block in 0..(lines.size()[1] + 63) / 64 {
                    let len = (lines.size()[1] - block * 64).min(64);
                    let largest = lines.narrow(1, block * 64, len).abs().amax([1i64], true);
                    let over = error.narrow(1, block * 64, len) - largest * 0.1521;
                    assert!(over.max().double_value(&[]) <= 0.0, "{split:?} {rows}x{columns} block {block}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_largest_values_stay_themselves() {
        for format in FORMATS {
            for split in [Split::Column, Split::Row] {
                let whole = weight(70, 130);
                let dense =
                    held(&whole, split, &all(size_along(&whole, split)), format).dense(Kind::Float).unwrap();
                assert_eq!(dense.narrow(0, 2, 1).abs().sum(Kind::Float).double_value(&[]), 0.0);
                assert_eq!(dense.narrow(1, 1, 1).abs().sum(Kind::Float).double_value(&[]), 0.0);
                let (largest, kept) =
                    (whole.abs().max().double_value(&[]), dense.abs().max().double_value(&[]));
                assert!((largest - kept).abs() <= 1e-6 * largest, "{format:?} {split:?}: {largest} {kept}");
            }
        }
    }

    #[test]
    fn a_part_stands_for_the_same_values_as_the_whole() {
        for format in [FrozenFormat::Dense(Kind::BFloat16), FrozenFormat::Int8, FrozenFormat::Nf4] {
            for split in [Split::Column, Split::Row] {
                let whole = weight(70, 130);
                let dim = i64::from(split == Split::Row);
                let some = [0, 3, 4, 9, 31, 66];
                let expected = held(&whole, split, &all(size_along(&whole, split)), format)
                    .dense(Kind::Float)
                    .unwrap()
                    .index_select(dim, &Tensor::from_slice(&some));
                // What a rank of several quantises, and what live shrink slices.
                let loaded = held(&whole, split, &some, format);
                let sliced = held(&whole, split, &all(size_along(&whole, split)), format)
                    .sliced(split, &some)
                    .unwrap();
                for part in [loaded, sliced] {
                    assert_eq!(part.size2().unwrap(), expected.size2().unwrap());
                    let dense = part.dense(Kind::Float).unwrap();
                    assert_eq!(dense, expected, "{format:?} {split:?}");
                    let (rows, _) = part.size2().unwrap();
                    for (start, len) in [(0, rows), (1, 3), (rows - 2, 2), (3, 0)] {
                        let tile = part.dense_rows(start, len, Kind::Float).unwrap();
                        assert_eq!(
                            tile,
                            expected.narrow(0, start, len),
                            "{format:?} {split:?} {start}+{len}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn matrices_below_each_other_keep_their_values() {
        for format in [FrozenFormat::Dense(Kind::Float), FrozenFormat::Int8, FrozenFormat::Nf4] {
            let (one, two) = (weight(9, 70), weight(12, 70) * 3.0);
            let parts: Vec<FrozenWeight> = [&one, &two]
                .iter()
                .map(|whole| held(whole, Split::Column, &all(whole.size()[0]), format))
                .collect();
            let expected: Vec<Tensor> = parts.iter().map(|part| part.dense(Kind::Float).unwrap()).collect();
            let stacked = FrozenWeight::stack(parts).unwrap();
            assert_eq!(stacked.dense(Kind::Float).unwrap(), Tensor::cat(&expected, 0));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let whole = weight(8, 70);
        let nf4 = held(&whole, Split::Column, &all(8), FrozenFormat::Nf4);
        assert!(nf4.sliced(Split::Row, &[0]).is_err());
        let int8 = held(&whole, Split::Column, &all(8), FrozenFormat::Int8);
        assert!(FrozenWeight::stack(vec![nf4, int8]).is_err());
        assert!(FrozenWeight::stack(Vec::new()).is_err());
    }

    #[test]
    fn a_weight_that_is_no_number_is_found_in_every_format() {
        for format in [FrozenFormat::Dense(Kind::Float), FrozenFormat::Int8, FrozenFormat::Nf4] {
            for bad in [f64::NAN, f64::INFINITY] {
                let whole = weight(8, 70);
                assert!(held(&whole, Split::Row, &all(70), format).is_finite().unwrap());
                let _ = whole.narrow(0, 3, 1).narrow(1, 5, 1).fill_(bad);
                assert!(!held(&whole, Split::Row, &all(70), format).is_finite().unwrap(), "{format:?} {bad}");
            }
        }
    }

    #[test]
    fn rounding_to_a_narrower_format_happens_once() {
        let whole = weight(16, 64);
        for format in FORMATS {
            let part = held(&whole, Split::Column, &all(16), format);
            let (narrow, wide) = (part.dense(Kind::BFloat16).unwrap(), part.dense(Kind::Float).unwrap());
            assert_eq!(narrow, wide.to_kind(Kind::BFloat16));
            assert_eq!(part.dense(Kind::Double).unwrap(), wide.to_kind(Kind::Double));
        }
    }
}
