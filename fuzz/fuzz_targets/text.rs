//! JSON lines, plain text and raw token ids, joined in every way. The first byte picks format and joining.

#![no_main]

use checkpoint::testing::tiny_tokenizer;
use espalier_fuzz::{Folder, allow_caught_panics};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use token_batches::{Corpus, EvaluationSet, Joining, TextFormat, TextSource, TrainingSet};

const VOCAB_SIZE: u32 = 128;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    let folder = Folder::new();
    folder.write("tokenizer.json", tiny_tokenizer(VOCAB_SIZE as usize).as_bytes());
    folder
});

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    let Some((choice, content)) = data.split_first() else { return };
    let format = match choice % 5 {
        0 => TextFormat::JsonLines { field: "text".to_owned() },
        1 => TextFormat::TokenJsonLines { field: "ids".to_owned() },
        2 => TextFormat::PlainText,
        3 => TextFormat::TokensU16,
        _ => TextFormat::TokensU32,
    };
    let joining = match choice / 5 % 3 {
        0 => Joining::Stream,
        1 => Joining::Documents { begin: Some(1), end: Some(2) },
        _ => Joining::Stories { begin: 1 },
    };
    let source = TextSource::new(FOLDER.write("data", content), format);
    let tokenizer_json = FOLDER.path("tokenizer.json");
    let corpus = Corpus { sources: vec![source], tokenizer_json, vocab_size: VOCAB_SIZE, joining };
    if let Ok(set) = TrainingSet::load(&corpus, 4) {
        assert!(set.windows().iter().flatten().all(|id| *id < VOCAB_SIZE));
    }
    if let Ok(set) = EvaluationSet::load(&corpus, 4, Some(9)) {
        assert!(set.rows().into_iter().flatten().all(|id| *id < VOCAB_SIZE));
        assert!(set.predicted_count() > 0);
    }
});
