//! Model folders: what is written is what is read, whole or not at all.

use checkpoint::testing::{config_of, random_weights, tiny_spec, write_tiny_model};
use checkpoint::{
    Dtype, ExportForm, FolderWriter, ModelConfig, ModelFolder, TensorHeader, Weights, WriteFolderError,
    digest_file, espalier_config, export_config, export_form, padded_spec, projection_weight,
    required_tensors,
};
use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

fn layer(query_head_count: usize, kv_head_count: usize, intermediate_size: usize) -> LayerSpec {
    LayerSpec { query_head_count, kv_head_count, intermediate_size }
}

fn parse(config: Value) -> ModelConfig {
    ModelConfig::parse(Path::new("config.json"), config.to_string().as_bytes()).unwrap()
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_model_written_in_any_shards_is_read_back(
        widths in prop::collection::vec((1_usize..4, 1_usize..4, 1_usize..9), 1..4),
        half_head in 1_usize..4,
        hidden_size in 1_usize..20,
        vocab_size in 3_usize..40,
        tie_word_embeddings: bool,
        dtype in prop::sample::select(&Dtype::ALL[..]),
        max_shard_bytes in prop::sample::select(vec![1_u64, 700, 5000, u64::MAX]),
        seed: u64,
    ) {
        let layers = widths.into_iter().map(|(kv, group, channels)| layer(kv * group, kv, channels)).collect();
        let spec = ModelSpec { layers, head_dim: 2 * half_head, hidden_size, vocab_size, tie_word_embeddings, ..tiny_spec() };
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("model");
        write_tiny_model(&folder, &spec, dtype, seed, max_shard_bytes).unwrap();
        let model = ModelFolder::open(&folder).unwrap();
        // The family is that of the form which stock software admits.
        let read = ModelSpec { family: spec.family, ..model.spec().clone() };
        prop_assert_eq!(&read, &spec);
        prop_assert_eq!(model.config().stored_dtype, Some(dtype));
        let weights = model.open_weights().unwrap();
        prop_assert_eq!(weights.names().count(), required_tensors(&spec).len());
        for (index, (name, shape)) in required_tensors(&spec).iter().enumerate() {
            let view = weights.tensor(name).unwrap();
            prop_assert_eq!(view.shape, shape);
            let mut expected = Vec::new();
            dtype.encode(&random_weights(shape, seed.wrapping_add(index as u64)), &mut expected);
            prop_assert_eq!(view.bytes, &expected[..]);
        }
        for file in model.digests(&weights).unwrap() {
            prop_assert_eq!(digest_file(&folder.join(&file.name)).unwrap(), (file.size_bytes, file.sha256));
        }
    }
}

#[test]
fn both_spellings_of_a_configuration_mean_the_same() {
    let mut old = config_of(&tiny_spec(), Dtype::Bf16);
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    old.insert("rope_theta".to_owned(), json!(500_000.0));
    old.insert("rope_scaling".to_owned(), scaling.clone());
    let mut new = old.clone();
    new.remove("rope_theta");
    new.remove("rope_scaling");
    new.remove("torch_dtype");
    new.insert("dtype".to_owned(), json!("bfloat16"));
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(500_000.0);
    new.insert("rope_parameters".to_owned(), parameters);
    let (old, new) = (parse(Value::Object(old)), parse(Value::Object(new)));
    assert_eq!(old.spec, new.spec);
    assert_eq!((old.stored_dtype, new.stored_dtype), (Some(Dtype::Bf16), Some(Dtype::Bf16)));
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(new.spec.rope, Rope { theta: 500_000.0, scaling: expected });
}

#[test]
fn what_an_old_configuration_leaves_out_has_its_usual_value() {
    let config = parse(json!({
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 32, "rms_norm_eps": 1e-6, "max_sequence_length": 128,
        "torch_dtype": "float16", "bos_token_id": -1, "eos_token_id": [2, 7],
    }));
    assert_eq!(config.spec.layers, [layer(4, 4, 24); 2]);
    assert_eq!((config.spec.head_dim, config.spec.max_position_embeddings), (4, 128));
    assert_eq!(config.spec.rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
    assert!(!config.spec.tie_word_embeddings);
    assert_eq!(config.stored_dtype, Some(Dtype::F16));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2, 7]));
}

#[test]
fn a_mistral_without_a_window_is_read_and_a_window_that_hides_nothing_too() {
    for window in [json!(null), json!(64), json!(4096)] {
        let mut config = config_of(&tiny_spec(), Dtype::F32);
        config.insert("model_type".to_owned(), json!("mistral"));
        config.insert("sliding_window".to_owned(), window);
        config.insert("head_dim".to_owned(), json!(8));
        let spec = parse(Value::Object(config)).spec;
        assert_eq!((spec.family, spec.head_dim), (Family::Mistral, 8));
    }
    let mut config = config_of(&tiny_spec(), Dtype::F32);
    config.insert("model_type".to_owned(), json!("mistral"));
    config.insert("max_position_embeddings".to_owned(), json!(8192));
    let error = ModelConfig::from_object(Path::new("config.json"), config).unwrap_err();
    assert!(error.to_string().contains("4096 (absent means that)"), "{error}");
}

#[test]
fn rotary_tables_and_a_copy_of_a_tied_head_are_passed_over() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("model");
    let spec = tiny_spec();
    let mut tensors: Vec<TensorHeader> = required_tensors(&spec)
        .into_iter()
        .map(|(name, shape)| TensorHeader { name, dtype: Dtype::F16, shape })
        .collect();
    for (name, shape) in
        [("lm_head.weight", vec![32, 16]), ("model.layers.0.self_attn.rotary_emb.inv_freq", vec![2])]
    {
        tensors.push(TensorHeader { name: name.to_owned(), dtype: Dtype::F32, shape });
    }
    let mut writer = FolderWriter::create(&folder, tensors.clone(), u64::MAX).unwrap();
    for tensor in &tensors {
        let bytes = vec![0; tensor.shape.iter().product::<usize>() * tensor.dtype.byte_width()];
        writer.add_tensor(&tensor.name, &bytes).unwrap();
    }
    writer.finish(&config_of(&spec, Dtype::F16), &[]).unwrap();
    let weights = ModelFolder::open(&folder).unwrap().open_weights().unwrap();
    assert!(weights.tensor("lm_head.weight").is_none());
    assert_eq!(weights.total_bytes(), spec.parameter_count() * 2);
}

#[test]
fn weights_outlive_what_opened_them() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("model");
    write_tiny_model(&folder, &tiny_spec(), Dtype::F32, 3, u64::MAX).unwrap();
    let clone: Weights = {
        let weights = ModelFolder::open(&folder).unwrap().open_weights().unwrap();
        weights.clone()
    };
    let name = projection_weight(1, Projection::Gate);
    let sum: f32 =
        std::thread::spawn(move || clone.tensor(&name).unwrap().to_f32_vec().iter().sum()).join().unwrap();
    assert!(sum.is_finite());
}

/// Resident KiB of the mapping of `file` in this process.
fn resident_kib(file: &Path) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let of_file = maps
        .lines()
        .skip_while(|line| !line.ends_with(file.to_str().unwrap()))
        .find(|line| line.starts_with("Rss:"));
    of_file.unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn released_pages_leave_the_process_and_are_read_again_as_they_were() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().canonicalize().unwrap().join("model");
    write_tiny_model(&folder, &tiny_spec(), Dtype::F32, 3, u64::MAX).unwrap();
    let weights = ModelFolder::open(&folder).unwrap().open_weights().unwrap();
    let read = || -> Vec<Vec<u8>> {
        weights.names().map(|name| weights.tensor(name).unwrap().bytes.to_vec()).collect()
    };
    let before = read();
    let file = folder.join("model.safetensors");
    assert!(resident_kib(&file) > 0);
    weights.release_pages().unwrap();
    assert_eq!(resident_kib(&file), 0);
    assert_eq!(read(), before);
}

#[test]
fn an_unfinished_or_wrong_folder_leaves_nothing_behind() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let header = |name: &str| TensorHeader { name: name.to_owned(), dtype: Dtype::F32, shape: vec![2, 3] };
    let create = || FolderWriter::create(&out, vec![header("a"), header("b")], u64::MAX).unwrap();
    let bytes = [0; 24];

    let mut writer = create();
    let error = writer.add_tensor("b", &bytes).unwrap_err();
    assert_eq!(error.to_string(), "tensor `b` was given, the next one announced is `a`");
    let error = writer.add_tensor("a", &bytes[..20]).unwrap_err();
    assert_eq!(error.to_string(), "tensor `a` has 20 bytes, its dtype and shape say 24");
    writer.append("a", &bytes[..20]).unwrap();
    let error = writer.append("a", &bytes[..5]).unwrap_err();
    assert!(matches!(error, WriteFolderError::WrongSize { actual: 25, expected: 24, .. }), "{error}");
    assert!(!out.exists() && writer.staging_path().exists());
    let error = writer.commit().unwrap_err();
    assert_eq!(error.to_string(), "2 announced tensors were not given, `a` first");
    assert_eq!(names_in(place.path()), Vec::<String>::new());

    let twice = FolderWriter::create(&out, vec![header("a"), header("a")], u64::MAX).err().unwrap();
    assert_eq!(twice.to_string(), "tensor `a` is announced twice");
    let mut vast = header("a");
    vast.shape = vec![usize::MAX, 2];
    assert!(matches!(FolderWriter::create(&out, vec![vast], 1), Err(WriteFolderError::TooLarge { .. })));
    assert_eq!(names_in(place.path()), Vec::<String>::new());
}

#[test]
fn a_folder_with_something_in_it_is_not_touched() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    fs::create_dir(&out).unwrap();
    // An empty folder is as good as none.
    write_tiny_model(&out, &tiny_spec(), Dtype::F32, 1, u64::MAX).unwrap();
    let before = names_in(&out);
    let error = write_tiny_model(&out, &tiny_spec(), Dtype::F32, 2, u64::MAX).unwrap_err();
    assert!(error.to_string().contains("already exists and is not an empty folder"), "{error}");
    assert_eq!(names_in(&out), before);
    assert_eq!(names_in(place.path()), ["out"]);
    let file = place.path().join("file");
    fs::write(&file, "mine").unwrap();
    assert!(write_tiny_model(&file, &tiny_spec(), Dtype::F32, 2, u64::MAX).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    assert!(write_tiny_model(Path::new("/"), &tiny_spec(), Dtype::F32, 2, u64::MAX).is_err());
}

#[cfg(unix)]
#[test]
fn the_folder_is_readable_for_whom_the_umask_lets() {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir().unwrap();
    let (out, plain) = (place.path().join("out"), place.path().join("plain"));
    write_tiny_model(&out, &tiny_spec(), Dtype::F32, 1, u64::MAX).unwrap();
    fs::create_dir(&plain).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&out), mode(&plain));
}

#[test]
fn the_form_of_an_export_is_the_one_that_transformers_admits() {
    let spec = |family, layers: Vec<LayerSpec>| ModelSpec { family, hidden_size: 24, layers, ..tiny_spec() };
    for (case, spec, family, padded) in [
        ("divides", spec(Family::Llama, vec![layer(6, 2, 8); 2]), Family::Llama, false),
        ("does not divide", spec(Family::Llama, vec![layer(5, 5, 8); 2]), Family::Mistral, false),
        ("a Mistral", spec(Family::Mistral, vec![layer(6, 2, 8); 2]), Family::Mistral, false),
        ("padded, divides", spec(Family::Llama, vec![layer(5, 1, 8), layer(6, 1, 8)]), Family::Llama, true),
        (
            "padded, does not divide",
            spec(Family::Llama, vec![layer(5, 5, 8), layer(4, 4, 8)]),
            Family::Mistral,
            true,
        ),
        // 3 kv heads with up to 4 query heads each are 12.
        ("padded in groups", spec(Family::Llama, vec![layer(6, 3, 8), layer(8, 2, 8)]), Family::Llama, true),
    ] {
        assert_eq!(export_form(&spec), Ok(ExportForm { family, padded }), "{case}");
    }
    let mut invalid = tiny_spec();
    invalid.layers[1].kv_head_count = 3;
    assert!(export_form(&invalid).is_err());
}

#[test]
fn padding_holds_every_layer_group_by_group() {
    let spec = ModelSpec { layers: vec![layer(6, 3, 10), layer(8, 2, 7), layer(1, 1, 12)], ..tiny_spec() };
    assert_eq!(padded_spec(&spec).layers, [layer(12, 3, 12); 3]);
    assert_eq!(padded_spec(&tiny_spec()), tiny_spec());
}

#[test]
fn an_exported_configuration_says_the_pruned_model_and_keeps_the_rest() {
    let mut source = config_of(&tiny_spec(), Dtype::F32);
    for (field, value) in [
        ("rope_scaling", json!({ "type": "linear", "factor": 2.0 })),
        ("auto_map", json!({ "AutoModel": "code.Model" })),
        ("custom", json!([1, 2])),
    ] {
        source.insert(field.to_owned(), value);
    }
    let before = parse(Value::Object(source.clone())).spec;
    let pruned = ModelSpec { layers: vec![layer(3, 1, 20); 2], ..before.clone() };
    let config = export_config(&source, &pruned, Dtype::Bf16).unwrap();
    assert_eq!(config["model_type"], "mistral");
    assert_eq!(config["architectures"], json!(["MistralForCausalLM"]));
    assert_eq!((&config["sliding_window"], &config["head_dim"]), (&Value::Null, &json!(4)));
    assert_eq!((&config["custom"], config.get("auto_map")), (&json!([1, 2]), None));
    let read = parse(Value::Object(config));
    assert_eq!(read.spec, ModelSpec { family: Family::Mistral, ..pruned.clone() });
    assert_eq!(read.stored_dtype, Some(Dtype::Bf16));

    let pruned = ModelSpec { layers: vec![layer(2, 1, 20); 2], ..before.clone() };
    let config = export_config(&source, &pruned, Dtype::F32).unwrap();
    assert_eq!((&config["model_type"], config.get("sliding_window")), (&json!("llama"), None));
    assert_eq!(parse(Value::Object(config)).spec, pruned);

    let uneven = ModelSpec { layers: vec![layer(2, 1, 20), layer(4, 2, 24)], ..before };
    let error = export_config(&source, &uneven, Dtype::F32).unwrap_err();
    assert!(error.to_string().contains("layer 1 has"), "{error}");
    let config = espalier_config(&source, &uneven, Dtype::F32).unwrap();
    assert_eq!(parse(Value::Object(config)).spec, uneven);
}

#[test]
fn a_configuration_of_transformers_5_keeps_its_spelling_of_the_dtype() {
    let mut source = config_of(&tiny_spec(), Dtype::F32);
    source.remove("torch_dtype");
    source.insert("dtype".to_owned(), json!("float32"));
    let config = export_config(&source, &tiny_spec(), Dtype::Bf16).unwrap();
    assert_eq!((&config["dtype"], config.get("torch_dtype")), (&json!("bfloat16"), None));
}

#[test]
fn companions_are_copied_and_digests_are_those_on_disk() {
    let place = tempfile::tempdir().unwrap();
    let (source, out) = (place.path().join("source"), place.path().join("deep/er/out"));
    write_tiny_model(&source, &tiny_spec(), Dtype::F32, 1, u64::MAX).unwrap();
    fs::write(source.join("generation_config.json"), "{}").unwrap();
    fs::write(source.join("notes.txt"), "not a companion").unwrap();
    let model = ModelFolder::open(&source).unwrap();
    let header = TensorHeader { name: "t".to_owned(), dtype: Dtype::Bf16, shape: vec![3] };
    let mut writer = FolderWriter::create(&out, vec![header], u64::MAX).unwrap();
    writer.add_tensor("t", &[0; 6]).unwrap();
    let files = writer.finish(&model.config().raw, &model.companion_files()).unwrap();
    let mut names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    names.sort_unstable();
    let expected = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    assert_eq!(names_in(&out), expected);
    for file in &files {
        assert_eq!(digest_file(&out.join(&file.name)).unwrap(), (file.size_bytes, file.sha256));
    }
    assert_eq!(
        fs::read(out.join("tokenizer.json")).unwrap(),
        fs::read(source.join("tokenizer.json")).unwrap()
    );
}
