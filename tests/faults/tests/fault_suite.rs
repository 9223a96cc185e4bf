//! Seeds of the fault suite. `FAULT_SEEDS=100..300` or `FAULT_SEEDS=7,11` plays others than the fixed ones, `FAULT_JOBS=1`
//! one at a time.

use fault_tests::{Failure, Figures, Script, play, undisturbed};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const FIXED: std::ops::Range<u64> = 0..26;
const JOBS: usize = 2;

/// # Panics
/// On a list that cannot be read.
fn seeds() -> Vec<u64> {
    let Ok(text) = std::env::var("FAULT_SEEDS") else { return FIXED.collect() };
    let number = |text: &str| {
        text.trim().parse::<u64>().unwrap_or_else(|error| panic!("FAULT_SEEDS `{text}`: {error}"))
    };
    text.split(',')
        .flat_map(|part| match part.split_once("..") {
            Some((first, end)) => number(first)..number(end),
            None => number(part)..number(part) + 1,
        })
        .collect()
}

#[test]
fn a_run_ends_as_if_nothing_had_happened_whatever_breaks_on_its_way() {
    // What a full disk does to a process is to fail its writes, not to kill it.
    // SAFETY: no handler is installed; children inherit that the signal is ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let jobs = std::env::var("FAULT_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(JOBS);
    let seeds = seeds();
    let count = seeds.len();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let started = Instant::now();
    let reference = runtime.block_on(undisturbed()).unwrap_or_else(|failure| panic!("{failure}"));
    let reference = Arc::new(reference);
    let waiting = Arc::new(Mutex::new(VecDeque::from(seeds)));
    let figures = Arc::new(Mutex::new(Figures::default()));
    let failures = Arc::new(Mutex::new(Vec::<Box<Failure>>::new()));
    let playing: Vec<_> = (0..jobs)
        .map(|_| {
            let (reference, waiting) = (reference.clone(), waiting.clone());
            let (figures, failures) = (figures.clone(), failures.clone());
            runtime.spawn(async move {
                loop {
                    let Some(seed) = waiting.lock().unwrap().pop_front() else { return };
                    let script = Script::of(seed);
                    match play(&script, &reference).await {
                        Ok(report) => {
                            let seconds = report.took.as_secs_f64();
                            println!(
                                "{script}  {} events, {} restarts, {seconds:.1} s",
                                report.events,
                                report.restarts.len()
                            );
                            report.add_to(&mut figures.lock().unwrap());
                        }
                        Err(failure) => {
                            println!("FAILED\n{failure}");
                            failures.lock().unwrap().push(failure);
                        }
                    }
                }
            })
        })
        .collect();
    for playing in playing {
        runtime.block_on(playing).unwrap();
    }
    println!("{count} seeds in {:.0} s\n\n{}", started.elapsed().as_secs_f64(), figures.lock().unwrap());
    let failures = failures.lock().unwrap();
    assert!(
        failures.is_empty(),
        "{} of {count} seeds failed:\n{}",
        failures.len(),
        failures.iter().map(ToString::to_string).collect::<String>()
    );
}

/// What the defaults promise: a rank that answers and gets no further is named within 10 s, and the run goes on.
#[test]
fn a_stuck_rank_is_named_within_ten_seconds_by_default() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let reference = runtime.block_on(undisturbed()).unwrap_or_else(|failure| panic!("{failure}"));
    let played = runtime.block_on(play(&Script::stuck_by_default(), &reference));
    let report = played.unwrap_or_else(|failure| panic!("{failure}"));
    let detected = report.detected().unwrap_or_else(|| panic!("it was not noticed: {report:?}"));
    println!("named after {:.1} s: {:?}", detected.as_secs_f64(), report.restarts);
    assert!(detected < Duration::from_secs(10), "{detected:?}");
    // Held in the midst of a collective it looks like the rank that waits for it there.
    let named = |cause: &String| cause.contains("`w1`") || cause.contains("all ranks have begun");
    assert!(report.restarts.first().is_some_and(named), "{:?}", report.restarts);
}
