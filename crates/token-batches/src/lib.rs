//! The path from text files to fixed windows of token ids.
//!
//! Everything here is a pure function of the files, the tokenizer and the options: the same input
//! gives the same ids, the same windows and the same order, whatever the number of processes or
//! threads. Nothing is cached on disk, and no input file, however broken, may panic.
//!
//! - [`TextSource`]: one file and its [`TextFormat`].
//! - [`Corpus`]: files, tokenizer and how documents are joined ([`Joining`]).
//! - [`TrainingSet`]: non-overlapping windows, dealt out by [`BatchOrder`].
//! - [`EvaluationSet`]: the rows over which perplexity is measured.
//! - [`TaskSet`]: multiple-choice questions, and which choice wins.

mod collect;
mod digest;
mod error;
mod evaluation;
mod guard;
mod joining;
mod order;
mod source;
mod tasks;
mod tokenize;
mod training;
mod windows;

pub use collect::Corpus;
pub use error::{DataError, Place};
pub use evaluation::EvaluationSet;
pub use joining::{Joining, RowJoining, STORY_SEPARATOR};
pub use order::{BatchOrder, window_index};
pub use source::{TextFormat, TextSource};
pub use tasks::{Choice, Question, TaskCounts, TaskLimits, TaskOutcome, TaskSet, task_name};
pub use tokenize::TextTokenizer;
pub use training::TrainingSet;
pub use windows::Windows;
