//! Measuring the model: each window length, then each task, one after the other, on all ranks at once.

use crate::run::{Answer, Gather, Measured, Phase};
use crate::transition::{Transition, agree};
use crate::{Effect, Evaluation, RunEventKind, TaskResult, TaskScore};
use std::time::Duration;

impl Transition<'_> {
    pub(crate) fn evaluate(&mut self, label: &'static str) {
        self.measure(label, 0);
    }

    /// Measures number `place`, or goes on when all are measured.
    fn measure(&mut self, label: &'static str, place: usize) {
        if let Some(measurement) = self.run.setup.measurements().get(place) {
            self.run.phase = Phase::Evaluating { label, place, answers: Gather::new(self.run.tp_degree()) };
            self.effects.push(Effect::Evaluate(*measurement));
        } else if self.run.next_step < self.run.setup.recipe().steps {
            self.train();
        } else {
            self.wind_up();
        }
    }

    pub(crate) fn evaluated(&mut self, tp_rank: usize, answer: Answer) {
        if !self.is_rank("a measurement", tp_rank) {
            return;
        }
        let Phase::Evaluating { label, place, .. } = &self.run.phase else {
            return self.refuse("a measurement", tp_rank);
        };
        let (label, place) = (*label, *place);
        // A repeated answer to the question before is none to this one.
        if self.run.setup.measurements().get(place) != Some(&answer.measurement) {
            return self.refuse("a measurement", tp_rank);
        }
        let Phase::Evaluating { answers, .. } = &mut self.run.phase else { return };
        let Some(answers) = answers.put(tp_rank, answer) else { return };
        if let Some(bad) = answers.iter().position(|answer| !answer.measured.is_sound()) {
            let (name, what) = (self.run.name(bad), answers[bad].measured.in_words());
            return self.fail(format!("the {label} model cannot be measured: {name} reports {what}"));
        }
        let first = &answers[0].measured;
        if let Some(other) = answers.iter().position(|answer| !answer.measured.agrees_with(first)) {
            let (name, what) = (self.run.name(other), answers[other].measured.in_words());
            return self.fail(format!(
                "ranks diverged while measuring the {label} model: {} on rank 0, {what} on {name}",
                first.in_words()
            ));
        }
        let duration = answers.iter().map(|answer| answer.duration).max().unwrap_or(Duration::ZERO);
        let (label_text, step) = (label.to_owned(), self.run.next_step);
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
        self.measure(label, place + 1);
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
