//! What a session does from Load to Export.

use crate::harness::{SESSION, checkpoint, load_request, request, start, toy};
use model_spec::Projection;
use std::time::Duration;
use wire::convert::{mask, scores};
use wire::pb;

#[tokio::test]
async fn a_session_trains_prunes_measures_writes_and_exports() {
    let mut worker = start(toy().with_step_time(Duration::from_millis(2))).await;
    let loaded = worker.load().await;
    assert_eq!(loaded.data_sha256.len(), 64);
    assert!(loaded.window_count > 100);
    assert!(loaded.memory_bytes > 0);

    let trained = worker.train(0, 3, 0).await.unwrap();
    let steps: Vec<u64> = trained.reports.iter().map(|report| report.step).collect();
    assert_eq!(steps, [0, 1, 2]);
    let report = &trained.reports[1];
    assert_eq!((report.tokens, report.generation, report.sparsity), (32 * 2 * 2, 0, 0.0));
    assert!(report.duration.unwrap().nanos >= 2_000_000);
    assert!(report.score_duration.is_some() && report.memory_bytes > 0 && report.loss > 0.0);
    assert_eq!(trained.chunks.len(), 3 * 7 * worker.spec.layers.len());
    for chunk in trained.chunks {
        assert!(chunk.values_f64.is_empty(), "f32 compute sends f32 scores");
        let slice = scores::from_pb(chunk).unwrap();
        let widths = worker.spec.layers[slice.layer];
        let expected = match slice.projection {
            Projection::Q | Projection::O => widths.query_head_count,
            Projection::K | Projection::V => widths.kv_head_count,
            Projection::Gate | Projection::Up | Projection::Down => widths.intermediate_size,
        };
        assert_eq!((slice.first_unit, slice.values.len()), (0, expected));
    }

    let smaller = worker.smaller_mask();
    let memory_before = worker.describe().await.memory_bytes;
    let applied = worker.apply_mask(1, &smaller).await.unwrap();
    assert!(applied.memory_bytes < memory_before);
    let trained = worker.train(3, 12, 1).await.unwrap();
    assert_eq!(trained.reports.len(), 9);
    assert!(trained.reports.iter().all(|report| report.generation == 1));
    assert!((trained.reports[0].sparsity - smaller.sparsity(&worker.spec)).abs() < 1e-12);
    assert!(trained.chunks.iter().all(|chunk| chunk.generation == 1));

    let described = worker.describe().await;
    assert_eq!((described.session_id.as_str(), described.generation, described.next_step), (SESSION, 1, 12));

    let session_id = || SESSION.to_owned();
    let evaluated = worker
        .client
        .evaluate(request(pb::EvaluateRequest { session_id: session_id(), window_index: 0 }))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(evaluated.predicted_tokens % 63, 0);
    assert!(evaluated.predicted_tokens > 0 && evaluated.negative_log_likelihood > 0.0);

    let folder = format!("file://{}", worker.scratch.join("checkpoints/run-1").display());
    let written = checkpoint(&mut worker.client, SESSION, &folder).await.unwrap();
    assert_eq!(written.file, "rank-0.safetensors");
    let text = std::fs::read_to_string(worker.scratch.join("checkpoints/run-1/rank-0.safetensors")).unwrap();
    assert!(text.contains("generation 1"), "{text}");

    let out = worker.scratch.join("out").display().to_string();
    let LoadFields { model, recipe } = load_fields();
    let message = pb::ExportRequest {
        model,
        recipe,
        checkpoint: folder,
        shards: vec![written],
        keep_mask: Some(mask::to_pb(&smaller)),
        export: Some(pb::ExportSpec { path: out.clone(), dtype: None, max_shard_bytes: None }),
        run_id: "run-1".into(),
        replace: false,
    };
    let result = worker.client.export(request(message.clone())).await.unwrap().into_inner().result.unwrap();
    assert_eq!(result.path, out);
    assert_eq!(result.parameters, smaller.pruned_spec(&worker.spec).parameter_count());
    assert!(worker.scratch.join("out/config.json").is_file());

    let again = worker.client.export(request(message.clone())).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::FailedPrecondition, "the folder is not empty any more");
    let replacing = pb::ExportRequest { replace: true, ..message };
    let replaced = worker.client.export(request(replacing)).await.unwrap().into_inner().result.unwrap();
    assert_eq!(replaced, result);

    worker.client.abort(request(pb::AbortRequest { session_id: session_id() })).await.unwrap();
    assert_eq!(worker.describe().await.session_id, "");
}

struct LoadFields {
    model: String,
    recipe: Option<pb::Recipe>,
}

fn load_fields() -> LoadFields {
    let pb::LoadRequest { model, recipe, .. } = load_request();
    LoadFields { model, recipe }
}

#[tokio::test]
async fn a_run_in_f64_streams_f64_scores() {
    let mut worker = start(toy()).await;
    let mut message = load_request();
    let recipe = message.recipe.as_mut().unwrap();
    recipe.precision = Some(pb::Precision {
        compute: Some(pb::Compute::F64.into()),
        storage: Some(pb::Storage::F64.into()),
    });
    worker.client.load(request(message)).await.unwrap();
    let trained = worker.train(0, 1, 0).await.unwrap();
    assert!(trained.chunks.iter().all(|chunk| chunk.values_f32.is_empty() && !chunk.values_f64.is_empty()));
}

#[tokio::test]
async fn equal_requests_give_equal_digests_and_other_windows_another() {
    let mut worker = start(toy()).await;
    let first = worker.load().await;
    assert_eq!(worker.load().await.data_sha256, first.data_sha256);
    let mut message = load_request();
    message.recipe.as_mut().unwrap().batch.as_mut().unwrap().window_tokens = Some(48);
    let other = worker.client.load(request(message)).await.unwrap().into_inner();
    assert_ne!(other.data_sha256, first.data_sha256);
}

#[tokio::test]
async fn token_ids_need_no_tokenizer() {
    let mut worker = start(toy()).await;
    let folder = worker.scratch.join("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(crate::harness::fixtures().join("models/gqa/config.json"), folder.join("config.json"))
        .unwrap();
    let tokens = worker.scratch.join("tokens.u16");
    let ids: Vec<u8> = (0..640_u16).flat_map(|token| (token % 90).to_le_bytes()).collect();
    std::fs::write(&tokens, ids).unwrap();
    let source = pb::TextSource { path: tokens.display().to_string(), ..Default::default() };
    let message = pb::LoadRequest {
        model: folder.display().to_string(),
        training_data: vec![source],
        evaluation: None,
        ..load_request()
    };
    let loaded = worker.client.load(request(message.clone())).await.unwrap().into_inner();
    assert_eq!(loaded.window_count, 20);
    let text = pb::LoadRequest { training_data: vec![crate::harness::source("tiny.txt")], ..message };
    let status = worker.client.load(request(text)).await.unwrap_err();
    assert!(status.message().contains("tokenizer"), "{status:?}");
}

#[tokio::test]
async fn a_session_that_only_measures_needs_no_training_data() {
    let mut worker = start(toy()).await;
    let mut message = pb::LoadRequest { training_data: Vec::new(), ..load_request() };
    message.recipe = Some(pb::Recipe { steps: Some(0), ..Default::default() });
    let loaded = worker.client.load(request(message)).await.unwrap().into_inner();
    assert_eq!((loaded.data_sha256.as_str(), loaded.window_count), ("", 0));
    let evaluated = worker
        .client
        .evaluate(request(pb::EvaluateRequest { session_id: SESSION.into(), window_index: 0 }))
        .await
        .unwrap();
    assert!(evaluated.into_inner().predicted_tokens > 0);
}

#[tokio::test]
async fn a_slow_reader_holds_the_steps_back() {
    let mut worker = start(toy()).await;
    let mut message = load_request();
    message.recipe.as_mut().unwrap().steps = Some(100_000);
    worker.client.load(request(message)).await.unwrap();
    let train = worker.train_request(0, 100_000, 0);
    let stream = worker.client.train(train).await.unwrap().into_inner();
    let mut step = worker.describe().await.next_step;
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = worker.describe().await.next_step;
        if now == step {
            break;
        }
        step = now;
    }
    assert!((1..5_000).contains(&step), "{step} steps ran ahead of a reader that reads nothing");
    drop(stream);
}
