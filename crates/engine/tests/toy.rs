//! The toy engine keeps the promises of the traits, and its masks do not depend on the tensor-parallel degree.

use engine::toy::{ToyEngine, ToyFault};
use engine::{
    Engine, EngineError, ExportDtype, ExportJob, ProjectionScores, ShardEngine, ShardSetup, conformance,
};
use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use pruning::KeepMask;
use recipe::{Criterion, Pruning, Recipe, Shrink};
use sharding::Placement;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

fn dense() -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        hidden_size: 48,
        head_dim: 8,
        vocab_size: 96,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        layers: vec![LayerSpec { query_head_count: 6, kv_head_count: 3, intermediate_size: 40 }; 3],
    }
}

fn setup(tp_rank: usize, tp_degree: usize, shrink: Shrink) -> ShardSetup {
    ShardSetup {
        model: "/not/read".into(),
        recipe: Recipe { pruning: Some(Pruning { shrink, ..Pruning::published() }), ..Recipe::default() },
        tp_rank,
        tp_degree,
        collective_timeout: Duration::from_millis(50),
    }
}

#[test]
fn the_toy_engine_keeps_the_promises_of_the_traits() {
    let scratch = tempfile::tempdir().unwrap();
    conformance::check(&ToyEngine::new(dense()), Path::new("/not/read"), &dense(), scratch.path());
}

type Place = (usize, Projection, usize);

/// Scores by their place in the unpruned model.
fn by_place(scores: &[ProjectionScores], held: &[sharding::RankLayer], all: &mut BTreeMap<Place, f64>) {
    for ProjectionScores { layer, projection, values } in scores {
        let units = match projection {
            Projection::Q | Projection::O => &held[*layer].query_heads,
            Projection::K | Projection::V => &held[*layer].kv_heads,
            Projection::Gate | Projection::Up | Projection::Down => &held[*layer].channels,
        };
        assert_eq!(units.len(), values.len());
        for (unit, value) in units.iter().zip(values) {
            assert!(all.insert((*layer, *projection, *unit), *value).is_none(), "two ranks scored one group");
        }
    }
}

#[test]
fn ranks_together_score_what_one_rank_scores_before_and_after_a_mask() {
    let dense = dense();
    let mut mask = KeepMask::full(&dense);
    for keep in &mut mask.layers {
        keep.kv_heads = vec![1, 2];
        keep.query_heads = vec![2, 3, 4, 5];
        keep.channels.drain(..15);
    }
    for shrink in [Shrink::Live, Shrink::Never] {
        let scores_of = |tp_degree: usize| {
            let mut ranks: Vec<Box<dyn ShardEngine>> = (0..tp_degree)
                .map(|rank| ToyEngine::new(dense.clone()).load(setup(rank, tp_degree, shrink)).unwrap())
                .collect();
            let mut placement = Placement::dense(&dense, tp_degree).unwrap();
            let (mut losses, mut all) = (Vec::new(), Vec::new());
            for step in 0..4 {
                if step == 2 {
                    placement = placement.restricted_to(&mask);
                    if shrink == Shrink::Live {
                        placement = placement.rebalanced(&dense);
                    }
                }
                let mut of_step = BTreeMap::new();
                for (rank, shard) in ranks.iter_mut().enumerate() {
                    if step == 0 && tp_degree > 1 {
                        let rendezvous = engine::Rendezvous(b"toy:here".to_vec());
                        shard.join_group(&rendezvous, "here").unwrap();
                    }
                    if step == 2 {
                        shard.apply_mask(1, &mask, &[]).unwrap();
                    }
                    let outcome = shard.train_step(step, &[vec![&[1, 2, 3]]]).unwrap();
                    losses.push((step, outcome.loss.to_bits()));
                    by_place(&outcome.scores, &placement.ranks[rank], &mut of_step);
                }
                all.push(of_step);
            }
            losses.sort_unstable();
            losses.dedup();
            (losses, all)
        };
        let alone = scores_of(1);
        assert_eq!(alone.0.len(), 4);
        assert_eq!(alone.1[0].len(), 3 * (6 + 3 + 3 + 6 + 3 * 40));
        assert_eq!(alone.1[2].len(), 3 * (4 + 2 + 2 + 4 + 3 * 25));
        assert!(scores_of(2) == alone && scores_of(3) == alone, "{shrink:?}");
    }
}

#[test]
fn groups_that_move_are_counted() {
    let dense = dense();
    let mut mask = KeepMask::full(&dense);
    for keep in &mut mask.layers {
        // Rank 0 of 2 loses all channels but one; rank 1 keeps its twenty.
        keep.channels.drain(..19);
    }
    let mut received = 0;
    for rank in 0..2 {
        let mut shard = ToyEngine::new(dense.clone()).load(setup(rank, 2, Shrink::Live)).unwrap();
        received += shard.apply_mask(1, &mask, &[]).unwrap().received_groups;
    }
    assert!(received >= 3 * 9, "{received} groups moved");
}

#[test]
fn the_random_criterion_needs_no_scores() {
    let mut setup = setup(0, 1, Shrink::Live);
    setup.recipe.pruning.as_mut().unwrap().criterion = Criterion::Random;
    let mut shard = ToyEngine::new(dense()).load(setup).unwrap();
    assert!(shard.train_step(0, &[vec![&[1, 2]]]).unwrap().scores.is_empty());
}

#[test]
fn faults_happen_at_their_step_alone() {
    for fault in [ToyFault::NotFinite, ToyFault::PeerLost, ToyFault::PeerSilent, ToyFault::DeviceFailed] {
        let engine = ToyEngine::new(dense()).with_fault(1, fault);
        let mut shard = engine.load(setup(0, 1, Shrink::Live)).unwrap();
        let rows: [Vec<&[u32]>; 1] = [vec![&[1, 2]]];
        shard.train_step(0, &rows).unwrap();
        let started = Instant::now();
        let error = shard.train_step(1, &rows).unwrap_err();
        match fault {
            ToyFault::NotFinite => assert!(matches!(error, EngineError::NotFinite { step: 1, .. })),
            ToyFault::PeerLost => assert!(matches!(error, EngineError::Collective(_))),
            ToyFault::PeerSilent => {
                assert!(matches!(error, EngineError::Collective(_)));
                assert!(started.elapsed() >= Duration::from_millis(50));
            }
            ToyFault::DeviceFailed => assert!(matches!(error, EngineError::Device(_))),
            ToyFault::Panic => unreachable!("not among the faults above"),
        }
        shard.train_step(2, &rows).unwrap();
    }
}

#[test]
fn an_export_checks_its_shards_and_leaves_a_folder() {
    let scratch = tempfile::tempdir().unwrap();
    let engine = ToyEngine::new(dense());
    let mut shard = engine.load(setup(0, 1, Shrink::Live)).unwrap();
    let file = scratch.path().join("rank-0.safetensors");
    let sha256 = shard.checkpoint(&file, &[vec![1]]).unwrap();
    let job = ExportJob {
        model: "/not/read".into(),
        recipe: Recipe::default(),
        shards: vec![(file.clone(), sha256)],
        keep_mask: KeepMask::full(&dense()),
        out: scratch.path().join("out"),
        dtype: ExportDtype::Source,
        max_shard_bytes: 1 << 20,
        run_id: "run-1".into(),
    };
    let written = engine.export(&job).unwrap();
    assert_eq!(written.parameters, dense().parameter_count());
    assert!(job.out.join("config.json").is_file());
    assert!(matches!(engine.export(&job), Err(EngineError::Refused(_))), "the folder is not empty any more");
    std::fs::write(&file, "tampered").unwrap();
    let elsewhere = ExportJob { out: scratch.path().join("other"), ..job };
    assert!(matches!(engine.export(&elsewhere), Err(EngineError::File(_))));
    assert!(!elsewhere.out.exists());
}
