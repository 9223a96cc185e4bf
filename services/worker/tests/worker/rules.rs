//! What a worker refuses, and with which status.

use crate::harness::{
    Harness, SESSION, checkpoint, fixtures, load_request, request, source, start, task_file, tasks, toy,
};
use pruning::KeepMask;
use tonic::{Code, Status};
use wire::convert::mask;
use wire::pb;
use wire::status::{Reason, reason, violations};

fn assert_refused(status: &Status, code: Code, expected: Reason) {
    assert_eq!((status.code(), reason(status)), (code, Some(expected)), "{status:?}");
}

fn fields(status: &Status) -> Vec<String> {
    violations(status).into_iter().map(|violation| violation.field).collect()
}

#[tokio::test]
async fn every_call_of_a_session_needs_the_current_one() {
    let mut worker = start(toy()).await;
    for loaded in [false, true] {
        if loaded {
            worker.load().await;
        }
        let session_id = || "s-other".to_owned();
        let client = &mut worker.client;
        let keep_mask = Some(mask::to_pb(&KeepMask::full(&worker.spec)));
        let gloo = pb::CollectiveBackend::Gloo.into();
        let refused = [
            client
                .open_rendezvous(request(pb::OpenRendezvousRequest {
                    session_id: session_id(),
                    backend: gloo,
                }))
                .await
                .unwrap_err(),
            client
                .join_group(request(pb::JoinGroupRequest {
                    session_id: session_id(),
                    backend: gloo,
                    rendezvous: "toy:".into(),
                }))
                .await
                .unwrap_err(),
            client
                .train(request(pb::TrainRequest {
                    session_id: session_id(),
                    end_step: 1,
                    ..Default::default()
                }))
                .await
                .unwrap_err(),
            client
                .apply_mask(request(pb::ApplyMaskRequest {
                    session_id: session_id(),
                    generation: 1,
                    keep_mask,
                }))
                .await
                .unwrap_err(),
            client
                .evaluate(request(pb::EvaluateRequest { session_id: session_id(), window_index: 0 }))
                .await
                .unwrap_err(),
            client
                .checkpoint(request(pb::CheckpointRequest {
                    session_id: session_id(),
                    url: "file:///".into(),
                    with_logits: false,
                }))
                .await
                .map(drop)
                .unwrap_err(),
        ];
        for status in refused {
            assert_refused(&status, Code::FailedPrecondition, Reason::WrongSession);
        }
        client.abort(request(pb::AbortRequest { session_id: session_id() })).await.unwrap();
    }
    assert_eq!(worker.describe().await.session_id, SESSION, "aborting another session changes nothing");
    worker.client.abort(request(pb::AbortRequest { session_id: String::new() })).await.unwrap();
    worker.client.abort(request(pb::AbortRequest { session_id: SESSION.into() })).await.unwrap();
    assert_eq!(worker.describe().await.session_id, "");
}

#[tokio::test]
async fn a_load_request_names_everything_that_is_wrong_with_it() {
    let mut worker = start(toy()).await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret.txt"), "x").unwrap();
    let link = worker.scratch.join("link.txt");
    std::os::unix::fs::symlink(outside.path().join("secret.txt"), &link).unwrap();
    let text = |path: &str| vec![pb::TextSource { path: path.to_owned(), ..Default::default() }];
    let recipe = || load_request().recipe.unwrap();
    type Change = Box<dyn Fn(&mut pb::LoadRequest)>;
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(|message| message.session_id.clear()), "session_id"),
        (Box::new(|message| message.model = "models/gqa".into()), "model"),
        (Box::new(|message| message.model = "/etc".into()), "model"),
        (Box::new(|message| message.model.push_str("/../gqa")), "model"),
        (Box::new(|message| message.model.push_str("_missing")), "model"),
        (Box::new(|message| message.model.push_str("/config.json")), "model"),
        (Box::new(|message| message.tp_degree = 0), "tp_degree"),
        (Box::new(|message| message.tp_degree = u32::MAX), "tp_degree"),
        (Box::new(|message| message.tp_rank = 1), "tp_rank"),
        (Box::new(|message| message.training_data.clear()), "training_data"),
        (Box::new(move |message| message.training_data = text("/etc/passwd")), "training_data[0].path"),
        (Box::new(move |message| message.training_data = text("")), "training_data[0].path"),
        (
            Box::new(move |message| message.training_data = text(&link.display().to_string())),
            "training_data[0].path",
        ),
        (Box::new(|message| message.training_data[0].format = 99), "training_data[0].format"),
        (Box::new(|message| message.evaluation = Some(pb::EvaluationSpec::default())), "evaluation.sources"),
        (
            Box::new(move |message| {
                message.evaluation =
                    Some(pb::EvaluationSpec { sources: vec![source("no.txt")], ..Default::default() });
            }),
            "evaluation.sources[0].path",
        ),
        (Box::new(|message| message.tasks = Some(pb::TaskSpec::default())), "tasks.files"),
        (Box::new(|message| message.tasks = Some(tasks(&["/etc/passwd"]))), "tasks.files[0]"),
        (Box::new(|message| message.tasks = Some(tasks(&[&task_file("contexts"), ""]))), "tasks.files[1]"),
        (
            Box::new(|message| {
                let spec = tasks(&[&task_file("contexts")]);
                message.tasks = Some(pb::TaskSpec { pass_tokens: Some(0), ..spec });
            }),
            "tasks.pass_tokens",
        ),
        (
            Box::new(move |message| {
                message.recipe = Some(pb::Recipe { recompute: Some(0), ..recipe() });
            }),
            "recipe.recompute",
        ),
        (
            Box::new(|message| {
                let pruning = pb::Pruning { shape: Some(77), ..Default::default() };
                message.recipe.as_mut().unwrap().pruning = Some(pruning);
            }),
            "recipe.pruning.shape",
        ),
        (
            Box::new(|message| {
                let budget = Some(pb::pruning::Budget::Sparsity(1.0));
                message.recipe.as_mut().unwrap().pruning = Some(pb::Pruning { budget, ..Default::default() });
            }),
            "recipe.pruning.sparsity",
        ),
    ];
    for (change, field) in cases {
        let mut message = load_request();
        change(&mut message);
        let status = worker.client.load(request(message)).await.unwrap_err();
        assert_refused(&status, Code::InvalidArgument, Reason::InvalidFields);
        assert_eq!(fields(&status), [field]);
    }
    let status = worker.client.load(request(pb::LoadRequest::default())).await.unwrap_err();
    let all = fields(&status);
    for field in ["session_id", "model", "tp_degree", "training_data"] {
        assert!(all.iter().any(|named| named == field), "{field} in {all:?}");
    }
    assert_eq!(worker.describe().await.session_id, "");
}

#[tokio::test]
async fn a_bad_request_leaves_the_session_alone_and_bad_files_end_it() {
    let mut worker = start(toy()).await;
    worker.load().await;
    let refused = pb::LoadRequest { tp_degree: 0, ..load_request() };
    worker.client.load(request(refused)).await.unwrap_err();
    assert_eq!(worker.describe().await.session_id, SESSION);

    let folder = worker.scratch.join("broken");
    std::fs::create_dir(&folder).unwrap();
    for (config, data, part) in [
        (None, "tiny.txt", "config.json"),
        (Some("{"), "tiny.txt", "config.json"),
        (Some("{\"model_type\": \"bert\"}"), "tiny.txt", "bert"),
    ] {
        if let Some(config) = config {
            std::fs::write(folder.join("config.json"), config).unwrap();
        }
        let message = pb::LoadRequest {
            model: folder.display().to_string(),
            training_data: vec![source(data)],
            ..load_request()
        };
        let status = worker.client.load(request(message)).await.unwrap_err();
        assert_refused(&status, Code::FailedPrecondition, Reason::BadFile);
        assert!(status.message().contains(part), "{part}: {status:?}");
        assert_eq!(worker.describe().await.session_id, "");
    }
    let empty = worker.scratch.join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let message = pb::LoadRequest {
        training_data: vec![pb::TextSource { path: empty.display().to_string(), ..Default::default() }],
        ..load_request()
    };
    let status = worker.client.load(request(message)).await.unwrap_err();
    assert_refused(&status, Code::FailedPrecondition, Reason::BadFile);
    let too_many = pb::LoadRequest { tp_degree: 99, ..load_request() };
    let status = worker.client.load(request(too_many)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    let gone = worker.train(0, 1, 0).await.unwrap_err();
    assert_refused(&gone, Code::FailedPrecondition, Reason::SessionFailed);
}

#[tokio::test]
async fn stories_need_a_token_that_begins_a_text() {
    let mut worker = start(toy()).await;
    let mut message = load_request();
    message.evaluation.as_mut().unwrap().mode = Some(pb::EvaluationMode::Stories.into());
    let status = worker.client.load(request(message)).await.unwrap_err();
    assert_eq!(fields(&status), ["evaluation.mode"]);
}

#[tokio::test]
async fn steps_come_in_order_and_under_the_mask_in_force() {
    let mut worker = start(toy()).await;
    worker.load().await;
    for (first, end, generation, code, expected) in [
        (1, 2, 0, Code::FailedPrecondition, Reason::WrongStep),
        (0, 1, 1, Code::FailedPrecondition, Reason::SkippedGeneration),
        (0, 0, 0, Code::InvalidArgument, Reason::InvalidFields),
        (0, 13, 0, Code::InvalidArgument, Reason::InvalidFields),
    ] {
        let status = worker.train(first, end, generation).await.unwrap_err();
        assert_refused(&status, code, expected);
        assert_eq!(worker.describe().await.next_step, 0);
    }
    worker.train(0, 2, 0).await.unwrap();
    let status = worker.train(0, 2, 0).await.unwrap_err();
    assert_refused(&status, Code::FailedPrecondition, Reason::WrongStep);
    let smaller = worker.smaller_mask();
    worker.apply_mask(1, &smaller).await.unwrap();
    let status = worker.train(2, 3, 0).await.unwrap_err();
    assert_refused(&status, Code::FailedPrecondition, Reason::StaleGeneration);
    worker.train(2, 3, 1).await.unwrap();
}

#[tokio::test]
async fn a_mask_is_applied_once_in_order_and_never_grows_back() {
    let mut worker = start(toy()).await;
    worker.load().await;
    let (full, smaller) = (KeepMask::full(&worker.spec), worker.smaller_mask());
    let skipped = worker.apply_mask(2, &smaller).await.unwrap_err();
    assert_refused(&skipped, Code::FailedPrecondition, Reason::SkippedGeneration);
    let applied = worker.apply_mask(1, &smaller).await.unwrap();
    assert_eq!(worker.apply_mask(1, &smaller).await.unwrap(), applied, "the same answer again");
    let other = worker.apply_mask(1, &full).await.unwrap_err();
    assert_refused(&other, Code::InvalidArgument, Reason::InvalidFields);
    let stale = worker.apply_mask(0, &full).await.unwrap_err();
    assert_refused(&stale, Code::FailedPrecondition, Reason::StaleGeneration);
    let grown = worker.apply_mask(2, &full).await.unwrap_err();
    assert_refused(&grown, Code::InvalidArgument, Reason::InvalidFields);
    let mut short = smaller.clone();
    short.layers.pop();
    let mut orphan = smaller.clone();
    orphan.layers[0].kv_heads.remove(0);
    for unfit in [short, orphan] {
        let status = worker.apply_mask(2, &unfit).await.unwrap_err();
        assert_refused(&status, Code::InvalidArgument, Reason::InvalidFields);
    }
    assert_eq!(worker.describe().await.generation, 1);
    worker.apply_mask(2, &smaller).await.unwrap();
    assert_eq!(worker.describe().await.generation, 2);
}

#[tokio::test]
async fn a_session_that_does_not_prune_refuses_a_mask() {
    let mut worker = start(toy()).await;
    let mut message = load_request();
    message.recipe.as_mut().unwrap().pruning = None;
    worker.client.load(request(message)).await.unwrap();
    let smaller = worker.smaller_mask();
    let status = worker.apply_mask(1, &smaller).await.unwrap_err();
    assert_refused(&status, Code::FailedPrecondition, Reason::Refused);
    let trained = worker.train(0, 1, 0).await.unwrap();
    assert!(trained.chunks.is_empty());
}

#[tokio::test]
async fn ranks_must_form_their_group_first() {
    let mut worker = start(toy()).await;
    let second = pb::LoadRequest { tp_rank: 1, tp_degree: 2, ..load_request() };
    worker.client.load(request(second)).await.unwrap();
    let early = worker.train(0, 1, 0).await.unwrap_err();
    assert_refused(&early, Code::FailedPrecondition, Reason::GroupNotFormed);
    let session_id = || SESSION.to_owned();
    let gloo: i32 = pb::CollectiveBackend::Gloo.into();
    let not_first = worker
        .client
        .open_rendezvous(request(pb::OpenRendezvousRequest { session_id: session_id(), backend: gloo }))
        .await
        .unwrap_err();
    assert_refused(&not_first, Code::FailedPrecondition, Reason::Refused);
    for backend in [0, 9] {
        let message = pb::JoinGroupRequest { session_id: session_id(), backend, rendezvous: "toy:x".into() };
        let status = worker.client.join_group(request(message)).await.unwrap_err();
        assert_eq!(fields(&status), ["backend"]);
    }
    let join = pb::JoinGroupRequest { session_id: session_id(), backend: gloo, rendezvous: "toy:x".into() };
    worker.client.join_group(request(join.clone())).await.unwrap();
    let twice = worker.client.join_group(request(join)).await.unwrap_err();
    assert_refused(&twice, Code::FailedPrecondition, Reason::Refused);
    let trained = worker.train(0, 1, 0).await.unwrap();
    assert_eq!(trained.reports.len(), 1);
}

#[tokio::test]
async fn rank_0_opens_the_rendezvous_at_its_data_host() {
    let mut worker = start(toy()).await;
    let first = pb::LoadRequest { tp_degree: 2, ..load_request() };
    worker.client.load(request(first)).await.unwrap();
    let message =
        pb::OpenRendezvousRequest { session_id: SESSION.into(), backend: pb::CollectiveBackend::Gloo.into() };
    let opened = worker.client.open_rendezvous(request(message)).await.unwrap().into_inner();
    assert_eq!(&opened.rendezvous[..], b"toy:127.0.0.1");
}

#[tokio::test]
async fn a_session_without_held_out_text_measures_nothing() {
    let mut worker = start(toy()).await;
    worker.client.load(request(pb::LoadRequest { evaluation: None, ..load_request() })).await.unwrap();
    let status = worker
        .client
        .evaluate(request(pb::EvaluateRequest { session_id: SESSION.into(), window_index: 0 }))
        .await
        .unwrap_err();
    assert_refused(&status, Code::FailedPrecondition, Reason::Refused);
}

#[tokio::test]
async fn checkpoints_and_exports_stay_below_the_roots() {
    let mut worker = start(toy()).await;
    worker.load().await;
    for url in
        ["", "relative", "/tmp", "file:///etc/espalier", "file:///", "file:///tmp/../etc", "s3://bucket/x"]
    {
        let status = checkpoint(&mut worker.client, SESSION, url).await.unwrap_err();
        assert_eq!(fields(&status), ["url"], "{url:?}");
    }
    let good = good_export(&mut worker).await;
    type Change = fn(&mut pb::ExportRequest);
    let cases: [(Change, &str); 9] = [
        (|message| message.model = "/etc".into(), "model"),
        (|message| message.checkpoint = "file:///etc".into(), "checkpoint"),
        (|message| message.shards.clear(), "shards"),
        (|message| message.shards[0].file = "../rank-0.safetensors".into(), "shards[0].file"),
        (|message| message.shards[0].sha256 = "beef".into(), "shards[0].sha256"),
        (|message| message.keep_mask = None, "keep_mask.layers"),
        (|message| message.export.as_mut().unwrap().path = "/etc/out".into(), "export.path"),
        (|message| message.export = None, "export.path"),
        (|message| message.export.as_mut().unwrap().dtype = Some(0), "export.dtype"),
    ];
    for (change, field) in cases {
        let mut message = good.clone();
        change(&mut message);
        let status = worker.client.export(request(message)).await.unwrap_err();
        assert_eq!(fields(&status), [field]);
    }
    let mut other_mask = good.clone();
    other_mask.keep_mask.as_mut().unwrap().layers.pop();
    let status = worker.client.export(request(other_mask)).await.unwrap_err();
    assert_eq!(fields(&status), ["keep_mask.layers"]);
    let mut tampered = good.clone();
    tampered.shards[0].sha256 = "0".repeat(64);
    let status = worker.client.export(request(tampered)).await.unwrap_err();
    assert_refused(&status, Code::FailedPrecondition, Reason::BadFile);
    assert!(!worker.scratch.join("out").exists());
    worker.client.export(request(good)).await.unwrap();
}

async fn good_export(worker: &mut Harness) -> pb::ExportRequest {
    let folder = format!("file://{}", worker.scratch.join("checkpoint").display());
    let written = checkpoint(&mut worker.client, SESSION, &folder).await.unwrap();
    pb::ExportRequest {
        model: fixtures().join("models/gqa").display().to_string(),
        recipe: load_request().recipe,
        checkpoint: folder,
        shards: vec![written],
        keep_mask: Some(mask::to_pb(&KeepMask::full(&worker.spec))),
        export: Some(pb::ExportSpec {
            path: worker.scratch.join("out").display().to_string(),
            dtype: None,
            max_shard_bytes: None,
        }),
        run_id: "run-1".into(),
        replace: false,
    }
}
