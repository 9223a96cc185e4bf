//! Processes that die while they append.

use crate::backends::Backend;
use run_store::{NewRun, RunStore, StoreOptions, StoreUrl};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// Set in the process that is to die: the store's URL.
const STORE: &str = "ESPALIER_TEST_STORE";
/// Set in the process that is to go on after a failure.
const PATIENT: &str = "ESPALIER_TEST_PATIENT";

/// How long it goes on at most.
const LONGEST: Duration = Duration::from_secs(60);

/// Appends without end and prints each revision once it is acknowledged. A test of its own does nothing.
#[tokio::test]
async fn appends_until_killed() {
    let Ok(url) = std::env::var(STORE) else { return };
    let url: StoreUrl = url.parse().unwrap();
    let store = RunStore::open(&url, StoreOptions::default()).await.unwrap();
    let known = store.events("r", 0, u32::MAX).await.unwrap().len() as u64;
    let mut revision = known + 1;
    let started = Instant::now();
    while started.elapsed() < LONGEST {
        let payload = vec![revision.to_le_bytes().repeat(50)];
        match store.append("r", revision, &payload, None, None).await {
            Ok(()) => {
                println!("acknowledged {revision}");
                revision += 1;
            }
            Err(error) => {
                println!("refused {revision}: {error}");
                if std::env::var(PATIENT).is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn created(backend: &Backend) {
    let store = backend.open().await;
    let new = NewRun {
        id: "r".into(),
        request_id: None,
        request_digest: Vec::new(),
        create_time: SystemTime::now(),
        record: Vec::new(),
        events: vec![1_u64.to_le_bytes().repeat(50)],
        decisions: Vec::new(),
    };
    store.create_run(&new).await.unwrap();
    store.close().await;
}

/// This test's own program, as the process that appends.
fn appender(backend: &Backend) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "crash::appends_until_killed", "--nocapture", "--test-threads=1"]);
    command.env(STORE, backend.url.to_string()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

async fn check_events(backend: &Backend, acknowledged: u64) {
    let store = backend.open().await;
    let events = store.events("r", 0, u32::MAX).await.unwrap();
    assert!(events.len() as u64 >= acknowledged, "{} of {acknowledged} are there", events.len());
    for (place, event) in events.iter().enumerate() {
        assert_eq!(event.revision, place as u64 + 1);
        assert_eq!(event.payload, event.revision.to_le_bytes().repeat(50));
    }
    store.close().await;
}

async fn survives_kills(backend: Backend) {
    created(&backend).await;
    let mut acknowledged = 1;
    for round in 1..=4 {
        let mut process = appender(&backend).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            if let Some((_, revision)) = line.split_once("acknowledged ") {
                acknowledged = revision.parse().unwrap();
            }
            if acknowledged >= round * 40 {
                process.kill().unwrap();
                break;
            }
        }
        process.wait().unwrap();
        assert!(acknowledged >= round * 40, "it ended by itself after {acknowledged}");
        check_events(&backend, acknowledged).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_sqlite_acknowledged_survives_a_kill() {
    survives_kills(Backend::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_acknowledged_survives_a_kill() {
    survives_kills(Backend::postgres("survives_kills")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_hangs_in_a_write_does_not_keep_the_next_one_out() {
    let backend = Backend::postgres("hangs_in_a_write");
    created(&backend).await;
    let mut process = appender(&backend).spawn().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("acknowledged 40")));
    // It is nearly always in the middle of a write.
    assert!(Command::new("kill").args(["-STOP", &process.id().to_string()]).status().unwrap().success());
    let opened = RunStore::open(&backend.url, StoreOptions { deadline: Duration::from_secs(60) }).await;
    let store = opened.unwrap();
    let next = store.events("r", 0, u32::MAX).await.unwrap().len() as u64 + 1;
    store.append("r", next, &[next.to_le_bytes().repeat(50)], None, None).await.unwrap();
    // Woken up, it finds that it has been replaced.
    assert!(Command::new("kill").args(["-CONT", &process.id().to_string()]).status().unwrap().success());
    assert!(lines.any(|line| line.contains("refused")));
    process.wait().unwrap();
    check_events(&backend, next).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_an_error_and_loses_nothing() {
    let backend = Backend::sqlite();
    created(&backend).await;
    // No file may grow past 256 KiB.
    let shell = appender(&backend);
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 256; exec \"$0\" \"$@\""]).arg(shell.get_program());
    limited.args(shell.get_args()).env(STORE, backend.url.to_string());
    let output = limited.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("refused"), "{said}");
    let last = said.lines().filter_map(|line| line.split_once("acknowledged ")).next_back();
    let acknowledged: u64 = last.map_or(1, |(_, revision)| revision.parse().unwrap());
    assert!(acknowledged > 10, "{said}");
    check_events(&backend, acknowledged).await;
    // With room again it goes on.
    let store =
        RunStore::open(&backend.url, StoreOptions { deadline: Duration::from_secs(5) }).await.unwrap();
    let next = store.events("r", 0, u32::MAX).await.unwrap().len() as u64 + 1;
    store.append("r", next, &[vec![0]], None, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_for_a_while_leaves_no_connection_unusable() {
    let backend = Backend::sqlite();
    created(&backend).await;
    let patient = appender(&backend);
    let mut ignoring = Command::new("bash");
    ignoring
        .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
        .arg(patient.get_program())
        .args(patient.get_args());
    ignoring.env(STORE, backend.url.to_string()).env(PATIENT, "1").stdout(Stdio::piped());
    let mut process = ignoring.spawn().unwrap();
    let id = process.id().to_string();
    let limit = |bytes: &str| {
        let arguments = ["--pid", &id, &format!("--fsize={bytes}:")];
        assert!(Command::new("prlimit").args(arguments).status().unwrap().success());
    };
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut acknowledged = 0;
    let mut until = |what: &str, times: usize| {
        for _ in 0..times {
            let line = lines.find(|line| line.contains(what)).unwrap();
            if let Some((_, revision)) = line.split_once("acknowledged ") {
                acknowledged = revision.parse().unwrap();
            }
        }
    };
    for _ in 0..5 {
        until("acknowledged", 20);
        limit("0");
        // More often than there are connections.
        until("refused", 10);
        limit("unlimited");
    }
    until("acknowledged", 20);
    process.kill().unwrap();
    process.wait().unwrap();
    check_events(&backend, acknowledged).await;
}
