//! Multiple-choice tasks: rows of a file to contexts and continuations of token ids, and which choice wins.
//!
//! The rules are those of lm-evaluation-harness (EleutherAI): which text is judged, where its tokens begin, what is cut
//! off when it is too long, and both accuracies.

use std::path::{Path, PathBuf};

use crate::error::{DataError, Place};
use crate::source::TextSource;
use crate::tokenize::TextTokenizer;

mod rows;
mod score;

use rows::Row;
pub use score::{TaskCounts, TaskOutcome};

/// A text that a model is asked to go on with.
const QUESTION: &str = "Question:";
const ANSWER: &str = "Answer:";

/// One task, ready to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskSet {
    name: String,
    questions: Vec<Question>,
}

/// One row of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// At least two.
    pub choices: Vec<Choice>,
    /// Index of the right choice.
    pub gold: usize,
}

/// One pair that a model judges: how likely is `continuation` after `context`?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Not empty, unlike in the text cut off at the left.
    pub context: Vec<u32>,
    /// Not empty.
    pub continuation: Vec<u32>,
    /// Characters of the choice, by which its log likelihood is divided; absent where contexts are compared.
    pub characters: Option<usize>,
}

/// How rows become tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskLimits {
    /// Only the first so many rows; absent: all.
    pub max_rows: Option<u64>,
    /// Tokens that the model sees at once. Context and continuation may be one longer: the last is only predicted.
    pub positions: usize,
}

impl TaskSet {
    /// Reads the file of a task, one JSON object a line:
    ///
    /// ```text
    /// {"query": "…", "choices": ["…", "…"], "gold": 0}                        choices compared behind one query
    /// {"context_options": ["…", "…"], "continuation": "…", "gold": 1}         contexts compared by what follows
    /// ```
    ///
    /// A query with a line that begins with `Question:` and no `Answer:` at its end is completed by `\nAnswer:`. Context
    /// and choice are joined by a space.
    ///
    /// # Errors
    /// When the file or a row is wrong, by its line.
    pub fn load(
        path: &Path,
        name: String,
        tokenizer: &TextTokenizer,
        limits: TaskLimits,
    ) -> Result<Self, DataError> {
        let mut questions = Vec::new();
        let source = TextSource::new(path, crate::TextFormat::JsonLines { field: "gold".into() });
        source.check_file()?;
        let limit = limits.max_rows.unwrap_or(u64::MAX);
        rows::for_each(path, limit, &mut |row, line| {
            let place = RowPlace { path, line };
            questions.push(place.question(&row, tokenizer, limits.positions)?);
            Ok(())
        })?;
        if questions.is_empty() {
            return Err(DataError::NoTaskRows { path: path.to_owned() });
        }
        Ok(Self { name, questions })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// In the order of the file; at least one.
    #[must_use]
    pub fn questions(&self) -> &[Question] {
        &self.questions
    }

    /// The pairs of all questions, in their order.
    pub fn choices(&self) -> impl Iterator<Item = &Choice> {
        self.questions.iter().flat_map(|question| &question.choices)
    }
}

/// What a task is called: its file's name without the extension.
#[must_use]
pub fn task_name(path: &Path) -> String {
    path.file_stem().map_or_else(|| "task".to_owned(), |stem| stem.to_string_lossy().into_owned())
}

struct RowPlace<'a> {
    path: &'a Path,
    line: u64,
}

impl RowPlace<'_> {
    fn question(
        &self,
        row: &Row,
        tokenizer: &TextTokenizer,
        positions: usize,
    ) -> Result<Question, DataError> {
        let choices = match row {
            Row::Choices { query, choices, .. } => {
                let query = completed(query);
                let context = self.context(&query, tokenizer)?;
                let choice = |text: &String| {
                    let continuation = self.continuation(&query, &context, text, tokenizer)?;
                    let context = self.cut(&context, &continuation, positions)?;
                    Ok(Choice { context, continuation, characters: Some(text.chars().count()) })
                };
                choices.iter().map(choice).collect::<Result<Vec<_>, DataError>>()?
            }
            Row::Contexts { context_options, continuation, .. } => {
                let choice = |text: &String| {
                    let context = self.context(text, tokenizer)?;
                    let continuation = self.continuation(text, &context, continuation, tokenizer)?;
                    let context = self.cut(&context, &continuation, positions)?;
                    Ok(Choice { context, continuation, characters: None })
                };
                context_options.iter().map(choice).collect::<Result<Vec<_>, DataError>>()?
            }
        };
        Ok(Question { choices, gold: row.gold() })
    }

    /// The context's tokens, without white space at its end, which goes to the continuation.
    fn context(&self, text: &str, tokenizer: &TextTokenizer) -> Result<Vec<u32>, DataError> {
        let tokens = tokenizer.encode(text.trim_end(), self.path, Place::Line(self.line))?;
        if tokens.is_empty() { Err(self.unusable("its context gives no token".into())) } else { Ok(tokens) }
    }

    /// The continuation's tokens: those of the whole text behind as many as the context alone has.
    fn continuation(
        &self,
        context_text: &str,
        context: &[u32],
        text: &str,
        tokenizer: &TextTokenizer,
    ) -> Result<Vec<u32>, DataError> {
        let whole = format!("{context_text} {text}");
        let whole = tokenizer.encode(&whole, self.path, Place::Line(self.line))?;
        match whole.get(context.len()..) {
            Some(tokens) if !tokens.is_empty() => Ok(tokens.to_vec()),
            Some(_) | None => Err(self.unusable(format!("`{text}` gives no token behind its context"))),
        }
    }

    /// The end of the context that fits before the continuation.
    fn cut(&self, context: &[u32], continuation: &[u32], positions: usize) -> Result<Vec<u32>, DataError> {
        let room = (positions + 1).saturating_sub(continuation.len());
        if room == 0 {
            return Err(self.unusable(format!(
                "a choice of {} tokens is longer than the model's {positions} positions",
                continuation.len()
            )));
        }
        Ok(context[context.len().saturating_sub(room)..].to_vec())
    }

    fn unusable(&self, reason: String) -> DataError {
        DataError::UnusableTaskRow { path: PathBuf::from(self.path), line: self.line, reason }
    }
}

/// A query that asks a question is told to answer, as the prompts of boolq, piqa and arc are.
fn completed(query: &str) -> String {
    let text = query.trim_end();
    let asks = text.lines().any(|line| line.starts_with(QUESTION)) && !text.ends_with(ANSWER);
    if asks { format!("{text}\n{ANSWER}") } else { query.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_told_to_answer_and_a_beginning_is_not() {
        for (query, expected) in [
            ("Question: why?\n", "Question: why?\nAnswer:"),
            ("Passage: long.\nQuestion: is it?", "Passage: long.\nQuestion: is it?\nAnswer:"),
            ("Question: why?\nAnswer:", "Question: why?\nAnswer:"),
            ("He said: Question: ", "He said: Question: "),
            ("Predators eat", "Predators eat"),
        ] {
            assert_eq!(completed(query), expected);
        }
    }
}
