//! Measuring the model: each window length, then each task, one after the other, on all ranks at once.

use crate::run::{Answer, Gather, Measured, Next, Phase, Purpose, Run};
use crate::setup::{GuardAction, GuardBound};
use crate::transition::{Transition, agree};
use crate::{Effect, Evaluation, Generation, GuardVerdict, Measurement, RunEventKind, TaskResult, TaskScore};
use std::time::Duration;

/// Label of the model as it came.
pub(crate) const DENSE: &str = "dense";

impl Run {
    /// Label of what the run makes.
    pub(crate) fn result_label(&self) -> &'static str {
        if self.setup.target().is_some() { "pruned" } else { "tuned" }
    }

    pub(crate) fn label(&self, purpose: Purpose) -> &'static str {
        match purpose {
            Purpose::Dense => DENSE,
            Purpose::Result => self.result_label(),
            Purpose::Guard => "half-pruned",
        }
    }

    /// How many measurements the result takes.
    pub(crate) fn result_measurements(&self) -> usize {
        match self.setup.recipe().steps {
            0 => 0,
            _ => self.setup.measurements().len(),
        }
    }
}

impl Transition<'_> {
    /// Measures what is not measured yet, or goes on when all is.
    pub(crate) fn measure(&mut self, purpose: Purpose) {
        let (place, measurement) = match purpose {
            Purpose::Guard => (0, Some(Measurement::Window { index: 0 })),
            Purpose::Dense | Purpose::Result => {
                let place = self.run.history.measured(self.run.label(purpose));
                (place, self.run.setup.measurements().get(place).copied())
            }
        };
        match measurement {
            // A wish is granted between two measurements.
            Some(measurement) if self.run.wish.is_none() || purpose == Purpose::Guard => {
                let answers = Gather::new(self.run.tp_degree());
                self.run.phase = Phase::Evaluating { purpose, place, answers };
                self.effects.push(Effect::Evaluate(measurement));
            }
            Some(_) | None => self.go_on(),
        }
    }

    pub(crate) fn is_measured(&self, purpose: Purpose) -> bool {
        self.run.history.measured(self.run.label(purpose)) >= self.run.setup.measurements().len()
    }

    pub(crate) fn evaluated(&mut self, tp_rank: usize, answer: Answer) {
        if !self.is_rank("a measurement", tp_rank) {
            return;
        }
        let Phase::Evaluating { purpose, place, .. } = &self.run.phase else {
            return self.refuse("a measurement", tp_rank);
        };
        let (purpose, place) = (*purpose, *place);
        let label = self.run.label(purpose);
        // A repeated answer to the question before is none to this one.
        let asked = match purpose {
            Purpose::Guard => Some(Measurement::Window { index: 0 }),
            Purpose::Dense | Purpose::Result => self.run.setup.measurements().get(place).copied(),
        };
        if asked != Some(answer.measurement) {
            return self.refuse("a measurement", tp_rank);
        }
        let Phase::Evaluating { answers, .. } = &mut self.run.phase else { return };
        let Some(answers) = answers.put(tp_rank, answer) else { return };
        if let Some(bad) = answers.iter().position(|answer| !answer.measured.is_sound()) {
            let (name, what) = (self.run.name(bad), answers[bad].measured.in_words());
            return self.fault(format!("the {label} model cannot be measured: {name} reports {what}"));
        }
        let first = &answers[0].measured;
        if let Some(other) = answers.iter().position(|answer| !answer.measured.agrees_with(first)) {
            let (name, what) = (self.run.name(other), answers[other].measured.in_words());
            return self.fault(format!(
                "ranks diverged while measuring the {label} model: {} on rank 0, {what} on {name}",
                first.in_words()
            ));
        }
        let duration = answers.iter().map(|answer| answer.duration).max().unwrap_or(Duration::ZERO);
        let (label_text, step) = (label.to_owned(), self.run.next_step);
        if purpose == Purpose::Guard {
            let measured = first.clone();
            return self.judge(&measured);
        }
        self.record(match first.clone() {
            Measured::Window { negative_log_likelihood, predicted_tokens, window_tokens } => {
                RunEventKind::Evaluation(Evaluation {
                    label: label_text,
                    perplexity: (negative_log_likelihood / predicted_tokens as f64).exp(),
                    negative_log_likelihood,
                    predicted_tokens,
                    step,
                    duration,
                    window_tokens,
                })
            }
            Measured::Task(score) => {
                RunEventKind::Task(TaskResult { label: label_text, score, step, duration })
            }
        });
        self.measure(purpose);
    }

    /// Whether a quality guard wants to look before the mask after the last step is decided, or before the run ends.
    pub(crate) fn guard_looks(&self) -> bool {
        self.run.setup.options().guard.is_some()
            && self.run.history.held_at.is_none()
            && self.run.generation > Generation(0)
            // What was decided next before a fault had been looked at.
            && self.run.history.masks.step(self.run.generation.next()).is_none()
    }

    fn judge(&mut self, measured: &Measured) {
        let perplexity = match measured {
            Measured::Window { negative_log_likelihood, predicted_tokens, .. } => {
                (negative_log_likelihood / *predicted_tokens as f64).exp()
            }
            Measured::Task(_) => return self.refuse("a task", 0),
        };
        let Some(guard) = self.run.setup.options().guard else { return self.decide_or_go_on() };
        let max_perplexity = match (guard.bound, self.run.history.dense_perplexity) {
            (GuardBound::Perplexity(most), _) => most,
            (GuardBound::Ratio(ratio), Some(dense)) => ratio * dense,
            (GuardBound::Ratio(_), None) => {
                return self
                    .fail("the quality guard has no perplexity of the dense model to compare with".into());
            }
        };
        let action = (perplexity > max_perplexity).then_some(guard.action);
        let generation = self.run.generation;
        self.record(RunEventKind::Guard(GuardVerdict { perplexity, max_perplexity, generation, action }));
        match action {
            None => self.decide_or_go_on(),
            Some(GuardAction::Hold) => self.go_on(),
            Some(GuardAction::Revert) => {
                // The checkpoint on its way is of the mask that is given up.
                self.run.writing = None;
                self.run.resuming = Some(format!(
                    "perplexity {perplexity:.4} under mask {generation} exceeds {max_perplexity:.4}"
                ));
                self.abandon(Next::Revert);
            }
        }
    }
}

impl Measured {
    fn is_sound(&self) -> bool {
        match self {
            Self::Window { negative_log_likelihood, predicted_tokens, .. } => {
                negative_log_likelihood.is_finite() && *predicted_tokens > 0
            }
            Self::Task(score) => score.is_sound(),
        }
    }

    /// The same but for rounding.
    fn agrees_with(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Window { negative_log_likelihood, predicted_tokens, window_tokens },
                Self::Window {
                    negative_log_likelihood: other_nats,
                    predicted_tokens: other_predicted,
                    window_tokens: other_window,
                },
            ) => {
                predicted_tokens == other_predicted
                    && window_tokens == other_window
                    && agree(*negative_log_likelihood, *other_nats)
            }
            (Self::Task(score), Self::Task(other)) => {
                score.task == other.task
                    && score.count == other.count
                    && agree(score.log_likelihood, other.log_likelihood)
            }
            (Self::Window { .. }, Self::Task(_)) | (Self::Task(_), Self::Window { .. }) => false,
        }
    }

    fn in_words(&self) -> String {
        match self {
            Self::Window { negative_log_likelihood, predicted_tokens, .. } => {
                format!("{negative_log_likelihood} nats over {predicted_tokens} tokens")
            }
            Self::Task(TaskScore { task, count, correct, log_likelihood, .. }) => {
                format!("task `{task}`: {correct} of {count} rows right, {log_likelihood} nats")
            }
        }
    }
}

impl TaskScore {
    /// Whether these can be a task's figures.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.log_likelihood.is_finite()
            && self.count > 0
            && self.correct <= self.count
            && self.correct_normalized.is_none_or(|correct| correct <= self.count)
    }
}
