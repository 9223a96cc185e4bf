//! From the files of a request to windows of token ids.

use crate::failure;
use checkpoint::ModelFolder;
use recipe::Recipe;
use std::path::{Path, PathBuf};
use token_batches::{BatchOrder, Corpus, EvaluationSet, Joining, TextFormat, TextSource, TrainingSet};
use wire::status::{Failure, Reason};
use wire::{EvaluationMode, EvaluationSpec};

/// Prompts of the export's check, and the tokens of each.
const PROMPT_COUNT: usize = 4;
const PROMPT_TOKENS: usize = 32;

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
}

/// What a session has read.
pub(crate) struct SessionData {
    training: Option<TrainingSet>,
    evaluation: Option<(EvaluationSet, usize)>,
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
            None => None,
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
                let set = EvaluationSet::load(&corpus(sources, joining)?, spec.window_tokens, limit)
                    .map_err(|error| failure::of_data(&error))?;
                Some((set, spec.rows))
            }
        };
        let narrow = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let order = BatchOrder {
            seed: recipe.seed,
            micro_batches_per_step: narrow(recipe.batch.micro_batches),
            rows_per_micro_batch: narrow(recipe.batch.rows),
        };
        let prompts = match (&evaluation, &training) {
            (Some((set, _)), _) => prompts_from(&set.rows()),
            (None, Some(set)) => prompts_from(&set.windows().iter().collect::<Vec<_>>()),
            (None, None) => counted_prompts(vocab_size),
        };
        Ok(Self { training, evaluation, order, prompts })
    }

    /// SHA-256 of the training data in hex and its windows; nothing without training data.
    pub(crate) fn training_digest(&self) -> (String, u64) {
        self.training
            .as_ref()
            .map_or_else(Default::default, |set| (set.digest().to_owned(), set.windows().count().get()))
    }

    /// The micro-batches of a step, each a list of windows; nothing without training data.
    pub(crate) fn micro_batches(&self, step: u64) -> Option<Vec<Vec<&[u32]>>> {
        let set = self.training.as_ref()?;
        let micro_batches = 0..self.order.micro_batches_per_step;
        Some(micro_batches.map(|micro_batch| set.micro_batch(&self.order, step, micro_batch)).collect())
    }

    /// Rows to measure perplexity on, and how many of them go into a pass.
    pub(crate) fn evaluation(&self) -> Option<(Vec<&[u32]>, usize)> {
        self.evaluation.as_ref().map(|(set, rows_per_pass)| (set.rows(), *rows_per_pass))
    }

    /// Fixed token windows for the export's check, equal on all ranks.
    pub(crate) fn prompts(&self) -> &[Vec<u32>] {
        &self.prompts
    }
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
    fn counted_prompts_stay_within_the_vocabulary() {
        for vocab_size in [1, 5, 32, 1 << 20] {
            let prompts = counted_prompts(vocab_size);
            assert_eq!(prompts.len(), 4);
            assert!(prompts.iter().flatten().all(|token| *token < vocab_size));
        }
    }
}
