//! The toy engine keeps the promises of the traits, and its masks do not depend on the tensor-parallel degree.

use engine::toy::{ToyEngine, ToyFault};
use engine::{
    Engine, EngineError, ExportDtype, ExportJob, MOST_SKIPPED, Progress, ProjectionScores, Restore,
    ShardEngine, ShardSetup, conformance,
};
use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use pruning::KeepMask;
use recipe::{Criterion, Pruning, Recipe, Shrink};
use sharding::Placement;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
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
        restore: None,
        progress: Arc::new(Progress::default()),
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
    for fault in [ToyFault::PeerLost, ToyFault::PeerSilent, ToyFault::DeviceFailed] {
        let engine = ToyEngine::new(dense()).with_fault(1, fault);
        let mut shard = engine.load(setup(0, 1, Shrink::Live)).unwrap();
        let rows: [Vec<&[u32]>; 1] = [vec![&[1, 2]]];
        shard.train_step(0, &rows).unwrap();
        let started = Instant::now();
        let error = shard.train_step(1, &rows).unwrap_err();
        match fault {
            ToyFault::PeerLost => assert!(matches!(error, EngineError::Collective(_))),
            ToyFault::PeerSilent => {
                assert!(matches!(error, EngineError::Collective(_)));
                assert!(started.elapsed() >= Duration::from_millis(50));
            }
            ToyFault::DeviceFailed => assert!(matches!(error, EngineError::Device(_))),
            ToyFault::NotFinite | ToyFault::NotFiniteOnce | ToyFault::Stuck | ToyFault::Panic => {
                unreachable!("not among the faults above")
            }
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
    let sha256 = shard.snapshot(&[vec![1]]).unwrap().write(&file).unwrap();
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

#[test]
fn a_number_that_is_not_finite_skips_its_step_and_too_many_in_a_row_are_an_error() {
    let rows: [Vec<&[u32]>; 1] = [vec![&[1, 2]]];
    let load = |fault| ToyEngine::new(dense()).with_fault(1, fault).load(setup(0, 1, Shrink::Live)).unwrap();
    let mut shard = load(ToyFault::NotFiniteOnce);
    let skipped = |step, shard: &mut Box<dyn ShardEngine>| {
        let outcome = shard.train_step(step, &rows).unwrap();
        assert_eq!(outcome.skipped.is_some(), outcome.scores.is_empty());
        outcome.skipped.is_some()
    };
    assert_eq!((0..4).map(|step| skipped(step, &mut shard)).collect::<Vec<_>>(), [false, true, false, false]);
    let mut shard = load(ToyFault::NotFinite);
    assert!(!skipped(0, &mut shard));
    for step in 1..=u64::from(MOST_SKIPPED) {
        assert!(skipped(step, &mut shard));
    }
    let error = shard.train_step(u64::from(MOST_SKIPPED) + 1, &rows).unwrap_err();
    assert!(matches!(error, EngineError::NotFinite { .. }), "{error}");
}

#[test]
fn a_fault_that_passes_happens_once_however_often_the_step_is_taken() {
    let engine = ToyEngine::new(dense()).with_passing_fault(1, ToyFault::PeerLost);
    let rows: [Vec<&[u32]>; 1] = [vec![&[1, 2]]];
    for failures in [1, 0] {
        let mut shard = engine.load(setup(0, 1, Shrink::Live)).unwrap();
        let failed = (0..3).filter(|step| shard.train_step(*step, &rows).is_err()).count();
        assert_eq!(failed, failures);
    }
}

#[test]
fn a_stuck_thread_ends_when_it_is_told_to_give_up() {
    let engine = ToyEngine::new(dense()).with_fault(0, ToyFault::Stuck);
    let setup = setup(0, 1, Shrink::Live);
    let progress = setup.progress.clone();
    let mut shard = engine.load(setup).unwrap();
    let ticks = progress.counts().ticks;
    std::thread::scope(|scope| {
        let stuck = progress.clone();
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(stuck.counts().ticks, ticks, "a stuck thread does not tick");
            stuck.give_up();
        });
        let error = shard.train_step(0, &[vec![&[1, 2]]]).unwrap_err();
        assert!(matches!(error, EngineError::Collective(_)));
    });
}

#[test]
fn a_group_of_another_degree_goes_on_alike() {
    let (dense, scratch) = (dense(), tempfile::tempdir().unwrap());
    let rows: [Vec<&[u32]>; 1] = [vec![&[1, 2, 3]]];
    let mut mask = KeepMask::full(&dense);
    for keep in &mut mask.layers {
        keep.channels.drain(..19);
    }
    let group = |degree: usize, restore: Option<&Restore>| -> Vec<Box<dyn ShardEngine>> {
        let load = |rank| {
            let setup = ShardSetup { restore: restore.cloned(), ..setup(rank, degree, Shrink::Live) };
            let mut shard = ToyEngine::new(dense.clone()).load(setup).unwrap();
            shard.join_group(&engine::Rendezvous(b"toy:here".to_vec()), "here").unwrap();
            shard
        };
        (0..degree).map(load).collect()
    };
    let mut first = group(2, None);
    let mut shards = Vec::new();
    for (rank, shard) in first.iter_mut().enumerate() {
        shard.train_step(0, &rows).unwrap();
        shard.apply_mask(1, &mask, &[]).unwrap();
        let file = scratch.path().join(format!("rank-{rank}"));
        let sha256 = shard.snapshot(&[]).unwrap().write(&file).unwrap();
        shards.push((file, sha256));
    }
    let restore = Restore { shards, generation: 1, next_step: 1, keep_mask: mask.clone() };
    let scores = |group: &mut Vec<Box<dyn ShardEngine>>| {
        let placement =
            Placement::dense(&dense, group.len()).unwrap().restricted_to(&mask).rebalanced(&dense);
        let mut all = BTreeMap::new();
        for (rank, shard) in group.iter_mut().enumerate() {
            let outcome = shard.train_step(1, &rows).unwrap();
            by_place(&outcome.scores, &placement.ranks[rank], &mut all);
        }
        all
    };
    let expected = scores(&mut first);
    for degree in [1, 2, 3] {
        assert!(scores(&mut group(degree, Some(&restore))) == expected, "degree {degree}");
    }
}
