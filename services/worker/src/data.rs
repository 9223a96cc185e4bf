//! From the files of a request to windows of token ids.

use crate::failure;
use checkpoint::ModelFolder;
use recipe::Recipe;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use token_batches::{
    BatchOrder, Corpus, EvaluationSet, Joining, TaskLimits, TaskSet, TextFormat, TextSource, TextTokenizer,
    TrainingSet, task_name,
};
use wire::status::{Failure, Reason};
use wire::{EvaluationMode, EvaluationSpec, TaskSpec};

/// Prompts of the export's check, and the tokens of each.
const PROMPT_COUNT: usize = 4;
const PROMPT_TOKENS: usize = 32;
/// Choices of a task whose log-likelihoods fit into one message.
const MAX_RETURNED_CHOICES: usize = 1 << 20;

/// A file of a request, with the path that it really has.
#[derive(Debug, Clone)]
pub(crate) struct LocatedSource {
    pub(crate) source: wire::TextSource,
    pub(crate) real_path: PathBuf,
}

/// Everything that a session reads.
#[derive(Debug, Clone)]
pub(crate) struct DataRequest {
    pub(crate) model: PathBuf,
    pub(crate) training: Vec<LocatedSource>,
    pub(crate) evaluation: Option<(EvaluationSpec, Vec<LocatedSource>)>,
    /// With the paths that the files really have.
    pub(crate) tasks: Option<(TaskSpec, Vec<PathBuf>)>,
}

/// Held-out text in windows of one length.
pub(crate) struct Held {
    pub(crate) set: EvaluationSet,
    pub(crate) window_tokens: usize,
    pub(crate) rows_per_pass: usize,
}

/// Files of questions.
pub(crate) struct Tasks {
    pub(crate) sets: Vec<TaskSet>,
    pub(crate) spec: TaskSpec,
}

/// What a session has read.
pub(crate) struct SessionData {
    training: Option<TrainingSet>,
    /// By window length, in the order asked for.
    evaluation: Vec<Held>,
    tasks: Option<Tasks>,
    order: BatchOrder,
    prompts: Vec<Vec<u32>>,
}

impl SessionData {
    /// Reads and cuts all files. Blocks.
    pub(crate) fn load(
        request: &DataRequest,
        folder: &ModelFolder,
        recipe: &Recipe,
    ) -> Result<Self, Failure> {
        let vocab_size = u32::try_from(folder.spec().vocab_size).unwrap_or(u32::MAX);
        let corpus = |sources: &[LocatedSource], joining| {
            Ok::<_, Failure>(Corpus {
                sources: sources.iter().map(located).collect::<Result<_, _>>()?,
                tokenizer_json: request.model.join("tokenizer.json"),
                vocab_size,
                joining,
            })
        };
        let training = match request.training.as_slice() {
            [] => None,
            sources => Some(
                TrainingSet::load(&corpus(sources, Joining::Stream)?, recipe.batch.window_tokens)
                    .map_err(|error| failure::of_data(&error))?,
            ),
        };
        let evaluation = match &request.evaluation {
            None => Vec::new(),
            Some((spec, sources)) => {
                let joining = match (spec.mode, folder.config().bos_token_id) {
                    (EvaluationMode::Stream, _) => Joining::Stream,
                    (EvaluationMode::Stories, Some(begin)) => Joining::Stories { begin },
                    (EvaluationMode::Stories, None) => {
                        return Err(Failure::invalid_field(
                            "evaluation.mode",
                            "is by stories, each behind the token that begins a text, of which the model's \
                             config.json names none (`bos_token_id`)",
                        ));
                    }
                };
                let limit = spec.max_tokens.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
                let corpus = corpus(sources, joining)?;
                let held = |window_tokens: &usize| {
                    let set = EvaluationSet::load(&corpus, *window_tokens, limit)
                        .map_err(|error| failure::of_data(&error))?;
                    Ok(Held { set, window_tokens: *window_tokens, rows_per_pass: spec.rows })
                };
                spec.windows.iter().map(held).collect::<Result<Vec<_>, Failure>>()?
            }
        };
        let tasks = request.tasks.as_ref().map(|tasks| load_tasks(request, tasks, folder)).transpose()?;
        let narrow = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let order = BatchOrder {
            seed: recipe.seed,
            micro_batches_per_step: narrow(recipe.batch.micro_batches),
            rows_per_micro_batch: narrow(recipe.batch.rows),
        };
        let prompts = match (evaluation.first(), &training) {
            (Some(held), _) => prompts_from(&held.set.rows()),
            (None, Some(set)) => prompts_from(&set.windows().iter().collect::<Vec<_>>()),
            (None, None) => counted_prompts(vocab_size),
        };
        Ok(Self { training, evaluation, tasks, order, prompts })
    }

    /// SHA-256 of the training data in hex and its windows; nothing without training data.
    pub(crate) fn training_digest(&self) -> (String, u64) {
        self.training
            .as_ref()
            .map_or_else(Default::default, |set| (set.digest().to_owned(), set.windows().count().get()))
    }

    /// The different windows of `steps`, in the order in which they are first used.
    pub(crate) fn windows_of(&self, steps: std::ops::Range<u64>) -> Vec<&[u32]> {
        let Some(set) = &self.training else { return Vec::new() };
        let (count, mut seen) = (set.windows().count(), HashSet::new());
        let micro_batches =
            steps.flat_map(|step| (0..self.order.micro_batches_per_step).map(move |micro| (step, micro)));
        micro_batches
            .flat_map(|(step, micro_batch)| self.order.window_indices(step, micro_batch, count))
            .filter(|index| seen.insert(*index))
            // Once all are there, no more can come.
            .take(usize::try_from(count.get()).unwrap_or(usize::MAX))
            .filter_map(|index| set.windows().get(index))
            .collect()
    }

    /// The micro-batches of a step, each a list of windows; nothing without training data.
    pub(crate) fn micro_batches(&self, step: u64) -> Option<Vec<Vec<&[u32]>>> {
        let set = self.training.as_ref()?;
        let micro_batches = 0..self.order.micro_batches_per_step;
        Some(micro_batches.map(|micro_batch| set.micro_batch(&self.order, step, micro_batch)).collect())
    }

    /// Training windows to calibrate on, `count` or all of them, evenly over the text from a place that `seed` picks; equal
    /// on all ranks.
    pub(crate) fn calibration(&self, count: usize, seed: u64) -> Vec<&[u32]> {
        let Some(set) = &self.training else { return Vec::new() };
        let total = set.windows().count().get();
        evenly(total, count as u64, seed).filter_map(|index| set.windows().get(index)).collect()
    }

    /// Held-out text at one of its window lengths.
    pub(crate) fn evaluation(&self, window_index: usize) -> Option<&Held> {
        self.evaluation.get(window_index)
    }

    /// One of the tasks, and how it is to be asked.
    pub(crate) fn task(&self, task_index: usize) -> Option<(&TaskSet, &TaskSpec)> {
        let tasks = self.tasks.as_ref()?;
        Some((tasks.sets.get(task_index)?, &tasks.spec))
    }

    /// Fixed token windows for the export's check, equal on all ranks.
    pub(crate) fn prompts(&self) -> &[Vec<u32>] {
        &self.prompts
    }
}

/// `count` of the indices below `total`, or all, ascending and about equally far from each other; `seed` picks the place in
/// each stretch.
fn evenly(total: u64, count: u64, seed: u64) -> impl Iterator<Item = u64> {
    let count = count.clamp(1, total.max(1));
    // Fibonacci hashing: the seed as a fraction of a stretch, in 2^-32.
    let offset = u128::from(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32);
    (0..count).map(move |stretch| {
        let place = ((u128::from(stretch) << 32) + offset) * u128::from(total) / u128::from(count);
        u64::try_from(place >> 32).unwrap_or(u64::MAX)
    })
}

fn load_tasks(
    request: &DataRequest,
    (spec, files): &(TaskSpec, Vec<PathBuf>),
    folder: &ModelFolder,
) -> Result<Tasks, Failure> {
    let of_data = |error| failure::of_data(&error);
    let vocab_size = u32::try_from(folder.spec().vocab_size).unwrap_or(u32::MAX);
    let tokenizer =
        TextTokenizer::load(&request.model.join("tokenizer.json"), vocab_size).map_err(of_data)?;
    let limits = TaskLimits { max_rows: spec.max_rows, positions: folder.spec().max_position_embeddings };
    let load = |(file, path): (&PathBuf, &String)| {
        // A link's own name says what the task is.
        let set = TaskSet::load(file, task_name(Path::new(path)), &tokenizer, limits).map_err(of_data)?;
        let choice_count = set.choices().count();
        if spec.log_likelihoods && choice_count > MAX_RETURNED_CHOICES {
            return Err(Failure::invalid_field(
                "tasks.log_likelihoods",
                format!(
                    "can be asked for up to {MAX_RETURNED_CHOICES} choices; `{path}` has {choice_count}: set \
                     `tasks.max_rows`"
                ),
            ));
        }
        Ok(set)
    };
    let sets = files.iter().zip(&spec.files).map(load).collect::<Result<_, _>>()?;
    Ok(Tasks { sets, spec: spec.clone() })
}

fn located(file: &LocatedSource) -> Result<TextSource, Failure> {
    let LocatedSource { source, real_path } = file;
    let format = match source.format {
        // A link's own name says what it leads to.
        None => TextFormat::from_file_name(Path::new(&source.path)).ok_or_else(|| {
            failure::of_data(&token_batches::DataError::UnknownFormat { path: source.path.clone().into() })
        })?,
        Some(wire::TextFormat::Plain) => TextFormat::PlainText,
        Some(wire::TextFormat::JsonLines) => TextFormat::JsonLines { field: "text".into() },
        Some(wire::TextFormat::Parquet) => TextFormat::Parquet { column: "text".into() },
        Some(wire::TextFormat::TokensJsonLines) => TextFormat::TokenJsonLines { field: "input_ids".into() },
        Some(wire::TextFormat::TokensU16) => TextFormat::TokensU16,
        Some(wire::TextFormat::TokensU32) => TextFormat::TokensU32,
    };
    let located = TextSource::new(real_path, format);
    match &source.field {
        Some(field) => located.with_field(field.clone()).map_err(|error| failure::of_data(&error)),
        None => Ok(located),
    }
}

/// Windows spread evenly over the rows; several from one row where there are few.
fn prompts_from(rows: &[&[u32]]) -> Vec<Vec<u32>> {
    (0..PROMPT_COUNT)
        .filter_map(|index| {
            let row = rows.get(index * rows.len() / PROMPT_COUNT)?;
            let start = row.len().saturating_sub(PROMPT_TOKENS) * index / PROMPT_COUNT;
            let end = (start + PROMPT_TOKENS).min(row.len());
            Some(row.get(start..end)?.to_vec())
        })
        .filter(|prompt| !prompt.is_empty())
        .collect()
}

/// Without text: token ids counted up, in other strides for each prompt.
fn counted_prompts(vocab_size: u32) -> Vec<Vec<u32>> {
    let vocab_size = u64::from(vocab_size.max(1));
    let token = |prompt: usize, place: usize| {
        let token = ((place * (2 * prompt + 1) + prompt) as u64) % vocab_size;
        u32::try_from(token).unwrap_or(0)
    };
    (0..PROMPT_COUNT).map(|prompt| (0..PROMPT_TOKENS).map(|place| token(prompt, place)).collect()).collect()
}

/// A failure for a session that has no data for what it is asked.
pub(crate) fn none_loaded(what: &str, field: &str) -> Failure {
    Failure::new(Reason::Refused, format!("the session has no {what}; name some in Load's `{field}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_four_windows_whatever_the_rows() {
        let long: Vec<u32> = (0..1000).collect();
        let rows: Vec<&[u32]> = long.chunks(100).collect();
        for rows in [&rows[..], &rows[..1], &rows[..3]] {
            let prompts = prompts_from(rows);
            assert_eq!(prompts.len(), 4);
            assert!(prompts.iter().all(|prompt| prompt.len() == 32));
            assert!(prompts.windows(2).all(|pair| pair[0] != pair[1]));
        }
        let short: Vec<&[u32]> = long.chunks(7).collect();
        assert!(prompts_from(&short).iter().all(|prompt| prompt.len() == 7));
        assert!(prompts_from(&[]).is_empty());
    }

    #[test]
    fn windows_to_calibrate_on_lie_evenly_and_are_all_where_there_are_few() {
        for seed in [0, 1, 7, u64::MAX] {
            let ten: Vec<u64> = evenly(1000, 10, seed).collect();
            assert_eq!(ten.len(), 10);
            assert!(ten.windows(2).all(|pair| pair[1] - pair[0] == 100), "{ten:?}");
            assert!(*ten.last().unwrap() < 1000);
            assert_eq!(evenly(5, 48, seed).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
            let odd: Vec<u64> = evenly(103, 48, seed).collect();
            assert!(odd.windows(2).all(|pair| (2..=3).contains(&(pair[1] - pair[0]))), "{odd:?}");
        }
        assert_ne!(evenly(1000, 10, 1).next(), evenly(1000, 10, 2).next());
    }

    #[test]
    fn counted_prompts_stay_within_the_vocabulary() {
        for vocab_size in [1, 5, 32, 1 << 20] {
            let prompts = counted_prompts(vocab_size);
            assert_eq!(prompts.len(), 4);
            assert!(prompts.iter().flatten().all(|token| *token < vocab_size));
        }
    }
}
