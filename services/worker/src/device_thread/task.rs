//! Measuring a task: which choices share a context, what goes into a pass, and the passes one after the other.

use super::{Fault, Reply, Shard, TaskItem, guarded, lose};
use crate::data;
use engine::Prompt;
use std::time::Instant;
use token_batches::{Choice, TaskSet};
use tokio::sync::mpsc;
use tracing::{info, warn};
use wire::pb;
use wire::status::{Failure, Reason};

/// One prompt and the places of its continuations among the task's choices.
struct Asked<'a> {
    prompt: Prompt<'a>,
    places: Vec<usize>,
}

/// The prompts of all questions: choices with equal contexts share one.
fn prompts(set: &TaskSet) -> Vec<Asked<'_>> {
    let mut all: Vec<Asked<'_>> = Vec::new();
    let mut place = 0;
    for question in set.questions() {
        let first_of_question = all.len();
        for Choice { context, continuation, .. } in &question.choices {
            let same =
                all[first_of_question..].iter_mut().find(|asked| asked.prompt.context == context.as_slice());
            match same {
                Some(asked) => {
                    asked.prompt.continuations.push(continuation);
                    asked.places.push(place);
                }
                None => all.push(Asked {
                    prompt: Prompt { context, continuations: vec![continuation] },
                    places: vec![place],
                }),
            }
            place += 1;
        }
    }
    all
}

/// Passes of up to `pass_tokens` tokens, padding included: the longest prompts first, so that rows of a pass are of
/// like length and what does not fit into memory fails early. The same on every rank.
fn passes<'a, 'b>(asked: &'b mut [Asked<'a>], pass_tokens: usize) -> Vec<&'b [Asked<'a>]> {
    asked.sort_by_key(|asked| std::cmp::Reverse(asked.prompt.pass_tokens()));
    let mut passes = Vec::new();
    let mut left: &[Asked<'a>] = asked;
    while let Some(longest) = left.first() {
        let count = (pass_tokens / longest.prompt.pass_tokens().max(1)).clamp(1, left.len());
        let (pass, rest) = left.split_at(count);
        passes.push(pass);
        left = rest;
    }
    passes
}

impl Shard<'_> {
    pub(super) fn evaluate_task(
        &mut self,
        task_index: usize,
        accepted: Reply<()>,
        sink: &mpsc::Sender<TaskItem>,
    ) {
        let known = self.require_group().and_then(|()| match self.data.task(task_index) {
            Some(_) => Ok(()),
            None => Err(data::none_loaded(&format!("task {task_index}"), "tasks")),
        });
        let refused = known.is_err();
        // A caller that is gone already is noticed at the first sign of life.
        let _ = accepted.send(known);
        if refused {
            return;
        }
        match guarded("a task", || self.ask(task_index, sink)) {
            Ok(Some(score)) => {
                let kind = Some(pb::evaluate_task_response::Kind::Score(score));
                let _ = self.send(sink, Ok(pb::EvaluateTaskResponse { kind }));
            }
            Ok(None) => info!(task_index, "the task stops: nobody listens any more"),
            // The stream ends with the reason of the session's end.
            Err(Fault { failure, ends_session: true }) => lose(&self.context.end, failure),
            Err(Fault { failure, ends_session: false }) => {
                warn!(task_index, error = %failure, "task failed");
                let _ = self.send(sink, Err(failure.into()));
            }
        }
    }

    /// All passes of a task; nothing when nobody listens any more or the session is over.
    fn ask(
        &mut self,
        task_index: usize,
        sink: &mpsc::Sender<TaskItem>,
    ) -> Result<Option<pb::TaskScore>, Fault> {
        let Some((set, spec)) = self.data.task(task_index) else {
            return Err(data::none_loaded("such task", "tasks").into());
        };
        let started = Instant::now();
        let mut asked = prompts(set);
        let total_tokens: u64 = asked.iter().map(|asked| asked.prompt.pass_tokens() as u64).sum();
        let mut log_likelihoods = vec![0.0; set.choices().count()];
        let mut tokens = 0;
        for pass in passes(&mut asked, spec.pass_tokens) {
            let pass_prompts: Vec<Prompt<'_>> = pass.iter().map(|asked| asked.prompt.clone()).collect();
            let judged = self.engine.continuation_log_likelihoods(&pass_prompts)?;
            for (asked, judged) in pass.iter().zip(judged) {
                tokens += asked.prompt.pass_tokens() as u64;
                for (place, log_likelihood) in asked.places.iter().zip(judged) {
                    log_likelihoods[*place] = log_likelihood;
                }
            }
            let progress = pb::TaskProgress { tokens, total_tokens };
            let kind = Some(pb::evaluate_task_response::Kind::Progress(progress));
            if self.send(sink, Ok(pb::EvaluateTaskResponse { kind })).is_err() {
                return Ok(None);
            }
        }
        if let Some(place) = log_likelihoods.iter().position(|value| !value.is_finite()) {
            let message = format!(
                "task `{}`: the log likelihood of choice {place} is {}",
                set.name(),
                log_likelihoods[place]
            );
            return Err(Failure::new(Reason::NotFinite, message).into());
        }
        let outcome = set.outcome(&log_likelihoods);
        let score = pb::TaskScore {
            task: set.name().to_owned(),
            count: outcome.counts.questions,
            correct: outcome.counts.correct,
            correct_normalized: outcome.counts.correct_normalized,
            log_likelihood: outcome.log_likelihood,
            tokens,
            log_likelihoods: if spec.log_likelihoods { log_likelihoods } else { Vec::new() },
        };
        self.note_progress();
        info!(
            task = score.task,
            rows = score.count,
            correct = score.correct,
            tokens,
            seconds = started.elapsed().as_secs_f64(),
            "task evaluated"
        );
        Ok(Some(score))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(tokens: &[u32]) -> Asked<'_> {
        Asked { prompt: Prompt { context: tokens, continuations: Vec::new() }, places: Vec::new() }
    }

    #[test]
    fn a_pass_holds_prompts_of_like_length_up_to_its_tokens() {
        let tokens = [0; 50];
        let mut all: Vec<Asked<'_>> =
            [3, 40, 10, 9, 2, 50, 8].iter().map(|len| asked(&tokens[..*len])).collect();
        let lengths = |pass: &[Asked<'_>]| -> Vec<usize> {
            pass.iter().map(|asked| asked.prompt.pass_tokens()).collect()
        };
        let sorted: Vec<Vec<usize>> = passes(&mut all, 30).into_iter().map(lengths).collect();
        // Longer than a pass goes alone; padded to the first, the rest fit.
        assert_eq!(sorted, [vec![50], vec![40], vec![10, 9, 8], vec![3, 2]]);
    }
}
