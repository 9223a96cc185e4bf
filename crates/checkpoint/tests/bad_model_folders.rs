//! Model folders with one thing wrong each: the error names the file, what is there, what was expected and what to do.

use checkpoint::testing::{config_of, tiny_spec, write_tiny_model};
use checkpoint::{Dtype, ModelFolder, check_finite};
use serde_json::{Map, Value, json};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// Opens the folder as a run does, reading every weight once, and gives the whole chain of the error.
fn open(folder: &Path) -> Result<(), String> {
    let model = ModelFolder::open(folder).map_err(|error| chain(&error))?;
    model.tokenizer_path().map_err(|error| chain(&error))?;
    let weights = model.open_weights().map_err(|error| chain(&error))?;
    for name in weights.names() {
        check_finite(&weights.tensor(name).unwrap()).map_err(|error| chain(&error))?;
    }
    Ok(())
}

fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    std::iter::once(error.to_string()).chain(causes.map(ToString::to_string)).collect::<Vec<_>>().join(": ")
}

/// A whole tiny model in a folder of its own, in `shard_bytes`.
fn model(place: &tempfile::TempDir, shard_bytes: u64) -> PathBuf {
    let folder = place.path().join("model");
    write_tiny_model(&folder, &tiny_spec(), Dtype::F32, 7, shard_bytes).unwrap();
    folder
}

fn assert_refused(folder: &Path, case: &str, expected: &[&str]) {
    let message = open(folder).expect_err(case);
    for part in expected {
        assert!(message.contains(part), "{case}: `{part}` is not in: {message}");
    }
}

/// Changes of `config.json` and what the message must say.
#[test]
fn a_wrong_configuration_is_refused_with_its_field() {
    type Change = fn(&mut Map<String, Value>);
    let cases: &[(&str, Change, &[&str])] = &[
        (
            "an unknown model type",
            |c| put(c, "model_type", json!("gpt2")),
            &["`model_type` is \"gpt2\"", "llama", "mistral"],
        ),
        ("no model type", |c| drop(c.remove("model_type")), &["lacks the field `model_type`"]),
        ("no hidden size", |c| drop(c.remove("hidden_size")), &["lacks the field `hidden_size`", "add it"]),
        ("no epsilon", |c| drop(c.remove("rms_norm_eps")), &["lacks the field `rms_norm_eps`"]),
        ("no vocabulary size", |c| drop(c.remove("vocab_size")), &["lacks the field `vocab_size`"]),
        (
            "a size as text",
            |c| put(c, "hidden_size", json!("16")),
            &["`hidden_size` is \"16\"", "a whole number"],
        ),
        ("a size with a fraction", |c| put(c, "vocab_size", json!(32.5)), &["`vocab_size` is 32.5"]),
        ("a negative size", |c| put(c, "intermediate_size", json!(-24)), &["`intermediate_size` is -24"]),
        ("no layers", |c| put(c, "num_hidden_layers", json!(0)), &["`num_hidden_layers` is 0", "from 1 to"]),
        (
            "a billion layers",
            |c| put(c, "num_hidden_layers", json!(1_000_000_000)),
            &["`num_hidden_layers`", "4096"],
        ),
        (
            "sizes that overflow",
            |c| put(c, "head_dim", json!(1 << 22)),
            &["`head_dim` is 4194304 with 4 heads"],
        ),
        (
            "heads that do not divide",
            |c| put(c, "num_key_value_heads", json!(3)),
            &["dimensions", "`num_attention_heads` 4", "`num_key_value_heads` 3"],
        ),
        (
            "no head dim and none follows",
            |c| {
                c.remove("head_dim");
                put(c, "num_attention_heads", json!(3));
                put(c, "num_key_value_heads", json!(3));
            },
            &["`num_attention_heads` is 3", "divisor of `hidden_size` 16"],
        ),
        ("an odd head dim", |c| put(c, "head_dim", json!(5)), &["`head_dim` 5 is odd"]),
        (
            "attention biases",
            |c| put(c, "attention_bias", json!(true)),
            &["`attention_bias` is true", "without biases"],
        ),
        ("MLP biases", |c| put(c, "mlp_bias", json!(true)), &["`mlp_bias` is true"]),
        (
            "a bias flag that is none",
            |c| put(c, "mlp_bias", json!("no")),
            &["`mlp_bias` is \"no\"", "true or false"],
        ),
        (
            "another activation",
            |c| put(c, "hidden_act", json!("gelu")),
            &["`hidden_act` is \"gelu\"", "silu"],
        ),
        (
            "a sliding window",
            |c| {
                put(c, "model_type", json!("mistral"));
                put(c, "sliding_window", json!(8));
            },
            &["`sliding_window` is 8", "null"],
        ),
        (
            "quantised weights",
            |c| put(c, "quantization_config", json!({ "bits": 4 })),
            &["`quantization_config`", "bf16"],
        ),
        (
            "another rope scaling",
            |c| put(c, "rope_scaling", json!({ "rope_type": "yarn", "factor": 4.0 })),
            &["`rope_scaling.rope_type` is \"yarn\"", "llama3"],
        ),
        (
            "a rope scaling without kind",
            |c| put(c, "rope_scaling", json!({ "factor": 4.0 })),
            &["lacks the field `rope_scaling.rope_type`"],
        ),
        (
            "a llama3 scaling without context",
            |c| {
                put(
                    c,
                    "rope_scaling",
                    json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 }),
                )
            },
            &["`rope_scaling.original_max_position_embeddings`"],
        ),
        (
            "two rope scalings",
            |c| {
                put(c, "rope_scaling", json!({ "type": "linear", "factor": 2.0 }));
                put(c, "rope_parameters", json!({ "rope_type": "linear", "factor": 4.0 }));
            },
            &["`rope_scaling`", "`rope_parameters`", "agree"],
        ),
        (
            "two thetas",
            |c| put(c, "rope_parameters", json!({ "rope_type": "default", "rope_theta": 5e5 })),
            &["`rope_theta` is 10000", "500000"],
        ),
        (
            "a partial rotation",
            |c| put(c, "partial_rotary_factor", json!(0.5)),
            &["`partial_rotary_factor` is 0.5"],
        ),
        (
            "per-layer widths of another depth",
            |c| put(c, "espalier_layers", json!([{}])),
            &["`espalier_layers`", "an array of 2 objects"],
        ),
        (
            "a layer without a width",
            |c| put(c, "espalier_layers", json!([{}, {}])),
            &["`espalier_layers[0].num_attention_heads`"],
        ),
        (
            "a token id that is none",
            |c| put(c, "eos_token_id", json!("</s>")),
            &["`eos_token_id` is \"</s>\""],
        ),
        (
            "dimensions of another model",
            |c| put(c, "intermediate_size", json!(32)),
            &["model.safetensors", "mlp.down_proj.weight", "[16, 24]", "[16, 32]"],
        ),
        (
            "fewer layers than the weights",
            |c| put(c, "num_hidden_layers", json!(1)),
            &["model.layers.1.", "no model of this `config.json` has"],
        ),
        (
            "more layers than the weights",
            |c| put(c, "num_hidden_layers", json!(3)),
            &["lacks tensor `model.layers.2."],
        ),
        (
            "a head that is not there",
            |c| put(c, "tie_word_embeddings", json!(false)),
            &["lacks tensor `lm_head.weight`", "`tie_word_embeddings`"],
        ),
    ];
    for (case, change, expected) in cases {
        let place = tempfile::tempdir().unwrap();
        let folder = model(&place, u64::MAX);
        let mut config = config_of(&tiny_spec(), Dtype::F32);
        change(&mut config);
        fs::write(folder.join("config.json"), Value::Object(config).to_string()).unwrap();
        assert_refused(&folder, case, expected);
    }
}

fn put(config: &mut Map<String, Value>, field: &str, value: Value) {
    config.insert(field.to_owned(), value);
}

/// Changes of the files themselves.
#[test]
fn a_damaged_folder_is_refused_with_its_file() {
    type Change = fn(&Path);
    let cases: &[(&str, u64, Change, &[&str])] = &[
        (
            "no folder",
            u64::MAX,
            |f| fs::remove_dir_all(f).unwrap(),
            &["model` does not exist", "Hugging Face layout"],
        ),
        (
            "a file as folder",
            u64::MAX,
            |f| {
                fs::remove_dir_all(f).unwrap();
                fs::write(f, "x").unwrap();
            },
            &["is not a folder"],
        ),
        ("no config.json", u64::MAX, |f| remove(f, "config.json"), &["has no `config.json`"]),
        (
            "broken JSON",
            u64::MAX,
            |f| fs::write(f.join("config.json"), "{\n  \"a\": 1,\n  oops\n}").unwrap(),
            &["config.json` is not valid JSON at line 3, column 3"],
        ),
        (
            "JSON that is no object",
            u64::MAX,
            |f| fs::write(f.join("config.json"), "[1, 2]").unwrap(),
            &["an array of 2 items", "expected a JSON object"],
        ),
        ("an empty config.json", u64::MAX, |f| fs::write(f.join("config.json"), "").unwrap(), &["line 1"]),
        ("no tokenizer", u64::MAX, |f| remove(f, "tokenizer.json"), &["has no `tokenizer.json`"]),
        (
            "no weights",
            u64::MAX,
            |f| remove(f, "model.safetensors"),
            &["has no weights", "model.safetensors"],
        ),
        (
            "only a pickle",
            u64::MAX,
            |f| rename(f, "model.safetensors", "pytorch_model.bin"),
            &["pytorch_model.bin` is a pickle", "safetensors"],
        ),
        (
            "only another pickle",
            u64::MAX,
            |f| rename(f, "model.safetensors", "consolidated.00.pth"),
            &["consolidated.00.pth` is a pickle"],
        ),
        (
            "only GGUF",
            u64::MAX,
            |f| rename(f, "model.safetensors", "model.gguf"),
            &["is GGUF", "espalier import --gguf"],
        ),
        (
            "weights that are a folder",
            u64::MAX,
            |f| {
                remove(f, "model.safetensors");
                fs::create_dir(f.join("model.safetensors")).unwrap();
            },
            &["no `model.safetensors.index.json`"],
        ),
        (
            "empty weights",
            u64::MAX,
            |f| fs::write(f.join("model.safetensors"), "").unwrap(),
            &["is 0 bytes long, expected at least 8"],
        ),
        (
            "a Git LFS pointer",
            u64::MAX,
            |f| {
                fs::write(f.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n")
                    .unwrap()
            },
            &["Git LFS pointer", "git lfs pull"],
        ),
        (
            "truncated weights",
            u64::MAX,
            |f| edit(f, "model.safetensors", |b| b.truncate(b.len() - 100)),
            &["model.safetensors` is", "its header describes", "truncated"],
        ),
        (
            "appended weights",
            u64::MAX,
            |f| edit(f, "model.safetensors", |b| b.push(0)),
            &["its header describes", "appended"],
        ),
        (
            "a header longer than the file",
            u64::MAX,
            |f| edit(f, "model.safetensors", |b| b[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes())),
            &["claims a header of 1099511627776 bytes"],
        ),
        (
            "the longest header",
            u64::MAX,
            |f| edit(f, "model.safetensors", |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes())),
            &["claims a header of 18446744073709551615 bytes"],
        ),
        (
            "a header that is no JSON",
            u64::MAX,
            |f| edit(f, "model.safetensors", |b| b[8] = b'x'),
            &["broken safetensors header", "invalid JSON"],
        ),
        (
            "a header of an unknown dtype",
            u64::MAX,
            |f| edit_header(f, "\"F32\"", "\"Q99\""),
            &["broken safetensors header"],
        ),
        ("weights of integers", u64::MAX, |f| edit_header(f, "\"F32\"", "\"I32\""), &["dtype I32", "BF16"]),
        (
            "offsets that lie",
            u64::MAX,
            |f| edit_header(f, "\"data_offsets\":[0,", "\"data_offsets\":[9,"),
            &["tensor `model.embed_tokens.weight` has data offsets [9,"],
        ),
        (
            "a shape that lies",
            u64::MAX,
            |f| edit_header(f, "\"shape\":[32,16]", "\"shape\":[31,16]"),
            &["broken safetensors header", "shape"],
        ),
        (
            "a shape that overflows",
            u64::MAX,
            |f| edit_header(f, "\"shape\":[24,16]", "\"shape\":[9999999999999,9999999999999]"),
            &["broken safetensors header", "overflow"],
        ),
        (
            "a tensor by another name",
            u64::MAX,
            |f| edit_header(f, "model.norm.weight", "model.form.weight"),
            &["lacks tensor `model.norm.weight`"],
        ),
        (
            "a bias",
            u64::MAX,
            |f| edit_header(f, "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias"),
            &["holds the bias `model.layers.0.mlp.up_proj.bias`"],
        ),
        (
            "a NaN",
            u64::MAX,
            |f| {
                edit(f, "model.safetensors", |b| {
                    let end = b.len();
                    b[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
                })
            },
            &["tensor `model.norm.weight` holds NaN at flat index 15"],
        ),
        (
            "a missing shard",
            4096,
            |f| remove(f, "model-00002-of-00006.safetensors"),
            &["shard", "model-00002-of-00006.safetensors` is missing", "for tensor `model.layers."],
        ),
        (
            "a truncated shard",
            4096,
            |f| edit(f, "model-00002-of-00006.safetensors", |b| b.truncate(50)),
            &["model-00002-of-00006.safetensors` claims a header"],
        ),
        (
            "shards without index",
            4096,
            |f| remove(f, "model.safetensors.index.json"),
            &["model-00001-of-00006.safetensors", "no `model.safetensors.index.json`"],
        ),
        (
            "a broken index",
            4096,
            |f| fs::write(f.join("model.safetensors.index.json"), "{").unwrap(),
            &["index.json` is not valid JSON at line 1"],
        ),
        (
            "an empty index",
            4096,
            |f| fs::write(f.join("model.safetensors.index.json"), "{}").unwrap(),
            &["`weight_map` is missing"],
        ),
        (
            "an index that leads out",
            4096,
            |f| edit_index(f, |m| put(m, "model.norm.weight", json!("../../secret.safetensors"))),
            &["../../secret.safetensors", "without folders"],
        ),
        (
            "an index of numbers",
            4096,
            |f| edit_index(f, |m| put(m, "model.norm.weight", json!(4))),
            &["gives 4 for tensor `model.norm.weight`"],
        ),
        (
            "an index to a pickle",
            4096,
            |f| edit_index(f, |m| put(m, "model.norm.weight", json!("a.bin"))),
            &["a.bin", "expected a .safetensors file"],
        ),
        (
            "an index to the wrong shard",
            4096,
            |f| edit_index(f, |m| put(m, "model.norm.weight", json!("model-00001-of-00006.safetensors"))),
            &["model-00001-of-00006.safetensors` lacks tensor `model.norm.weight`"],
        ),
        (
            "an index that leaves one out",
            4096,
            |f| edit_index(f, |m| drop(m.remove("model.norm.weight"))),
            &["holds tensor `model.norm.weight`", "does not list"],
        ),
        ("a tensor in two shards", 4096, duplicate_a_shard, &["is in both"]),
    ];
    for (case, shard_bytes, change, expected) in cases {
        let place = tempfile::tempdir().unwrap();
        let folder = model(&place, *shard_bytes);
        assert_eq!(open(&folder), Ok(()), "{case}: before the change");
        change(&folder);
        assert_refused(&folder, case, expected);
    }
}

/// A further shard that holds what the first does and is listed for one of its tensors.
fn duplicate_a_shard(folder: &Path) {
    fs::copy(folder.join("model-00001-of-00006.safetensors"), folder.join("model-copy.safetensors")).unwrap();
    edit_index(folder, |map| put(map, "model.embed_tokens.weight", json!("model-copy.safetensors")));
}

fn remove(folder: &Path, name: &str) {
    fs::remove_file(folder.join(name)).unwrap();
}

fn rename(folder: &Path, from: &str, to: &str) {
    fs::rename(folder.join(from), folder.join(to)).unwrap();
}

fn edit(folder: &Path, name: &str, change: impl Fn(&mut Vec<u8>)) {
    let path = folder.join(name);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Replaces text in the safetensors header, with the length in front of it.
fn edit_header(folder: &Path, from: &str, to: &str) {
    edit(folder, "model.safetensors", |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
        assert!(header.contains(from), "{from}");
        let header = header.replace(from, to);
        let changed =
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat();
        *bytes = changed;
    });
}

fn edit_index(folder: &Path, change: impl Fn(&mut Map<String, Value>)) {
    edit(folder, "model.safetensors.index.json", |bytes| {
        let mut index: Value = serde_json::from_slice(bytes).unwrap();
        change(index["weight_map"].as_object_mut().unwrap());
        *bytes = index.to_string().into_bytes();
    });
}
