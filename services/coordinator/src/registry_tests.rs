use super::*;

const PATIENCE: Patience = Patience {
    lease: Duration::from_secs(10),
    stall: Duration::from_secs(8),
    regroup: Duration::from_secs(30),
};

fn worker(id: &str, device: &str) -> pb::WorkerInfo {
    pb::WorkerInfo { id: id.into(), device: device.into(), incarnation: "1".into(), ..Default::default() }
}

fn registry(workers: &[(&str, &str)]) -> Arc<Registry> {
    let registry = Registry::new(PATIENCE);
    for (id, device) in workers {
        registry.register(worker(id, device)).unwrap();
    }
    registry
}

fn ids(claim: &GroupClaim) -> Vec<&str> {
    claim.workers().iter().map(|worker| worker.id.as_str()).collect()
}

async fn claimed(ticket: &mut Ticket) -> GroupClaim {
    loop {
        match tokio::time::timeout(Duration::from_secs(100), ticket.next()).await.expect("a turn in time") {
            Turn::Claimed(claim) => return claim,
            Turn::Waiting(_) => {}
        }
    }
}

async fn waiting(ticket: &mut Ticket) -> Standing {
    match tokio::time::timeout(Duration::from_secs(100), ticket.next()).await.expect("news in time") {
        Turn::Waiting(standing) => standing,
        Turn::Claimed(claim) => panic!("claimed {:?}", ids(&claim)),
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_forms_wholly_or_not_at_all_and_in_turn() {
    let registry = registry(&[("b", "cpu"), ("a", "cpu")]);
    let mut first = registry.enqueue("r1", "", 3, 3);
    let mut second = registry.enqueue("r2", "", 1, 1);
    assert_eq!(waiting(&mut first).await, Standing { idle: 2, registered: 2, ahead: 0 });
    assert_eq!(waiting(&mut second).await, Standing { idle: 2, registered: 2, ahead: 1 });
    registry.register(worker("c", "cpu")).unwrap();
    let claim = claimed(&mut first).await;
    assert_eq!(ids(&claim), ["a", "b", "c"]);
    drop(first);
    assert_eq!(waiting(&mut second).await, Standing { idle: 0, registered: 3, ahead: 0 });
    claim.release_all_but_first();
    assert_eq!(ids(&claimed(&mut second).await), ["b"]);
    let runs: Vec<String> = registry.list().into_iter().map(|worker| worker.run_id).collect();
    assert_eq!(runs, ["r1", "", ""]);
    drop(claim);
    assert!(registry.list().iter().all(|worker| worker.run_id.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn a_run_that_leaves_the_queue_lets_the_next_one_on() {
    let registry = registry(&[("a", "cpu")]);
    let mut first = registry.enqueue("r1", "", 2, 2);
    let mut second = registry.enqueue("r2", "", 1, 1);
    waiting(&mut first).await;
    waiting(&mut second).await;
    drop(first);
    assert_eq!(ids(&claimed(&mut second).await), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn a_group_is_of_one_kind_of_device_and_gpus_go_first() {
    let registry = registry(&[("a", "cpu"), ("b", "cuda:1"), ("c", "cpu"), ("d", "cuda:0")]);
    assert!(matches!(registry.enqueue("r", "", 3, 3).next().await, Turn::Waiting(_)));
    let gpus = claimed(&mut registry.enqueue("r1", "", 2, 2)).await;
    assert_eq!(ids(&gpus), ["b", "d"]);
    let cpus = claimed(&mut registry.enqueue("r2", "", 2, 2)).await;
    assert_eq!(ids(&cpus), ["a", "c"]);
    assert!(registry.claim_one("r3", "").is_none());
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_runs_out_ends_the_worker_and_tells_its_run() {
    let registry = Registry::new(PATIENCE);
    let stop = CancellationToken::new();
    let keeper = tokio::spawn(registry.clone().keep_leases(stop.clone()));
    let lost_lease = registry.register(worker("a", "cpu")).unwrap().lease_id;
    let kept_lease = registry.register(worker("b", "cpu")).unwrap().lease_id;
    let mut claim = claimed(&mut registry.enqueue("r1", "", 2, 2)).await;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(registry.renew(&kept_lease, None, false).is_some());
    }
    let lost = tokio::time::timeout(Duration::from_secs(1), claim.next_news()).await.unwrap();
    assert_eq!(
        lost,
        ClaimNews::Lost { id: "a".into(), cause: "it has not renewed its lease for 10 s".into() }
    );
    assert!(registry.renew(&lost_lease, None, false).is_none());
    assert_eq!(registry.list().len(), 1);
    stop.cancel();
    keeper.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_restarts_loses_its_run_and_one_that_registers_again_keeps_it() {
    let registry = registry(&[("a", "cpu")]);
    let mut claim = registry.claim_one("r1", "").unwrap();
    registry.register(worker("a", "cpu")).unwrap();
    assert_eq!(registry.list()[0].run_id, "r1");
    registry.register(pb::WorkerInfo { incarnation: "2".into(), ..worker("a", "cpu") }).unwrap();
    assert_eq!(registry.list()[0].run_id, "");
    let lost = tokio::time::timeout(Duration::from_secs(1), claim.next_news()).await.unwrap();
    assert_eq!(
        lost,
        ClaimNews::Lost { id: "a".into(), cause: "it has restarted and lost its session".into() }
    );
    let again = registry.claim_one("r2", "").unwrap();
    drop(claim);
    assert_eq!(registry.list()[0].run_id, "r2", "the old claim gives back only what is still its own");
    drop(again);
}

fn progress(ticks: u64, working: bool, collectives: (u64, u64)) -> Option<pb::WorkerProgress> {
    let (collectives_entered, collectives_left) = collectives;
    Some(pb::WorkerProgress { ticks, working, collectives_entered, collectives_left })
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_answers_and_does_not_advance_is_named_and_gets_no_run_until_it_moves() {
    let registry = Registry::new(PATIENCE);
    let stop = CancellationToken::new();
    let keeper = tokio::spawn(registry.clone().keep_leases(stop.clone()));
    let stuck = registry.register(worker("a", "cpu")).unwrap().lease_id;
    let well = registry.register(worker("b", "cpu")).unwrap().lease_id;
    let mut claim = claimed(&mut registry.enqueue("r1", "", 2, 2)).await;
    for second in 0..10 {
        registry.renew(&stuck, progress(5, true, (1, 1)), false).unwrap();
        // It waits for the other, which is no fault of its own.
        registry.renew(&well, progress(9.min(second), true, (2, 1)), false).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let news = tokio::time::timeout(Duration::from_millis(10), claim.next_news()).await.unwrap();
    let ClaimNews::Lost { id, cause } = news else { panic!("{news:?}") };
    assert_eq!(id, "a");
    assert!(cause.starts_with("it answers but has made no progress for 8"), "{cause}");
    drop(claim);
    assert_eq!(registry.inner.lock().unwrap().count("").0, 1, "it still hangs");
    registry.renew(&stuck, progress(5, false, (1, 1)), false).unwrap();
    assert_eq!(registry.inner.lock().unwrap().count("").0, 2, "it waits for orders again");
    stop.cancel();
    keeper.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn of_those_that_wait_for_each_other_the_one_behind_is_named() {
    let registry = Registry::new(PATIENCE);
    let stop = CancellationToken::new();
    let keeper = tokio::spawn(registry.clone().keep_leases(stop.clone()));
    let ahead = registry.register(worker("a", "cpu")).unwrap().lease_id;
    let behind = registry.register(worker("b", "cpu")).unwrap().lease_id;
    let mut claim = claimed(&mut registry.enqueue("r1", "", 2, 2)).await;
    for _ in 0..10 {
        registry.renew(&ahead, progress(5, true, (8, 7)), false).unwrap();
        registry.renew(&behind, progress(5, true, (7, 6)), false).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let news = tokio::time::timeout(Duration::from_millis(10), claim.next_news()).await.unwrap();
    assert!(matches!(&news, ClaimNews::Lost { id, .. } if id == "b"), "{news:?}");
    stop.cancel();
    keeper.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_worker_may_pause_as_long_as_it_is_used_to() {
    let registry = Registry::new(PATIENCE);
    let stop = CancellationToken::new();
    let keeper = tokio::spawn(registry.clone().keep_leases(stop.clone()));
    let lease = registry.register(worker("a", "cpu")).unwrap().lease_id;
    let mut claim = registry.claim_one("r1", "").unwrap();
    // It advances every seven seconds, then pauses for twenty.
    for second in 0..40_u64 {
        registry.renew(&lease, progress(second.min(21) / 7, true, (0, 0)), false).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(tokio::time::timeout(Duration::from_millis(10), claim.next_news()).await.is_err());
    stop.cancel();
    keeper.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_draining_worker_is_given_back_and_not_taken_again() {
    let registry = registry(&[("a", "cpu"), ("b", "cpu")]);
    let mut claim = registry.claim_one("r1", "").unwrap();
    assert!(registry.drain("a").unwrap().draining);
    assert!(registry.drain("a").is_some() && registry.drain("nobody").is_none());
    let news = tokio::time::timeout(Duration::from_secs(1), claim.next_news()).await.unwrap();
    assert_eq!(news, ClaimNews::Draining { id: "a".into() });
    drop(claim);
    assert_eq!(ids(&registry.claim_one("r2", "").unwrap()), ["b"]);
    // A new process of that name is no longer drained.
    registry.register(pb::WorkerInfo { incarnation: "2".into(), ..worker("a", "cpu") }).unwrap();
    assert_eq!(ids(&registry.claim_one("r2", "").unwrap()), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_may_have_fewer_workers_takes_them_after_a_while() {
    let registry = registry(&[("a", "cpu"), ("b", "cpu")]);
    let mut ticket = registry.enqueue("r1", "", 3, 2);
    waiting(&mut ticket).await;
    let early = tokio::time::timeout(Duration::from_secs(29), ticket.next()).await;
    assert!(early.is_err(), "it waits for all at first");
    assert_eq!(ids(&claimed(&mut ticket).await), ["a", "b"]);
}
