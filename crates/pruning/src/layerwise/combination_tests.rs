//! The parts in a row, as one run would use them: sparsity by layer, a mask, its refinement, and what the kept weights
//! become.

use super::*;
use crate::allocation::{HillTail, PeakBound, allocate_by_alpha, hill_alpha, spectrum};
use crate::testing::numbers;

const ROWS: usize = 12;
const COLUMNS: usize = 16;

/// Three layers: a weight, and the statistics of what flows into it.
fn layers() -> Vec<(Vec<f64>, InputStatistics)> {
    (0..3u64)
        .map(|layer| {
            // Tails of different weight.
            let weight: Vec<f64> = numbers(layer, ROWS * COLUMNS)
                .iter()
                .map(|value| value.signum() * value.abs().powi(1 + 2 * layer as i32))
                .collect();
            let mut statistics = InputStatistics::new(COLUMNS, Moments::Full);
            for sequence in 0..8 {
                let free = numbers(1000 + 10 * layer + sequence, 20 * COLUMNS);
                let inputs: Vec<f64> = (0..free.len())
                    .map(|place| free[place] + free[place / COLUMNS * COLUMNS] + 0.3)
                    .collect();
                statistics.add_sequence(&inputs).unwrap();
            }
            (weight, statistics)
        })
        .collect()
}

#[test]
fn allocation_mask_refinement_and_compensation_work_in_a_row() {
    let layers = layers();
    let tail = HillTail::Peak(PeakBound::Fixed);
    let alphas: Vec<f64> = layers
        .iter()
        .map(|(weight, _)| hill_alpha(&spectrum(weight, ROWS, COLUMNS).unwrap(), tail, 1e-12).unwrap())
        .collect();
    let sizes = [(ROWS * COLUMNS) as f64; 3];
    let dealt = allocate_by_alpha(&alphas, &sizes, 0.5, 0.2, 0.99).unwrap();
    let mut gone = 0.0;
    for ((weight, statistics), sparsity) in layers.iter().zip(&dealt.sparsities) {
        let linear = LinearWeight { rows: ROWS, columns: COLUMNS, weight };
        let first =
            wanda_mask(&linear, statistics.square_sums(), Pattern::Unstructured { sparsity: *sparsity })
                .unwrap();
        gone += first.sparsity();
        let settings = DsnotSettings {
            swaps: Swaps::InRow { sign: SignRule::Same },
            ending: Ending::Best,
            most_swaps: 50,
            error_threshold: 0.1,
            variance_power: 1.0,
        };
        let start = Dsnot {
            weight: linear,
            weight_mask: &first,
            importance: &wanda_scores(&linear, statistics.square_sums()).unwrap(),
            expected_inputs: &statistics.sequence_sums(),
            variances: &statistics.variances_within_sequences(),
        };
        let refined = start.refine(&settings).unwrap();
        let hessian = Hessian::new(statistics.gram().unwrap(), COLUMNS, 0.01).unwrap();
        for mask in [&first, &refined.weight_mask] {
            let joint = mrp_compensate(&linear, &hessian, mask).unwrap();
            let sweep = sparse_gpt_sweep(&linear, &hessian, mask).unwrap();
            for row in 0..ROWS {
                assert_eq!(mask.pruned_of(row).len(), first.pruned_of(row).len());
                let masked: Vec<f64> = (0..COLUMNS)
                    .map(|column| if mask.row(row)[column] { -weight[row * COLUMNS + column] } else { 0.0 })
                    .collect();
                let untouched = hessian.loss(&masked).unwrap();
                assert!(joint.row_losses[row] <= sweep.row_losses[row] * (1.0 + 1e-9));
                assert!(joint.row_losses[row] <= untouched * (1.0 + 1e-9));
            }
            for (weight, is_pruned) in joint.weight.iter().zip(mask.is_pruned()) {
                assert!(!is_pruned || *weight == 0.0);
            }
        }
    }
    // Each row rounds down by less than one weight.
    assert!((gone / 3.0 - 0.5).abs() < 1.0 / COLUMNS as f64, "{}", gone / 3.0);
}
