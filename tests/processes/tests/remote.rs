//! A coordinator and workers as processes of their own, driven from the command line and over plain gRPC.

use processes_tests::{Coordinator, Finished, Tool, WorkerProcess, copy_model, fixture};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use wire::client::{connected_channel, run_client, within};
use wire::pb;

const DEADLINE: Duration = Duration::from_secs(120);

struct Cluster {
    folder: tempfile::TempDir,
    coordinator: Coordinator,
    workers: Vec<WorkerProcess>,
}

impl Cluster {
    /// A folder with a model and texts, a coordinator and workers that may read it.
    fn start(worker_count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let _ = copy_model("gqa", &root.join("model"));
        for text in ["tiny.txt", "held_out.txt"] {
            fs::copy(fixture(&format!("text/{text}")), root.join(text)).unwrap();
        }
        let coordinator = Coordinator::start(root);
        let workers = (0..worker_count)
            .map(|index| WorkerProcess::start(&coordinator, &format!("w{index}"), root))
            .collect();
        Self { folder, coordinator, workers }
    }

    fn root(&self) -> &Path {
        self.folder.path()
    }

    /// A run file; `recipe` goes below `recipe:`.
    fn run_file(&self, name: &str, recipe: &str, workers: u32) -> PathBuf {
        let root = self.root().display();
        let path = self.root().join(format!("{name}.yaml"));
        let text = format!(
            "name: {name}\nmodel: {root}/model\ndata: [{{path: {root}/tiny.txt}}]\nworkers: {workers}\n\
             recipe: {{batch: {{window_tokens: 32, rows: 2}}, lora: {{rank: 4}}, {recipe}}}\n\
             evaluation: {{data: [{{path: {root}/held_out.txt}}], window_tokens: 32}}\n\
             export: {{path: {root}/{name}-out, dtype: f32}}\n"
        );
        fs::write(&path, text).unwrap();
        path
    }

    fn espalier(&self, words: &str) -> Tool {
        Tool::espalier(words).env("ESPALIER_COORDINATOR_URL", &self.coordinator.url)
    }

    fn json(&self, words: &str) -> Value {
        let finished = self.espalier(words).args(["--json"]).run(DEADLINE).expect_success();
        serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {}", finished.stdout))
    }

    /// Ends all processes, each of which must end well when asked.
    fn stop(self) {
        for worker in self.workers {
            let complaints = worker.stop().complaints(0, &[]);
            assert!(complaints.is_empty(), "a worker {}", complaints.join("; "));
        }
        let complaints = self.coordinator.stop().complaints(0, &[]);
        assert!(complaints.is_empty(), "the coordinator {}", complaints.join("; "));
    }
}

fn refused(finished: &Finished, code: i32, words: &[&str]) {
    let complaints = finished.complaints(code, words);
    assert!(complaints.is_empty(), "{}", complaints.join("; "));
}

#[test]
fn a_run_is_created_watched_inspected_measured_and_exported() {
    let cluster = Cluster::start(2);
    let file = cluster.run_file("half", "steps: 12", 2);
    let create = |words: &str| cluster.espalier(words).flag("--file", &file);

    let plan = create("create --validate-only").run(DEADLINE).expect_success();
    assert!(plan.stdout.contains("60,336") && plan.stdout.contains("34,992"), "{}", plan.stdout);
    assert_eq!(cluster.json("list")["runs"], serde_json::json!([]));

    let made = create("create --watch --request-id r1").run(DEADLINE).expect_success();
    assert!(made.stdout.contains("succeeded"), "{}\n{}", made.stdout, made.stderr);
    let again = create("create --request-id r1 --json").run(DEADLINE).expect_success();
    let runs = cluster.json("list")["runs"].as_array().unwrap().clone();
    assert_eq!(runs.len(), 1, "a repeated request made another run: {}", again.stdout);
    let id = runs[0]["id"].as_str().unwrap().to_owned();

    let run = cluster.json(&format!("get {id}"))["run"].clone();
    assert_eq!(run["state"], "RUN_STATE_SUCCEEDED");
    assert_eq!(run["spec"]["display_name"], "half");
    let decisions = cluster.json(&format!("decisions {id}"))["decisions"].as_array().unwrap().clone();
    let last = decisions.last().unwrap();
    assert_eq!(last["parameters"], 34_992);
    let mask = cluster.json(&format!("mask {id}"));
    assert_eq!(mask["generation"], last["generation"]);
    assert!(
        mask["keep_mask"]["layers"].as_array().unwrap().iter().all(|layer| layer["channels"]
            .as_array()
            .unwrap()
            .len()
            == 12)
    );
    for words in ["list", "workers", &format!("get {id}"), &format!("decisions {id}"), &format!("mask {id}")]
    {
        assert!(
            cluster.espalier(words).run(DEADLINE).expect_success().stdout.contains('│'),
            "{words} prints a table"
        );
    }

    // From the middle: nothing lost, nothing doubled.
    let watch = |from: u64| -> Vec<u64> {
        let words = format!("watch {id} --json --from {from}");
        let finished = cluster.espalier(&words).run(DEADLINE).expect_success();
        let revision =
            |line: &str| serde_json::from_str::<Value>(line).unwrap()["revision"].as_u64().unwrap();
        finished.stdout.lines().map(revision).collect()
    };
    let all = watch(0);
    assert!(all.iter().copied().eq(1..=all.len() as u64), "{all:?}");
    assert_eq!(watch(7), all[7..]);

    let held_out = cluster.root().join("held_out.txt");
    let measured = cluster
        .espalier(&format!("evaluate {id} --window 32 --json"))
        .flag("--data", &held_out)
        .run(DEADLINE)
        .expect_success();
    let measured: Value = serde_json::from_str(&measured.stdout).unwrap();
    let (then, now) = (
        run["evaluations"][1]["perplexity"].as_f64().unwrap(),
        measured["evaluation"]["perplexity"].as_f64().unwrap(),
    );
    assert!((then / now - 1.0).abs() < 1e-4, "{then} in the run, {now} as exported");

    let second = cluster.root().join("second");
    let exported =
        cluster.espalier(&format!("export {id} --dtype bf16")).flag("--out", &second).run(DEADLINE);
    let _ = exported.expect_success();
    assert!(second.join("model.safetensors").is_file());
    let over = cluster.espalier(&format!("export {id}")).flag("--out", &second).run(DEADLINE);
    refused(&over, 2, &["not empty"]);
    cluster.stop();
}

#[test]
fn a_run_is_cancelled_while_it_waits_and_while_it_works() {
    let cluster = Cluster::start(1);
    let create = |file: &Path| -> String {
        let finished = cluster.espalier("create --json").flag("--file", file).run(DEADLINE).expect_success();
        let made: Value = serde_json::from_str(&finished.stdout).unwrap();
        made["run"]["id"].as_str().unwrap().to_owned()
    };
    let working = create(&cluster.run_file("working", "steps: 1000000, pruning: null", 1));
    let state = |id: &str| cluster.json(&format!("get {id}"))["run"]["state"].as_str().unwrap().to_owned();
    let mut watching = cluster.espalier("watch").args([&working]).start();
    let runs = watching.wait_for(DEADLINE, || (state(&working) == "RUN_STATE_RUNNING").then_some(()));
    assert!(runs.is_some(), "the run is {}", state(&working));
    let waiting = create(&cluster.run_file("waiting", "steps: 5", 3));
    assert_eq!(state(&waiting), "RUN_STATE_QUEUED");
    for id in [&waiting, &working] {
        let _ = cluster.espalier("cancel").args([id]).run(DEADLINE).expect_success();
    }
    // Its watcher ends with it, and says that it did not succeed.
    refused(&watching.finish(Duration::from_secs(30)), 1, &["cancelled"]);
    assert_eq!(state(&waiting), "RUN_STATE_CANCELLED");
    assert_eq!(state(&working), "RUN_STATE_CANCELLED");
    refused(&cluster.espalier("evaluate").args([&working]).args(["--data", "/x"]).run(DEADLINE), 2, &["/x"]);
    cluster.stop();
}

#[test]
fn what_cannot_be_is_refused_over_the_wire() {
    let cluster = Cluster::start(0);
    for words in ["get", "watch", "cancel", "decisions", "mask"] {
        let finished = cluster.espalier(words).args(["no-such-run"]).run(DEADLINE);
        refused(&finished, 2, &["no-such-run"]);
    }
    let create = |path: &Path| cluster.espalier("create").flag("--file", path).run(DEADLINE);
    let file = cluster.run_file("escape", "steps: 5", 1);
    let text = fs::read_to_string(&file).unwrap();
    let model = cluster.root().join("model").display().to_string();
    for (other, words) in [
        ("/etc".to_owned(), &["spec.model", "roots"][..]),
        (format!("{model}/../../../etc"), &["spec.model", ".."]),
        ("model".to_owned(), &["spec.model", "absolute"]),
        (format!("{model}s"), &["spec.model", "exist"]),
    ] {
        fs::write(&file, text.replace(&format!("model: {model}"), &format!("model: {other}"))).unwrap();
        refused(&create(&file), 2, words);
    }
    std::os::unix::fs::symlink("/etc/passwd", cluster.root().join("link.txt")).unwrap();
    fs::write(&file, text.replace("tiny.txt", "link.txt")).unwrap();
    refused(&create(&file), 2, &["spec.training_data[0].path", "link"]);
    fs::write(&file, text.replace("escape-out", "")).unwrap();
    refused(&create(&file), 2, &["spec.export.path", "not empty"]);
    refused(&create(&cluster.run_file("many", "steps: 5", 4)), 2, &["tp_degree", "3"]);
    refused(
        &create(&cluster.run_file("sparse", "pruning: {budget: {sparsity: 1.0}}", 1)),
        2,
        &["sparsity", "[0, 1)"],
    );
    cluster.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_unknown_or_unset_members_is_refused() {
    let cluster = tokio::task::spawn_blocking(|| Cluster::start(0)).await.unwrap();
    let mut client = run_client(connected_channel(&cluster.coordinator.url).await.unwrap());
    let model = cluster.root().join("model").display().to_string();
    let text = cluster.root().join("tiny.txt").display().to_string();
    let spec = |recipe: pb::Recipe| pb::RunSpec {
        model: model.clone(),
        training_data: vec![pb::TextSource { path: text.clone(), ..Default::default() }],
        recipe: Some(recipe),
        ..Default::default()
    };
    let pruning = |pruning: pb::Pruning| pb::Recipe { pruning: Some(pruning), ..Default::default() };
    let cases = [
        ("criterion", spec(pruning(pb::Pruning { criterion: Some(99), ..Default::default() }))),
        ("shape", spec(pruning(pb::Pruning { shape: Some(0), ..Default::default() }))),
        ("recompute", spec(pb::Recipe { recompute: Some(-1), ..Default::default() })),
        (
            "sparsity",
            spec(pruning(pb::Pruning {
                budget: Some(pb::pruning::Budget::Sparsity(f64::NAN)),
                ..Default::default()
            })),
        ),
        ("max_grad_norm", spec(pb::Recipe { max_grad_norm: Some(f64::NEG_INFINITY), ..Default::default() })),
        ("model", pb::RunSpec { model: String::new(), ..spec(pb::Recipe::default()) }),
        ("tp_degree", pb::RunSpec { tp_degree: Some(0), ..spec(pb::Recipe::default()) }),
        ("training_data", pb::RunSpec { training_data: Vec::new(), ..spec(pb::Recipe::default()) }),
    ];
    for (field, spec) in cases {
        let message =
            pb::CreateRunRequest { spec: Some(spec), validate_only: false, request_id: String::new() };
        let status = client.create_run(within(DEADLINE, message)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{field}: {status}");
        let named = wire::status::violations(&status);
        assert!(named.iter().any(|violation| violation.field.contains(field)), "{field}: {named:?}");
    }
    let none = pb::CreateRunRequest { spec: None, validate_only: true, request_id: String::new() };
    let status = client.create_run(within(DEADLINE, none)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    tokio::task::spawn_blocking(|| cluster.stop()).await.unwrap();
}
