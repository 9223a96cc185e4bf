//! One progress bar in a terminal, a plain line every few seconds elsewhere.

use crate::output::tell;
use crate::tables::state_name;
use crate::units;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use wire::pb;

/// Steps that speed and time left are read off: few, because steps become faster while the model shrinks.
const RECENT_STEPS: usize = 12;
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows how far a run is, on standard error.
pub(crate) struct Progress {
    steps: u64,
    pace: Pace,
    output: Output,
}

enum Output {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

impl Progress {
    /// For a run of `steps` optimizer steps; 0 shows phases alone.
    #[must_use]
    pub(crate) fn new(steps: u64) -> Self {
        let output = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            bar.set_style(phase_style());
            bar.enable_steady_tick(Duration::from_millis(120));
            Output::Bar(bar)
        } else {
            Output::Lines { last: None }
        };
        Self { steps, pace: Pace::default(), output }
    }

    /// Shows what is going on between steps.
    pub(crate) fn phase(&mut self, text: &str) {
        match &mut self.output {
            Output::Bar(bar) => {
                bar.set_style(phase_style());
                bar.set_message(text.to_owned());
            }
            Output::Lines { last } => {
                tell(text);
                *last = None;
            }
        }
    }

    /// Shows an event of the run.
    pub(crate) fn event(&mut self, event: &pb::RunEvent) {
        use pb::run_event::Kind;
        match &event.kind {
            Some(Kind::StateChange(change)) => {
                let name = state_name(change.state());
                let text = if change.message.is_empty() {
                    name.to_owned()
                } else {
                    format!("{name}: {}", change.message)
                };
                self.phase(&text);
            }
            Some(Kind::Step(report)) => self.step(report),
            Some(Kind::Evaluation(evaluation)) => {
                self.note(&format!("perplexity {} {:.4}", evaluation.label, evaluation.perplexity));
            }
            Some(Kind::Task(result)) => {
                let accuracy = units::percent(result.accuracy);
                self.note(&format!("{} {} {accuracy} of {} right", result.task, result.label, result.count));
            }
            Some(Kind::Decision(decision)) => {
                if let Output::Lines { .. } = self.output {
                    tell(format!(
                        "mask {} after step {}: {} of the projection weights gone",
                        decision.generation,
                        decision.step,
                        units::percent(decision.sparsity)
                    ));
                }
            }
            Some(Kind::Restart(restart)) => {
                self.note(&format!(
                    "starts anew from step {} on {} workers: {}",
                    restart.next_step, restart.tp_degree, restart.cause
                ));
            }
            Some(Kind::Guard(verdict)) => {
                let (measured, most) = (verdict.perplexity, verdict.max_perplexity);
                self.note(&format!("quality guard: perplexity {measured:.4}, at most {most:.4}"));
            }
            Some(Kind::Calibration(done)) => {
                let duration = wire::convert::time::duration_from_pb(done.duration).unwrap_or_default();
                self.note(&format!(
                    "calibrated the decision after step {} in {}",
                    done.step,
                    units::duration(duration)
                ));
            }
            Some(Kind::Export(_) | Kind::Checkpoint(_)) | None => {}
        }
    }

    fn step(&mut self, report: &pb::StepReport) {
        let done = report.step + 1;
        self.pace.note(report);
        // What matters most comes first: a narrow terminal cuts the end off.
        let left = match self.pace.time_left(self.steps.saturating_sub(done)) {
            Some(left) => format!("{} left", units::duration(left)),
            None => "measuring the pace".to_owned(),
        };
        let text = format!(
            "{left}  loss {:.3}  sparsity {}  {} tok/s  {}",
            report.loss,
            units::percent(report.sparsity),
            units::short_count(self.pace.tokens_per_second() as u64),
            units::bytes(report.memory_bytes),
        );
        let steps = self.steps;
        match &mut self.output {
            Output::Bar(bar) => {
                bar.set_style(step_style());
                bar.set_position(done);
                bar.set_message(text);
            }
            Output::Lines { last } => {
                if done == steps || last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
                    tell(format!("step {done}/{steps}  {text}"));
                    *last = Some(Instant::now());
                }
            }
        }
    }

    /// A line that stays.
    pub(crate) fn note(&self, text: &str) {
        match &self.output {
            Output::Bar(bar) => bar.println(text),
            Output::Lines { .. } => tell(text),
        }
    }

    /// Leaves the terminal clean.
    pub(crate) fn finish(&self) {
        match &self.output {
            Output::Bar(bar) => bar.finish_and_clear(),
            Output::Lines { .. } => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn phase_style() -> ProgressStyle {
    style("{spinner:.green} {elapsed_precise} {wide_msg}")
}

fn step_style() -> ProgressStyle {
    style("{bar:14.green/black.bright} {pos}/{len}  {wide_msg}").progress_chars("━━╌")
}

/// The templates are ours; a broken one falls back to the library's own bar.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Seconds and tokens of the last steps.
#[derive(Debug, Default)]
struct Pace(VecDeque<(f64, u64)>);

impl Pace {
    fn note(&mut self, report: &pb::StepReport) {
        let seconds =
            report.duration.as_ref().map_or(0.0, |span| span.seconds as f64 + f64::from(span.nanos) * 1e-9);
        if self.0.len() == RECENT_STEPS {
            self.0.pop_front();
        }
        self.0.push_back((seconds, report.tokens));
    }

    fn seconds_per_step(&self) -> f64 {
        let mut seconds: Vec<f64> = self.0.iter().map(|(seconds, _)| *seconds).collect();
        seconds.sort_by(f64::total_cmp);
        // The median, so that a step that decides a mask or warms up does not count double.
        seconds.get(seconds.len() / 2).copied().unwrap_or(0.0)
    }

    fn tokens_per_second(&self) -> f64 {
        let seconds: f64 = self.0.iter().map(|(seconds, _)| seconds).sum();
        let tokens: u64 = self.0.iter().map(|(_, tokens)| tokens).sum();
        if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
    }

    /// How long `steps` more steps take at the recent pace; nothing before two steps are known.
    fn time_left(&self, steps: u64) -> Option<Duration> {
        let seconds = self.seconds_per_step() * steps as f64;
        (self.0.len() >= 2).then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(seconds: i64, tokens: u64) -> pb::StepReport {
        let duration = Some(prost_types::Duration { seconds, nanos: 0 });
        pb::StepReport { duration, tokens, ..Default::default() }
    }

    #[test]
    fn the_pace_follows_the_recent_steps() {
        let mut pace = Pace::default();
        assert_eq!(pace.time_left(5), None);
        for _ in 0..50 {
            pace.note(&report(4, 100));
        }
        assert_eq!(pace.time_left(5), Some(Duration::from_secs(20)));
        for _ in 0..RECENT_STEPS {
            pace.note(&report(2, 100));
        }
        assert_eq!(pace.time_left(5), Some(Duration::from_secs(10)));
        assert_eq!(pace.tokens_per_second(), 50.0);
    }

    #[test]
    fn one_slow_step_does_not_move_the_time_left() {
        let mut pace = Pace::default();
        for seconds in [2, 2, 2, 90, 2, 2] {
            pace.note(&report(seconds, 1));
        }
        assert_eq!(pace.time_left(3), Some(Duration::from_secs(6)));
    }
}
