//! What happened in a run, from its events.

use super::Removals;
use crate::proto_json;
use anyhow::Context;
use std::path::Path;
use wire::pb;

/// A run as its events tell it, and what stands beside them.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub steps: Vec<StepPoint>,
    pub decisions: Vec<pb::Decision>,
    pub evaluations: Vec<pb::Evaluation>,
    pub export: Option<pb::ExportResult>,
    /// The last state and its message.
    pub state: Option<pb::StateChange>,
    /// From the first event to the last.
    pub wall_seconds: f64,
    pub run: Option<pb::Run>,
    pub removals: Option<Removals>,
    first_time_seconds: Option<f64>,
}

/// One optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepPoint {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub seconds: f64,
    pub score_seconds: f64,
    pub memory_bytes: u64,
    pub tokens: u64,
    pub sparsity: f64,
}

impl From<&pb::StepReport> for StepPoint {
    fn from(report: &pb::StepReport) -> Self {
        Self {
            step: report.step,
            loss: report.loss,
            grad_norm: report.grad_norm,
            learning_rate: report.learning_rate,
            seconds: seconds(report.duration.as_ref()),
            score_seconds: seconds(report.score_duration.as_ref()),
            memory_bytes: report.memory_bytes,
            tokens: report.tokens,
            sparsity: report.sparsity,
        }
    }
}

fn seconds(duration: Option<&prost_types::Duration>) -> f64 {
    duration.map_or(0.0, |duration| duration.seconds as f64 + f64::from(duration.nanos) * 1e-9)
}

/// The first and the last of something that a run changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct FirstLast {
    pub first: f64,
    pub last: f64,
}

impl History {
    /// Takes in the next event of the run.
    pub(crate) fn note(&mut self, event: &pb::RunEvent) {
        use pb::run_event::Kind;
        if let Some(time) = &event.time {
            let now = time.seconds as f64 + f64::from(time.nanos) * 1e-9;
            let first = *self.first_time_seconds.get_or_insert(now);
            self.wall_seconds = self.wall_seconds.max(now - first);
        }
        match &event.kind {
            Some(Kind::StateChange(change)) => self.state = Some(change.clone()),
            Some(Kind::Step(report)) if report.skipped.is_empty() => self.steps.push(StepPoint::from(report)),
            // Its loss is no number.
            Some(Kind::Step(_)) => {}
            Some(Kind::Restart(restart)) => {
                let next_step = usize::try_from(restart.next_step).unwrap_or(usize::MAX);
                self.steps.truncate(next_step);
            }
            Some(Kind::Checkpoint(_) | Kind::Guard(_) | Kind::Calibration(_)) => {}
            Some(Kind::Decision(decision)) => self.decisions.push(decision.clone()),
            Some(Kind::Evaluation(evaluation)) => self.evaluations.push(evaluation.clone()),
            // The page shows perplexities alone.
            Some(Kind::Task(_)) => {}
            Some(Kind::Export(result)) => self.export = Some(result.clone()),
            None => {}
        }
    }

    /// Reads events, one JSON object a line.
    ///
    /// # Errors
    /// When the file cannot be read, is empty, or a line is no event: with its number.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("failed to read `{}`", path.display()))?;
        let mut history = Self::default();
        let mut count = 0;
        for (index, line) in text.split_inclusive('\n').enumerate() {
            let place = || format!("`{}` line {}", path.display(), index + 1);
            if line.trim().is_empty() {
                continue;
            }
            let value = match serde_json::from_str(line) {
                Ok(value) => value,
                // Whoever wrote it was killed in the middle of it.
                Err(_) if !line.ends_with('\n') => break,
                Err(error) => return Err(error).with_context(|| format!("{} is not JSON", place())),
            };
            history.note(&proto_json::from_json(&value).with_context(place)?);
            count += 1;
        }
        anyhow::ensure!(count > 0, "`{}` holds no events", path.display());
        Ok(history)
    }

    /// Mean seconds of a step over the first and the last steps: a tenth of them, at least one, at most twenty.
    /// The very first step warms caches up and counts only where it is alone.
    #[must_use]
    pub(crate) fn step_seconds(&self) -> Option<FirstLast> {
        let seconds: Vec<f64> = self.steps.iter().map(|point| point.seconds).collect();
        let counted = if seconds.len() > 2 { &seconds[1..] } else { &seconds[..] };
        if counted.is_empty() {
            return None;
        }
        let window = (counted.len() / 10).clamp(1, 20);
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        Some(FirstLast { first: mean(&counted[..window]), last: mean(&counted[counted.len() - window..]) })
    }

    /// Resident bytes of the fullest rank: the most over the first tenth of the steps, and over the last.
    #[must_use]
    pub(crate) fn memory_bytes(&self) -> Option<FirstLast> {
        if self.steps.is_empty() {
            return None;
        }
        let window = (self.steps.len() / 10).max(1);
        let most = |part: &[StepPoint]| part.iter().map(|point| point.memory_bytes).max().unwrap_or(0) as f64;
        Some(FirstLast {
            first: most(&self.steps[..window]),
            last: most(&self.steps[self.steps.len() - window..]),
        })
    }

    /// The most that any rank held at any step.
    #[must_use]
    pub(crate) fn peak_memory_bytes(&self) -> Option<u64> {
        self.steps.iter().map(|point| point.memory_bytes).max()
    }

    /// Perplexities before the first step and after the last.
    #[must_use]
    pub(crate) fn perplexities(&self) -> Option<FirstLast> {
        let first = self.evaluations.first()?;
        // Of several window lengths the first.
        let mut of_window =
            self.evaluations.iter().filter(|evaluation| evaluation.window_tokens == first.window_tokens);
        let last = of_window.next_back()?;
        of_window.next().is_some().then_some(FirstLast { first: first.perplexity, last: last.perplexity })
    }

    #[must_use]
    pub(crate) fn dense_parameters(&self) -> Option<u64> {
        self.run.as_ref()?.plan.as_ref().map(|plan| plan.dense_parameters).filter(|count| *count > 0)
    }

    /// Parameters of the result: written, or decided, or planned.
    #[must_use]
    pub(crate) fn pruned_parameters(&self) -> Option<u64> {
        let written = self.export.as_ref().map(|result| result.parameters);
        let decided = self.decisions.last().map(|decision| decision.parameters);
        let planned = || self.run.as_ref()?.plan.as_ref().map(|plan| plan.pruned_parameters);
        written.or(decided).or_else(planned).filter(|count| *count > 0)
    }

    /// Fraction of the projection weights that is gone at the end.
    #[must_use]
    pub(crate) fn final_sparsity(&self) -> f64 {
        self.decisions.last().map_or(0.0, |decision| decision.sparsity)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A run of `steps` steps that shrinks by half.
    pub(crate) fn example(steps: u64) -> History {
        let mut history = History::default();
        let mut revision = 0;
        let mut note = |history: &mut History, kind| {
            revision += 1;
            let time = Some(prost_types::Timestamp { seconds: revision as i64, nanos: 0 });
            history.note(&pb::RunEvent { revision, time, kind: Some(kind) });
        };
        let evaluation = |label: &str, perplexity, step| {
            let evaluation = pb::Evaluation { label: label.into(), perplexity, step, ..Default::default() };
            pb::run_event::Kind::Evaluation(evaluation)
        };
        note(&mut history, evaluation("dense", 20.0, 0));
        let layers =
            |count: u32, channels| vec![pb::LayerWidths { query_heads: count, kv_heads: count, channels }; 6];
        for step in 0..steps {
            let share = step as f64 / steps as f64;
            let report = pb::StepReport {
                step,
                loss: 4.0 - share,
                grad_norm: 1.0,
                learning_rate: 1e-3 * (1.0 - share),
                tokens: 1024,
                duration: Some(prost_types::Duration { seconds: 2 - i64::from(2 * step >= steps), nanos: 0 }),
                memory_bytes: if 2 * step >= steps { 500 } else { 1000 },
                sparsity: if 2 * step >= steps { 0.5 } else { 0.0 },
                ..Default::default()
            };
            note(&mut history, pb::run_event::Kind::Step(report));
            if 2 * step == steps {
                let layers = layers(2, 24);
                let decision = pb::Decision { generation: 1, step, sparsity: 0.5, parameters: 600, layers };
                note(&mut history, pb::run_event::Kind::Decision(decision));
            }
        }
        note(&mut history, evaluation("pruned", 25.0, steps));
        history
    }

    #[test]
    fn the_summary_compares_the_start_with_the_end() {
        let history = example(40);
        assert_eq!(history.perplexities(), Some(FirstLast { first: 20.0, last: 25.0 }));
        assert_eq!(history.step_seconds(), Some(FirstLast { first: 2.0, last: 1.0 }));
        assert_eq!(history.memory_bytes(), Some(FirstLast { first: 1000.0, last: 500.0 }));
        assert_eq!(history.pruned_parameters(), Some(600));
    }

    #[test]
    fn events_are_read_up_to_where_a_killed_run_left_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let event = "{\"revision\": 1, \"evaluation\": {\"perplexity\": 7.5}}\n";
        std::fs::write(&path, format!("{event}{event}{{\"revis")).unwrap();
        assert_eq!(History::read(&path).unwrap().evaluations.len(), 2);
        std::fs::write(&path, format!("{event}{{\"revis\n{event}")).unwrap();
        assert!(format!("{:#}", History::read(&path).unwrap_err()).contains("line 2 is not JSON"));
    }

    #[test]
    fn a_run_without_steps_has_no_summary_of_them() {
        let history = History::default();
        assert_eq!(history.step_seconds(), None);
        assert_eq!(history.memory_bytes(), None);
        assert_eq!(history.perplexities(), None);
    }
}
