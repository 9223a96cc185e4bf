use super::*;
use crate::testing::{importances, model};
use proptest::prelude::*;
use recipe::HeadGrouping;

const KEEP: [f64; 3] = [0.3, 0.6, 0.85];

fn settings(estimator: Estimator, scope: Scope, layers: usize) -> PolicySettings {
    PolicySettings {
        seed: 5,
        estimator,
        scope,
        learning_rate: 0.02,
        step_count: 3000,
        samples_per_step: 2,
        baseline_window: 5.0,
        attention_keep_share: 0.5,
        mlp_keep_share: 0.5,
        prunable: vec![true; layers],
    }
}

fn constant(dense: &ModelSpec, value: f64) -> Vec<GroupImportance> {
    importances(dense, HeadGrouping::KvGroups, |_, _, _| value)
}

/// Three units, a loss for each of their eight masks.
fn loss(mask: usize) -> f64 {
    [13.0, 8.5, 11.25, 5.0, 10.0, 7.75, 6.0, 2.5][mask]
}

fn is_kept(mask: usize, unit: usize) -> bool {
    mask >> unit & 1 == 1
}

fn probability(mask: usize) -> f64 {
    (0..3).map(|unit| if is_kept(mask, unit) { KEEP[unit] } else { 1.0 - KEEP[unit] }).product()
}

fn expected_loss() -> f64 {
    (0..8).map(|mask| probability(mask) * loss(mask)).sum()
}

/// `dE[L] / ds`: the expected loss with the unit less that without it.
fn true_gradient(unit: usize) -> f64 {
    (0..8)
        .map(|mask| {
            let own = if is_kept(mask, unit) { 1.0 / KEEP[unit] } else { -1.0 / (1.0 - KEEP[unit]) };
            own * probability(mask) * loss(mask)
        })
        .sum()
}

/// Mean and mean square of the estimate over all draws of `samples` masks.
fn moments(
    estimator: Estimator,
    samples: usize,
    baseline: Option<f64>,
    share: f64,
    unit: usize,
) -> (f64, f64) {
    let (mut mean, mut square) = (0.0, 0.0);
    for draw in 0..8usize.pow(samples as u32) {
        let masks: Vec<usize> = (0..samples).map(|sample| draw >> (3 * sample) & 7).collect();
        let losses: Vec<f64> = masks.iter().map(|&mask| loss(mask)).collect();
        let signal = Signal::new(estimator, &losses, baseline, share);
        let estimate = signal.gradient(KEEP[unit], masks.iter().map(|&mask| is_kept(mask, unit)));
        let weight: f64 = masks.iter().map(|&mask| probability(mask)).product();
        mean += weight * estimate;
        square += weight * estimate * estimate;
    }
    (mean, square)
}

#[test]
fn the_strict_estimate_is_the_gradient_on_average_whatever_its_baseline() {
    for unit in 0..3 {
        let expected = true_gradient(unit);
        for (samples, baseline) in
            [(1, Some(0.0)), (2, Some(0.0)), (2, Some(3.5)), (3, Some(-7.0)), (2, None), (3, None)]
        {
            let (mean, _) = moments(Estimator::Strict, samples, baseline, 0.2, unit);
            assert!(
                (mean - expected).abs() < 1e-12,
                "{samples} samples, {baseline:?}: {mean} for {expected}"
            );
        }
        // A first step of a single sample sets the baseline and moves nothing.
        assert_eq!(moments(Estimator::Strict, 1, None, 0.2, unit), (0.0, 0.0));
    }
}

#[test]
fn a_baseline_of_the_expected_loss_lessens_the_variance() {
    for unit in 0..3 {
        let variance = |baseline| {
            let (mean, square) = moments(Estimator::Strict, 2, Some(baseline), 0.2, unit);
            square - mean * mean
        };
        let (plain, centred) = (variance(0.0), variance(expected_loss()));
        assert!(centred < plain / 2.0, "{centred} against {plain}");
    }
}

#[test]
fn the_faithful_estimate_is_a_known_multiple_of_the_gradient() {
    for (unit, keep) in KEEP.into_iter().enumerate() {
        let root = (keep * (1.0 - keep)).sqrt();
        for (samples, baseline, factor) in
            [(2, Some(3.0), 1.8), (2, Some(-50.0), 1.8), (3, Some(3.0), 1.4), (2, None, 1.0), (3, None, 1.0)]
        {
            let (mean, _) = moments(Estimator::Faithful, samples, baseline, 0.2, unit);
            let ratio = mean / (root * true_gradient(unit));
            assert!((ratio - factor).abs() < 1e-5, "{samples} samples, {baseline:?}: {ratio} for {factor}");
        }
    }
}

#[test]
fn the_baseline_is_a_moving_average_of_the_mean_losses() {
    let dense = model(1, 4, 2, 4);
    let mut search =
        PolicyGradient::new(settings(Estimator::Faithful, Scope::Model, 1), constant(&dense, 0.5)).unwrap();
    assert_eq!(search.baseline(), None);
    search.update(&[3.0, 5.0]).unwrap();
    assert_eq!(search.baseline(), Some(4.0));
    search.update(&[8.0, 10.0]).unwrap();
    assert!((search.baseline().unwrap() - 5.0).abs() < 1e-12);
    search.skip_step().unwrap();
    assert_eq!(search.step(), 3);
}

/// Runs a search in which each unit is worth its own amount, and returns what it comes to.
fn search_for(worth: &[GroupImportance], dense: &ModelSpec, settings: PolicySettings) -> KeepMask {
    let start = constant(dense, 0.5);
    let mut search = PolicyGradient::new(settings, start).unwrap();
    while !search.is_done() {
        let losses: Vec<f64> = (0..search.settings.samples_per_step)
            .map(|sample| {
                let mask = search.sample(sample);
                let lost = |worth: &[f64], kept: &[bool]| -> f64 {
                    worth.iter().zip(kept).filter(|(_, kept)| !**kept).map(|(worth, _)| worth).sum()
                };
                let layers = worth.iter().zip(&mask.layers);
                layers
                    .map(|(worth, kept)| {
                        lost(&worth.attention, &kept.attention) + lost(&worth.mlp, &kept.mlp)
                    })
                    .sum()
            })
            .collect();
        search.update(&losses).unwrap();
        for of_layer in search.probabilities() {
            for block in BLOCKS {
                assert!(of_layer.of(block).iter().all(|value| (0.0..=1.0).contains(value)));
            }
        }
    }
    search.select(dense).unwrap()
}

#[test]
fn a_search_finds_the_units_that_are_worth_most() {
    let dense = model(2, 8, 4, 6);
    // Each block's best half, over both layers: uneven between them.
    let worth = importances(&dense, HeadGrouping::KvGroups, |layer, block, unit| match (layer, block) {
        (0, Block::Attention) => [0.1, 0.9, 0.2, 0.3][unit],
        (_, Block::Attention) => [1.0, 0.25, 1.1, 0.8][unit],
        (0, Block::Mlp) => [0.9, 0.2, 1.0, 0.8, 1.1, 0.15][unit],
        (_, Block::Mlp) => [0.1, 0.7, 0.05, 0.3, 1.2, 0.25][unit],
    });
    for estimator in [Estimator::Strict, Estimator::Faithful] {
        let settings = |scope| PolicySettings {
            learning_rate: 0.01,
            step_count: 5000,
            samples_per_step: 4,
            ..settings(estimator, scope, 2)
        };
        let found = search_for(&worth, &dense, settings(Scope::Model));
        assert_eq!(found.layers[0].kv_heads, [1]);
        assert_eq!(found.layers[0].query_heads, [2, 3]);
        assert_eq!(found.layers[1].kv_heads, [0, 2, 3]);
        assert_eq!(found.layers[0].channels, [0, 2, 3, 4]);
        assert_eq!(found.layers[1].channels, [1, 4]);
        let found = search_for(&worth, &dense, settings(Scope::Layer));
        assert_eq!(found.layers[0].kv_heads, [1, 3]);
        assert_eq!(found.layers[1].kv_heads, [0, 2]);
        assert_eq!(found.layers[0].channels, [0, 2, 4]);
        assert_eq!(found.layers[1].channels, [1, 3, 4]);
        found.check_fits(&dense).unwrap();
    }
}

#[test]
fn draws_depend_on_their_names_and_on_nothing_else() {
    let settings = |layers| settings(Estimator::Strict, Scope::Layer, layers);
    let (narrow, wide) = (model(2, 8, 4, 60), model(3, 16, 8, 200));
    let mut one = PolicyGradient::new(settings(2), constant(&narrow, 0.5)).unwrap();
    let other = PolicyGradient::new(settings(3), constant(&wide, 0.5)).unwrap();
    let (late, early) = (one.sample(1), one.sample(0));
    assert_eq!((early.clone(), late.clone()), (one.sample(0), one.sample(1)));
    for (of_narrow, of_wide) in late.layers.iter().zip(&other.sample(1).layers) {
        assert_eq!(of_narrow.attention, of_wide.attention[..4]);
        assert_eq!(of_narrow.mlp, of_wide.mlp[..60]);
    }
    assert_ne!(early, late);
    assert_ne!(late.layers[0], late.layers[1]);
    let again =
        PolicyGradient::new(PolicySettings { seed: 6, ..settings(2) }, constant(&narrow, 0.5)).unwrap();
    assert_ne!(again.sample(1), late);
    one.skip_step().unwrap();
    assert_ne!(one.sample(1), late);
    let kept = other.sample(7).layers.iter().flat_map(|layer| layer.mlp.clone()).filter(|kept| *kept).count();
    assert!((240..360).contains(&kept), "{kept} of 600 at a probability of one half");
}

#[test]
fn units_of_unprunable_layers_always_stay_and_count_in_no_budget() {
    let dense = model(3, 4, 2, 10);
    let settings = PolicySettings {
        prunable: vec![false, true, true],
        mlp_keep_share: 0.3,
        ..settings(Estimator::Faithful, Scope::Model, 3)
    };
    let mut search = PolicyGradient::new(settings, constant(&dense, 0.4)).unwrap();
    search.update(&[1.0, 4.0]).unwrap();
    assert_eq!(search.probabilities()[0], constant(&dense, 1.0)[0]);
    assert_eq!(search.sample(0).layers[0].mlp, [true; 10]);
    let mask = search.select(&dense).unwrap();
    assert_eq!(mask.layers[0], LayerKeep::full(&dense.layers[0]));
    assert_eq!(mask.layers[1].channels.len() + mask.layers[2].channels.len(), 6);
}

#[test]
fn exactly_the_asked_count_is_kept_and_every_layer_keeps_one_unit() {
    let dense = model(2, 8, 4, 10);
    // All alike: of equal ones the first go.
    let alike =
        PolicyGradient::new(settings(Estimator::Strict, Scope::Layer, 2), constant(&dense, 0.5)).unwrap();
    let mask = alike.select(&dense).unwrap();
    assert_eq!(mask.layers[0].kv_heads, [2, 3]);
    assert_eq!(mask.layers[1].channels, [5, 6, 7, 8, 9]);
    // All of the first layer is worth less than all of the second, and stays by one unit.
    let start = importances(
        &dense,
        HeadGrouping::KvGroups,
        |layer, _, unit| if layer == 0 && unit != 1 { 0.0 } else { 0.4 },
    );
    let uneven = PolicyGradient::new(
        PolicySettings { mlp_keep_share: 0.1, ..settings(Estimator::Strict, Scope::Model, 2) },
        start,
    )
    .unwrap();
    let mask = uneven.select(&dense).unwrap();
    assert_eq!(mask.layers[0].channels, [1]);
    assert_eq!(mask.layers[1].channels, [9]);
    mask.check_fits(&dense).unwrap();
    assert!(matches!(uneven.select(&model(2, 8, 4, 9)), Err(PolicyError::UnitCount { block: "mlp", .. })));
    assert!(matches!(uneven.select(&model(1, 8, 4, 10)), Err(PolicyError::LayerCount { .. })));
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let dense = model(2, 4, 2, 4);
    let good = || settings(Estimator::Faithful, Scope::Model, 2);
    for (settings, what) in [
        (PolicySettings { learning_rate: f64::NAN, ..good() }, "learning_rate"),
        (PolicySettings { step_count: 0, ..good() }, "step_count"),
        (PolicySettings { samples_per_step: 1, ..good() }, "samples_per_step"),
        (PolicySettings { baseline_window: 0.5, ..good() }, "baseline_window"),
        (PolicySettings { mlp_keep_share: 0.0, ..good() }, "mlp_keep_share"),
        (PolicySettings { attention_keep_share: 1.5, ..good() }, "attention_keep_share"),
    ] {
        match PolicyGradient::new(settings, constant(&dense, 0.5)) {
            Err(PolicyError::Setting { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        }
    }
    let short = PolicyGradient::new(settings(Estimator::Strict, Scope::Model, 3), constant(&dense, 0.5));
    assert_eq!(short, Err(PolicyError::LayerCount { expected: 3, actual: 2 }));
    let wrong = PolicyGradient::new(good(), constant(&dense, 1.5)).unwrap_err();
    assert_eq!(
        wrong.to_string(),
        "layer 0: keep probability of attention unit 0 is 1.5; it must lie in [0, 1]"
    );
    let mut search =
        PolicyGradient::new(PolicySettings { step_count: 1, ..good() }, constant(&dense, 0.5)).unwrap();
    let before = search.clone();
    assert_eq!(search.update(&[1.0]), Err(PolicyError::LossCount { expected: 2, actual: 1 }));
    assert_eq!(
        search.update(&[1.0, f64::INFINITY]),
        Err(PolicyError::Loss { sample: 1, value: f64::INFINITY })
    );
    assert!(matches!(search.update(&[1.7e308, -1.7e308]), Err(PolicyError::Overflow { layer: 0, .. })));
    assert_eq!(search, before);
    search.update(&[1.0, 2.0]).unwrap();
    assert_eq!(search.update(&[1.0, 2.0]), Err(PolicyError::Done { step_count: 1 }));
    assert_eq!(search.skip_step(), Err(PolicyError::Done { step_count: 1 }));
}

#[test]
fn a_search_that_was_written_down_goes_on_as_if_nothing_had_happened() {
    let dense = model(2, 8, 4, 12);
    let mut search =
        PolicyGradient::new(settings(Estimator::Faithful, Scope::Model, 2), constant(&dense, 0.3)).unwrap();
    search.update(&[3.0, 1.5]).unwrap();
    let written = serde_json::to_string(&search).unwrap();
    let mut other: PolicyGradient = serde_json::from_str(&written).unwrap();
    assert_eq!(search, other);
    for losses in [[1.0, 2.0], [0.1, 0.7]] {
        assert_eq!(search.sample(1), other.sample(1));
        search.update(&losses).unwrap();
        other.update(&losses).unwrap();
        assert_eq!(search, other);
    }
    for (from, to) in
        [("0.3", "1.3"), ("[true,true]", "[true]"), ("\"samples_per_step\":2", "\"samples_per_step\":1")]
    {
        let broken = written.replacen(from, to, 1);
        assert_ne!(broken, written, "{from}");
        assert!(serde_json::from_str::<PolicyGradient>(&broken).is_err(), "{from}");
    }
}

#[test]
fn the_learning_rate_falls_along_half_a_cosine() {
    let settings = PolicySettings { step_count: 100, ..settings(Estimator::Strict, Scope::Model, 1) };
    for (step, share) in [(0, 1.0), (50, 0.5), (100, 0.0)] {
        assert!((settings.learning_rate_at(step) - share * settings.learning_rate).abs() < 1e-15);
    }
}

proptest! {
    #[test]
    fn a_warm_start_is_within_the_budget_and_keeps_the_order(seed: u64, share in 0.1f64..1.0, by_layer: bool) {
        let dense = model(2, 8, 4, 12);
        let importances = crate::random_importances(&dense, &KeepMask::full(&dense), seed, HeadGrouping::KvGroups);
        let scope = if by_layer { Scope::Layer } else { Scope::Model };
        let settings = PolicySettings {
            mlp_keep_share: share,
            attention_keep_share: share,
            ..settings(Estimator::Faithful, scope, 2)
        };
        let search = PolicyGradient::warm_started(settings, &importances).unwrap();
        let sum = |block| -> f64 { search.probabilities().iter().flat_map(|layer| layer.of(block)).sum() };
        prop_assert!(sum(Block::Mlp) <= share * 24.0 + 1e-9);
        prop_assert!(sum(Block::Attention) <= share * 8.0 + 1e-9);
        for (layer, importances) in search.probabilities().iter().zip(&importances) {
            for one in 0..12 {
                for other in 0..12 {
                    prop_assert!(importances.mlp[one] < importances.mlp[other] || layer.mlp[one] >= layer.mlp[other]);
                }
            }
        }
    }

    #[test]
    fn every_step_stays_within_the_budget(seed: u64, losses in prop::collection::vec(-100.0f64..100.0, 20)) {
        let dense = model(2, 8, 4, 12);
        let settings = PolicySettings { seed, ..settings(Estimator::Strict, Scope::Model, 2) };
        let mut search = PolicyGradient::new(settings, constant(&dense, 0.5)).unwrap();
        for losses in losses.chunks(2) {
            search.update(losses).unwrap();
            let sum = |block| -> f64 { search.probabilities().iter().flat_map(|layer| layer.of(block)).sum() };
            prop_assert!(sum(Block::Mlp) <= 12.0 + 1e-9);
            prop_assert!(sum(Block::Attention) <= 4.0 + 1e-9);
        }
    }
}
