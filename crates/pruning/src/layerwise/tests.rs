//! MRP and SparseGPT against each other, against brute force, and against the laws that all of them must keep.

use super::*;
use crate::linear_algebra::gram;
use crate::testing::numbers;
use proptest::prelude::*;

const FIXTURE: [f64; 9] = [2.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0];

fn linear(rows: usize, columns: usize, weight: &[f64]) -> LinearWeight<'_> {
    LinearWeight { rows, columns, weight }
}

/// Moments of strongly correlated inputs.
fn correlated(seed: u64, columns: usize, tokens: usize) -> Vec<f64> {
    let free = numbers(seed, tokens * columns);
    let inputs: Vec<f64> = (0..tokens * columns)
        .map(|place| {
            0.4 * free[place] + free[place / columns * columns] + 0.5 * free[place / columns * columns + 1]
        })
        .collect();
    gram(&inputs, tokens, columns)
}

fn hessian(seed: u64, columns: usize) -> Hessian {
    Hessian::new(&correlated(seed, columns, 5 * columns), columns, 0.0).unwrap()
}

fn assert_near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < tolerance, "{found} is not {expected}");
    }
}

fn change(after: &[f64], before: &[f64]) -> Vec<f64> {
    after.iter().zip(before).map(|(after, before)| after - before).collect()
}

/// A mask of one row.
fn row_mask(columns: usize, pruned: &[usize]) -> WeightMask {
    WeightMask::new(1, columns, (0..columns).map(|column| pruned.contains(&column)).collect()).unwrap()
}

/// A random mask, every row for itself.
fn random_mask(seed: u64, rows: usize, columns: usize, sparsity: f64) -> WeightMask {
    let scores = numbers(seed, rows * columns);
    WeightMask::lowest_of_rows(&scores, rows, columns, Pattern::Unstructured { sparsity }).unwrap()
}

#[test]
fn three_weights_become_what_was_worked_out_by_hand() {
    let hessian = Hessian::new(&FIXTURE, 3, 0.0).unwrap();
    let weight = linear(1, 3, &[1.0, 2.0, 3.0]);
    let mask = row_mask(3, &[0, 2]);
    assert_near(&mrp_single_scores(&weight, &hessian).unwrap(), &[4.0 / 3.0, 4.0, 12.0], 1e-12);
    let by_mrp = mrp_compensate(&weight, &hessian, &mask).unwrap();
    assert_near(&by_mrp.weight, &[0.0, 4.0, 0.0], 1e-12);
    assert_near(&by_mrp.row_losses, &[12.0], 1e-12);
    let by_sparse_gpt = sparse_gpt_sweep(&weight, &hessian, &mask).unwrap();
    assert_near(&by_sparse_gpt.weight, &[0.0, 8.0 / 3.0, 0.0], 1e-12);
    assert_near(&by_sparse_gpt.row_losses, &[140.0 / 9.0], 1e-12);
    assert!((hessian.loss(&[-1.0, 0.0, -3.0]).unwrap() - 20.0).abs() < 1e-12);
    assert_eq!((by_mrp.weight[0], by_mrp.weight[2]), (0.0, 0.0));
}

#[test]
fn what_does_not_fit_together_is_refused_by_name() {
    let hessian = Hessian::new(&FIXTURE, 3, 0.0).unwrap();
    let weight = [1.0; 6];
    let (three, two) = (linear(2, 3, &weight), linear(3, 2, &weight));
    let mask = WeightMask::of_columns(2, &[true, false, false]);
    let inputs = LayerwiseError::InputCount { what: "hessian", expected: 2, actual: 3 };
    assert_eq!(mrp_compensate_columns(&two, &hessian, &[true, false]), Err(inputs.clone()));
    assert_eq!(mrp_single_scores(&two, &hessian), Err(inputs.clone()));
    assert_eq!(sparse_gpt_sweep(&two, &hessian, &mask), Err(inputs));
    let shape = LayerwiseError::MaskShape { expected: [2, 3], actual: [1, 3] };
    assert_eq!(mrp_compensate(&three, &hessian, &row_mask(3, &[0])), Err(shape.clone()));
    assert_eq!(sparse_gpt_sweep(&three, &hessian, &row_mask(3, &[0])), Err(shape));
    assert_eq!(mrp_mask_by_group(&three, &hessian, 1, 2), Err(LayerwiseError::Columns { columns: 3, of: 2 }));
    assert_eq!(mrp_group_losses(&three, &hessian, 2), Err(LayerwiseError::Columns { columns: 3, of: 2 }));
    for (rows, columns) in [(usize::MAX, 0), (0, 3)] {
        let empty = LayerwiseError::Empty { rows, columns };
        assert_eq!(mrp_compensate_columns(&linear(rows, columns, &[]), &hessian, &[]), Err(empty));
    }
    let bad = linear(2, 3, &[1.0, 2.0, 3.0, 4.0, f64::NAN, 6.0]);
    assert_eq!(
        mrp_compensate(&bad, &hessian, &mask).unwrap_err().to_string(),
        "`weight` holds NaN at place 4; it must hold finite numbers"
    );
    let wide = Hessian::new(&gram(&numbers(1, 40 * 40), 40, 40), 40, 0.1).unwrap();
    let error = mrp_mask_by_group(&linear(1, 40, &[1.0; 40]), &wide, 20, 40).unwrap_err();
    assert!(matches!(error, LayerwiseError::Subsets { pruned: 20, of: 40, .. }));
    let settings = SparseGptSettings {
        pattern: Pattern::Unstructured { sparsity: 0.5 },
        threshold: Threshold::Row,
        block_columns: 0,
    };
    assert!(matches!(sparse_gpt(&three, &hessian, &settings), Err(LayerwiseError::Setting { .. })));
    let huge = linear(1, 3, &[1e300; 3]);
    assert!(matches!(
        mrp_compensate(&huge, &hessian, &row_mask(3, &[1])),
        Err(LayerwiseError::Overflow { row: 0 })
    ));
}

#[test]
fn solving_a_later_block_without_the_earlier_ones_revives_their_weights() {
    let (columns, hessian) = (8, hessian(4, 8));
    let weight = numbers(5, columns);
    let first = mrp_compensate(&linear(1, columns, &weight), &hessian, &row_mask(columns, &[0, 2])).unwrap();
    let half = linear(1, columns, &first.weight);
    let forgot = mrp_compensate(&half, &hessian, &row_mask(columns, &[4, 7])).unwrap();
    assert!(forgot.weight[0].abs() > 0.01 && forgot.weight[2].abs() > 0.01);
    let carried = mrp_compensate(&half, &hessian, &row_mask(columns, &[0, 2, 4, 7])).unwrap();
    let at_once =
        mrp_compensate(&linear(1, columns, &weight), &hessian, &row_mask(columns, &[0, 2, 4, 7])).unwrap();
    assert_near(&carried.weight, &at_once.weight, 1e-12);
}

#[test]
fn the_joint_removal_never_costs_more_than_the_sweep_and_often_much_less() {
    let mut sum = 0.0;
    for seed in 0..200 {
        let hessian = hessian(seed, 8);
        let weight = numbers(seed ^ 1 << 30, 8);
        let mask = random_mask(seed ^ 1 << 31, 1, 8, 0.5);
        let weight = linear(1, 8, &weight);
        let joint = mrp_compensate(&weight, &hessian, &mask).unwrap().row_losses[0];
        let sweep = sparse_gpt_sweep(&weight, &hessian, &mask).unwrap().row_losses[0];
        assert!(joint <= sweep * (1.0 + 1e-9), "{joint} against {sweep}");
        sum += sweep / joint;
    }
    assert!(sum / 200.0 > 1.05, "{}", sum / 200.0);
}

#[test]
fn sparse_gpt_loses_exactly_what_is_asked_over_all_blocks() {
    let (rows, columns) = (3, 10);
    let (weight, hessian) = (numbers(8, rows * columns), hessian(9, columns));
    for sparsity in [0.0, 0.25, 0.5, 0.71, 0.99, 1.0] {
        for block_columns in [1, 3, 4, 10, 99] {
            for threshold in [Threshold::Block, Threshold::Row] {
                let settings = SparseGptSettings {
                    pattern: Pattern::Unstructured { sparsity },
                    threshold,
                    block_columns,
                };
                let (mask, compensated) =
                    sparse_gpt(&linear(rows, columns, &weight), &hessian, &settings).unwrap();
                let counts: Vec<usize> = (0..rows).map(|row| mask.pruned_of(row).len()).collect();
                match threshold {
                    Threshold::Block => assert_eq!(
                        counts.iter().sum::<usize>(),
                        (30.0 * sparsity + 1e-9) as usize,
                        "{sparsity} {block_columns}"
                    ),
                    Threshold::Row => assert_eq!(counts, [(10.0 * sparsity + 1e-9) as usize; 3]),
                }
                for (weight, is_pruned) in compensated.weight.iter().zip(mask.is_pruned()) {
                    assert_eq!(*weight == 0.0, *is_pruned);
                }
            }
        }
    }
}

#[test]
fn dead_inputs_go_first_and_change_nothing_else() {
    let columns = 6;
    let mut moments = correlated(2, columns, 30);
    for place in 0..columns {
        moments[place * columns + 4] = 0.0;
        moments[4 * columns + place] = 0.0;
    }
    let hessian = Hessian::new(&moments, columns, 0.01).unwrap();
    let weight = [0.9, -0.8, 0.7, 0.6, 50.0, -0.5];
    let weight = linear(1, columns, &weight);
    let third = Pattern::Unstructured { sparsity: 0.34 };
    let squares: Vec<f64> = (0..columns).map(|place| moments[place * columns + place]).collect();
    let settings = SparseGptSettings { pattern: third, threshold: Threshold::Row, block_columns: columns };
    for mask in [
        wanda_mask(&weight, &squares, third).unwrap(),
        mrp_mask_by_single(&weight, &hessian, third).unwrap(),
        mrp_mask_by_group(&weight, &hessian, 2, 6).unwrap(),
        sparse_gpt(&weight, &hessian, &settings).unwrap().0,
    ] {
        assert!(mask.row(0)[4], "{:?}", mask.pruned_of(0));
    }
    for compensated in [
        mrp_compensate(&weight, &hessian, &row_mask(columns, &[4])).unwrap(),
        sparse_gpt_sweep(&weight, &hessian, &row_mask(columns, &[4])).unwrap(),
    ] {
        assert_near(&compensated.weight, &[0.9, -0.8, 0.7, 0.6, 0.0, -0.5], 1e-12);
        assert_near(&compensated.row_losses, &[0.0], 1e-12);
    }
}

#[test]
fn fewer_tokens_than_inputs_do_with_damping_at_any_sparsity() {
    let (rows, columns) = (2, 12);
    let hessian = Hessian::new(&correlated(6, columns, 5), columns, 0.01).unwrap();
    let weight = numbers(7, rows * columns);
    let weight = linear(rows, columns, &weight);
    for sparsity in [0.0, 0.5, 0.99, 1.0] {
        let mask = mrp_mask_by_single(&weight, &hessian, Pattern::Unstructured { sparsity }).unwrap();
        let joint = mrp_compensate(&weight, &hessian, &mask).unwrap();
        let sweep = sparse_gpt_sweep(&weight, &hessian, &mask).unwrap();
        for (joint, sweep) in joint.row_losses.iter().zip(&sweep.row_losses) {
            assert!(*joint <= sweep * (1.0 + 1e-9));
        }
        if sparsity == 0.0 {
            assert_eq!((&joint.weight[..], &sweep.weight[..]), (weight.weight, weight.weight));
        }
        if sparsity == 1.0 {
            assert_eq!(joint.weight, vec![0.0; rows * columns]);
        }
    }
}

proptest! {
    #[test]
    fn a_diagonal_hessian_makes_all_of_them_wanda_and_moves_no_weight(
        seed: u64, sparsity in 0.0f64..1.0, grouped: bool,
    ) {
        let (rows, columns) = (3, 8);
        let squares: Vec<f64> = numbers(seed, columns).iter().map(|value| 0.1 + value * value).collect();
        let diagonal: Vec<f64> =
            (0..64).map(|place| if place % 9 == 0 { squares[place / 9] } else { 0.0 }).collect();
        let hessian = Hessian::new(&diagonal, columns, 0.0).unwrap();
        let weight = numbers(seed ^ 1, rows * columns);
        let weight = linear(rows, columns, &weight);
        let pattern =
            if grouped { Pattern::Grouped { pruned: 2, of: 4 } } else { Pattern::Unstructured { sparsity } };
        let wanda = wanda_mask(&weight, &squares, pattern).unwrap();
        let settings = SparseGptSettings { pattern, threshold: Threshold::Row, block_columns: columns };
        let (by_sparse_gpt, swept) = sparse_gpt(&weight, &hessian, &settings).unwrap();
        prop_assert_eq!(&by_sparse_gpt, &wanda);
        prop_assert_eq!(&mrp_mask_by_single(&weight, &hessian, pattern).unwrap(), &wanda);
        if grouped {
            prop_assert_eq!(&mrp_mask_by_group(&weight, &hessian, 2, 4).unwrap(), &wanda);
        }
        let joint = mrp_compensate(&weight, &hessian, &wanda).unwrap();
        for place in 0..rows * columns {
            let expected = if wanda.is_pruned()[place] { 0.0 } else { weight.weight[place] };
            prop_assert_eq!(swept.weight[place], expected);
            prop_assert!((joint.weight[place] - expected).abs() < 1e-14);
        }
    }

    #[test]
    fn the_joint_removal_is_the_least_squares_solution(seed: u64, sparsity in 0.05f64..0.95) {
        let columns = 8;
        let hessian = hessian(seed, columns);
        let weight = numbers(seed ^ 1, columns);
        let mask = random_mask(seed ^ 2, 1, columns, sparsity);
        let found = mrp_compensate(&linear(1, columns, &weight), &hessian, &mask).unwrap();
        let change = change(&found.weight, &weight);
        // The residual is orthogonal to every kept input, and the loss is what the change costs.
        for kept in (0..columns).filter(|&kept| !mask.row(0)[kept]) {
            let along: f64 = (0..columns).map(|j| change[j] * hessian.matrix()[j * columns + kept]).sum();
            prop_assert!(along.abs() < 1e-9, "{along}");
        }
        for pruned in mask.pruned_of(0) {
            prop_assert_eq!(found.weight[pruned], 0.0);
        }
        let cost = hessian.loss(&change).unwrap();
        prop_assert!((cost - found.row_losses[0]).abs() < 1e-10 * (1.0 + cost));
    }

    #[test]
    fn either_side_of_the_system_gives_the_same(seed: u64) {
        // Half the weights go: then the pruned side is solved. The kept side by hand.
        let columns = 6;
        let hessian = hessian(seed, columns);
        let weight = numbers(seed ^ 1, columns);
        let mask = random_mask(seed ^ 2, 1, columns, 0.5);
        let found = mrp_compensate(&linear(1, columns, &weight), &hessian, &mask).unwrap();
        let (pruned, kept): (Vec<usize>, Vec<usize>) = (0..columns).partition(|&column| mask.row(0)[column]);
        let factor =
            crate::linear_algebra::Cholesky::factor(&Hessian::part(hessian.matrix(), columns, &kept), 3).unwrap();
        let mut solved: Vec<f64> = kept
            .iter()
            .map(|kept| pruned.iter().map(|p| weight[*p] * hessian.matrix()[p * columns + kept]).sum())
            .collect();
        factor.solve(&mut solved).unwrap();
        for (kept, solved) in kept.iter().zip(solved) {
            prop_assert!((found.weight[*kept] - weight[*kept] - solved).abs() < 1e-10);
        }
    }

    #[test]
    fn one_after_the_other_in_any_order_is_all_at_once(seed: u64) {
        let columns = 8;
        let hessian = hessian(seed, columns);
        let weight = numbers(seed ^ 1, columns);
        let order: Vec<usize> = {
            let keys = numbers(seed ^ 2, columns);
            let mut order: Vec<usize> = (0..columns).collect();
            order.sort_by(|one, other| keys[*one].total_cmp(&keys[*other]));
            order.truncate(4);
            order
        };
        let at_once =
            mrp_compensate(&linear(1, columns, &weight), &hessian, &row_mask(columns, &order)).unwrap();
        // The optimal brain surgeon, its inverse brought up to date after each removal.
        let (mut moved, mut inverse) = (weight.clone(), hessian.inverse().to_vec());
        for &gone in &order {
            let pivot = inverse[gone * columns + gone];
            let step = moved[gone] / pivot;
            let row: Vec<f64> = inverse[gone * columns..(gone + 1) * columns].to_vec();
            moved.iter_mut().zip(&row).for_each(|(weight, entry)| *weight -= step * entry);
            for one in 0..columns {
                for other in 0..columns {
                    inverse[one * columns + other] -= row[one] * row[other] / pivot;
                }
            }
        }
        // By growing sets, each solve from the weights of the last.
        let mut grown = weight.clone();
        for count in 1..=order.len() {
            let mask = row_mask(columns, &order[..count]);
            grown = mrp_compensate(&linear(1, columns, &grown), &hessian, &mask).unwrap().weight;
        }
        for place in 0..columns {
            prop_assert!((moved[place] - at_once.weight[place]).abs() < 1e-9);
            prop_assert!((grown[place] - at_once.weight[place]).abs() < 1e-9);
        }
    }

    #[test]
    fn the_mask_by_group_is_the_best_of_each_group(seed: u64) {
        let (rows, columns, of) = (2, 8, 4);
        let hessian = hessian(seed, columns);
        let weight = numbers(seed ^ 1, rows * columns);
        let weight = linear(rows, columns, &weight);
        let best = mrp_mask_by_group(&weight, &hessian, 2, of).unwrap();
        let single = mrp_mask_by_single(&weight, &hessian, Pattern::Grouped { pruned: 2, of }).unwrap();
        for row in 0..rows {
            let own = linear(1, columns, weight.row(row));
            for group in 0..columns / of {
                let within = |mask: &WeightMask| -> Vec<usize> {
                    mask.pruned_of(row).into_iter().filter(|place| place / of == group).collect()
                };
                let loss = |pruned: &[usize]| {
                    mrp_compensate(&own, &hessian, &row_mask(columns, pruned)).unwrap().row_losses[0]
                };
                prop_assert_eq!(within(&best).len(), 2);
                let least = loss(&within(&best));
                prop_assert!(least <= loss(&within(&single)) * (1.0 + 1e-9));
                for one in 0..of {
                    for other in one + 1..of {
                        prop_assert!(least <= loss(&[group * of + one, group * of + other]) * (1.0 + 1e-9));
                    }
                }
            }
        }
    }

    #[test]
    fn whole_inputs_share_one_solve_and_a_group_costs_its_loss(seed: u64, is_pruned in prop::collection::vec(any::<bool>(), 6)) {
        let (rows, columns) = (4, 6);
        let hessian = hessian(seed, columns);
        let weight = numbers(seed ^ 1, rows * columns);
        let shared = mrp_compensate_columns(&linear(rows, columns, &weight), &hessian, &is_pruned).unwrap();
        for row in 0..rows {
            let own = &weight[row * columns..(row + 1) * columns];
            let alone = mrp_compensate_columns(&linear(1, columns, own), &hessian, &is_pruned).unwrap();
            prop_assert_eq!(&alone.weight[..], &shared.weight[row * columns..(row + 1) * columns]);
            prop_assert_eq!(alone.row_losses[0], shared.row_losses[row]);
        }
        let by_group = mrp_group_losses(&linear(rows, columns, &weight), &hessian, 2).unwrap();
        for (group, loss) in by_group.into_iter().enumerate() {
            let pruned: Vec<bool> = (0..columns).map(|column| column / 2 == group).collect();
            let found = mrp_compensate_columns(&linear(rows, columns, &weight), &hessian, &pruned).unwrap();
            prop_assert!((found.row_losses.iter().sum::<f64>() - loss).abs() < 1e-9 * (1.0 + loss));
        }
    }

    #[test]
    fn rows_on_two_ranks_become_what_they_become_on_one(seed: u64) {
        let (rows, columns) = (4, 8);
        let hessian = hessian(seed, columns);
        let weight = numbers(seed ^ 1, rows * columns);
        let settings = SparseGptSettings {
            pattern: Pattern::Unstructured { sparsity: 0.5 },
            threshold: Threshold::Row,
            block_columns: 4,
        };
        let (mask, swept) = sparse_gpt(&linear(rows, columns, &weight), &hessian, &settings).unwrap();
        let joint = mrp_compensate(&linear(rows, columns, &weight), &hessian, &mask).unwrap();
        for (rank, shard) in weight.chunks(2 * columns).enumerate() {
            let shard = linear(2, columns, shard);
            let range = 2 * rank * columns..2 * (rank + 1) * columns;
            let (of_rank, swept_of_rank) = sparse_gpt(&shard, &hessian, &settings).unwrap();
            prop_assert_eq!(of_rank.is_pruned(), &mask.is_pruned()[range.clone()]);
            prop_assert_eq!(&swept_of_rank.weight[..], &swept.weight[range.clone()]);
            let joint_of_rank = mrp_compensate(&shard, &hessian, &of_rank).unwrap();
            prop_assert_eq!(&joint_of_rank.weight[..], &joint.weight[range]);
        }
    }

    #[test]
    fn the_sweep_costs_what_its_change_costs_and_its_own_mask_gives_it_back(seed: u64, grouped: bool) {
        let (rows, columns) = (2, 8);
        let hessian = hessian(seed, columns);
        let weight = numbers(seed ^ 1, rows * columns);
        let pattern = if grouped {
            Pattern::Grouped { pruned: 2, of: 4 }
        } else {
            Pattern::Unstructured { sparsity: 0.5 }
        };
        let settings = SparseGptSettings { pattern, threshold: Threshold::Block, block_columns: 4 };
        let (mask, found) = sparse_gpt(&linear(rows, columns, &weight), &hessian, &settings).unwrap();
        prop_assert_eq!(&sparse_gpt_sweep(&linear(rows, columns, &weight), &hessian, &mask).unwrap(), &found);
        for row in 0..rows {
            let range = row * columns..(row + 1) * columns;
            let cost = hessian.loss(&change(&found.weight[range.clone()], &weight[range])).unwrap();
            prop_assert!((cost - found.row_losses[row]).abs() < 1e-9 * (1.0 + cost));
            prop_assert!(!grouped || mask.row(row).chunks(4).all(|group| group.iter().filter(|gone| **gone).count() == 2));
        }
    }
}
