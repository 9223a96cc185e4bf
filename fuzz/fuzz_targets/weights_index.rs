//! `model.safetensors.index.json`, beside two shards.

#![no_main]

use checkpoint::testing::{tiny_spec, write_tiny_model};
use checkpoint::{Dtype, ModelFolder};
use espalier_fuzz::Folder;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    let folder = Folder::new();
    write_tiny_model(&folder.path("model"), &tiny_spec(), Dtype::Bf16, 1, 6000).expect("a model");
    folder
});

fuzz_target!(|data: &[u8]| {
    FOLDER.write("model/model.safetensors.index.json", data);
    let model = ModelFolder::open(&FOLDER.path("model")).expect("the configuration is sound");
    if let Ok(weights) = model.open_weights() {
        let outside = weights.file_paths().find(|path| path.parent() != Some(model.path()));
        assert_eq!(outside, None);
    }
});
