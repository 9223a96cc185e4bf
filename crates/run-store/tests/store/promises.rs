use crate::backends::Backend;
use run_store::{
    AuditEntry, Created, NewRun, RunStore, StoreError, StoreOptions, StoredCheckpoint, StoredDecision,
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Every promise over both back ends.
macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        mod on_sqlite {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(Backend::sqlite()).await; })*
        }
        mod on_postgres {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() {
                super::$name(Backend::postgres(stringify!($name))).await;
            })*
        }
    };
}

promises!(
    what_was_stored_is_there_after_another_opening,
    a_request_makes_one_run_however_often_it_is_repeated,
    a_creation_may_be_repeated_but_its_id_is_never_given_to_another,
    events_have_no_gap_and_an_append_may_be_repeated,
    a_decision_and_a_checkpoint_come_with_their_events_or_not_at_all,
    a_deleted_run_leaves_nothing,
    whoever_opens_it_last_has_it,
    creations_at_once_get_numbers_of_their_own,
    the_audit_is_kept_newest_first,
);

fn new_run(id: &str, request_id: Option<&str>) -> NewRun {
    NewRun {
        id: id.to_owned(),
        request_id: request_id.map(str::to_owned),
        request_digest: b"digest".to_vec(),
        create_time: UNIX_EPOCH + Duration::from_millis(1_234_567),
        record: format!("record of {id}").into_bytes(),
        events: vec![b"one".to_vec()],
        decisions: Vec::new(),
    }
}

fn payloads(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

async fn texts(store: &RunStore, run: &str, after: u64) -> Vec<(u64, String)> {
    let events = store.events(run, after, 100).await.unwrap();
    events.into_iter().map(|event| (event.revision, String::from_utf8(event.payload).unwrap())).collect()
}

async fn what_was_stored_is_there_after_another_opening(backend: Backend) {
    let store = backend.open().await;
    assert_eq!(store.create_run(&new_run("r1", None)).await.unwrap(), Created::New { number: 1 });
    store.append("r1", 2, &payloads(&["two", "three"]), None, None).await.unwrap();
    drop(store);
    let store = backend.open().await;
    let runs = store.runs().await.unwrap();
    assert_eq!(runs.len(), 1);
    assert_eq!((runs[0].number, runs[0].id.as_str()), (1, "r1"));
    assert_eq!(runs[0].record, b"record of r1");
    assert_eq!(runs[0].create_time, UNIX_EPOCH + Duration::from_millis(1_234_567));
    let expected = [(1, "one"), (2, "two"), (3, "three")].map(|(revision, text)| (revision, text.to_owned()));
    assert_eq!(texts(&store, "r1", 0).await, expected);
    assert_eq!(texts(&store, "r1", 2).await, expected[2..]);
    assert_eq!(store.events("r1", 0, 2).await.unwrap().len(), 2);
}

async fn a_request_makes_one_run_however_often_it_is_repeated(backend: Backend) {
    let store = backend.open().await;
    store.create_run(&new_run("r1", Some("q"))).await.unwrap();
    let again = store.create_run(&new_run("r2", Some("q"))).await.unwrap();
    assert_eq!(again, Created::Repeated { id: "r1".into(), same_request: true });
    let other = NewRun { request_digest: b"other".to_vec(), ..new_run("r3", Some("q")) };
    let store = backend.open().await;
    let refused = store.create_run(&other).await.unwrap();
    assert_eq!(refused, Created::Repeated { id: "r1".into(), same_request: false });
    assert_eq!(store.runs().await.unwrap().len(), 1);
}

async fn a_creation_may_be_repeated_but_its_id_is_never_given_to_another(backend: Backend) {
    let store = backend.open().await;
    for request in [None, Some("q")] {
        let new = new_run(request.unwrap_or("r1"), request);
        let first = store.create_run(&new).await.unwrap();
        // The answer was lost, and the caller asks again.
        assert_eq!(store.create_run(&new).await.unwrap(), first);
        let other = NewRun { record: b"other".to_vec(), ..new };
        let error = store.create_run(&other).await.unwrap_err();
        assert!(matches!(error, StoreError::RunExists { .. }) && !error.may_pass(), "{error}");
    }
    assert_eq!(store.runs().await.unwrap().len(), 2);
    assert_eq!(texts(&store, "r1", 0).await.len(), 1);
}

async fn events_have_no_gap_and_an_append_may_be_repeated(backend: Backend) {
    let store = backend.open().await;
    store.create_run(&new_run("r1", None)).await.unwrap();
    store.append("r1", 2, &payloads(&["two", "three"]), None, None).await.unwrap();
    // The answer was lost, and the caller asks again.
    store.append("r1", 2, &payloads(&["two", "three"]), None, None).await.unwrap();
    for (first, events) in
        [(2, &["two", "other"][..]), (2, &["two"]), (3, &["x"]), (5, &["five"]), (1, &["one"])]
    {
        let error = store.append("r1", first, &payloads(events), None, None).await.unwrap_err();
        assert!(matches!(error, StoreError::Revision { actual: 3, .. }), "{first} {events:?}: {error}");
    }
    let error = store.append("nobody", 1, &payloads(&["one"]), None, None).await.unwrap_err();
    assert!(matches!(error, StoreError::NoRun { .. }));
    assert_eq!(texts(&store, "r1", 0).await.len(), 3);
}

async fn a_decision_and_a_checkpoint_come_with_their_events_or_not_at_all(backend: Backend) {
    let store = backend.open().await;
    store.create_run(&new_run("r1", None)).await.unwrap();
    let big = vec![7; 3 << 20];
    let decision = StoredDecision {
        generation: 1,
        revision: 2,
        payload: b"mask".to_vec(),
        importance: Some(big.clone()),
    };
    let checkpoint = |name: &str, steps_done| StoredCheckpoint {
        name: name.into(),
        steps_done,
        generation: 1,
        payload: b"place".to_vec(),
    };
    store.append("r1", 2, &payloads(&["decided"]), Some(&decision), None).await.unwrap();
    store.append("r1", 3, &payloads(&["saved"]), None, Some(&checkpoint("b", 20))).await.unwrap();
    store.append("r1", 4, &payloads(&["saved"]), None, Some(&checkpoint("a", 30))).await.unwrap();
    // The same generation again: neither the event nor the decision is stored.
    assert!(store.append("r1", 5, &payloads(&["again"]), Some(&decision), None).await.is_err());
    assert_eq!(texts(&store, "r1", 4).await, []);
    let bare = StoredDecision { importance: None, ..decision.clone() };
    assert_eq!(store.decision("r1", 1).await.unwrap(), Some(bare));
    assert_eq!(store.importance("r1", 1).await.unwrap(), Some(big));
    assert_eq!(store.decision("r1", 2).await.unwrap(), None);
    assert_eq!(store.importance("r1", 2).await.unwrap(), None);
    let names = |checkpoints: Vec<StoredCheckpoint>| -> Vec<String> {
        checkpoints.into_iter().map(|checkpoint| checkpoint.name).collect()
    };
    assert_eq!(names(store.checkpoints("r1").await.unwrap()), ["b", "a"]);
    store.remove_checkpoint("r1", "b").await.unwrap();
    assert_eq!(names(store.checkpoints("r1").await.unwrap()), ["a"]);
}

async fn a_deleted_run_leaves_nothing(backend: Backend) {
    let store = backend.open().await;
    let decisions = vec![StoredDecision { generation: 1, revision: 1, payload: vec![1], importance: None }];
    store.create_run(&NewRun { decisions, ..new_run("r1", Some("q")) }).await.unwrap();
    store.create_run(&new_run("r2", None)).await.unwrap();
    store.delete_run("r1").await.unwrap();
    assert!(matches!(store.delete_run("r1").await, Err(StoreError::NoRun { .. })));
    assert_eq!(texts(&store, "r1", 0).await, []);
    assert_eq!(store.decision("r1", 1).await.unwrap(), None);
    assert_eq!(store.runs().await.unwrap().len(), 1);
    // Its request id is free again, and numbers are not given out twice to runs that are there.
    assert_eq!(store.create_run(&new_run("r3", Some("q"))).await.unwrap(), Created::New { number: 3 });
}

async fn whoever_opens_it_last_has_it(backend: Backend) {
    let first = backend.open().await;
    first.create_run(&new_run("r1", None)).await.unwrap();
    let second = backend.open().await;
    let fenced = |error: StoreError| matches!(error, StoreError::Fenced);
    assert!(fenced(first.append("r1", 2, &payloads(&["two"]), None, None).await.unwrap_err()));
    assert!(fenced(first.create_run(&new_run("r2", None)).await.unwrap_err()));
    assert!(fenced(first.delete_run("r1").await.unwrap_err()));
    assert!(fenced(first.check().await.unwrap_err()));
    second.append("r1", 2, &payloads(&["two"]), None, None).await.unwrap();
    second.check().await.unwrap();
    assert_eq!(texts(&first, "r1", 0).await.len(), 2);
}

async fn creations_at_once_get_numbers_of_their_own(backend: Backend) {
    let store = backend.open().await;
    let mut all = tokio::task::JoinSet::new();
    for place in 0..24 {
        let store = store.clone();
        // Every third request comes twice.
        let request = (place % 3 == 0).then(|| format!("q{}", place / 6));
        let new = new_run(&format!("r{place}"), request.as_deref());
        all.spawn(async move { store.create_run(&new).await.unwrap() });
    }
    let mut numbers = Vec::new();
    while let Some(created) = all.join_next().await {
        match created.unwrap() {
            Created::New { number } => numbers.push(number),
            Created::Repeated { same_request, .. } => assert!(same_request),
        }
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=20).collect::<Vec<_>>());
}

async fn the_audit_is_kept_newest_first(backend: Backend) {
    let store = backend.open().await;
    let entry = |outcome: &str| AuditEntry {
        time: UNIX_EPOCH + Duration::from_secs(9),
        principal: "ann".into(),
        method: "CreateRun".into(),
        target: "r1".into(),
        outcome: outcome.into(),
    };
    store.audit(&[entry("FIRST"), entry("OK")]).await.unwrap();
    store.audit(&[entry("NOT_FOUND")]).await.unwrap();
    assert_eq!(store.audits(2).await.unwrap(), [entry("NOT_FOUND"), entry("OK")]);
    assert_eq!(store.audits(1).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_given_up_in_time() {
    // Accepts connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://me:secret@{}/runs", silent.local_addr().unwrap()).parse().unwrap();
    let started = SystemTime::now();
    let options = StoreOptions { deadline: Duration::from_millis(300) };
    let error = RunStore::open(&url, options).await.unwrap_err();
    assert!(error.may_pass(), "{error}");
    assert!(started.elapsed().unwrap() < Duration::from_secs(5));
    assert!(!format!("{error:?} {error}").contains("secret"));
}

#[tokio::test]
async fn a_store_of_a_newer_program_is_refused() {
    let backend = Backend::sqlite();
    drop(backend.open().await);
    sqlx::any::install_default_drivers();
    let address = backend.url.to_string();
    let pool = sqlx::AnyPool::connect(&address).await.unwrap();
    sqlx::query("INSERT INTO schema_version (version) VALUES (99)").execute(&pool).await.unwrap();
    pool.close().await;
    let error = RunStore::open(&backend.url, StoreOptions::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::NewerSchema { actual: 99, .. }), "{error}");
}

#[tokio::test]
async fn a_path_with_characters_of_urls_is_kept_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a b%20c?d#e.db");
    let store = RunStore::open(&run_store::StoreUrl::file(&path), StoreOptions::default()).await.unwrap();
    store.create_run(&new_run("r1", None)).await.unwrap();
    assert!(path.is_file());
}
