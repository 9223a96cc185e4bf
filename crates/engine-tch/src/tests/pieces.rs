//! Every piece with a backward of its own, in f64: against autograd (1e-10 relative) and central differences (1e-6), and
//! every fast form against its plain one.

use crate::communicator::Alone;
use crate::dropout::{Dropout, DropoutSite, splitmix};
use crate::loss::VocabularyHead;
use crate::ops::{self, RotaryTable, plain};
use crate::optimizer::Moments;
use recipe::{AdamW, Optimizer};
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

pub(super) fn random(shape: &[i64], seed: i64) -> Tensor {
    // Values that depend on the seed alone, whatever other tests draw.
    let count: i64 = shape.iter().product();
    let x = (Tensor::arange(count, F64) * 12.9898 + seed as f64 * 78.233).sin() * 43_758.545_312_3;
    ((&x - x.floor()) * 2.0 - 1.0).view(shape)
}

/// Gradients of `sum(f(inputs) * weights)` by autograd.
pub(super) fn autograd(inputs: &[&Tensor], weights: &Tensor, f: &dyn Fn(&[Tensor]) -> Tensor) -> Vec<Tensor> {
    let leaves: Vec<Tensor> =
        inputs.iter().map(|input| input.detach().copy().set_requires_grad(true)).collect();
    let out = f(&leaves);
    Tensor::run_backward(&[(out * weights).sum(Kind::Double)], &leaves, false, false)
}

/// The same by central differences, for a sample of the elements; compares with `gradient`.
pub(super) fn assert_central_differences(
    inputs: &[&Tensor],
    which: usize,
    weights: &Tensor,
    gradient: &Tensor,
    f: &dyn Fn(&[Tensor]) -> Tensor,
) {
    let _no_grad = tch::no_grad_guard();
    let scale = gradient.abs().max().double_value(&[]).max(1e-3);
    let count = inputs[which].numel() as i64;
    for element in (0..count).step_by((count as usize / 17).max(1)) {
        let value = |step: f64| {
            let inputs: Vec<Tensor> = inputs.iter().map(|input| input.copy()).collect();
            let mut moved = inputs[which].view(-1).narrow(0, element, 1);
            let _ = moved.g_add_scalar_(step);
            (f(&inputs) * weights).sum(Kind::Double).double_value(&[])
        };
        let step = 1e-5;
        let numeric = (value(step) - value(-step)) / (2.0 * step);
        let actual = gradient.contiguous().view(-1).double_value(&[element]);
        assert!(
            (numeric - actual).abs() <= 1e-6 * scale,
            "element {element}: {actual} but differences give {numeric}"
        );
    }
}

pub(super) fn assert_same(what: &str, actual: &Tensor, expected: &Tensor, bound: f64) {
    assert_eq!(actual.size(), expected.size(), "{what}");
    let scale = expected.abs().max().double_value(&[]).max(1e-12);
    let difference = (actual - expected).abs().max().double_value(&[]) / scale;
    assert!(difference <= bound, "{what}: relative difference {difference:.2e}");
}

#[test]
fn rms_norm_backward_is_right() {
    let (x, weight, grad) = (random(&[7, 12], 1), random(&[12], 2), random(&[7, 12], 3));
    let eps = 1e-5;
    let f = |inputs: &[Tensor]| plain::rms_norm(&inputs[0], &weight, eps).unwrap().1;
    let (rstd, y) = ops::rms_norm(&x, &weight, eps).unwrap();
    assert_same("y", &y, &f(&[x.copy()]), 1e-12);
    assert_same("y again", &ops::rms_norm_apply(&x, &rstd, &weight).unwrap(), &y, 1e-15);
    let mut actual = Tensor::ones([7, 12], F64);
    ops::rms_norm_backward_add(&mut actual, &grad, &x, &rstd, &weight).unwrap();
    let actual = actual - 1.0;
    assert_same("dx", &actual, &autograd(&[&x], &grad, &f)[0], 1e-10);
    assert_central_differences(&[&x], 0, &grad, &actual, &f);
}

#[test]
fn swiglu_backward_is_right() {
    let (x, grad) = (random(&[5, 2 * 9], 4) * 4.0, random(&[5, 9], 5));
    let f = |inputs: &[Tensor]| plain::swiglu(&inputs[0]).unwrap();
    assert_same("act", &ops::swiglu(&x).unwrap(), &f(&[x.copy()]), 1e-12);
    let actual = ops::swiglu_backward(&grad, &x).unwrap();
    assert_same("dx", &actual, &autograd(&[&x], &grad, &f)[0], 1e-10);
    assert_central_differences(&[&x], 0, &grad, &actual, &f);
}

#[test]
fn rotation_backward_is_right_and_undoes_rotation() {
    let (x, grad) = (random(&[10, 3 * 8], 6), random(&[10, 3 * 8], 7));
    let table = RotaryTable::new(&[1.0, 0.3, 0.05, 0.01], 5, &x).unwrap();
    // Positions repeat every 5 rows; (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
    let f = |inputs: &[Tensor]| {
        let angles =
            Tensor::arange(10, F64).remainder(5.0).unsqueeze(1) * Tensor::from_slice(&[1.0, 0.3, 0.05, 0.01]);
        let (cos, sin) = (angles.cos().unsqueeze(1), angles.sin().unsqueeze(1));
        let halves = inputs[0].view([10, 3, 8]).chunk(2, -1);
        Tensor::cat(&[&halves[0] * &cos - &halves[1] * &sin, &halves[1] * &cos + &halves[0] * &sin], -1)
            .view([10, 24])
    };
    assert_same("rotation", &table.rotate(&x, 3).unwrap(), &f(&[x.copy()]), 1e-12);
    let actual = table.rotate_back(&grad, 3).unwrap();
    assert_same("dx", &actual, &autograd(&[&x], &grad, &f)[0], 1e-10);
    assert_central_differences(&[&x], 0, &grad, &actual, &f);
    assert_same("inverse", &table.rotate_back(&f(&[x.copy()]), 3).unwrap(), &x, 1e-12);
}

#[test]
fn fused_kernels_are_their_compositions_in_f32_too() {
    let f32 = |x: Tensor| x.to_kind(Kind::Float);
    // 37 and 1030 columns: not multiples of any vector's length.
    for width in [37, 1030] {
        let (x, weight, grad) =
            (f32(random(&[9, width], 1) * 9.0), f32(random(&[width], 2)), f32(random(&[9, width], 3)));
        let close = |what: &str, actual: &Tensor, expected: &Tensor| {
            assert_same(what, &actual.to_kind(Kind::Double), &expected.to_kind(Kind::Double), 2e-6);
        };
        let ((rstd, y), (plain_rstd, plain_y)) =
            (ops::rms_norm(&x, &weight, 1e-5).unwrap(), plain::rms_norm(&x, &weight, 1e-5).unwrap());
        close("rstd", &rstd, &plain_rstd);
        close("norm", &y, &plain_y);
        let (mut ours, mut theirs) = (x.zeros_like(), x.zeros_like());
        ops::rms_norm_backward_add(&mut ours, &grad, &x, &rstd, &weight).unwrap();
        plain::rms_norm_backward_add(&mut theirs, &grad, &x, &rstd, &weight).unwrap();
        close("norm backward", &ours, &theirs);
        let gate_up = f32(random(&[9, 2 * width], 4) * 30.0);
        close("swiglu", &ops::swiglu(&gate_up).unwrap(), &plain::swiglu(&gate_up).unwrap());
        let backward = (ops::swiglu_backward(&grad, &gate_up), plain::swiglu_backward(&grad, &gate_up));
        close("swiglu backward", &backward.0.unwrap(), &backward.1.unwrap());
        let highest = ops::row_max(&x).unwrap();
        assert!(highest == x.amax([1i64], true));
        let (mut ours, mut theirs) = (x.copy(), x.copy());
        let (sum, plain_sum) =
            (ops::exp_sum(&mut ours, &highest).unwrap(), plain::exp_sum(&mut theirs, &highest).unwrap());
        close("exp", &ours, &theirs);
        close("sum", &sum, &plain_sum);
        ops::scale_rows(&mut ours, &sum, 0.3).unwrap();
        plain::scale_rows(&mut theirs, &plain_sum, 0.3).unwrap();
        close("scaled", &ours, &theirs);
    }
}

#[test]
fn a_number_that_is_not_one_survives_the_kernels() {
    let x = Tensor::zeros([3, 40], (Kind::Float, Device::Cpu));
    let _ = x.get(1).get(7).fill_(f64::NAN);
    let weight = Tensor::ones([40], (Kind::Float, Device::Cpu));
    let bad = |x: &Tensor| {
        x.get(1).isnan().any().int64_value(&[]) == 1 && x.get(0).isnan().any().int64_value(&[]) == 0
    };
    assert!(bad(&ops::rms_norm(&x, &weight, 1e-5).unwrap().1));
    assert!(bad(&ops::swiglu(&x).unwrap()));
    let mut logits = x.copy();
    let highest = ops::row_max(&x).unwrap();
    assert!(bad(&ops::exp_sum(&mut logits, &highest).unwrap()));
}

#[test]
fn attention_and_its_backward_are_right_with_shared_heads() {
    for (heads, kv_heads) in [(4, 4), (6, 2), (3, 1)] {
        let q = random(&[2, 7, heads, 8], 8);
        let k = random(&[2, 7, kv_heads, 8], 9);
        let v = random(&[2, 7, kv_heads, 8], 10);
        let grad = random(&[2, 7, heads, 8], 11);
        // softmax(q k^T / sqrt(d)) v with a causal mask, written out.
        let plain = |inputs: &[Tensor]| {
            let wide = |x: &Tensor| x.repeat_interleave_self_int(heads / kv_heads, 2, None).transpose(1, 2);
            let (q, k, v) = (inputs[0].transpose(1, 2), wide(&inputs[1]), wide(&inputs[2]));
            let later = Tensor::ones([7, 7], F64).triu(1).to_kind(Kind::Bool);
            let scores = (q.matmul(&k.transpose(2, 3)) / 8f64.sqrt()).masked_fill(&later, f64::NEG_INFINITY);
            scores.softmax(-1, None).matmul(&v).transpose(1, 2)
        };
        let attended = ops::attention(&q, &k, &v).unwrap();
        let inputs = [&q, &k, &v];
        assert_same("out", &attended.out, &plain(&inputs.map(Tensor::copy)), 1e-10);
        let (dq, dk, dv) = ops::attention_backward(&grad, &q, &k, &v, &attended).unwrap();
        let expected = autograd(&inputs, &grad, &plain);
        for (which, actual) in [dq, dk, dv].iter().enumerate() {
            assert_same("gradient", actual, &expected[which], 1e-10);
            assert_central_differences(&inputs, which, &grad, actual, &plain);
        }
    }
}

#[test]
fn chunked_cross_entropy_is_the_plain_one() {
    let (hidden, weight) = (random(&[11, 6], 12), random(&[19, 6], 13));
    let targets = Tensor::from_slice(&[0i64, 18, 3, 7, 7, 1, 2, 9, 17, 4, 5]);
    let plain = |inputs: &[Tensor]| {
        let log_p = inputs[0].matmul(&weight.tr()).log_softmax(-1, None);
        -log_p.gather(1, &targets.unsqueeze(1), false).sum(Kind::Double)
    };
    let scale = Tensor::from(0.25);
    // All positions at once, four at a time with a shorter rest, and one at a time.
    for chunk_elements in [1 << 20, 4 * 19, 1] {
        let head = VocabularyHead { weight: &weight, rows: 0..19, chunk_elements };
        let (nll, grad) =
            head.negative_log_likelihood(&hidden, &targets, None, Some(0.25), &mut Alone).unwrap();
        assert!((nll - plain(&[hidden.copy()]).double_value(&[])).abs() < 1e-10);
        let grad = grad.unwrap();
        assert_same("dx", &grad, &autograd(&[&hidden], &scale, &plain)[0], 1e-10);
        assert_central_differences(&[&hidden], 0, &scale, &grad, &plain);
    }
}

#[test]
fn adamw_follows_its_formula() {
    let adamw = AdamW { beta1: 0.8, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };
    let (mut p, g1, g2) = (random(&[33], 14), random(&[33], 15), random(&[33], 16));
    let mut expected = p.copy();
    let mut moments = Moments::zeros(&Optimizer::AdamW(adamw), &p, 1, 1).unwrap();
    let (mut m, mut v) = (p.zeros_like(), p.zeros_like());
    for (t, g) in [(1, &g1), (2, &g2)] {
        moments.adamw_step(&mut p, g, 0.01, &adamw).unwrap();
        m = m * 0.8 + g * 0.2;
        v = v * 0.95 + g.square() * 0.05;
        let corrected = (&v / (1.0 - 0.95f64.powi(t))).sqrt() + 1e-6;
        expected = &expected * (1.0 - 0.01 * 0.1) - (&m / (1.0 - 0.8f64.powi(t))) / corrected * 0.01;
    }
    assert_same("parameters", &p, &expected, 1e-12);
}

#[test]
fn dropout_masks_are_the_scalar_hash_and_keep_the_mean() {
    let dropout = Dropout { probability: 0.25, seed: 9, step: 4 };
    let features = Tensor::from_slice(&(0..64).map(|i| 3 * i + 1).collect::<Vec<i64>>());
    let x = Tensor::ones([400, 64], F64);
    let dropped = dropout.apply(&x, 2, DropoutSite::Down, 100, &features).unwrap();
    let mix = |x: u32| {
        let x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
        let x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^ (x >> 16)
    };
    let mut state = 9;
    for part in [4, 2, DropoutSite::Down as u64] {
        state = splitmix(state ^ part);
    }
    let key = (state >> 32) as u32;
    for (row, column) in [(0, 0), (17, 5), (399, 63), (200, 31)] {
        let feature = (3 * column + 1) as u32;
        let hash = mix(mix(key ^ (100 + row as u32)).wrapping_add(feature.wrapping_mul(0x9E37_79B1)));
        let expected = if f64::from(hash) >= 0.25 * 4_294_967_296.0 { 4.0 / 3.0 } else { 0.0 };
        assert!((dropped.double_value(&[row, column]) - expected).abs() < 1e-12);
    }
    let keep = dropout.keep_mask(2, DropoutSite::Down, 100, 400, &features).unwrap();
    assert!(keep == dropped.gt(0.5), "the kernel and its composition drop the same");
    let mean = dropped.mean(Kind::Double).double_value(&[]);
    assert!((mean - 1.0).abs() < 0.02, "mean {mean}");
    let part =
        dropout.apply(&x.narrow(1, 0, 32), 2, DropoutSite::Down, 100, &features.narrow(0, 0, 32)).unwrap();
    assert!(part == dropped.narrow(1, 0, 32), "a rank's features get the mask they have in the whole");
}
