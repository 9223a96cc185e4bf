//! Plays a range of seeds: `SIMULATION_SEEDS=1000..2000` chooses another.

use simulation_tests::{Outcome, play, story};
use std::time::Instant;

/// What is played when nothing is chosen.
const SEEDS: std::ops::Range<u64> = 0..60;

fn chosen() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("SIMULATION_SEEDS") else { return SEEDS };
    let parsed = text.split_once("..").and_then(|(first, end)| Some(first.parse().ok()?..end.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("SIMULATION_SEEDS is `{text}`; write it as 1000..2000"))
}

#[test]
fn no_seed_breaks_a_law() {
    let started = Instant::now();
    let mut sum = Outcome::default();
    let seeds = chosen();
    let count = seeds.end.saturating_sub(seeds.start);
    for seed in seeds {
        match play(seed) {
            Ok(outcome) => {
                sum.happenings += outcome.happenings;
                sum.transitions += outcome.transitions;
                sum.misfortunes += outcome.misfortunes;
                sum.restarts += outcome.restarts;
                sum.succeeded += outcome.succeeded;
                sum.failed += outcome.failed;
                sum.cancelled += outcome.cancelled;
            }
            Err(failure) => panic!("{}", story(seed, &failure)),
        }
    }
    let took = started.elapsed().as_secs_f64();
    println!(
        "{count} seeds in {took:.1} s: {:.0} happenings and {:.0} transitions a second; {} misfortunes, {} restarts; \
         {} runs succeeded, {} failed, {} were cancelled",
        sum.happenings as f64 / took,
        sum.transitions as f64 / took,
        sum.misfortunes,
        sum.restarts,
        sum.succeeded,
        sum.failed,
        sum.cancelled
    );
}

#[test]
fn a_seed_plays_out_the_same_way_each_time() {
    for seed in [3, 7] {
        let [first, second] = [play(seed), play(seed)].map(|outcome| format!("{outcome:?}"));
        assert_eq!(first, second);
    }
}
