//! Files of a run: tensors with metadata, and the manifest of an export.

use checkpoint::{
    Dtype, ExportManifest, FileDigest, LayerKept, MANIFEST_FILE, MANIFEST_FORMAT_VERSION, Sha256Digest,
    SourceModel, TensorRef, digest_file, read_tensors, write_tensors,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn tensors_and_metadata_come_back_as_they_were(
        shapes in prop::collection::btree_map("[a-zé\"\\\\./ ]{1,8}", prop::collection::vec(0_usize..4, 0..4), 0..6),
        metadata in prop::collection::btree_map(".{0,6}", ".{0,20}", 0..4),
        dtype in prop::sample::select(&Dtype::ALL[..]),
        fill: u8,
    ) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("state.safetensors");
        let bytes = vec![fill; 8 * 4 * 4 * 4];
        let size = |shape: &Vec<usize>| shape.iter().product::<usize>() * dtype.byte_width();
        let tensors: Vec<TensorRef<'_>> = shapes
            .iter()
            .map(|(name, shape)| TensorRef { name, dtype, shape, bytes: &bytes[..size(shape)] })
            .collect();
        let digest = write_tensors(&path, &tensors, &metadata).unwrap();
        prop_assert_eq!(write_tensors(&path, &tensors, &metadata).unwrap(), digest);
        prop_assert_eq!(digest_file(&path).unwrap().1, digest);
        let file = read_tensors(&path, Some(&digest)).unwrap();
        prop_assert_eq!((file.sha256, &file.metadata), (digest, &metadata));
        prop_assert_eq!(file.tensors.len(), shapes.len());
        for (name, shape) in &shapes {
            let tensor = &file.tensors[name];
            prop_assert_eq!((tensor.dtype, &tensor.shape), (dtype, shape));
            prop_assert_eq!(&tensor.bytes, &bytes[..size(shape)]);
        }
        prop_assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_file_that_is_not_the_expected_one_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("state.safetensors");
    let tensor = TensorRef { name: "lora_a", dtype: Dtype::F32, shape: &[2], bytes: &[0; 8] };
    let digest = write_tensors(&path, &[tensor], &BTreeMap::new()).unwrap();
    let error = read_tensors(&path, Some(&Sha256Digest::of(b"another"))).unwrap_err();
    assert!(error.to_string().contains(&format!("has SHA-256 {digest}, expected ")), "{error}");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(read_tensors(&path, Some(&digest)).unwrap_err().to_string().contains("changed or damaged"));
    fs::write(&path, &bytes[..last]).unwrap();
    assert!(read_tensors(&path, None).unwrap_err().to_string().contains("truncated"));
    let missing = place.path().join("missing");
    assert!(read_tensors(&missing, None).unwrap_err().to_string().contains("failed to open"));
}

#[test]
fn wrong_tensors_are_refused_and_the_older_file_stays() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("state.safetensors");
    let tensor = TensorRef { name: "m", dtype: Dtype::F64, shape: &[1, 2], bytes: &[1; 16] };
    let digest = write_tensors(&path, &[tensor], &BTreeMap::new()).unwrap();
    for (wrong, expected) in [
        (vec![tensor, tensor], "tensor `m` is given twice"),
        (
            vec![TensorRef { bytes: &[1; 15], ..tensor }],
            "tensor `m` has 15 bytes, its dtype F64 and shape [1, 2]",
        ),
        (vec![TensorRef { shape: &[usize::MAX, 3], ..tensor }], "tensor `m` has 16 bytes"),
    ] {
        let error = write_tensors(&path, &wrong, &BTreeMap::new()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(write_tensors(&place.path().join("no/such/folder"), &[tensor], &BTreeMap::new()).is_err());
    assert_eq!(read_tensors(&path, Some(&digest)).unwrap().tensors["m"].bytes, [1; 16]);
}

fn manifest() -> ExportManifest {
    let file =
        |name: &str| FileDigest { name: name.to_owned(), size_bytes: 3, sha256: Sha256Digest::of(b"abc") };
    ExportManifest {
        format_version: MANIFEST_FORMAT_VERSION,
        source_model: SourceModel { name: "smollm2".to_owned(), files: vec![file("config.json")] },
        recipe: json!({ "sparsity": 0.5 }),
        layers: vec![LayerKept {
            kept_query_heads: vec![0, 1, 5],
            kept_kv_heads: vec![0, 2],
            kept_channels: vec![7],
        }],
        parameters_before: 134_515_008,
        parameters_after: 81_000_000,
        files: vec![file("model.safetensors")],
        versions: BTreeMap::from([("espalier".to_owned(), "0.1.0".to_owned())]),
        verification: Value::Null,
    }
}

#[test]
fn a_manifest_is_read_as_written_and_can_be_replaced() {
    let place = tempfile::tempdir().unwrap();
    let mut manifest = manifest();
    manifest.write(place.path()).unwrap();
    assert_eq!(ExportManifest::read(place.path()).unwrap(), manifest);
    manifest.verification = json!({ "largest_logit_difference": 0.0 });
    manifest.write(place.path()).unwrap();
    assert_eq!(ExportManifest::read(place.path()).unwrap(), manifest);
    let text = fs::read_to_string(place.path().join(MANIFEST_FILE)).unwrap();
    assert!(text.contains("\"kept_kv_heads\""), "{text}");
    assert!(text.contains("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"), "{text}");
}

#[test]
fn a_damaged_manifest_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join(MANIFEST_FILE);
    assert!(ExportManifest::read(place.path()).unwrap_err().to_string().contains("failed to read"));
    let good = manifest().to_json();
    for (text, expected) in [
        ("{\n}", "is no manifest: line 2"),
        (
            &good.replace("\"format_version\": 1", "\"format_version\": 9"),
            "`format_version` is 9, expected 1",
        ),
        (&good.replace("ba7816bf", "xx7816bf"), "is no manifest"),
    ] {
        fs::write(&path, text).unwrap();
        let error = ExportManifest::read(place.path()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn no_cut_and_no_changed_byte_of_a_header_panics() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("state.safetensors");
    let tensor = TensorRef { name: "m", dtype: Dtype::F32, shape: &[2, 3], bytes: &[7; 24] };
    let other = TensorRef { name: "v", dtype: Dtype::F16, shape: &[2], bytes: &[7; 4] };
    write_tensors(&path, &[tensor, other], &BTreeMap::from([("step".to_owned(), "12".to_owned())])).unwrap();
    let good = fs::read(&path).unwrap();
    for length in 0..good.len() {
        fs::write(&path, &good[..length]).unwrap();
        assert!(read_tensors(&path, None).is_err(), "cut at {length}");
    }
    for position in 0..good.len() - 28 {
        for change in [0x01, 0x10, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[position] ^= change;
            fs::write(&path, &bytes).unwrap();
            if let Ok(file) = read_tensors(&path, None) {
                let byte_count: usize = file.tensors.values().map(|tensor| tensor.bytes.len()).sum();
                assert!(byte_count <= 28, "{change:#x} at {position}");
            }
        }
    }
}
