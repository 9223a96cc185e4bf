//! `config.json`: what is read can be written again for an export, and then says the same.

#![no_main]

use checkpoint::{Dtype, ModelConfig, espalier_config, export_config, export_form, padded_spec};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let path = Path::new("config.json");
    let Ok(config) = ModelConfig::parse(path, data) else { return };
    let spec = &config.spec;
    spec.validate().expect("what was read makes a model");
    let _ = spec.parameter_count();
    let _ = export_form(spec);
    let _ = export_config(&config.raw, spec, Dtype::F16);
    padded_spec(spec).validate().expect("a padded model is one");
    if let Ok(written) = espalier_config(&config.raw, spec, Dtype::Bf16) {
        let read = ModelConfig::from_object(path, written).expect("what was written can be read");
        assert_eq!(read.spec.layers, spec.layers);
    }
});
