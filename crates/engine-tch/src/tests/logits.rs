//! Logits of the tiny models against `transformers`.

use super::group::fixtures;
use crate::communicator::Alone;
use crate::dropout::Dropout;
use crate::factors::FactorLayout;
use crate::frozen::FrozenFormat;
use crate::model::{Adapters, Model};
use crate::source::Source;
use safetensors::SafeTensors;
use sharding::Placement;
use tch::{Device, Kind, Tensor};

fn logits_of(model: &str, kind: Kind, rows: &[&[u32]]) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let source = Source::open(&fixtures().join("models").join(model)).unwrap();
    let spec = source.spec();
    let held = Placement::dense(spec, 1).unwrap().ranks.remove(0);
    let mut loaded = Model::load(
        &source,
        &held,
        0..spec.vocab_size,
        FrozenFormat::Dense(kind),
        kind,
        Device::Cpu,
        &engine::Progress::default(),
    )
    .unwrap();
    let layout = FactorLayout::new(spec, &held, 1);
    let factors = layout.zeros(kind, Device::Cpu).unwrap();
    let adapters = Adapters {
        layout: &layout,
        factors: &factors,
        ledger: &[],
        lora_rank: 1,
        scaling: 1.0,
        dropout: Dropout::off(),
    };
    loaded.logits(rows, &adapters, &mut Alone).unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    for model in ["mha", "gqa", "tied", "llama3_rope", "mistral_headdim", "bf16_sharded"] {
        let bytes = std::fs::read(fixtures().join(format!("goldens/{model}.safetensors"))).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |name: &str, kind| {
            let view = golden.tensor(name).unwrap();
            let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
            Tensor::from_data_size(view.data(), &shape, kind)
        };
        let ids = tensor("input_ids", Kind::Int64);
        let rows: Vec<Vec<u32>> = (0..ids.size()[0])
            .map(|row| (0..ids.size()[1]).map(|token| ids.int64_value(&[row, token]) as u32).collect())
            .collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        for (name, kind, bound) in [("logits", Kind::Float, 1e-4), ("logits_f64", Kind::Double, 1e-9)] {
            let expected = tensor(name, kind).view([ids.numel() as i64, -1]);
            let difference = (logits_of(model, kind, &rows) - expected).abs().max().double_value(&[]);
            assert!(difference <= bound, "{model} {name}: largest difference {difference:.2e}");
        }
    }
}
