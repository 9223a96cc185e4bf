//! GGUF files in, model folders out.

use checkpoint::testing::{GgufBuilder, GgufTensor, random_weights, tiny_gguf, tiny_spec};
use checkpoint::{Dtype, ImportReport, ModelFolder, import_gguf, required_tensors};
use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use serde_json::Value;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// Rows of 32 or 64, so that blocks of 32 fit.
fn spec() -> ModelSpec {
    let layer = LayerSpec { query_head_count: 4, kv_head_count: 2, intermediate_size: 64 };
    ModelSpec { hidden_size: 32, head_dim: 8, vocab_size: 20, layers: vec![layer; 2], ..tiny_spec() }
}

fn import(file: &[u8], dtype: Dtype) -> (tempfile::TempDir, PathBuf, Result<ImportReport, String>) {
    let place = tempfile::tempdir().unwrap();
    let (gguf, out) = (place.path().join("model.gguf"), place.path().join("out"));
    fs::write(&gguf, file).unwrap();
    let report = import_gguf(&gguf, &out, dtype).map_err(|error| {
        let causes = std::iter::successors(error.source(), |cause| (*cause).source());
        std::iter::once(error.to_string())
            .chain(causes.map(ToString::to_string))
            .collect::<Vec<_>>()
            .join(": ")
    });
    (place, out, report)
}

fn read_json(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
}

#[test]
fn weights_come_back_in_the_order_of_transformers() {
    for (tie_word_embeddings, dtype) in
        [(true, Dtype::F32), (false, Dtype::Bf16), (true, Dtype::F16), (false, Dtype::F64)]
    {
        let spec = ModelSpec { tie_word_embeddings, ..spec() };
        let (_place, out, report) = import(&tiny_gguf(&spec, "F32", 5).build(), dtype);
        let report = report.unwrap();
        assert_eq!((&report.spec, report.parameter_count), (&spec, spec.parameter_count()));
        assert_eq!(report.tensors_by_block_type["F32"], required_tensors(&spec).len());
        let model = ModelFolder::open(&out).unwrap();
        assert_eq!((model.spec(), model.config().stored_dtype), (&spec, Some(dtype)));
        let weights = model.open_weights().unwrap();
        for (index, (name, shape)) in required_tensors(&spec).iter().enumerate() {
            let mut expected = Vec::new();
            dtype.encode(&random_weights(shape, 5 + index as u64), &mut expected);
            assert_eq!(weights.tensor(name).unwrap().bytes, expected, "{name}");
        }
    }
}

#[test]
fn quantised_weights_come_back_within_their_precision() {
    for (block_type, tolerance) in [
        ("F16", 1e-3),
        ("BF16", 4e-3),
        ("Q8_0", 6e-3),
        ("Q5_0", 0.07),
        ("Q5_1", 0.04),
        ("Q4_1", 0.07),
        ("Q4_0", 0.13),
    ] {
        let (_place, out, report) = import(&tiny_gguf(&spec(), block_type, 5).build(), Dtype::F32);
        assert_eq!(report.unwrap().tensors_by_block_type[block_type], 15, "{block_type}");
        let weights = ModelFolder::open(&out).unwrap().open_weights().unwrap();
        for (index, (name, shape)) in required_tensors(&spec()).iter().enumerate() {
            let expected = random_weights(shape, 5 + index as u64);
            let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
            let values = weights.tensor(name).unwrap().to_f32_vec();
            let error = expected.iter().zip(values).fold(0.0_f32, |error, (a, b)| error.max((a - b).abs()));
            let tolerance = if shape.len() == 1 { 0.0 } else { tolerance * largest };
            assert!(error <= tolerance, "{block_type} {name}: {error} > {tolerance}");
        }
    }
}

#[test]
fn blocks_of_256_are_read_too() {
    let layer = LayerSpec { query_head_count: 4, kv_head_count: 1, intermediate_size: 256 };
    let spec =
        ModelSpec { hidden_size: 256, head_dim: 64, layers: vec![layer], vocab_size: 10, ..tiny_spec() };
    for (block_type, tolerance) in
        [("Q4_K", 0.1), ("Q6_K", 0.03), ("Q5_K", 0.08), ("Q3_K", 0.3), ("Q2_K", 0.5)]
    {
        let (_place, out, report) = import(&tiny_gguf(&spec, block_type, 5).build(), Dtype::F32);
        assert_eq!(report.unwrap().tensors_by_block_type[block_type], 8, "{block_type}");
        let weights = ModelFolder::open(&out).unwrap().open_weights().unwrap();
        let (name, shape) = &required_tensors(&spec)[2];
        let expected = random_weights(shape, 7);
        let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        for (a, b) in expected.iter().zip(weights.tensor(name).unwrap().to_f32_vec()) {
            assert!((a - b).abs() <= tolerance * largest, "{block_type} {name}: {a} {b}");
        }
    }
}

#[test]
fn the_byte_level_tokenizer_is_carried_over() {
    let builder = tiny_gguf(&spec(), "F32", 5).text("tokenizer.chat_template", "{{ messages }}");
    let (_place, out, report) = import(&builder.build(), Dtype::F32);
    report.unwrap();
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    let ids = |text| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
    assert_eq!(ids("ab ab<s>ba"), [6, 7, 1, 5, 4]);
    assert_eq!(tokenizer.decode(&[6, 7, 1], true).unwrap(), "ab ab");
    let config = read_json(&out, "tokenizer_config.json");
    assert_eq!(config["chat_template"], "{{ messages }}");
    assert_eq!((&config["bos_token"], &config["add_bos_token"]), (&"<s>".into(), &false.into()));
    assert_eq!(
        read_json(&out, "generation_config.json"),
        serde_json::json!({ "bos_token_id": 1, "eos_token_id": 2 })
    );
    assert_eq!(read_json(&out, "special_tokens_map.json")["eos_token"], "</s>");

    let (_place, out, report) = import(
        &builder.bool("tokenizer.ggml.add_bos_token", true).text("tokenizer.ggml.pre", "llama-bpe").build(),
        Dtype::F32,
    );
    report.unwrap();
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.encode("ab ab", true).unwrap().get_ids(), [1, 6, 7]);
}

#[test]
fn a_sentence_piece_tokenizer_gets_its_merges_from_the_scores() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>"].map(str::to_owned).to_vec();
    tokens.extend(["\u{2581}", "a", "b", "c", "ab", "bc", "\u{2581}a", "abc", "<user>"].map(str::to_owned));
    let scores = [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0, 0.0];
    let spec = ModelSpec { vocab_size: tokens.len(), ..spec() };
    let builder = tiny_gguf(&spec, "F32", 5)
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", &tokens)
        .f32s("tokenizer.ggml.scores", &scores)
        .i32s("tokenizer.ggml.token_type", &[2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1, 1, 1, 4])
        .without("tokenizer.ggml.merges");
    let (_place, out, report) = import(&builder.build(), Dtype::F32);
    report.unwrap();
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    let pieces = |text| tokenizer.encode(text, true).unwrap().get_tokens().to_vec();
    // "bc" has the best score; then the blank with "a" has a better one than "a" with "bc".
    assert_eq!(pieces("abc"), ["<s>", "\u{2581}a", "bc"]);
    assert_eq!(pieces("a é<user>"), ["<s>", "\u{2581}a", "\u{2581}", "<0xC3>", "<0xA9>", "<user>"]);
    let ids = tokenizer.encode("a éabc", true).unwrap().get_ids().to_vec();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a éabc");
    assert_eq!(read_json(&out, "tokenizer_config.json")["add_bos_token"], true);

    let (_place, out, report) =
        import(&builder.clone().bool("tokenizer.ggml.add_space_prefix", false).build(), Dtype::F32);
    report.unwrap();
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.encode("abc", false).unwrap().get_tokens(), ["abc"]);
}

#[test]
fn rope_scaling_and_heads_that_do_not_divide_become_what_transformers_reads() {
    let layer = LayerSpec { query_head_count: 3, kv_head_count: 3, intermediate_size: 64 };
    let spec = ModelSpec { head_dim: 32, layers: vec![layer], ..spec() };
    let (_place, out, report) = import(
        &tiny_gguf(&spec, "F32", 5)
            .text("llama.rope.scaling.type", "linear")
            .f32("llama.rope.scaling.factor", 4.0)
            .build(),
        Dtype::F32,
    );
    let read = report.unwrap().spec;
    assert_eq!(read.family, Family::Mistral);
    assert_eq!(read.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(ModelFolder::open(&out).unwrap().spec(), &read);

    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let rope = Rope { theta: 500_000.0, scaling };
    let spec = ModelSpec { rope, ..self::spec() };
    let plain = Rope { scaling: RopeScaling::None, ..rope }.inverse_frequencies(8);
    let divisors =
        plain.iter().zip(rope.inverse_frequencies(8)).map(|(plain, scaled)| (plain / scaled) as f32);
    let mut builder = tiny_gguf(&spec, "F32", 5);
    builder.tensors.push(GgufTensor {
        name: "rope_freqs.weight".to_owned(),
        dimensions: vec![4],
        type_tag: 0,
        bytes: divisors.flat_map(f32::to_le_bytes).collect(),
    });
    let (_place, _out, report) = import(&builder.build(), Dtype::F32);
    assert_eq!(report.unwrap().spec, spec);
}

#[test]
fn a_wrong_gguf_file_is_refused_and_leaves_nothing() {
    type Change = fn(GgufBuilder) -> GgufBuilder;
    let cases: &[(&str, Change, &[&str])] = &[
        (
            "another architecture",
            |b| b.text("general.architecture", "gpt2"),
            &["`general.architecture` is \"gpt2\"", "llama"],
        ),
        ("no architecture", |b| b.without("general.architecture"), &["`general.architecture` is missing"]),
        ("experts", |b| b.u32("llama.expert_count", 8), &["`llama.expert_count` is 8"]),
        ("a part of a model", |b| b.u32("split.count", 3), &["in several files", "--merge"]),
        ("no block count", |b| b.without("llama.block_count"), &["`llama.block_count` is missing"]),
        ("more blocks", |b| b.u32("llama.block_count", 3), &["tensor `blk.2.attn_norm.weight` is missing"]),
        ("fewer blocks", |b| b.u32("llama.block_count", 1), &["tensor `blk.1.", "belongs to no plain LLaMA"]),
        ("a billion blocks", |b| b.u32("llama.block_count", 1 << 30), &["`num_hidden_layers`", "4096"]),
        ("no heads", |b| b.u32("llama.attention.head_count", 0), &["`num_attention_heads` is 0"]),
        (
            "heads per layer",
            |b| b.i32s("llama.attention.head_count_kv", &[2, 2]),
            &["an array of 2 numbers", "the same for all layers"],
        ),
        (
            "a text as number",
            |b| b.text("llama.context_length", "long"),
            &["`llama.context_length` is \"long\""],
        ),
        (
            "a partial rotation",
            |b| b.u32("llama.rope.dimension_count", 4),
            &["`llama.rope.dimension_count` is 4"],
        ),
        ("another rope scaling", |b| b.text("llama.rope.scaling.type", "yarn"), &["\"yarn\"", "\"linear\""]),
        (
            "an infinite theta",
            |b| b.f32("llama.rope.freq_base", f32::INFINITY),
            &["`llama.rope.freq_base`", "finite"],
        ),
        ("an alignment of 0", |b| b.u32("general.alignment", 0), &["`general.alignment` is 0"]),
        (
            "a tensor of another shape",
            |mut b| {
                b.tensors[1].dimensions = vec![16, 2];
                b
            },
            &["`blk.0.attn_norm.weight` has shape [2, 16]", "[32]"],
        ),
        (
            "a tensor without dimensions",
            |mut b| {
                b.tensors[1].dimensions = vec![];
                b
            },
            &["has 0 dimensions"],
        ),
        (
            "a vast tensor",
            |mut b| {
                b.tensors[1].dimensions = vec![1 << 62, 1 << 62];
                b
            },
            &["blk.0.attn_norm.weight` has the dimensions"],
        ),
        (
            "an empty tensor",
            |mut b| {
                b.tensors[1].dimensions = vec![0];
                b
            },
            &["has the dimensions [0]"],
        ),
        (
            "an unknown block type",
            |mut b| {
                b.tensors[2].type_tag = 23;
                b
            },
            &["block type 23", "Q4_K (12)"],
        ),
        (
            "a tensor twice",
            |mut b| {
                let t = b.tensors[1].clone();
                b.tensors.push(t);
                b
            },
            &["tensor `blk.0.attn_norm.weight` occurs twice"],
        ),
        (
            "a bias",
            |mut b| {
                let mut t = b.tensors[1].clone();
                t.name = "blk.0.attn_q.bias".to_owned();
                b.tensors.push(t);
                b
            },
            &["`blk.0.attn_q.bias` belongs to no plain LLaMA"],
        ),
        (
            "a NaN",
            |mut b| {
                b.tensors[1].bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
                b
            },
            &["tensor `model.layers.0.input_layernorm.weight` holds NaN at flat index 1"],
        ),
        ("no tokenizer", |b| b.without("tokenizer.ggml.model"), &["`tokenizer.ggml.model` is missing"]),
        ("another tokenizer", |b| b.text("tokenizer.ggml.model", "bert"), &["\"bert\"", "SentencePiece"]),
        ("another pre-tokenizer", |b| b.text("tokenizer.ggml.pre", "tekken"), &["\"tekken\"", "smollm"]),
        (
            "fewer tokens than rows",
            |b| b.texts("tokenizer.ggml.tokens", &["a", "b"]),
            &["an array of 2 strings", "20 strings"],
        ),
        (
            "a token twice",
            |b| b.texts("tokenizer.ggml.tokens", &["a"; 20]),
            &["tokens 0 and 1 are both \"a\""],
        ),
        ("no merges", |b| b.without("tokenizer.ggml.merges"), &["`tokenizer.ggml.merges` is missing"]),
        ("a merge of one", |b| b.texts("tokenizer.ggml.merges", &["ab"]), &["merge 0 is \"ab\""]),
        ("a merge of unknown tokens", |b| b.texts("tokenizer.ggml.merges", &["x y"]), &["make no tokenizer"]),
        (
            "token types that are none",
            |b| b.i32s("tokenizer.ggml.token_type", &[9; 20]),
            &["`tokenizer.ggml.token_type`", "from 1 to 6"],
        ),
        (
            "an end token beyond the last",
            |b| b.u32("tokenizer.ggml.eos_token_id", 20),
            &["`tokenizer.ggml.eos_token_id` is 20", "below 20"],
        ),
        (
            "pieces without scores",
            |b| b.text("tokenizer.ggml.model", "llama"),
            &["`tokenizer.ggml.scores` is missing"],
        ),
    ];
    for (case, change, expected) in cases {
        let (place, _out, report) = import(&change(tiny_gguf(&spec(), "F32", 5)).build(), Dtype::F32);
        let message = report.expect_err(case);
        for part in *expected {
            assert!(message.contains(part), "{case}: `{part}` is not in: {message}");
        }
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1, "{case}: only the GGUF file is there");
    }
}

#[test]
fn what_is_no_gguf_file_is_refused() {
    for (bytes, expected) in [
        (&b""[..], "does not begin with `GGUF`"),
        (b"PK\x03\x04 and more", "does not begin with `GGUF`"),
        (b"GGUF", "the file ends where the version should be"),
        (b"GGUF\x01\0\0\0", "version is 1"),
        (b"GGUF\0\0\0\x03", "version is 50331648"),
        (b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f", "claims 9223372036854775807 tensors"),
    ] {
        let (_place, _out, report) = import(bytes, Dtype::F32);
        let message = report.unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
    let place = tempfile::tempdir().unwrap();
    let error =
        import_gguf(&place.path().join("none.gguf"), &place.path().join("out"), Dtype::F32).unwrap_err();
    assert!(error.to_string().contains("failed to open"), "{error}");
    let error = import_gguf(place.path(), &place.path().join("out"), Dtype::F32).unwrap_err();
    assert!(error.to_string().contains("is not a regular file"), "{error}");
}

#[test]
fn a_value_too_large_for_f16_is_refused_and_bf16_takes_it() {
    let mut builder = tiny_gguf(&spec(), "F32", 5);
    builder.tensors[1].bytes[..4].copy_from_slice(&70_000_f32.to_le_bytes());
    let (_place, _out, report) = import(&builder.build(), Dtype::F16);
    let message = report.unwrap_err();
    assert!(message.contains("holds 70000 at flat index 0, which F16 cannot hold"), "{message}");
    let (_place, _out, report) = import(&builder.build(), Dtype::Bf16);
    assert!(report.is_ok());
}

#[test]
fn an_occupied_output_is_not_touched() {
    let place = tempfile::tempdir().unwrap();
    let (gguf, out) = (place.path().join("model.gguf"), place.path().join("out"));
    fs::write(&gguf, tiny_gguf(&spec(), "F32", 5).build()).unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "x").unwrap();
    let error = import_gguf(&gguf, &out, Dtype::F32).unwrap_err();
    assert!(error.to_string().contains("not an empty folder"), "{error}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
}
