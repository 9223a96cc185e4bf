//! A group that was killed and one that never was: the same bits from a checkpoint on, at the degree that wrote it, for all
//! that a recipe may choose; the same numbers but for rounding at another.

use crate::shard::Shard;
use crate::tests::group::{fixtures, spec_of};
use engine::{EngineError, Progress, ProjectionScores, Rendezvous, Restore, ShardEngine, ShardSetup};
use pruning::{KeepMask, LayerKeep};
use recipe::{
    Batch, Chain, Compensation, Compute, Criterion, Distillation, LeastSquares, Lora, LoraRite, Optimizer,
    Precision, Pruning, Recipe, Recompute, Shrink, Storage,
};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};
use tch::Device;

const MODEL: &str = "gqa";
const STEPS: u64 = 7;
/// The group is killed before this step.
const KILLED_AT: u64 = 4;

const F64: Precision = Precision { compute: Compute::F64, storage: Storage::F64 };
const DISTILLATION: Option<Distillation> = Some(Distillation { weight: 0.5, top_k: 4 });

/// Masks by the step after which they are put into force.
fn masks() -> Vec<(u64, KeepMask)> {
    let spec = spec_of(MODEL);
    let mask = |first_channel: usize, heads: &[usize]| KeepMask {
        layers: spec
            .layers
            .iter()
            .map(|widths| {
                let mut keep = LayerKeep::full(widths);
                keep.kv_heads.retain(|head| heads.contains(head));
                keep.query_heads.retain(|query| keep.kv_heads.contains(&widths.kv_head_of(*query)));
                // The first rank loses most, so that channels move.
                keep.channels.retain(|channel| *channel >= first_channel && channel % 5 != 2);
                keep
            })
            .collect(),
    };
    let heads = spec.layers[0].kv_head_count;
    let (all, fewer): (Vec<usize>, Vec<usize>) = ((0..heads).collect(), (0..heads - 1).collect());
    let width = spec.layers[0].intermediate_size;
    vec![(1, mask(width / 4, &all)), (2, mask(width / 3, &all)), (5, mask(width / 2, &fewer))]
}

fn recipe(change: impl FnOnce(&mut Recipe)) -> Recipe {
    let pruning = Pruning { compensation: Compensation::None, ..Pruning::published() };
    let mut recipe = Recipe {
        seed: 11,
        steps: STEPS,
        batch: Batch { window_tokens: 16, rows: 2, micro_batches: 1 },
        lora: Lora { rank: 4, dropout: 0.1, ..Lora::default() },
        pruning: Some(pruning),
        precision: Precision { compute: Compute::F32, storage: Storage::F32 },
        ..Recipe::default()
    };
    change(&mut recipe);
    recipe
}

pub(crate) fn windows() -> Vec<Vec<u32>> {
    let vocab = spec_of(MODEL).vocab_size;
    let token = |row: usize, place: usize| ((row * 577 + place * place * 13 + place * 5) % vocab) as u32;
    (0..6).map(|row| (0..16).map(|place| token(row, place)).collect()).collect()
}

/// What a group did from one step on.
#[derive(Debug, Clone, PartialEq, Default)]
struct Course {
    /// Loss and norm of each step, as bits.
    numbers: Vec<(u64, u64)>,
    /// By rank, then step.
    scores: Vec<Vec<Vec<ProjectionScores>>>,
    /// Digests of the ranks' final files.
    files: Vec<String>,
}

pub(crate) fn setup_of(
    recipe: &Recipe,
    tp_rank: usize,
    tp_degree: usize,
    restore: Option<Restore>,
) -> ShardSetup {
    ShardSetup {
        model: fixtures().join("models").join(MODEL),
        recipe: recipe.clone(),
        tp_rank,
        tp_degree,
        collective_timeout: Duration::from_secs(60),
        restore,
        progress: Arc::default(),
    }
}

/// Trains from `first_step` to the end on `degree` ranks; at `KILLED_AT` all write their state to `folder`.
fn train(
    recipe: &Recipe,
    degree: usize,
    restore: Option<&Restore>,
    folder: &Path,
) -> (Course, Option<Restore>) {
    let first_step = restore.map_or(0, |restore| restore.next_step);
    let (windows, masks) = (windows(), masks());
    let meeting: Mutex<Option<Rendezvous>> = Mutex::default();
    let barrier = Barrier::new(degree);
    let one_rank = |tp_rank: usize| {
        tch::set_num_threads(1);
        let setup = setup_of(recipe, tp_rank, degree, restore.cloned());
        let mut shard = Shard::load(setup, Device::Cpu).unwrap();
        join(&mut shard, tp_rank, degree, &meeting, &barrier);
        let rows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        if recipe.distillation.is_some() && restore.is_none() {
            shard.teach(&rows).unwrap();
        }
        let (mut numbers, mut scores, mut saved, mut received) = (Vec::new(), Vec::new(), None, 0);
        for step in first_step..STEPS {
            if step == KILLED_AT && restore.is_none() {
                saved = Some(shard.snapshot(&[]).unwrap());
            }
            let batch = [vec![rows[step as usize % 6], rows[(step as usize + 2) % 6]]];
            let outcome = shard.train_step(step, &batch).unwrap();
            assert_eq!(outcome.skipped, None);
            numbers.push((outcome.loss.to_bits(), outcome.grad_norm.to_bits()));
            scores.push(outcome.scores);
            if let Some(place) = masks.iter().position(|(after, _)| *after == step) {
                let applied = shard.apply_mask(place as u64 + 1, &masks[place].1, &rows[..2]).unwrap();
                received += applied.received_groups;
            }
        }
        // Written elsewhere, when the shard is long past it.
        let saved = saved.map(|snapshot| {
            let file = folder.join(format!("rank-{tp_rank}"));
            let written = file.clone();
            let writes = std::thread::spawn(move || snapshot.write(&written).unwrap());
            (file, writes.join().unwrap())
        });
        let last = folder.join(format!("last-{first_step}-{degree}-{tp_rank}"));
        let digest = shard.snapshot(&windows[..1]).unwrap().write(&last).unwrap();
        let live = recipe.pruning.as_ref().is_some_and(|pruning| pruning.shrink == Shrink::Live);
        let emptiest = degree == 2 && tp_rank == 0;
        assert!(!(emptiest && live && restore.is_none()) || received > 0, "masks have groups change ranks");
        (numbers, scores, saved, digest)
    };
    let ended: Vec<_> = std::thread::scope(|scope| {
        let one_rank = &one_rank;
        let ranks: Vec<_> = (0..degree).map(|rank| scope.spawn(move || one_rank(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let mut course = Course { numbers: ended[0].0.clone(), ..Course::default() };
    let mut shards = Vec::new();
    for (numbers, scores, saved, digest) in ended {
        assert_eq!(numbers, course.numbers, "all ranks see the same numbers");
        course.scores.push(scores);
        course.files.push(digest);
        shards.extend(saved);
    }
    let in_force = masks.iter().filter(|(after, _)| *after < KILLED_AT).count();
    let restore = (!shards.is_empty()).then(|| Restore {
        shards,
        generation: in_force as u64,
        next_step: KILLED_AT,
        keep_mask: masks[in_force - 1].1.clone(),
    });
    (course, restore)
}

pub(crate) fn join(
    shard: &mut Shard,
    tp_rank: usize,
    degree: usize,
    meeting: &Mutex<Option<Rendezvous>>,
    barrier: &Barrier,
) {
    if degree == 1 {
        return;
    }
    if tp_rank == 0 {
        *meeting.lock().unwrap() = Some(shard.open_rendezvous("127.0.0.1").unwrap());
    }
    barrier.wait();
    let rendezvous = meeting.lock().unwrap().clone().unwrap();
    shard.join_group(&rendezvous, "127.0.0.1").unwrap();
}

/// The part of a course from the step on at which the group was killed.
fn from_killing(course: &Course) -> Course {
    let skipped = KILLED_AT as usize;
    Course {
        numbers: course.numbers[skipped..].to_vec(),
        scores: course.scores.iter().map(|steps| steps[skipped..].to_vec()).collect(),
        files: course.files.clone(),
    }
}

fn check(what: &str, degree: usize, recipe: &Recipe) {
    let folder = tempfile::tempdir().unwrap();
    let (whole, restore) = train(recipe, degree, None, folder.path());
    let (resumed, _) = train(recipe, degree, restore.as_ref(), folder.path());
    let expected = from_killing(&whole);
    assert_eq!(resumed.numbers, expected.numbers, "{what} on {degree}: losses and norms");
    assert!(resumed.scores == expected.scores, "{what} on {degree}: scores");
    assert_eq!(resumed.files, expected.files, "{what} on {degree}: final state and logits");
}

fn least_squares() -> Compensation {
    Compensation::LeastSquares(LeastSquares::default())
}

pub(crate) fn with_pruning(change: impl FnOnce(&mut Pruning)) -> Recipe {
    recipe(|recipe| change(recipe.pruning.as_mut().unwrap()))
}

#[test]
fn a_resumed_group_gives_the_same_bits() {
    for degree in [1, 2] {
        check("sliced", degree, &with_pruning(|_| {}));
        check("masked", degree, &with_pruning(|pruning| pruning.shrink = Shrink::Never));
    }
}

#[test]
fn weights_that_compensation_changed_are_resumed_with_the_same_bits() {
    for degree in [1, 2] {
        for shrink in [Shrink::Live, Shrink::Never] {
            check(
                "compensated",
                degree,
                &with_pruning(|pruning| {
                    pruning.compensation = least_squares();
                    pruning.shrink = shrink;
                }),
            );
        }
    }
}

#[test]
fn every_storage_format_is_resumed_with_the_same_bits() {
    for storage in [Storage::Bf16, Storage::Int8, Storage::Nf4] {
        for (degree, shrink) in [(1, Shrink::Live), (2, Shrink::Live), (2, Shrink::Never)] {
            let mut recipe = with_pruning(|pruning| pruning.shrink = shrink);
            recipe.precision.storage = storage;
            check(&format!("{storage:?} {shrink:?}"), degree, &recipe);
        }
    }
}

#[test]
fn double_precision_is_resumed_with_the_same_bits() {
    for (degree, compensation) in [(1, Compensation::None), (2, Compensation::None), (2, least_squares())] {
        for shrink in [Shrink::Live, Shrink::Never] {
            let mut recipe = with_pruning(|pruning| {
                pruning.shrink = shrink;
                pruning.compensation = compensation;
            });
            recipe.precision = F64;
            check(&format!("f64 {shrink:?}"), degree, &recipe);
        }
    }
}

#[test]
fn every_criterion_is_resumed_with_the_same_bits() {
    for criterion in
        [Criterion::Taylor, Criterion::Wanda, Criterion::Tangent, Criterion::Flap, Criterion::Random]
    {
        check(&format!("{criterion:?}"), 2, &with_pruning(|pruning| pruning.criterion = criterion));
    }
}

#[test]
fn every_optimizer_is_resumed_with_the_same_bits() {
    for (degree, shrink) in [(1, Shrink::Live), (2, Shrink::Live), (2, Shrink::Never)] {
        let mut recipe = with_pruning(|pruning| {
            pruning.shrink = shrink;
            pruning.criterion = Criterion::Tangent;
        });
        recipe.optimizer = Optimizer::LoraRite(LoraRite::default());
        check(&format!("LoRA-RITE {shrink:?}"), degree, &recipe);
    }
    let mut recipe = recipe(|recipe| recipe.precision = F64);
    recipe.optimizer = Optimizer::LoraRite(LoraRite::default());
    check_other_degrees("LoRA-RITE", &recipe);
}

#[test]
fn a_chain_is_resumed_with_the_same_bits_before_between_and_at_knots() {
    for knots in [vec![2], vec![KILLED_AT - 1], vec![KILLED_AT], vec![1, KILLED_AT + 1]] {
        for (degree, shrink) in [(1, Shrink::Never), (2, Shrink::Live)] {
            let mut recipe = with_pruning(|pruning| pruning.shrink = shrink);
            recipe.chain = Some(Chain { knots: knots.clone(), warmup_steps: 1, settle_steps: 1 });
            check(&format!("knots {knots:?} {shrink:?}"), degree, &recipe);
        }
    }
    let mut recipe = recipe(|recipe| recipe.precision = F64);
    recipe.chain = Some(Chain { knots: vec![2], warmup_steps: 0, settle_steps: 1 });
    check_other_degrees("chain", &recipe);
}

#[test]
fn what_the_unpruned_model_taught_is_resumed_with_the_same_bits() {
    for degree in [1, 2] {
        let recipe = recipe(|recipe| {
            recipe.distillation = DISTILLATION;
            recipe.recompute = Recompute::Layer;
        });
        check("distilled", degree, &recipe);
    }
}

/// Losses and norms of a group that goes on from the checkpoint of another degree are those of the group that wrote it.
fn check_other_degrees(what: &str, recipe: &Recipe) {
    for (before, after) in [(2, 1), (1, 2), (2, 3)] {
        let folder = tempfile::tempdir().unwrap();
        let (whole, restore) = train(recipe, before, None, folder.path());
        let (resumed, _) = train(recipe, after, restore.as_ref(), folder.path());
        let expected = from_killing(&whole).numbers;
        assert_eq!(resumed.numbers.len(), expected.len());
        for (one, other) in expected.iter().zip(&resumed.numbers) {
            for (one, other) in [(one.0, other.0), (one.1, other.1)] {
                let (one, other) = (f64::from_bits(one), f64::from_bits(other));
                assert!(
                    (one - other).abs() <= 1e-10 * one.abs(),
                    "{what}, {before} to {after} ranks: {one} and {other}"
                );
            }
        }
    }
}

#[test]
fn a_group_of_another_degree_goes_on_alike_but_for_rounding() {
    for shrink in [Shrink::Live, Shrink::Never] {
        for compensation in [Compensation::None, least_squares()] {
            let mut recipe = with_pruning(|pruning| {
                pruning.shrink = shrink;
                pruning.compensation = compensation;
            });
            recipe.precision = F64;
            check_other_degrees(&format!("{shrink:?}"), &recipe);
        }
    }
}

#[test]
fn quantised_weights_are_the_same_at_another_degree() {
    for storage in [Storage::Int8, Storage::Nf4] {
        let precision = Precision { storage, ..F64 };
        check_other_degrees(&format!("{storage:?}"), &recipe(|recipe| recipe.precision = precision));
    }
}

#[test]
fn what_was_taught_is_taken_along_to_another_degree() {
    let recipe = recipe(|recipe| {
        recipe.precision = F64;
        recipe.distillation = DISTILLATION;
    });
    check_other_degrees("distilled", &recipe);
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused() {
    let recipe = with_pruning(|_| {});
    let folder = tempfile::tempdir().unwrap();
    let (_, restore) = train(&recipe, 1, None, folder.path());
    let restore = restore.unwrap();
    let load = |restore: Restore| {
        let setup = ShardSetup {
            model: fixtures().join("models").join(MODEL),
            recipe: recipe.clone(),
            tp_rank: 0,
            tp_degree: 1,
            collective_timeout: Duration::from_secs(1),
            restore: Some(restore),
            progress: Arc::default(),
        };
        Shard::load(setup, Device::Cpu).map(drop).map_err(EngineError::from)
    };
    load(restore.clone()).unwrap();
    let file = |restore: &Restore, change: &dyn Fn(&mut (PathBuf, String))| {
        let mut changed = restore.clone();
        change(&mut changed.shards[0]);
        changed
    };
    for (what, bad) in [
        ("another digest", file(&restore, &|shard| shard.1 = "0".repeat(64))),
        ("a missing file", file(&restore, &|shard| shard.0 = "/no/such/file".into())),
        ("another generation", Restore { generation: 1, ..restore.clone() }),
    ] {
        let error = load(bad).expect_err(what);
        assert!(matches!(error, EngineError::File(_)), "{what}: {error}");
    }
    let mut of_another_model = restore.clone();
    of_another_model.keep_mask.layers.pop();
    assert!(matches!(load(of_another_model), Err(EngineError::Refused(_))));
}

#[test]
fn a_rank_that_waits_for_a_peer_is_freed_when_it_is_told_to_give_up() {
    let progress: [Arc<Progress>; 2] = Default::default();
    let meeting: Mutex<Option<Rendezvous>> = Mutex::default();
    let (barrier, recipe) = (Barrier::new(2), with_pruning(|_| {}));
    let windows = windows();
    std::thread::scope(|scope| {
        for tp_rank in 0..2 {
            let (meeting, barrier, recipe, windows) = (&meeting, &barrier, recipe.clone(), &windows);
            let progress = &progress;
            scope.spawn(move || {
                tch::set_num_threads(1);
                let setup = ShardSetup {
                    model: fixtures().join("models").join(MODEL),
                    recipe,
                    tp_rank,
                    tp_degree: 2,
                    collective_timeout: Duration::from_secs(60),
                    restore: None,
                    progress: progress[tp_rank].clone(),
                };
                let mut shard = Shard::load(setup, Device::Cpu).unwrap();
                join(&mut shard, tp_rank, 2, meeting, barrier);
                // Rank 1 never comes to the step.
                if tp_rank == 0 {
                    let started = Instant::now();
                    let error = shard.train_step(0, &[vec![windows[0].as_slice()]]).unwrap_err();
                    assert!(matches!(error, EngineError::Collective(_)), "{error}");
                    let waited = started.elapsed();
                    assert!(waited > Duration::from_millis(300) && waited < Duration::from_secs(20));
                    drop(shard);
                    assert!(started.elapsed() < Duration::from_secs(20), "freeing it does not wait either");
                }
                barrier.wait();
            });
        }
        let waits = || {
            let counts = progress[0].counts();
            counts.collectives_entered == counts.collectives_left + 1
        };
        let since = Instant::now();
        while !waits() {
            assert!(since.elapsed() < Duration::from_secs(60), "rank 0 never waited");
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(400));
        progress[0].give_up();
    });
}
