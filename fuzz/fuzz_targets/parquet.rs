//! Tables of text and of token ids.

#![no_main]

use checkpoint::testing::tiny_tokenizer;
use espalier_fuzz::{Folder, allow_caught_panics};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use token_batches::{Corpus, Joining, TextFormat, TextSource, TrainingSet};

const VOCAB_SIZE: u32 = 128;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    let folder = Folder::new();
    folder.write("tokenizer.json", tiny_tokenizer(VOCAB_SIZE as usize).as_bytes());
    folder
});

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    let path = FOLDER.write("data.parquet", data);
    for format in [
        TextFormat::Parquet { column: "text".to_owned() },
        TextFormat::TokenParquet { column: "input_ids".to_owned() },
    ] {
        let corpus = Corpus {
            sources: vec![TextSource::new(&path, format)],
            tokenizer_json: FOLDER.path("tokenizer.json"),
            vocab_size: VOCAB_SIZE,
            joining: Joining::Stream,
        };
        if let Ok(set) = TrainingSet::load(&corpus, 4) {
            assert!(set.windows().iter().flatten().all(|id| *id < VOCAB_SIZE));
        }
    }
});
