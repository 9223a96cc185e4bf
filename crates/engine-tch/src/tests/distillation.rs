//! What the unpruned model teaches, and the loss that follows it: against plain formulas, over ranks, in whole runs.

use super::golden_runs::{Golden, assert_close};
use super::group::{RunInputs, RunRecord, fixtures, run, spec_of};
use super::pieces::{assert_central_differences, assert_same, autograd, random};
use crate::communicator::{Alone, Communicator, ReduceOp};
use crate::fault::Result;
use crate::loss::VocabularyHead;
use crate::shard::Shard;
use crate::teacher::{Likeliest, SoftTargets};
use engine::{EngineError, ShardEngine, ShardSetup};
use pruning::KeepMask;
use recipe::{Distillation, Recipe, Shrink};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

const GOLDEN: &str = "gqa_code_kv_groups_f64";

fn head(weight: &Tensor, chunk_elements: i64) -> VocabularyHead<'_> {
    VocabularyHead { weight, rows: 0..weight.size()[0], chunk_elements }
}

#[test]
fn the_gradient_of_the_mixed_loss_is_that_of_autograd_and_of_central_differences() {
    let (hidden, weight) = (random(&[11, 6], 12), random(&[19, 6], 13));
    let targets = Tensor::from_slice(&[0i64, 18, 3, 7, 7, 1, 2, 9, 17, 4, 5]);
    // Some of the text's tokens are among the teacher's, some are not.
    let ids = random(&[11, 19], 14).topk(4, 1, true, true).1;
    let p = random(&[11, 4], 15).softmax(1, Kind::Double);
    let likeliest = || Likeliest { ids: ids.to_kind(Kind::Int), probabilities: p.copy() };
    let scale = Tensor::from(0.25);
    for share in [0.0, 0.3, 1.0] {
        let soft = SoftTargets { weight: share, likeliest: likeliest() };
        let plain = |inputs: &[Tensor]| {
            let log_q = inputs[0].matmul(&weight.tr()).log_softmax(-1, None);
            let hard = -log_q.gather(1, &targets.unsqueeze(1), false).sum(Kind::Double);
            let to_teacher = -(log_q.gather(1, &ids, false) * &p).sum(Kind::Double);
            hard * (1.0 - share) + to_teacher * share
        };
        // All positions at once, four at a time with a shorter rest, and one at a time.
        for chunk_elements in [1 << 20, 4 * 19, 1] {
            let (nll, grad) = head(&weight, chunk_elements)
                .negative_log_likelihood(&hidden, &targets, Some(&soft), Some(0.25), &mut Alone)
                .unwrap();
            let (hard_alone, _) = head(&weight, chunk_elements)
                .negative_log_likelihood(&hidden, &targets, None, None, &mut Alone)
                .unwrap();
            assert_eq!(nll.to_bits(), hard_alone.to_bits(), "the text's loss is what is reported");
            let grad = grad.unwrap();
            assert_same("dx", &grad, &autograd(&[&hidden], &scale, &plain)[0], 1e-10);
            assert_central_differences(&[&hidden], 0, &scale, &grad, &plain);
        }
    }
}

/// Ranks as threads of one process: every reduction meets at a barrier.
struct Together {
    rank: usize,
    degree: usize,
    barrier: Arc<Barrier>,
    given: Arc<Mutex<Vec<Option<Tensor>>>>,
}

impl Communicator for Together {
    fn tp_degree(&self) -> usize {
        self.degree
    }

    fn tp_rank(&self) -> usize {
        self.rank
    }

    fn all_reduce(&mut self, values: &mut Tensor, op: ReduceOp) -> Result<()> {
        assert_eq!(op, ReduceOp::Sum);
        self.given.lock().unwrap()[self.rank] = Some(values.copy());
        self.barrier.wait();
        let _ = values.zero_();
        for given in self.given.lock().unwrap().iter().flatten() {
            *values += given;
        }
        self.barrier.wait();
        Ok(())
    }
}

/// What each of `degree` ranks gets.
fn likeliest_on(degree: usize, hidden: &Tensor, weight: &Tensor, top_k: usize) -> Vec<(Tensor, Tensor)> {
    let (barrier, given) = (Arc::new(Barrier::new(degree)), Arc::new(Mutex::new(Vec::new())));
    given.lock().unwrap().resize_with(degree, || None);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..degree)
            .map(|rank| {
                let rows = sharding::vocabulary_rows(weight.size()[0] as usize, degree, rank);
                let rows = rows.start as i64..rows.end as i64;
                let part = weight.narrow(0, rows.start, rows.end - rows.start).copy();
                let hidden = hidden.copy();
                let mut communicator =
                    Together { rank, degree, barrier: barrier.clone(), given: given.clone() };
                scope.spawn(move || {
                    let head = VocabularyHead { weight: &part, rows, chunk_elements: 1 << 20 };
                    let found = head.likeliest(&hidden, top_k, &mut communicator).unwrap();
                    (found.ids, found.probabilities)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn the_likeliest_tokens_are_sorted_by_logit_and_then_by_id_on_any_number_of_ranks() {
    // Whole numbers, so that any order of summation gives the same logits, many of them equal, some zero or below.
    let whole = |shape: &[i64], seed| (random(shape, seed) * 3.0).round();
    let (hidden, weight) = (whole(&[13, 5], 21), whole(&[29, 5], 22));
    let logits = hidden.matmul(&weight.tr());
    for top_k in [1, 7, 29] {
        let one = head(&weight, 1 << 20).likeliest(&hidden, top_k, &mut Alone).unwrap();
        assert_eq!((one.ids.kind(), one.probabilities.kind()), (Kind::Int, Kind::Float));
        for position in 0..13 {
            let logit = |id: i64| logits.double_value(&[position, id]);
            let mut expected: Vec<i64> = (0..29).collect();
            expected.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
            expected.truncate(top_k);
            let ids = Vec::<i64>::try_from(one.ids.get(position).to_kind(Kind::Int64)).unwrap();
            assert_eq!(ids, expected, "position {position}, the first {top_k}");
            let total: f64 = expected.iter().map(|&id| logit(id).exp()).sum();
            for (place, &id) in expected.iter().enumerate() {
                let p = one.probabilities.double_value(&[position, place as i64]);
                assert!((p - logit(id).exp() / total).abs() < 1e-6);
            }
        }
        let by_one = head(&weight, 1).likeliest(&hidden, top_k, &mut Alone).unwrap();
        assert!(by_one.ids == one.ids && by_one.probabilities == one.probabilities, "chunks change nothing");
        for degree in [2, 3] {
            for (ids, probabilities) in likeliest_on(degree, &hidden, &weight, top_k) {
                assert!(ids == one.ids && probabilities == one.probabilities, "{degree} ranks");
            }
        }
    }
}

#[test]
fn a_logit_that_is_no_number_is_told() {
    let weight = random(&[9, 4], 3);
    let _ = weight.get(5).fill_(f64::NAN);
    let found = head(&weight, 1 << 20).likeliest(&random(&[3, 4], 4), 2, &mut Alone);
    assert!(matches!(found, Err(crate::fault::Fault::NotFinite { .. })));
}

fn distilled(golden: &Golden, distillation: Option<Distillation>, tp_degree: usize) -> RunRecord {
    run(&RunInputs {
        model: golden.model(),
        recipe: Recipe { distillation, ..golden.recipe(Shrink::Live) },
        tp_degree,
        initial: None,
        batches: &golden.batches(),
    })
}

#[test]
fn two_and_three_ranks_distil_as_one_and_the_same_seed_gives_the_same_bits() {
    let golden = Golden::read(GOLDEN);
    let distillation = Some(Distillation { weight: 0.6, top_k: 16 });
    let one = distilled(&golden, distillation, 1);
    let without = distilled(&golden, None, 1);
    assert_eq!(one.losses[0].to_bits(), without.losses[0].to_bits(), "the text's loss is what is reported");
    assert!((one.losses[5] - without.losses[5]).abs() > 1e-6, "distillation changes the run");
    let again = distilled(&golden, distillation, 1);
    assert_eq!(again.losses, one.losses);
    assert!(again.logits == one.logits);
    for degree in [2, 3] {
        let many = distilled(&golden, distillation, degree);
        // What is taught is rounded to single precision, in which logits of different degrees may round apart.
        assert_close("loss", &many.losses, &one.losses, 1e-7);
        assert_eq!(many.decisions, one.decisions, "{degree} ranks");
    }
}

fn shard(distillation: Option<Distillation>) -> std::result::Result<Shard, EngineError> {
    let golden = Golden::read(GOLDEN);
    let mut recipe = Recipe { distillation, max_grad_norm: None, ..golden.recipe(Shrink::Live) };
    recipe.lora.dropout = 0.1;
    let setup = ShardSetup {
        model: fixtures().join("models").join(golden.model()),
        recipe,
        tp_rank: 0,
        tp_degree: 1,
        collective_timeout: Duration::from_secs(5),
        restore: None,
        progress: std::sync::Arc::default(),
    };
    Ok(Shard::load(setup, Device::Cpu)?)
}

#[test]
fn an_unpruned_student_has_nothing_to_learn_from_all_of_its_own_distribution() {
    let spec = spec_of(Golden::read(GOLDEN).model());
    let rows: Vec<Vec<u32>> =
        (0..3u32).map(|row| (0..9).map(|t| 5 + (t * 13 + row * 7) % 80).collect()).collect();
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let norm = |weight| {
        let mut shard = shard(Some(Distillation { weight, top_k: spec.vocab_size })).unwrap();
        shard.teach(&rows).unwrap();
        shard.train_step(0, std::slice::from_ref(&rows)).unwrap().grad_norm
    };
    let (text_alone, teacher_alone) = (norm(0.0), norm(1.0));
    assert!(text_alone > 1e-3);
    assert!(teacher_alone < 1e-6 * text_alone, "{teacher_alone} beside {text_alone}");
}

#[test]
fn only_the_unpruned_model_teaches_and_every_window_must_be_taught() {
    let refused = |done: std::result::Result<(), EngineError>, said: &str| {
        let Err(EngineError::Refused(text)) = done else { panic!("{said:?} must be refused: {done:?}") };
        assert!(text.contains(said), "{said:?} is not in {text:?}");
    };
    let (row, other): (&[u32], &[u32]) = (&[5, 9, 7, 12], &[5, 9, 7, 13]);
    refused(shard(None).unwrap().teach(&[row]), "does not distil");
    let spec = spec_of(Golden::read(GOLDEN).model());
    let too_many = Distillation { weight: 0.5, top_k: spec.vocab_size + 1 };
    refused(shard(Some(too_many)).map(drop), "distillation.top_k");
    let mut shard = shard(Some(Distillation { weight: 0.5, top_k: 4 })).unwrap();
    shard.teach(&[row, row]).unwrap();
    shard.teach(&[row]).unwrap();
    shard.train_step(0, &[vec![row, row]]).unwrap();
    refused(shard.train_step(1, &[vec![row, other]]).map(drop), "was not read by the unpruned model");
    shard.apply_mask(1, &KeepMask::full(&spec), &[]).unwrap();
    refused(shard.teach(&[other]), "only the unpruned model teaches");
    shard.train_step(1, &[vec![row]]).unwrap();
}

#[test]
fn adapters_do_not_change_what_is_taught() {
    let row: &[u32] = &[5, 9, 7, 12, 40, 41];
    let taught = |trained: bool| {
        let mut shard = shard(Some(Distillation { weight: 0.5, top_k: 4 })).unwrap();
        if trained {
            let other: &[u32] = &[8, 8, 3, 21, 6, 50];
            shard.teach(&[other]).unwrap();
            shard.train_step(0, &[vec![other]]).unwrap();
        }
        shard.teach(&[row]).unwrap();
        shard.teacher.targets(&[row], 0.5).unwrap().likeliest
    };
    let (before, after) = (taught(false), taught(true));
    assert!(before.ids == after.ids && before.probabilities == after.probabilities);
}
