//! The memory that a run is planned to take, against what the kernel says that its workers took.

use checkpoint::required_tensors;
use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use planner::{Device, Question, Stage, estimate};
use processes_tests::{Tool, fixture};
use recipe::{Batch, Precision, Recipe, Recompute, Storage};
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(100);
/// Share by which a plan may be off.
const TOLERANCE: f64 = 0.1;

/// Large enough that the model and not the process decides: 166 million weights.
fn model() -> ModelSpec {
    let widths = LayerSpec { query_head_count: 16, kv_head_count: 16, intermediate_size: 2752 };
    ModelSpec {
        family: Family::Llama,
        hidden_size: 1024,
        head_dim: 64,
        vocab_size: 32_000,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        layers: vec![widths; 8],
    }
}

/// A folder with this model: norms of one, and the same few weights over and over.
fn write_model(spec: &ModelSpec, folder: &Path) {
    let layer = &spec.layers[0];
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "head_dim": spec.head_dim,
        "intermediate_size": layer.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": layer.query_head_count,
        "num_hidden_layers": spec.layers.len(),
        "num_key_value_heads": layer.kv_head_count,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope.theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "vocab_size": spec.vocab_size,
    });
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::copy(fixture("models/gqa/tokenizer.json"), folder.join("tokenizer.json")).unwrap();

    let tensors = required_tensors(spec);
    let (mut header, mut offset) = (Map::new(), 0);
    for (name, shape) in &tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let bf16 = |value: f32| ((value.to_bits() >> 16) as u16).to_le_bytes();
    let weights: Vec<u8> = (0..(1usize << 16) + 7)
        .flat_map(|place| bf16(((place * 7919) % 2001) as f32 * 2e-5 - 0.02))
        .collect();
    for (_, shape) in &tensors {
        let mut rest = 2 * shape.iter().product::<usize>();
        if shape.len() == 1 {
            file.write_all(&bf16(1.0).repeat(rest / 2)).unwrap();
            continue;
        }
        while rest > 0 {
            let count = rest.min(weights.len());
            file.write_all(&weights[..count]).unwrap();
            rest -= count;
        }
    }
    file.flush().unwrap();
}

fn write_tokens(path: &Path, count: usize) {
    let bytes: Vec<u8> =
        (0..count).flat_map(|place| (((place * 131) % 31_999) as u16).to_le_bytes()).collect();
    fs::write(path, bytes).unwrap();
}

/// The most memory that a process has had, in bytes, if it is a worker and still there.
fn peak_of_worker(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let kilobytes: u64 = value("VmHWM:")?.strip_suffix("kB")?.trim().parse().ok()?;
    (value("Name:")? == "worker").then_some(kilobytes * 1024)
}

/// Steps that a run has reported.
fn steps_done(events: &Path) -> usize {
    let text = fs::read_to_string(events).unwrap_or_default();
    let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    events.filter(|event| event["step"].is_object()).count()
}

/// Whether a process of ours is gone, but for being waited for.
fn has_ended(id: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    status.is_empty() || status.lines().any(|line| line.starts_with("State:") && line.contains('Z'))
}

fn tuning(rows: usize, window_tokens: usize, dropout: f64) -> Recipe {
    let mut recipe = Recipe {
        steps: 3,
        batch: Batch { rows, window_tokens, micro_batches: 1 },
        pruning: None,
        ..Recipe::default()
    };
    recipe.lora.dropout = dropout;
    recipe
}

fn stored(storage: Storage, recipe: Recipe) -> Recipe {
    Recipe { precision: Precision { storage, ..recipe.precision }, ..recipe }
}

#[test]
fn workers_take_the_memory_that_was_planned() {
    let folder = tempfile::tempdir().unwrap();
    let (spec, path) = (model(), folder.path().join("model"));
    write_model(&spec, &path);
    let tokens = folder.path().join("text.u16");
    write_tokens(&tokens, 1 << 16);
    let again = Recipe { recompute: Recompute::Layer, ..tuning(8, 256, 0.0) };
    let cases = [
        ("f32", 1, tuning(4, 256, 0.0)),
        ("bf16, dropout", 1, stored(Storage::Bf16, tuning(4, 256, 0.05))),
        ("nf4, layers run again", 1, stored(Storage::Nf4, again)),
        ("int8, long windows", 1, stored(Storage::Int8, tuning(2, 512, 0.0))),
        ("f32 on two ranks", 2, tuning(8, 256, 0.0)),
    ];
    let mut wrong = Vec::new();
    for (place, (name, workers, recipe)) in cases.into_iter().enumerate() {
        let question = Question { dense: &spec, recipe: &recipe, tp_degree: workers, device: &Device::cpu() };
        let estimate = estimate(&question).unwrap_or_else(|found| panic!("{name}: {found:?}"));
        let planned = [Stage::Loading, Stage::FirstStep]
            .into_iter()
            .filter_map(|stage| estimate.stage(stage))
            .map(|memory| memory.total())
            .max()
            .unwrap();
        let file = folder.path().join(format!("{place}.yaml"));
        fs::write(&file, serde_json::to_string(&recipe).unwrap()).unwrap();
        let mut running = Tool::espalier("prune --threads 1 --export-dtype bf16")
            .flag("--model", &path)
            .flag("--data", &tokens)
            .flag("--recipe", &file)
            .flag("--workers", workers.to_string())
            .flag("--out", folder.path().join(format!("out{place}")))
            .start();
        let mut peaks: BTreeMap<u32, u64> = BTreeMap::new();
        let events = folder.path().join(format!("out{place}/events.jsonl"));
        let end = Instant::now() + DEADLINE;
        // Until the last step's report: what export takes is no part of the plan.
        while Instant::now() < end && !has_ended(running.id()) {
            let _ = running.wait_for(POLL, || None::<()>);
            for id in running.descendants() {
                if let Some(peak) = peak_of_worker(id) {
                    peaks.insert(id, peak);
                }
            }
            if steps_done(&events) as u64 == recipe.steps {
                break;
            }
        }
        let _ = running.finish(DEADLINE).expect_success();
        assert_eq!(peaks.len(), workers, "{name}: {peaks:?}");
        for measured in peaks.values() {
            let ratio = planned as f64 / *measured as f64;
            println!(
                "{name}: planned {} MB, took {} MB, {ratio:.3}",
                planned / 1_000_000,
                measured / 1_000_000
            );
            if (ratio - 1.0).abs() > TOLERANCE {
                wrong.push(format!("{name}: planned {planned}, took {measured}: {:?}", estimate.stages));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
