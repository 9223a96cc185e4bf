//! Servers of S3 that are slow, fail or are not there.

use crate::backends::{Backend, SECRET, limits, server};
use crate::promises::{bytes, hex};
use crate::proxy::{Fate, Proxy};
use blob_store::{BlobError, Limits};
use std::error::Error;
use std::time::{Duration, Instant};

/// An error with all its causes.
fn chain(error: &BlobError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_for_a_while_is_asked_again() {
    let backend = Backend::s3("fails_for_a_while");
    let proxy =
        Proxy::start(server(), |_, before| if before % 3 < 2 { Fate::Fails } else { Fate::Passes }).await;
    let store = backend.open_through(proxy.address, limits());
    store.put_bytes("r/x", b"content".to_vec()).await.unwrap();
    assert_eq!(proxy.asked(), 3);
    assert_eq!(store.get_bytes("r/x", 10).await.unwrap(), b"content");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_keeps_failing_is_reported_after_the_retries() {
    let backend = Backend::s3("keeps_failing");
    let proxy = Proxy::start(server(), |_, _| Fate::Fails).await;
    let store = backend.open_through(proxy.address, Limits { retries: 2, ..limits() });
    let error = store.put_bytes("r/x", b"content".to_vec()).await.unwrap_err();
    assert!(matches!(&error, BlobError::Failed { .. }) && !error.is_damage(), "{error:?}");
    assert_eq!(proxy.asked(), 3);
    let said = chain(&error);
    assert!(said.contains("s3://keeps-failing/some/prefix") && said.contains("503"), "{said}");
    assert!(!format!("{said} {error:?} {store:?}").contains(SECRET));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_is_given_up_in_time() {
    let backend = Backend::s3("never_answers");
    let proxy = Proxy::start(server(), |_, _| Fate::Waits).await;
    let short = Limits { call: Duration::from_millis(500), transfer: Duration::from_secs(2), retries: 9 };
    let store = backend.open_through(proxy.address, short);
    let here = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let errors = [
        store.put_bytes("r/x", b"content".to_vec()).await.unwrap_err(),
        store.put_bytes("r/x", bytes(9 << 20)).await.unwrap_err(),
        store.get_bytes("r/x", 10).await.unwrap_err(),
        store.size("r/x").await.unwrap_err(),
        store.list("r").await.unwrap_err(),
        store.delete_folder("r").await.unwrap_err(),
        store.fetch_file("r/x", &here.path().join("x"), None).await.unwrap_err(),
    ];
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    for error in errors {
        let in_time = matches!(&error, BlobError::Deadline { .. } | BlobError::Failed { .. });
        assert!(in_time && !error.is_damage(), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_is_an_error() {
    let backend = Backend::s3("not_there");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let store = backend.open_through(nobody, Limits { retries: 1, ..limits() });
    let error = store.get_bytes("r/x", 10).await.unwrap_err();
    assert!(matches!(&error, BlobError::Failed { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_fails_half_way_leaves_nothing() {
    let backend = Backend::s3("fails_half_way");
    let second = |line: &str, _| if line.contains("partNumber=2") { Fate::Fails } else { Fate::Passes };
    let proxy = Proxy::start(server(), second).await;
    let store = backend.open_through(proxy.address, Limits { retries: 1, ..limits() });
    let error = store.put_bytes("r/x", bytes(20 << 20)).await.unwrap_err();
    assert!(matches!(&error, BlobError::Failed { .. }), "{error:?}");
    assert_eq!(store.list("r").await.unwrap(), Vec::<String>::new());
    assert!(!backend.has_leftovers());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_may_take_longer_than_a_call() {
    let backend = Backend::s3("takes_longer");
    let content = bytes(34 << 20);
    backend.open().put_bytes("r/x", content.clone()).await.unwrap();
    // A part takes 2 s, the whole in one request would take more than 8.
    let proxy = Proxy::start(server(), |_, _| Fate::Trickles(4 << 20)).await;
    let patient = Limits { call: Duration::from_secs(7), ..limits() };
    let store = backend.open_through(proxy.address, patient);
    let here = tempfile::tempdir().unwrap();
    store.fetch_file("r/x", &here.path().join("x"), Some(&hex(&content))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_as_a_whole_has_a_deadline() {
    let backend = Backend::s3("has_a_deadline");
    backend.open().put_bytes("r/x", bytes(20 << 20)).await.unwrap();
    let proxy = Proxy::start(server(), |_, _| Fate::Trickles(1 << 20)).await;
    let store = backend.open_through(proxy.address, Limits { transfer: Duration::from_secs(1), ..limits() });
    let here = tempfile::tempdir().unwrap();
    for error in [
        store.fetch_file("r/x", &here.path().join("x"), None).await.unwrap_err(),
        store.get_bytes("r/x", 32 << 20).await.unwrap_err(),
    ] {
        assert!(matches!(&error, BlobError::Deadline { .. }), "{error:?}");
    }
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_asked_for_again_or_refused() {
    let backend = Backend::s3("breaks_off");
    let content = bytes(9 << 20);
    backend.open().put_bytes("r/x", content.clone()).await.unwrap();
    let here = tempfile::tempdir().unwrap();
    let to = here.path().join("x");
    let first_only = |line: &str, before| {
        if line.starts_with("GET") && before < 2 { Fate::BreaksAfter(1 << 20) } else { Fate::Passes }
    };
    let proxy = Proxy::start(server(), first_only).await;
    let store = backend.open_through(proxy.address, limits());
    store.fetch_file("r/x", &to, Some(&hex(&content))).await.unwrap();
    std::fs::remove_file(&to).unwrap();
    let always = |line: &str, _| {
        if line.starts_with("GET") { Fate::BreaksAfter(1000) } else { Fate::Passes }
    };
    let proxy = Proxy::start(server(), always).await;
    let store = backend.open_through(proxy.address, Limits { retries: 1, ..limits() });
    let error = store.fetch_file("r/x", &to, None).await.unwrap_err();
    assert!(matches!(&error, BlobError::Failed { .. }), "{error:?}");
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 0);
}
