use super::*;
use crate::layerwise::{Pattern, wanda_mask, wanda_scores};
use crate::testing::numbers;
use proptest::prelude::*;

const SAME: Swaps = Swaps::InRow { sign: SignRule::Same };
const ANY: Swaps = Swaps::InRow { sign: SignRule::Any };

fn settings(swaps: Swaps) -> DsnotSettings {
    DsnotSettings { swaps, ending: Ending::Last, most_swaps: 50, error_threshold: 0.1, variance_power: 1.0 }
}

/// A linear with random weights, means and spreads, pruned by Wanda.
struct Linear {
    rows: usize,
    columns: usize,
    weight: Vec<f64>,
    importance: Vec<f64>,
    expected_inputs: Vec<f64>,
    variances: Vec<f64>,
    weight_mask: WeightMask,
}

impl Linear {
    fn new(seed: u64, rows: usize, columns: usize, pattern: Pattern) -> Self {
        let weight = numbers(seed, rows * columns);
        let expected_inputs = numbers(seed ^ 1, columns);
        let variances: Vec<f64> = numbers(seed ^ 2, columns).iter().map(|value| value * value).collect();
        let squares: Vec<f64> =
            expected_inputs.iter().zip(&variances).map(|(mean, variance)| mean * mean + variance).collect();
        let linear = LinearWeight { rows, columns, weight: &weight };
        let importance = wanda_scores(&linear, &squares).unwrap();
        let weight_mask = wanda_mask(&linear, &squares, pattern).unwrap();
        Self { rows, columns, weight, importance, expected_inputs, variances, weight_mask }
    }

    fn start(&self) -> Dsnot<'_> {
        Dsnot {
            weight: LinearWeight { rows: self.rows, columns: self.columns, weight: &self.weight },
            weight_mask: &self.weight_mask,
            importance: &self.importance,
            expected_inputs: &self.expected_inputs,
            variances: &self.variances,
        }
    }

    fn refine(&self, settings: &DsnotSettings) -> DsnotOutcome {
        self.start().refine(settings).unwrap()
    }
}

/// The row whose swaps were worked out by hand.
fn by_hand(settings: &DsnotSettings) -> DsnotOutcome {
    let weight = [2.0, 1.0, -0.5, 0.4, -2.0, 5.0, -0.5, 0.3];
    let weight_mask = WeightMask::new(1, 8, (0..8).map(|place| place < 4).collect()).unwrap();
    // Ascending among the kept: 6, 4, 7, 5.
    let importance = [0.0, 0.0, 0.0, 0.0, 2.0, 4.0, 1.0, 3.0];
    let start = Dsnot {
        weight: LinearWeight { rows: 1, columns: 8, weight: &weight },
        weight_mask: &weight_mask,
        importance: &importance,
        expected_inputs: &[1.0; 8],
        variances: &[1.0; 8],
    };
    start.refine(settings).unwrap()
}

#[test]
fn eight_weights_are_swapped_as_worked_out_by_hand() {
    let same = by_hand(&settings(SAME));
    assert_eq!(same.weight_mask.pruned_of(0), [1, 2, 3, 6]);
    assert_eq!(same.swap_counts, [1]);
    assert!((same.first_errors[0] - 2.9).abs() < 1e-12);
    assert!((same.last_errors[0] - 0.4).abs() < 1e-12);
    // By default the next swap is taken: it carries the error across zero.
    let any = by_hand(&DsnotSettings { most_swaps: 2, ..settings(ANY) });
    assert_eq!(any.weight_mask.pruned_of(0), [2, 3, 4, 6]);
    assert!((any.last_errors[0] + 2.6).abs() < 1e-12);
    // Whoever keeps the best goes back.
    let best = by_hand(&DsnotSettings { ending: Ending::Best, ..settings(ANY) });
    assert_eq!((best.weight_mask, best.swap_counts), (same.weight_mask, vec![1]));
    for done in [
        DsnotSettings { most_swaps: 0, ..settings(ANY) },
        DsnotSettings { error_threshold: 3.0, ..settings(ANY) },
    ] {
        assert_eq!(by_hand(&done).weight_mask.pruned_of(0), [0, 1, 2, 3]);
    }
}

#[test]
fn what_varies_little_comes_back_first() {
    let weight = [2.0, 1.0, 1.5, -0.1, -0.1];
    let weight_mask = WeightMask::new(1, 5, vec![true, true, true, false, false]).unwrap();
    let first_back = |variances: &[f64], variance_power| {
        let start = Dsnot {
            weight: LinearWeight { rows: 1, columns: 5, weight: &weight },
            weight_mask: &weight_mask,
            importance: &[1.0; 5],
            expected_inputs: &[1.0; 5],
            variances,
        };
        let one = DsnotSettings { most_swaps: 1, variance_power, ..settings(SAME) };
        let refined = start.refine(&one).unwrap().weight_mask;
        (0..3).find(|&column| !refined.row(0)[column]).unwrap()
    };
    assert_eq!(first_back(&[1.0; 5], 1.0), 0);
    assert_eq!(first_back(&[4.0, 1.0, 2.0, 1.0, 1.0], 1.0), 1);
    assert_eq!(first_back(&[4.0, 1.0, 2.0, 1.0, 1.0], 0.0), 0);
    // Of inputs that do not vary at all the contribution decides.
    assert_eq!(first_back(&[4.0, 0.0, 0.0, 1.0, 1.0], 1.0), 2);
}

#[test]
fn without_crossing_zero_every_swap_lessens_the_error() {
    let linear = Linear::new(3, 200, 512, Pattern::Unstructured { sparsity: 0.6 });
    let same = linear.refine(&settings(SAME));
    let any = linear.refine(&settings(ANY));
    let best = linear.refine(&DsnotSettings { ending: Ending::Best, ..settings(ANY) });
    let judged = judged_variances(&linear.variances, 1.0);
    let mut crossed = 0;
    for row in 0..200 {
        let contributions: Vec<f64> = (0..512)
            .map(|column| linear.weight[row * 512 + column] * linear.expected_inputs[column])
            .collect();
        let path = |swaps| {
            let row = Row {
                contributions: &contributions,
                importance: &linear.importance[row * 512..(row + 1) * 512],
                variances: &judged,
                is_pruned: linear.weight_mask.row(row),
            };
            row.path(&settings(swaps)).errors
        };
        assert!(path(SAME).windows(2).all(|pair| pair[1].abs() < pair[0].abs()));
        crossed += path(ANY).windows(2).filter(|pair| pair[1].abs() > pair[0].abs()).count();
        assert!(same.last_errors[row].abs() <= same.first_errors[row].abs());
        assert!(best.last_errors[row].abs() <= best.first_errors[row].abs());
        assert!(best.last_errors[row].abs() <= any.last_errors[row].abs());
        for outcome in [&same, &any, &best] {
            assert_eq!(outcome.weight_mask.pruned_of(row).len(), linear.weight_mask.pruned_of(row).len());
            // The error that is told is the one that the mask has.
            let error: f64 =
                outcome.weight_mask.pruned_of(row).iter().map(|&column| contributions[column]).sum();
            assert!((error - outcome.last_errors[row]).abs() < 1e-9);
        }
    }
    assert!(crossed > 0, "by default some swaps make the error larger for a while");
    let mean = |errors: &[f64]| errors.iter().map(|error| error.abs()).sum::<f64>() / 200.0;
    assert!(mean(&any.last_errors) < mean(&any.first_errors));
    assert!(mean(&same.last_errors) < mean(&same.first_errors) / 2.0);
}

#[test]
fn rows_that_have_nothing_to_swap_stay() {
    let linear = Linear::new(1, 2, 4, Pattern::Unstructured { sparsity: 0.5 });
    for pattern in [0.0, 1.0] {
        let all = Linear::new(1, 2, 4, Pattern::Unstructured { sparsity: pattern });
        assert_eq!(all.refine(&settings(ANY)).weight_mask, all.weight_mask);
    }
    let dead = Dsnot { expected_inputs: &[0.0; 4], variances: &[0.0; 4], ..linear.start() };
    assert_eq!(dead.refine(&settings(ANY)).unwrap().weight_mask, linear.weight_mask);
    // No spread at all: contributions alone decide.
    let still = Dsnot { variances: &[0.0; 4], ..linear.start() };
    still.refine(&settings(ANY)).unwrap();
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let linear = Linear::new(1, 2, 6, Pattern::Unstructured { sparsity: 0.5 });
    let start = linear.start();
    let text = |start: &Dsnot<'_>, settings: &DsnotSettings| start.refine(settings).unwrap_err().to_string();
    let good = settings(SAME);
    for (start, message) in [
        (Dsnot { importance: &[0.0; 5], ..start }, "`importance` holds 5 numbers; its shape [2, 6] needs 12"),
        (
            Dsnot { expected_inputs: &[f64::NAN; 6], ..start },
            "`expected_inputs` holds NaN at place 0; it must hold finite numbers",
        ),
        (Dsnot { variances: &[1.0], ..start }, "`variances` holds 1 numbers; its shape [1, 6] needs 6"),
        (Dsnot { variances: &[-1.0; 6], ..start }, "`variances` must be a number of at least 0; got -1"),
    ] {
        assert_eq!(text(&start, &good), message);
    }
    assert_eq!(text(&start, &settings(Swaps::InGroup { of: 4 })), "6 inputs do not divide into groups of 4");
    assert_eq!(text(&start, &settings(Swaps::InGroup { of: 0 })), "6 inputs do not divide into groups of 0");
    assert_eq!(
        text(&start, &DsnotSettings { error_threshold: f64::NAN, ..good }),
        "`error_threshold` must be a number of at least 0; got NaN"
    );
    let other = WeightMask::of_columns(1, &[true; 6]);
    assert!(matches!(
        Dsnot { weight_mask: &other, ..start }.refine(&good),
        Err(LayerwiseError::MaskShape { .. })
    ));
}

proptest! {
    #[test]
    fn a_pattern_of_groups_stays_a_pattern_of_groups(seed: u64, of_eight: bool) {
        let (pruned, of) = if of_eight { (4, 8) } else { (2, 4) };
        let linear = Linear::new(seed, 4, 32, Pattern::Grouped { pruned, of });
        let threshold = DsnotSettings { error_threshold: 0.001, ..settings(Swaps::InGroup { of }) };
        let found = linear.refine(&threshold);
        for row in 0..4 {
            for group in found.weight_mask.row(row).chunks(of) {
                prop_assert_eq!(group.iter().filter(|gone| **gone).count(), pruned);
            }
            // No crossing.
            prop_assert!(found.first_errors[row] * found.last_errors[row] >= 0.0);
            prop_assert!(found.swap_counts[row] <= 32 / of * pruned);
        }
        let best = linear.refine(&DsnotSettings { ending: Ending::Best, ..threshold });
        for (best, first) in best.last_errors.iter().zip(&best.first_errors) {
            prop_assert!(best.abs() <= first.abs());
        }
    }

    #[test]
    fn the_scale_of_the_inputs_matters_to_the_threshold_alone(seed: u64, exponent in -6i32..7) {
        let linear = Linear::new(seed, 3, 40, Pattern::Unstructured { sparsity: 0.5 });
        let scale = 2f64.powi(exponent);
        let expected_inputs: Vec<f64> = linear.expected_inputs.iter().map(|value| value * scale).collect();
        let variances: Vec<f64> = linear.variances.iter().map(|value| value * scale * scale).collect();
        let importance: Vec<f64> = linear.importance.iter().map(|value| value * scale).collect();
        let scaled = Dsnot {
            importance: &importance,
            expected_inputs: &expected_inputs,
            variances: &variances,
            ..linear.start()
        };
        for swaps in [SAME, ANY, Swaps::InGroup { of: 4 }] {
            let one = linear.refine(&settings(swaps));
            let other =
                scaled.refine(&DsnotSettings { error_threshold: 0.1 * scale, ..settings(swaps) }).unwrap();
            prop_assert_eq!(one.weight_mask, other.weight_mask);
            for (one, other) in one.last_errors.iter().zip(&other.last_errors) {
                prop_assert_eq!(one * scale, *other);
            }
        }
    }
}
