//! Pausing, forking, asking, fetching and deleting runs.

use cluster_tests::{Cluster, in_time, toy};
use engine::Engine;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tonic::{Code, Status};
use wire::pb;
use wire::pb::RunState;

fn slow() -> Arc<dyn Engine> {
    Arc::new(toy().with_step_time(Duration::from_millis(20)))
}

fn fast() -> Arc<dyn Engine> {
    Arc::new(toy())
}

fn at_step(step: u64) -> impl Fn(&pb::Run) -> bool {
    move |run| run.last_step.as_ref().is_some_and(|last| last.step >= step)
}

async fn pause(cluster: &Cluster, id: &str) -> Result<pb::Run, Status> {
    let request = pb::PauseRunRequest { id: id.to_owned() };
    Ok(in_time("PauseRun", cluster.runs().pause_run(request)).await?.into_inner().run.unwrap())
}

async fn resume(cluster: &Cluster, id: &str) -> Result<pb::Run, Status> {
    let request = pb::ResumeRunRequest { id: id.to_owned() };
    Ok(in_time("ResumeRun", cluster.runs().resume_run(request)).await?.into_inner().run.unwrap())
}

async fn finished(cluster: &Cluster) -> pb::Run {
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    let run = cluster.ended(&run.id).await;
    assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
    run
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_run_holds_no_worker_and_goes_on_as_if_nothing_had_been() {
    let expected = Cluster::undisturbed(1, |_| {}).await;
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &slow()).await;
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    for step in [3, 17, 30] {
        cluster.until(&run.id, "a step", at_step(step)).await;
        pause(&cluster, &run.id).await.unwrap();
        let paused = cluster.until(&run.id, "the pause", |run| run.state() == RunState::Paused).await;
        assert!(paused.worker_ids.is_empty());
        assert!(paused.status_message.contains("the last checkpoint is after"), "{}", paused.status_message);
        assert_eq!(
            pause(&cluster, &run.id).await.unwrap().state(),
            RunState::Paused,
            "pausing is idempotent"
        );
        // A pause outlives the coordinator.
        cluster.kill_coordinator();
        cluster.start_coordinator().await;
        assert_eq!(cluster.get(&run.id).await.state(), RunState::Paused);
        resume(&cluster, &run.id).await.unwrap();
    }
    let ended = cluster.ended(&run.id).await;
    assert_eq!((ended.state(), ended.restarts), (RunState::Succeeded, 0), "{}", ended.status_message);
    assert_eq!(cluster.outcome(&run.id).await, expected);
    for status in [pause(&cluster, &run.id).await.unwrap_err(), resume(&cluster, &run.id).await.unwrap_err()]
    {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_run_keeps_its_checkpoint_unless_told_to_discard() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &slow()).await;
    for discard in [false, true] {
        let run = cluster.create(cluster.durable_spec(1, "out")).await;
        cluster.until(&run.id, "a step", at_step(7)).await;
        let request = pb::CancelRunRequest { id: run.id.clone(), discard };
        in_time("CancelRun", cluster.runs().cancel_run(request)).await.unwrap();
        let ended = cluster.ended(&run.id).await;
        assert_eq!(ended.state(), RunState::Cancelled);
        let saved = ended.last_checkpoint.unwrap().steps_done;
        let last = ended.last_step.unwrap().step + 1;
        if !discard {
            assert_eq!(saved, last, "all steps are saved");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_goes_on_from_a_decision_and_one_like_its_parent_ends_like_it() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &fast()).await;
    let parent = finished(&cluster).await;
    let of_parent = cluster.outcome(&parent.id).await;
    let fork = |request: pb::ForkRunRequest| {
        let mut runs = cluster.runs();
        async move { runs.fork_run(request).await.map(|forked| forked.into_inner().run.unwrap()) }
    };
    let request = || pb::ForkRunRequest { id: parent.id.clone(), generation: 3, ..Default::default() };
    let same = fork(request()).await.unwrap();
    assert_eq!(same.forked_from.as_ref().unwrap().generation, 3);
    let same = cluster.ended(&same.id).await;
    assert_eq!(same.state(), RunState::Succeeded, "{}", same.status_message);
    let of_same = cluster.outcome(&same.id).await;
    assert_eq!(of_same.decisions, of_parent.decisions);
    let skipped = of_parent.losses.len() - of_same.losses.len();
    assert_eq!(of_same.losses, of_parent.losses[skipped..], "bit for bit from the decision on");
    // Another budget, from the same decision.
    let mut spec = same.spec.clone().unwrap();
    let pruning = |spec: &mut pb::RunSpec, sparsity| {
        let pruning = spec.recipe.as_mut().unwrap().pruning.as_mut().unwrap();
        pruning.budget = Some(pb::pruning::Budget::Sparsity(sparsity));
    };
    pruning(&mut spec, 0.7);
    let more = fork(pb::ForkRunRequest { spec: Some(spec.clone()), ..request() }).await.unwrap();
    let more = cluster.ended(&more.id).await;
    assert_eq!(more.state(), RunState::Succeeded, "{}", more.status_message);
    let of_more = cluster.outcome(&more.id).await;
    assert_eq!(of_more.decisions[..3], of_parent.decisions[..3]);
    assert_ne!(of_more.decisions[3..], of_parent.decisions[3..]);
    // And no more pruning at all.
    let held = fork(pb::ForkRunRequest { stop_pruning: true, ..request() }).await.unwrap();
    let held = cluster.ended(&held.id).await;
    assert_eq!((held.state(), held.generation), (RunState::Succeeded, 3), "{}", held.status_message);
    // What cannot be.
    pruning(&mut spec, 0.01);
    let grown = fork(pb::ForkRunRequest { spec: Some(spec.clone()), ..request() }).await.unwrap_err();
    assert_eq!(grown.code(), Code::InvalidArgument, "{grown:?}");
    spec.recipe.as_mut().unwrap().seed += 1;
    let other =
        fork(pb::ForkRunRequest { spec: Some(spec), stop_pruning: true, ..request() }).await.unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument, "{other:?}");
    let missing = fork(pb::ForkRunRequest { generation: 99, ..request() }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_quality_guard_holds_or_goes_back() {
    // The toy's perplexity rises with its sparsity alone: exp(2 + sparsity).
    let most = (2.0_f64 + 0.2).exp();
    for action in [pb::GuardAction::Hold, pb::GuardAction::Revert] {
        let mut cluster = Cluster::start().await;
        cluster.add_workers(1, &fast()).await;
        let mut spec = cluster.durable_spec(1, "out");
        spec.guard = Some(pb::QualityGuard {
            bound: Some(pb::quality_guard::Bound::MaxPerplexity(most)),
            action: action.into(),
        });
        let run = cluster.create(spec).await;
        let ended = cluster.ended(&run.id).await;
        assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
        let verdicts: Vec<pb::GuardVerdict> = cluster
            .watch(&run.id, 0)
            .await
            .into_iter()
            .filter_map(|event| match event.kind {
                Some(pb::run_event::Kind::Guard(verdict)) => Some(verdict),
                _ => None,
            })
            .collect();
        let last = verdicts.last().unwrap();
        assert_eq!(last.action(), action);
        assert!(last.perplexity > most);
        let result = ended.evaluations.last().unwrap().perplexity;
        match action {
            pb::GuardAction::Revert => {
                assert_eq!(ended.generation, last.generation - 1);
                assert!(result <= most, "{result} {most}");
            }
            pb::GuardAction::Unspecified | pb::GuardAction::Hold => {
                assert_eq!(ended.generation, last.generation);
                assert!(result > most);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_if_answers_from_stored_importance() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &fast()).await;
    let run = finished(&cluster).await;
    let ask = |request: pb::QueryWhatIfRequest| {
        let mut runs = cluster.runs();
        async move { runs.query_what_if(request).await.map(tonic::Response::into_inner) }
    };
    let question = || pb::QueryWhatIfRequest { id: run.id.clone(), ..Default::default() };
    let own = ask(question()).await.unwrap();
    assert_eq!(own.generation, run.generation);
    let plan = run.plan.as_ref().unwrap();
    assert_eq!((own.parameters, &own.layers), (plan.pruned_parameters, &plan.layers));
    let first = |sparsity| pb::QueryWhatIfRequest {
        generation: Some(1),
        budget: Some(pb::query_what_if_request::Budget::Sparsity(sparsity)),
        ..question()
    };
    let mut before = -1.0;
    for sparsity in [0.0, 0.2, 0.5, 0.8] {
        let answer = ask(first(sparsity)).await.unwrap();
        assert!(answer.importance_lost >= before, "{sparsity}");
        assert!((answer.sparsity - sparsity).abs() < 0.15, "{sparsity} {}", answer.sparsity);
        before = answer.importance_lost;
    }
    let by_bytes = pb::QueryWhatIfRequest {
        budget: Some(pb::query_what_if_request::Budget::MemoryBytes(own.weight_bytes)),
        ..question()
    };
    assert!(ask(by_bytes).await.unwrap().weight_bytes <= own.weight_bytes);
    let regrown = ask(pb::QueryWhatIfRequest {
        budget: Some(pb::query_what_if_request::Budget::Sparsity(0.01)),
        ..question()
    });
    let status = regrown.await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("ForkRun"), "{status:?}");
    let unknown = ask(pb::QueryWhatIfRequest { generation: Some(77), ..question() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn importance_is_streamed_by_decision_and_resumes_after_a_cut() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &slow()).await;
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    let (mut seen, mut decisions, mut cuts) = (0, Vec::new(), 0);
    let watching = async {
        loop {
            let request = pb::WatchImportanceRequest { id: run.id.clone(), after_revision: seen };
            let mut stream = cluster.runs().watch_importance(request).await.unwrap().into_inner();
            let mut layers = BTreeSet::new();
            loop {
                let Some(chunk) = stream.message().await.unwrap() else { return };
                assert!(chunk.revision > seen, "nothing seen comes again");
                assert!(chunk.values.iter().all(|value| value.is_finite() && *value >= 0.0));
                layers.insert((chunk.layer, chunk.block));
                if chunk.last {
                    seen = chunk.revision;
                    decisions.push((chunk.generation, layers.len()));
                    layers.clear();
                    // The client is cut off after every other decision.
                    if decisions.len() % 2 == 0 {
                        cuts += 1;
                        break;
                    }
                }
            }
        }
    };
    in_time("the importance of all decisions", watching).await;
    let ended = cluster.ended(&run.id).await;
    let layers = ended.plan.unwrap().layers.len() * 2;
    assert_eq!(decisions, (1..=ended.generation).map(|generation| (generation, layers)).collect::<Vec<_>>());
    assert!(cuts > 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exported_files_are_listed_and_fetched_from_any_byte_on() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &fast()).await;
    let run = finished(&cluster).await;
    let listed = cluster.runs().list_artifacts(pb::ListArtifactsRequest { id: run.id.clone() }).await;
    let artifacts = listed.unwrap().into_inner().artifacts;
    let names: Vec<&str> = artifacts.iter().map(|artifact| artifact.name.as_str()).collect();
    assert_eq!(names, ["config.json", "manifest.json"]);
    let fetch = |name: &str, offset| {
        let (mut runs, id, name) = (cluster.runs(), run.id.clone(), name.to_owned());
        async move {
            let request = pb::DownloadArtifactRequest { id, name, offset };
            let mut stream = runs.download_artifact(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(part) = stream.message().await? {
                assert_eq!(part.offset, offset + bytes.len() as u64);
                bytes.extend_from_slice(&part.data);
            }
            Ok::<_, Status>(bytes)
        }
    };
    for artifact in &artifacts {
        let whole = std::fs::read(format!("{}/{}", cluster.path("out"), artifact.name)).unwrap();
        for offset in [0, 1, artifact.size_bytes / 2, artifact.size_bytes] {
            assert_eq!(fetch(&artifact.name, offset).await.unwrap(), whole[offset as usize..]);
        }
        let beyond = fetch(&artifact.name, artifact.size_bytes + 1).await.unwrap_err();
        assert_eq!(beyond.code(), Code::InvalidArgument);
    }
    for name in ["", "../data/espalier.db", "/etc/passwd", "nothing"] {
        assert_eq!(fetch(name, 0).await.unwrap_err().code(), Code::NotFound, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_run_is_gone_with_its_checkpoints_and_what_it_exported_stays() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &slow()).await;
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    let delete = |id: &str| {
        let (mut runs, id) = (cluster.runs(), id.to_owned());
        async move { runs.delete_run(pb::DeleteRunRequest { id }).await }
    };
    assert_eq!(delete(&run.id).await.unwrap_err().code(), Code::FailedPrecondition);
    cluster.ended(&run.id).await;
    let folder = cluster.root.path().join("data/checkpoints").join(&run.id);
    assert!(folder.is_dir());
    delete(&run.id).await.unwrap();
    assert!(!folder.exists());
    assert!(std::path::Path::new(&cluster.path("out")).join("config.json").is_file());
    let gone = cluster.runs().get_run(pb::GetRunRequest { id: run.id.clone() }).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert_eq!(delete(&run.id).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_checkpoints_go_and_those_of_decisions_stay() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &fast()).await;
    let run = cluster.create(cluster.durable_spec(2, "out")).await;
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
    let folder = cluster.root.path().join("data/checkpoints").join(&run.id);
    let kept = || std::fs::read_dir(&folder).map_or(0, Iterator::count);
    // One for each decision, and the last two.
    let expected = ended.generation as usize..=ended.generation as usize + 2;
    in_time("old checkpoints to be removed", async {
        while !expected.contains(&kept()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_are_listed_by_filter_order_and_page() {
    let cluster = Cluster::start().await;
    for (place, name) in ["b", "a", "c", "a"].into_iter().enumerate() {
        let mut spec = cluster.spec(1, &format!("out-{place}"));
        spec.display_name = name.to_owned();
        cluster.create(spec).await;
    }
    let list = |request: pb::ListRunsRequest| {
        let mut runs = cluster.runs();
        async move { runs.list_runs(request).await.map(tonic::Response::into_inner) }
    };
    let names = |page: &pb::ListRunsResponse| -> String {
        page.runs.iter().map(|run| run.spec.as_ref().unwrap().display_name.clone()).collect()
    };
    for (filter, order_by, expected) in [
        ("", "", "acab"),
        ("display_name = \"a\"", "", "aa"),
        ("state = RUNNING", "", ""),
        ("state = QUEUED AND NOT display_name = \"b\"", "display_name", "aac"),
        ("", "display_name desc, create_time", "cbaa"),
    ] {
        let request =
            pb::ListRunsRequest { filter: filter.into(), order_by: order_by.into(), ..Default::default() };
        assert_eq!(names(&list(request.clone()).await.unwrap()), expected, "{filter} {order_by}");
        let (mut paged, mut page_token) = (String::new(), String::new());
        loop {
            let page =
                list(pb::ListRunsRequest { page_size: 1, page_token, ..request.clone() }).await.unwrap();
            paged += &names(&page);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(paged, expected, "{filter} {order_by} page by page");
    }
    for (filter, order_by) in [("colour = red", ""), ("", "colour")] {
        let request =
            pb::ListRunsRequest { filter: filter.into(), order_by: order_by.into(), ..Default::default() };
        assert_eq!(list(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
}
