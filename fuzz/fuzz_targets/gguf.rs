//! GGUF files: header, metadata, tokenizer, blocks. What was imported opens as a model.

#![no_main]

use checkpoint::{Dtype, ModelFolder, import_gguf};
use espalier_fuzz::Folder;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(Folder::new);

fuzz_target!(|data: &[u8]| {
    let out = FOLDER.path("out");
    let dtype = if data.len() % 2 == 0 { Dtype::Bf16 } else { Dtype::F32 };
    let imported = import_gguf(&FOLDER.write("model.gguf", data), &out, dtype);
    match imported {
        Ok(report) => {
            let model = ModelFolder::open(&out).expect("an imported model opens");
            model.open_weights().expect("its weights are whole");
            assert_eq!(model.spec().parameter_count(), report.parameter_count);
            fs::remove_dir_all(&out).expect("the folder is ours");
        }
        Err(_) => assert!(!out.exists(), "a failed import leaves nothing"),
    }
});
