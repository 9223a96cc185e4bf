//! Runs whose o and down change when groups go, through the real binaries, up to the exported model.

use processes_tests::{Tool, fixture};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(180);

fn run_of(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn a_compensated_model_is_nearer_to_the_dense_one_on_text_that_it_was_not_calibrated_on() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture("text/tinystories.txt")).unwrap();
    let (train, held_out) = (folder.path().join("train.txt"), folder.path().join("held_out.txt"));
    let middle = text.len() / 3 * 2 + text[text.len() / 3 * 2..].find('\n').unwrap();
    fs::write(&train, &text[..middle]).unwrap();
    fs::write(&held_out, &text[middle..]).unwrap();
    let pruned = |compensation: &str, workers: &str| {
        let out = folder.path().join(format!("{compensation}-{workers}"));
        // Steps too small to tune anything: what is left is what the decision did.
        let _ = Tool::espalier(
            "prune --criterion loraprune-code --steps 3 --ramp-shape one-shot --warmup 0.4 --sparsity 0.3 --learning-rate 1e-6 --threads 1 \
             --window-tokens 64 --rows 4 --lora-rank 4 --export-dtype f32",
        )
        .flag("--model", fixture("models/stories260k"))
        .flag("--data", &train)
        .flag("--eval-data", &held_out)
        .flag("--compensation", compensation)
        .flag("--workers", workers)
        .flag("--out", &out)
        .run(DEADLINE)
        .expect_success();
        let run = run_of(&out);
        assert!(number(&run["export_result"]["max_logit_difference"]) < 1e-3, "{compensation}");
        number(&run["evaluations"][1]["perplexity"])
    };
    let none = pruned("none", "1");
    for target in ["layer", "stream"] {
        let (one, two) = (pruned(target, "1"), pruned(target, "2"));
        assert!(one < 0.5 * none, "{target}: perplexity {one}, {none} without");
        assert!((one / two - 1.0).abs() < 1e-5, "{target}: {one} on one worker, {two} on two");
    }
}

/// Several decisions on three workers, which may leave them uneven. The model's file is in f32: storing it in bf16 rounds.
#[test]
fn several_compensated_decisions_on_several_workers_are_in_the_exported_model() {
    let folder = tempfile::tempdir().unwrap();
    for (storage, export) in [("f32", "f32"), ("bf16", "f32"), ("f32", "bf16")] {
        let out = folder.path().join(format!("{storage}-{export}"));
        let _ = Tool::espalier(
            "prune --steps 20 --every 3 --shape paper --protect 0 --workers 3 --threads 1 --compensation stream \
             --window-tokens 32 --rows 2 --lora-rank 4",
        )
        .flag("--model", fixture("models/mha"))
        .flag("--data", fixture("text/tiny.txt"))
        .flag("--storage", storage)
        .flag("--export-dtype", export)
        .flag("--out", &out)
        .run(DEADLINE)
        .expect_success();
        let run = run_of(&out);
        assert_eq!(run["state"], "RUN_STATE_SUCCEEDED");
        let difference = number(&run["export_result"]["max_logit_difference"]);
        assert!(export != "f32" || difference < 1e-4, "{storage} {export}: logits differ by {difference}");
    }
}

#[test]
fn a_quantised_base_is_not_compensated() {
    let folder = tempfile::tempdir().unwrap();
    let finished = Tool::espalier("prune --compensation layer --storage int8")
        .flag("--model", fixture("models/mha"))
        .flag("--data", fixture("text/tiny.txt"))
        .flag("--out", folder.path().join("out"))
        .run(DEADLINE);
    assert_ne!(finished.code, Some(0));
    for word in ["pruning.", "quantised", "f32 or bf16"] {
        assert!(finished.stderr.contains(word), "no {word:?} in\n{}", finished.stderr);
    }
}
