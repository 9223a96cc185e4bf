//! Runs that end well.

use cluster_tests::{Cluster, fixtures, in_time, toy};
use engine::Engine;
use std::sync::Arc;
use std::time::Duration;
use wire::pb;
use wire::pb::RunState;

fn engine() -> Arc<dyn Engine> {
    Arc::new(toy())
}

async fn masks(cluster: &Cluster, run: &pb::Run) -> Vec<pb::KeepMask> {
    let mut masks = Vec::new();
    for generation in 0..=run.generation {
        let request = pb::GetKeepMaskRequest { id: run.id.clone(), generation: Some(generation) };
        let got = in_time("GetKeepMask", cluster.runs().get_keep_mask(request)).await.unwrap().into_inner();
        assert_eq!(got.generation, generation);
        masks.push(got.keep_mask.unwrap());
    }
    masks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_two_and_three_workers_decide_the_same_masks() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(3, &engine()).await;
    let mut all = Vec::new();
    for tp_degree in [1, 2, 3] {
        let created = cluster.create(cluster.spec(tp_degree, &format!("out-{tp_degree}"))).await;
        let run = cluster.ended(&created.id).await;
        assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
        assert_eq!(run.worker_ids, ["w0", "w1", "w2"][..tp_degree as usize]);
        assert_eq!(run.generation, 3);
        assert!(run.create_time.is_some() && run.start_time.is_some() && run.end_time.is_some());

        let labels: Vec<&str> = run.evaluations.iter().map(|evaluation| evaluation.label.as_str()).collect();
        assert_eq!(labels, ["dense", "pruned"]);
        assert!(run.evaluations[1].perplexity > run.evaluations[0].perplexity, "the toy model says so");

        let plan = run.plan.clone().unwrap();
        let request = pb::ListDecisionsRequest { id: run.id.clone() };
        let decisions = in_time("ListDecisions", cluster.runs().list_decisions(request)).await;
        let decisions = decisions.unwrap().into_inner().decisions;
        let steps: Vec<u64> = decisions.iter().map(|decision| decision.step).collect();
        assert_eq!(steps, plan.pruning_steps);
        let last = decisions.last().unwrap();
        assert_eq!((last.parameters, &last.layers), (plan.pruned_parameters, &plan.layers));
        assert!((last.sparsity - plan.sparsity).abs() < 1e-12);

        let exported = run.export_result.clone().unwrap();
        assert_eq!(exported.path, cluster.path(&format!("out-{tp_degree}")));
        assert_eq!(exported.parameters, plan.pruned_parameters);
        assert!(std::path::Path::new(&exported.path).join("config.json").exists());
        all.push(masks(&cluster, &run).await);

        cluster
            .until_workers("the workers to be idle", |workers| {
                workers.len() == 3 && workers.iter().all(|worker| worker.run_id.is_empty())
            })
            .await;
    }
    assert_eq!(all[0], all[1]);
    assert_eq!(all[0], all[2]);
    cluster.shut_down().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn teaching_may_take_longer_than_a_step_may_be_silent() {
    // Silence is forgiven for 3 s; 8 passes of teaching take 4 s.
    let mut cluster = Cluster::start_with(|config| config.step_deadline_seconds = 1).await;
    let slow: Arc<dyn Engine> = Arc::new(toy().with_step_time(Duration::from_millis(500)));
    cluster.add_workers(2, &slow).await;
    let mut spec = cluster.spec(2, "out");
    spec.recipe.as_mut().unwrap().distillation = Some(pb::Distillation::default());
    let created = cluster.create(spec).await;
    let run = cluster.ended(&created.id).await;
    assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
    assert_eq!(run.generation, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_queue_in_turn_for_the_same_workers() {
    let mut cluster = Cluster::start().await;
    let mut ids = Vec::new();
    for place in 0..3 {
        ids.push(cluster.create(cluster.spec(2, &format!("out-{place}"))).await.id);
    }
    let queued = cluster.get(&ids[2]).await;
    assert_eq!(queued.state(), RunState::Queued);
    cluster.add_workers(2, &engine()).await;
    let mut starts = Vec::new();
    for id in &ids {
        let run = cluster.ended(id).await;
        assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
        let start = run.start_time.unwrap();
        starts.push((start.seconds, start.nanos));
    }
    assert!(starts.is_sorted(), "{starts:?}");

    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListRunsRequest { page_size: 2, page_token, ..Default::default() };
        let page = in_time("ListRuns", cluster.runs().list_runs(request)).await.unwrap().into_inner();
        pages.push(page.runs.into_iter().map(|run| run.id).collect::<Vec<_>>());
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, [vec![ids[2].clone(), ids[1].clone()], vec![ids[0].clone()]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exported_model_is_measured_and_written_again_by_one_idle_worker() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &engine()).await;
    let mut spec = cluster.spec(2, "first");
    spec.evaluation = None;
    let run = cluster.create(spec).await;
    let run = cluster.ended(&run.id).await;
    assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
    assert!(run.evaluations.is_empty());

    let export = pb::ExportSpec { path: cluster.path("second"), ..Default::default() };
    let request = pb::ExportRunRequest { id: run.id.clone(), export: Some(export.clone()) };
    let again = in_time("ExportRun", cluster.runs().export_run(request)).await.unwrap().into_inner();
    let again = again.export_result.unwrap();
    assert_eq!(again.path, cluster.path("second"));
    assert_eq!(again.parameters, run.export_result.unwrap().parameters);

    // The toy engine writes no weights; a stand-in for what a real one leaves there.
    let folder = cluster.path("first");
    for entry in std::fs::read_dir(fixtures().join("models/gqa")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), std::path::Path::new(&folder).join(entry.file_name())).unwrap();
    }
    let evaluation = cluster.spec(1, "x").evaluation;
    let request =
        pb::EvaluateRunRequest { id: run.id.clone(), evaluation: evaluation.clone(), ..Default::default() };
    let measured = in_time("EvaluateRun", cluster.runs().evaluate_run(request)).await.unwrap().into_inner();
    let measured = measured.evaluation.unwrap();
    assert_eq!(measured.label, "exported");
    assert!(measured.perplexity.is_finite() && measured.predicted_tokens > 0);

    let spec = pb::TaskSpec { log_likelihoods: true, ..tasks() };
    let request = pb::EvaluateRunRequest { id: run.id.clone(), evaluation: None, tasks: Some(spec) };
    let answered = in_time("EvaluateRun", cluster.runs().evaluate_run(request)).await.unwrap().into_inner();
    assert!(answered.evaluation.is_none());
    let choices: Vec<usize> = answered.task_results.iter().map(|task| task.log_likelihoods.len()).collect();
    assert_eq!(choices, [6, 4]);

    let evaluation = evaluation.map(|spec| pb::EvaluationSpec { more_window_tokens: vec![16], ..spec });
    let request = pb::EvaluateRunRequest { id: run.id.clone(), evaluation, tasks: Some(tasks()) };
    let both = in_time("EvaluateRun", cluster.runs().evaluate_run(request)).await.unwrap().into_inner();
    assert_eq!(both.evaluation.unwrap().window_tokens, 32);
    assert_eq!(both.more_evaluations[0].window_tokens, 16);
    assert_eq!(both.task_results.len(), 2);
    cluster
        .until_workers("the worker to be idle", |workers| {
            workers.iter().all(|worker| worker.run_id.is_empty())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_without_steps_only_measures() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &engine()).await;
    let mut spec = cluster.spec(1, "unused");
    spec.export = None;
    spec.training_data.clear();
    let recipe = spec.recipe.as_mut().unwrap();
    (recipe.steps, recipe.pruning) = (Some(0), None);
    let run = cluster.create(spec).await;
    let run = cluster.ended(&run.id).await;
    assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
    assert_eq!(run.evaluations.len(), 1);
    assert_eq!(run.evaluations[0].label, "dense");
    assert!(run.last_step.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_measures_every_window_and_every_task() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &engine()).await;
    let mut spec = cluster.spec(2, "unused");
    spec.export = None;
    spec.evaluation.as_mut().unwrap().more_window_tokens = vec![16, 48];
    spec.tasks = Some(tasks());
    let run = cluster.create(spec).await;
    let run = cluster.ended(&run.id).await;
    assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
    let windows: Vec<(&str, u32)> = run
        .evaluations
        .iter()
        .map(|evaluation| (evaluation.label.as_str(), evaluation.window_tokens))
        .collect();
    assert_eq!(
        windows,
        [("dense", 32), ("dense", 16), ("dense", 48), ("pruned", 32), ("pruned", 16), ("pruned", 48)]
    );
    let measured: Vec<(&str, &str, u64)> =
        run.task_results.iter().map(|task| (task.label.as_str(), task.task.as_str(), task.count)).collect();
    assert_eq!(
        measured,
        [
            ("dense", "beginnings", 2),
            ("dense", "contexts", 2),
            ("pruned", "beginnings", 2),
            ("pruned", "contexts", 2)
        ]
    );
    for task in &run.task_results {
        assert_eq!(task.accuracy, task.correct as f64 / 2.0);
        assert_eq!(task.accuracy_error, Some((task.accuracy * (1.0 - task.accuracy)).sqrt()));
        assert_eq!(task.normalized_accuracy.is_some(), task.task == "beginnings");
        assert!(task.log_likelihoods.is_empty(), "only the events carry them");
    }
}

fn tasks() -> pb::TaskSpec {
    let file = |name: &str| fixtures().join("tasks").join(name).display().to_string();
    pb::TaskSpec {
        files: vec![file("beginnings.jsonl"), file("contexts.jsonl")],
        max_rows: 2,
        ..Default::default()
    }
}
