//! `prune` and `eval` on this machine, with the real coordinator and the real workers.

use processes_tests::{Running, Tool, fixture};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(120);

fn prune(model: &str, workers: &str, out: &Path) -> Tool {
    Tool::espalier("prune --window-tokens 32 --rows 2 --lora-rank 4 --threads 1 --export-dtype f32")
        .flag("--model", fixture(&format!("models/{model}")))
        .flag("--data", fixture("text/tiny.txt"))
        .flag("--workers", workers)
        .flag("--out", out)
}

fn with_evaluation(tool: Tool) -> Tool {
    tool.flag("--eval-data", fixture("text/held_out.txt")).flag("--eval-window", "32")
}

fn json(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn events(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("events.jsonl")).unwrap_or_default();
    // A run that is being killed may leave its last line unfinished.
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn losses(out: &Path) -> Vec<f64> {
    events(out).iter().filter_map(|event| event["step"]["loss"].as_f64()).collect()
}

#[test]
fn prune_leaves_a_smaller_model_its_measure_and_its_picture() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    // Three key/value heads do not split evenly over two workers.
    let finished =
        with_evaluation(prune("gqa", "2", &out)).flag("--steps", "20").run(DEADLINE).expect_success();
    for word in ["perplexity", "parameters", "60,336", "-42.0 %", "pruned model", "report.html"] {
        assert!(finished.stdout.contains(word), "no {word:?} in\n{}", finished.stdout);
    }
    let config = json(&out.join("model/config.json"));
    assert_eq!(config["num_key_value_heads"], 2);
    assert_eq!(config["intermediate_size"], 12);

    let run = json(&out.join("run.json"));
    assert_eq!(run["state"], "RUN_STATE_SUCCEEDED");
    assert_eq!(run["evaluations"].as_array().unwrap().len(), 2);
    assert!(run["export_result"]["max_logit_difference"].as_f64().unwrap() < 1e-4);
    assert_eq!(losses(&out).len(), 20);
    let revisions: Vec<u64> = events(&out).iter().filter_map(|event| event["revision"].as_u64()).collect();
    assert!(revisions.iter().copied().eq(1..=revisions.len() as u64), "{revisions:?}");

    let removals = json(&out.join("removals.json"));
    let layers = removals["layers"].as_array().unwrap();
    let kept = |layer: &Value, kind: &str| {
        layer[kind].as_array().unwrap().iter().filter(|removed_at| removed_at.as_u64() == Some(0)).count()
    };
    assert!(
        layers.len() == 4
            && layers.iter().all(|layer| kept(layer, "channels") == 12 && kept(layer, "kv_heads") == 2)
    );

    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("Query heads") && page.contains("FFN channels") && page.contains("</html>"));
    let again = folder.path().join("again.html");
    let _ = Tool::espalier("report")
        .flag("--events", out.join("events.jsonl"))
        .flag("--out", &again)
        .run(DEADLINE)
        .expect_success();
    assert_eq!(fs::read_to_string(again).unwrap(), page, "the report is a function of what was recorded");

    let eval = Tool::espalier("eval --window 32 --json --threads 1")
        .flag("--model", out.join("model"))
        .flag("--data", fixture("text/held_out.txt"))
        .run(DEADLINE)
        .expect_success();
    let measured: Value = serde_json::from_str(&eval.stdout).unwrap();
    let (ours, exported) =
        (run["evaluations"][1]["perplexity"].as_f64().unwrap(), measured["perplexity"].as_f64().unwrap());
    assert!((ours / exported - 1.0).abs() < 1e-4, "{ours} while pruning, {exported} as exported");
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_the_same_masks_on_more_workers() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, workers: &str| {
        let out = folder.path().join(name);
        let _ = prune("mha", workers, &out)
            .flag("--steps", "12")
            .flag("--every", "3")
            .run(DEADLINE)
            .expect_success();
        out
    };
    let (first, again, two) = (run("first", "1"), run("again", "1"), run("two", "2"));
    let bytes = |out: &Path| fs::read(out.join("model/model.safetensors")).unwrap();
    assert!(bytes(&first) == bytes(&again), "the same seed gave other weights");
    assert_eq!(losses(&first), losses(&again));
    assert_eq!(json(&first.join("removals.json")), json(&two.join("removals.json")));
    for (one, two) in losses(&first).iter().zip(losses(&two)) {
        assert!((one - two).abs() < 1e-4, "loss {one} on one worker, {two} on two");
    }
}

#[test]
fn a_dry_run_tells_the_plan_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let finished = prune("gqa", "2", &out).args(["--dry-run"]).run(DEADLINE).expect_success();
    for word in ["60,336", "34,992", "llama"] {
        assert!(finished.stdout.contains(word), "no {word:?} in\n{}", finished.stdout);
    }
    assert!(!out.exists());
}

#[test]
fn tasks_are_answered_alike_on_one_worker_and_on_two_and_in_passes_of_any_size() {
    let files = ["beginnings", "contexts", "questions"].map(|name| fixture(&format!("tasks/{name}.jsonl")));
    let eval = |words: &str| -> Value {
        let finished = Tool::espalier("eval --window 32,64 --json --log-likelihoods --threads 1")
            .args(words.split_whitespace())
            .flag("--model", fixture("models/stories260k"))
            .flag("--data", fixture("text/held_out.txt"))
            .flag("--tasks", &files[0])
            .args(&files[1..])
            .run(DEADLINE)
            .expect_success();
        serde_json::from_str(&finished.stdout).unwrap()
    };
    let one = eval("--workers 1");
    let windows: Vec<u64> = one["evaluations"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|evaluation| evaluation["window_tokens"].as_u64())
        .collect();
    assert_eq!(windows, [32, 64], "several windows in one load");
    let counts: Vec<u64> =
        one["tasks"].as_array().unwrap().iter().filter_map(|task| task["count"].as_u64()).collect();
    assert_eq!(counts, [4, 3, 4]);
    let accuracies = |name: &str| -> Vec<f64> {
        let of = |task: &Value| task[name].as_f64().or(task["accuracy"].as_f64());
        one["tasks"].as_array().unwrap().iter().filter_map(of).collect()
    };
    for (mean, name) in [("mean_accuracy", "accuracy"), ("mean_normalized_accuracy", "normalized_accuracy")] {
        let expected = accuracies(name).iter().sum::<f64>() / 3.0;
        assert!((one[mean].as_f64().unwrap() - expected).abs() < 1e-12, "{mean}");
    }
    for words in ["--workers 2", "--workers 1 --pass-tokens 1", "--workers 4 --pass-tokens 300"] {
        let other = eval(words);
        for (one, other) in one["tasks"].as_array().unwrap().iter().zip(other["tasks"].as_array().unwrap()) {
            for name in ["task", "count", "correct", "correct_normalized", "tokens"] {
                assert_eq!(one[name], other[name], "{words}: {name}");
            }
            let sums = |task: &Value| task["log_likelihoods"].as_array().unwrap().clone();
            for (one, other) in sums(one).iter().zip(sums(other)) {
                let (one, other) = (one.as_f64().unwrap(), other.as_f64().unwrap());
                assert!((one - other).abs() < 1e-4, "{words}: {one} {other}");
            }
        }
    }
}

#[test]
fn tasks_are_a_table_with_their_mean() {
    let finished = Tool::espalier("eval --threads 1 --task-limit 2")
        .flag("--model", fixture("models/stories260k"))
        .flag("--tasks", fixture("tasks/beginnings.jsonl"))
        .args([fixture("tasks/contexts.jsonl")])
        .run(DEADLINE)
        .expect_success();
    for word in ["beginnings", "contexts", "by character", "±", "mean"] {
        assert!(finished.stdout.contains(word), "no {word:?} in\n{}", finished.stdout);
    }
}

#[test]
fn eval_is_the_same_on_one_worker_and_on_two() {
    let eval = |workers: &str| -> Value {
        let finished = Tool::espalier("eval --window 64 --json --threads 1")
            .flag("--model", fixture("models/gqa"))
            .flag("--data", fixture("text/held_out.txt"))
            .flag("--workers", workers)
            .run(DEADLINE)
            .expect_success();
        serde_json::from_str(&finished.stdout).unwrap()
    };
    let (one, two) = (eval("1"), eval("2"));
    assert_eq!(one["predicted_tokens"], two["predicted_tokens"]);
    let perplexity = |value: &Value| value["perplexity"].as_f64().unwrap();
    assert!((perplexity(&one) / perplexity(&two) - 1.0).abs() < 1e-5, "{one} {two}");
}

#[test]
fn logits_are_written_for_every_token() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("logits.safetensors");
    let _ = Tool::espalier("logits --tokens 1,2,3")
        .flag("--model", fixture("models/mha"))
        .flag("--out", &out)
        .run(DEADLINE)
        .expect_success();
    let bytes = fs::read(&out).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    assert_eq!(header["logits"]["shape"], serde_json::json!([1, 3, 96]));
}

/// A run that would go on for hours, some steps in, with its two workers.
fn endless(out: &Path) -> (Running, Vec<u32>) {
    let mut running = prune("mha", "2", out).flag("--steps", "1000000").start();
    let stepping = running.wait_for(DEADLINE, || (losses(out).len() > 3).then_some(()));
    assert!(stepping.is_some(), "no steps: {:?}", running.finish(Duration::ZERO));
    let workers = running.descendants();
    assert_eq!(workers.len(), 2, "the workers run");
    (running, workers)
}

#[test]
fn an_interrupt_cancels_the_run_and_leaves_a_record() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let (running, _) = endless(&out);
    running.signal(libc::SIGINT);
    let finished = running.finish(Duration::from_secs(40));
    let complaints = finished.complaints(130, &["cancelled"]);
    assert!(complaints.is_empty(), "{}", complaints.join("; "));
    assert_eq!(json(&out.join("run.json"))["state"], "RUN_STATE_CANCELLED");
    assert!(out.join("report.html").is_file());
}

#[test]
fn a_second_interrupt_ends_everything_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let (running, workers) = endless(&out);
    for id in &workers {
        // SAFETY: `kill` only sends a signal, here to a worker of this test. Stopped, it cannot answer a cancellation.
        unsafe { libc::kill(i32::try_from(*id).unwrap(), libc::SIGSTOP) };
    }
    running.signal(libc::SIGINT);
    std::thread::sleep(Duration::from_millis(500));
    running.signal(libc::SIGINT);
    let finished = running.finish(Duration::from_secs(10));
    let complaints = finished.complaints(130, &[]);
    assert!(complaints.is_empty(), "{}", complaints.join("; "));
}

#[test]
fn workers_do_not_outlive_a_command_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (running, _) = endless(&folder.path().join("out"));
    running.signal(libc::SIGKILL);
    let finished = running.finish(Duration::from_secs(10));
    assert_eq!((finished.code, finished.left_running), (None, 0));
}

#[test]
fn a_worker_that_is_killed_fails_the_run_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let (running, workers) = endless(&folder.path().join("out"));
    // SAFETY: `kill` only sends a signal, here to a worker of this test.
    unsafe { libc::kill(i32::try_from(workers[0]).unwrap(), libc::SIGKILL) };
    let finished = running.finish(Duration::from_secs(60));
    let complaints = finished.complaints(1, &["failed", "worker-", "signal: 9"]);
    assert!(complaints.is_empty(), "{}", complaints.join("; "));
}
