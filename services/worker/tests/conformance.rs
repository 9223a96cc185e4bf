//! The engine on libtorch keeps the promises that the worker relies on.

use checkpoint::ModelFolder;
use engine_tch::{Device, TchEngine};
use std::path::Path;

#[test]
fn the_engine_of_the_binary_keeps_the_promises_of_the_traits() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models");
    for name in ["mha", "gqa", "tied", "mistral_headdim"] {
        let model = models.join(name);
        let dense = ModelFolder::open(&model).unwrap().spec().clone();
        let scratch = tempfile::tempdir().unwrap();
        let engine = TchEngine::new(Device::Cpu, 1, env!("CARGO_BIN_EXE_worker").into());
        engine::conformance::check(&engine, &model, &dense, scratch.path());
    }
}
