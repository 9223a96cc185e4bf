use crate::*;
use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use proptest::prelude::*;
use pruning::{KeepMask, LayerKeep};

fn model(layers: usize, query_heads: usize, kv_heads: usize, channels: usize) -> ModelSpec {
    let widths =
        LayerSpec { query_head_count: query_heads, kv_head_count: kv_heads, intermediate_size: channels };
    ModelSpec {
        family: Family::Llama,
        hidden_size: 8,
        head_dim: 2,
        vocab_size: 16,
        max_position_embeddings: 32,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        layers: vec![widths; layers],
    }
}

fn held(query_heads: &[usize], kv_heads: &[usize], channels: &[usize]) -> RankLayer {
    RankLayer { query_heads: query_heads.to_vec(), kv_heads: kv_heads.to_vec(), channels: channels.to_vec() }
}

/// A list may exceed the fair share by this much before it is dealt out anew.
fn within_tolerance(sizes: &[usize]) -> bool {
    let fair = sizes.iter().sum::<usize>().div_ceil(sizes.len());
    let fullest = sizes.iter().copied().max().unwrap_or(0);
    fullest <= fair + (0.02 * fair as f64) as usize
}

#[test]
fn three_key_value_heads_on_two_ranks_are_dealt_out_whole() {
    let placement = Placement::dense(&model(1, 9, 3, 5), 2).unwrap();
    assert_eq!(placement.ranks[0][0], held(&[0, 1, 2], &[0], &[0, 1]));
    assert_eq!(placement.ranks[1][0], held(&[3, 4, 5, 6, 7, 8], &[1, 2], &[2, 3, 4]));
}

#[test]
fn degrees_without_a_head_for_every_rank_are_refused() {
    let mut dense = model(3, 9, 3, 5);
    assert_eq!(Placement::dense(&dense, 0), Err(PlacementError::NoRanks));
    dense.layers[2].kv_head_count = 1;
    let expected = PlacementError::TooFewHeads { tp_degree: 3, kv_heads: 1, layer: 2 };
    assert_eq!(expected.to_string().matches("use at most 1 workers").count(), 1);
    assert_eq!(Placement::dense(&dense, 3), Err(expected));
}

#[test]
fn the_fullest_rank_gives_its_last_groups_to_the_emptiest() {
    let dense = model(1, 8, 8, 10);
    let mask = KeepMask {
        layers: vec![LayerKeep {
            query_heads: vec![0, 1, 2, 5],
            kv_heads: vec![0, 1, 2, 5],
            channels: vec![0, 1, 2, 3, 4, 9],
        }],
    };
    let restricted = Placement::dense(&dense, 2).unwrap().restricted_to(&mask);
    assert_eq!(restricted.ranks[0][0], held(&[0, 1, 2], &[0, 1, 2], &[0, 1, 2, 3, 4]));
    let balanced = restricted.rebalanced(&dense);
    assert_eq!(balanced.ranks[0][0], held(&[0, 1], &[0, 1], &[0, 1, 2]));
    assert_eq!(balanced.ranks[1][0], held(&[2, 5], &[2, 5], &[3, 4, 9]));
    let to_one = |unit| Move { unit, from_rank: 0, to_rank: 1 };
    assert_eq!(
        restricted.moves_to(&balanced).layers,
        [LayerMoves { kv_heads: vec![to_one(2)], channels: vec![to_one(3), to_one(4)] }]
    );
    assert!(balanced.moves_to(&balanced).is_empty());
    assert!(!restricted.moves_to(&balanced).is_empty());
}

#[test]
fn what_only_one_placement_holds_does_not_move() {
    let dense = model(1, 4, 4, 4);
    let full = Placement::dense(&dense, 2).unwrap();
    let mut less = full.clone();
    less.ranks[0][0] = held(&[0, 2], &[0, 2], &[1]);
    less.ranks[1][0] = held(&[3], &[3], &[0, 2, 3]);
    let moves = full.moves_to(&less);
    assert_eq!(moves.layers[0].kv_heads, [Move { unit: 2, from_rank: 1, to_rank: 0 }]);
    assert_eq!(moves.layers[0].channels, [Move { unit: 0, from_rank: 0, to_rank: 1 }]);
    assert_eq!(Placement { ranks: vec![] }.moves_to(&full), Moves { layers: vec![LayerMoves::default()] });
}

#[test]
fn small_differences_stay_where_they_are() {
    let dense = model(1, 4, 4, 1000);
    let full = Placement::dense(&dense, 2).unwrap();
    for (removed, moves) in [(0, 0), (19, 0), (40, 20)] {
        let mut mask = KeepMask::full(&dense);
        mask.layers[0].channels.drain(..removed);
        let restricted = full.restricted_to(&mask);
        let found = restricted.moves_to(&restricted.rebalanced(&dense));
        assert_eq!(found.layers[0].channels.len(), moves, "{removed} removed");
    }
}

/// Successive masks of `dense`, each below the one before; key/value groups whole.
fn shrinking_masks(dense: &ModelSpec, picks: &[Vec<bool>]) -> Vec<KeepMask> {
    let mut mask = KeepMask::full(dense);
    picks
        .iter()
        .enumerate()
        .map(|(round, picks)| {
            for (layer, keep) in mask.layers.iter_mut().enumerate() {
                let pick = |index: usize| picks[(index * 7 + layer * 3 + round) % picks.len()];
                let most = keep.kv_heads.len();
                let mut kv_left = most;
                keep.kv_heads.retain(|&head| {
                    let stays = pick(head) || kv_left == 1;
                    kv_left -= usize::from(!stays);
                    stays
                });
                let kv_heads = keep.kv_heads.clone();
                keep.query_heads.retain(|&head| kv_heads.contains(&dense.layers[layer].kv_head_of(head)));
                let mut channels_left = keep.channels.len();
                keep.channels.retain(|&channel| {
                    let stays = pick(channel + 11) || channels_left == 1;
                    channels_left -= usize::from(!stays);
                    stays
                });
            }
            mask.clone()
        })
        .collect()
}

fn check_covers(placement: &Placement, dense: &ModelSpec, mask: &KeepMask) -> Result<(), TestCaseError> {
    for (layer, keep) in mask.layers.iter().enumerate() {
        for (kept, units) in [
            (&keep.query_heads, (|held| &held.query_heads) as fn(&RankLayer) -> &Vec<usize>),
            (&keep.kv_heads, |held| &held.kv_heads),
            (&keep.channels, |held| &held.channels),
        ] {
            let mut all = Vec::new();
            for rank in &placement.ranks {
                prop_assert!(units(&rank[layer]).is_sorted(), "each rank's units ascend");
                all.extend_from_slice(units(&rank[layer]));
            }
            all.sort_unstable();
            prop_assert_eq!(&all, kept, "every live unit lies on exactly one rank");
        }
        for rank in &placement.ranks {
            for query_head in &rank[layer].query_heads {
                let kv_head = dense.layers[layer].kv_head_of(*query_head);
                prop_assert!(
                    rank[layer].kv_heads.contains(&kv_head),
                    "query heads lie beside their key/value head"
                );
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn successive_masks_keep_every_unit_on_one_rank_and_the_ranks_even_at_least_cost(
        tp_degree in 1usize..5,
        kv_heads in 4usize..12,
        per_kv in 1usize..4,
        channels in 4usize..300,
        picks in proptest::collection::vec(proptest::collection::vec(proptest::bool::weighted(0.8), 5..40), 1..5),
    ) {
        let dense = model(2, kv_heads * per_kv, kv_heads, channels);
        let mut placement = Placement::dense(&dense, tp_degree).unwrap();
        check_covers(&placement, &dense, &KeepMask::full(&dense))?;
        prop_assert!(placement.moves_to(&placement.rebalanced(&dense)).is_empty(), "dense shares are even");
        for mask in shrinking_masks(&dense, &picks) {
            mask.check_fits(&dense).unwrap();
            let restricted = placement.restricted_to(&mask);
            check_covers(&restricted, &dense, &mask)?;
            prop_assert!(placement.moves_to(&restricted).is_empty(), "restricting moves nothing");
            let balanced = restricted.rebalanced(&dense);
            check_covers(&balanced, &dense, &mask)?;
            prop_assert_eq!(&balanced, &restricted.clone().rebalanced(&dense), "the same for everyone");
            prop_assert_eq!(&balanced, &balanced.rebalanced(&dense), "nothing is left to do");

            let moves = restricted.moves_to(&balanced);
            for (layer, moves) in moves.layers.iter().enumerate() {
                for (moves, units) in [
                    (&moves.kv_heads, (|held| &held.kv_heads) as fn(&RankLayer) -> &Vec<usize>),
                    (&moves.channels, |held| &held.channels),
                ] {
                    let sizes = |placement: &Placement| -> Vec<usize> {
                        placement.ranks.iter().map(|rank| units(&rank[layer]).len()).collect()
                    };
                    let (before, after) = (sizes(&restricted), sizes(&balanced));
                    prop_assert!(within_tolerance(&after), "{after:?}");
                    let total: usize = before.iter().sum();
                    // No placement with sizes that differ by at most one costs less: what lies above the larger of the
                    // two fair sizes must move, and so must what fills the others up to the smaller.
                    let (floor, ceil) = (total / tp_degree, total.div_ceil(tp_degree));
                    let above: usize = before.iter().map(|size| size.saturating_sub(ceil)).sum();
                    let below: usize = before.iter().map(|size| floor.saturating_sub(*size)).sum();
                    let expected = if within_tolerance(&before) { 0 } else { above.max(below) };
                    prop_assert_eq!(moves.len(), expected, "{:?} to {:?}", before, after);
                    prop_assert!(moves.is_sorted_by_key(|one| one.unit));
                    for one in moves {
                        prop_assert!(units(&restricted.ranks[one.from_rank][layer]).contains(&one.unit));
                        prop_assert!(units(&balanced.ranks[one.to_rank][layer]).contains(&one.unit));
                        prop_assert!(one.from_rank != one.to_rank);
                    }
                }
            }
            placement = balanced;
        }
    }

    #[test]
    fn vocabulary_rows_cut_the_vocabulary_evenly_and_without_gaps(vocab in 0usize..500, tp_degree in 1usize..9) {
        let parts: Vec<_> = (0..tp_degree).map(|rank| vocabulary_rows(vocab, tp_degree, rank)).collect();
        prop_assert_eq!(parts[0].start, 0);
        prop_assert_eq!(parts[tp_degree - 1].end, vocab);
        prop_assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        let sizes: Vec<usize> = parts.iter().map(ExactSizeIterator::len).collect();
        prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
    }
}
