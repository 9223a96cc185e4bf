//! The recipe's choices for what is left of the model after removal, through the real coordinator, workers and Gloo.

use processes_tests::{Tool, fixture};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(180);

fn prune(model: &str, text: &str, workers: &str, out: &Path) -> Tool {
    Tool::espalier("prune --window-tokens 32 --rows 2 --lora-rank 4 --threads 1 --export-dtype f32")
        .flag("--model", fixture(&format!("models/{model}")))
        .flag("--data", fixture(&format!("text/{text}")))
        .flag("--workers", workers)
        .flag("--out", out)
}

fn events(out: &Path, kind: &str, field: &str) -> Vec<f64> {
    let text = fs::read_to_string(out.join("events.jsonl")).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events
        .filter_map(|event| {
            let value = &event[kind][field];
            value.as_f64().or_else(|| value.as_str()?.parse().ok())
        })
        .collect()
}

#[test]
fn a_model_pruned_at_once_recovers_at_a_restarted_rate_towards_what_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let _ = prune("stories260k", "tinystories.txt", "2", &out)
        .flag("--steps", "16")
        .flag("--sparsity", "0.25")
        .flag("--ramp-shape", "one-shot")
        .flag("--warmup", "0.25")
        .flag("--recovery", "restart")
        .flag("--distill", "0.5")
        .flag("--distill-top-k", "32")
        .run(DEADLINE)
        .expect_success();
    assert_eq!(events(&out, "decision", "step"), [4.0]);
    let rates = events(&out, "step", "learning_rate");
    assert_eq!(rates.len(), 16);
    // A cosine over 16 steps, and from step 5 on another over the 11 that are left.
    assert!(
        rates[4] < rates[0] && (rates[5] - rates[0]).abs() < 1e-12 && rates[15] < 0.1 * rates[5],
        "{rates:?}"
    );
    let log: String = fs::read_dir(out.join("logs"))
        .unwrap()
        .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
        .collect();
    assert!(log.contains("taught"), "the log tells of teaching");
    let manifest = fs::read_to_string(out.join("model/espalier_manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["recipe"]["distillation"]["top_k"], 32);
    assert_eq!(manifest["recipe"]["learning_rate"]["recovery"], "restart");
}

#[test]
fn distillation_on_two_and_three_workers_is_that_on_one() {
    let folder = tempfile::tempdir().unwrap();
    let run = |workers: &str, weight: &str| {
        let out = folder.path().join(format!("{workers}-{weight}"));
        let _ = prune("gqa", "tiny.txt", workers, &out)
            .flag("--steps", "12")
            .flag("--every", "3")
            .flag("--compute", "f64")
            .flag("--storage", "f64")
            .flag("--distill", weight)
            .flag("--distill-top-k", "16")
            .run(DEADLINE)
            .expect_success();
        (events(&out, "step", "loss"), fs::read_to_string(out.join("removals.json")).unwrap())
    };
    let (one, removals) = run("1", "0.7");
    assert_eq!(one.len(), 12);
    for workers in ["2", "3"] {
        let (many, same) = run(workers, "0.7");
        assert_eq!(same, removals, "other masks on {workers} workers");
        let worst = one.iter().zip(&many).map(|(one, many)| ((one - many) / one).abs()).fold(0.0, f64::max);
        // What is taught is rounded to single precision.
        assert!(worst <= 1e-7, "losses on {workers} workers differ by {worst:e}");
    }
    let (other, _) = run("1", "0.2");
    assert_eq!(other[0].to_bits(), one[0].to_bits(), "the loss told is that of the text");
    assert_ne!(other[3].to_bits(), one[3].to_bits(), "the weight changes the run");
}

#[test]
fn more_tokens_than_the_vocabulary_cannot_be_distilled() {
    let folder = tempfile::tempdir().unwrap();
    let complaints = prune("gqa", "tiny.txt", "1", &folder.path().join("out"))
        .flag("--steps", "12")
        .flag("--distill", "0.5")
        .flag("--distill-top-k", "1000")
        .run(DEADLINE)
        .complaints(2, &["distillation.top_k", "must not exceed the model's vocabulary"]);
    assert_eq!(complaints, Vec::<String>::new());
}
