//! The CPU's own products and attention against libtorch's operators, for shapes that fill no vector evenly.

use crate::ops::scores::{self, GuidedFactors};
use crate::ops::{self, RotaryTable, causal, low_rank, plain};
use model_spec::Split;
use recipe::LoraPruneForm;
use tch::{Device, Kind, Tensor};

fn random(shape: &[i64], kind: Kind, seed: i64) -> Tensor {
    let count: i64 = shape.iter().product();
    let x = (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898 + seed as f64 * 78.233).sin()
        * 43_758.545_312_3;
    ((&x - x.floor()) * 2.0 - 1.0).view(shape).to_kind(kind)
}

fn assert_same(what: &str, actual: &Tensor, expected: &Tensor) {
    assert_eq!(actual.size(), expected.size(), "{what}");
    let bound = if actual.kind() == Kind::Double { 1e-12 } else { 4e-6 };
    let scale = expected.abs().max().double_value(&[]).max(1e-12);
    let difference = (actual - expected).abs().max().double_value(&[]) / scale;
    assert!(difference <= bound, "{what}: relative difference {difference:.2e}");
}

#[test]
fn thin_products_are_the_general_ones() {
    for kind in [Kind::Float, Kind::Double] {
        for (rows, width, thin) in [(1, 1, 1), (7, 37, 3), (130, 576, 8), (65, 530, 13), (64, 48, 24)] {
            let what = format!("{kind:?} {rows} x {width}, {thin}");
            let m = random(&[thin, width], kind, 1);
            // Columns of a wider activation, as q's of q, k and v.
            let wide = random(&[rows, width + 5], kind, 2);
            let x = wide.narrow(1, 2, width);
            let low = random(&[rows, 2 * thin], kind, 3).narrow(1, thin, thin);
            assert_same(&what, &low_rank::project(&x, &m, 0.5).unwrap(), &(x.matmul(&m.tr()) * 0.5));
            let b = m.tr().contiguous();
            assert_same(&what, &low_rank::project(&x, &b.tr(), 0.5).unwrap(), &(x.matmul(&b) * 0.5));

            let expected = &x + low.matmul(&m);
            let rest = wide.narrow(1, width + 2, 3).copy();
            let mut y = x.shallow_clone();
            low_rank::expand_add(&mut y, &low, &m).unwrap();
            assert_same(&what, &y, &expected);
            assert!(wide.narrow(1, width + 2, 3) == rest, "{what}: columns beside stay");

            let expected = &m + low.tr().matmul(&x);
            let mut sum = m.copy();
            low_rank::outer_add(&mut sum, &low, &x).unwrap();
            assert_same(&what, &sum, &expected);
            let sum = m.tr().contiguous();
            low_rank::outer_add(&mut sum.tr(), &low, &x).unwrap();
            assert_same(&what, &sum.tr(), &expected);
        }
    }
}

#[test]
fn thin_products_give_the_same_bits_on_any_number_of_threads() {
    let (x, m) = (random(&[257, 1031], Kind::Float, 1), random(&[8, 1031], Kind::Float, 2));
    let results = |threads| {
        tch::set_num_threads(threads);
        let low = low_rank::project(&x, &m, 1.0).unwrap();
        let (mut sum, mut y) = (m.copy(), x.copy());
        low_rank::outer_add(&mut sum, &low, &x).unwrap();
        low_rank::expand_add(&mut y, &low, &m).unwrap();
        (low, sum, y)
    };
    let (one, two) = (results(1), results(2));
    assert!(one.0 == two.0 && one.1 == two.1 && one.2 == two.2);
}

#[test]
fn attention_of_views_is_that_of_repeated_heads() {
    for (kind, width) in [(Kind::Float, 64), (Kind::Double, 16)] {
        for (rows, tokens, heads, shared) in [(1, 1, 2, 2), (2, 49, 6, 2), (1, 100, 3, 1), (2, 16, 4, 4)] {
            let what = format!("{kind:?}: {tokens} tokens, {heads} heads on {shared}");
            let joined = random(&[rows * tokens, (heads + 2 * shared) * width], kind, 4);
            let table = RotaryTable::new(&vec![0.3; width as usize / 2], tokens, &joined).unwrap();
            let part = |first: i64, count: i64| joined.narrow(1, first * width, count * width).contiguous();
            let shaped = |x: Tensor, count: i64| x.view([rows, tokens, count, width]);
            let q = shaped(table.rotate(&part(0, heads), heads).unwrap(), heads);
            let k = shaped(table.rotate(&part(heads, shared), shared).unwrap(), shared);
            let v = shaped(part(heads + shared, shared), shared);

            let shape = [rows, tokens, heads, shared, width];
            let views = causal::rotated_parts(&joined, shape, &table).unwrap();
            assert!(causal::takes(&views[0]), "{what}");
            assert_same(&what, &views[0], &q);
            assert_same(&what, &views[1], &k);
            assert_same(&what, &views[2], &v);

            let wide = |x: &Tensor| {
                x.repeat_interleave_self_int(heads / shared, 2, None).transpose(1, 2).contiguous()
            };
            let (q_first, k_first, v_first) = (q.transpose(1, 2).contiguous(), wide(&k), wide(&v));
            let (out, sums) = plain::attention(&q_first, &k_first, &v_first).unwrap();
            let attended = ops::attention(&views[0], &views[1], &views[2]).unwrap();
            assert_same(&what, &attended.out, &out.transpose(1, 2).contiguous());

            let grad = random(&[rows, tokens, heads, width], kind, 5);
            let grad_first = grad.transpose(1, 2).contiguous();
            let (grad_q, grad_k, grad_v) =
                plain::attention_backward(&grad_first, [&q_first, &k_first, &v_first], &out, &sums).unwrap();
            let flat = |x: &Tensor| x.transpose(1, 2).reshape([rows * tokens, heads * width]);
            let summed = |x: &Tensor| {
                let split = x.transpose(1, 2).reshape([rows, tokens, shared, heads / shared, width]);
                let sum = split.sum_dim_intlist(&[3i64][..], false, None::<Kind>);
                sum.reshape([rows * tokens, shared * width])
            };
            let expected = Tensor::cat(
                &[
                    table.rotate_back(&flat(&grad_q).contiguous(), heads).unwrap(),
                    table.rotate_back(&summed(&grad_k).contiguous(), shared).unwrap(),
                    summed(&grad_v),
                ],
                1,
            );
            let inputs = [&views[0], &views[1], &views[2]];
            let actual = causal::unrotated_gradient(&grad, inputs, &attended, &table).unwrap();
            assert_same(&what, &actual, &expected);
        }
    }
}

#[test]
fn guided_sums_are_those_of_the_whole_score_matrix() {
    for (rows, columns, thin) in [(1, 1, 1), (5, 37, 3), (70, 300, 8), (131, 64, 5)] {
        for held in [Kind::Float, Kind::BFloat16] {
            let weight = random(&[rows, columns], held, 1);
            let part = |shape: &[i64], seed| random(shape, Kind::Float, seed);
            let (a, grad_a) = (part(&[thin, columns], 2), part(&[thin, columns], 3));
            let (b, grad_b) = (part(&[rows, thin], 4), part(&[rows, thin], 5));
            let wide = |x: &Tensor| x.to_kind(Kind::Double);
            let guide = wide(&grad_b).matmul(&(wide(&a) - wide(&grad_a))) + wide(&b).matmul(&wide(&grad_a));
            let values = guide * (wide(&weight) + wide(&b).matmul(&wide(&a)) * 1.5);
            let stepped_a = &a - &grad_a;
            let factors = GuidedFactors {
                a: &a,
                stepped_a: &stepped_a,
                grad_a: &grad_a,
                b: &b,
                grad_b: &grad_b,
                scaling: 1.5,
            };
            assert!(scores::takes(&a));
            for (form, scored) in
                [(LoraPruneForm::Code, values.abs()), (LoraPruneForm::Paper, values.square())]
            {
                for (split, dim) in [(Split::Column, 1i64), (Split::Row, 0)] {
                    let expected = scored.sum_dim_intlist(&[dim][..], false, None::<Kind>);
                    for tile_rows in [rows, 3] {
                        let tile = |start, len| Ok(weight.narrow(0, start, len));
                        let sums = scores::guided_sums(&factors, form, split, tile_rows, &tile).unwrap();
                        let scale = expected.abs().max().double_value(&[]);
                        let difference = (&sums - &expected).abs().max().double_value(&[]) / scale;
                        assert!(
                            difference < 1e-6,
                            "{form:?} {split:?} {rows} x {columns} {held:?}: relative difference {difference:.2e}"
                        );
                    }
                }
            }
        }
    }
}
