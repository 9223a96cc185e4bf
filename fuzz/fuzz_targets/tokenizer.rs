//! `tokenizer.json`, and text through it.

#![no_main]

use espalier_fuzz::{Folder, allow_caught_panics};
use libfuzzer_sys::fuzz_target;
use std::path::Path;
use std::sync::LazyLock;
use token_batches::{Place, TextTokenizer};

const VOCAB_SIZE: u32 = 64;
static FOLDER: LazyLock<Folder> = LazyLock::new(Folder::new);

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    let path = FOLDER.write("tokenizer.json", data);
    let Ok(tokenizer) = TextTokenizer::load(&path, VOCAB_SIZE) else { return };
    for text in ["", "a cat sat on the mat", "  ä\u{1f600}\n\t0123 <s></s>"] {
        if let Ok(ids) = tokenizer.encode(text, Path::new("text"), Place::WholeFile) {
            assert!(ids.iter().all(|id| *id < VOCAB_SIZE));
        }
    }
});
