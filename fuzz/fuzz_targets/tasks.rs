//! Files of multiple-choice questions.

#![no_main]

use checkpoint::testing::tiny_tokenizer;
use espalier_fuzz::{Folder, allow_caught_panics};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use token_batches::{TaskLimits, TaskSet, TextTokenizer};

const VOCAB_SIZE: u32 = 128;

static FOLDER: LazyLock<Folder> = LazyLock::new(Folder::new);
static TOKENIZER: LazyLock<TextTokenizer> = LazyLock::new(|| {
    let path = FOLDER.write("tokenizer.json", tiny_tokenizer(VOCAB_SIZE as usize).as_bytes());
    TextTokenizer::load(&path, VOCAB_SIZE).expect("a tokenizer")
});

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    let limits = TaskLimits { max_rows: Some(100), positions: 32 };
    let path = FOLDER.write("task.jsonl", data);
    let Ok(set) = TaskSet::load(&path, "task".to_owned(), &TOKENIZER, limits) else { return };
    for question in set.questions() {
        assert!(question.choices.len() >= 2 && question.gold < question.choices.len());
    }
    for choice in set.choices() {
        assert!(!choice.context.is_empty() && !choice.continuation.is_empty());
        assert!(choice.context.len() + choice.continuation.len() <= limits.positions + 1);
    }
});
