//! Weights as `model.safetensors` of a model folder, and as a file of a run's state.

#![no_main]

use checkpoint::testing::{config_of, tiny_spec, tiny_tokenizer};
use checkpoint::{Dtype, ModelFolder, check_finite, read_tensors};
use espalier_fuzz::Folder;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    let folder = Folder::new();
    let config = serde_json::to_vec(&config_of(&tiny_spec(), Dtype::Bf16)).expect("JSON");
    folder.write("config.json", &config);
    folder.write("tokenizer.json", tiny_tokenizer(tiny_spec().vocab_size).as_bytes());
    folder
});

fuzz_target!(|data: &[u8]| {
    let file = FOLDER.write("model.safetensors", data);
    if let Ok(read) = read_tensors(&file, None) {
        let bytes: usize = read.tensors.values().map(|tensor| tensor.bytes.len()).sum();
        assert!(bytes <= data.len());
    }
    let model = ModelFolder::open(FOLDER.root()).expect("the configuration is sound");
    if let Ok(weights) = model.open_weights() {
        for name in weights.names() {
            let tensor = weights.tensor(name).expect("a tensor that is listed");
            let _ = check_finite(&tensor);
            assert_eq!(tensor.to_f32_vec().len(), tensor.element_count());
        }
    }
});
