//! LoRA-RITE on one pair of factors of a least-squares problem `L = |X Y^T - T|^2 / 2`: golden losses, the plain form by QR,
//! and the laws that it was made for. Whole models are in `ranks` and `resume`.

use crate::communicator::Alone;
use crate::optimizer::lora_rite::{PairMoments, Rule, Side, Taken, step};
use crate::tests::pieces::random;
use recipe::LoraRite;
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
/// Without what is ours: the method as published.
const PLAIN: LoraRite = LoraRite {
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-6,
    weight_decay: 0.0,
    escaped_mass: Some(false),
    guard: false,
    max_rms: None,
};

/// A pair of factors and what is remembered of it.
struct Problem {
    x: Tensor,
    y: Tensor,
    target: Tensor,
    moments: PairMoments,
    flats: [[Tensor; 2]; 2],
    updates: u64,
}

impl Problem {
    fn new(x: Tensor, y: Tensor, target: Tensor) -> Self {
        let lora_rank = x.size()[1];
        let like = |tensor: &Tensor| [tensor.zeros_like(), tensor.zeros_like()];
        Self {
            moments: PairMoments::zeros(1, lora_rank, Device::Cpu).unwrap(),
            flats: [like(&x), like(&y)],
            x,
            y,
            target,
            updates: 0,
        }
    }

    fn random(m: i64, n: i64, lora_rank: i64) -> Self {
        Self::new(random(&[m, lora_rank], 1), random(&[n, lora_rank], 2), random(&[m, n], 3) * 2.0)
    }

    fn product(&self) -> Tensor {
        self.x.mm(&self.y.tr())
    }

    fn loss(&self) -> f64 {
        ((self.product() - &self.target).square().sum(Kind::Double) * 0.5).double_value(&[])
    }

    fn gradients(&self) -> [Tensor; 2] {
        let error = self.product() - &self.target;
        [error.mm(&self.y), error.tr().mm(&self.x)]
    }

    fn step(&mut self, choice: &LoraRite, rate: f64, max_norm: Option<f64>) -> Taken {
        self.step_of_rows(choice, rate, max_norm, self.x.size()[0] as usize)
    }

    /// A step where `rows` rows of X count.
    fn step_of_rows(&mut self, choice: &LoraRite, rate: f64, max_norm: Option<f64>, rows: usize) -> Taken {
        self.updates += 1;
        let [gx, gy] = self.gradients();
        let side = |factor: &Tensor, rows: usize, gradient: Tensor, [moment, basis]: &[Tensor; 2]| Side {
            rows,
            factor: factor.shallow_clone(),
            gradient,
            moment: moment.shallow_clone(),
            basis: basis.shallow_clone(),
            split: false,
        };
        let pair = [
            side(&self.x, rows, gx, &self.flats[0]),
            side(&self.y, self.y.size()[0] as usize, gy, &self.flats[1]),
        ];
        let rule = Rule {
            choice,
            escaped_mass: choice.escaped_mass.unwrap(),
            learning_rate: rate,
            max_norm,
            update: self.updates,
        };
        step(&[pair], &mut self.moments, &rule, &mut Alone).unwrap()
    }

    /// The same product by other factors; what is remembered stays as it is.
    fn regauge(&mut self, change: &Tensor) {
        self.x = self.x.mm(change);
        self.y = self.y.mm(&change.inverse().tr());
    }
}

fn distance(one: &Tensor, other: &Tensor) -> f64 {
    ((one - other).norm() / one.norm()).double_value(&[])
}

fn near(found: f64, expected: f64, digits: f64) {
    assert!((found - expected).abs() <= digits, "{found} is not {expected}");
}

fn golden() -> Problem {
    let at = |rows: i64, columns: i64, value: &dyn Fn(i64, i64) -> f64| {
        let values: Vec<f64> =
            (0..rows * columns).map(|place| value(place / columns, place % columns)).collect();
        Tensor::from_slice(&values).view([rows, columns])
    };
    Problem::new(
        at(4, 2, &|i, k| (((3 * i + 2 * k) % 5) as f64 - 1.5) / 4.0),
        at(3, 2, &|j, k| (((2 * j + 3 * k) % 7) as f64 - 2.5) / 5.0),
        at(4, 3, &|i, j| (((3 * i + 5 * j) % 7) as f64 - 3.0) / 2.0),
    )
}

#[test]
fn losses_and_moments_are_the_golden_ones() {
    let mut problem = golden();
    near(problem.loss(), 5.215_625, 1e-12);
    let expected =
        [4.587_171_837_010, 4.141_877_946_077, 3.538_725_695_205, 2.968_138_059_992, 2.436_947_899_049];
    for (place, expected) in expected.into_iter().enumerate() {
        let taken = problem.step(&PLAIN, 0.05, Some(1.0));
        if place == 0 {
            near(taken.norm, 4.019_850_171_623, 1e-11);
        }
        near(problem.loss(), expected, 1e-11);
    }
    let trace = |side| problem.moments.second.get(0).get(side).trace().double_value(&[]);
    near(trace(0), 0.110_757_587_338, 1e-11);
    near(trace(1), 0.145_543_097_664, 1e-11);
    near(problem.product().norm().double_value(&[]), 1.680_709_312_379, 1e-11);
    near(problem.product().double_value(&[0, 0]), -0.273_832_910, 1e-9);

    let escaping = LoraRite { escaped_mass: Some(true), ..PLAIN };
    let mut problem = golden();
    let expected =
        [4.587_170_395_725, 4.154_710_559_238, 3.602_354_892_866, 3.082_386_367_236, 2.600_284_836_578];
    for (place, expected) in expected.into_iter().enumerate() {
        problem.step(&escaping, 0.05, None);
        near(problem.loss(), expected, 1e-11);
        let escaped = problem.moments.escaped.double_value(&[0, 0]);
        match place {
            1 => near(escaped, 7.256_418e-3, 1e-9),
            4 => near(escaped, 1.403_597e-1, 1e-7),
            _ => {}
        }
    }
}

/// The published algorithm, word by word, with QR for the roots.
fn plain_step(problem: &mut Problem, choice: &LoraRite, rate: f64, old: &mut [Tensor; 2]) {
    problem.updates += 1;
    let t = problem.updates as f64;
    let corrected = |beta: f64| beta * (1.0 - beta.powf(t - 1.0)) / (1.0 - beta.powf(t));
    let (b1, b2) = (corrected(choice.beta1), corrected(choice.beta2));
    let gradients = problem.gradients();
    let factors = [problem.x.shallow_clone(), problem.y.shallow_clone()];
    let roots: Vec<(Tensor, Tensor)> =
        factors.iter().map(|factor| Tensor::linalg_qr(factor, "reduced")).collect();
    let mut moved = Vec::new();
    for side in 0..2 {
        let (basis, root) = &roots[1 - side];
        let inverse = root.inverse();
        let unmagnified = gradients[side].mm(&inverse);
        let rows = gradients[side].size()[0] as f64;
        let change = basis.tr().mm(&old[1 - side]);
        let mut second = problem.moments.second.get(0).get(side as i64);
        let carried = change.mm(&second).mm(&change.tr());
        second.copy_(&(unmagnified.tr().mm(&unmagnified) * ((1.0 - b2) / rows) + carried * b2));
        let (values, vectors) = second.linalg_eigh("L");
        let conditioner = (vectors.shallow_clone() * (values.sqrt() + choice.eps).reciprocal().unsqueeze(0))
            .mm(&vectors.tr());
        let mut moment = problem.flats[side][0].shallow_clone();
        let new = unmagnified.mm(&conditioner) * (1.0 - b1) + moment.mm(&change.tr()) * b1;
        moment.copy_(&new);
        moved.push((new.mm(&inverse.tr()) + &factors[side] * choice.weight_decay) * rate);
    }
    problem.x = &problem.x - &moved[0];
    problem.y = &problem.y - &moved[1];
    *old = [roots[0].0.shallow_clone(), roots[1].0.shallow_clone()];
}

#[test]
fn any_root_of_the_gram_matrix_gives_the_same_products() {
    let choice = LoraRite { weight_decay: 0.1, ..PLAIN };
    let (mut ours, mut plain) = (Problem::random(12, 9, 3), Problem::random(12, 9, 3));
    let mut old = [plain.x.zeros_like(), plain.y.zeros_like()];
    for _ in 0..20 {
        ours.step(&choice, 0.05, None);
        plain_step(&mut plain, &choice, 0.05, &mut old);
    }
    assert!(ours.loss() < 0.9 * Problem::random(12, 9, 3).loss(), "it learns");
    assert!(distance(&ours.product(), &plain.product()) < 1e-12);
}

fn gauges() -> [Tensor; 3] {
    [
        random(&[3, 3], 7) + Tensor::eye(3, F64),
        Tensor::eye(3, F64) * 100.0,
        Tensor::from_slice(&[1e-3, 1.0, 1e3]).diag(0),
    ]
}

#[test]
fn the_product_does_not_depend_on_its_factors_and_adamw_fails_it() {
    for choice in [
        PLAIN,
        LoraRite { escaped_mass: Some(true), ..PLAIN },
        LoraRite { guard: true, ..PLAIN },
        LoraRite { guard: true, escaped_mass: Some(true), weight_decay: 0.1, max_rms: Some(2.0), ..PLAIN },
    ] {
        for (place, gauge) in gauges().iter().enumerate() {
            for max_norm in [None, Some(1.0)] {
                let (mut one, mut other) = (Problem::random(12, 9, 3), Problem::random(12, 9, 3));
                other.regauge(gauge);
                for _ in 0..20 {
                    one.step(&choice, 0.05, max_norm);
                    other.step(&choice, 0.05, max_norm);
                }
                let apart = distance(&one.product(), &other.product());
                assert!(apart < 1e-12, "gauge {place}, {choice:?}: {apart}");
            }
        }
    }
    for gauge in gauges() {
        let (mut one, mut other) = (Problem::random(12, 9, 3), Problem::random(12, 9, 3));
        other.regauge(&gauge);
        for problem in [&mut one, &mut other] {
            let mut moments = [0, 1].map(|_| (problem.x.zeros_like(), problem.x.zeros_like()));
            moments[1] = (problem.y.zeros_like(), problem.y.zeros_like());
            for t in 1..=20 {
                let gradients = problem.gradients();
                for (side, gradient) in gradients.iter().enumerate() {
                    let (m, v) = &mut moments[side];
                    *m = &*m * 0.9 + gradient * 0.1;
                    *v = &*v * 0.999 + gradient.square() * 0.001;
                    let step = (&*m / (1.0 - 0.9f64.powi(t)))
                        / ((&*v / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8)
                        * 0.05;
                    let factor = if side == 0 { &mut problem.x } else { &mut problem.y };
                    *factor = &*factor - step;
                }
            }
        }
        assert!(distance(&one.product(), &other.product()) > 0.1, "AdamW depends on the factors");
    }
}

#[test]
fn factors_may_change_between_any_two_steps() {
    for choice in [PLAIN, LoraRite { guard: true, escaped_mass: Some(true), ..PLAIN }] {
        let (mut one, mut other) = (Problem::random(12, 9, 3), Problem::random(12, 9, 3));
        for place in 0..20 {
            other.regauge(&(random(&[3, 3], 20 + place) * 0.15 + Tensor::eye(3, F64)));
            one.step(&choice, 0.05, Some(1.0));
            other.step(&choice, 0.05, Some(1.0));
        }
        assert!(distance(&one.product(), &other.product()) < 1e-12);
    }
}

#[test]
fn a_first_step_has_the_length_that_the_rate_says() {
    let choice = LoraRite { eps: 1e-300, ..PLAIN };
    let (m, n, lora_rank) = (12, 9, 3);
    let mut problem = Problem::random(m, n, lora_rank);
    let (x, y) = (problem.x.copy(), problem.y.copy());
    problem.step(&choice, 0.01, None);
    let of_x = (&problem.x - &x).mm(&y.tr()).norm().double_value(&[]);
    let of_y = x.mm(&(&problem.y - &y).tr()).norm().double_value(&[]);
    near(of_x, 0.01 * ((m * lora_rank) as f64).sqrt(), 1e-13);
    near(of_y, 0.01 * ((n * lora_rank) as f64).sqrt(), 1e-13);
}

#[test]
fn a_cold_start_leaves_a_as_it_is_and_moves_b() {
    for guard in [false, true] {
        let mut problem = Problem::random(12, 9, 3);
        problem.x = problem.x.zeros_like();
        let before = problem.y.copy();
        problem.step(&LoraRite { guard, ..PLAIN }, 0.05, None);
        assert_eq!(problem.y, before);
        assert!(problem.x.norm().double_value(&[]) > 0.0);
    }
}

#[test]
fn the_guard_bounds_steps_where_gradients_are_of_one_rank() {
    let (m, n, lora_rank, rate) = (12, 9, 4, 0.01);
    let bound = 10.0 * rate * ((m * lora_rank) as f64).sqrt();
    let course = |choice: LoraRite| {
        let mut problem = Problem::random(m, n, lora_rank);
        problem.x = problem.x.zeros_like();
        problem.target = random(&[m, 1], 5).mm(&random(&[1, n], 6));
        let first = problem.loss();
        let mut longest: f64 = 0.0;
        for _ in 0..40 {
            let before = problem.product();
            problem.step(&choice, rate, None);
            longest = longest.max((problem.product() - &before).norm().double_value(&[]));
        }
        (longest, problem.loss() / first)
    };
    let (longest, left) = course(LoraRite { guard: true, ..PLAIN });
    assert!(longest < bound && left < 0.5, "{longest} of {bound}, {left} of the loss left");
    let (unguarded, _) = course(PLAIN);
    assert!(unguarded > 2.0 * longest, "without the guard the same problem takes longer steps: {unguarded}");
}

#[test]
fn factors_with_too_large_gradients_take_no_step() {
    let choice = LoraRite { max_rms: Some(1e-3), ..PLAIN };
    let mut problem = Problem::random(12, 9, 3);
    let before = problem.product();
    let taken = problem.step(&choice, 0.05, None);
    assert_eq!(taken, Taken { norm: 0.0, left_out: 2 });
    assert_eq!(problem.product(), before);
}

#[test]
fn removed_rows_leave_the_rest_as_if_they_had_never_been_counted() {
    // Zero rows in the factor, its moment and its basis are no rows at all, but for `rows`.
    let choice = LoraRite { guard: true, escaped_mass: Some(true), ..PLAIN };
    let (mut whole, mut cut) = (Problem::random(12, 9, 3), Problem::random(12, 9, 3));
    let keep = Tensor::from_slice(&[0i64, 2, 3, 5, 7, 8, 11]);
    let zero = |tensor: &Tensor| {
        let kept = tensor.index_select(0, &keep);
        tensor.zeros_like().index_copy(0, &keep, &kept)
    };
    for step in 0..10 {
        if step == 4 {
            let select = |tensor: &Tensor| tensor.index_select(0, &keep);
            (whole.x, cut.x) = (zero(&whole.x), select(&cut.x));
            (whole.target, cut.target) = (zero(&whole.target), select(&cut.target));
            whole.flats[0] = [zero(&whole.flats[0][0]), zero(&whole.flats[0][1])];
            cut.flats[0] = [select(&cut.flats[0][0]), select(&cut.flats[0][1])];
        }
        for problem in [&mut whole, &mut cut] {
            problem.step_of_rows(&choice, 0.05, None, if step < 4 { 12 } else { 7 });
        }
    }
    assert!(distance(&whole.product().index_select(0, &keep), &cut.product()) < 1e-13);
    assert!(cut.moments.escaped.double_value(&[0, 1]) > 0.0, "what the mask took has escaped from A's basis");
}
