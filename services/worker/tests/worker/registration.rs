//! Registering, keeping a lease, and losing it.

use crate::harness::{DEADLINE, SESSION, config, eventually, start_registry, start_with_lease, toy};
use service_kit::RootArgs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use worker::{WorkerConfig, WorkerError};

const LEASE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_worker_says_what_it_is_and_keeps_its_lease() {
    let worker = start_with_lease(toy(), LEASE).await;
    let info = worker.registry.registered.lock().unwrap()[0].clone();
    assert_eq!((info.id.as_str(), info.device.as_str(), info.threads), ("worker-a", "cpu", 1));
    assert_eq!(info.data_host, "127.0.0.1");
    assert!(!info.incarnation.is_empty() && !info.version.is_empty() && info.memory_bytes > 0);
    let registry = Arc::clone(&worker.registry);
    eventually("five renewals", || registry.renewals.load(Ordering::SeqCst) >= 5).await;
    assert_eq!(registry.registered.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_worker_whose_lease_ran_out_registers_again_without_its_session() {
    let mut worker = start_with_lease(toy(), LEASE).await;
    worker.load().await;
    worker.registry.forget.store(true, Ordering::SeqCst);
    let registry = Arc::clone(&worker.registry);
    eventually("a second registration", || registry.registered.lock().unwrap().len() == 2).await;
    assert_eq!(worker.describe().await.session_id, "");
    let incarnations: Vec<String> =
        registry.registered.lock().unwrap().iter().map(|info| info.incarnation.clone()).collect();
    assert_eq!(incarnations[0], incarnations[1], "it is the same process");
}

#[tokio::test]
async fn a_coordinator_that_disappears_costs_the_session_and_then_gets_its_worker_back() {
    let mut worker = start_with_lease(toy(), LEASE).await;
    worker.load().await;
    let registry = Arc::clone(&worker.registry);
    registry.silent.store(true, Ordering::SeqCst);
    let silent_since = Instant::now();
    while worker.describe().await.session_id == SESSION {
        assert!(silent_since.elapsed() < DEADLINE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(silent_since.elapsed() >= LEASE * 2, "three leases must pass first");
    registry.silent.store(false, Ordering::SeqCst);
    eventually("a second registration", || registry.registered.lock().unwrap().len() == 2).await;
}

async fn run(config: WorkerConfig) -> Result<(), WorkerError> {
    tokio::time::timeout(DEADLINE, worker::run(config, Arc::new(toy()), CancellationToken::new()))
        .await
        .expect("must end by itself")
}

#[tokio::test]
async fn a_coordinator_that_never_answers_ends_the_worker() {
    let folder = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{free}");
    let config = WorkerConfig { register_timeout: Duration::from_secs(1), ..config(&url, folder.path()) };
    let error = run(config).await.unwrap_err();
    assert!(wire::status::chain(&error).contains(&url), "{error:?}");
}

#[tokio::test]
async fn a_coordinator_that_refuses_ends_the_worker_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (url, _, _stop) = start_registry(LEASE, true).await;
    let started = Instant::now();
    let error = run(config(&url, folder.path())).await.unwrap_err();
    assert!(wire::status::chain(&error).contains("is taken"), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_before_anything_is_announced() {
    let folder = tempfile::tempdir().unwrap();
    let (url, registry, _stop) = start_registry(LEASE, false).await;
    let good = || config(&url, folder.path());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut in_use = good();
    in_use.listen.listen = Some(taken.local_addr().unwrap());
    let mut public = good();
    public.listen.listen = Some(([0, 0, 0, 0], 0).into());
    let mut nameless = public.clone();
    nameless.listen.insecure = true;
    for (config, part) in [
        (in_use, "in use"),
        (public, "--insecure"),
        (nameless, "--advertise"),
        (WorkerConfig { roots: RootArgs::default(), ..good() }, "--root"),
        (WorkerConfig { roots: RootArgs { roots: vec!["/no/such".into()] }, ..good() }, "/no/such"),
        (WorkerConfig { coordinator: Some("127.0.0.1:7070".into()), ..good() }, "not a URL"),
        (WorkerConfig { advertise: Some("nowhere".into()), ..good() }, "nowhere"),
    ] {
        let error = run(config).await.unwrap_err();
        assert!(wire::status::chain(&error).contains(part), "{part}: {error:?}");
    }
    assert!(registry.registered.lock().unwrap().is_empty());
}
