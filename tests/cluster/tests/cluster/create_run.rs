//! What CreateRun and its fellows accept and refuse.

use cluster_tests::{Cluster, fixtures, in_time, toy};
use std::sync::Arc;
use tonic::{Code, Status};
use wire::pb;
use wire::pb::RunState;
use wire::status::{Reason, reason, violations};

async fn create(cluster: &Cluster, request: pb::CreateRunRequest) -> Result<pb::Run, Status> {
    let created = in_time("CreateRun", cluster.runs().create_run(request)).await?;
    Ok(created.into_inner().run.expect("a run"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn validate_only_returns_the_plan_and_stores_nothing() {
    let cluster = Cluster::start().await;
    let request = pb::CreateRunRequest {
        spec: Some(cluster.spec(2, "out")),
        validate_only: true,
        ..Default::default()
    };
    let run = create(&cluster, request).await.unwrap();
    assert!(run.id.is_empty() && run.create_time.is_none());
    let plan = run.plan.unwrap();
    assert_eq!(plan.pruning_steps, [2, 4, 6]);
    assert_eq!(plan.layers.len(), 4);
    assert!(plan.pruned_parameters < plan.dense_parameters && plan.sparsity > 0.4);
    assert_eq!(plan.export_form, "llama");
    let recipe = run.spec.unwrap().recipe.unwrap();
    assert_eq!(recipe.lora.unwrap().rank, Some(8), "defaults are filled in");
    let listed = in_time("ListRuns", cluster.runs().list_runs(pb::ListRunsRequest::default())).await;
    assert!(listed.unwrap().into_inner().runs.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_says_how_the_result_will_be_exported() {
    let cluster = Cluster::start().await;
    let plan = async |change: fn(&mut pb::Pruning)| {
        let mut spec = cluster.spec(1, "out");
        change(spec.recipe.as_mut().unwrap().pruning.as_mut().unwrap());
        let request = pb::CreateRunRequest { spec: Some(spec), validate_only: true, ..Default::default() };
        create(&cluster, request).await.unwrap().plan.unwrap()
    };
    let global = plan(|pruning| pruning.set_shape(pb::Shape::Global)).await;
    assert!(global.layers.is_empty() && global.export_form.ends_with("padded to the widest layer"));
    let paper = plan(|pruning| pruning.set_shape(pb::Shape::Paper)).await;
    assert_eq!(paper.layers.last().unwrap().query_heads, 6, "the last layer is protected");
    assert_eq!(paper.export_form, "llama, padded to the widest layer");
    // 5 of 6 query heads do not divide a hidden size of 48.
    let five = plan(|pruning| {
        pruning.set_head_grouping(pb::HeadGrouping::KvGroups);
        pruning.budget = Some(pb::pruning::Budget::Sparsity(0.2));
    })
    .await;
    assert!(["llama", "mistral"].contains(&five.export_form.as_str()), "{}", five.export_form);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_id_returns_the_run_it_made() {
    let cluster = Cluster::start().await;
    let request = pb::CreateRunRequest {
        spec: Some(cluster.spec(1, "out")),
        validate_only: false,
        request_id: "one".to_owned(),
    };
    let first = create(&cluster, request.clone()).await.unwrap();
    // The export folder may be filled by then: the run is what was asked for all the same.
    std::fs::create_dir_all(cluster.path("out/partial")).unwrap();
    let again = create(&cluster, request.clone()).await.unwrap();
    assert_eq!(first.id, again.id);
    let mut other = request;
    other.spec.as_mut().unwrap().tp_degree = Some(2);
    let refused = create(&cluster, other).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused)), (Code::AlreadyExists, Some(Reason::RequestIdReused)));
}

type Change = Box<dyn Fn(&Cluster, &mut pb::RunSpec)>;

fn recipe(change: impl Fn(&mut pb::Recipe) + 'static) -> Change {
    Box::new(move |_, spec| change(spec.recipe.as_mut().unwrap()))
}

fn pruning(change: impl Fn(&mut pb::Pruning) + 'static) -> Change {
    recipe(move |recipe| change(recipe.pruning.as_mut().unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_wrong_spec_is_refused_with_the_field_at_fault() {
    let cluster = Cluster::start().await;
    std::fs::write(cluster.path("empty.txt"), "").unwrap();
    std::fs::write(cluster.path("file"), "x").unwrap();
    std::fs::create_dir_all(cluster.path("full/inside")).unwrap();
    std::fs::create_dir_all(cluster.path("no-config")).unwrap();
    let broken = fixtures().join("models/gqa");
    for (folder, config, weights) in [("bad-json", "{", true), ("truncated", "", false)] {
        std::fs::create_dir_all(cluster.path(folder)).unwrap();
        let to = std::path::PathBuf::from(cluster.path(folder));
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            std::fs::copy(broken.join(name), to.join(name)).unwrap();
        }
        if weights {
            std::fs::write(to.join("config.json"), config).unwrap();
        } else {
            let bytes = std::fs::read(to.join("model.safetensors")).unwrap();
            std::fs::write(to.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
        }
    }
    std::os::unix::fs::symlink("/etc", cluster.path("escape")).unwrap();
    let model =
        |path: &'static str| -> Change { Box::new(move |cluster, spec| spec.model = cluster.path(path)) };
    let data = |path: &'static str| -> Change {
        Box::new(move |cluster, spec| spec.training_data[0].path = cluster.path(path))
    };
    let export = |path: &'static str| -> Change {
        Box::new(move |cluster, spec| spec.export.as_mut().unwrap().path = cluster.path(path))
    };
    let cases: Vec<(&str, &str, Change)> = vec![
        ("spec.model", "is required", Box::new(|_, spec| spec.model.clear())),
        ("spec.model", "does not exist", model("absent")),
        ("spec.model", "config.json", model("no-config")),
        ("spec.model", "is not a folder", model("file")),
        ("spec.model", "config.json", model("bad-json")),
        ("spec.model", "model.safetensors", model("truncated")),
        ("spec.model", "lies below none", Box::new(|_, spec| spec.model = "/etc".into())),
        ("spec.model", "absolute", Box::new(|_, spec| spec.model = "models/gqa".into())),
        ("spec.model", "`..`", model("../etc")),
        ("spec.model", "by a link", model("escape/ssl")),
        ("spec.training_data", "at least one file", Box::new(|_, spec| spec.training_data.clear())),
        ("spec.training_data[0].path", "does not exist", data("absent.txt")),
        ("spec.training_data[0].path", "is empty", data("empty.txt")),
        ("spec.training_data[0].path", "is not a file", data("full")),
        (
            "spec.training_data[0].format",
            "no member 77",
            Box::new(|_, spec| spec.training_data[0].format = 77),
        ),
        (
            "spec.evaluation.sources",
            "at least one file",
            Box::new(|_, spec| spec.evaluation.as_mut().unwrap().sources.clear()),
        ),
        (
            "spec.evaluation.sources[0].path",
            "does not exist",
            Box::new(|cluster, spec| {
                spec.evaluation.as_mut().unwrap().sources[0].path = cluster.path("absent")
            }),
        ),
        ("spec.export.path", "is not empty", export("full")),
        ("spec.export.path", "is not a folder", export("file")),
        ("spec.export.path", "by a link", export("escape/new")),
        (
            "spec.export.path",
            "lies below none",
            Box::new(|_, spec| spec.export.as_mut().unwrap().path = "/x".into()),
        ),
        ("spec.tp_degree", "must lie in 1..=", Box::new(|_, spec| spec.tp_degree = Some(0))),
        ("spec.tp_degree", "use at most 3 workers", Box::new(|_, spec| spec.tp_degree = Some(4))),
        (
            "spec.recipe.pruning.sparsity",
            "must lie in [0, 1)",
            pruning(|p| {
                p.budget = Some(pb::pruning::Budget::Sparsity(1.0));
            }),
        ),
        (
            "spec.recipe.pruning.sparsity",
            "out of reach",
            pruning(|p| {
                p.budget = Some(pb::pruning::Budget::Sparsity(0.9999));
            }),
        ),
        (
            "spec.recipe.pruning.parameters",
            "must lie in",
            pruning(|p| {
                p.budget = Some(pb::pruning::Budget::Parameters(5));
            }),
        ),
        ("spec.recipe.pruning.shape", "no member 9", pruning(|p| p.shape = Some(9))),
        ("spec.recipe.pruning.criterion", "is unspecified", pruning(|p| p.criterion = Some(0))),
        (
            "spec.recipe.pruning.protected_layers",
            "no layer 40",
            pruning(|p| {
                p.set_shape(pb::Shape::Global);
                p.protected_layers = Some(pb::ProtectedLayers { layers: vec![40] });
            }),
        ),
        (
            "spec.recipe.pruning.ramp",
            "leave no step",
            pruning(|p| {
                p.ramp =
                    Some(pb::Ramp { warmup: Some(0.5), cooldown: Some(0.9), every: Some(1), shape: None });
            }),
        ),
        (
            "spec.recipe.lora.rank",
            "1..=1024",
            recipe(|r| {
                r.lora = Some(pb::Lora { rank: Some(0), ..Default::default() });
            }),
        ),
        (
            "spec.recipe.batch.window_tokens",
            "at least 2",
            recipe(|r| {
                r.batch.as_mut().unwrap().window_tokens = Some(1);
            }),
        ),
        (
            "spec.recipe.learning_rate.peak",
            "zero or positive",
            recipe(|r| {
                r.learning_rate = Some(pb::LearningRate { peak: Some(f64::NAN), ..Default::default() });
            }),
        ),
    ];
    assert!(cases.len() > 30);
    for (field, problem, change) in cases {
        let mut spec = cluster.spec(2, "out");
        change(&cluster, &mut spec);
        let request = pb::CreateRunRequest { spec: Some(spec), ..Default::default() };
        let refused = create(&cluster, request).await.expect_err(&format!("{field}: {problem}"));
        assert_eq!(refused.code(), Code::InvalidArgument, "{field}: {refused}");
        assert_eq!(reason(&refused), Some(Reason::InvalidFields));
        let found = violations(&refused);
        assert!(
            found.iter().any(|violation| violation.field == field && violation.problem.contains(problem)),
            "{field}: {problem} in {found:?}"
        );
    }
    let everything = pb::CreateRunRequest {
        spec: Some(pb::RunSpec {
            model: "/etc".into(),
            training_data: vec![pb::TextSource { path: cluster.path("absent"), ..Default::default() }],
            tp_degree: Some(0),
            recipe: Some(pb::Recipe {
                lora: Some(pb::Lora { rank: Some(0), ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let refused = create(&cluster, everything).await.unwrap_err();
    assert_eq!(violations(&refused).len(), 4, "all at once: {:?}", violations(&refused));
    let listed = in_time("ListRuns", cluster.runs().list_runs(pb::ListRunsRequest::default())).await;
    assert!(listed.unwrap().into_inner().runs.is_empty(), "what is refused is not stored");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_runs_under_way_never_export_to_one_folder() {
    let cluster = Cluster::start().await;
    cluster.create(cluster.spec(1, "out")).await;
    let request = pb::CreateRunRequest { spec: Some(cluster.spec(1, "out")), ..Default::default() };
    let refused = create(&cluster, request).await.unwrap_err();
    assert_eq!(violations(&refused)[0].field, "spec.export.path");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_about_runs_that_are_not_there_or_not_ready_are_refused() {
    let mut cluster = Cluster::start().await;
    let mut runs = cluster.runs();
    let id = || "run-none".to_owned();
    let evaluation = cluster.spec(1, "x").evaluation;
    let root = cluster.path("");
    let export = |path: &str| Some(pb::ExportSpec { path: format!("{root}{path}"), ..Default::default() });
    let refusals = [
        runs.get_run(pb::GetRunRequest { id: id() }).await.unwrap_err(),
        runs.watch_run(pb::WatchRunRequest { id: id(), after_revision: 0 }).await.unwrap_err(),
        runs.cancel_run(pb::CancelRunRequest { id: id(), discard: false }).await.unwrap_err(),
        runs.list_decisions(pb::ListDecisionsRequest { id: id() }).await.unwrap_err(),
        runs.get_keep_mask(pb::GetKeepMaskRequest { id: id(), generation: None }).await.unwrap_err(),
        runs.evaluate_run(pb::EvaluateRunRequest { id: id(), evaluation: evaluation.clone(), tasks: None })
            .await
            .unwrap_err(),
        runs.export_run(pb::ExportRunRequest { id: id(), export: export("a") }).await.unwrap_err(),
    ];
    for refused in refusals {
        assert_eq!((refused.code(), reason(&refused)), (Code::NotFound, Some(Reason::RunNotFound)));
    }
    let empty = runs.get_run(pb::GetRunRequest::default()).await.unwrap_err();
    assert_eq!((empty.code(), violations(&empty)[0].field.as_str()), (Code::InvalidArgument, "id"));
    let token = pb::ListRunsRequest { page_token: "x".into(), ..Default::default() };
    let token = runs.list_runs(token).await.unwrap_err();
    assert_eq!((token.code(), violations(&token)[0].field.as_str()), (Code::InvalidArgument, "page_token"));

    let queued = cluster.create(cluster.spec(1, "out")).await;
    assert_eq!(queued.state(), RunState::Queued);
    let id = || queued.id.clone();
    let request = pb::GetKeepMaskRequest { id: id(), generation: Some(1) };
    let decision = runs.get_keep_mask(request).await.unwrap_err();
    assert_eq!((decision.code(), reason(&decision)), (Code::NotFound, Some(Reason::DecisionNotFound)));
    let request = pb::EvaluateRunRequest { id: id(), evaluation: evaluation.clone(), tasks: None };
    let early = runs.evaluate_run(request).await.unwrap_err();
    assert_eq!((early.code(), reason(&early)), (Code::FailedPrecondition, Some(Reason::RunNotReady)));
    let early = runs.export_run(pb::ExportRunRequest { id: id(), export: export("a") }).await.unwrap_err();
    assert_eq!((early.code(), reason(&early)), (Code::FailedPrecondition, Some(Reason::RunNotReady)));
    let request = pb::EvaluateRunRequest { id: id(), evaluation: None, tasks: None };
    let wrong = runs.evaluate_run(request).await.unwrap_err();
    assert_eq!(violations(&wrong)[0].field, "evaluation.sources");

    cluster.add_worker("w0", Arc::new(toy())).await;
    let run = cluster.ended(&queued.id).await;
    assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
    cluster.kill("w0");
    cluster.until_workers("w0 to be gone", <[pb::Worker]>::is_empty).await;
    let request = pb::ExportRunRequest { id: queued.id.clone(), export: export("again") };
    let nobody = in_time("ExportRun", runs.export_run(request)).await.unwrap_err();
    assert_eq!((nobody.code(), reason(&nobody)), (Code::ResourceExhausted, Some(Reason::NoIdleWorker)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_be_reached_back_is_not_admitted() {
    let cluster = Cluster::start().await;
    let good = pb::WorkerInfo {
        id: "w".into(),
        endpoint: "http://127.0.0.1:1".into(),
        device: "cpu".into(),
        incarnation: "1".into(),
        ..Default::default()
    };
    for (field, info) in [
        ("info.id", pb::WorkerInfo { id: String::new(), ..good.clone() }),
        ("info.endpoint", pb::WorkerInfo { endpoint: "localhost:7".into(), ..good.clone() }),
        ("info.device", pb::WorkerInfo { device: String::new(), ..good.clone() }),
        ("info.incarnation", pb::WorkerInfo { incarnation: String::new(), ..good.clone() }),
    ] {
        let refused =
            cluster.registry().register(pb::RegisterRequest { info: Some(info) }).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert_eq!(violations(&refused)[0].field, field);
    }
    let renewed =
        cluster.registry().renew(pb::RenewRequest { lease_id: "x".into(), ..Default::default() }).await;
    let renewed = renewed.unwrap_err();
    assert_eq!((renewed.code(), reason(&renewed)), (Code::NotFound, Some(Reason::LeaseNotFound)));

    // A worker that nobody answers for fails its run by name instead of holding it.
    cluster.registry().register(pb::RegisterRequest { info: Some(good) }).await.unwrap();
    let run = cluster.create(cluster.spec(1, "out")).await;
    let run = cluster.ended(&run.id).await;
    assert_eq!(run.state(), RunState::Failed);
    assert!(run.status_message.contains("worker `w` (rank 0)"), "{}", run.status_message);
}
