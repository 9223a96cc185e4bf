//! What the coordinator computes between the last score and the mask, at the shapes of LLaMA-7B and LLaMA-65B.
//!
//! `run` is all of it as the coordinator does it: scores complete, normalised and averaged, mask decided, groups placed,
//! event and effect made. The others are its parts. Measured is the thread's time on its processor, which is the wall time of an
//! idle machine: nothing here waits.

use benches::{before_the_decision, decide_all, half, llama_7b, llama_65b, step_scores};
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use pruning::{KeepMask, MovingAverage, Target, combine, decide, what_if};
use recipe::{Pruning, Shape};
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

const SHAPES: [(&str, Shape); 3] =
    [("uniform", Shape::Uniform), ("paper", Shape::Paper), ("global", Shape::Global)];

fn decision(criterion: &mut Criterion<ProcessorTime>) {
    for (name, dense) in [("7b", llama_7b()), ("65b", llama_65b())] {
        let mut group = criterion.benchmark_group(format!("decision-{name}"));
        group.sample_size(20);
        let full = KeepMask::full(&dense);
        let scores = step_scores(&dense, 1).expect("a score for every unit");
        let pruning = half(Shape::Global);
        let (form, grouping) = (pruning.criterion, pruning.head_grouping);
        let step = combine(&dense, &scores, form, grouping).expect("finite scores");
        let mut average = MovingAverage::new(&dense, grouping, pruning.moving_average_decay);
        group.bench_function("combine", |bencher| bencher.iter(|| combine(&dense, &scores, form, grouping)));
        group.bench_function("average", |bencher| bencher.iter(|| average.update(&step)));
        for (shape, choice) in SHAPES {
            let target = Target::resolve(&dense, &half(choice)).expect("half can go");
            for (place, share) in [("first", 0.1), ("last", 1.0)] {
                group.bench_function(format!("decide-{shape}-{place}"), |bencher| {
                    bencher.iter_with_large_drop(|| decide(&dense, &full, &average, &target, share));
                });
            }
            group.bench_function(format!("what-if-{shape}"), |bencher| {
                bencher.iter(|| what_if(&dense, &full, &average, &half(choice)));
            });
            let (run, events) = before_the_decision(&dense, choice, 8).expect("heads divide by 8");
            group.bench_function(format!("run-{shape}"), |bencher| {
                bencher.iter_batched(
                    || (run.clone(), events.clone()),
                    |(run, events)| decide_all(run, events),
                    BatchSize::PerIteration,
                );
            });
        }
        // Channels in quanta, as `--channel-multiple 128` has them.
        let target = Target::resolve(&dense, &Pruning { channel_multiple: 128, ..half(Shape::Global) });
        let target = target.expect("half can go");
        group.bench_function("decide-global-128", |bencher| {
            bencher.iter_with_large_drop(|| decide(&dense, &full, &average, &target, 1.0));
        });
        group.finish();
    }
}

/// Time of this thread on a processor, written as wall time is.
struct ProcessorTime;

fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

impl Measurement for ProcessorTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        thread_time()
    }

    fn end(&self, start: Duration) -> Duration {
        thread_time() - start
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(ProcessorTime);
    targets = decision
}
criterion_main!(benches);
