//! What every [`Engine`] promises, as checks that panic with what was broken. Each implementation runs them in its tests.
//!
//! They use one rank: what holds between ranks needs a process for each and is checked with those.

use crate::{Engine, EngineError, Progress, ProjectionScores, Prompt, Restore, ShardEngine, ShardSetup};
use model_spec::{ModelSpec, Projection};
use pruning::{KeepMask, LayerKeep};
use recipe::{Batch, Pruning, Recipe};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const ROWS: usize = 2;
const WINDOW_TOKENS: usize = 12;

/// Holds `engine` against the promises of its traits, on the model at `model` whose dimensions are `dense`.
///
/// # Panics
/// Names the promise that was broken.
pub fn check(engine: &dyn Engine, model: &Path, dense: &ModelSpec, scratch: &Path) {
    let suite = Suite { engine, model, dense, tokens: tokens(dense) };
    suite.bad_places_are_refused();
    suite.scores_are_of_all_live_groups();
    suite.equal_setups_give_equal_runs();
    suite.masks_come_in_order_and_only_shrink();
    suite.evaluation_does_not_depend_on_passes();
    suite.what_is_distilled_was_taught_by_the_unpruned_model();
    suite.continuations_are_judged_by_themselves();
    suite.checkpoints_are_what_their_digests_say(scratch);
    suite.a_restored_shard_goes_on_bit_for_bit(scratch);
    suite.work_is_seen_to_advance();
}

struct Suite<'a> {
    engine: &'a dyn Engine,
    model: &'a Path,
    dense: &'a ModelSpec,
    tokens: Vec<Vec<u32>>,
}

fn tokens(dense: &ModelSpec) -> Vec<Vec<u32>> {
    let token =
        |row: usize, place: usize| u32::try_from((row * 31 + place * 7 + 1) % dense.vocab_size).unwrap_or(0);
    (0..3 * ROWS).map(|row| (0..WINDOW_TOKENS).map(|place| token(row, place)).collect()).collect()
}

impl Suite<'_> {
    fn setup(&self) -> ShardSetup {
        let batch = Batch { window_tokens: WINDOW_TOKENS, rows: ROWS, micro_batches: 1 };
        ShardSetup {
            model: self.model.to_owned(),
            recipe: Recipe {
                seed: 5,
                steps: 20,
                batch,
                pruning: Some(Pruning::published()),
                ..Recipe::default()
            },
            tp_rank: 0,
            tp_degree: 1,
            collective_timeout: Duration::from_secs(10),
            restore: None,
            progress: Arc::new(Progress::default()),
        }
    }

    fn shard(&self) -> Box<dyn ShardEngine> {
        self.engine.load(self.setup()).unwrap_or_else(|error| panic!("a good setup does not load: {error}"))
    }

    fn step(&self, shard: &mut dyn ShardEngine, step: u64) -> (f64, Vec<ProjectionScores>) {
        let rows: Vec<&[u32]> =
            (0..ROWS).map(|row| self.tokens[(step as usize + row) % self.tokens.len()].as_slice()).collect();
        let outcome = shard
            .train_step(step, &[rows])
            .unwrap_or_else(|error| panic!("step {step} on good tokens fails: {error}"));
        assert!(outcome.loss.is_finite() && outcome.grad_norm.is_finite(), "loss and norm are numbers");
        (outcome.loss, outcome.scores)
    }

    fn bad_places_are_refused(&self) {
        let too_high = self.dense.layers.iter().map(|layer| layer.kv_head_count).max().unwrap_or(0) + 1;
        for (tp_rank, tp_degree) in [(1, 1), (0, 0), (0, too_high)] {
            let refused = self.engine.load(ShardSetup { tp_rank, tp_degree, ..self.setup() });
            assert!(
                matches!(refused, Err(EngineError::Refused(_))),
                "rank {tp_rank} of {tp_degree} must be refused as the caller's mistake"
            );
        }
    }

    fn scores_are_of_all_live_groups(&self) {
        let mut shard = self.shard();
        let (_, scores) = self.step(shard.as_mut(), 0);
        self.assert_lists(&scores, &KeepMask::full(self.dense));
        let smaller = self.smaller_mask();
        shard
            .apply_mask(1, &smaller, &[])
            .unwrap_or_else(|error| panic!("a smaller mask is not applied: {error}"));
        let (_, scores) = self.step(shard.as_mut(), 1);
        self.assert_lists(&scores, &smaller);
    }

    /// One list for every projection of every layer, as long as the mask keeps groups.
    fn assert_lists(&self, scores: &[ProjectionScores], mask: &KeepMask) {
        let mut seen: Vec<(usize, Projection)> =
            scores.iter().map(|one| (one.layer, one.projection)).collect();
        seen.sort_unstable();
        let all: Vec<(usize, Projection)> = (0..self.dense.layers.len())
            .flat_map(|layer| Projection::ALL.map(|each| (layer, each)))
            .collect();
        assert_eq!(seen, all, "every projection is scored once");
        for ProjectionScores { layer, projection, values } in scores {
            let kept = match projection {
                Projection::Q | Projection::O => mask.layers[*layer].query_heads.len(),
                Projection::K | Projection::V => mask.layers[*layer].kv_heads.len(),
                Projection::Gate | Projection::Up | Projection::Down => mask.layers[*layer].channels.len(),
            };
            assert_eq!(values.len(), kept, "layer {layer} {projection}: a score for each live group");
            assert!(
                values.iter().all(|value| value.is_finite() && *value >= 0.0),
                "layer {layer} {projection}"
            );
        }
    }

    fn equal_setups_give_equal_runs(&self) {
        let run = || {
            let mut shard = self.shard();
            let first: Vec<_> = (0..2).map(|step| self.step(shard.as_mut(), step)).collect();
            shard.apply_mask(1, &self.smaller_mask(), &[]).unwrap_or_else(|error| panic!("{error}"));
            (first, (2..4).map(|step| self.step(shard.as_mut(), step)).collect::<Vec<_>>())
        };
        assert!(run() == run(), "the same seed gives the same losses and scores, bit for bit");
    }

    fn masks_come_in_order_and_only_shrink(&self) {
        let mut shard = self.shard();
        let (full, smaller) = (KeepMask::full(self.dense), self.smaller_mask());
        let refused = |applied: Result<_, EngineError>, what: &str| {
            assert!(matches!(applied, Err(EngineError::Refused(_))), "{what} must be refused");
        };
        refused(shard.apply_mask(2, &smaller, &[]), "a generation that skips one");
        let memory_before = shard.memory_bytes();
        assert!(memory_before > 0, "memory is told");
        let applied = shard.apply_mask(1, &smaller, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(applied.received_groups, 0, "one rank receives nothing");
        shard
            .apply_mask(1, &smaller, &[])
            .unwrap_or_else(|error| panic!("a generation in force, again: {error}"));
        refused(shard.apply_mask(2, &full, &[]), "a mask that brings something back");
        let (_, scores) = self.step(shard.as_mut(), 0);
        self.assert_lists(&scores, &smaller);
        shard.apply_mask(2, &smaller, &[]).unwrap_or_else(|error| panic!("refusals change nothing: {error}"));
    }

    fn evaluation_does_not_depend_on_passes(&self) {
        let mut shard = self.shard();
        let rows: Vec<&[u32]> = self.tokens.iter().map(Vec::as_slice).collect();
        let mut sum = |rows_per_pass| {
            shard.evaluate(&rows, rows_per_pass).unwrap_or_else(|error| panic!("evaluation fails: {error}"))
        };
        let (one, all) = (sum(1), sum(rows.len()));
        let predicted = (rows.len() * (WINDOW_TOKENS - 1)) as u64;
        assert_eq!((one.predicted, all.predicted), (predicted, predicted), "all tokens but each row's first");
        let (one, all) = (one.negative_log_likelihood, all.negative_log_likelihood);
        assert!((one - all).abs() <= 1e-4 * all.abs(), "rows in a pass do not see each other: {one} {all}");
        assert!(all > 0.0 && all.is_finite());
    }

    fn continuations_are_judged_by_themselves(&self) {
        let mut shard = self.shard();
        let mut judge = |prompts: &[Prompt<'_>]| {
            shard
                .continuation_log_likelihoods(prompts)
                .unwrap_or_else(|error| panic!("continuations are not judged: {error}"))
        };
        let (row, other) = (self.tokens[0].as_slice(), self.tokens[1].as_slice());
        let continuations = vec![&row[5..], &other[..1], &other[..7], &row[5..6]];
        let together = judge(&[
            Prompt { context: &row[..5], continuations: continuations.clone() },
            Prompt { context: &other[..1], continuations: vec![&other[1..]] },
        ]);
        assert_eq!(
            together.iter().map(Vec::len).collect::<Vec<_>>(),
            [4, 1],
            "one sum for each continuation"
        );
        for (continuation, together) in continuations.iter().zip(&together[0]) {
            let alone = judge(&[Prompt { context: &row[..5], continuations: vec![continuation] }])[0][0];
            let close = (alone - together).abs() <= 1e-4 * alone.abs();
            assert!(close && alone < 0.0, "continuations do not see each other: {alone} {together}");
        }
        let nats = shard.evaluate(&[other], 1).unwrap_or_else(|error| panic!("evaluation fails: {error}"));
        let (nats, judged) = (nats.negative_log_likelihood, together[1][0]);
        assert!(
            (nats + judged).abs() <= 1e-4 * nats,
            "a row is its first token and what follows: {nats} {judged}"
        );
        let none: &[u32] = &[];
        for (context, continuation) in [(none, row), (row, none)] {
            let refused =
                shard.continuation_log_likelihoods(&[Prompt { context, continuations: vec![continuation] }]);
            assert!(matches!(refused, Err(EngineError::Refused(_))), "an empty part must be refused");
        }
    }

    fn what_is_distilled_was_taught_by_the_unpruned_model(&self) {
        let row = self.tokens[0].as_slice();
        let refused = |done: Result<(), EngineError>, what: &str| {
            assert!(matches!(done, Err(EngineError::Refused(_))), "{what} must be refused");
        };
        refused(self.shard().teach(&[row]), "teaching without distillation");
        let mut setup = self.setup();
        setup.recipe.distillation = Some(recipe::Distillation { weight: 0.5, top_k: 4 });
        let load = self.engine.load(setup);
        let mut shard = load.unwrap_or_else(|error| panic!("a recipe that distils does not load: {error}"));
        refused(shard.train_step(0, &[vec![row]]).map(drop), "a window that was not taught");
        shard.teach(&[row, row]).unwrap_or_else(|error| panic!("teaching fails: {error}"));
        Self::step_on(shard.as_mut(), 0, row);
        shard.apply_mask(1, &self.smaller_mask(), &[]).unwrap_or_else(|error| panic!("{error}"));
        refused(shard.teach(&[self.tokens[1].as_slice()]), "teaching under a mask");
        Self::step_on(shard.as_mut(), 1, row);
    }

    fn step_on(shard: &mut dyn ShardEngine, step: u64, row: &[u32]) {
        let outcome = shard.train_step(step, &[vec![row]]);
        let outcome = outcome.unwrap_or_else(|error| panic!("step {step} on a window taught fails: {error}"));
        assert!(outcome.loss.is_finite());
    }

    fn checkpoints_are_what_their_digests_say(&self, scratch: &Path) {
        let mut shard = self.shard();
        self.step(shard.as_mut(), 0);
        let file = scratch.join("rank-0.safetensors");
        let digest = write(shard.as_mut(), &file, &self.tokens[..1])
            .unwrap_or_else(|error| panic!("a checkpoint is not written: {error}"));
        let bytes =
            std::fs::read(&file).unwrap_or_else(|error| panic!("the checkpoint is not there: {error}"));
        assert_eq!(digest, hex(&Sha256::digest(&bytes)), "the digest is that of the file");
        let missing = write(shard.as_mut(), &scratch.join("no/such/folder/x"), &self.tokens[..1]);
        assert!(missing.is_err(), "a checkpoint that cannot be written is an error");
    }

    fn a_restored_shard_goes_on_bit_for_bit(&self, scratch: &Path) {
        let (mask, file) = (self.smaller_mask(), scratch.join("to-restore.safetensors"));
        let mut shard = self.shard();
        self.step(shard.as_mut(), 0);
        shard.apply_mask(1, &mask, &[]).unwrap_or_else(|error| panic!("{error}"));
        self.step(shard.as_mut(), 1);
        let snapshot = shard.snapshot(&[]).unwrap_or_else(|error| panic!("no snapshot: {error}"));
        assert!(snapshot.size_bytes() > 0);
        // What the shard does before the snapshot is written does not show in it.
        let went_on: Vec<_> = (2..5).map(|step| self.step(shard.as_mut(), step)).collect();
        let sha256 = snapshot.write(&file).unwrap_or_else(|error| panic!("not written: {error}"));
        let restore = |shards| Some(Restore { shards, generation: 1, next_step: 2, keep_mask: mask.clone() });
        let setup = ShardSetup { restore: restore(vec![(file.clone(), sha256)]), ..self.setup() };
        let mut restored =
            self.engine.load(setup).unwrap_or_else(|error| panic!("a checkpoint does not load: {error}"));
        let again: Vec<_> = (2..5).map(|step| self.step(restored.as_mut(), step)).collect();
        assert!(went_on == again, "a restored shard gives the same losses and scores, bit for bit");
        let (one, other) = (scratch.join("one.safetensors"), scratch.join("other.safetensors"));
        let [one, other] = [(&mut shard, &one), (&mut restored, &other)]
            .map(|(shard, file)| write(shard.as_mut(), file, &[]).unwrap_or_else(|error| panic!("{error}")));
        assert_eq!(one, other, "and writes the same checkpoint");
        let damaged = ShardSetup { restore: restore(vec![(file, "0".repeat(64))]), ..self.setup() };
        assert!(self.engine.load(damaged).is_err(), "a file of another digest must not load");
    }

    fn work_is_seen_to_advance(&self) {
        let setup = self.setup();
        let progress = setup.progress.clone();
        let mut shard = self.engine.load(setup).unwrap_or_else(|error| panic!("{error}"));
        let loaded = progress.counts().ticks;
        assert!(loaded > 0, "loading ticks");
        self.step(shard.as_mut(), 0);
        let counts = progress.counts();
        assert!(counts.ticks > loaded, "a step ticks");
        assert_eq!(counts.collectives_entered, counts.collectives_left);
    }

    /// Without the last key/value head of each layer, where there are several, and every odd channel.
    fn smaller_mask(&self) -> KeepMask {
        let layers = self
            .dense
            .layers
            .iter()
            .map(|widths| {
                let mut keep = LayerKeep::full(widths);
                keep.kv_heads.truncate((widths.kv_head_count - 1).max(1));
                keep.query_heads.retain(|query| keep.kv_heads.contains(&widths.kv_head_of(*query)));
                keep.channels.retain(|channel| channel % 2 == 0);
                keep
            })
            .collect();
        KeepMask { layers }
    }
}

fn write(shard: &mut dyn ShardEngine, file: &Path, prompts: &[Vec<u32>]) -> Result<String, EngineError> {
    shard.snapshot(prompts)?.write(file)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
