//! Numbers of whole runs through the real binaries: one worker process against several, and published perplexities.

use processes_tests::{Tool, fixture};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(180);

struct Outcome {
    losses: Vec<f64>,
    removals: String,
}

const PUBLISHED: &str =
    "--criterion loraprune-code --warmup 0.1 --cooldown 0.1 --every 3 --compensation none";

fn prune(workers: &str, [compute, storage]: [&str; 2], method: &str, out: &Path) -> Outcome {
    let _ = Tool::espalier(
        "prune --window-tokens 32 --rows 2 --lora-rank 4 --threads 1 --steps 20 --dropout 0.1",
    )
    .args(method.split_whitespace())
    .flag("--model", fixture("models/gqa"))
    .flag("--data", fixture("text/tiny.txt"))
    .flag("--compute", compute)
    .flag("--storage", storage)
    .flag("--workers", workers)
    .flag("--out", out)
    .run(DEADLINE)
    .expect_success();
    let text = fs::read_to_string(out.join("events.jsonl")).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    Outcome {
        losses: events.filter_map(|event| event["step"]["loss"].as_f64()).collect(),
        removals: fs::read_to_string(out.join("removals.json")).unwrap(),
    }
}

#[test]
fn one_two_and_three_worker_processes_compute_the_same_run() {
    let folder = tempfile::tempdir().unwrap();
    let global = format!("{PUBLISHED} --shape global");
    for (place, (formats, method, bound)) in [
        (["f64", "f64"], PUBLISHED, 1e-10),
        (["f32", "f32"], PUBLISHED, 1e-4),
        (["f64", "f64"], &global, 1e-10),
        (["f32", "int8"], PUBLISHED, 1e-4),
        (["f64", "nf4"], PUBLISHED, 1e-10),
        // The default recipe, but for more decisions than twenty steps would have.
        (["f64", "f64"], "--every 2", 1e-10),
        (["f32", "f32"], "--every 2", 1e-4),
    ]
    .into_iter()
    .enumerate()
    {
        let precision = formats.join("-");
        let run = |workers: &str| {
            prune(workers, formats, method, &folder.path().join(format!("{place}-{workers}")))
        };
        let one = run("1");
        assert_eq!(one.losses.len(), 20);
        for workers in ["2", "3"] {
            let many = run(workers);
            assert_eq!(many.removals, one.removals, "{precision} {method}: other masks on {workers} workers");
            for (step, (one, many)) in one.losses.iter().zip(&many.losses).enumerate() {
                let difference = ((one - many) / one).abs();
                assert!(
                    difference <= bound,
                    "{precision} {method}, step {step}: loss {one} on one worker, {many} on {workers}"
                );
            }
        }
    }
}

#[test]
fn a_real_model_has_its_published_perplexity() {
    let finished = Tool::espalier("eval --window 256 --mode stories --json --workers 2 --threads 1")
        .flag("--model", fixture("models/stories260k"))
        .flag("--data", fixture("text/tinystories.txt"))
        .run(DEADLINE)
        .expect_success();
    let evaluation: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(evaluation["predicted_tokens"], 49_861);
    let perplexity = evaluation["perplexity"].as_f64().unwrap();
    // transformers 5.23, f32: 4.2378
    assert!((perplexity / 4.2378 - 1.0).abs() < 2e-4, "perplexity {perplexity}");
}
