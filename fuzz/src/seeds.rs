//! Writes the seeds of all targets to `seeds/TARGET`: small, and right where the target can be.

#[path = "../../crates/token-batches/tests/support/mod.rs"]
mod support;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use checkpoint::testing::{GgufBuilder, config_of, tiny_gguf, tiny_spec, tiny_tokenizer, write_tiny_model};
use checkpoint::{
    Dtype, ExportManifest, FileDigest, LayerKept, MANIFEST_FORMAT_VERSION, Sha256Digest, SourceModel,
};
use model_spec::{LayerSpec, ModelSpec};
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use prost::Message;
use pruning::{KeepMask, LayerKeep};
use recipe::Recipe;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use support::{Folder, properties, write_text_table, write_token_table};
use wire::pb;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    if seeds.exists() {
        fs::remove_dir_all(&seeds)?;
    }
    let seeds = Seeds { folder: seeds };
    models(&seeds)?;
    texts(&seeds)?;
    messages(&seeds)?;
    words(&seeds)
}

struct Seeds {
    folder: PathBuf,
}

impl Seeds {
    fn write(&self, target: &str, name: &str, content: impl AsRef<[u8]>) -> Outcome {
        let folder = self.folder.join(target);
        fs::create_dir_all(&folder)?;
        Ok(fs::write(folder.join(name), content)?)
    }
}

/// One layer of widths that blocks of 32 divide.
fn one_layer() -> ModelSpec {
    let layer = LayerSpec { query_head_count: 4, kv_head_count: 2, intermediate_size: 32 };
    ModelSpec { hidden_size: 32, head_dim: 8, vocab_size: 12, layers: vec![layer], ..tiny_spec() }
}

fn models(seeds: &Seeds) -> Outcome {
    let folder = Folder::new();
    let model = folder.path("model");
    write_tiny_model(&model, &tiny_spec(), Dtype::Bf16, 1, u64::MAX)?;
    seeds.write("safetensors", "model", fs::read(model.join("model.safetensors"))?)?;
    seeds.write("tokenizer", "bytes", tiny_tokenizer(20))?;
    seeds.write("tokenizer", "words", WORD_TOKENIZER)?;
    let sharded = folder.path("sharded");
    write_tiny_model(&sharded, &tiny_spec(), Dtype::Bf16, 1, 6000)?;
    seeds.write("weights_index", "index", fs::read(sharded.join("model.safetensors.index.json"))?)?;

    let narrow = LayerSpec { query_head_count: 2, kv_head_count: 1, intermediate_size: 16 };
    let uneven = ModelSpec { layers: vec![tiny_spec().layers[0], narrow], ..tiny_spec() };
    for (name, spec) in [("even", tiny_spec()), ("uneven", uneven)] {
        seeds.write("model_config", name, Value::Object(config_of(&spec, Dtype::Bf16)).to_string())?;
    }
    let mut rope = config_of(&tiny_spec(), Dtype::F32);
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    rope.insert("rope_scaling".to_owned(), scaling);
    seeds.write("model_config", "rope", Value::Object(rope).to_string())?;

    for block_type in ["F32", "Q8_0", "Q4_1"] {
        seeds.write("gguf", block_type, tiny_gguf(&one_layer(), block_type, 1).build())?;
    }
    let empty = GgufBuilder { metadata: Vec::new(), tensors: Vec::new() };
    seeds.write("gguf", "header", empty.text("general.architecture", "llama").build())?;

    let digest = |name: &str| FileDigest {
        name: name.to_owned(),
        size_bytes: 4,
        sha256: Sha256Digest::of(name.as_bytes()),
    };
    let manifest = ExportManifest {
        format_version: MANIFEST_FORMAT_VERSION,
        source_model: SourceModel { name: "small".to_owned(), files: vec![digest("config.json")] },
        recipe: serde_json::to_value(Recipe::default())?,
        layers: vec![LayerKept {
            kept_query_heads: vec![0, 1],
            kept_kv_heads: vec![0],
            kept_channels: vec![3, 5],
        }],
        parameters_before: 100,
        parameters_after: 50,
        files: vec![digest("model.safetensors")],
        versions: BTreeMap::from([("espalier".to_owned(), "0.1.0".to_owned())]),
        verification: Value::Null,
    };
    seeds.write("export_manifest", "manifest", manifest.to_json())
}

const WORD_TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"Replace","pattern":{"Regex":" +"},"content":" "}]},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"\\w+|[^\\w]"},"behavior":"Isolated","invert":false},"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"<s>":0,"a":1,"cat":2," ":3,"<unk>":4},"unk_token":"<unk>"}}"#;

fn texts(seeds: &Seeds) -> Outcome {
    // The first byte picks format and joining.
    for (name, choice, content) in [
        ("json_lines", 0, "{\"text\": \"a cat\"}\n\n{\"text\": \"sat \\u00e4 here\"}\n"),
        ("json_documents", 5, "{\"text\": \"a cat\", \"other\": [1, {}]}\n{\"text\": \"\"}\n"),
        ("token_lines", 1, "{\"ids\": [1, 2, 3, 4, 5]}\n{\"ids\": []}\n"),
        ("plain", 2, "a cat sat\non the mat\n"),
        ("stories", 12, "a cat\n<|endoftext|>\nsat on\n"),
        ("tokens_u16", 3, "\u{1}\0\u{2}\0\u{3}\0\u{4}\0\u{5}\0"),
        ("tokens_u32", 4, "\u{1}\0\0\0\u{2}\0\0\0\u{3}\0\0\0\u{4}\0\0\0"),
    ] {
        seeds.write("text", name, [&[choice], content.as_bytes()].concat())?;
    }
    for (name, row) in [
        ("choices", json!({"query": "a cat\nQuestion: sat?", "choices": ["on", "off"], "gold": 1})),
        ("contexts", json!({"context_options": ["a cat", "a mat"], "continuation": "sat", "gold": 0})),
    ] {
        seeds.write("tasks", name, format!("{row}\n"))?;
    }
    let folder = Folder::new();
    let path = folder.path("table");
    for (name, compression) in [
        ("plain", Compression::UNCOMPRESSED),
        ("snappy", Compression::SNAPPY),
        ("gzip", Compression::GZIP(GzipLevel::default())),
        ("zstd", Compression::ZSTD(ZstdLevel::default())),
    ] {
        write_text_table(&path, &[Some(b"a cat"), None, Some(b"sat on the mat")], properties(compression));
        seeds.write("parquet", name, fs::read(&path)?)?;
    }
    write_token_table(&path, &[vec![Some(1), Some(2), Some(3)], vec![], vec![Some(4), Some(5)]], true);
    seeds.write("parquet", "tokens", fs::read(&path)?)
}

fn messages(seeds: &Seeds) -> Outcome {
    let source = pb::TextSource { path: "/data/a.jsonl".to_owned(), format: 0, field: String::new() };
    let evaluation = pb::EvaluationSpec {
        sources: vec![source.clone()],
        window_tokens: Some(128),
        more_window_tokens: vec![256],
        max_tokens: 1000,
        mode: Some(pb::EvaluationMode::Stream.into()),
        rows: Some(2),
    };
    let tasks = pb::TaskSpec { files: vec!["/data/boolq.jsonl".to_owned()], ..pb::TaskSpec::default() };
    let recipe = wire::convert::recipe::to_pb(&Recipe {
        steps: 10,
        pruning: Some(recipe::Pruning::default()),
        ..Recipe::default()
    });
    let spec = pb::RunSpec {
        model: "/models/small".to_owned(),
        training_data: vec![source],
        recipe: Some(recipe.clone()),
        tp_degree: Some(2),
        evaluation: Some(evaluation.clone()),
        export: Some(pb::ExportSpec { path: "/out".to_owned(), dtype: None, max_shard_bytes: None }),
        tasks: Some(tasks.clone()),
        ..pb::RunSpec::default()
    };
    seeds.write("run_spec", "whole", spec.encode_to_vec())?;
    let spec_text = BASE64_STANDARD.encode(spec.encode_to_vec());
    let layer = LayerKeep { query_heads: vec![0, 1], kv_heads: vec![0], channels: vec![1, 2, 9] };
    let mask = KeepMask { layers: vec![layer.clone(); 2] };
    let scores = pb::ScoreChunk { step: 3, projection: 1, values_f32: vec![0.5, 1.0], ..Default::default() };
    let event = pb::RunEvent {
        revision: 1,
        time: Some(wire::convert::time::time_to_pb(std::time::UNIX_EPOCH)),
        kind: Some(pb::run_event::Kind::Step(pb::StepReport { step: 1, loss: 2.5, ..Default::default() })),
    };
    let conversions = [
        wire::convert::mask::to_pb(&mask).encode_to_vec(),
        scores.encode_to_vec(),
        recipe.encode_to_vec(),
        evaluation.encode_to_vec(),
        tasks.encode_to_vec(),
        event.encode_to_vec(),
    ];
    for (choice, message) in (0..).zip(conversions) {
        seeds.write("conversions", &format!("{choice}"), [vec![choice], message].concat())?;
    }
    // An identifier in field 1, which most requests begin with.
    for choice in 0..33 {
        seeds.write("requests", &format!("{choice}"), [&[choice, 10, 3], "r-1".as_bytes()].concat())?;
    }
    let create =
        pb::CreateRunRequest { spec: Some(spec), request_id: "once".to_owned(), validate_only: true };
    seeds.write("requests", "create", [vec![4], create.encode_to_vec()].concat())?;
    let state = json!({"event": {"revision": 1, "time": {"secs_since_epoch": 1, "nanos_since_epoch": 0},
        "kind": {"state_change": {"state": "queued", "message": "waits"}}}});
    seeds.write("records", "event", [vec![1], state.to_string().into_bytes()].concat())?;
    let packed = postcard::to_extend(&vec![layer], vec![2, 1])?;
    seeds.write("records", "mask", packed)?;
    let file = json!({"file": "rank-0.safetensors", "sha256": "0".repeat(64), "size_bytes": 1});
    let place = json!({"run_id": "run-1", "name": "00000010-1", "steps_done": 10, "generation": 1});
    let manifest = json!({"format_version": 1, "place": place, "state": file, "shards": [file]});
    seeds.write("records", "manifest", [vec![3], manifest.to_string().into_bytes()].concat())?;
    let run = json!({"spec": spec_text, "plan": "", "dense": tiny_spec(), "fork": null});
    seeds.write("records", "run", [vec![0], run.to_string().into_bytes()].concat())
}

/// Files for people.
fn words(seeds: &Seeds) -> Outcome {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/runs");
    for entry in fs::read_dir(runs)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        seeds.write("run_file", &name, fs::read(&path)?)?;
    }
    seeds.write("run_file", "recipe", serde_yaml_ng::to_string(&Recipe::default())?)?;
    for (name, filter) in [
        ("filter", "state = RUNNING AND create_time > \"2026-01-01T00:00:00Z\""),
        ("nested", "NOT (id = r-17 OR -display_name:half) AND model != \"/models/\\\"x\\\"\""),
        ("order", "display_name, create_time desc"),
    ] {
        seeds.write("run_filter", name, filter)?;
    }
    for (name, path) in [
        ("file", "model/file"),
        ("link", "way_out/file"),
        ("dangling", "nowhere/deep"),
        ("parent", "model/../../out"),
        ("folder_url", "file:///data/runs"),
        ("bucket_url", "s3://bucket/some/prefix"),
        ("root_url", "s3://models/runs/one"),
        ("below_bucket", "runs/one"),
    ] {
        seeds.write("paths", name, path)?;
    }
    Ok(())
}
